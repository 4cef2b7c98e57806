"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

_DECIMAL = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
_SECONDS = (("", 1.0), ("m", 1e-3), ("u", 1e-6), ("n", 1e-9))


def seconds(value: float) -> str:
    """Seconds with a prefix: "12.3 ms"."""
    for prefix, scale in _SECONDS:
        if _shown(value) >= scale:
            return f"{_three(value / scale)} {prefix}s"
    few = _three(value / 1e-9) if abs(value) >= 0.01e-9 else f"{value / 1e-9:.2g}"
    return f"{few} ns" if value else "0 s"


def quantity(value: float, unit: str) -> str:
    """A number with a decimal prefix: "354 TFLOP", "1.20 GB"; joules and watts below 1, too."""
    for prefix, scale in (*_DECIMAL, *(_SECONDS if unit in ("J", "W") else ())):
        if _shown(value) >= scale:
            return f"{_three(value / scale)} {prefix}{unit}"
    return f"{_three(value)} {unit}"


def interval(low: float, high: float, unit: str) -> str:
    return f"{quantity(low, unit)} to {quantity(high, unit)}"


def fact(value: Any, unit: str) -> str:
    """A machine's number to four digits: "353.9 TFLOP/s", "156 W to 187 W"; tables by lines."""
    if isinstance(value, tuple):
        if all(isinstance(item, tuple) for item in value):  # name -> value
            return "\n".join(f"{name} {fact(entry, unit)}" for name, entry in value)
        return " to ".join(fact(item, unit) for item in value)
    if isinstance(value, str):
        return value
    if unit == "B":
        return capacity(value)
    if not unit:
        return f"{value:,}"
    if unit.startswith("J/") and value < 1:
        return f"{value / 1e-12:.4g} p{unit}"
    scales = _SECONDS if unit == "s" else _DECIMAL
    for prefix, scale in scales:
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def capacity(nbytes: float) -> str:
    """Bytes with a binary prefix, as capacities and buffers are counted: "64.00 GiB"."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return "1 byte" if nbytes == 1 else f"{nbytes} bytes"


def count(value: float) -> str:
    """How often: whole if it is."""
    return f"{value:.0f}" if abs(value - round(value)) < 1e-9 else f"{value:.2f}"


def several(number: int, thing: str) -> str:
    """How many of a thing: "1 package", "384 packages"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _shown(value: float) -> float:
    """The size of a number as three digits show it: 999.7 is 1000."""
    return abs(float(f"{value:.3g}"))


def _three(value: float) -> str:
    size = _shown(value)
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
