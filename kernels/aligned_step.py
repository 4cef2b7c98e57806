"""One step of a unit that cuts its terms to a common grid, in integers.

A term is a significand and the exponent of its leading place. One pass over the products finds the
largest exponent, a second one shifts each term to the grid and adds. Nothing depends on the values
but what becomes of infinities and NaNs; `specials` says whether there may be any.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import encode, floats, operands
from kernels.arithmetic import Arithmetic


@dataclass(frozen=True, slots=True)
class Grid:
    """How the terms of a record are held as integers.

    Attributes:
        arithmetic: the record.
        precision: bits of an operand's significand.
        lowest: the exponent of the smallest normal number of the operands' type; numbers below are
            not renormalised, and alignment can tell.
    """

    arithmetic: Arithmetic
    precision: int
    lowest: int

    @property
    def cut(self) -> int:
        assert self.arithmetic.fraction_bits is not None  # the caller has looked
        return self.arithmetic.fraction_bits

    @property
    def floor(self) -> int:
        assert self.arithmetic.min_exponent is not None  # the record has checked
        return self.arithmetic.min_exponent

    @property
    def up(self) -> int:
        """Places by which a product has fewer fraction bits than the grid of its exponent."""
        return max(0, self.cut - 2 * (self.precision - 1))

    @property
    def down(self) -> int:
        """Places by which it has more."""
        return max(0, 2 * (self.precision - 1) - self.cut)

    @property
    def _term_bits(self) -> int:
        """Bits of an aligned product: it is below 2^(cut + 2), or equal to it if rounded up."""
        return self.cut + 2 + (self.arithmetic.alignment == "nearest_even")

    @property
    def lane(self) -> DTypeLike:
        """The type of a term: products, before and after alignment, and C."""
        largest = max(2 * self.precision + self.up, 24, self._term_bits)
        return jnp.int32 if largest <= 31 else jnp.int64

    @property
    def group(self) -> int:
        """How many aligned products one lane can add."""
        return 1 << (8 * jnp.dtype(self.lane).itemsize - 1 - self._term_bits)


class Operands(NamedTuple):
    """Decoded operands. `sign` is 0 or -1; `kind`, if specials are looked for, is +-1, +-0, Inf or
    NaN where the number is finite, zero, infinite or NaN.
    """

    significand: Array
    exponent: Array
    sign: Array
    kind: Array | None


def decode(words: Array, grid: Grid, up: int, specials: bool) -> Operands:
    """FP32 words as the integers of `grid`, significands shifted left by `up` places."""
    significand, exponent = encode.split(words)
    if grid.lowest > -126:  # an FP16 subnormal, which is a normal FP32 number
        significand = significand >> encode.at_most(jnp.maximum(grid.lowest - exponent, 0), 31)
        exponent = jnp.maximum(exponent, grid.lowest)
        exponent = jnp.where(significand == 0, encode.NO_EXPONENT, exponent)
    kind = None
    if specials:
        kind = _kind(words)
        special = (words & floats.MAGNITUDE) >= floats.INF
        significand = jnp.where(special, 0, significand)
        exponent = jnp.where(special, encode.NO_EXPONENT, exponent)
    significand = (significand >> (24 - grid.precision)).astype(grid.lane) << up
    sign = _sign(words, grid)
    if grid.arithmetic.alignment == "floor":
        significand = _signed(significand, sign)
    return Operands(significand, exponent, sign, kind)


def _sign(words: Array, grid: Grid) -> Array:
    return -(words >> 31).astype(grid.lane)


def packed_signs(sign: Array) -> Array:
    """Signs `[..., products, n]` of a step, 0 or -1, as the bits of words `[..., n]`."""
    products = sign.shape[-2]
    word = jnp.uint32 if products <= 32 else jnp.uint64
    place = jnp.arange(products, dtype=word)[:, None]
    return jnp.sum((sign & 1).astype(word) << place, axis=-2, dtype=word)


def _signed(magnitude: Array, sign: Array) -> Array:
    return (magnitude ^ sign) - sign


def _kind(words: Array) -> Array:
    """+-1 for a finite number, or the zero, infinity or NaN itself."""
    magnitude = words & floats.MAGNITUDE
    ordinary = (magnitude > 0) & (magnitude < floats.INF)
    return floats.from_bits32(jnp.where(ordinary, words & floats.SIGN | 0x3F800000, words))


def step(
    x: list[Operands], y: list[Operands], signs: Array, c: Array, grid: Grid, specials: bool
) -> Array:
    """The FP32 words of C after one step.

    Args:
        x, y: the operands of each product, in shapes that broadcast to C's; the significands of
            one of them are shifted left by `grid.up`.
        signs: those of the products, packed.
        c: FP32 words; without `specials` no NaN, and infinite only after an overflow.
        grid: how terms are held.
        specials: whether a term may be infinite or NaN, or the sign of a zero matters.
    """
    arithmetic = grid.arithmetic
    fused = arithmetic.addend == "fused"
    addend = _read(c, arithmetic)
    significand, exponent = encode.split(addend)
    top = jnp.full(c.shape, grid.floor, jnp.int32)
    for a, b in zip(x, y, strict=True):
        top = jnp.maximum(top, a.exponent + b.exponent)
    if fused:
        top = jnp.maximum(top, exponent)
    total = _sum_of_products(x, y, signs, top, grid)
    unit = top - grid.cut
    if fused:
        sign = _sign(addend, grid)
        count = significand.astype(grid.lane) << max(0, grid.cut - 23)
        places = top - exponent + max(0, 23 - grid.cut)
        if arithmetic.alignment == "floor":
            term = _aligned(_signed(count, sign), places, grid)
        else:
            term = _signed(_aligned(count, places, grid), sign)
        negative, magnitude = _add(total, term)
    elif arithmetic.addend == "joined":
        negative, magnitude, unit = _join(total, top, addend, grid)
    else:
        negative, magnitude = total < 0, _magnitude(total)
    kind = None
    if specials:
        kind = _kind_of_products(x, y, grid)
        kind = kind if arithmetic.addend == "late" else kind + _kind(addend)
    minus_zero = None if kind is None else floats.bits32(kind) == floats.SIGN
    word = encode.finish(negative, magnitude, unit, minus_zero, arithmetic)
    if kind is not None:
        infinity = floats.bits32(kind) & floats.SIGN | floats.INF
        word = jnp.where(jnp.isinf(kind), infinity, word)
        word = jnp.where(jnp.isnan(kind), jnp.uint32(arithmetic.nan), word)
    if arithmetic.addend == "late":
        return encode.add(addend, word, arithmetic)
    if not specials and arithmetic.overflow == "inf":
        return jnp.where((c & floats.MAGNITUDE) == floats.INF, c, word)
    return word


def _read(c: Array, arithmetic: Arithmetic) -> Array:
    if arithmetic.specials == "saturate" and arithmetic.product_overflow == "inf":
        c = floats.bits32(operands.saturate(floats.from_bits32(c)))  # of an earlier step's product
    if arithmetic.subnormal_inputs == "keep":
        return c
    sign = c & floats.SIGN if arithmetic.subnormal_inputs == "flush" else jnp.uint32(0)
    return jnp.where((c & floats.MAGNITUDE) < (1 << 23), sign, c)


def _sum_of_products(
    x: list[Operands], y: list[Operands], signs: Array, top: Array, grid: Grid
) -> Array:
    """Their sum as a count of 2^(top - cut): in a lane, or in int64 where a lane is too short."""
    sums = []
    for first in range(0, len(x), grid.group):
        total = jnp.zeros(top.shape, grid.lane)
        for a, b in zip(x[first : first + grid.group], y[first : first + grid.group], strict=True):
            places = top - (a.exponent + b.exponent) + grid.down
            kept = _aligned(a.significand * b.significand, places, grid)
            # The complement of a negative term is one less than the term.
            total += kept if grid.arithmetic.alignment == "floor" else kept ^ a.sign ^ b.sign
        sums.append(total)
    if len(sums) > 1:
        sums = [total.astype(jnp.int64) for total in sums]
    if grid.arithmetic.alignment != "floor":
        sums.append(lax.population_count(signs).astype(sums[0].dtype))
    return functools.reduce(jnp.add, sums)


def _aligned(count: Array, places: Array, grid: Grid) -> Array:
    """`count * 2^-places` cut to an integer. The count has its sign with `floor`, else none."""
    if grid.arithmetic.alignment == "nearest_even":
        return jnp.where(places > 0, encode.cut(count, places, "nearest_even"), count)
    return count >> encode.at_most(places, 8 * count.dtype.itemsize - 1).astype(count.dtype)


def _add(total: Array, term: Array) -> tuple[Array, Array]:
    """Sign and magnitude of the sum of the products and C; int32 may be one bit too short for it,
    uint32 is not.
    """
    term = term.astype(total.dtype)
    wrapped = total + term
    wraps = ((total ^ wrapped) & (term ^ wrapped)) < 0
    negative = (wrapped < 0) ^ wraps
    unsigned = jnp.uint32 if total.dtype == jnp.int32 else jnp.uint64
    return negative, jnp.where(negative, -wrapped, wrapped).astype(unsigned)


def _magnitude(total: Array) -> Array:
    return jnp.abs(total).astype(jnp.uint32 if total.dtype == jnp.int32 else jnp.uint64)


def _join(total: Array, top: Array, addend: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """The sum of the products and C, both floored to a common scale: sign, magnitude and unit."""
    arithmetic = grid.arithmetic
    sum_bits, addend_bits = arithmetic.sum_fraction_bits, arithmetic.addend_fraction_bits
    kept_bits = arithmetic.result_fraction_bits
    assert sum_bits is not None and addend_bits is not None and kept_bits is not None
    significand, exponent = encode.split(addend)
    exponent = jnp.maximum(exponent, -126)  # a zero C counts
    common = jnp.maximum(top, exponent)
    finest = max(sum_bits, addend_bits)
    both = jnp.zeros(total.shape, jnp.int64)
    signed = jnp.where(addend >= floats.SIGN, -significand, significand)
    for count, at, has, wants in (
        (total, top, grid.cut, sum_bits),
        (signed, exponent, 23, addend_bits),
    ):
        places = encode.at_most(common - at + max(0, has - wants), 63).astype(jnp.int64)
        floored = (count.astype(jnp.int64) << max(0, wants - has)) >> places
        both += floored << (finest - wants)
    width = 64 - lax.clz(_magnitude(both)).astype(jnp.int32)
    lowest = -126 - common + finest  # a subnormal sum is not normalised
    below = jnp.maximum(jnp.maximum(width - 1, lowest) - kept_bits, 0)
    kept = both >> below.astype(jnp.int64)  # toward minus infinity
    return kept < 0, _magnitude(kept), common - finest + below


def _kind_of_products(x: list[Operands], y: list[Operands], grid: Grid) -> Array:
    """A float that is infinite, NaN or -0 where the sum of the products is."""
    kinds = []
    for a, b in zip(x, y, strict=True):
        assert a.kind is not None and b.kind is not None  # decoded with specials
        kind = a.kind * b.kind
        if grid.arithmetic.product_overflow == "inf":
            exponent = a.exponent + b.exponent
            two = jnp.abs(a.significand * b.significand) >> (2 * grid.precision - 1 + grid.up) > 0
            overflows = (exponent > 127) | ((exponent == 127) & two)
            kind = jnp.where(overflows, kind * jnp.inf, kind)
        kinds.append(kind)
    return functools.reduce(jnp.add, kinds)
