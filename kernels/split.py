"""Steps whose sums are formed in two parts of FP64: for data on which FP64 alone would round.

A step's terms are added to a large constant, whose last place is the grid on which the sum of the
upper parts is exact; what each term loses against the grid is summed apart (Rump, Ogita and Oishi
2008). Together they hold the sum to about 2^-97 of its largest term, and mostly exactly. The
result is rounded once, by the sign of what lies beyond FP64 where FP64 shows a tie. Subnormals,
infinities and NaNs are handled; an element whose rounding stays in doubt becomes `UNKNOWN`.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats
from kernels.arithmetic import Arithmetic
from kernels.ranges import leading, trailing

_LARGEST = float(np.finfo(np.float32).max)
_LOWEST = 2.0**-126  # of the normal numbers
_SIGN = np.int64(-(2**63))
_NOTHING = -900  # exponent of a step that multiplies zeros only: below all others


def unknown_word(arithmetic: Arithmetic) -> np.uint32:
    """The FP32 word of an element whose value is not known: a NaN that is no result."""
    return np.uint32(0x7FFADBAD if arithmetic.nan != 0x7FFADBAD else 0x7FFADBAE)


class _Terms(NamedTuple):
    """The products of a step."""

    x: Array  # [batch, m, products]
    minus_x: Array
    y: Array  # [batch, products, n]
    top: Array  # the largest exponent of a product `[batch, m, n]`


def steps(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words `[batch, m, n]` of the accumulators after the steps of one block.

    Args:
        words: the accumulators before; an unknown one stays unknown.
        x, y: FP64 operands `[batch, m, k]` and `[batch, k, n]`, k a multiple of `products`.
        arithmetic: a fused one with `fraction_bits=None`.
    """
    mark = unknown_word(arithmetic)
    unknown = words == mark
    c = floats.to_float64(words)
    # Within a conditional that is always taken, because XLA would fuse these sums of small integers
    # into the sums in FP64, of which a register holds four times fewer.
    tops = lax.cond(
        (words[0, 0, 0] | np.uint32(1)) != 0,
        lambda: _tops(_exponents(x), _exponents(y), arithmetic.products),
        lambda: (jnp.zeros(words.shape, jnp.int16),) * (x.shape[-1] // arithmetic.products),
    )
    minus_x = -x
    for index, top in enumerate(tops):
        part = slice(index * arithmetic.products, (index + 1) * arithmetic.products)
        terms = _Terms(x[:, :, part], minus_x[:, :, part], y[:, part, :], top)
        if is_usual(arithmetic):
            words, doubtful = _usual_step(c, terms, arithmetic)
            c = floats.to_float64(words)
        else:
            c, doubtful = _step(_read(c, arithmetic), terms, arithmetic)
            words = _store(c, arithmetic)
        unknown = unknown | doubtful
    return jnp.where(unknown, mark, words)


def _tops(x: Array, y: Array, products: int) -> tuple[Array, ...]:
    """The largest exponent of a product in each step, from the operands' exponents."""
    tops = []
    for first in range(0, x.shape[-1], products):
        top = x[:, :, first, None] + y[:, None, first, :]
        for index in range(first + 1, first + products):
            top = jnp.maximum(top, x[:, :, index, None] + y[:, None, index, :])
        tops.append(jnp.maximum(top, np.int16(_NOTHING)))
    return tuple(tops)


def _step(c: Array, terms: _Terms, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """The next accumulators (FP64 holding FP32 values), and which of them are in doubt."""
    if arithmetic.addend == "fused":
        return _rounded_sum(c, terms, arithmetic)
    total, doubtful = _rounded_sum(None, terms, arithmetic)
    high = c + total
    low = _lost(c, total, high)
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
    # Rounded to odd, the sum is no false tie when it is rounded to FP32.
    moved = bits + jnp.where((bits ^ lax.bitcast_convert_type(low, jnp.int64)) < 0, -1, 1)
    odd = jnp.where((low != 0) & ((bits & 1) == 0), moved, bits)
    magnitude = jnp.abs(lax.bitcast_convert_type(odd, jnp.float64))
    # The last place of 2^(52 - 149) is that of subnormals: its last bits count them.
    count = lax.bitcast_convert_type(magnitude + 2.0 ** (52 - 149), jnp.int64).astype(jnp.uint32)
    tiny = magnitude < _LOWEST
    word = jnp.where(tiny, count, floats.bits32(magnitude.astype(jnp.float32)))  # RNE
    finite = jnp.isfinite(special)
    word = jnp.where(finite, word, floats.INF)
    sign = lax.bitcast_convert_type(jnp.where(finite, high, special), jnp.int64) < 0
    word = word | jnp.where(sign & (word != 0), floats.SIGN, jnp.uint32(0))
    word = jnp.where(special != special, np.uint32(arithmetic.nan), word)
    # Only at a tie does the sign of `low` decide. Coarser places have their ties among these.
    tie = (bits & ((1 << 29) - 1)) == (1 << 28)
    tie |= tiny & ((bits & ((1 << 28) - 1)) == 0)
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
    error: Array  # a bound on what `low` lacks; -1 where nothing
    total: Array  # not finite where the sum is not
    plain: Array | None  # has the sign of an exact zero


def _sum(c: Array | None, terms: _Terms, arithmetic: Arithmetic) -> _Sum:
    x, minus_x, y, top = terms
    count = x.shape[-1]
    # The sum of all magnitudes is below half of `top`, so that `grid` stays in one binade.
    biased = top.astype(jnp.int64) + (1023 + 4 + math.ceil(math.log2(count)))
    products_top = lax.bitcast_convert_type(biased << 52, jnp.float64)
    top = products_top
    if c is not None:
        leading_c = leading(c)
        leading_c = jnp.where(leading_c < jnp.inf, leading_c, 0.0)
        top = _larger(products_top, leading_c * 8)
    grid = top * 1.5
    total, rest, plain = grid, jnp.zeros_like(grid), None
    if c is not None:
        total = grid + c
        rest = c - (total - grid)
    ieee = arithmetic.zero == "ieee"
    if ieee:
        plain = jnp.full_like(grid, -0.0) if c is None else c
    for index in range(count):
        product = _outer(x[:, :, index], y[:, index, :])
        minus_product = _outer(minus_x[:, :, index], y[:, index, :])  # so that both become FMAs
        if arithmetic.product_overflow == "inf":
            product = _overflowed(product)
            minus_product = -product
        before, total = total, total + product
        rest = rest - ((total - before) + minus_product)
        if plain is not None:
            plain = plain + product
    upper = total - grid
    high = upper + rest
    # `rest` is exact if its terms have a common last place that is coarse enough, else off by:
    added = count + (c is not None)
    places = 2.0 ** (106 - math.ceil(math.log2(added)))
    exact = _outer(jnp.min(trailing(x), 2) * places, jnp.min(trailing(y), 1)) >= top
    if c is not None:
        exact &= (leading_c * (places * 2.0**-23) >= top) | (c == 0)
    error = top * ((added + 1) ** 2 * 2.0**-107)
    other = products_top * ((added + 1) * 2.0**-55)
    error = jnp.where(error < other, error, other)
    error = jnp.where(exact, -1.0, error)
    return _Sum(high, _lost(upper, rest, high), error, total, plain)


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


def _outer(x: Array, y: Array) -> Array:
    return x[:, :, None] * y[:, None, :]


def _lost(x: Array, y: Array, total: Array) -> Array:
    """What `total`, the rounded `x + y`, lost (Knuth)."""
    part = total - x
    return (x - (total - part)) + (y - part)


def _zero_like(x: Array) -> Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int64) & _SIGN, jnp.float64)
