"""The answers: estimate and run, and how their results are shown.

`answer` reads a program, `result` is what it says; shown by `table` (with `literal`), `html`,
`perfetto`, `chakra` (with `protobuf`) and `plot`. `compare` puts machines side by side, with the
`errors` of values, shown by `compare_table`.
"""

from emulator.report.answer import estimate, run
from emulator.report.result import Bound, Estimate, Row, Run

__all__ = ["Bound", "Estimate", "Row", "Run", "estimate", "run"]
