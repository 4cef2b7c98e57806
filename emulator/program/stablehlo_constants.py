"""What a StableHLO program knows before it runs: constants, and small values that depend on nothing
but the number of the partition.

The partitioner writes "where does my block start" as arithmetic on `partition_id` and tables of
constants. Evaluated for all partitions in NumPy, such values show over which mesh axes they vary;
taken as operations they would seem to vary over all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

#: Larger results are left to the program.
LARGEST = 64

_DTYPES = {
    "i1": np.bool_,
    **{f"i{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"ui{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
    **{f"f{n}": np.dtype(f"float{n}") for n in (16, 32, 64)},
    "bf16": ml_dtypes.bfloat16,
    "i4": ml_dtypes.int4,
    "ui4": ml_dtypes.uint4,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E5M2": ml_dtypes.float8_e5m2,
    "complex<f32>": np.complex64,
    "complex<f64>": np.complex128,
}


@dataclasses.dataclass(frozen=True, slots=True)
class PerPartition:
    """One value on every partition: [partition, *shape]."""

    values: NDArray[Any]


def dtype_of(kind: Any) -> np.dtype[Any]:
    """The NumPy dtype of a ranked tensor's elements."""
    name = str(kind.element_type)
    if name not in _DTYPES:
        raise NotImplementedError(f"the partitioned program holds {kind}, a type without a meaning")
    return np.dtype(_DTYPES[name])


def shape_of(kind: Any) -> tuple[int, ...]:
    return tuple(kind.shape)


def constant(op: Any) -> NDArray[Any]:
    """The value of a constant operation; where all elements are equal, a broadcast view of one."""
    kind = op.results[0].type
    dtype, shape = dtype_of(kind), shape_of(kind)
    if dtype.kind == "c":  # of which some versions of jaxlib do not give the attribute
        flat = _printed(str(op), dtype)
        return np.broadcast_to(flat[0], shape) if flat.size == 1 else flat.reshape(shape)
    attribute = op.attributes["value"]
    if math.prod(shape) and attribute.is_splat:
        return np.broadcast_to(np.array(attribute.get_splat_value().value).astype(dtype), shape)
    if dtype.kind in "biuf" and dtype.type.__module__ == "numpy":
        return np.array(attribute).astype(dtype).reshape(shape)
    return _printed(str(attribute), dtype).reshape(shape)


def _printed(text: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Elements of a type that NumPy lacks, or complex ones, from `dense<...>`: bytes in
    hexadecimal, or numbers.
    """
    text = text[text.index("dense<") :]
    body = text[text.index("<") + 1 : text.rindex(">", 0, text.rindex(":"))]
    if body.startswith('"0x'):
        return np.frombuffer(bytes.fromhex(body[3:-1]), dtype)
    if dtype.kind == "c":
        part = np.dtype(f"float{4 * dtype.itemsize}")
        pairs = re.findall(r"\(([^,()]+),([^,()]+)\)", body)
        words = [_number(x.strip(), part) for pair in pairs for x in pair]
        return np.array(words, part).view(dtype)
    quoted = re.sub(r"0x([0-9A-Fa-f]+)", lambda m: f'"{m[1]}"', body)  # NaN and infinities
    flat = np.ravel(np.array(json.loads(quoted), object))
    return np.array([_number(f"0x{x}", dtype) if isinstance(x, str) else x for x in flat]).astype(
        dtype
    )


def _number(word: str, dtype: np.dtype[Any]) -> Any:
    """A number as MLIR writes it: NaN and infinities by their bits, in hexadecimal."""
    if not word.startswith("0x"):
        return dtype.type(float(word))
    return np.array(int(word, 16), f"uint{8 * dtype.itemsize}").view(dtype)[()]


def _divide(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    return (np.sign(a) * np.sign(b) * (abs(a) // abs(b))).astype(a.dtype)  # toward zero


_DIRECTIONS = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": _divide,
    "remainder": np.fmod,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "negate": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "select": np.where,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}


def direction(op: Any) -> str:
    """ "LT", "EQ", ... of a compare operation."""
    found = re.search(r"[A-Z]{2}", str(op.attributes["comparison_direction"]))
    assert found is not None
    return found[0]


def fold(op: Any, operands: Sequence[Any]) -> PerPartition | NDArray[Any] | None:
    """The result of `op` on known operands (arrays or `PerPartition`), or None if it is not small
    integer work.
    """
    if len(op.results) != 1:
        return None
    kind = op.results[0].type
    shape = shape_of(kind)
    if math.prod(shape) > LARGEST or dtype_of(kind).kind not in "biu":
        return None
    cases = max((len(x.values) for x in operands if isinstance(x, PerPartition)), default=0)
    # [case or 1, *shape of the operand]
    arrays = [x.values if isinstance(x, PerPartition) else np.asarray(x)[None] for x in operands]
    result = _folded(op, arrays, shape)
    if result is None:
        return None
    result = result.astype(dtype_of(kind))
    if not cases:
        return result[0]
    return PerPartition(np.broadcast_to(result, (cases, *shape)))


def _folded(op: Any, arrays: list[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any] | None:
    name = op.name.removeprefix("stablehlo.")
    with np.errstate(all="ignore"):
        if name in _ELEMENTWISE and len({a.ndim for a in arrays}) == 1:
            return _ELEMENTWISE[name](*arrays)
        if name == "compare":
            return _DIRECTIONS[direction(op)](*arrays)
        if name == "convert":
            return arrays[0]
        if name == "reshape":
            return arrays[0].reshape(-1, *shape)
        if name == "broadcast_in_dim" and arrays[0].ndim == 1:
            cases = len(arrays[0])
            return np.broadcast_to(arrays[0].reshape(cases, *[1] * len(shape)), (cases, *shape))
        if name == "dynamic_slice":
            return _dynamic_slices(arrays[0], arrays[1:], shape)
    return None


def _dynamic_slices(
    table: NDArray[Any], starts: list[NDArray[Any]], sizes: tuple[int, ...]
) -> NDArray[Any]:
    cases = max(len(table), *(len(s) for s in starts)) if starts else len(table)
    found = []
    for case in range(cases):
        whole = table[case % len(table)]
        at = [
            min(max(int(s[case % len(s)]), 0), n - size)
            for s, n, size in zip(starts, whole.shape, sizes, strict=True)
        ]
        found.append(whole[tuple(slice(a, a + size) for a, size in zip(at, sizes, strict=True))])
    return np.stack(found)
