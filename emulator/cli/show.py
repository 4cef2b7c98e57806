"""Where the command writes: answers to standard output, progress to standard error."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def whole(table: Table) -> None:
    """Prints a table of numbers at its full width, even if the terminal is narrower: a number cut
    short is no number.
    """
    wanted = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    wide = Console(highlight=False, file=out.file, width=max(out.width, wanted))
    wide.print(table)
