"""The arguments of a timed collective, checked: each error names the argument and what is wanted.

Checked before the cache of answers, in which 1 == 1.0 == True.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence, Set

LARGEST_BYTES = 2**60
_NO_RANKS = (str, bytes, Mapping, Set)  # they can be listed, but in no order that was meant
ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


def whole(what: str, value: object) -> int:
    """An integer argument as a plain int."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{what} must be a whole number; got {value!r}") from error


def device_key(devices: Sequence[int] | None) -> Sequence[int] | None:
    """Device numbers as something hashable; None means all."""
    if devices is None or isinstance(devices, range):
        return devices
    if isinstance(devices, _NO_RANKS) or not isinstance(devices, Iterable):
        raise TypeError(
            f"devices must be a sequence of device numbers in rank order; got {devices!r}"
        )
    listed = tuple(devices)
    if set(map(type, listed)) == {int}:  # nothing to convert, which is quicker
        return listed
    return tuple(whole("every device", device) for device in listed)


def pair_key(pairs: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...] | None:
    """The pairs of a permute as tuples."""
    if pairs is None:
        return None
    if isinstance(pairs, tuple) and set(map(type, pairs)) == {tuple}:
        numbers = [*itertools.chain.from_iterable(pairs)]
        if set(map(len, pairs)) == {2} and set(map(type, numbers)) == {int}:
            return pairs  # nothing to convert, which is quicker
    try:
        listed = [(source, destination) for source, destination in pairs]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"pairs must be (source, destination) pairs of device numbers; got {pairs!r}"
        ) from error
    return tuple((whole("every source", s), whole("every destination", d)) for s, d in listed)


def root_rank(op: str, root: int | None, ranks: dict[int, int]) -> int:
    """The root's rank; 0 where there is no root."""
    if root is None or op not in ("broadcast", "reduce", "scatter", "gather"):
        return 0
    if root not in ranks:
        raise ValueError(
            f"{op}: root {root} is not among devices; give root= one of the devices that take part"
        )
    return ranks[root]


def rank_pairs(
    op: str, pairs: tuple[tuple[int, int], ...] | None, ranks: dict[int, int]
) -> tuple[tuple[int, int], ...]:
    """The pairs of a permute as ranks."""
    if op != "permute":
        if pairs is not None:
            raise ValueError(f"pairs= belongs to permute; got it with {op}")
        return ()
    if pairs is None:
        raise ValueError("permute needs pairs=, a sequence of (source, destination) device numbers")
    for pair in pairs:
        for device in pair:
            if device not in ranks:
                raise ValueError(f"permute: device {device} of pair {pair} is not among devices")
    return tuple((ranks[s], ranks[d]) for s, d in pairs)


def dtype_name(dtype: object) -> str:
    """The name of a dtype given as one, or as NumPy's or JAX's object."""
    if isinstance(dtype, str):
        return dtype
    return str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype))
