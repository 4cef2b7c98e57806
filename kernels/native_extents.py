"""How large the numbers of a few rows or columns are: what proves that no sum of them is rounded.

For `kernels.native`: operands are doubles, `x[ROWS, length]` and `y[length, COLUMNS]`, and most of
this is done anew for each block of k.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import carray, njit

from kernels.native_operands import address
from kernels.native_steps import COLUMNS, EXPONENT, NONE, QUAD, ROWS
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_FRACTION = (1 << 52) - 1


@njit(**COMPILED)
def power_of(magnitude: int) -> float:
    return np.int64(magnitude & EXPONENT).view(np.float64)


def _measured(emit: Emitter, lines: list[Any], count: Any, step: int) -> tuple[list[Any], Any]:
    """Of vectors at `lines` and so many times `step` doubles further: sums of squares for each
    line, and sizes' words less 1, as numbers, of which the least one counts. 0 comes last.
    """
    squares = [emit.variable(emit.number(0.0)) for _ in lines]
    leasts = [emit.variable(emit.number(math.inf)) for _ in lines[:4]]
    size, minus_one = emit.word((1 << 63) - 1), emit.word((1 << 64) - 1)
    with emit.loop(count) as index:
        for i, (line, square) in enumerate(zip(lines, squares, strict=True)):
            number = emit.load(emit.place(line, emit.times(index, step)))
            emit.put(square, number.times_plus(number, emit.get(square)))
            below = (number.words() & size).plus_words(minus_one).numbers()
            emit.put(leasts[i % 4], below.smaller(emit.get(leasts[i % 4])))
    least = emit.get(leasts[0])
    for other in leasts[1:]:
        least = emit.get(other).smaller(least)
    return [emit.get(square) for square in squares], least


@inline(result=False)
def _measured_rows(emit: Emitter, x: Any, length: Any, found: Any) -> None:
    """Of `x[ROWS, length]`, of whole vectors: sums of squares, the largest of each lane, and the
    least size of each lane less 1.
    """
    x, found = emit.at(x), emit.at(found)
    lines = [emit.place(x, emit.times(length, i)) for i in range(ROWS)]
    count = emit.builder.udiv(length, emit.integer(LANES))
    squares, least = _measured(emit, lines, count, LANES)
    emit.store(functools.reduce(Vector.larger, squares), found)
    emit.store(least, emit.place(found, LANES))


@inline(result=False)
def _measured_columns(emit: Emitter, y: Any, length: Any, found: Any) -> None:
    """As `_measured_rows`, of `y[length, COLUMNS]`."""
    y, found = emit.at(y), emit.at(found)
    lines = [emit.place(y, i) for i in range(0, QUAD * COLUMNS, LANES)]
    count = emit.builder.udiv(length, emit.integer(QUAD))
    squares, least = _measured(emit, lines, count, QUAD * COLUMNS)
    halves = [squares[j] + squares[j + 2] + squares[j + 4] + squares[j + 6] for j in range(2)]
    emit.store(halves[0].larger(halves[1]), found)
    emit.store(least, emit.place(found, LANES))


@njit(**COMPILED)
def extent_of_rows(x: int, length: int, found: Any) -> tuple[float, float]:
    """Of a group `[ROWS, length]` at `x`: a bound on the rows' Euclidean norms, none of which is
    finite that has an infinity (a NaN may go unnoticed, for plain sums heed it), and a power of two
    that is not above any size but 0.
    """
    _measured_rows((x, length, address(found, 0)))
    square, least = 0.0, _least(found)
    numbers = carray(pointer(x), (ROWS * length,), np.float64)
    for lane in range(LANES):
        square += found[lane]
    for index in range(length // LANES * LANES, length):
        most = 0.0
        for i in range(ROWS):
            size = abs(numbers[i * length + index])
            most = max(most, size) if size == size else np.inf
            least = min(least, size if size > 0 else np.inf)
        square += most * most
    return _extent(square, least)


@njit(**COMPILED)
def extent_of_columns(y: int, length: int, found: Any) -> tuple[float, float]:
    """As `extent_of_rows`, of the columns of `[length, COLUMNS]` at `y`."""
    _measured_columns((y, length, address(found, 0)))
    square = 0.0
    for lane in range(LANES):
        square = max(square, found[lane]) if found[lane] == found[lane] else np.inf
    return _extent(square, _least(found))


@njit(**COMPILED)
def _least(found: Any) -> float:
    """The least size but 0, from words less 1."""
    least = np.inf
    for lane in range(LANES):
        least = min(least, found[LANES + lane])
    if least == np.inf:
        return least
    return np.int64(np.float64(least).view(np.int64) + 1).view(np.float64)


@njit(**COMPILED)
def _extent(square: float, least: float) -> tuple[float, float]:
    power = power_of(np.float64(least).view(np.int64)) if least < np.inf else NONE
    return math.sqrt(square) * (1 + 2.0**-20), power


def _sizes(emit: Emitter, place: Any, top: Any, most: Any, least: Any) -> None:
    """The words of the sizes of a vector among the largest finite ones, the largest, and the least
    ones but 0 (of infinities, if there are none), which are variables.
    """
    size = emit.load(place).words() & emit.word(EXPONENT | _FRACTION)
    zero, infinity = emit.word(0), emit.word(EXPONENT)
    finite = size.less_word(infinity).where(size, zero)
    emit.put(top, finite.larger_word(emit.get(top)))
    emit.put(most, size.larger_word(emit.get(most)))
    some = size.same_words(zero).where(infinity, size)
    emit.put(least, some.smaller_word(emit.get(least)))


def _powers(emit: Emitter, most: Any, least: Any, unit: Any) -> tuple[Any, Any]:
    """Of words, in vectors or alone: a power of two above, and one that is not, times a unit; 0 if
    `most` is not finite.
    """
    exponent = emit.word(EXPONENT)
    above = (most & exponent).numbers() * emit.number(2.0)
    below = (least & exponent).numbers() * emit.all_equal(unit)
    return above, most.less_word(exponent).where(below, emit.number(0.0))


@inline(result=False)
def bounds_of_rows(
    emit: Emitter, x: Any, length: Any, steps: Any, padded: Any, unit: Any, tops: Any, sizes: Any
) -> None:
    """Of `x[ROWS, length]`, steps of whole vectors of products: `tops[steps, ROWS]`, powers of two
    above a step's finite sizes; and of all rows `sizes[2, length]`, for each product what is above
    all, and what all are multiples of, with the word `unit` a number's last place. If any is not
    finite, that is nothing.
    """
    builder = emit.builder
    x, tops, above = emit.at(x), emit.at(tops), emit.at(sizes)
    unit = builder.bitcast(unit, emit.element)
    zero, infinity = emit.word(0), emit.word(EXPONENT)
    vectors = builder.udiv(padded, emit.integer(LANES))
    with emit.loop(steps) as step:
        largest = [emit.variable(zero) for _ in range(ROWS)]
        with emit.loop(vectors) as vector:
            at = builder.add(emit.times(step, padded), emit.times(vector, LANES))
            most, least = emit.variable(zero), emit.variable(infinity)
            for i, top in enumerate(largest):
                _sizes(emit, emit.place(x, emit.times(length, i), at), top, most, least)
            bounds = _powers(emit, emit.get(most), emit.get(least), unit)
            emit.store(bounds[0], emit.place(above, at))
            emit.store(bounds[1], emit.place(above, length, at))
        for i, top in enumerate(largest):
            power = builder.and_(emit.get(top).largest_word(), emit.integer(EXPONENT))
            place = emit.place(tops, emit.times(step, ROWS), i)
            builder.store(emit.scalar_times(power, 2.0), place)


@inline(result=False)
def bounds_of_columns(
    emit: Emitter, y: Any, length: Any, steps: Any, padded: Any, unit: Any, tops: Any, sizes: Any
) -> None:
    """As `bounds_of_rows`, of the columns of `y[length, COLUMNS]`, for any steps."""
    builder = emit.builder
    y, tops, above = emit.at(y), emit.at(tops), emit.at(sizes)
    unit = builder.bitcast(unit, emit.element)
    zero, infinity = emit.word(0), emit.word(EXPONENT)
    halves = range(0, COLUMNS, LANES)
    with emit.loop(steps) as step:
        highest = [emit.variable(zero) for _ in halves]
        with emit.loop(padded) as product:
            k = builder.add(emit.times(step, padded), product)
            most, least = emit.variable(zero), emit.variable(infinity)
            for j, top in zip(halves, highest, strict=True):
                _sizes(emit, emit.place(y, emit.times(k, COLUMNS), j), top, most, least)
            words = emit.get(most).largest_word(), emit.get(least).least_word()
            largest, smallest = (
                emit.all_equal(builder.bitcast(word, emit.element)).words() for word in words
            )
            bounds = _powers(emit, largest, smallest, unit)
            for bound, row in zip(bounds, (0, length), strict=True):
                first = builder.extract_element(bound.value, emit.integer(0))
                builder.store(first, emit.place(above, row, k))
        for j, top in zip(halves, highest, strict=True):
            power = (emit.get(top) & emit.word(EXPONENT)).numbers() * emit.number(2.0)
            emit.store(power, emit.place(tops, emit.times(step, COLUMNS), j))


@njit(**COMPILED)
def bounds_of_short_steps(
    x: int, length: int, steps: int, padded: int, unit: float, tops: Any, sizes: Any
) -> None:
    """As `bounds_of_rows`, for any steps."""
    words = carray(pointer(x), (ROWS, length), np.int64)
    for step in range(steps):
        tops[step] = 0
        for k in range(step * padded, (step + 1) * padded):
            most, least = np.int64(0), np.int64(EXPONENT)
            for i in range(ROWS):
                size = words[i, k] & np.int64(EXPONENT | _FRACTION)
                most = max(most, size)
                least = min(least, size if size > 0 else np.int64(EXPONENT))
                if size < EXPONENT:
                    tops[step, i] = max(tops[step, i], 2 * power_of(size))
            sizes[k] = 2 * power_of(most)
            sizes[length + k] = power_of(least) * unit if most < EXPONENT else 0.0
