"""Numbers as people read them."""

from __future__ import annotations

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
_SMALL = ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def scaled(value: float, unit: str) -> str:
    """Decimal prefixes for rates and powers: 1.96e11, "B/s" -> "196 GB/s"."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def seconds(value: float) -> str:
    for factor, unit in _SMALL:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.3g} s"


def binary(value: int) -> str:
    """Binary prefixes for capacities and message sizes."""
    size: float = value
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
