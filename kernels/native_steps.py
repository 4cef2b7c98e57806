"""A step of a few rows and columns on a CPU's vectors: the arithmetic of `kernels.native`.

Operands come as addresses of doubles: x as `[ROWS, products]` with rows a stride apart, y as
`[products, COLUMNS]`, with the products of a step filled up to whole quads. Only normal doubles are
computed with, since XLA's threads flush subnormal numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from kernels.vectors import COMPILED, LANES, ROWS, Emitter, Vector, inline

PART = ROWS // 2  # rows at once where one sum does not do
COLUMNS = 2 * LANES
BAND = ROWS if ROWS * COLUMNS <= 64 else PART  # rows of a step whose elements have a bit each
QUAD = 4  # products of a round of a loop; steps are filled up to whole ones

EXPONENT = 0x7FF << 52  # of a double
NONE = 2.0**500  # what nothing is a multiple of
LEAST = 2.0**-126  # of FP32's normal numbers
LARGEST = float(np.finfo(np.float32).max)
_NORMAL, _INFINITY = 1 << 23, 255 << 23  # words of FP32: of 2^-126, and of an infinity
TO_SUBNORMAL = 1.5 * 2.0 ** (52 - 149)  # a double beside which the last place is 2^-149


@njit(**COMPILED)
def constants(padded: int, limit: float) -> Any:
    """What the steps of so many products need; no sum is larger than `limit`.

    With C there are `padded + 1` terms, at most 2^bits of them. If 2^e is the largest power of two
    in a product of powers or in C, all terms are below 2^(e + 2) and no sum reaches half of
    2^(e + 3 + bits), of which sigma is 1.5 times (`native_extraction`). So a last place of the sums
    from sigma on is 2^-52 of that power, what they leave of a term is at most half of it, and the
    sum of the rests is below 2^(bits - 53) of it. Its error is below 2^-53 times 2^(1.5 bits) times
    the root of the sum of their squares.
    """
    bits = 2
    while 1 << bits < padded + 1:
        bits += 1
    # Eight times the error, as what is added to half of the word of the squares' sum.
    error = np.int64((1023 << 51) + (((3 * bits + 1) // 2 - 49) << 52))
    return np.array(
        [
            limit,
            12.0 * 2.0**bits,  # 1: of 2^e: sigma
            error.view(np.float64),  # 2
            2.0 ** (bits + 3),  # 3: of what all terms are multiples of: below it no rest rounds
            (padded + 4) * 2.0**-53,  # 4: of the sizes of all terms: the error of their sum
        ]
    )


def power_below(emit: Emitter, x: Vector) -> Vector:
    """The largest power of two that is not above the size of `x`; 0 of 0."""
    return (x.words() & emit.word(EXPONENT)).numbers()


def limited(emit: Emitter, found: Vector, limit: Vector) -> Vector:
    """What is found, or the limit with its sign if that is beyond FP32's numbers."""
    sign = found.words() & emit.word(1 << 63)
    within = found.size() < emit.number(2.0**128)
    return within.where(found, (limit.words() | sign).numbers())


def to_odd(emit: Emitter, total: Vector, rest: Vector) -> Vector:
    """`total + rest`, where `rest` is at most half a last place, rounded to odd: any shorter
    rounding of it is that of the sum. `total` as it is if `rest` is no number.
    """
    zero = emit.number(0.0)
    one, sign = emit.word(1), emit.word(1 << 63)
    even = (total.words() & one).same_words(emit.word(0))
    same = (total.words() & sign).same_words(rest.words() & sign)
    moved = total.words().plus_words(same.where(one, emit.word((1 << 64) - 1))).numbers()
    return (even & (zero < rest.size())).where(moved, total)


def rows_of(emit: Emitter, x: Any, stride: Any, count: int) -> list[Any]:
    return [emit.place(emit.at(x), emit.times(stride, i)) for i in range(count)]


def _offsets(rows: int) -> list[int]:
    """Of the vectors of C[rows, COLUMNS]."""
    return list(range(0, rows * COLUMNS, LANES))


_Rounded = Callable[[Emitter, Vector], Vector]


def _plain(
    emit: Emitter,
    rounded: _Rounded,
    x: Any,
    stride: Any,
    y: Any,
    before: Any,
    steps: Any,
    quads: Any,
) -> list[Vector]:
    """The steps of a block: the vectors of x y + what was there before, each step but the last one
    rounded.
    """
    rows, y, before = rows_of(emit, x, stride, ROWS), emit.at(y), emit.at(before)
    sums = [emit.variable(emit.load(emit.place(before, at))) for at in _offsets(ROWS)]
    with emit.loop(steps) as step:
        with emit.when(step):
            for total in sums:
                emit.put(total, rounded(emit, emit.get(total)))
        with emit.loop(quads) as quad:
            index = emit.times(emit.builder.add(emit.times(step, quads), quad), QUAD)
            ys = emit.place(y, emit.times(index, COLUMNS))
            for k in range(QUAD):
                right = [emit.load(emit.place(ys, k * COLUMNS + j)) for j in _offsets(1)]
                for i in range(ROWS):
                    left = emit.load_all_equal(emit.place(rows[i], index, k))
                    for j, factor in enumerate(right):
                        total = sums[i * len(right) + j]
                        emit.put(total, left.times_plus(factor, emit.get(total)))
    return [emit.get(total) for total in sums]


def in_24_bits(emit: Emitter, x: Vector) -> Vector:
    """A finite double rounded to the bits of FP32's normal numbers, in half the time of two
    conversions.

    `x - 2^29 x` has its last place where `x` in FP32 has (or half as large, right above a power of
    two, where that makes no difference), and `2^29 x` is a multiple of it. In a tie it is an even
    one, so the rounding is to an even number.
    """
    far = emit.number(2.0**29)
    return x.times_plus(far, x.times_plus(-far, x))


def in_float32(emit: Emitter, x: Vector, is_small: Vector | None = None) -> Vector:
    """As `in_24_bits`, of a number that may be below FP32's normal ones: what is subtracted and
    added again is then `1.5 2^-97`, beside which the last place is 2^-149. A zero is +0. The answer
    `is_small` may be that of a number nearby; what is so far from it that this is not right differs
    from it in FP32 in any case.
    """
    far, small = emit.number(2.0**29), emit.number(1.5 * LEAST)
    if is_small is None:
        is_small = x.size() < small
    beside = is_small.where(small, x)
    return beside.times_plus(far, beside.times_plus(-far, x))


def beside_which_float32(emit: Emitter, x: Vector) -> Vector:
    """A double beside which the last place is that of FP32 where `x` is: a sum with it rounds."""
    scale = emit.number(TO_SUBNORMAL / LEAST)
    return (power_below(emit, x) * scale).larger(emit.number(TO_SUBNORMAL))


@inline(result=False)
def plain(emit: Emitter, c: Any, found: Any, *operands: Any) -> None:
    """The steps of a block: C[ROWS, COLUMNS] = x y + what was there before, and into `found`, of
    its sizes' words, the largest one, and the least one but 0 less 1.

    Args:
        operands: x, the stride of its rows, y, C before, steps, quads of a step. All sums of more
            than one step are finite, and none but 0 is below FP32's normal numbers.
    """
    totals = [total.to_float32() for total in _plain(emit, in_24_bits, *operands)]
    _store_and_find(emit, totals, c, found)


@inline(result=False)
def plain_of_any(emit: Emitter, c: Any, found: Any, *operands: Any) -> None:
    """As `plain`, where all sums are finite, but may be below FP32's normal numbers."""
    totals = [in_float32(emit, total) for total in _plain(emit, in_float32, *operands)]
    _store_and_find(emit, totals, c, found)


def _store_and_find(emit: Emitter, totals: list[Vector], c: Any, found: Any) -> None:
    c = emit.at(c)
    for total, at in zip(totals, _offsets(ROWS), strict=True):
        emit.store(total, emit.place(c, at))
    _find(emit, [total.size() for total in totals], found)


@inline(result=True)
def plain_last(emit: Emitter, c: Any, *operands: Any) -> Any:
    """As `plain`, into FP32 numbers C[ROWS, COLUMNS]; if any is none, C stays as it was, and the
    result is not 0.
    """
    singles = emit.floats(LANES)
    totals = [total.floats() for total in _plain(emit, in_24_bits, *operands)]
    c, pairs = singles.at(c), zip(totals[::2], totals[1::2], strict=True)
    none = functools.reduce(Vector.__or__, [x.no_number(y) for x, y in pairs]).bits()
    with emit.unless(none):
        for total, at in zip(totals, _offsets(ROWS), strict=True):
            singles.store(total, singles.place(c, at))
    return none


def _find(emit: Emitter, sizes: list[Vector], found: Any) -> None:
    """Two words at `found`, as `plain` has it."""
    minus_one = emit.word((1 << 64) - 1)
    largest, least = emit.word(0), minus_one
    for size in sizes:
        largest = size.words().larger_word(largest)
        least = size.words().plus_words(minus_one).smaller_word(least)
    place = emit.builder.inttoptr(found, ir.IntType(64).as_pointer())
    emit.builder.store(largest.largest_word(), place)
    emit.builder.store(least.least_word(), emit.place(place, 1))


HALVES = range(0, COLUMNS, LANES)


@inline(result=False)
def write(emit: Emitter, out: Any, c: Any) -> None:
    """`out[BAND, COLUMNS]` into C."""
    out, c = emit.at(out), emit.at(c)
    for at in _offsets(BAND):
        emit.store(emit.load(emit.place(out, at)), emit.place(c, at))


@inline(result=True)
def sizes(emit: Emitter, c: Any, found: Any) -> Any:
    """Of C[ROWS, COLUMNS]: `found` as for `plain`, of finite elements; how many elements are no
    number, and 2^32 times how many are infinite.
    """
    builder = emit.builder
    zero, infinity = emit.number(0.0), emit.number(math.inf)
    counts, finite = emit.integer(0), []

    def count(answer: Vector, weight: int) -> Any:
        return builder.mul(builder.ctpop(answer.bits()), emit.integer(weight))

    c = emit.at(c)
    for at in _offsets(ROWS):
        size = emit.load(emit.place(c, at)).size()
        finite.append((size < infinity).where(size, zero))
        counts = builder.add(counts, count(~size.equals(size), 1))
        counts = builder.add(counts, count(size.equals(infinity), 1 << 32))
    _find(emit, finite, found)
    return counts


@inline(result=True)
def to_words(emit: Emitter, row: Any, out: Any, count: Any, zero: Any) -> Any:
    """So many times two vectors of doubles, plus `zero` (its word), as FP32; not 0 if there are
    subnormal numbers or NaNs, for which the result is not right.
    """
    singles = emit.floats()
    row, out = emit.at(row), singles.at(out)
    offset = emit.all_equal(emit.builder.bitcast(zero, emit.element))
    nothing, least = emit.number(0.0), emit.number(LEAST)
    unusual = emit.integer_variable(0)
    with emit.loop(count) as index:
        place = emit.place(row, emit.times(index, 2 * LANES))
        halves = [emit.load(emit.place(place, j)) + offset for j in (0, LANES)]
        for half in halves:
            size = half.size()
            usual = (size >= least) | size.equals(nothing)
            found = emit.builder.or_(emit.builder.load(unusual), (~usual).bits())
            emit.builder.store(found, unusual)
        both = halves[0].to_floats(halves[1])
        singles.store(both, singles.place(out, emit.times(index, 2 * LANES)))
    return emit.builder.load(unusual)


@inline(result=False)
def write_row(emit: Emitter, row: Any, apart: Any, count: Any, out: Any) -> None:
    """So many times FP32 numbers [COLUMNS], so many rows apart, the next in memory."""
    singles = emit.floats()
    row, out = singles.at(row), singles.at(out)
    with emit.loop(count) as index:
        place = singles.place(row, emit.times(emit.builder.mul(index, apart), COLUMNS))
        singles.store(singles.load(place), singles.place(out, emit.times(index, COLUMNS)))
