"""The sums of a step of single elements, by extraction along their products: for `kernels.native`.

What `kernels.native_extraction` does for a vector of elements, one product after the other, is done
here for one element and a vector of products, where few elements of many need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit

from kernels.native_extraction import ENOUGH, Rounding
from kernels.native_steps import COLUMNS, QUAD, power_below
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_USUAL = 16  # products of a step, for which there is code without loops
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


def _chosen(emit: Emitter, vectors: list[Vector], places: list[int]) -> Vector:
    """Lanes of two vectors, those of the second one counted on."""
    kind = ir.VectorType(_PLACE, len(places))
    return Vector(
        emit.builder,
        emit.builder.shuffle_vector(*(v.value for v in vectors), ir.Constant(kind, places)),
    )


def _across(emit: Emitter, vectors: list[Vector], operation: _Operation) -> Vector:
    """All lanes of the first vector together, in the even ones, and those of another in others."""
    lanes = emit.vector.count
    pairs = [
        _chosen(emit, vectors, [n - n % 2 + odd + n % 2 * lanes for n in range(lanes)])
        for odd in range(2)
    ]
    both = operation(*pairs)
    while lanes > 2:
        lanes //= 2
        other = _chosen(emit, [both, both], [n ^ lanes for n in range(emit.vector.count)])
        both = operation(both, other)
    return both


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

    Two at a time, since each operation waits for the one before it. A second level extracts from
    the rests of the first one. Its sum is exact, too; with the first one it is a double and what
    that drops, which is a rest, as is what the second level leaves.

    Args:
        x: `[BAND, products of the step]`, with rows `stride` apart.
        y: `[COLUMNS, products of the step]`, with columns `length` apart.
        c, powers: `[BAND, COLUMNS]`; powers not below those by `powers_of_step`.
        last: the word of what all terms are multiples of.
    """
    builder = emit.builder
    few = Emitter(builder, emit.element, min(LANES, QUAD))
    lanes, two = few.vector.count, range(2)
    rounding = Rounding(few, constants, last)
    x, y, c, out, powers, constants = (few.at(v) for v in (x, y, c, out, powers, constants))
    scale, enough = few.load_all_equal(few.place(constants, 1)), few.number(ENOUGH)
    first_lane = [(1 << 64) - 1 if n == 0 else 0 for n in range(lanes)]
    only_first = Vector(builder, ir.Constant(few.word(0).value.type, first_lane))
    left = few.integer_variable(0)
    builder.store(elements, left)
    unsure = few.integer_variable(0)

    def next_one() -> Any:
        """The number of the first bit, which is taken."""
        bits = builder.load(left)
        builder.store(builder.and_(bits, builder.sub(bits, few.integer(1))), left)
        return builder.cttz(bits, ir.Constant(ir.IntType(1), 0))

    def step_of(indices: list[Any], count: int | None) -> None:
        """Of two elements, if their products are so many vectors; else in loops."""
        rows = [builder.udiv(n, few.integer(COLUMNS)) for n in indices]
        columns = [builder.urem(n, few.integer(COLUMNS)) for n in indices]
        rows = [few.place(x, few.times(row, stride)) for row in rows]
        columns = [few.place(y, few.times(column, length)) for column in columns]
        before = [few.load_all_equal(few.place(c, n)) for n in indices]
        starts = [value.words() & only_first for value in before]

        def product(element: int, vector: Any) -> Vector:
            at = few.times(vector, lanes)
            left, right = (few.load(few.place(v[element], at)) for v in (rows, columns))
            return left * right

        def each(do: Callable[[int, Vector], None]) -> None:
            """For C and all products of each element."""
            for element, start in enumerate(starts):
                do(element, start.numbers())
            for vector in range(count or 0):
                for element in two:
                    do(element, product(element, few.integer(vector)))
            if count is None:
                with few.loop(builder.udiv(padded, few.integer(lanes))) as vector:
                    for element in two:
                        do(element, product(element, vector))

        def sigmas_above(rest_of: Callable[[int, Vector], Vector]) -> list[Vector]:
            tops = [few.variable(few.number(0.0)) for _ in two]

            def look(element: int, term: Vector) -> None:
                size, top = rest_of(element, term).size(), tops[element]
                few.put(top, size.larger(few.get(top)))

            each(look)
            power = power_below(few, _across(few, [few.get(top) for top in tops], Vector.larger))
            both = power.smaller(enough) * scale
            places = [[n - n % 2 + odd for n in range(lanes)] for odd in two]
            return [_chosen(few, [both, both], place) for place in places]

        largest = [few.load_all_equal(few.place(powers, n)) for n in indices]
        largest = [v.larger(c.size()) for v, c in zip(largest, before, strict=True)]
        sigmas = [[power_below(few, top).smaller(enough) * scale for top in largest]]

        def extract(element: int, term: Vector) -> list[Vector]:
            """What is above each sigma's last place, and what is left."""
            found = []
            for level in sigmas:
                sigma = level[element]
                found.append((sigma + term) - sigma)
                term = term - found[-1]
            return [*found, term]

        for _ in range(levels - 1):
            sigmas.append(sigmas_above(lambda element, term: extract(element, term)[-1]))
        totals = [[few.variable(few.number(0.0)) for _ in two] for _ in range(levels + 2)]

        def add(element: int, term: Vector) -> None:
            found = extract(element, term)
            for total, value in zip(totals, found, strict=False):
                few.put(total[element], few.get(total[element]) + value)
            square = totals[-1][element]
            few.put(square, found[-1].times_plus(found[-1], few.get(square)))

        each(add)
        high, *others, rest, square = (
            _across(few, [few.get(sum) for sum in total], Vector.__add__) for total in totals
        )
        for middle in others:
            high, dropped = high.sum_and_rest(middle)
            rest, square = dropped + rest, dropped.times_plus(dropped, square)
        total, found, doubts = rounding.rounded(high, rest, square)
        value, sure = few.variable(found), few.integer_variable(0)
        builder.store(builder.not_(few.integer(0)), sure)
        with few.when(rounding.unusual(total.size())):
            other, none = rounding.of_any(high, rest, found)
            few.put(value, other)
            builder.store(builder.not_(none), sure)
        doubts = builder.and_(doubts, builder.load(sure))
        for n, index in enumerate(indices):
            number = builder.extract_element(few.get(value).value, ir.Constant(ir.IntType(32), n))
            builder.store(number, few.place(out, index))
            bit = builder.and_(builder.lshr(doubts, few.integer(n)), few.integer(1))
            here = builder.shl(bit, index)
            builder.store(builder.or_(builder.load(unsure), here), unsure)

    usual = builder.icmp_unsigned("==", padded, few.integer(_USUAL))
    pairs = builder.udiv(builder.add(builder.ctpop(elements), few.integer(1)), few.integer(2))
    with few.loop(pairs):
        first = next_one()
        one_more = builder.icmp_unsigned("!=", builder.load(left), few.integer(0))
        second = builder.select(one_more, next_one(), first)
        indices = [first, second]
        if levels > 1:
            step_of(indices, None)
        else:
            with builder.if_else(usual) as (then, otherwise):
                with then:
                    step_of(indices, _USUAL // lanes)
                with otherwise:
                    step_of(indices, None)
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
