"""Exponent ranges of operands: what can be proved about a sum before it is computed.

A "last place" is the exponent of the lowest bit that a number has set. Sums of numbers whose last
places are at least q, and that stay within 2^(53 + q), are exact in FP64.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats

NO_LIMIT = 1 << 12
"""The last place of a zero."""

Ranges = tuple[Array, Array, Array]
"""For each k: the largest magnitude (FP64, infinite for specials) and the smallest last place; and
the largest Euclidean norm of a row along k (FP64).
"""


def along_k(words: Array, k_axis: int) -> Ranges:
    """Ranges of a block of operands (FP32 words `[batch, m, k]` or `[batch, k, n]`)."""
    others = tuple(axis for axis in range(3) if axis != k_axis)
    top, last = places(words, others)
    magnitude = words & floats.MAGNITUDE
    # A float operation may read a subnormal as zero; 2^-126 in its place keeps this a bound.
    bounded = jnp.where(magnitude == 0, magnitude, jnp.maximum(magnitude, 1 << 23))
    values = floats.from_bits32(bounded).astype(jnp.float64)
    squares = jnp.sum(values * values, axis=k_axis)
    norm = jnp.sqrt(jnp.max(squares)) * (1 + 2.0**-20)
    return top, last, jnp.where(jnp.isfinite(norm), norm, jnp.inf)


def places(words: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Largest magnitude (FP64, infinite for specials) and smallest last place over `axes`."""
    magnitude = (words & floats.MAGNITUDE).astype(jnp.int32)
    field = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | jnp.where(field > 0, 1 << 23, 0)
    lowest = (significand & -significand).astype(jnp.float32)
    zeros = (floats.bits32(lowest) >> 23).astype(jnp.int32) - 127
    last = jnp.where(magnitude == 0, NO_LIMIT, jnp.maximum(field, 1) - 150 + zeros)

    def both(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.maximum(left[0], right[0]), jnp.minimum(left[1], right[1])

    top, last = lax.reduce((magnitude, last), (np.int32(0), np.int32(NO_LIMIT)), both, axes)
    largest = floats.to_float64(top.astype(jnp.uint32))
    return jnp.where(jnp.isnan(largest), jnp.inf, largest), last


def power(exponent: Array) -> Array:
    """2^exponent in FP64, for exponents that FP64 has as normal numbers."""
    biased = jnp.clip(exponent, -1022, 1023).astype(jnp.int64) + 1023
    return lax.bitcast_convert_type(biased << 52, jnp.float64)


def leading(values: Array) -> Array:
    """The largest power of two that is at most |values| (FP64); infinity or NaN give infinity."""
    bits = lax.bitcast_convert_type(values, jnp.int64)
    return lax.bitcast_convert_type(bits & (0x7FF << 52), jnp.float64)


def trailing(values: Array) -> Array:
    """The last places of FP64 values, as powers of two; 2^400 for zeros."""
    magnitude = jnp.abs(values)
    bits = lax.bitcast_convert_type(magnitude, jnp.int64)
    fraction = bits & ((1 << 52) - 1)
    without_last = lax.bitcast_convert_type(bits & (bits - 1), jnp.float64)
    last = jnp.where(fraction == 0, leading(magnitude), magnitude - without_last)
    return jnp.where(magnitude == 0, 2.0**400, last)
