"""Which arithmetic does a matrix unit have? Recovered from its answers to a fixed set of products.

`identify` asks any callable; `kernels.probe.folder` asks a device that has no JAX. Either way one
rule decides: the record that is returned predicts every answer that was compared, and for each of
its parameters either some answer contradicts every other value, or the value is called ambiguous.

What is asked is in `inputs` and `shapes`; `box` asks a callable, `run_probe` is the script for a
device. `answers` come to `search`, which begins with their `order` and looks among the `foreign`,
too; `explain` says why a value, `nearest` what else comes near, `report` both.
"""

from kernels.probe.answers import Answers, Failure
from kernels.probe.box import ask, identify, investigate
from kernels.probe.report import Report, UnknownArithmetic, judge

__all__ = [
    "Answers",
    "Failure",
    "Report",
    "UnknownArithmetic",
    "ask",
    "identify",
    "investigate",
    "judge",
]
