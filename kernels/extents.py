"""Ranges of the data in each block of K, and which operations they let a block be computed with."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import blocks, floats, operands, singles
from kernels.arithmetic import Arithmetic

PLAIN, SCALED, LOW, HIGH, WIDE, CLOSE = range(6)
"""Ways to compute a block:

- `PLAIN`: FP32 operations. No operand, product or sum is subnormal and products are exact in FP32,
  so whether XLA contracts a product and a sum or not makes no difference;
- `SCALED`: the same on data times a power of two, which lifts small numbers;
- `LOW`, `HIGH`: the same, and each result is rounded or flushed below 2^-126, or becomes infinite
  from 2^128 on;
- `WIDE`: FP64 operations that take every input;
- `CLOSE`: FP64 operations where nothing is subnormal or overflows.
"""

_ABSENT = 0x7FFFFFFF  # smallest magnitude of zeros alone
_NO_LIMIT = 1 << 12  # last place of a zero
_SCALES = 252  # exponents of the largest power of two in two FP32 factors


class Extent(NamedTuple):
    """What is known of the numbers in each block of K; FP64 or int32 `[blocks]`. Infinities and
    NaNs do not count.

    Attributes:
        a_low, a_top, b_low, b_top: smallest and largest magnitude of an operand that is not 0.
        low, top: the same of a product (bounds).
        reach: a bound on every sum, C and roundings included.
        last: exponent of the lowest bit that may be set in any product or C.
        width: bits that the significand of a product may need.
    """

    a_low: Array
    a_top: Array
    b_low: Array
    b_top: Array
    low: Array
    top: Array
    reach: Array
    last: Array
    width: Array


def extents(a: Array, b: Array, c: Array | None, size: int, arithmetic: Arithmetic) -> Extent:
    """The extent of every block, of operands not yet read; call inside `jax.enable_x64(True)`."""
    a_low, a_top, a_used = _ranges(a, 1, arithmetic)
    b_low, b_top, b_used = _ranges(b, 2, arithmetic)
    a_width, b_width = _width(a_used), _width(b_used)  # [batch, k]
    last = _last(a_low, a_width) + _last(b_low, b_width)
    a_low, a_top, b_low, b_top = (_value(x) for x in (a_low, a_top, b_low, b_top))
    start_top, start_last = jnp.float64(0), jnp.int32(_NO_LIMIT)
    if c is not None:
        low, top, _ = _ranges(c.reshape(1, -1, c.shape[-1]), 1, None)
        start_top, start_last = jnp.max(_value(top)), jnp.min(_last(low, jnp.int32(24)))

    def most(x: Array) -> Array:
        return jnp.max(x.reshape(x.shape[0], -1, size), axis=(0, 2))

    def least(x: Array) -> Array:
        return -most(-x)

    bound = a_top * b_top
    sums = jnp.max(jnp.sum(bound.reshape(bound.shape[0], -1, size), axis=2), axis=0)
    k = a.shape[-1]
    growth = 2.0 ** (1 + k * 2.0**-22)  # each of 2 k additions rounds up by at most 2^-23
    return Extent(
        a_low=least(a_low),
        a_top=most(a_top),
        b_low=least(b_low),
        b_top=most(b_top),
        low=least(a_low * b_low),
        top=most(bound),
        reach=jnp.full_like(sums, (start_top + jnp.sum(sums)) * growth),
        last=jnp.full_like(last, jnp.minimum(jnp.min(last), start_last), shape=sums.shape),
        width=most(a_width + b_width),
    )


def whole(extent: Extent) -> Extent:
    """The extent of all blocks together, scalars."""
    lows = {"a_low", "b_low", "low", "last"}
    found = {
        name: (jnp.min if name in lows else jnp.max)(value)
        for name, value in extent._asdict().items()
    }
    return Extent(**found)


Range = tuple[Array, Array, Array]
"""Smallest and largest FP32 word of a magnitude that is not 0, and the fraction bits used by any;
int32. Without any, `_ABSENT`, 0 and 0.
"""


def ranges(x: Array, axis: int, arithmetic: Arithmetic | None, *, specials: bool) -> Range:
    """The range of `x` along `axis`. `arithmetic` reads an operand; `None`: no operand.

    Infinities and NaNs count as the largest if `specials`, else not at all.
    """

    def all_three(left: Range, right: Range) -> Range:
        low, top, used = zip(left, right, strict=True)
        return jnp.minimum(*low), jnp.maximum(*top), used[0] | used[1]

    x = x if arithmetic is None else operands.read(x, arithmetic)
    magnitude = (floats.bits32(x) & floats.MAGNITUDE).astype(jnp.int32)
    if not specials:
        magnitude = jnp.where(magnitude >= int(floats.INF), 0, magnitude)
    zero = np.int32(0)
    three = (magnitude - 1) & _ABSENT, magnitude, magnitude  # in one pass
    low, top, used = lax.reduce(three, (np.int32(_ABSENT), zero, zero), all_three, (axis,))
    return jnp.where(low == _ABSENT, low, low + 1), top, used & 0x7FFFFF


def _ranges(x: Array, axis: int, arithmetic: Arithmetic | None) -> Range:
    def finite(x: Array) -> Range:
        return ranges(x, axis, arithmetic, specials=False)

    low, top, used = blocks.in_pieces(finite, x, 3 - axis)
    return low, top, used


def top_and_last(x: Array, axis: int, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """The largest magnitude of an operand along `axis` (FP64, infinite or NaN for specials), and
    the exponent of a power of two that all its numbers are multiples of (int32).
    """
    low, top, used = ranges(x, axis, arithmetic, specials=True)
    return floats.to_float64(top.astype(jnp.uint32)), _last(low, _width(used))


def _width(used: Array) -> Array:
    """Bits of a significand whose fraction uses these bits."""
    return 24 - jnp.minimum(lax.population_count(~used & (used - 1)), 23)


def _last(low: Array, width: Array) -> Array:
    """The exponent of the last place of the smallest of numbers whose significands have `width`
    bits.
    """
    return jnp.where(low == _ABSENT, _NO_LIMIT, jnp.maximum(low >> 23, 1) - 126 - width)


def _value(magnitude: Array) -> Array:
    """FP64 values; infinite for `_ABSENT`."""
    value = floats.to_float64(magnitude.astype(jnp.uint32))
    return jnp.where(magnitude == _ABSENT, jnp.inf, value)


def exponent(x: Array) -> Array:
    """The smallest e with x < 2^e, for finite FP64 x >= 0 (-1022 for 0)."""
    return (lax.bitcast_convert_type(x, jnp.int64) >> 52).astype(jnp.int32) - 1022


def power(e: Array) -> Array:
    """2^e in FP64, e within its normal range."""
    biased = jnp.clip(e, -1022, 1023).astype(jnp.int64) + 1023
    return lax.bitcast_convert_type(biased << 52, jnp.float64)


def ways(extent: Extent, arithmetic: Arithmetic) -> tuple[Array, Array, Array]:
    """For each block: the way to take, S, and the part of S that goes to `a`."""
    keeps = arithmetic.subnormal_inputs == arithmetic.subnormal_results == "keep"
    infinite = arithmetic.overflow == "inf"
    narrow = (extent.width <= 24) & (arithmetic.rounding == "nearest_even")
    normal = extent.last >= -126  # of C, products and sums: none is subnormal
    low, high = 2.0**-126, 2.0**127
    reach = extent.reach
    plain = narrow & normal & (extent.top < high)
    plain &= (extent.a_low >= low) & (extent.b_low >= low)
    plain &= infinite | (reach < high)

    up = jnp.clip(126 - exponent(reach), -1022, 149)  # sums stay below 2^127
    down = jnp.minimum(up, 0)
    raised = narrow & (up >= 24) & _fits(extent, up)
    lowered = narrow & normal & (up < 0) & (extent.last + down >= -126) & _fits(extent, down)
    lowered &= (arithmetic.product_overflow == "keep") | (extent.top < high)
    exact = normal | (keeps & (extent.last >= -149))  # what is below 2^-126 needs no rounding
    close = normal & (reach < high) & (arithmetic.rounding == "nearest_even")

    way = jnp.full_like(extent.last, WIDE)
    choices = (close, CLOSE), (lowered, HIGH), (raised, LOW)
    for possible, choice in (*choices, (raised & exact, SCALED), (plain, PLAIN)):
        way = jnp.where(possible, choice, way)
    scale = jnp.where(way == PLAIN, 0, jnp.where(way == HIGH, down, up))
    return way, scale, jnp.where(way == PLAIN, 0, _share(extent, scale))


def _share(extent: Extent, scale: Array) -> Array:
    """The part of S that goes to `a`, such that operands are normal numbers below 2^127: the middle
    of what is possible, or else so much that only small ones are lost, those of the wider.
    """
    a_top, b_top = (exponent(jnp.where(x == 0, 1.0, x)) for x in (extent.a_top, extent.b_top))
    a_low, b_low = (exponent(jnp.where(jnp.isinf(x), 1.0, x)) for x in (extent.a_low, extent.b_low))
    least, most = scale - 127 + b_top, 127 - a_top
    low, high = jnp.maximum(least, -125 - a_low), jnp.minimum(most, scale + 125 + b_low)
    lossy = jnp.where(a_top - a_low >= b_top - b_low, most, least)
    share = jnp.where(low <= high, (low + high) // 2, lossy)
    return jnp.clip(share, jnp.maximum(scale, 0) - _SCALES, jnp.minimum(scale, 0) + _SCALES)


class Firm(NamedTuple):
    """How to compute with FP32 numbers times 2^scale that are not all in its range."""

    possible: Array
    scale: Array
    a_scale: Array
    limit: Array
    """Scaled accumulators from here on do not notice what FP32 loses of operands and products."""


def firm(extent: Extent, k: int, arithmetic: Arithmetic) -> Firm:
    """Whether FP32 serves sums of `k` products as long as accumulators stay large."""
    top, reach = exponent(extent.top), exponent(extent.reach)
    # Where sums may overflow, products below 2^129 must not; larger ones may, see `_firmly_large`.
    scale = jnp.where(top <= 127, 0, 122 - jnp.minimum(top, 129))
    scale = jnp.where(reach <= 126, jnp.minimum(126 - reach, 120), scale)
    a_scale = _share(extent, scale)
    to_a, to_b = power(a_scale), power(scale - a_scale)
    least, most = 2.0**-126, 2.0**127
    lost = jnp.full_like(extent.top, least)
    for low, to_it, other in (
        (extent.a_low, to_a, extent.b_top * to_b),
        (extent.b_low, to_b, extent.a_top * to_a),
    ):
        lost = jnp.maximum(lost, jnp.where(low * to_it < least, least * other, 0.0))
    # A quarter of the last place of `limit` is 2^-25 or 2^-26 of it; all but one may be lost.
    limit = jnp.maximum(lost * (2.0**27 * k), 2 * least * power(scale))
    possible = (extent.width <= 24) & (arithmetic.rounding == "nearest_even") & (scale >= -126)
    possible &= (extent.a_top * to_a < most) & (extent.b_top * to_b < most)
    possible &= extent.reach * power(scale) >= limit * 2.0**20
    if arithmetic.overflow != "inf" or arithmetic.specials == "saturate":
        possible &= reach <= 126
    if arithmetic.product_overflow != "keep":
        possible &= scale >= 0
    return Firm(possible, scale, a_scale, limit.astype(jnp.float32))


def deep(extent: Extent) -> Array:
    """Whether all sums of `LOW` blocks are multiples of 2^-149 below 2^-127."""
    return extent.reach < 2.0**-127


def _fits(extent: Extent, scale: Array) -> Array:
    """Whether operands and products times 2^scale are normal FP32 numbers."""
    return _operands_fit(extent, scale) & (extent.low * power(scale) >= 2.0**-126)


def _operands_fit(extent: Extent, scale: Array) -> Array:
    share = _share(extent, scale)
    to_a, to_b = power(share), power(scale - share)
    least, limit = 2.0**-126, 2.0**127
    small = (extent.a_low * to_a >= least) & (extent.b_low * to_b >= least)
    large = (extent.a_top * to_a < limit) & (extent.b_top * to_b < limit)
    return small & large


def scaled(words: Array, scale: Array) -> Array:
    """FP32 words times 2^scale, as FP32 numbers; exact where `ways` chose the scale, from -252 to
    252. Numbers that become subnormal are lost.
    """

    def times(x: Array, e: Array) -> Array:
        return (x * singles.power32(e // 2)) * singles.power32(e - e // 2)

    magnitude = words & floats.MAGNITUDE
    count = magnitude.astype(jnp.int32).astype(jnp.float32)  # of 2^-149, if it is subnormal
    subnormal = floats.bits32(times(count, scale - 149)) | (words & floats.SIGN)
    normal = floats.bits32(times(floats.from_bits32(words), scale))
    return floats.from_bits32(jnp.where(magnitude < (1 << 23), subnormal, normal))
