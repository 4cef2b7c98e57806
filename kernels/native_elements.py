"""The sums of a step of single elements, by extraction along their products: for `kernels.native`.

What `kernels.native_extraction` does for a vector of elements, one product after the other, is done
here for one element and a vector of products, where few elements of many need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit

from kernels.native_extraction import ENOUGH, Rounding
from kernels.native_steps import COLUMNS, QUAD, power_below
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_USUAL = 16  # products of a step, an even number of vectors: for it there is code without loops
_PLACE = ir.IntType(32)


@njit(**COMPILED)
def transposed(y: int, length: int, found: int) -> None:
    """`y[length, COLUMNS]` as `found[COLUMNS, length]`."""
    numbers = carray(pointer(y), (length, COLUMNS), np.float64)
    columns = carray(pointer(found), (COLUMNS, length), np.float64)
    for j in range(COLUMNS):
        for k in range(length):
            columns[j, k] = numbers[k, j]


_Operation = Callable[[Vector, Vector], Vector]
_Factors = tuple[Vector, Vector]


def _chosen(emit: Emitter, vectors: list[Vector], places: list[int]) -> Vector:
    """Lanes of two vectors, those of the second one counted on."""
    kind = ir.VectorType(_PLACE, len(places))
    return Vector(
        emit.builder,
        emit.builder.shuffle_vector(*(v.value for v in vectors), ir.Constant(kind, places)),
    )


def _across(emit: Emitter, vectors: list[Vector], operation: _Operation) -> Vector:
    """Of as many vectors as they have lanes: all lanes of each one together, in its lane."""
    count = emit.vector.count
    for bit in (1 << n for n in range(count.bit_length() - 1)):
        # Half of what is left of a vector meets the other half, beside those of the next one.
        here = [n + (count if n & bit else 0) for n in range(count)]
        there = [n ^ bit for n in here]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            operation(*(_chosen(emit, list(pair), places) for places in (here, there)))
            for pair in pairs
        ]
    return vectors[0]


def _taken(rest: Vector, before: Vector) -> tuple[Vector, Vector]:
    """The sum, from sigma on, with what it can hold of a number; and what is left of that."""
    after = before + rest
    return after, rest - (after - before)


def _extracted(factors: _Factors, sums: list[Vector]) -> tuple[list[Vector], Vector]:
    """The sums, from sigmas on, each with what it can hold of a product and the ones before it
    could not; and what is left.
    """
    left, right = factors
    after = [left.times_plus(right, sums[0])]
    rest = left.times_plus(right, -(after[0] - sums[0]))
    for before in sums[1:]:
        total, rest = _taken(rest, before)
        after.append(total)
    return after, rest


class _Step(NamedTuple):
    """Of `_elements`: where its operands are."""

    x: Any
    stride: Any
    y: Any
    length: Any
    c: Any
    padded: Any
    powers: Any


def _sums(
    few: Emitter, step: _Step, indices: list[Any], constants: Any, count: int | None, levels: int
) -> tuple[Vector, Vector, Vector]:
    """Of as many elements as there are lanes, or of fewer over and over, in one lane each: what is
    exact of their sums, the sums of the rests and of their squares. Their products are `count`
    vectors, or else in loops.
    """
    builder, lanes = few.builder, few.vector.count
    together = range(len(indices))
    scale, enough = few.load_all_equal(few.place(few.at(constants), 1)), few.number(ENOUGH)
    zero, one = few.number(0.0), few.number(1.0)
    rows = [builder.udiv(n, few.integer(COLUMNS)) for n in indices]
    columns = [builder.urem(n, few.integer(COLUMNS)) for n in indices]
    rows = [few.place(step.x, few.times(row, step.stride)) for row in rows]
    columns = [few.place(step.y, few.times(column, step.length)) for column in columns]

    def gathered(numbers: Any) -> Vector:
        loaded, found = [builder.load(few.place(numbers, index)) for index in indices], zero.value
        for n in range(lanes):
            number = loaded[n % len(loaded)]
            found = builder.insert_element(found, number, ir.Constant(_PLACE, n))
        return Vector(builder, found)

    def each(do: Callable[[int, _Factors, int | None], None]) -> None:
        """For the factors of all products of each element, and the number of their vector."""

        def do_for(element: int, vector: Any, number: int | None) -> None:
            at = few.times(vector, lanes)
            left, right = (few.load(few.place(v[element], at)) for v in (rows, columns))
            do(element, (left, right), number)

        if count is None:
            with few.loop(builder.udiv(step.padded, few.integer(lanes))) as vector:
                for element in together:
                    do_for(element, vector, None)
            return
        for element in together:  # one after the other needs fewest registers
            for number in range(count):
                do_for(element, few.integer(number), number)

    def for_each(numbers: Vector) -> list[Vector]:
        return [_chosen(few, [numbers, numbers], [n] * lanes) for n in together]

    def across(values: list[Vector], operation: _Operation = Vector.__add__) -> Vector:
        return _across(few, [values[n % len(values)] for n in range(lanes)], operation)

    before = gathered(step.c)
    top = gathered(step.powers).larger(before.size())
    sigmas: list[Vector] = []
    starts: list[list[Vector]] = []
    totals: list[list[Any]] = []
    kept: dict[tuple[int, int], Vector] = {}  # the rests of the level before, without loops

    def rest_of(element: int, factors: _Factors, number: int | None) -> Vector:
        """Of products, which go into the totals; in loops into those of all levels once more."""
        places = [level[element] for level in totals]
        if number is not None and (element, number) in kept:
            after, rest = _taken(kept[element, number], few.get(places[-1]))
            few.put(places[-1], after)
        else:
            found, rest = _extracted(factors, [few.get(place) for place in places])
            for place, after in zip(places, found, strict=True):
                few.put(place, after)
        if number is not None:
            kept[element, number] = rest
        return rest

    for done in range(levels):
        sigmas.append(power_below(few, top).smaller(enough) * scale)
        starts.append(for_each(sigmas[-1]))
        known = 0 if count is None else done
        totals[known:] = [[few.variable(start) for start in of] for of in starts[known:]]
        if done == levels - 1:
            break
        tops = [few.variable(zero) for _ in together]

        def look(
            element: int, factors: _Factors, number: int | None, tops: list[Any] = tops
        ) -> None:
            rest = rest_of(element, factors, number)
            few.put(tops[element], rest.size().larger(few.get(tops[element])))

        each(look)
        _, rest = _extracted((one, before), sigmas)
        top = rest.size().larger(across([few.get(top) for top in tops], Vector.larger))
    none = few.number(-0.0)  # what it is added to stays as it is
    rests, squares = ([few.variable(none) for _ in together] for _ in range(2))

    def add(element: int, factors: _Factors, number: int | None) -> None:
        rest = rest_of(element, factors, number)
        if number is not None:  # two at a time, as in `extracted`
            if number % 2 == 0:
                return
            rest = kept[element, number - 1] + rest
        few.put(rests[element], few.get(rests[element]) + rest)
        few.put(squares[element], rest.times_plus(rest, few.get(squares[element])))

    each(add)

    of_c, rest = _extracted((one, before), sigmas)
    square = rest.times_plus(rest, across([few.get(v) for v in squares]))
    rest = rest + across([few.get(v) for v in rests])
    parts = []
    for level, start, sigma, after in zip(totals, starts, sigmas, of_c, strict=True):
        found = [few.get(total) - value for total, value in zip(level, start, strict=True)]
        parts.append(across(found) + (after - sigma))
    high = parts[0]
    for middle in parts[1:]:
        high, dropped = high.sum_and_rest(middle)
        rest, square = dropped + rest, dropped.times_plus(dropped, square)
    return high, rest, square


def _elements(
    emit: Emitter,
    x: Any,
    stride: Any,
    y: Any,
    length: Any,
    c: Any,
    elements: Any,
    padded: Any,
    constants: Any,
    powers: Any,
    out: Any,
    last: Any,
    *,
    levels: int,
) -> Any:
    """A step of the elements of C whose bits are set, into `out[BAND, COLUMNS]`; bits of those that
    are still in doubt.

    As many at a time as a vector has lanes: what their products add up to is one for each. A second
    level extracts from the rests of the first one. Its sum is exact, too; with the first one it is
    a double and what that drops, which is a rest, as is what the second level leaves.

    Args:
        x: `[BAND, products of the step]`, with rows `stride` apart.
        y: `[COLUMNS, products of the step]`, with columns `length` apart.
        c, powers: `[BAND, COLUMNS]`; powers not below those by `powers_of_step`.
        last: the word of what all terms are multiples of.
    """
    builder = emit.builder
    x, y, c, out, powers = (emit.at(v) for v in (x, y, c, out, powers))
    step = _Step(x, stride, y, length, c, padded, powers)
    left, unsure = (emit.integer_variable(0) for _ in range(2))
    builder.store(elements, left)

    def next_one() -> Any:
        """The number of the first bit, which is taken."""
        bits = builder.load(left)
        builder.store(builder.and_(bits, builder.sub(bits, emit.integer(1))), left)
        return builder.cttz(bits, ir.Constant(ir.IntType(1), 0))

    def told(few: Emitter, rounding: Rounding, count: int | None, together: int) -> None:
        """The next elements, so many; the first one over and over if there are fewer."""
        indices = [next_one()]
        for _ in range(1, together):
            one_more = builder.icmp_unsigned("!=", builder.load(left), emit.integer(0))
            indices.append(builder.select(one_more, next_one(), indices[0]))
        high, rest, square = _sums(few, step, indices, constants, count, levels)
        total, found, doubts = rounding.rounded(high, rest, square)
        value, sure = few.variable(found), emit.integer_variable(0)
        builder.store(builder.not_(emit.integer(0)), sure)
        with emit.when(rounding.unusual(total.size())):
            other, none = rounding.of_any(high, rest, found)
            few.put(value, other)
            builder.store(builder.not_(none), sure)
        doubts = builder.and_(doubts, builder.load(sure))
        for n, index in enumerate(indices):
            number = builder.extract_element(few.get(value).value, ir.Constant(_PLACE, n))
            builder.store(number, emit.place(out, index))
            bit = builder.and_(builder.lshr(doubts, emit.integer(n)), emit.integer(1))
            here = builder.shl(bit, index)
            builder.store(builder.or_(builder.load(unsure), here), unsure)

    def all_told(lanes: int, count: int | None = None) -> None:
        few = Emitter(builder, emit.element, lanes)
        rounding = Rounding(few, constants, last)
        half = 0 if count is None else lanes // 2  # of the last ones, if they are no more
        rounds = builder.add(builder.ctpop(elements), emit.integer(lanes - 1 - half))
        with emit.loop(builder.udiv(rounds, emit.integer(lanes))):
            told(few, rounding, count, lanes)
        if half > 0:
            with emit.when(builder.load(left)):
                told(few, rounding, count, half)

    usual = builder.icmp_unsigned("==", padded, emit.integer(_USUAL))
    with builder.if_else(usual) as (then, otherwise):
        with then:
            all_told(LANES, _USUAL // LANES)
        with otherwise:
            all_told(min(LANES, QUAD))
    return builder.load(unsure)


@inline(result=True)
def in_two_parts(emit: Emitter, *operands: Any) -> Any:
    """See `_elements`."""
    return _elements(emit, *operands, levels=1)


@inline(result=True)
def in_three_parts(emit: Emitter, *operands: Any) -> Any:
    """See `_elements`."""
    return _elements(emit, *operands, levels=2)


@inline(result=True)
def number_of(emit: Emitter, bits: Any) -> Any:
    """How many are set."""
    return emit.builder.ctpop(bits)
