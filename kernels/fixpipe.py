"""The way out of the accumulator: FP32 values cast to the output dtype."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import floats


def round_to(x: Array, dtype: DTypeLike) -> Array:
    """FP32 `x` rounded once to nearest even in `dtype` (BF16, FP16; FP32 passes through).

    Subnormals are kept, overflow gives infinity, a NaN stays a quiet NaN. The rounding is integer
    arithmetic on the bit
    pattern: XLA can neither elide it (excess precision) nor flush its subnormals.

    Raises:
        TypeError: `x` is not FP32, or `dtype` is another one.

    Source: asc-devkit documentation of Fixpipe (documented): FP32 to FP16 and to BF16 round to
    nearest even.
    """
    if x.dtype.name != "float32":
        raise TypeError(f"round_to: expected x in float32, got {x.dtype}; the accumulator is FP32")
    return _rounded(jnp.dtype(dtype), x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(dtype: jnp.dtype, x: Array) -> Array:
    return floats.round_bits(floats.bits32(x), dtype)


@_rounded.defjvp
def _rounded_jvp(
    dtype: jnp.dtype, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _rounded(dtype, *primals), tangents[0].astype(dtype)
