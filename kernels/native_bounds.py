"""Sums of a step in FP64 with a bound on their error, for `kernels.native`: where that is too small
to make a difference, as nearly everywhere, rounding the sum is rounding the exact one.

The bound follows from how large the sum and its terms are, and these either from how large the
operands of the step are, or from the exponents of each term.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit

from kernels.native_extents import last_bit
from kernels.native_extraction import find_powers
from kernels.native_steps import (
    BAND,
    COLUMNS,
    EXPONENT,
    HALVES,
    LARGEST,
    LEAST,
    NONE,
    QUAD,
    beside_which_float32,
    in_float32,
    rows_of,
)
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_WHOLE = 2.0**53 * (1 - 2.0**-20)  # of sizes that are known but for their rounding
_ELEMENTS = [(i, j) for i in range(BAND) for j in HALVES]


@njit(**COMPILED)
def sums_of_rows(x: int, length: int, padded: int, found: int) -> None:
    """Of `x[BAND, length]`, for each row and step a bound on the sum of sizes."""
    steps = length // padded
    numbers = carray(pointer(x), (BAND * steps, padded), np.float64)
    sums = carray(pointer(found), (BAND * steps,), np.float64)
    for row in range(BAND * steps):
        total, other = 0.0, 0.0
        for k in range(0, padded, 2):
            total += abs(numbers[row, k])
            other += abs(numbers[row, k + 1])
        sums[row] = (total + other) * (1 + 2.0**-40)


@inline(result=False)
def tops_of_columns(emit: Emitter, y: Any, steps: Any, padded: Any, found: Any) -> None:
    """Of `y[steps padded, COLUMNS]`, for each step and column the largest size."""
    y, found = emit.at(y), emit.at(found)
    with emit.loop(steps) as step:
        tops = {j: emit.variable(emit.number(0.0)) for j in HALVES}
        with emit.loop(padded) as k:
            line = emit.times(emit.builder.add(emit.times(step, padded), k), COLUMNS)
            for j, top in tops.items():
                emit.put(top, emit.load(emit.place(y, line, j)).size().larger(emit.get(top)))
        for j, top in tops.items():
            emit.store(emit.get(top), emit.place(found, emit.times(step, COLUMNS), j))


@inline(result=False)
def grids_of_rows(emit: Emitter, x: Any, count: Any, padded: Any, found: Any) -> None:
    """Of so many steps of rows, each `[padded]`, the power of two that all numbers are multiples
    of.
    """
    builder, few = emit.builder, Emitter(emit.builder, emit.element, min(LANES, QUAD))
    lanes = few.vector.count
    x, found = few.at(x), few.at(found)
    with few.loop(count) as step:
        least = few.variable(few.number(NONE))
        with few.loop(builder.udiv(padded, few.integer(lanes))) as vector:
            at = few.times(step, padded), few.times(vector, lanes)
            here = last_bit(few, few.load(few.place(x, *at)))
            few.put(least, here.smaller(few.get(least)))
        word = builder.add(few.get(least).words().least_word(), few.integer(1))
        builder.store(builder.bitcast(word, few.element), few.place(found, step))


@inline(result=False)
def grids_of_columns(emit: Emitter, y: Any, steps: Any, padded: Any, found: Any) -> None:
    """Of steps of columns, `y[steps padded, COLUMNS]`, the same times `_WHOLE`: FP64 has all
    multiples up to there.
    """
    y, found = emit.at(y), emit.at(found)
    with emit.loop(steps) as step:
        leasts = {j: emit.variable(emit.number(NONE)) for j in HALVES}
        with emit.loop(padded) as k:
            line = emit.times(emit.builder.add(emit.times(step, padded), k), COLUMNS)
            for j, least in leasts.items():
                here = last_bit(emit, emit.load(emit.place(y, line, j)))
                emit.put(least, here.smaller(emit.get(least)))
        for j, least in leasts.items():
            grid = emit.get(least).words().plus_words(emit.word(1)).numbers()
            emit.store(grid * emit.number(_WHOLE), emit.place(found, emit.times(step, COLUMNS), j))


_Reach = Callable[[Vector, Any, Any, int], Vector]
_Grid = Callable[[Vector, Any, Any, int], Vector]


def _bounded(
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
    last: Any,
    totals: Any,
    *,
    reach_of: _Reach,
    prepare: Callable[[Any], None] = lambda step: None,
    grid: _Grid | None = None,
) -> Any:
    """Steps of C[BAND, COLUMNS] as long as all elements are told. `done` of them, 64 bits, are
    added to C; bits of the result say which elements of the next one are not told, and `out[BAND,
    COLUMNS]` has the others. None is told that might be beyond FP32's numbers.

    Args:
        x: `[BAND, steps products]`, with rows `stride` apart.
        y: `[steps products, COLUMNS]`.
        quads: of a step.
        last: the word of what all terms are multiples of.
        totals: `[BAND, COLUMNS]`, where sums in FP64 are written.
        reach_of: a size and twice a bound on the sum of the sizes of a step's products, given the
            size, the step's number and that of a row.
        grid: up to where sums are exact besides, also given C.
    """
    builder = emit.builder
    rows, y = rows_of(emit, x, stride, BAND), emit.at(y)
    constants, totals = emit.at(constants), emit.at(totals)
    share = emit.load_all_equal(emit.place(constants, 4))
    room = emit.all_equal(builder.bitcast(last, emit.element)) * emit.number(_WHOLE)
    infinity, most, zero = (emit.number(v) for v in (math.inf, LARGEST, 0.0))
    done = builder.inttoptr(done, steps.type.as_pointer())
    builder.store(steps, done)
    unknown, now, after = (emit.integer_variable(0) for _ in range(3))
    builder.store(c, now)
    builder.store(out, after)
    chains = range(2 if len(_ELEMENTS) < 12 else 1)  # at least 12 sums at once
    with emit.loop_with_end(steps) as (step, end):
        prepare(step)
        before, found = (emit.at(builder.load(v)) for v in (now, after))
        sums = {(i, j, n): emit.variable(zero) for i, j in _ELEMENTS for n in chains}
        with emit.loop(quads) as quad:
            first = emit.times(builder.add(emit.times(step, quads), quad), QUAD)
            ys = emit.place(y, emit.times(first, COLUMNS))
            for k in range(QUAD):
                right = {j: emit.load(emit.place(ys, k * COLUMNS + j)) for j in HALVES}
                for i, row in enumerate(rows):
                    left = emit.load_all_equal(emit.place(row, first, k))
                    for j in HALVES:
                        at = i, j, k % len(chains)
                        emit.put(sums[at], left.times_plus(right[j], emit.get(sums[at])))
        for i, j in _ELEMENTS:
            total = functools.reduce(Vector.__add__, [emit.get(sums[i, j, n]) for n in chains])
            # Last, for the step before may not be done with it.
            total = total + emit.load(emit.place(before, i * COLUMNS + j))
            emit.store(total, emit.place(totals, i * COLUMNS + j))
        sizes = emit.variable(zero)
        builder.store(emit.integer(0), unknown)
        # A loop, so that processors have registers for what is constant in it.
        with emit.loop(emit.integer(BAND)) as row:
            for j in HALVES:
                at = builder.add(emit.times(row, COLUMNS), emit.integer(j))
                total = emit.load(emit.place(totals, at))
                size = total.size()
                reach = reach_of(size, step, row, j)
                exact = room
                if grid is not None:
                    value = emit.load(emit.place(before, at))
                    exact = room.larger(grid(value, step, row, j))
                error = (reach < exact).where(zero, reach * share)
                # Twice the error: below a power of two, where last places are half as large, a sum
                # that is not to become that power is so far from it that these differ.
                beside = beside_which_float32(emit, size)
                lowest, highest = total - error + beside, total + error + beside
                emit.store(lowest - beside, emit.place(found, at))
                emit.put(sizes, size + emit.get(sizes))
                differ = builder.shl((~lowest.equals(highest)).bits(), at)
                builder.store(builder.or_(builder.load(unknown), differ), unknown)
        with emit.when((~(emit.get(sizes) < most)).bits()):  # or if it is no number
            with emit.loop(emit.integer(BAND * COLUMNS // LANES)) as index:
                at = emit.times(index, LANES)
                total, place = emit.load(emit.place(totals, at)), emit.place(found, at)
                size = total.size()
                finite = size < infinity
                emit.store(finite.where(emit.load(place), total), place)
                bits = builder.or_(builder.load(unknown), builder.shl((most < size).bits(), at))
                none = builder.shl((~finite).bits(), at)
                builder.store(builder.and_(bits, builder.not_(none)), unknown)
        with emit.when(builder.load(unknown)):
            builder.store(step, done)
            end()
        other = builder.load(now)
        builder.store(builder.load(after), now)
        builder.store(other, after)
    with builder.if_then(builder.icmp_unsigned("!=", builder.load(now), c)):
        # C is in `out`, and what is told of the next step in C.
        for i, j in _ELEMENTS:
            places = [emit.place(emit.at(v), i * COLUMNS + j) for v in (c, out)]
            values = [emit.load(place) for place in places]
            for place, value in zip(places, reversed(values), strict=True):
                emit.store(value, place)
    return builder.load(unknown)


@inline(result=True)
def bounded_by_sizes(
    emit: Emitter, sums: Any, apart: Any, tops: Any, powers: Any, *operands: Any
) -> Any:
    """See `_bounded`.

    Args:
        sums, tops: of the rows, so many doubles `apart`, and `[steps, COLUMNS]`, by
            `sums_of_rows` and `tops_of_columns`, from the first step on.
        powers: where bounds of products may be written, `[BAND, COLUMNS]`.
    """
    sums, tops, places = (emit.at(v) for v in (sums, tops, powers))

    def reach_of(size: Vector, step: Any, row: Any, j: int) -> Vector:
        top = emit.load(emit.place(tops, emit.times(step, COLUMNS), j))
        total = top * emit.load_all_equal(emit.place(sums, emit.times(row, apart), step))
        emit.store(total, emit.place(places, emit.times(row, COLUMNS), j))
        return total.times_plus(emit.number(2.0), size)

    return _bounded(emit, *operands, reach_of=reach_of)


def _by_exponents(
    emit: Emitter, of_x: Any, of_y: Any, powers: Any, *operands: Any, grid: _Grid | None = None
) -> Any:
    stride, quads = operands[1], operands[7]
    places, builder = emit.at(powers), emit.builder
    count = emit.times(quads, QUAD)
    eight = emit.all_equal(builder.uitofp(emit.times(count, 8), emit.element))

    def prepare(step: Any) -> None:
        k = emit.times(emit.times(step, count), 2)
        here = builder.add(of_x, k), stride, builder.add(of_y, emit.times(k, COLUMNS))
        find_powers(emit, *here, quads, powers)

    def reach_of(size: Vector, step: Any, row: Any, j: int) -> Vector:
        return emit.load(emit.place(places, emit.times(row, COLUMNS), j)).times_plus(eight, size)

    return _bounded(emit, *operands, reach_of=reach_of, prepare=prepare, grid=grid)


@inline(result=True)
def bounded_by_exponents(emit: Emitter, *operands: Any) -> Any:
    """See `_bounded`.

    Args:
        of_x, of_y: exponents of x and y, from the first step on.
        powers: where the largest powers in products may be written, `[BAND, COLUMNS]`.
    """
    return _by_exponents(emit, *operands)


@inline(result=True)
def bounded_or_exact(emit: Emitter, x_grids: Any, count: Any, y_grids: Any, *operands: Any) -> Any:
    """As `bounded_by_exponents`, of which this takes the operands; and elements whose sums are
    exact are told, too, which takes longer: see `told_exactly`.

    Args:
        x_grids, count, y_grids: as there, but from the first step on.
    """
    x_grids, y_grids = emit.at(x_grids), emit.at(y_grids)

    def grid(before: Vector, step: Any, row: Any, j: int) -> Vector:
        of_x = emit.load_all_equal(emit.place(x_grids, emit.times(row, count), step))
        of_y = emit.load(emit.place(y_grids, emit.times(step, COLUMNS), j))
        return _exact_up_to(emit, of_x, of_y, before)

    return _by_exponents(emit, *operands, grid=grid)


def _exact_up_to(emit: Emitter, x_grid: Vector, y_grid: Vector, before: Vector) -> Vector:
    """Up to where FP64 has all sums of products of such multiples and of C."""
    # C is a multiple of its last place.
    of_c = (before.words() & emit.word(EXPONENT)).numbers() * emit.number(2.0**-23 * _WHOLE)
    return (x_grid * y_grid).smaller(of_c)


@inline(result=True)
def told_exactly(
    emit: Emitter,
    totals: Any,
    powers: Any,
    factor: Any,
    c: Any,
    x_grids: Any,
    count: Any,
    y_grids: Any,
    out: Any,
    unknown: Any,
) -> Any:
    """Of the elements of a step that are not told, those whose sums are exact, as they are not too
    large for what their terms are multiples of, into `out[BAND, COLUMNS]`; bits of the others.

    Args:
        totals, powers: as left by `bounded_by_exponents` or `bounded_by_sizes`; `factor` (its word)
            times a power is twice a bound on the sum of the sizes of the step's products.
        c: `[BAND, COLUMNS]` before the step.
        x_grids, y_grids: of the step, by `grids_of_rows`, so many doubles (`count`) apart, and by
            `grids_of_columns`.
    """
    builder = emit.builder
    totals, powers, c, out = (emit.at(v) for v in (totals, powers, c, out))
    x_grids, y_grids = emit.at(x_grids), emit.at(y_grids)
    factor = emit.all_equal(builder.bitcast(factor, emit.element))
    most, small = emit.number(LARGEST), emit.number(2 * LEAST)
    left = emit.integer_variable(0)
    builder.store(unknown, left)
    with emit.loop(emit.integer(BAND)) as row:
        of_row = emit.load_all_equal(emit.place(x_grids, emit.times(row, count)))
        for j in HALVES:
            at = builder.add(emit.times(row, COLUMNS), emit.integer(j))
            total, power, before = (emit.load(emit.place(v, at)) for v in (totals, powers, c))
            grid = _exact_up_to(emit, of_row, emit.load(emit.place(y_grids, j)), before)
            size, place = total.size(), emit.place(out, at)
            exact = (power.times_plus(factor, size) < grid) & ~(most < size)
            value = in_float32(emit, total, size < small)
            emit.store(exact.where(value, emit.load(place)), place)
            told = builder.not_(builder.shl(exact.bits(), at))
            builder.store(builder.and_(builder.load(left), told), left)
    return builder.load(left)
