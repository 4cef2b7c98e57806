"""An `Arithmetic` as a JSON file: what a probe found, kept, edited by hand, and read again."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from kernels.arithmetic import ASCEND_910C_CANDIDATES, PRESETS, Arithmetic
from kernels.files import write

_FORMAT = "cm384 arithmetic 1"
_FIELDS = {field.name for field in dataclasses.fields(Arithmetic)}
_MODES = [field.name for field in dataclasses.fields(Arithmetic) if "Arithmetic" in str(field.type)]


def save(arithmetic: Arithmetic, path: str | os.PathLike[str]) -> None:
    """Writes `arithmetic` to `path`, which `load` reads; fields that have their default are left
    out, except the evidence.
    """
    text = json.dumps({"format": _FORMAT, **_plain(arithmetic)}, indent=2) + "\n"
    write(Path(path), text)


def load(path: str | os.PathLike[str]) -> Arithmetic:
    """The record in a file that `save` or a person wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or its record is impossible; the message names the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no arithmetic file {path}; `cm384 probe --read` writes one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected an arithmetic file in JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise ValueError(f'{path}: expected a JSON object with "format": "{_FORMAT}"')
    return _record(values, str(path))


def named(name: str | os.PathLike[str]) -> Arithmetic:
    """A preset (`NVIDIA_HOPPER`), a candidate (`ASCEND_910C/late_addend`) or a file, by its name.

    Raises:
        ValueError: nothing has this name; the message lists what has.
    """
    name = os.fspath(name)
    if name in PRESETS:
        return PRESETS[name]
    unit, _, key = name.partition("/")
    if unit == "ASCEND_910C" and key in ASCEND_910C_CANDIDATES:
        return ASCEND_910C_CANDIDATES[key]
    if Path(name).is_file():
        return load(name)
    candidates = ", ".join(f"ASCEND_910C/{key}" for key in ASCEND_910C_CANDIDATES)
    raise ValueError(
        f"unknown arithmetic {name!r}: neither a file nor one of {', '.join(PRESETS)}, {candidates}"
    )


def _plain(arithmetic: Arithmetic) -> dict[str, Any]:
    """Only what differs from the defaults, in the order of the fields."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(Arithmetic):
        value = getattr(arithmetic, field.name)
        if value == field.default and field.name != "evidence":
            continue
        if isinstance(value, Arithmetic):
            value = _plain(value)
        elif field.name == "nan":
            value = f"0x{value:08x}"
        plain[field.name] = value
    return plain


def _record(values: dict[str, Any], where: str) -> Arithmetic:
    unknown = sorted(set(values) - _FIELDS)
    if unknown:
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}"
        )
    for name in ("name", "products"):
        if name not in values:
            raise ValueError(f"{where}: the field {name!r} is missing")
    fields = dict(values)
    for name in ("name", "source"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{where}: {name} must be a string, got {fields[name]!r}")
    for mode in _MODES:
        value = fields.get(mode)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {mode} must be a record or null, got {value!r}")
        fields[mode] = _record(value, f"{where}, {mode}")
    if "dtypes" in fields:
        names = fields["dtypes"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where}: dtypes must be a list of names, got {names!r}")
        fields["dtypes"] = tuple(names)
    if isinstance(fields.get("nan"), str):
        try:
            fields["nan"] = int(fields["nan"], 16)
        except ValueError as error:
            raise ValueError(
                f"{where}: nan must be a word such as 0x7fc00000, got {fields['nan']!r}"
            ) from error
    try:
        return Arithmetic(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
