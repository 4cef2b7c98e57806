"""Ranges of the data in each block of K, and which operations they let a block be computed with."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import blocks, floats, operands
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


def _ranges(x: Array, axis: int, arithmetic: Arithmetic | None) -> tuple[Array, Array, Array]:
    """Smallest and largest FP32 word of a magnitude that is not 0 nor special, and the fraction
    bits used by any of them, along `axis`. `arithmetic` reads an operand; `None`: no operand.
    """
    Triple = tuple[Array, Array, Array]

    def all_three(left: Triple, right: Triple) -> Triple:
        low, top, used = zip(left, right, strict=True)
        return jnp.minimum(*low), jnp.maximum(*top), used[0] | used[1]

    def ranges(x: Array) -> Triple:
        x = x if arithmetic is None else operands.read(x, arithmetic)
        magnitude = (floats.bits32(x) & floats.MAGNITUDE).astype(jnp.int32)
        magnitude = jnp.where(magnitude >= int(floats.INF), 0, magnitude)
        zero = np.int32(0)
        three = (magnitude - 1) & _ABSENT, magnitude, magnitude  # in one pass
        return lax.reduce(three, (np.int32(_ABSENT), zero, zero), all_three, (axis,))

    low, top, used = blocks.in_pieces(ranges, x, 3 - axis)
    return jnp.where(low == _ABSENT, low, low + 1), top, used & 0x7FFFFF


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

    up = jnp.clip(126 - exponent(reach), -1022, 120)  # sums stay below 2^127
    down = jnp.minimum(up, 0)
    raised = narrow & (up >= 24) & _fits(extent, up)
    lowered = narrow & normal & (up < 0) & (extent.last + down >= -126) & _fits(extent, down)
    lowered &= (arithmetic.product_overflow == "keep") | (extent.top < high)
    exact = normal | (keeps & (extent.last >= -149))  # what is below 2^-126 needs no rounding
    low_fits = (extent.width <= 22) | (arithmetic.subnormal_results == "flush")  # see `_low`
    close = normal & (reach < high) & (arithmetic.rounding == "nearest_even")

    way = jnp.full_like(extent.last, WIDE)
    choices = (close, CLOSE), (lowered, HIGH), (raised & low_fits, LOW)
    for possible, choice in (*choices, (raised & exact, SCALED), (plain, PLAIN)):
        way = jnp.where(possible, choice, way)
    scale = jnp.where(way == PLAIN, 0, jnp.where(way == HIGH, down, up))
    return way, scale, jnp.where(way == PLAIN, 0, _share(extent))


def _share(extent: Extent) -> Array:
    """The part of S that brings the largest of `a` to about 2^63."""
    return 63 - exponent(jnp.where(extent.a_top == 0, 1.0, extent.a_top))


def firm(extent: Extent, way: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Whether FP32 times 2^scale serves a `WIDE` block as long as accumulators stay large: then
    products that are lost are too small to matter. Or whether a `LOW` one's products are so large
    that hardly any sum below 2^-126 will need rounding.
    """
    possible = (extent.width <= 24) & (arithmetic.rounding == "nearest_even")
    possible &= (extent.reach >= 2.0**-100) & _operands_fit(extent, scale)
    # Where sums are scaled down, products of 2^128 are no infinities; sums become some by a power
    # of two that must be a normal number.
    inf = arithmetic.overflow == "inf" and arithmetic.product_overflow == "keep"
    possible &= (scale >= 0) | ((scale >= -126) & inf)
    return jnp.where(way == LOW, extent.top >= 2.0**-113, possible)


def deep(extent: Extent) -> Array:
    """Whether a `LOW` block's sums are so small that all are multiples of 2^-149 below 2^-127."""
    return extent.reach < 2.0**-127


def _fits(extent: Extent, scale: Array) -> Array:
    """Whether operands and products times 2^scale are normal FP32 numbers."""
    return _operands_fit(extent, scale) & (extent.low * power(scale) >= 2.0**-126)


def _operands_fit(extent: Extent, scale: Array) -> Array:
    share = _share(extent)
    to_a, to_b = power(share), power(scale - share)
    least, limit = 2.0**-126, 2.0**127
    small = (extent.a_low * to_a >= least) & (extent.b_low * to_b >= least)
    large = (extent.a_top * to_a < limit) & (extent.b_top * to_b < limit)
    return small & large


def scaled(words: Array, scale: Array) -> Array:
    """FP32 words times 2^scale, as FP32 numbers; exact where `ways` chose the scale."""
    return (floats.to_float64(words) * power(scale)).astype(jnp.float32)
