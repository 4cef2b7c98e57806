"""FP32 numbers that are computed on elsewhere: in FP64, or in FP32 times a power of two.

XLA's FP32 operations flush subnormals. FP64 holds every FP32 number, product of two and sum of
two such products' roundings as a normal number; times 2^S small FP32 numbers are normal FP32
numbers. What such operations leave to do is FP32's own rounding, at both ends of its range. Call
everything here inside `jax.enable_x64(True)`.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, operands
from kernels.arithmetic import Arithmetic

LEAST = 2.0**-126  # smallest normal FP32 number
_SIGN = np.int64(-(2**63))
_MAX = float(np.finfo(np.float32).max)


def bits(x: Array) -> Array:
    """FP32 or FP64 numbers as signed integers."""
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)


def sign_of(x: Array) -> Array:
    """The sign bit of FP32 or FP64 numbers, as an integer in place."""
    return bits(x) & (_SIGN if x.dtype == jnp.float64 else np.int32(-(2**31)))


def with_sign(x: Array, sign: Array) -> Array:
    """|x| with the sign bit `sign`."""
    magnitude = bits(x) & ((1 << (8 * x.dtype.itemsize - 1)) - 1)
    return lax.bitcast_convert_type(magnitude | sign, x.dtype)


# FP64.


def to_words(x: Array) -> Array:
    """FP32 words of FP64 values that are FP32 numbers."""
    magnitude = jnp.abs(x)
    tiny = magnitude < LEAST
    count = jnp.where(tiny, magnitude * 2.0**149, 0.0).astype(jnp.int32).astype(jnp.uint32)
    word = floats.bits32(jnp.where(tiny, 1.0, magnitude).astype(jnp.float32))
    return jnp.where(tiny, count, word) | ((bits(x) < 0).astype(jnp.uint32) << 31)


def read(c: Array, arithmetic: Arithmetic, least: Array | float = LEAST) -> Array:
    """Accumulators as a step reads them; `least` is their smallest normal number."""
    if arithmetic.specials == "saturate" and arithmetic.product_overflow == "inf":
        c = jnp.where(jnp.isnan(c), jnp.zeros_like(c), jnp.clip(c, -_MAX, _MAX))
    if arithmetic.subnormal_inputs == "keep":
        return c
    zero = jnp.zeros_like(c)
    if arithmetic.subnormal_inputs == "flush":
        zero = with_sign(zero, sign_of(c))
    return jnp.where(jnp.abs(c) < least, zero, c)


def entering(words: Array, arithmetic: Arithmetic) -> Array:
    """Accumulators' words before a block in which no step makes what is removed here."""
    if arithmetic.specials == "saturate" and arithmetic.product_overflow == "inf":
        words = floats.bits32(operands.saturate(floats.from_bits32(words)))
    if arithmetic.subnormal_inputs == "plus_zero":
        words = jnp.where((words & floats.MAGNITUDE) == 0, jnp.uint32(0), words)
    return words


def product(x: Array, arithmetic: Arithmetic) -> Array:
    """An exact product as it enters a sum."""
    if arithmetic.product_overflow == "keep":
        return x
    infinity = with_sign(jnp.full_like(x, jnp.inf), sign_of(x))
    return jnp.where(jnp.abs(x) >= 2.0**128, infinity, x)


def loss(x: Array, y: Array, total: Array) -> Array:
    """What `total`, the rounded `x + y`, lacks (Knuth); NaN beside infinities and NaNs."""
    part = total - x
    return (x - (total - part)) + (y - part)


def lost(x: Array, y: Array, total: Array) -> Array:
    """As `loss`; 0 beside infinities and NaNs."""
    return jnp.where(jnp.abs(total) < jnp.inf, loss(x, y, total), 0.0)


def to_odd(total: Array, rest: Array) -> Array:
    """`total + rest` to 53 bits, the last of them set if anything is lost: a later rounding sees
    no false tie. Infinities and NaNs stay one or the other; as they are beside a `rest` of 0.
    """
    word = bits(total)
    cut = (word + ((word ^ bits(rest)) >> 63)) | 1  # toward zero, and odd
    return lax.bitcast_convert_type(jnp.where(rest != 0, cut, word), jnp.float64)


def rounded(x: Array, arithmetic: Arithmetic) -> Array:
    """FP64 values rounded to FP32 numbers (held in FP64) as `arithmetic` rounds a sum."""
    sign, magnitude = sign_of(x), jnp.abs(x)
    if arithmetic.rounding == "nearest_even":
        found = _nearest(x, magnitude, sign, arithmetic.subnormal_results)
    else:
        found = _toward_zero(magnitude, arithmetic.subnormal_results)
    if arithmetic.overflow == "saturate":
        found = jnp.where(magnitude < jnp.inf, jnp.minimum(found, _MAX), found)
    return with_sign(found, sign)


def _nearest(x: Array, magnitude: Array, sign: Array, subnormal_results: str) -> Array:
    if subnormal_results == "flush":
        # With unlimited exponents what lies at or above the middle of the last two numbers below
        # 2^-126 and 2^-126 itself becomes 2^-126.
        normal = jnp.maximum(magnitude, LEAST).astype(jnp.float32)  # RNE
        tiny = magnitude < LEAST - 2.0**-151
        return jnp.where(tiny, jnp.float32(0), normal).astype(jnp.float64)
    tiny = magnitude < LEAST
    # RNE on multiples of 2^-149: the last place of 2^-97 in FP64. (XLA would cancel a constant.)
    grid = with_sign(jnp.full_like(x, 2.0**-97), sign)
    normal = jnp.where(tiny, jnp.float32(0), magnitude.astype(jnp.float32))  # RNE
    return jnp.where(tiny, jnp.abs((x + grid) - grid), normal.astype(jnp.float64))


def _toward_zero(magnitude: Array, subnormal_results: str) -> Array:
    kept = lax.bitcast_convert_type(bits(magnitude) & np.int64(-(1 << 29)), jnp.float64)
    kept = jnp.where(magnitude < 2.0**128, kept, jnp.inf)
    kept = jnp.where(jnp.isnan(magnitude), magnitude, kept)
    tiny = magnitude < LEAST
    if subnormal_results == "flush":
        return jnp.where(tiny, 0.0, kept)
    count = jnp.where(tiny, magnitude * 2.0**149, 0.0).astype(jnp.int32)
    return jnp.where(tiny, count.astype(jnp.float64) * 2.0**-149, kept)


# FP32 times 2^scale.


def scale_up(words: Array, scale: Array, flush: bool = False) -> Array:
    """FP32 words times 2^scale as FP32 numbers, exactly; `scale` (int32) from 24 to 149, or below
    0 where no result is subnormal; infinities and NaNs stay. With `flush` subnormals become zeros.
    """
    magnitude = (words & floats.MAGNITUDE).astype(jnp.int32)
    if flush:
        moved = jnp.where(magnitude < int(floats.INF), magnitude + (scale << 23), magnitude)
        moved = jnp.where(magnitude < (1 << 23), 0, moved)
        return floats.from_bits32(moved.astype(jnp.uint32) | (words & floats.SIGN))
    unit = power32(scale - 149)
    subnormal = bits(magnitude.astype(jnp.float32) * unit)
    moved = jnp.where(magnitude < (1 << 23), subnormal, magnitude + (scale << 23))
    moved = jnp.where(magnitude == 0, 0, moved)
    moved = jnp.where(magnitude >= int(floats.INF), magnitude, moved)
    return floats.from_bits32(moved.astype(jnp.uint32) | (words & floats.SIGN))


def scale_down(x: Array, scale: Array, flush: bool = False) -> Array:
    """The words of FP32 numbers divided by 2^scale; subnormal quotients are multiples of 2^-149,
    and with `flush` there is none.
    """
    words = floats.bits32(x)
    magnitude = (words & floats.MAGNITUDE).astype(jnp.int32)
    if flush:
        down = words - (scale.astype(jnp.uint32) << 23)
        return jnp.where((magnitude == 0) | (magnitude >= int(floats.INF)), words, down)
    tiny = magnitude < (scale + 1) << 23
    count = jnp.where(tiny, jnp.abs(x), 0.0) * power32(149 - scale)
    moved = jnp.where(tiny, count.astype(jnp.int32), magnitude - (scale << 23))
    moved = jnp.where(magnitude == 0, 0, moved)
    moved = jnp.where(magnitude >= int(floats.INF), magnitude, moved)
    return moved.astype(jnp.uint32) | (words & floats.SIGN)


def power32(e: Array) -> Array:
    """2^e as an FP32 number, e clipped to its normal range."""
    return lax.bitcast_convert_type((jnp.clip(e, -126, 127) + 127) << 23, jnp.float32)


def scaled_least(scale: Array) -> Array:
    """2^-126 times 2^scale."""
    return power32(scale - 126)


def overflowed(x: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Sums times 2^scale, where those of 2^128 and above overflow."""
    limit = jnp.where(scale < 0, power32(jnp.minimum(scale, -1) + 128), jnp.inf)
    beyond, over = jnp.float32(jnp.inf), jnp.abs(x) >= limit
    if arithmetic.overflow == "saturate":
        below = jnp.where(scale < 0, floats.bits32(limit) - 1, jnp.uint32(0))
        beyond, over = floats.from_bits32(below), over & (jnp.abs(x) < jnp.inf)
    return jnp.where(over, with_sign(jnp.broadcast_to(beyond, x.shape), sign_of(x)), x)
