"""Which arithmetic does a matrix unit have? Recovered from its answers to a fixed set of products.

`identify` asks any callable; `kernels.probe.folder` asks a device that has no JAX. Either way one
rule decides: the record that is returned predicts every answer that was compared, and for each of
its parameters either some answer contradicts every other value, or the value is called ambiguous.
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
