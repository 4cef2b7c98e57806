"""The answers: estimate and run, and how their results are shown."""

from emulator.report.answer import estimate, run
from emulator.report.result import Bound, Estimate, Row, Run

__all__ = ["Bound", "Estimate", "Row", "Run", "estimate", "run"]
