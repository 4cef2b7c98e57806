"""A step of a few rows and columns on a CPU's vectors: the arithmetic of `kernels.native`.

Operands come as addresses of doubles: x as `[ROWS, products]` with rows a stride apart, y as
`[products, COLUMNS]`, with the products of a step filled up to whole quads. Only normal doubles are
computed with, since XLA's threads flush subnormal numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from kernels.vectors import COMPILED, LANES, ROUNDS_BY_MODE, ROWS, Emitter, Vector, inline

PART = ROWS // 2  # rows at once where one sum does not do
COLUMNS = 2 * LANES
QUAD = 4  # products of a round of a loop; steps are filled up to whole ones

EXPONENT = 0x7FF << 52  # of a double
NONE = 2.0**500  # what nothing is a multiple of
LEAST = 2.0**-126  # of FP32's normal numbers
_NORMAL, _INFINITY = 1 << 23, 255 << 23  # words of FP32: of 2^-126, and of an infinity
FEW = 3  # elements of a step that are told one vector after the other
_TO_SUBNORMAL = 1.5 * 2.0 ** (52 - 149)  # a double beside which the last place is 2^-149


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
        ]
    )


def _power(emit: Emitter, x: Vector) -> Vector:
    """The largest power of two that is not above the size of `x`; 0 of 0."""
    return (x.words() & emit.word(EXPONENT)).numbers()


def _rounded(emit: Emitter, total: Vector, limit: Vector) -> Vector:
    """To FP32, subnormal numbers too, but not beyond `limit`; of a double that is exact or rounded
    to odd. A zero is +0.
    """
    small = total.size() < emit.number(LEAST)
    found = small.where(to_subnormal(emit, total), total.to_float32())
    found = (limit < found).where(limit, found)
    return (found < -limit).where(-limit, found)


def to_subnormal(emit: Emitter, x: Vector) -> Vector:
    """A double below FP32's normal numbers, to FP32. A zero is +0."""
    grid = emit.number(_TO_SUBNORMAL)
    return (x + grid) - grid


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


def in_float32(emit: Emitter, x: Vector) -> Vector:
    """As `in_24_bits`, of a number that may be below FP32's normal ones: what is subtracted and
    added again is then `1.5 2^-97`, beside which the last place is 2^-149. A zero is +0.
    """
    far, small = emit.number(2.0**29), emit.number(1.5 * LEAST)
    beside = (x.size() < small).where(small, x)
    return beside.times_plus(far, beside.times_plus(-far, x))


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
ELEMENTS = [(i, j) for i in range(PART) for j in HALVES]
Sums = dict[tuple[int, int], Vector]
Variables = dict[tuple[int, int], ir.Value]


def _as_subnormal(emit: Emitter, leasts: Sums, mosts: Sums, unsure: Sums, found: Variables) -> Any:
    """As `_told_of_odd`, of sums for which `_as_normal` gave these answers and found these, if they
    are the same below FP32's normal numbers.
    """
    still = {}
    for at, least in leasts.items():
        low, high = (to_subnormal(emit, bound) for bound in (least, mosts[at]))
        told = (least.size() < emit.number(LEAST)) & low.equals(high)
        emit.put(found[at], told.where(low, emit.get(found[at])))
        still[at] = unsure[at] & ~told
    return _bits_of(emit, still)


def _told_of_odd(emit: Emitter, leasts: Sums, mosts: Sums, limit: Vector) -> tuple[Variables, Any]:
    """Sums that are the least or, if they differ, between that and the most, rounded to FP32; and
    bits for the elements where the two do not tell. If neither is a number, nor is the sum.

    Where the least and the most differ, the sum is neither. An odd place between them and the sum,
    or on it, is no tie: one further up or down, or the bound itself.
    """
    lows, highs = {}, {}
    for at, least in leasts.items():
        one, most = emit.word(1), mosts[at]
        differ = ~least.equals(most)
        low = least.words().plus_words(least.words().signs()) | one
        high = most.words().plus_words(~most.words().signs()) | one
        lows[at] = differ.where(low.numbers(), least)
        highs[at] = differ.where(high.numbers(), most)
    found, unsure = _as_normal(emit, lows, highs, limit)
    unknown = emit.integer_variable(0)
    emit.builder.store(emit.integer(0), unknown)
    with emit.when(_any_of(unsure)):
        for at, least in leasts.items():
            low, high = (_rounded(emit, bound, limit) for bound in (lows[at], highs[at]))
            none, infinite = ~least.equals(least), _is_infinite(emit, least, mosts[at])
            emit.put(found[at], (infinite | none).where(least, low))
            told = low.equals(high) | infinite
            unsure[at] = ~(told | none)
        emit.builder.store(_bits_of(emit, unsure), unknown)
    return found, emit.builder.load(unknown)


def _as_normal(emit: Emitter, leasts: Sums, mosts: Sums, limit: Vector) -> tuple[Variables, Sums]:
    """As `_told_of_odd`, of sums that are the same normal numbers of FP32 as least and as most;
    answers where they are not.

    All elements of a step are looked at together: one branch is foreseen where many would not be.
    """
    singles, magnitude = emit.floats(LANES), emit.floats(LANES).word(0x7FFFFFFF)
    last = limit.floats().words()
    last = last.same_words(singles.word(_INFINITY)).where(magnitude, last)
    minus_normal = singles.word((1 << 32) - _NORMAL)
    reach = last.plus_words(minus_normal).plus_words(singles.word(1))
    found, unsure = {}, {}
    for at, least in leasts.items():
        first = least.floats()
        above = (first.words() & magnitude).plus_words(minus_normal)
        same = first.words().same_words(mosts[at].floats().words())
        found[at] = emit.variable(first.doubles())
        unsure[at] = ~(same & above.less_word(reach))
    return found, unsure


def _any_of(answers: Sums) -> Any:
    return functools.reduce(Vector.__or__, answers.values()).bits()


def _is_infinite(emit: Emitter, least: Vector, most: Vector) -> Vector:
    return least.equals(most) & least.size().equals(emit.number(math.inf))


def _bits_of(emit: Emitter, answers: Sums) -> Any:
    """An integer with a bit for each element."""
    found = emit.integer(0)
    for index, answer in enumerate(answers.values()):
        bits = emit.builder.shl(answer.bits(), emit.integer(LANES * index))
        found = emit.builder.or_(found, bits)
    return found


def told_steps(
    emit: Emitter,
    c: Any,
    steps: Any,
    out: Any,
    done: Any,
    limit: Vector,
    bounds: Callable[[Any, Sums], tuple[Sums, Sums]],
    otherwise: Callable[[Any, Any], tuple[Vector, Any]],
) -> Any:
    """Steps of C[PART, COLUMNS] as long as `bounds` of a step, given its number and C before it,
    tell all elements, or all but a few that `otherwise` tells, given the numbers of the step and of
    a vector of C, which is in memory. `done` of them, 64 bits, are added to C; bits of the result
    say which elements of the next one are not told, and `out[PART, COLUMNS]` has that one or the
    last.
    """
    builder, c, out = emit.builder, emit.at(c), emit.at(out)
    done = builder.inttoptr(done, steps.type.as_pointer())
    builder.store(steps, done)
    unknown, rest = emit.integer_variable(0), emit.integer_variable(0)
    places = {(i, j): emit.place(c, i * COLUMNS + j) for i, j in ELEMENTS}
    now = {at: emit.variable(emit.load(place)) for at, place in places.items()}
    last = {at: emit.variable(emit.get(value)) for at, value in now.items()}

    def write(variables: Variables, pointer: Any) -> None:
        for (i, j), variable in variables.items():
            emit.store(emit.get(variable), emit.place(pointer, i * COLUMNS + j))

    few = emit.integer(FEW)

    def are_more() -> Any:
        """Whether more elements are unknown than `otherwise` is for."""
        return builder.icmp_unsigned(">", builder.ctpop(builder.load(unknown)), few)

    def try_otherwise(step: Any, bits: Any) -> None:
        write(now, c)
        write(last, out)
        builder.store(emit.integer(0), unknown)
        builder.store(bits, rest)
        with emit.loop_with_end(emit.integer(len(ELEMENTS))) as (_, end):
            lowest = builder.cttz(builder.load(rest), ir.Constant(ir.IntType(1), 1))
            index = builder.udiv(lowest, emit.integer(LANES))
            first, lanes = emit.times(index, LANES), emit.integer((1 << LANES) - 1)
            here = builder.and_(builder.lshr(bits, first), lanes)
            value, more = otherwise(step, index)
            place = emit.place(out, first)
            emit.store(emit.answer(here).where(value, emit.load(place)), place)
            more = builder.shl(builder.and_(more, here), first)
            builder.store(builder.or_(builder.load(unknown), more), unknown)
            others = builder.not_(builder.shl(lanes, first))
            builder.store(builder.and_(builder.load(rest), others), rest)
            with emit.unless(builder.load(rest)):
                end()
        for (i, j), variable in last.items():
            emit.put(variable, emit.load(emit.place(out, i * COLUMNS + j)))

    with emit.loop_with_end(steps) as (step, end):
        sums = bounds(step, _values(emit, now))
        found, unsure = _as_normal(emit, *sums, limit)
        for at in ELEMENTS:
            emit.put(last[at], emit.get(found[at]))
        with emit.when(_any_of(unsure)):
            builder.store(_as_subnormal(emit, *sums, unsure, last), unknown)
            with builder.if_then(are_more()):
                found, bits = _told_of_odd(emit, *sums, limit)
                for at in ELEMENTS:
                    emit.put(last[at], emit.get(found[at]))
                builder.store(bits, unknown)
            some, many = builder.load(unknown), are_more()
            with emit.when(some), builder.if_then(builder.not_(many)):
                try_otherwise(step, builder.load(unknown))
            with emit.when(builder.load(unknown)):
                builder.store(step, done)
                end()
        for at in ELEMENTS:
            emit.put(now[at], emit.get(last[at]))
    write(now, c)
    write(last, out)
    return builder.load(unknown)


def _values(emit: Emitter, variables: Variables) -> Sums:
    return {at: emit.get(variable) for at, variable in variables.items()}


_Factors = list[tuple[tuple[int, int], Vector, Vector]]


def _factors(
    emit: Emitter, rows: list[Any], y: Any, step: Any, quads: Any, columns: Sequence[int]
) -> Iterator[tuple[Any, _Factors]]:
    """Of a step's products, in a loop over its quads: the number; elements with both factors."""
    with emit.loop(quads) as quad:
        first = emit.times(emit.builder.add(emit.times(step, quads), quad), QUAD)
        ys = emit.place(y, emit.times(first, COLUMNS))
        for k in range(QUAD):
            right = {j: emit.load(emit.place(ys, k * COLUMNS + j)) for j in columns}
            left = [emit.load_all_equal(emit.place(row, first, k)) for row in rows]
            factors = [((i, j), x, right[j]) for i, x in enumerate(left) for j in columns]
            yield emit.builder.add(first, emit.integer(k)), factors


def _mode(emit: Emitter) -> Any:
    """For `_Bounds`: read once, as that takes long."""
    return emit.control() if ROUNDS_BY_MODE else None


class _Bounds:
    """Sums that are rounded down and up, of values to begin with and of terms.

    In a processor that rounds by mode, `mode` is its control word (`_mode`) and all are rounded up:
    those that are to be rounded down are sums of the opposite terms.
    """

    def __init__(self, emit: Emitter, mode: Any, starts: Sums) -> None:
        self._emit, self._mode = emit, mode
        self._sides = [
            (up, {at: emit.variable(self._of_side(up, value)) for at, value in starts.items()})
            for up in (False, True)
        ]

    def _of_side(self, up: bool, value: Vector) -> Vector:
        return -value if ROUNDS_BY_MODE and not up else value

    def add(self, at: tuple[int, int], *factors: Vector) -> None:
        """To one element: a number, or the product of two."""
        first, *others = factors
        for up, sums in self._sides:
            before = self._emit.get(sums[at])
            if ROUNDS_BY_MODE:
                term = self._of_side(up, first)
                after = term.times_plus(others[0], before) if others else term + before
            else:
                after = self._emit.bound(up, *factors, before)
            self._emit.put(sums[at], after)

    def rounding(self, *others: Variables) -> Any:
        """`with bounds.rounding():` where terms are added, and these variables computed with."""
        if not ROUNDS_BY_MODE:
            return nullcontext()
        sums = *(sums for _, sums in self._sides), *others
        variables = (x for variables in sums for x in variables.values())
        return self._emit.rounding_up(self._mode, variables)

    def least_and_most(self) -> tuple[Sums, Sums]:
        least, most = (
            {at: self._of_side(up, self._emit.get(value)) for at, value in sums.items()}
            for up, sums in self._sides
        )
        return least, most


def _bounds_with_rests(
    emit: Emitter,
    mode: Any,
    c: Vector,
    products: Iterator[tuple[Any, _Factors]],
    rests: Any,
    count: Any,
) -> tuple[Sums, Sums]:
    """Of the sum of a step of one vector of C: what each rounding drops is added, rounded down and
    up; where a processor rounds by mode, that is done at the end, with what has been dropped in
    `rests[count, LANES]`.
    """
    at, zero = (0, 0), emit.number(0.0)
    total, bounds = emit.variable(c), _Bounds(emit, mode, {at: zero})
    dropped = emit.integer_variable(0)
    emit.builder.store(rests, dropped)
    for _, ((_, left, right),) in products:
        before = emit.get(total)
        after = left.times_plus(right, before)
        part = after - before
        rest = (before - (after - part)) + left.times_plus(right, -part)  # Knuth's, as above
        emit.put(total, after)
        if ROUNDS_BY_MODE:
            place = emit.builder.load(dropped)
            emit.store(rest, emit.at(place))
            further = emit.builder.add(place, emit.integer(8 * LANES))
            emit.builder.store(further, dropped)
        else:
            bounds.add(at, rest)
    with bounds.rounding({at: total}):
        if ROUNDS_BY_MODE:
            with emit.loop(count) as index:
                bounds.add(at, emit.load(emit.place(emit.at(rests), emit.times(index, LANES))))
        bounds.add(at, emit.get(total))
    found = emit.get(total)
    finite = found.size() < emit.number(math.inf)  # else it is the sum
    least, most = ({at: finite.where(sums[at], found)} for sums in bounds.least_and_most())
    return least, most


@inline(result=True)
def directed(
    emit: Emitter,
    x: Any,
    stride: Any,
    y: Any,
    c: Any,
    steps: Any,
    out: Any,
    done: Any,
    quads: Any,
    constants: Any,
    rests: Any,
) -> Any:
    """Steps by sums that are rounded down and up, and a few elements by all that a sum's roundings
    drop; see `told_steps`.

    Args:
        x: `[PART, steps products]`, with rows `stride` apart.
        y: `[steps products, COLUMNS]`.
        quads: of a step.
        rests: where `[products of a step, LANES]` may be written.
    """
    rows, y = rows_of(emit, x, stride, PART), emit.at(y)
    limit, mode = emit.load_all_equal(emit.at(constants)), _mode(emit)

    def bounds(step: Any, c: Sums) -> tuple[Sums, Sums]:
        sums = _Bounds(emit, mode, c)
        with sums.rounding():
            for _, factors in _factors(emit, rows, y, step, quads, HALVES):
                for at, left, right in factors:
                    sums.add(at, left, right)
        return sums.least_and_most()

    def otherwise(step: Any, index: Any) -> tuple[Vector, Any]:
        builder, halves = emit.builder, emit.integer(len(HALVES))
        i, j = builder.udiv(index, halves), emit.times(builder.urem(index, halves), LANES)
        row = emit.place(emit.at(x), emit.times(stride, i))
        before = emit.load(emit.place(emit.at(c), emit.times(index, LANES)))
        factors = _factors(emit, [row], emit.place(y, j), step, quads, [0])
        of_one = _bounds_with_rests(emit, mode, before, factors, rests, emit.times(quads, QUAD))
        told, unsure = _told_of_odd(emit, *of_one, limit)
        return emit.get(told[0, 0]), unsure

    return told_steps(emit, c, steps, out, done, limit, bounds, otherwise)


@inline(result=False)
def merge(emit: Emitter, out: Any, other: Any, bits: Any) -> None:
    """`out[PART, COLUMNS]` becomes `other` where bits are set."""
    out, other = emit.at(out), emit.at(other)
    for index, (i, j) in enumerate(ELEMENTS):
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


@inline(result=False)
def terms(emit: Emitter, x: Any, y: Any, c: Any, terms: Any, products: Any) -> None:
    """Of one row; 0 for what is no finite number."""
    x, y, c, terms = (emit.at(v) for v in (x, y, c, terms))

    def store(term: Vector, place: Any) -> None:
        finite = term.size() < emit.number(math.inf)
        emit.store(finite.where(term, emit.number(0.0)), place)

    with emit.loop(products) as k:
        left = emit.load_all_equal(emit.place(x, k))
        for j in HALVES:
            right = emit.load(emit.place(y, emit.times(k, COLUMNS), j))
            store(left * right, emit.place(terms, emit.times(k, COLUMNS), j))
    for j in HALVES:
        store(emit.load(emit.place(c, j)), emit.place(terms, emit.times(products, COLUMNS), j))


@inline(result=True)
def part(emit: Emitter, terms: Any, count: Any, part: Any, constants: Any) -> Any:
    """`part[COLUMNS]`: the exact sum of what the terms have above a place that it can hold; it is
    taken from them. The result is not 0 if there was anything.
    """
    terms, part = emit.at(terms), emit.at(part)
    scale = emit.load_all_equal(emit.place(emit.at(constants), 1))
    zero = emit.number(0.0)
    tops = {j: emit.variable(zero) for j in HALVES}
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
    rests = {j: emit.variable(emit.number(0.0)) for j in HALVES}
    with emit.loop(last), emit.loop(last) as k:  # each pass brings what cancels one place up
        index = builder.sub(builder.sub(last, k), emit.integer(1))
        for j in HALVES:
            upper = emit.place(parts, emit.times(index, COLUMNS), j)
            lower = emit.place(upper, COLUMNS)
            total, dropped = emit.load(upper).sum_and_rest(emit.load(lower))
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
