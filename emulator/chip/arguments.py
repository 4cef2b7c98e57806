"""What a matmul is asked for, checked: sizes, dtypes, layouts, groups."""

from __future__ import annotations

import collections
import math
import operator
from collections.abc import Iterable

from emulator.chip.pipeline import Groups, Product
from emulator.machines import Machine

ITEM_BYTES: dict[str, float] = {
    **{"bfloat16": 2, "float16": 2, "float32": 4, "hf32": 4, "tf32": 4},
    **{"int8": 1, "int4": 0.5, "float8": 1, "float4": 0.5},
}
_MODES = {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "float4_e2m1fn": "float4"}
OUT_BYTES = {
    **ITEM_BYTES,
    **{"int32": 4, "uint32": 4, "int16": 2, "uint16": 2, "uint8": 1, "uint4": 0.5},
}
LAYOUTS = {"nd": "row-major", "nd_t": "the transpose row-major", "nz": "fractals"}
ROWS = {"packed": "one after the other, as in an array", "padded": "in whole lines"}
_LAYOUT_OF_A = {"nd": "rows", "nd_t": "columns", "nz": "nz"}
_LAYOUT_OF_B = {"nd": "columns", "nd_t": "rows", "nz": "nz"}
_INTEGERS = ("int8", "int4")
_USUAL_OUT = dict.fromkeys((*_INTEGERS, "float8", "float4"), "bfloat16")
_LARGEST = 2**40


def dtype_name(dtype: object) -> str:
    """The name of a dtype given as a name, a NumPy dtype or a scalar type; of the formats of FP8
    and FP4, which are multiplied at one rate, that of the matrix unit's mode.
    """
    name = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype))
    return _MODES.get(name, name)


def size_of(name: str, value: int) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"matmul_time({name}={value!r}): expected an int") from error
    if isinstance(value, bool):
        raise TypeError(f"matmul_time({name}={value!r}): expected an int")
    if not 1 <= size <= _LARGEST:
        raise ValueError(
            f"matmul_time({name}={size}): expected a size of at least 1 and at most 2^40"
        )
    return size


def check(
    on: Machine,
    dtype: str,
    a_layout: str,
    b_layout: str,
    out_dtype: str | None,
    l2: str,
    rows: str | None,
) -> None:
    peaks = [name for name, _ in on.chip.matmul_peaks_flops_per_s]
    if dtype not in ITEM_BYTES or dtype not in peaks:
        raise NotImplementedError(
            f"matmul_time(dtype={dtype!r}): the matrix unit of {on.chip.name} has "
            f"{', '.join(peaks)}"
        )
    if out_dtype is not None and dtype_name(out_dtype) not in OUT_BYTES:
        raise ValueError(
            f"matmul_time(out_dtype={out_dtype!r}): expected one of {', '.join(OUT_BYTES)}"
        )
    for name, value, known in (
        ("a_layout", a_layout, LAYOUTS),
        ("b_layout", b_layout, LAYOUTS),
        ("l2", l2, {"cold": "operands in memory", "warm": "operands in the L2 cache"}),
        ("rows", "packed" if rows is None else rows, ROWS),
    ):
        if not isinstance(value, str):
            raise TypeError(f"matmul_time({name}={value!r}): expected a string")
        if value not in known:
            *others, last = (f"{each!r} ({what})" for each, what in known.items())
            choices = f"{', '.join(others)} or {last}"
            raise ValueError(f"matmul_time({name}={value!r}): expected {choices}")


def rows_of(groups: object) -> tuple[int, ...]:
    """Rows of groups as a tuple."""
    if isinstance(groups, Iterable) and not isinstance(groups, str):
        return tuple(groups)
    raise TypeError(
        f"matmul_time(groups={groups!r}): expected the rows of each group, as (9, 0, 7)"
    )


def grouped(groups: tuple[int, ...], m: int, batch: int) -> Groups:
    """Groups by their rows, the largest first."""
    if batch != 1:
        raise ValueError(
            f"matmul_time(batch={batch}, groups=...): give one of them; equal groups are a batch"
        )
    rows = [0 if group == 0 else size_of("groups", group) for group in groups]
    if sum(rows) != m:
        raise ValueError(
            f"matmul_time(m={m}, groups=...): the {len(rows)} groups have {sum(rows)} rows "
            "together; m must be their sum"
        )
    return tuple(sorted(collections.Counter(rows).items(), reverse=True))


def product_of(
    sizes: Groups,
    k: int,
    n: int,
    dtype: str,
    a_layout: str,
    b_layout: str,
    out_dtype: str | None,
    l2: str,
    rows: str,
    request_bytes: int,
) -> Product:
    item = ITEM_BYTES[dtype]
    # A single row or column is one piece of memory in any layout.
    a = "nz" if max(r for r, _ in sizes) == 1 else _LAYOUT_OF_A[a_layout]
    b = "nz" if n == 1 else _LAYOUT_OF_B[b_layout]
    a_start = b_start = 0  # aligned
    if rows == "packed" and a != "nz":
        pitches = (r for r, _ in sizes) if a == "columns" else (k,)
        a_starts = (math.ceil(pitch * item) for pitch in pitches)
        a_start = math.gcd(request_bytes, *a_starts) % request_bytes
    if rows == "packed" and b != "nz":
        pitch = math.ceil((n if b == "columns" else k) * item)
        b_start = math.gcd(request_bytes, pitch) % request_bytes
    out = _USUAL_OUT.get(dtype, dtype) if out_dtype is None else dtype_name(out_dtype)
    return Product(
        k=k,
        dtype=dtype,
        item=item,
        out=OUT_BYTES[out],
        scaled=dtype in _INTEGERS and out != "int32",
        a_layout=a,
        b_layout=b,
        warm=l2 == "warm",
        packed=rows == "packed",
        starts=(a_start, b_start),
    )
