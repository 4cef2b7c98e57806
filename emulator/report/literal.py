"""Tables that show names as they are written: rich would take `['a']` for text but `[a]`, as in a
key of a user's tree, for a style.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text


class LiteralTable(Table):
    """A table whose title, heads and cells are text without markup."""

    def __init__(self, *, title: str | None = None, **options: Any) -> None:
        style = options.get("title_style") or "table.title"
        super().__init__(title=None if title is None else Text(title, style), **options)

    def add_column(self, header: Any = "", **options: Any) -> None:  # type: ignore[override]
        """As in rich, but `header` is no markup."""
        super().add_column(_literal(header), **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As in rich, but strings among `cells` are no markup."""
        super().add_row(*map(_literal, cells), **options)


def _literal(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell
