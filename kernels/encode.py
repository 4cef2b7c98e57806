"""Integers to FP32 words: `count * 2^unit`, rounded once. Call inside `jax.enable_x64(True)`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels import floats
from kernels.arithmetic import Arithmetic

NO_EXPONENT = -(1 << 20)  # of a zero: never the largest
_GUARD = 30  # places of an addition below those of its larger operand


def split(word: Array) -> tuple[Array, Array]:
    """FP32 words as 24-bit significands (int32, not signed) and the exponents of their leading
    place: -126 for subnormals, `NO_EXPONENT` for zeros. Infinities and NaNs mean nothing.
    """
    magnitude = (word & floats.MAGNITUDE).astype(jnp.int32)
    field = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | jnp.where(field == 0, 0, 1 << 23)
    exponent = jnp.where(magnitude == 0, NO_EXPONENT, jnp.maximum(field, 1) - 127)
    return significand, exponent


def at_most(distance: Array, limit: int) -> Array:
    """`min(distance, limit)`; unsigned, so that the compiler sees a shift's amount in its range."""
    return jnp.minimum(distance.astype(jnp.uint32), jnp.uint32(limit)).astype(jnp.int32)


def cut(magnitude: Array, places: Array, rounding: str) -> Array:
    """`magnitude * 2^-places` (not negative; any number of places but zero) as an integer."""
    if rounding == "toward_zero":
        return magnitude >> places.astype(magnitude.dtype)  # by too many places: 0
    bits = 8 * magnitude.dtype.itemsize
    below = at_most(places - 1, bits - 1).astype(magnitude.dtype)
    kept = magnitude >> below
    inexact = ((kept << below) != magnitude).astype(magnitude.dtype)
    rounded = (kept >> 1) + (kept & ((kept >> 1) | inexact) & 1)  # RNE
    return jnp.where(places > bits, 0, rounded)


def finish(
    negative: Array, magnitude: Array, unit: Array, minus_zero: Array | None, arithmetic: Arithmetic
) -> Array:
    """The FP32 words of sums `+-magnitude * 2^unit`.

    Args:
        negative: whether the sign is minus.
        magnitude: uint32 or uint64.
        unit: int32.
        minus_zero: whether a sum of zero consists of nothing but -0; not needed where the record
            makes every zero positive.
        arithmetic: its `rounding`, `overflow`, `subnormal_results` and `zero` are used.
    """
    bits = 8 * magnitude.dtype.itemsize
    blank = lax.clz(magnitude)
    normal = magnitude << blank  # a leading one, or zero
    place = unit + (bits - 24) - blank.astype(jnp.int32)  # of the last of its 24 first bits
    field = jnp.maximum(place + 149, 0)  # of the exponent, but for the leading one
    kept = cut(normal, bits - 24 + field - (place + 149), arithmetic.rounding)
    word = kept.astype(jnp.uint32) + (field.astype(jnp.uint32) << 23)
    word = jnp.minimum(word, floats.INF if arithmetic.overflow == "inf" else floats.INF - 1)
    zero = kept == 0
    if arithmetic.subnormal_results == "flush":
        zero |= _is_tiny(normal, place, arithmetic.rounding)
    sign = negative.astype(jnp.uint32) << 31
    if arithmetic.zero == "positive":
        return jnp.where(zero, jnp.uint32(0), word | sign)
    assert minus_zero is not None
    minus_zero = minus_zero.astype(jnp.uint32) << 31
    return jnp.where(zero, jnp.where(magnitude == 0, minus_zero, sign), word | sign)


def _is_tiny(normal: Array, place: Array, rounding: str) -> Array:
    """Whether the sum, rounded to 24 bits as if exponents had no limit, is below 2^-126.

    Args:
        normal: its magnitude with a leading one, or zero.
        place: the exponent of the last of the 24 first bits.
        rounding: as in the record.
    """
    carries = cut(normal, jnp.int32(8 * normal.dtype.itemsize - 24), rounding) == (1 << 24)
    return (place < -150) | ((place == -150) & ~carries)


def add(x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words `x + y`, rounded by the record; operands are read as they are."""
    parts = split(x), split(y)
    top = jnp.maximum(jnp.maximum(parts[0][1], parts[1][1]), -126)
    total = jnp.zeros(x.shape, jnp.int64)
    for word, (significand, exponent) in zip((x, y), parts, strict=True):
        count = significand.astype(jnp.int64) << _GUARD
        count = jnp.where(word >= floats.SIGN, -count, count)
        places = at_most(top - exponent, 62).astype(jnp.int64)
        kept = count >> places
        total += kept | ((kept << places) != count)  # to odd: later rounding sees no false tie
    minus_zero = (x == floats.SIGN) & (y == floats.SIGN)
    magnitude = jnp.abs(total).astype(jnp.uint64)
    word = finish(total < 0, magnitude, top - 23 - _GUARD, minus_zero, arithmetic)
    a, b = x & floats.MAGNITUDE, y & floats.MAGNITUDE
    word = jnp.where(a == floats.INF, x, jnp.where(b == floats.INF, y, word))
    opposite = (a == floats.INF) & (b == floats.INF) & (x != y)
    nan = (a > floats.INF) | (b > floats.INF) | opposite
    return jnp.where(nan, jnp.uint32(arithmetic.nan), word)
