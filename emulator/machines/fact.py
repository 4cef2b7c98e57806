"""Where a number comes from: citations stand beside the values and can be printed.

A record (`Chip`, `Tier`, ...) keeps the citations it was built from. `facts_of` lists its numbers
with their sources; a number that was changed afterwards (`dataclasses.replace`) is reported as
assumed, never under the old source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

EVIDENCE = ("documented", "measured", "inferred", "assumed")

T = TypeVar("T")

_UNITS = (
    ("_flops_per_s", "FLOP/s"),
    ("_bytes_per_s", "B/s"),
    ("_bytes_per_cycle", "B/cycle"),
    ("_cycles", "cycles"),
    ("_s_per_byte", "s/B"),
    ("_j_per_byte", "J/B"),
    ("_j_per_flop", "J/FLOP"),
    ("_bytes", "B"),
    ("_hz", "Hz"),
    ("_w", "W"),
    ("_s", "s"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One number of a machine, ready to print."""

    name: str
    value: Any
    unit: str
    per: str
    source: str
    evidence: str
    note: str


@dataclasses.dataclass(frozen=True, slots=True)
class Citation:
    """Values (field name, value) that one source supports."""

    values: tuple[tuple[str, Any], ...]
    evidence: str
    source: str
    note: str = ""

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE:
            raise ValueError(
                f"evidence must be one of {', '.join(EVIDENCE)}; got {self.evidence!r}"
            )
        if not self.source:
            raise ValueError("source is empty; name the publication, repository or reasoning")


def cite(evidence: str, source: str, note: str = "", **values: Any) -> Citation:
    """A citation for the given fields: `cite("measured", "arXiv ...", latency_s=1.2e-6)`."""
    return Citation(tuple(values.items()), evidence, source, note)


def build(record: type[T], *citations: Citation, **plain: Any) -> T:
    """`record` from cited numbers and plain (non-numeric) fields; each cited value is written once,
    in its citation.
    """
    values: dict[str, Any] = {}
    for citation in citations:
        for name, value in citation.values:
            if name in values:
                raise ValueError(
                    f"{record.__name__}.{name} is cited twice; keep one citation for each field"
                )
            values[name] = value
    fields: dict[str, Any] = {**plain, **values, "citations": citations}
    return record(**fields)


def facts_of(record: Any, per: str, prefix: str = "") -> Iterator[Fact]:
    """The numbers of one record with their sources, in field order."""
    cited = {name: (value, c) for c in record.citations for name, value in c.values}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name == "citations" or not _is_number(value):
            continue
        old, citation = cited.get(field.name, (None, None))
        if citation is None:
            source, evidence, note = "no source given", "assumed", ""
        elif old != value:
            source, evidence, note = "changed by the user", "assumed", f"{old} in {citation.source}"
        else:
            source, evidence, note = citation.source, citation.evidence, citation.note
        yield Fact(
            name=prefix + field.name,
            value=value,
            unit=unit_of(field.name),
            per=per,
            source=source,
            evidence=evidence,
            note=note,
        )


def unit_of(name: str) -> str:
    """The unit that a field name ends in; empty for counts and ratios."""
    return next((unit for suffix, unit in _UNITS if ("_" + name).endswith(suffix)), "")


def check_positive(record: Any, *names: str) -> None:
    """Raises ValueError unless every named field of `record` is a finite number above zero."""
    for name in names:
        value = getattr(record, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < float("inf")
        ):
            raise ValueError(
                f"{type(record).__name__}.{name} must be a number above 0; got {value!r}"
            )


def check_counts(record: Any, *names: str) -> None:
    """Raises ValueError unless every named field of `record` is a whole number above zero."""
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{type(record).__name__}.{name} must be a whole number above 0; got {value!r}"
            )


def check_rates(record: Any, *names: str, needs: str) -> None:
    """Raises ValueError unless every named field is a table ((name, rate), ...) of finite rates
    above zero that has an entry for `needs`.
    """
    for name in names:
        table, what = getattr(record, name), f"{type(record).__name__}.{name}"
        pairs = isinstance(table, tuple) and all(
            isinstance(entry, tuple) and len(entry) == 2 for entry in table
        )
        if not pairs:
            raise ValueError(f"{what} must be pairs (dtype, rate) in a tuple; got {table!r}")
        for dtype, rate in table:
            if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ValueError(f"{what}[{dtype!r}] must be above 0; got {rate!r}")
        if needs not in dict(table):
            raise ValueError(f"{what} has no entry for {needs!r}, which every machine needs")


def check_parts(record: Any, **types: type) -> None:
    """Raises ValueError unless every named field of `record` is a record of its type."""
    for name, wanted in types.items():
        value = getattr(record, name)
        if not isinstance(value, wanted):
            raise ValueError(
                f"{type(record).__name__}.{name} must be of type {wanted.__name__}; got {value!r}"
            )


def check_not_negative(record: Any, *names: str) -> None:
    """Raises ValueError unless every named field of `record` is a finite number, at least 0."""
    for name in names:
        value = getattr(record, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 <= value < float("inf")
        ):
            raise ValueError(
                f"{type(record).__name__}.{name} must be a number, 0 or above; got {value!r}"
            )


def check_interval(record: Any, *names: str) -> None:
    """Raises ValueError unless every named field is a pair (low, high) with 0 <= low <= high."""
    for name in names:
        value = getattr(record, name)
        if not is_interval(value):
            raise ValueError(
                f"{type(record).__name__}.{name} must be a pair (low, high), 0 <= low <= high; got "
                f"{value!r}"
            )


def is_interval(value: Any) -> bool:
    """Whether `value` is a pair of finite numbers (low, high) with 0 <= low <= high."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(end, (int, float)) for end in value)
        and 0 <= value[0] <= value[1] < float("inf")
    )


def _is_number(value: Any) -> bool:
    """Numbers, and tuples that hold numbers (intervals, per-dtype tables)."""
    if isinstance(value, bool):
        return False
    if isinstance(value, tuple):
        return bool(value) and any(_is_number(v) for v in value)
    return isinstance(value, (int, float))
