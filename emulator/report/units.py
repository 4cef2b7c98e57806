"""Numbers as people read them."""

from __future__ import annotations

from emulator.machines import Fact


def seconds(value: float) -> str:
    """Seconds with a prefix: "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-9)} ns" if value else "0 s"


def quantity(value: float, unit: str) -> str:
    """A number with a decimal prefix: "353.9 TFLOP", "1.2 GB"."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{_three(value / scale)} {prefix}{unit}"
    return f"{_three(value)} {unit}"


def interval(low: float, high: float, unit: str) -> str:
    return f"{quantity(low, unit)} to {quantity(high, unit)}"


def fact_value(fact: Fact) -> str:
    """A machine's number with its unit; intervals as "low to high"."""
    values = fact.value if isinstance(fact.value, tuple) else (fact.value,)
    unit = "" if fact.unit == "1" else fact.unit
    shown = [seconds(v) if unit == "s" else quantity(v, unit).strip() for v in values]
    return " to ".join(shown)


def count(value: float) -> str:
    """How often: whole if it is."""
    return f"{value:.0f}" if abs(value - round(value)) < 1e-9 else f"{value:.2f}"


def _three(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
