"""A step of a few rows and columns on a CPU's vectors: the arithmetic of `kernels.native`.

Operands come as addresses of doubles: x as `[ROWS, products]` with rows a stride apart, y as
`[products, COLUMNS]`, with the products of a step filled up to whole quads, C with rows a width
apart. Only normal doubles are computed with, since XLA's threads flush subnormal numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline

ROWS = 8
PART = 4  # rows at once where one sum does not do
COLUMNS = 2 * LANES
QUAD = 4  # products with a common bound

EXPONENT = 0x7FF << 52  # of a double
NONE = 2.0**500  # what nothing is a multiple of
LEAST = 2.0**-126  # of FP32's normal numbers
_LARGE = 2.0**127
_DROPPED = (1 << 29) - 1  # the bits of a double's fraction that FP32 has not
_HALF = 1 << 28
_TO_SUBNORMAL = 1.5 * 2.0 ** (52 - 149)  # a double beside which the last place is 2^-149
_DOUBT = 2.0**-90  # of a start: more than the rests' sum is wrong by


@njit(**COMPILED)
def constants(padded: int, limit: float) -> Any:
    """What the steps of so many products need; no sum is larger than `limit`."""
    power = 4
    while power < padded:
        power *= 2
    # In two parts, a sum that starts at `scale` times a power of two above all terms stays within
    # a factor of two, whatever is added, and so does one of `scale_of_all` times their largest's.
    scale, scale_of_all = 6.0 * power, 12.0 * power
    # The rests' sum is wrong by less than 2^-105 power^2 of the start: that decides no rounding
    # of a sum of `least` of it, unless it is half way between two numbers of FP32.
    least = power**2 * 2.0**-49
    # It is exact if all terms are multiples of `held` of the start.
    held = power * 2.0**-103
    return np.array([scale, least, held, limit, scale_of_all])


def _power(emit: Emitter, x: Vector) -> Vector:
    """The largest power of two that is not above the size of `x`; 0 of 0."""
    return (x.words() & emit.word(EXPONENT)).numbers()


def _rounded(emit: Emitter, total: Vector, limit: Vector) -> Vector:
    """To FP32, subnormal numbers too, but not beyond `limit`; of a double that is exact or rounded
    to odd. A zero is +0.
    """
    grid = emit.number(_TO_SUBNORMAL)
    small = total.size() < emit.number(LEAST)
    found = small.where((total + grid) - grid, total.to_float32())
    found = (limit < found).where(limit, found)
    return (found < -limit).where(-limit, found)


def sum_and_rest(x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Knuth's sum of two numbers and what its rounding dropped."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


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


@inline(result=True)
def plain(
    emit: Emitter,
    x: Any,
    stride: Any,
    y: Any,
    before: Any,
    before_width: Any,
    c: Any,
    width: Any,
    steps: Any,
    quads: Any,
) -> Any:
    """The steps of a block: C[ROWS, COLUMNS] = x y + what was there before. The result is the
    largest word of a size in C, which tells whether all are finite.
    """
    rows, y = rows_of(emit, x, stride, ROWS), emit.at(y)

    def places(c: Any, width: Any) -> list[list[Any]]:
        offsets = range(0, COLUMNS, LANES)
        return [
            [emit.place(emit.at(c), emit.times(width, i), j) for j in offsets] for i in range(ROWS)
        ]

    old = places(before, before_width)
    sums = [[emit.variable(emit.load(place)) for place in row] for row in old]
    with emit.loop(steps) as step:
        with emit.loop(quads) as quad:
            index = emit.times(emit.builder.add(emit.times(step, quads), quad), QUAD)
            ys = emit.place(y, emit.times(index, COLUMNS))
            for k in range(QUAD):
                right = [
                    emit.load(emit.place(ys, k * COLUMNS + j)) for j in range(0, COLUMNS, LANES)
                ]
                for i, row in enumerate(sums):
                    left = emit.load_all_equal(emit.place(rows[i], index, k))
                    for total, factor in zip(row, right, strict=True):
                        emit.put(total, left.times_plus(factor, emit.get(total)))
        for row in sums:
            for total in row:
                emit.put(total, emit.get(total).to_float32())
    size, largest = emit.word((1 << 63) - 1), emit.word(0)
    for row, row_places in zip(sums, places(c, width), strict=True):
        for total, place in zip(row, row_places, strict=True):
            emit.store(emit.get(total), place)
            largest = (emit.get(total).words() & size).larger_word(largest)
    return largest.largest_word()


@inline(result=True)
def two_parts(
    emit: Emitter,
    x: Any,  # [PART, products]
    stride: Any,
    y: Any,  # [products, COLUMNS]
    x_top: Any,  # [quads, ROWS]
    y_top: Any,  # [quads, COLUMNS]
    x_last: Any,  # [ROWS]
    y_last: Any,  # [COLUMNS]
    c: Any,  # [PART, COLUMNS], rows `width` apart
    width: Any,
    out: Any,  # [PART, COLUMNS]
    quads: Any,
    constants: Any,
) -> Any:
    """One step of `PART` rows; of the result, bits for the elements that it does not know."""
    builder = emit.builder
    y, c, out, constants = (emit.at(v) for v in (y, c, out, constants))
    rows = rows_of(emit, x, stride, PART)
    x_top, y_top, x_last, y_last = (emit.at(v) for v in (x_top, y_top, x_last, y_last))
    scale, least, held, limit = (emit.load_all_equal(emit.place(constants, i)) for i in range(4))
    zero = emit.number(0.0)
    elements = [(i, j) for i in range(PART) for j in range(0, COLUMNS, LANES)]
    tops = {at: emit.variable(zero) for at in elements}
    with emit.loop(quads) as quad:
        lefts = emit.place(x_top, emit.times(quad, ROWS))
        rights = emit.place(y_top, emit.times(quad, COLUMNS))
        for i, j in elements:
            bound = emit.load_all_equal(emit.place(lefts, i)) * emit.load(emit.place(rights, j))
            emit.put(tops[i, j], emit.get(tops[i, j]).larger(bound))
    highs, lows, starts = {}, {}, {}
    for i, j in elements:
        before = emit.load(emit.place(c, emit.times(width, i), j))
        start = emit.get(tops[i, j]).larger(_power(emit, before)) * scale
        high = start + before
        starts[i, j] = emit.variable(start)
        highs[i, j] = emit.variable(high)
        lows[i, j] = emit.variable(before - (high - start))
    with emit.loop(quads) as quad:
        ys = emit.place(y, emit.times(quad, QUAD * COLUMNS))
        for k in range(QUAD):
            for i, j in elements:
                left = emit.load_all_equal(emit.place(rows[i], emit.times(quad, QUAD), k))
                right = emit.load(emit.place(ys, k * COLUMNS + j))
                before = emit.get(highs[i, j])
                after = left.times_plus(right, before)
                rest = left.times_plus(right, -(after - before))
                emit.put(highs[i, j], after)
                emit.put(lows[i, j], emit.get(lows[i, j]) + rest)
    unknown = emit.integer_variable(0)
    for index, (i, j) in enumerate(elements):
        start = emit.get(starts[i, j])
        total, rest = sum_and_rest(emit.get(highs[i, j]) - start, emit.get(lows[i, j]))
        size = total.size()
        middle = (total.words() & emit.word(_DROPPED)).same_words(emit.word(_HALF))
        far = size >= start * least
        usual = far & ~middle & (size >= emit.number(LEAST))
        known = usual & (size < emit.number(_LARGE))
        where = emit.place(out, i * COLUMNS + j)
        emit.store(total.to_float32(), where)
        with emit.when((~known).bits()):
            before = emit.load(emit.place(c, emit.times(width, i), j))
            power = _power(emit, before)
            of_c = power.equals(zero).where(emit.number(NONE), power * emit.number(2.0**-23))
            of_x, of_y = (
                emit.load_all_equal(emit.place(x_last, i)),
                emit.load(emit.place(y_last, j)),
            )
            exact = (of_x * of_y >= start * held) & (of_c >= start * held)
            decided = rest.size() >= start * emit.number(_DOUBT)  # hence `far`
            surely = (usual | exact | decided) & total.equals(total)
            result = _rounded(emit, to_odd(emit, total, rest), limit)
            emit.store(known.where(total.to_float32(), result), where)
            bits = builder.shl((~(known | surely)).bits(), emit.integer(LANES * index))
            builder.store(builder.or_(builder.load(unknown), bits), unknown)
    return builder.load(unknown)


@inline(result=True)
def special(
    emit: Emitter,
    x: Any,
    stride: Any,
    y: Any,
    c: Any,
    width: Any,
    out: Any,
    quads: Any,
    unknown: Any,
) -> Any:
    """Elements of a step that are infinite or no number, by ordinary sums; of the `unknown` ones,
    bits for the others.
    """
    builder, rows = emit.builder, rows_of(emit, x, stride, PART)
    y, c, out = (emit.at(v) for v in (y, c, out))
    elements = [(i, j) for i in range(PART) for j in range(0, COLUMNS, LANES)]
    sums = {
        (i, j): emit.variable(emit.load(emit.place(c, emit.times(width, i), j)))
        for i, j in elements
    }
    with emit.loop(quads) as quad:
        ys = emit.place(y, emit.times(quad, QUAD * COLUMNS))
        for k in range(QUAD):
            for i, j in elements:
                left = emit.load_all_equal(emit.place(rows[i], emit.times(quad, QUAD), k))
                right = emit.load(emit.place(ys, k * COLUMNS + j))
                emit.put(sums[i, j], left.times_plus(right, emit.get(sums[i, j])))
    found = emit.integer(0)
    for index, (i, j) in enumerate(elements):
        total = emit.get(sums[i, j])
        ordinary = total.size() < emit.number(math.inf)
        where = emit.place(out, i * COLUMNS + j)
        emit.store(ordinary.where(emit.load(where), total), where)
        found = builder.or_(found, builder.shl(ordinary.bits(), emit.integer(LANES * index)))
    return builder.and_(found, unknown)


# Elements in doubt: terms `[products + 1, COLUMNS]` of a row, the last ones C.

_HALVES = range(0, COLUMNS, LANES)


@inline(result=False)
def terms(emit: Emitter, x: Any, y: Any, c: Any, terms: Any, products: Any) -> None:
    """Of one row; 0 for what is no finite number."""
    x, y, c, terms = (emit.at(v) for v in (x, y, c, terms))

    def store(term: Vector, place: Any) -> None:
        finite = term.size() < emit.number(math.inf)
        emit.store(finite.where(term, emit.number(0.0)), place)

    with emit.loop(products) as k:
        left = emit.load_all_equal(emit.place(x, k))
        for j in _HALVES:
            right = emit.load(emit.place(y, emit.times(k, COLUMNS), j))
            store(left * right, emit.place(terms, emit.times(k, COLUMNS), j))
    for j in _HALVES:
        store(emit.load(emit.place(c, j)), emit.place(terms, emit.times(products, COLUMNS), j))


@inline(result=True)
def part(emit: Emitter, terms: Any, count: Any, part: Any, constants: Any) -> Any:
    """`part[COLUMNS]`: the exact sum of what the terms have above a place that it can hold; it is
    taken from them. The result is not 0 if there was anything.
    """
    terms, part = emit.at(terms), emit.at(part)
    scale = emit.load_all_equal(emit.place(emit.at(constants), 4))
    zero = emit.number(0.0)
    tops = {j: emit.variable(zero) for j in _HALVES}
    with emit.loop(count) as k:
        for j, top in tops.items():
            size = emit.load(emit.place(terms, emit.times(k, COLUMNS), j)).size()
            emit.put(top, emit.get(top).larger(size))
    powers = {j: _power(emit, emit.get(top)) for j, top in tops.items()}
    starts = {j: power * scale for j, power in powers.items()}
    sums = {j: emit.variable(start) for j, start in starts.items()}
    with emit.loop(count) as k:
        for j, total in sums.items():
            place = emit.place(terms, emit.times(k, COLUMNS), j)
            term, before = emit.load(place), emit.get(total)
            after = before + term
            emit.put(total, after)
            emit.store(term - (after - before), place)
    found = emit.integer(0)
    for j, power in powers.items():
        emit.store(emit.get(sums[j]) - starts[j], emit.place(part, j))
        found = emit.builder.or_(found, (zero < power).bits())
    return found


@inline(result=False)
def sum_of_parts(
    emit: Emitter, parts: Any, count: Any, out: Any, unknown: Any, constants: Any
) -> None:
    """`out[COLUMNS]`, where unknown: the sum of the parts, the largest first, rounded once."""
    builder = emit.builder
    parts, out = emit.at(parts), emit.at(out)
    limit = emit.load_all_equal(emit.place(emit.at(constants), 3))
    last = builder.sub(count, emit.integer(1))
    rests = {j: emit.variable(emit.number(0.0)) for j in _HALVES}
    with emit.loop(last), emit.loop(last) as k:  # each pass brings what cancels one place up
        index = builder.sub(builder.sub(last, k), emit.integer(1))
        for j in _HALVES:
            upper = emit.place(parts, emit.times(index, COLUMNS), j)
            lower = emit.place(upper, COLUMNS)
            total, dropped = sum_and_rest(emit.load(upper), emit.load(lower))
            emit.store(total, upper)
            emit.store(dropped, lower)
    with emit.loop(last) as k:
        for j, rest in rests.items():
            place = emit.place(parts, emit.times(builder.sub(last, k), COLUMNS), j)
            emit.put(rest, emit.load(place) + emit.get(rest))
    for j, rest in rests.items():
        total = emit.load(emit.place(parts, j))
        result = _rounded(emit, to_odd(emit, total, emit.get(rest)), limit)
        here = emit.answer(builder.lshr(unknown, emit.integer(j)))
        emit.store(here.where(result, emit.load(emit.place(out, j))), emit.place(out, j))


@inline(result=True)
def sizes(emit: Emitter, c: Any, width: Any, largest: Any) -> Any:
    """Of C[ROWS, COLUMNS], the largest finite size of each lane; how many elements are no
    number, and 2^32 times how many are infinite.
    """
    builder = emit.builder
    c, largest = emit.at(c), emit.at(largest)
    top, infinity = emit.number(0.0), emit.number(math.inf)
    found = emit.integer(0)

    def count(answer: Vector, weight: int) -> Any:
        return builder.mul(builder.ctpop(answer.bits()), emit.integer(weight))

    for i in range(ROWS):
        for j in range(0, COLUMNS, LANES):
            size = emit.load(emit.place(c, emit.times(width, i), j)).size()
            top = (size < infinity).where(top.larger(size), top)
            found = builder.add(found, count(~size.equals(size), 1))
            found = builder.add(found, count(size.equals(infinity), 1 << 32))
    emit.store(top, largest)
    return found


@inline(result=True)
def set_bits(emit: Emitter, bits: Any) -> Any:
    return emit.builder.ctpop(bits)


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
