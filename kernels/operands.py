"""Operands as a unit reads them: cut, flushed or saturated, before any product is formed."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels import floats
from kernels.arithmetic import Arithmetic

FRACTION_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}

LOWEST_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126}
"""Exponents of the smallest normal numbers."""


def read(x: Array, arithmetic: Arithmetic) -> Array:
    """`x` (BF16, FP16 or FP32) as the unit reads it, in the same dtype; no float operation."""
    kept = arithmetic.operand_fraction_bits
    cut = 0 if kept is None or x.dtype != jnp.float32 else 23 - kept
    if not cut and arithmetic.subnormal_inputs == "keep" and arithmetic.specials == "ieee":
        return x
    if cut:
        x = _cut(x, cut, arithmetic.operand_rounding)
    if arithmetic.specials == "saturate":
        x = saturate(x, cut)
    if arithmetic.subnormal_inputs == "keep":
        return x
    bits, magnitude = _bits(x)
    sign = bits - magnitude
    zero = sign if arithmetic.subnormal_inputs == "flush" else jnp.zeros_like(sign)
    bits = jnp.where(magnitude < (1 << FRACTION_BITS[x.dtype.name]), zero, bits)
    return lax.bitcast_convert_type(bits, x.dtype)


def saturate(x: Array, cut: int = 0) -> Array:
    """Infinities become the largest finite number of their sign without `cut` bits, NaNs +0."""
    bits, magnitude = _bits(x)
    fraction_bits = FRACTION_BITS[x.dtype.name]
    field_bits = 8 * x.dtype.itemsize - 1 - fraction_bits
    infinity = ((1 << field_bits) - 1) << fraction_bits
    bits = jnp.where(magnitude == infinity, bits - (1 << cut), bits)
    return lax.bitcast_convert_type(jnp.where(magnitude > infinity, 0, bits), x.dtype)


def _bits(x: Array) -> tuple[Array, Array]:
    """The words of `x`, and the words without their sign."""
    bits = lax.bitcast_convert_type(x, jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16)
    return bits, bits & ((1 << (8 * x.dtype.itemsize - 1)) - 1)


def _cut(x: Array, cut: int, rounding: str) -> Array:
    """FP32 numbers without their last `cut` bits. Cut toward zero, a NaN that has only such bits
    is an infinity; rounded, infinities and NaNs stay as they are.
    """
    bits, magnitude = _bits(x)
    if rounding == "nearest_even":
        rounded = bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)
        bits = jnp.where(magnitude >= floats.INF, bits, (rounded >> cut) << cut)
    else:
        bits = (bits >> cut) << cut
    return lax.bitcast_convert_type(bits, x.dtype)
