"""Exact sums for products that are too small for the tiles of `kernels.exact`.

FP64 adds the products of a step, for all elements of the result at once. Which of three ways is
taken is decided from the data, block by block of k:

- `_plain`, where exponent ranges prove beforehand that no FP64 addition of the step can round, so
  that the only rounding is the one to FP32 that the unit makes;
- `_checked` otherwise: each element bounds its own FP64 error and asks whether the rounding to FP32
  could depend on it (Ziv's test);
- an element that neither can vouch for becomes NaN and stays it; in the end everything that is not
  finite is computed again by exact sums (`repair`).

This compiles in half the time and needs no passes over tiles; on data that are mostly beyond the
second way, and on large products, it is slower.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, operands, repair, split
from kernels.arithmetic import Arithmetic

_GROUP = 16  # products added between two passes over the accumulators
_NARROW = 16  # columns below which the product is computed transposed
LARGEST = 1 << 28  # multiply-adds
_NO_LIMIT = 1 << 12  # last place of a zero


def serves(a: Array, b: Array, arithmetic: Arithmetic) -> bool:
    """Whether this file is for such operands and such a record."""
    fits = math.prod(a.shape) * b.shape[-1] <= LARGEST
    usual = split.is_usual(arithmetic) and arithmetic.product_overflow == "keep"
    return fits and usual and arithmetic.products > 1


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`, operands as read.

    Args:
        a, b: BF16, FP16 or FP32.
        c: FP32 `[batch, m, n]`, or `None` for +0.
        arithmetic: one that `serves`.
    """
    if b.shape[-1] < _NARROW < a.shape[1]:  # long rows are what the loops below are good at
        turned = None if c is None else c.swapaxes(1, 2)
        return accumulate(b.swapaxes(1, 2), a.swapaxes(1, 2), turned, arithmetic).swapaxes(1, 2)
    kinds = operands.FRACTION_BITS
    fraction_bits = max(kinds[a.dtype.name], kinds[b.dtype.name])
    x, y, first = floats.bits32(a), floats.bits32(b), None if c is None else floats.bits32(c)
    short = -a.shape[2] % arithmetic.products
    whole_a = jnp.pad(a, ((0, 0), (0, 0), (0, short)))
    whole_b = jnp.pad(b, ((0, 0), (0, short), (0, 0)))
    mark = split.unknown_word(arithmetic)
    with jax.enable_x64(True):
        found = _steps(x, y, first, _product_ranges(x, y, fraction_bits), arithmetic)
        if c is None:  # a sum from +0 is never -0, but XLA takes `0 + x` for x
            found = jnp.where(found == 0, jnp.float32(0), found)
        words = floats.bits32(found)
        magnitude = lax.bitcast_convert_type(words & floats.MAGNITUDE, jnp.int32)
        # Integers, because XLA vectorises their maxima; in two goes, along the long axes.
        largest = jnp.max(jnp.max(magnitude, axis=1))

        def repaired() -> Array:
            marked = floats.from_bits32(jnp.where(magnitude >= int(floats.INF), mark, words))
            return repair.repair(marked, mark, whole_a, whole_b, c, arithmetic)

        return lax.cond(largest >= int(floats.INF), repaired, lambda: found)


# Exponent ranges. A "last place" is the exponent of the lowest bit that a number may have set.


def _ranges(words: Array, fraction_bits: int, axis: int) -> tuple[Array, Array]:
    """Largest magnitude (FP64, infinite for specials) and smallest last place along `axis`."""
    magnitude = (words & floats.MAGNITUDE).astype(jnp.int32)
    if fraction_bits == 23:  # FP32 data are often narrower than their type: count trailing zeros
        field = magnitude >> 23
        significand = (magnitude & 0x7FFFFF) | jnp.where(field > 0, 1 << 23, 0)
        lowest = (significand & -significand).astype(jnp.float32)
        place = (floats.bits32(lowest) >> 23).astype(jnp.int32) - 127
        last = jnp.maximum(field, 1) - 150 + place
        last = jnp.where(magnitude == 0, _NO_LIMIT, last)
        top, last = _max_and_min(magnitude, last, axis)
    else:
        top, least = _max_and_min(magnitude, (magnitude - 1) & 0x7FFFFFFF, axis)
        field = jnp.maximum((least + 1) >> 23, 1)
        last = jnp.where(least == 0x7FFFFFFF, _NO_LIMIT, field - 127 - fraction_bits)
    largest = floats.to_float64(top.astype(jnp.uint32))
    return jnp.where(jnp.isnan(largest), jnp.inf, largest), last


def _max_and_min(x: Array, y: Array, axis: int) -> tuple[Array, Array]:
    """`x.max(axis), y.min(axis)` in one pass; both int32 and not negative."""

    Pair = tuple[Array, Array]

    def both(left: Pair, right: Pair) -> Pair:
        return jnp.maximum(left[0], right[0]), jnp.minimum(left[1], right[1])

    return lax.reduce((x, y), (np.int32(0), np.int32(2**31 - 1)), both, (axis,))


def _product_ranges(a: Array, b: Array, fraction_bits: int) -> tuple[Array, Array]:
    """For each `[batch, k]`: a bound on the products' magnitude, and their smallest last place."""
    a_top, a_last = _ranges(a, fraction_bits, 1)
    b_top, b_last = _ranges(b, fraction_bits, 2)
    bound = jnp.where((a_top == 0) | (b_top == 0), 0.0, a_top * b_top)
    return bound, a_last + b_last


def _start_ranges(c: Array | None) -> tuple[Array, Array]:
    """The same of the initial accumulators, as scalars."""
    if c is None:
        return jnp.float64(0), jnp.int32(_NO_LIMIT)
    top, last = _ranges(c.reshape(1, -1), 23, 1)
    return top[0], last[0]


def _power(exponent: Array) -> Array:
    """2^exponent in FP64, for exponents that FP64 has as normal numbers."""
    biased = jnp.clip(exponent, -1022, 1023).astype(jnp.int64) + 1023
    return lax.bitcast_convert_type(biased << 52, jnp.float64)


# Steps of several products, in FP64.


def _blocks(
    a: Array, b: Array, products: int, size: int, convert: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Operands cut along k: `[blocks, batch, m, size]` and `[blocks, batch, size, n]`."""
    batch, m, k = a.shape
    blocks = -(-k // size)
    padding = blocks * size - k
    # A short step is filled up with +0. Steps that only fill up a group are -0 * +0: they change
    # no accumulator, not even -0.
    short = min(padding, -k % products)
    a = jnp.pad(a, ((0, 0), (0, 0), (0, short)))
    a = jnp.pad(a, ((0, 0), (0, 0), (0, padding - short)), constant_values=floats.SIGN)
    b = jnp.pad(b, ((0, 0), (0, padding), (0, 0)))
    a = convert(a.reshape(batch, m, blocks, size).transpose(2, 0, 1, 3))
    return a, convert(b.reshape(batch, blocks, size, -1).transpose(1, 0, 2, 3))


def _outer(x: Array, y: Array, index: int) -> Array:
    return x[:, :, index, None] * y[:, None, index, :]


def _dot(x: Array, y: Array) -> Array:
    total = _outer(x, y, 0)
    for index in range(1, x.shape[-1]):
        total = total + _outer(x, y, index)
    return total


def _start(c: Array, arithmetic: Arithmetic) -> Array:
    """FP32 accumulators; subnormal ones, which float operations would lose, become NaN."""
    magnitude = c & floats.MAGNITUDE
    if arithmetic.zero == "positive":
        c = jnp.where(magnitude == 0, jnp.uint32(0), c)
    subnormal = (magnitude > 0) & (magnitude < (1 << 23))
    return floats.from_bits32(jnp.where(subnormal, floats.QUIET_NAN, c))


def _steps(
    a: Array, b: Array, c: Array | None, ranges: tuple[Array, Array], arithmetic: Arithmetic
) -> Array:
    """FP32 results of all steps; NaN or infinite where they may be wrong."""
    batch, m, k = a.shape
    products = arithmetic.products
    size = products * max(1, min(_GROUP, k) // products)
    x, y = _blocks(a, b, products, size, floats.to_float64)
    bound, last = (
        _per_block(part, size, fill) for part, fill in zip(ranges, (0, _NO_LIMIT), strict=True)
    )
    bound, last = jnp.sum(bound, axis=-1), jnp.min(last, axis=-1)  # [blocks, batch]
    start_bound, start_last = _start_ranges(c)

    def body(
        state: tuple[Array | None, Array, Array], operands: tuple[Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        c, reach, lowest = state
        x, y, bound, last = operands
        reach = (reach + bound) * (1 + 2.0**-20)  # of the accumulators, their rounding included
        lowest = jnp.minimum(lowest, last)
        # Partial sums of products are multiples of 2^last below `reach`; every accumulator is a
        # multiple of 2^lowest, because rounding never makes a last place finer.
        normal = jnp.all(lowest >= -126)  # then no result can be subnormal
        exact = normal & jnp.all((reach <= _power(52 + last)) & (reach < 2.0**127))

        def before() -> Array:
            return jnp.zeros((batch, m, y.shape[-1]), jnp.float32) if c is None else c

        new = lax.cond(
            exact,
            lambda: _plain(before(), x, y, products),
            lambda: _checked(before(), x, y, products, normal),
        )
        return (new, reach, lowest), None

    blocks = x.shape[0]
    reach = jnp.full(batch, start_bound, jnp.float64)
    lowest = jnp.full(batch, start_last, jnp.int32)
    if blocks == 1 and c is None:  # nothing to carry: zeros that are never stored
        (found, _, _), _ = body((None, reach, lowest), (x[0], y[0], bound[0], last[0]))
        return found
    zeros = jnp.zeros((batch, m, b.shape[-1]), jnp.float32)
    state = zeros if c is None else _start(c, arithmetic), reach, lowest
    (found, _, _), _ = lax.scan(body, state, (x, y, bound, last))
    return found


def _per_block(part: Array, size: int, fill: int) -> Array:
    """`[batch, k]` to `[blocks, batch, size]`."""
    batch, k = part.shape
    padded = jnp.pad(part, ((0, 0), (0, -k % size)), constant_values=fill)
    return padded.reshape(batch, -1, size).swapaxes(0, 1)


def _cut(x: Array, y: Array, first: int, products: int) -> tuple[Array, Array]:
    return x[:, :, first : first + products], y[:, first : first + products, :]


def _kept(before: Array, after: Array) -> Array:
    """Whether C's last place is not so far below the sum that FP64 would drop it."""
    return (jnp.abs(after) <= 2.0**28 * jnp.abs(before)) | (before == 0)


def _plain(c: Array, x: Array, y: Array, products: int) -> Array:
    """The steps of a block whose products add up exactly."""
    for first in range(0, x.shape[-1], products):
        total = _dot(*_cut(x, y, first, products))
        new = (c.astype(jnp.float64) + total).astype(jnp.float32)  # RNE: the step's one rounding
        c = jnp.where(_kept(c, new), new, jnp.float32(jnp.nan))
    return c


def _checked(c: Array, x: Array, y: Array, products: int, normal: Array) -> Array:
    """The steps of a block, each result tested; `normal` says that none can be subnormal."""
    x_top, x_last = _value_ranges(x, 2)
    y_top, y_last = _value_ranges(y, 1)
    # Where all terms are multiples of q, FP64 keeps every partial sum up to 2^52 q.
    limit = (x_last * 2.0**26)[:, :, None] * (y_last * 2.0**26)[:, None, :]
    bound = (x_top * products)[:, :, None] * y_top[:, None, :]
    # L products added in any order err by at most (L + 1) 2^-53 sum |p|. The conversions below
    # flush subnormals, so where there may be some, an error that reaches across them makes small
    # results uncertain, but for those of zeros alone.
    floor, across = jnp.where(normal, 0.0, 2.0**-100), jnp.where(normal, 0.0, 2.0**-125)
    slack = bound * ((products + 1) * 2.0**-53) + jnp.where(bound == 0, 0.0, across)
    for first in range(0, x.shape[-1], products):
        before = c.astype(jnp.float64)
        after = before + _dot(*_cut(x, y, first, products))
        size = jnp.abs(after)
        exact = _kept(before, after) & (jnp.maximum(bound, size) <= limit) & (size >= floor)
        error = jnp.where(exact, 0.0, slack + size * 2.0**-51)
        low = (after - error).astype(jnp.float32)
        high = (after + error).astype(jnp.float32)
        c = jnp.where(low == high, low, jnp.float32(jnp.nan))  # RNE is monotone: a certain result
    return c


def _value_ranges(values: Array, axis: int) -> tuple[Array, Array]:
    """Largest magnitude and smallest last place, as a power of two, of FP64 values."""
    magnitude = jnp.abs(values)
    bits = lax.bitcast_convert_type(magnitude, jnp.int64)
    fraction = bits & ((1 << 52) - 1)
    power = lax.bitcast_convert_type(bits - fraction, jnp.float64)
    without_last = lax.bitcast_convert_type(bits & (bits - 1), jnp.float64)
    last = jnp.where(fraction == 0, power, magnitude - without_last)
    last = jnp.where(magnitude == 0, 2.0**400, last)
    # Positive floats order like their bits; XLA:CPU would store outer products of float maxima.
    top = jnp.max(bits, axis=axis)
    low = jnp.min(lax.bitcast_convert_type(last, jnp.int64), axis=axis)
    return (
        lax.bitcast_convert_type(top, jnp.float64),
        lax.bitcast_convert_type(low, jnp.float64),
    )
