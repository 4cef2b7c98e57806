"""The measured points behind the fitted numbers, as CSV files with their sources."""

from __future__ import annotations

import csv
from importlib import resources


def rows(name: str) -> tuple[dict[str, str], ...]:
    """The rows of `calibration/<name>.csv`, in order; an empty cell is an empty string."""
    text = resources.files(__name__).joinpath(f"{name}.csv").read_text()
    return tuple(csv.DictReader(text.splitlines()))
