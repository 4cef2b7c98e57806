"""A step of a few rows and columns on a CPU's vectors: the arithmetic of `kernels.native`.

Operands come as addresses of doubles: x as `[ROWS, products]` with rows a stride apart, y as
`[products, COLUMNS]`, with the products of a step filled up to whole quads. Only normal doubles are
computed with, since XLA's threads flush subnormal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline

ROWS = 8
PART = 4  # rows at once where one sum does not do
COLUMNS = 2 * LANES
QUAD = 4  # products of a round of a loop; steps are filled up to whole ones

EXPONENT = 0x7FF << 52  # of a double
NONE = 2.0**500  # what nothing is a multiple of
LEAST = 2.0**-126  # of FP32's normal numbers
_NORMAL, _INFINITY = 1 << 23, 255 << 23  # words of FP32: of 2^-126, and of an infinity
_TO_SUBNORMAL = 1.5 * 2.0 ** (52 - 149)  # a double beside which the last place is 2^-149


@njit(**COMPILED)
def constants(padded: int, limit: float) -> Any:
    """What the steps of so many products need; no sum is larger than `limit`."""
    power = 4
    while power < padded:
        power *= 2
    # A sum that starts at `scale` times a power of two above all terms stays within a factor of
    # two, whatever is added, and so does one of `scale_of_all` times their largest's.
    scale, scale_of_all = 6.0 * power, 12.0 * power
    return np.array([limit, scale, scale_of_all])


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


def _offsets(rows: int) -> list[int]:
    """Of the vectors of C[rows, COLUMNS]."""
    return list(range(0, rows * COLUMNS, LANES))


def _plain(
    emit: Emitter, x: Any, stride: Any, y: Any, before: Any, steps: Any, quads: Any
) -> list[Vector]:
    """The steps of a block: the vectors of x y + what was there before, in FP32."""
    rows, y, before = rows_of(emit, x, stride, ROWS), emit.at(y), emit.at(before)
    sums = [emit.variable(emit.load(emit.place(before, at))) for at in _offsets(ROWS)]
    with emit.loop(steps) as step:
        with emit.when(step):
            for total in sums:
                emit.put(total, _in_24_bits(emit, emit.get(total)))
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
    return [emit.get(total).floats() for total in sums]


def _in_24_bits(emit: Emitter, x: Vector) -> Vector:
    """A finite double rounded to the bits of FP32's normal numbers, in half the time of two
    conversions.

    `x - 2^29 x` has its last place where `x` in FP32 has (or half as large, right above a power of
    two, where that makes no difference), and `2^29 x` is a multiple of it. In a tie it is an even
    one, so the rounding is to an even number.
    """
    far = emit.number(2.0**29)
    return x.times_plus(far, x.times_plus(-far, x))


@inline(result=False)
def plain(emit: Emitter, c: Any, found: Any, *operands: Any) -> None:
    """The steps of a block: C[ROWS, COLUMNS] = x y + what was there before, and into `found`, of
    its sizes' words, the largest one, and the least one but 0 less 1.

    Args:
        operands: x, the stride of its rows, y, C before, steps, quads of a step. All sums of more
            than one step are finite.
    """
    totals, c = [total.doubles() for total in _plain(emit, *operands)], emit.at(c)
    for total, at in zip(totals, _offsets(ROWS), strict=True):
        emit.store(total, emit.place(c, at))
    _find(emit, [total.size() for total in totals], found)


@inline(result=False)
def plain_last(emit: Emitter, c: Any, *operands: Any) -> None:
    """As `plain`, into FP32 numbers C[ROWS, COLUMNS]."""
    singles = emit.floats(LANES)
    c = singles.at(c)
    for total, at in zip(_plain(emit, *operands), _offsets(ROWS), strict=True):
        singles.store(total, singles.place(c, at))


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


def _settled(
    emit: Emitter, least: Vector, most: Vector, limit: Vector, none_counts: bool
) -> tuple[Vector, Any]:
    """A sum that is `least` or, if they differ, between that and `most`, rounded to FP32, and bits
    for the lanes where the two do not tell. If neither is a number, nor is the sum if that
    `none_counts`.
    """
    builder, singles = emit.builder, emit.floats(LANES)
    first, second = least.floats(), most.floats()
    size = first.words() & singles.word(0x7FFFFFFF)
    above = size.plus_words(singles.word((1 << 32) - _NORMAL))
    usual = above.less_word(singles.word(_INFINITY - _NORMAL))
    known = first.words().same_words(second.words()) & usual
    unknown = emit.integer_variable(0)
    found = emit.variable(first.doubles())
    with emit.when((~known).bits()):
        # Where they differ, the sum is neither. An odd place between them and the sum, or on it,
        # is no tie: one further up or down, or the bound itself.
        one, differ = emit.word(1), ~least.equals(most)
        low = least.words().plus_words(least.words().signs()) | one
        high = most.words().plus_words(~most.words().signs()) | one
        low = differ.where(low.numbers(), least)
        high = differ.where(high.numbers(), most)
        low, high = _rounded(emit, low, limit), _rounded(emit, high, limit)
        infinite = least.equals(most) & least.size().equals(emit.number(math.inf))
        none = ~least.equals(least)
        emit.put(found, (infinite | none).where(least, low))
        told = low.equals(high) | infinite
        told = told | none if none_counts else told
        builder.store((~told).bits(), unknown)
    return emit.get(found), builder.load(unknown)


_ELEMENTS = [(i, j) for i in range(PART) for j in range(0, COLUMNS, LANES)]
_Sums = dict[tuple[int, int], Vector]


def _steps(
    emit: Emitter,
    c: Any,
    steps: Any,
    out: Any,
    done: Any,
    limit: Vector,
    none_counts: bool,
    bounds: Callable[[Any, _Sums], tuple[_Sums, _Sums]],
) -> Any:
    """Steps of C[PART, COLUMNS] as long as `bounds` of a step, given its
    number and C before it, tell all elements. `done` of them, 64 bits, are added to C; bits of
    the result say which elements of the next one are not told, and `out[PART, COLUMNS]` has that
    one or the last.
    """
    builder, c, out = emit.builder, emit.at(c), emit.at(out)
    done = builder.inttoptr(done, steps.type.as_pointer())
    builder.store(steps, done)
    unknown = emit.integer_variable(0)
    places = {(i, j): emit.place(c, i * COLUMNS + j) for i, j in _ELEMENTS}
    now = {at: emit.variable(emit.load(place)) for at, place in places.items()}
    last = {at: emit.variable(emit.get(value)) for at, value in now.items()}
    with emit.loop_with_end(steps) as (step, end):
        leasts, mosts = bounds(step, {at: emit.get(value) for at, value in now.items()})
        bits = emit.integer(0)
        for index, at in enumerate(_ELEMENTS):
            value, more = _settled(emit, leasts[at], mosts[at], limit, none_counts)
            emit.put(last[at], value)
            bits = builder.or_(bits, builder.shl(more, emit.integer(LANES * index)))
        with emit.when(bits):
            builder.store(bits, unknown)
            builder.store(step, done)
            end()
        for at in _ELEMENTS:
            emit.put(now[at], emit.get(last[at]))
    for (i, j), place in places.items():
        emit.store(emit.get(now[i, j]), place)
        emit.store(emit.get(last[i, j]), emit.place(out, i * COLUMNS + j))
    return builder.load(unknown)


def _factors(
    emit: Emitter, rows: list[Any], y: Any, step: Any, quads: Any
) -> Iterator[tuple[tuple[int, int], Vector, Vector]]:
    """Of a step's products, in a loop over its quads: the element, and both factors."""
    with emit.loop(quads) as quad:
        index = emit.times(emit.builder.add(emit.times(step, quads), quad), QUAD)
        ys = emit.place(y, emit.times(index, COLUMNS))
        for k in range(QUAD):
            for i, j in _ELEMENTS:
                left = emit.load_all_equal(emit.place(rows[i], index, k))
                yield (i, j), left, emit.load(emit.place(ys, k * COLUMNS + j))


@inline(result=True)
def directed(
    emit: Emitter,
    x: Any,  # [PART, steps products]
    stride: Any,
    y: Any,  # [steps products, COLUMNS]
    c: Any,
    steps: Any,
    out: Any,
    done: Any,
    quads: Any,
    constants: Any,
) -> Any:
    """Steps by sums that are rounded down and up; see `_steps`."""
    rows, y = rows_of(emit, x, stride, PART), emit.at(y)

    def bounds(step: Any, c: _Sums) -> tuple[_Sums, _Sums]:
        leasts = {at: emit.variable(value) for at, value in c.items()}
        mosts = {at: emit.variable(value) for at, value in c.items()}
        for at, left, right in _factors(emit, rows, y, step, quads):
            for up, sums in ((False, leasts), (True, mosts)):
                emit.put(sums[at], emit.bound(up, left, right, emit.get(sums[at])))
        return _values(emit, leasts), _values(emit, mosts)

    limit = emit.load_all_equal(emit.at(constants))
    return _steps(emit, c, steps, out, done, limit, True, bounds)


def _values(emit: Emitter, variables: dict[tuple[int, int], Any]) -> _Sums:
    return {at: emit.get(variable) for at, variable in variables.items()}


@inline(result=True)
def two_parts(
    emit: Emitter,
    x: Any,  # [PART, steps products]
    stride: Any,
    y: Any,  # [steps products, COLUMNS]
    x_top: Any,  # [steps, ROWS]
    y_top: Any,  # [steps, COLUMNS]
    c: Any,
    steps: Any,
    out: Any,
    done: Any,
    quads: Any,
    constants: Any,
) -> Any:
    """Steps whose first sum takes of every term what is a multiple of a power of two that it holds
    exactly, and whose rests' sums are rounded down and up; see `_steps`. What is no number is not
    told.
    """
    rows, y, constants = rows_of(emit, x, stride, PART), emit.at(y), emit.at(constants)
    x_top, y_top = emit.at(x_top), emit.at(y_top)
    limit, scale = (emit.load_all_equal(emit.place(constants, i)) for i in range(2))

    def bounds(step: Any, c: _Sums) -> tuple[_Sums, _Sums]:
        lefts = emit.place(x_top, emit.times(step, ROWS))
        rights = emit.place(y_top, emit.times(step, COLUMNS))
        starts = {}
        for i, j in _ELEMENTS:
            top = emit.load_all_equal(emit.place(lefts, i)) * emit.load(emit.place(rights, j))
            starts[i, j] = top.larger(_power(emit, c[i, j])) * scale
        highs, leasts, mosts = {}, {}, {}
        for at, value in c.items():
            high = starts[at] + value
            rest = value - (high - starts[at])
            highs[at] = emit.variable(high)
            leasts[at], mosts[at] = emit.variable(rest), emit.variable(rest)
        for at, left, right in _factors(emit, rows, y, step, quads):
            before = emit.get(highs[at])
            after = left.times_plus(right, before)
            rest = left.times_plus(right, -(after - before))
            emit.put(highs[at], after)
            for up, sums in ((False, leasts), (True, mosts)):
                emit.put(sums[at], emit.bound(up, rest, emit.get(sums[at])))
        found = {at: emit.get(high) - starts[at] for at, high in highs.items()}

        def with_rests(up: bool, sums: dict[tuple[int, int], Any]) -> _Sums:
            return {at: emit.bound(up, found[at], emit.get(rest)) for at, rest in sums.items()}

        return with_rests(False, leasts), with_rests(True, mosts)

    return _steps(emit, c, steps, out, done, limit, False, bounds)


@inline(result=False)
def merge(emit: Emitter, out: Any, other: Any, bits: Any) -> None:
    """`out[PART, COLUMNS]` becomes `other` where bits are set."""
    out, other = emit.at(out), emit.at(other)
    for index, (i, j) in enumerate(_ELEMENTS):
        place = emit.place(out, i * COLUMNS + j)
        here = emit.answer(emit.builder.lshr(bits, emit.integer(LANES * index)))
        value = here.where(emit.load(emit.place(other, i * COLUMNS + j)), emit.load(place))
        emit.store(value, place)


@inline(result=False)
def write(emit: Emitter, out: Any, c: Any) -> None:
    """`out[PART, COLUMNS]` into C."""
    out, c = emit.at(out), emit.at(c)
    for at in _offsets(PART):
        emit.store(emit.load(emit.place(out, at)), emit.place(c, at))


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
    scale = emit.load_all_equal(emit.place(emit.at(constants), 2))
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
    limit = emit.load_all_equal(emit.at(constants))
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
