"""Where the command writes: answers to standard output, progress to standard error."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

#: Columns that the tables of an answer need: in fewer, their numbers would lose their ends.
_NARROWEST = 80


def line(text: str, to: Console = out) -> None:
    """Prints text that holds names, of files for example: brackets in it are no markup, and it is
    left to the terminal to break it.
    """
    to.print(text, markup=False, soft_wrap=True)


def answer(tables: RenderableType) -> None:
    """Prints the tables of an answer, which a narrower terminal breaks by itself."""
    width = max(out.width, _NARROWEST)
    Console(highlight=False, file=out.file, width=width, quiet=out.quiet).print(tables)


def whole(table: Table) -> None:
    """Prints a table of numbers at its full width, even if the terminal is narrower: a number cut
    short is no number.
    """
    wanted = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    wide = Console(highlight=False, file=out.file, width=max(out.width, wanted))
    wide.print(table)
