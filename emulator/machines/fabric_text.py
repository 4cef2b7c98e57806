"""A user's fabric in writing: one line of text, or a TOML file.

One line lists the levels from the inside out: `kind(sizes, rate, latency, planes=, taper=, name=)`,
divided by `/`:

    full_mesh(8, 56GB/s, 0.2us) / switch(48, 196GB/s, 1us, planes=7, taper=2)

Kinds are full_mesh, ring, mesh, torus and switch; a mesh or torus takes one size for each
dimension. GB is 10^9 bytes, GiB 2^30, Gb 10^9 bits. A TOML file says the same at more length:

    name = "two racks"                  # optional
    fabric = "ring(4, 50GB/s, 300ns)"   # or one [[level]] table for each level:

    [[level]]
    kind = "switch"
    sizes = [2]
    rate = "100GB/s"
    latency = "1us"

    [links]                             # rates of single links that differ
    "ring1/0-1" = "25GB/s"
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from emulator.machines.levels import KINDS, Level

_PREFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*)", re.IGNORECASE)
_UNITS = "rates are in B/s, KB/s, MB/s, GB/s, TB/s, GiB/s or Gb/s, times in s, ms, us or ns"


def parse(text: str) -> tuple[Level, ...]:
    """The levels of a one-line description.

    Raises:
        ValueError: what cannot be read, and where.
    """
    levels = []
    for number, (start, part) in enumerate(_split(text, "/"), 1):
        levels.append(_level(text, start, part, number))
    return tuple(levels)


def read(path: str | os.PathLike[str]) -> tuple[tuple[Level, ...], dict[str, float], str | None]:
    """(levels, rates of single links, name) of a TOML file.

    Raises:
        ValueError: what the file lacks or has wrong.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the fabric in {path}: {error}") from error
    unknown = set(table) - {"name", "fabric", "level", "links"}
    if unknown or ("fabric" in table) == ("level" in table):
        wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else "both or neither"
        raise ValueError(
            f'{path}: expected fabric = "..." or [[level]] tables, with name and [links] if '
            f"wanted; got {wrong}"
        )
    if "fabric" in table:
        if not isinstance(table["fabric"], str):
            raise ValueError(f"{path}: fabric must be a text; got {table['fabric']!r}")
        levels = parse(table["fabric"])
    else:
        if not isinstance(table["level"], list):
            raise ValueError(f"{path}: levels are tables headed [[level]]; got {table['level']!r}")
        levels = tuple(
            _table(f"{path}: level {i}", entry, i) for i, entry in enumerate(table["level"], 1)
        )
    given = table.get("links", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"{path}: links must be a table of names and rates; got {given!r}")
    links = {name: rate(f"{path}: links[{name!r}]", value) for name, value in given.items()}
    name = table.get("name")
    if not isinstance(name, str | None):
        raise ValueError(f"{path}: name must be a text; got {name!r}")
    return levels, links, name


def rate(where: str, value: Any) -> float:
    """Bytes per second of a number or of a text such as "56GB/s"."""
    if isinstance(value, str):
        number, unit = _quantity(where, value)
        scale = _rate_unit(unit)
        if scale is None:
            raise ValueError(f"{where}: {value!r} is no rate; {_UNITS}")
        value = number * scale
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a rate such as '56GB/s'; got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(
            f"{where}: a link's rate must be above 0; got {value!r} (a dead link is "
            "machine.degrade(links=[...]))"
        )
    return float(value)


def _table(where: str, entry: Any, number: int) -> Level:
    """A level from its table in a file."""
    keys = {"kind", "sizes", "rate", "latency", "planes", "taper", "name"}
    if not isinstance(entry, Mapping) or not {"kind", "sizes", "rate"} <= set(entry) <= keys:
        raise ValueError(
            f"{where}: expected kind, sizes, rate and perhaps latency, planes, taper, name; "
            f"got {entry!r}"
        )
    kind, sizes = entry["kind"], entry["sizes"]
    values = {
        "bytes_per_s": rate(f"{where}: rate", entry["rate"]),
        "latency_s": _time(f"{where}: latency", entry.get("latency", 0.0)),
    }
    try:
        return Level(
            name=entry.get("name", f"{kind}{number}"),
            kind=kind,
            sizes=tuple(sizes) if isinstance(sizes, list) else (sizes,),
            planes=entry.get("planes", 1),
            taper=entry.get("taper", 1.0),
            **values,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _time(where: str, value: Any) -> float:
    if isinstance(value, str):
        number, unit = _quantity(where, value)
        if unit not in _SECONDS:
            raise ValueError(f"{where}: {value!r} is no time; {_UNITS}")
        value = number * _SECONDS[unit]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"{where}: a latency must be 0 or above; got {value!r}")
    return float(value)


def _level(text: str, start: int, part: str, number: int) -> Level:
    """One `kind(...)` of the line."""
    where = f"fabric {text!r}, character {start + 1}"
    match = re.fullmatch(r"(\w+)\s*\((.*)\)", part, re.DOTALL)
    if match is None or match[1] not in KINDS:
        raise ValueError(
            f"{where}: expected {', '.join(KINDS)} with (sizes, rate, latency), as in "
            f"full_mesh(8, 56GB/s, 0.2us); got {part!r}"
        )
    values: dict[str, Any] = {"sizes": ()}
    for offset, entry in _split(match[2], ","):
        here = f"fabric {text!r}, character {start + match.start(2) + offset + 1}"
        _entry(here, entry, values)
    if "bytes_per_s" not in values:
        raise ValueError(f"{where}: {part!r} gives no rate, such as 56GB/s")
    try:
        return Level(kind=match[1], **{"name": f"{match[1]}{number}", "latency_s": 0.0, **values})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _entry(where: str, entry: str, values: dict[str, Any]) -> None:
    """Adds one argument of a level to `values`."""
    key, equals, value = (piece.strip() for piece in entry.partition("="))
    if equals:
        readers = {"planes": int, "taper": float, "name": str}
        if key not in readers:
            raise ValueError(f"{where}: unknown {key!r}; known: planes, taper, name")
        _once(where, key, values)
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise ValueError(f"{where}: {key} must be a number; got {value!r}") from error
        return
    number, unit = _quantity(where, entry)
    scale = _rate_unit(unit)
    if not unit:
        if not number.is_integer():
            raise ValueError(f"{where}: a size must be a whole number; got {entry!r}")
        values["sizes"] += (int(number),)
    elif scale is not None:
        _once(where, "bytes_per_s", values)
        values["bytes_per_s"] = rate(where, number * scale)
    elif unit in _SECONDS:
        _once(where, "latency_s", values)
        values["latency_s"] = _time(where, number * _SECONDS[unit])
    else:
        raise ValueError(f"{where}: unknown unit {unit!r} in {entry!r}; {_UNITS}")


def _once(where: str, key: str, values: Mapping[str, Any]) -> None:
    if key in values:
        what = {"bytes_per_s": "rate", "latency_s": "latency"}.get(key, key)
        raise ValueError(f"{where}: a level has one {what}; this is a second one")


def _quantity(where: str, text: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{where}: {text!r} is no number with a unit; {_UNITS}")
    return float(match[1]), match[2].strip()


def _rate_unit(unit: str) -> float | None:
    """Bytes per second of one `unit`; None if it is no rate."""
    match = re.fullmatch(r"([KMGT]i?|)(B|b)/s", unit)
    if match is None:
        return None
    return _PREFIX[match[1]] / (8 if match[2] == "b" else 1)


def _split(text: str, mark: str) -> Iterator[tuple[int, str]]:
    """(start, part) of `text` between marks that stand outside brackets.

    A rate's own slash, as in "GB/s", divides nothing.
    """
    depth, start = 0, 0
    for i, letter in enumerate(text + mark):
        depth += (letter == "(") - (letter == ")")
        if letter == mark and (depth <= 0 or i == len(text)) and not _in_unit(text, i, mark):
            part = text[start:i]
            yield start + len(part) - len(part.lstrip()), part.strip()
            start, depth = i + 1, 0


def _in_unit(text: str, i: int, mark: str) -> bool:
    return mark == "/" and re.match(r"[bB]/s\b", text[max(0, i - 1) : i + 3]) is not None
