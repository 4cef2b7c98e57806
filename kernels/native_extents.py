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


def last_bit(emit: Emitter, number: Vector) -> Vector:
    """The last bit of a finite number, as one whose word is less by 1: 0 comes last."""
    size = number.size()
    words, minus_one = size.words(), emit.word((1 << 64) - 1)
    without = (words & words.plus_words(minus_one)).numbers()
    power = (words & emit.word(_FRACTION)).same_words(emit.word(0))
    return power.where(size, size - without).words().plus_words(minus_one).numbers()


@inline(result=False)
def _last_bits(emit: Emitter, x: Any, count: Any, found: Any) -> None:
    """Of so many doubles, whole vectors, the least last bit of each lane, as `last_bit` has it."""
    least = emit.variable(emit.number(math.inf))
    with emit.loop(emit.builder.udiv(count, emit.integer(LANES))) as index:
        number = emit.load(emit.place(emit.at(x), emit.times(index, LANES)))
        emit.put(least, last_bit(emit, number).smaller(emit.get(least)))
    emit.store(emit.get(least), emit.at(found))


@njit(**COMPILED)
def grid_of(x: int, count: int, found: Any) -> float:
    """The largest power of two that all of so many doubles are multiples of, if they are finite."""
    _last_bits((x, count, address(found, LANES)))
    least = _least(found)
    return least if least < np.inf else NONE
