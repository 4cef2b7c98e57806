"""Steps whose sums are formed in two parts of FP64: for data on which FP64 alone would round.

A step's terms are added to a large constant, whose last place is the grid on which the sum of the
upper parts is exact; what each term loses against the grid is summed apart (Rump, Ogita and Oishi
2008). Together they hold the sum to about 2^-97 of its largest term, and mostly exactly. The
result is rounded once, by the sign of what lies beyond FP64 where FP64 shows a tie. Subnormals,
infinities and NaNs are handled; an element whose rounding stays in doubt is marked.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import blocks, floats, singles
from kernels.arithmetic import Arithmetic

_LARGEST = float(np.finfo(np.float32).max)
_LOWEST = 2.0**-126  # of the normal numbers
_SIGN = np.int64(-(2**63))
_CHAINS = 2  # sums of a step's upper parts that do not wait for each other
_NOTHING = -900  # exponent of a step that multiplies zeros only: below all others


def unknown_word(arithmetic: Arithmetic) -> np.uint32:
    """The FP32 word of an element whose value is not known: a NaN that is no result."""
    return np.uint32(0x7FFADBAD if arithmetic.nan != 0x7FFADBAD else 0x7FFADBAE)


class _Terms(NamedTuple):
    """The products of a step."""

    x: Array  # [batch, m, products]
    minus_x: Array
    y: Array  # [batch, products, n]
    scale: Array  # of the sum, uint16 `[batch, m, n]`, see `_scale`


def steps(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words `[batch, m, n]` of the accumulators after the steps of one block; `unknown_word`
    where one is in doubt.

    Args:
        words: the accumulators before.
        x, y: FP64 operands `[batch, m, k]` and `[batch, k, n]`, k a multiple of `products`.
        arithmetic: a fused one with `fraction_bits=None`.
    """
    unknown = jnp.zeros(words.shape, jnp.bool_)
    minus_x = -x
    for first in range(0, x.shape[-1], arithmetic.products):
        part = slice(first, first + arithmetic.products)
        addend = words if arithmetic.addend == "fused" else None
        # Within a conditional that is always taken, because XLA would fuse these sums of small
        # integers into the sums in FP64, of which a register holds four times fewer.
        scale = lax.cond(
            (words[0, 0, 0] | np.uint32(1)) != 0,
            _scale,
            lambda x, y, addend: jnp.zeros((*x.shape[:2], y.shape[2]), jnp.uint16),
            *(x[:, :, part], y[:, part, :], addend),
        )
        terms = _Terms(x[:, :, part], minus_x[:, :, part], y[:, part, :], scale)
        c = floats.to_float64(words)
        if is_usual(arithmetic):
            words, doubtful = _usual_step(c, terms, arithmetic)
        else:
            c, doubtful = _step(_read(c, arithmetic), terms, arithmetic)
            words = _store(c, arithmetic)
        unknown = unknown | doubtful
    return jnp.where(unknown, unknown_word(arithmetic), words)


def _scale(x: Array, y: Array, words: Array | None) -> Array:
    """A power of two that is more than twice the sum of the magnitudes of a step's terms, as the
    upper 16 bits of an FP64 number; negative if what the terms lose against a grid of that size is
    summed exactly.
    """
    count = x.shape[-1]
    places = _places(count + (words is not None))
    x_tops, y_tops = _exponents(x), _exponents(y)
    sums = (lax.add(*blocks.pair(x_tops, y_tops, index)) for index in range(count))
    top = functools.reduce(lax.max, sums)
    top = jnp.maximum(top, np.int16(_NOTHING)) + np.int16(4 + math.ceil(math.log2(count)))
    lasts = [jnp.min(_exponents(trailing(v)), axis) for v, axis in ((x, 2), (y, 1))]
    last = (lasts[0] + np.int16(places))[:, :, None] + lasts[1][:, None, :]
    if words is None:
        exact = last >= top
    else:
        halves = lax.bitcast_convert_type(words, jnp.int16)
        upper = halves[..., 1] & np.int16(0x7FFF)
        upper = jnp.where(halves[..., 0] != 0, upper | np.int16(1), upper)
        exponent = jnp.maximum(upper >> 7, np.int16(1)) - np.int16(127)
        nothing = upper == 0
        top = jnp.maximum(top, jnp.where(nothing, np.int16(_NOTHING), exponent + np.int16(3)))
        exact = (last >= top) & (nothing | (exponent + np.int16(places - 23) >= top))
    word = ((top + np.int16(1023)) << 4) | jnp.where(exact, np.int16(-(2**15)), np.int16(0))
    return lax.bitcast_convert_type(word, jnp.uint16)


def _places(terms: int) -> int:
    """So many places below the largest power of two the parts of so many terms add up exactly."""
    return 106 - math.ceil(math.log2(terms))


def _step(c: Array, terms: _Terms, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """The next accumulators (FP64 holding FP32 values), and which of them are in doubt."""
    if arithmetic.addend == "fused":
        return _rounded_sum(c, terms, arithmetic)
    total, doubtful = _rounded_sum(None, terms, arithmetic)
    high = c + total
    low = singles.loss(c, total, high)
    exact = _round(high, low, high, arithmetic)[0]
    return exact, doubtful


def _read(c: Array, arithmetic: Arithmetic) -> Array:
    """C as a step takes it."""
    if arithmetic.specials == "saturate":
        c = jnp.where(jnp.isnan(c), 0.0, jnp.clip(c, -_LARGEST, _LARGEST))
    if arithmetic.subnormal_inputs == "flush":
        c = jnp.where(jnp.abs(c) < _LOWEST, _zero_like(c), c)
    if arithmetic.subnormal_inputs == "plus_zero":
        c = jnp.where(jnp.abs(c) < _LOWEST, 0.0, c)
    return c


def is_usual(arithmetic: Arithmetic) -> bool:
    """Whether `_usual_step` is for this record."""
    keeps = arithmetic.subnormal_inputs == arithmetic.subnormal_results == "keep"
    plain = arithmetic.specials == "ieee" and arithmetic.overflow == "inf"
    fused = arithmetic.addend == "fused" and arithmetic.rounding == "nearest_even"
    return keeps and plain and fused and arithmetic.zero == "positive"


def _usual_step(c: Array, terms: _Terms, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """The words of the next accumulators, and which of them are in doubt: fewer instructions than
    `_step` for records that keep subnormals and round to nearest.
    """
    parts = _sum(c, terms, arithmetic)
    high, low, special = parts.high, parts.low, parts.total
    bits = lax.bitcast_convert_type(high, jnp.int64)
    tiny = jnp.abs(high) < _LOWEST
    # Where nothing of `high` is below a tie's last bit, the sign of `low` decides; a number that is
    # no tie stays nearest to the same one.
    short = (bits & ((1 << 28) - 1)) == 0
    apart = bits ^ lax.bitcast_convert_type(low, jnp.int64)
    moved = jnp.where(short & (low != 0), bits + ((apart >> 63) | 1), bits)
    nearest = lax.bitcast_convert_type(moved, jnp.float64)
    # What is not finite is not so in `special` alone.
    found = jnp.where(jnp.abs(special) < jnp.inf, nearest, special)
    normal = floats.bits32(found.astype(jnp.float32))  # RNE
    # The last place of 2^(52 - 149) is that of subnormals: its last bits count them.
    places = jnp.abs(found) + 2.0 ** (52 - 149)
    count = lax.bitcast_convert_type(places, jnp.int64).astype(jnp.uint32)
    subnormal = jnp.where(count != 0, count | (normal & floats.SIGN), np.uint32(0))
    word = jnp.where(jnp.abs(found) < _LOWEST, subnormal, normal)
    word = jnp.where(special != special, np.uint32(arithmetic.nan), word)
    tie = short & (tiny | ((bits & (1 << 28)) != 0))
    doubtful = (jnp.abs(high) < parts.error * 2.0**54) | (tie & (jnp.abs(low) <= parts.error))
    return word, doubtful


def _rounded_sum(c: Array | None, terms: _Terms, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """The sum of the products and `c`, rounded to FP32, and where that is in doubt."""
    parts = _sum(c, terms, arithmetic)
    high, low, error = parts.high, parts.low, parts.error
    rounded, boundary = _round(high, low, parts.total, arithmetic, parts.plain)
    # All comparisons with a NaN are false: specials are never in doubt.
    doubtful = (jnp.abs(high) < error * 2.0**54) | (boundary & (jnp.abs(low) <= error))
    return rounded, doubtful


class _Sum(NamedTuple):
    """The sum of a step, before it is rounded."""

    high: Array  # the sum rounded to FP64
    low: Array  # what that lost
    error: Array  # a bound on what `low` lacks; negative where nothing
    total: Array  # not finite where the sum is not
    plain: Array | None  # has the sign of an exact zero


def _sum(c: Array | None, terms: _Terms, arithmetic: Arithmetic) -> _Sum:
    x, minus_x, y, scale = terms
    count = x.shape[-1]
    top = lax.bitcast_convert_type(scale.astype(jnp.int64) << 48, jnp.float64)
    grid = jnp.abs(top) * 1.5
    chains = min(_CHAINS, count)
    totals, rests, plain = [grid] * chains, [jnp.zeros_like(grid)] * chains, None
    if c is not None:
        totals[-1] = grid + c
        rests[-1] = c - (totals[-1] - grid)
    if arithmetic.zero == "ieee":
        plain = jnp.full_like(grid, -0.0) if c is None else c
    for index in range(count):
        product = blocks.outer(x, y, index)
        minus_product = blocks.outer(minus_x, y, index)  # so that both become FMAs
        if arithmetic.product_overflow == "inf":
            product = _overflowed(product)
            minus_product = -product
        chain = index % chains
        before, total = totals[chain], totals[chain] + product
        totals[chain] = total
        rests[chain] = rests[chain] - ((total - before) + minus_product)
        if plain is not None:
            plain = plain + product
    upper = blocks.paired([total - grid for total in totals])
    rest = blocks.paired(rests)
    high = upper + rest
    added = count + (c is not None)
    # The upper part is a multiple of the last place of the rest, hence this is all that is lost.
    low = rest - (high - upper)
    return _Sum(high, low, top * ((added + 1) ** 2 * 2.0**-107), blocks.paired(totals), plain)


def _round(
    high: Array, low: Array, special: Array, arithmetic: Arithmetic, plain: Array | None = None
) -> tuple[Array, Array]:
    """`high + low` rounded to FP32, and whether the sign of `low` decided it.

    Where `special` is infinite or NaN, that is the result. `plain` has the sign of an exact zero
    (`high` if None).
    """
    place = leading(high) * 2.0**-23
    rounded, boundary = _to_multiple(high, low, _larger(place, 2.0**-149), arithmetic)
    if arithmetic.subnormal_results == "flush":
        unlimited, also = _to_multiple(high, low, place, arithmetic)
        rounded = jnp.where(jnp.abs(unlimited) < _LOWEST, 0.0, rounded)
        boundary |= also
    if arithmetic.zero == "positive":
        rounded = jnp.where(rounded == 0, 0.0, rounded)
    else:
        plain = high if plain is None else plain
        minus = lax.bitcast_convert_type(plain, jnp.int64) == _SIGN
        zero = jnp.where(high == 0, jnp.where(minus, -0.0, 0.0), _zero_like(high))
        rounded = jnp.where(rounded == 0, zero, rounded)
    largest = jnp.inf if arithmetic.overflow == "inf" else _LARGEST
    beyond = jnp.where(high < 0, -largest, largest)
    rounded = jnp.where(jnp.abs(rounded) >= 2.0**128, beyond, rounded)
    return jnp.where(jnp.isfinite(special), rounded, special), boundary


def _to_multiple(
    high: Array, low: Array, place: Array, arithmetic: Arithmetic
) -> tuple[Array, Array]:
    """`high + low` rounded to a multiple of `place`, and whether the sign of `low` decided it."""
    magic = place * (1.5 * 2.0**52)
    nearest = (high + magic) - magic  # RNE
    beyond = high - nearest
    if arithmetic.rounding == "nearest_even":
        half = place * 0.5
        tie = jnp.abs(beyond) == half
        broken = high + jnp.where(low < 0, -half, half)
        return jnp.where(tie & (low != 0), broken, nearest), tie
    side = jnp.where(beyond == 0, low, beyond)
    too_far = jnp.where(nearest < 0, side > 0, side < 0) & (nearest != 0)
    # Below a power of two the places are finer; at 2^-126 they are not.
    finer = (beyond == 0) & (jnp.abs(high) == leading(high)) & (place > 2.0**-149)
    step = jnp.where(finer, place * 0.5, place)
    step = jnp.where(nearest < 0, -step, step)
    return jnp.where(too_far, nearest - step, nearest), beyond == 0  # RZ


def _store(c: Array, arithmetic: Arithmetic) -> Array:
    """FP64 numbers that FP32 has, as FP32 words; a conversion by XLA would flush subnormals."""
    magnitude = jnp.abs(c)
    sign = (lax.bitcast_convert_type(c, jnp.int64) >> 32).astype(jnp.uint32) & floats.SIGN
    # The last place of 2^(52 - 149) is that of subnormals: its last bits count them.
    count = lax.bitcast_convert_type(magnitude + 2.0 ** (52 - 149), jnp.int64).astype(jnp.uint32)
    normal = floats.bits32(c.astype(jnp.float32))
    word = jnp.where(magnitude < _LOWEST, count | sign, normal)
    return jnp.where(c != c, np.uint32(arithmetic.nan), word)


def _overflowed(product: Array) -> Array:
    infinite = jnp.where(product < 0, -jnp.inf, jnp.inf)
    return jnp.where(jnp.abs(product) >= 2.0**128, infinite, product)


def _exponents(values: Array) -> Array:
    """Exponents of FP64 values, int16; those of zeros and specials are far below all others."""
    bits = lax.bitcast_convert_type(values, jnp.int64)
    exponent = ((bits >> 52) & 0x7FF).astype(jnp.int16) - np.int16(1023)
    ordinary = (values != 0) & jnp.isfinite(values)
    return jnp.where(ordinary, exponent, np.int16(-(1 << 12)))


def _larger(x: Array, y: Array | float) -> Array:
    """Without the care for NaNs that XLA's maximum spends instructions on."""
    return jnp.where(x > y, x, y)


def _zero_like(x: Array) -> Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int64) & _SIGN, jnp.float64)


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
