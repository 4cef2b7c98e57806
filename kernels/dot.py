"""`lax.dot_general` with a chosen unit's arithmetic."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import fixpipe, floats
from kernels.arithmetic import Arithmetic
from kernels.matmul import multiply
from kernels.tiling import Tiling

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    *,
    arithmetic: Arithmetic,
    tiling: Tiling | str | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    c: Array | None = None,
) -> Array:
    """`lax.dot_general` whose BF16, FP16 and FP32 products run on the matrix unit.

    Several contracting dimensions flatten in the order of `dimension_numbers`, the first slowest.
    Operands of two different float types, or an FP32 one, run in FP32 mode. The FP32 accumulator is
    rounded once, to nearest even, to `preferred_element_type` or else the promoted operand type.
    For FP32 operands, `precision` HIGHEST and the algorithm `F32_F32_F32` ask for the unit's full
    FP32 mode and `TF32_TF32_F32` for its reduced one (TF32, HF32); other precisions leave it at the
    default. `BF16_BF16_F32` and `F16_F16_F32` round operands, to nearest even, to that type first.
    `tiling` is that of `kernels.matmul`, for each index of the batch dimensions: rows are counted
    over all other dimensions of `lhs`, columns over those of `rhs`, the first slowest. `c`, of the
    result's shape, is what the accumulator starts at: FP32, or of the result's type where XLA sums.

    Integer dots are exact in any order and, like FP64 and complex ones, which no unit here takes,
    are left to XLA, those of less than 8 bits as INT8.

    Raises:
        NotImplementedError: operands of FP8 or less, or a `precision` that names another algorithm.
    """
    lhs_type, rhs_type = lhs.dtype, rhs.dtype
    for dtype in (lhs_type, rhs_type):
        if dtype.name.startswith(("float8_", "float6_", "float4_")):
            raise NotImplementedError(
                f"dot_general: sums of {dtype.name} products are not modelled; cast the operands "
                "to bfloat16, which holds them exactly"
            )
    if not {lhs_type.name, rhs_type.name} & set(floats.FLOAT_DTYPES) or (
        {lhs_type.name, rhs_type.name} - set(floats.FLOAT_DTYPES)
    ):
        out_type = preferred_element_type or jnp.promote_types(lhs_type, rhs_type)
        out = lax.dot_general(
            lhs.astype(_in_bytes(lhs_type)),
            rhs.astype(_in_bytes(rhs_type)),
            dimension_numbers,
            precision=precision,
            preferred_element_type=_in_bytes(out_type),
        ).astype(out_type)
        return out if c is None else out + c
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = [d for d in range(lhs.ndim) if d not in lhs_contract and d not in lhs_batch]
    rhs_free = [d for d in range(rhs.ndim) if d not in rhs_contract and d not in rhs_batch]
    symmetric = tiling is None and c is None and arithmetic.nan_rule == "word"
    if symmetric and _outside(lhs_contract, lhs_free) and _outside(rhs_free, rhs_contract):
        # As they lie, the right operand is what the unit calls a, and the left one b.
        turned = dot_general(
            rhs,
            lhs,
            ((rhs_contract, lhs_contract), (rhs_batch, lhs_batch)),
            arithmetic=arithmetic,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        n_batch, n_rhs = len(lhs_batch), len(rhs_free)
        back = range(n_batch + n_rhs, turned.ndim), range(n_batch, n_batch + n_rhs)
        return turned.transpose(*range(n_batch), *back[0], *back[1])
    if (narrow := _narrow(precision)) is not None:
        lhs, rhs = (fixpipe.round_to(floats.to_float32(x), narrow) for x in (lhs, rhs))
    elif lhs_type != rhs_type:
        lhs, rhs = floats.to_float32(lhs), floats.to_float32(rhs)
    batch_shape = [lhs.shape[d] for d in lhs_batch]
    lhs_shape = [lhs.shape[d] for d in lhs_free]
    rhs_shape = [rhs.shape[d] for d in rhs_free]
    batch, m, n = math.prod(batch_shape), math.prod(lhs_shape), math.prod(rhs_shape)
    k = math.prod(lhs.shape[d] for d in lhs_contract)
    a = lhs.transpose(*lhs_batch, *lhs_free, *lhs_contract).reshape(batch, m, k)
    b = rhs.transpose(*rhs_batch, *rhs_contract, *rhs_free).reshape(batch, k, n)
    c = None if c is None else c.reshape(batch, m, n)
    out = multiply(a, b, c, _mode(a, b, precision, arithmetic), tiling)
    out_type = preferred_element_type or jnp.promote_types(lhs_type, rhs_type)
    out = _convert(out, out_type, arithmetic.overflow)
    return out.reshape(*batch_shape, *lhs_shape, *rhs_shape)


def _in_bytes(dtype: DTypeLike) -> DTypeLike:
    """8 bits for integers of less, products of which XLA:CPU does not sum; all else as it is."""
    narrow = {"int2": jnp.int8, "int4": jnp.int8, "uint2": jnp.uint8, "uint4": jnp.uint8}
    return narrow.get(jnp.dtype(dtype).name, dtype)


def _outside(outer: Sequence[int], inner: Sequence[int]) -> bool:
    """Whether all of the dimensions `outer`, of which there are some, are before all of `inner`."""
    return bool(outer) and bool(inner) and max(outer) < min(inner)


def _narrow(precision: lax.PrecisionLike) -> DTypeLike | None:
    """The type that an algorithm rounds operands to."""
    for algorithm, dtype in (("BF16_BF16_F32", jnp.bfloat16), ("F16_F16_F32", jnp.float16)):
        if precision in (algorithm, lax.DotAlgorithmPreset[algorithm]):
            return dtype
    return None


def _mode(a: Array, b: Array, precision: lax.PrecisionLike, arithmetic: Arithmetic) -> Arithmetic:
    """The unit's mode for these operands."""
    names = precision if isinstance(precision, tuple) else (precision,)
    if set(names) <= {lax.DotAlgorithmPreset.TF32_TF32_F32, "TF32_TF32_F32"}:
        return arithmetic.mode(a.dtype.name, b.dtype.name, "reduced")
    if set(names) <= {lax.DotAlgorithmPreset.F32_F32_F32, "F32_F32_F32"}:
        return arithmetic.mode(a.dtype.name, b.dtype.name, "full")
    if _narrow(precision) is not None:
        return arithmetic.mode(a.dtype.name, b.dtype.name, "default")
    try:
        levels = {lax.Precision(name) for name in names if name is not None}
    except ValueError as error:
        raise NotImplementedError(f"dot_general: precision {precision} is not modelled") from error
    full = lax.Precision.HIGHEST in levels
    return arithmetic.mode(a.dtype.name, b.dtype.name, "full" if full else "default")


def _convert(x: Array, dtype: DTypeLike, overflow: fixpipe.Overflow) -> Array:
    if jnp.dtype(dtype).name in floats.FLOAT_DTYPES:
        return fixpipe.round_to(x, dtype, overflow)
    return x.astype(dtype)
