"""The way out of the accumulator: FP32 values cast to the output dtype."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import floats

Overflow = Literal["inf", "saturate"]


def round_to(x: Array, dtype: DTypeLike, overflow: Overflow = "inf") -> Array:
    """FP32 `x` rounded once to nearest even in `dtype` (BF16, FP16; FP32 passes through).

    Subnormals are kept, a NaN stays a quiet NaN. A finite number beyond `dtype` gives infinity or,
    as `overflow` of an Arithmetic, the largest finite value. The rounding is integer arithmetic
    on the bit pattern: XLA can neither elide it (excess precision) nor flush its subnormals.

    Raises:
        TypeError: `x` is not FP32, or `dtype` is another one.

    Source: asc-devkit documentation of Fixpipe (documented): FP32 to FP16 and to BF16 round to
    nearest even; in saturation mode they saturate.
    """
    if x.dtype.name != "float32":
        raise TypeError(f"round_to: expected x in float32, got {x.dtype}; the accumulator is FP32")
    return _rounded(jnp.dtype(dtype), overflow, x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rounded(dtype: jnp.dtype, overflow: Overflow, x: Array) -> Array:
    bits = floats.bits32(x)
    rounded = floats.round_bits(bits, dtype)
    if overflow == "inf" or dtype == jnp.float32:
        return rounded
    word = lax.bitcast_convert_type(rounded, jnp.uint16)
    beyond = jnp.isinf(rounded) & ((bits & floats.MAGNITUDE) < floats.INF)
    return lax.bitcast_convert_type(jnp.where(beyond, word - 1, word), dtype)


@_rounded.defjvp
def _rounded_jvp(
    dtype: jnp.dtype, overflow: Overflow, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _rounded(dtype, overflow, *primals), tangents[0].astype(dtype)
