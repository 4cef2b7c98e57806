"""Ordinary numbers among which some are so small that only ties notice: their products apart.

For `kernels.native`. Of a group of rows or columns, what is at least a share of the largest numbers
is its main part, and all else but 0 is dust. A step has then four sums: products of main parts, of
dust of either operand with main parts of the other, and of dust with dust. Each is exact in FP64
where the operands' exponents prove it, though all together would not be.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit

from kernels.native_extents import extent_of_columns, extent_of_rows, power_of
from kernels.native_steps import (
    COLUMNS,
    ELEMENTS,
    HALVES,
    LEAST,
    PART,
    ROWS,
    Variables,
    in_24_bits,
    rows_of,
    to_subnormal,
)
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_SHARE = 2.0**-21  # of a norm: what is smaller is dust

_BELOW_FP32 = (1 << 29) - 1  # bits of a double that FP32 does not have
_HALF_OF_IT = 1 << 28

# What is known of a group: whether it is split (0: not asked yet); norms and least sizes.
SPLIT, MAIN, LEAST_MAIN, DUST, LEAST_DUST, KNOWN = range(6)
_NO, _YES = 1, 2


def _split(
    emit: Emitter, source: Any, targets: tuple[Any, Any], threshold: Vector, bits: Vector
) -> Vector:
    """A vector's main part and its dust to memory; the bits where there is any."""
    zero = emit.number(0.0)
    number = emit.load(source)
    small = number.size() < threshold  # a NaN is not
    dust = small.where(number, zero)
    emit.store(small.where(zero, number), targets[0])
    emit.store(dust, targets[1])
    return (zero < dust.size()).where(bits, emit.word(0))


@inline(result=False)
def _split_rows(
    emit: Emitter,
    x: Any,
    length: Any,
    steps: Any,
    padded: Any,
    threshold: Any,
    main: Any,
    dust: Any,
    masks: Any,
) -> None:
    """`x[ROWS, length]`, steps of whole vectors, in two parts: what has at least the size
    `threshold` (its word), and what is smaller. Of `masks[steps, ROWS]`, bit k is set if product k
    of that step, of 64 at most, has dust.
    """
    builder = emit.builder
    limit = emit.all_equal(builder.bitcast(threshold, emit.element))
    masks = builder.inttoptr(masks, ir.IntType(64).as_pointer())
    lanes = Vector(builder, ir.Constant(emit.word(0).value.type, [1 << i for i in range(LANES)]))
    with emit.loop(steps) as step:
        for i in range(ROWS):
            found = emit.variable(emit.word(0))
            with emit.loop(builder.udiv(padded, emit.integer(LANES))) as vector:
                first = emit.times(vector, LANES)
                at = builder.add(emit.times(step, padded), first)
                here = [emit.place(emit.at(v), emit.times(length, i), at) for v in (x, main, dust)]
                bit = lanes.shifted_up(emit.all_words_equal(first))
                bits = _split(emit, here[0], (here[1], here[2]), limit, bit)
                emit.put(found, emit.get(found) | bits)
            place = emit.place(masks, emit.times(step, ROWS), i)
            builder.store(emit.get(found).any_word(), place)


@inline(result=False)
def _split_columns(
    emit: Emitter,
    y: Any,
    steps: Any,
    padded: Any,
    threshold: Any,
    main: Any,
    dust: Any,
    masks: Any,
) -> None:
    """As `_split_rows`, of `y[length, COLUMNS]` and `masks[steps, COLUMNS]`, for any steps."""
    builder = emit.builder
    limit = emit.all_equal(builder.bitcast(threshold, emit.element))
    with emit.loop(steps) as step:
        for j in range(0, COLUMNS, LANES):
            found = emit.variable(emit.word(0))
            with emit.loop(padded) as product:
                at = emit.times(builder.add(emit.times(step, padded), product), COLUMNS)
                here = [emit.place(emit.at(v), at, j) for v in (y, main, dust)]
                bit = emit.word(1).shifted_up(emit.all_words_equal(product))
                bits = _split(emit, here[0], (here[1], here[2]), limit, bit)
                emit.put(found, emit.get(found) | bits)
            place = emit.place(emit.at(masks), emit.times(step, COLUMNS), j)
            emit.store(emit.get(found).numbers(), place)


@njit(**COMPILED)
def split_rows(x: int, norm: float, steps: int, padded: int, parts: Any, measured: int) -> None:
    """A group of rows in two parts, and what is known of it afterwards.

    Args:
        x, measured: addresses, as for `extent_of_rows`.
        norm: a bound on the rows' norms.
        parts: addresses of what becomes the main part, the dust, its masks, and what is known.
    """
    known = _known(parts)
    known[SPLIT] = _NO
    if padded % LANES == 0 and 0 < norm < 2.0**128:
        length = steps * padded
        found = carray(pointer(measured), (2 * LANES,), np.float64)
        _split_rows((x, length, steps, padded, _threshold(norm), *parts[:3]))
        for i in range(2):  # main parts and dust
            at = 2 * i
            known[MAIN + at], known[LEAST_MAIN + at] = extent_of_rows(parts[i], length, found)
        known[SPLIT] = _YES


@njit(**COMPILED)
def split_columns(y: int, norm: float, steps: int, padded: int, parts: Any, measured: int) -> None:
    """As `split_rows`, of columns."""
    known = _known(parts)
    known[SPLIT] = _NO
    if 0 < norm < 2.0**128:
        length = steps * padded
        found = carray(pointer(measured), (2 * LANES,), np.float64)
        _split_columns((y, steps, padded, _threshold(norm), *parts[:3]))
        for i in range(2):  # main parts and dust
            at = 2 * i
            known[MAIN + at], known[LEAST_MAIN + at] = extent_of_columns(parts[i], length, found)
        known[SPLIT] = _YES


@njit(**COMPILED)
def _known(parts: Any) -> Any:
    return carray(pointer(parts[3]), (KNOWN,), np.float64)


@njit(**COMPILED)
def _threshold(norm: float) -> int:
    """The word of the least size of a main part."""
    share = np.float64(_SHARE * power_of(np.float64(norm).view(np.int64)))
    return int(share.view(np.int64))


@njit(**COMPILED)
def proof_of_parts(x_parts: Any, y_parts: Any, sums: Any) -> tuple[float, float]:
    """Of two groups, what C stays a multiple of, and from which size on dust makes no difference to
    a sum but in a tie. Both are 0 if it is not proved that sums of each kind are exact, and that
    dust is below what main parts are multiples of.

    Args:
        x_parts, y_parts: as for `split_rows`.
        sums: a bound on all sums of a step, what C is a multiple of, and the last place of a
            product of two powers of two.
    """
    reach, c_grid, last_place = sums
    x, y = _known(x_parts), _known(y_parts)
    if x[SPLIT] != _YES or y[SPLIT] != _YES or x[DUST] + y[DUST] == 0:
        return 0.0, 0.0
    grid = min(c_grid, x[LEAST_MAIN] * y[LEAST_MAIN] * last_place)
    left, left_grid = x[DUST] * y[MAIN], x[LEAST_DUST] * y[LEAST_MAIN] * last_place
    right, right_grid = x[MAIN] * y[DUST], x[LEAST_MAIN] * y[LEAST_DUST] * last_place
    both, both_grid = x[DUST] * y[DUST], x[LEAST_DUST] * y[LEAST_DUST] * last_place
    exact = reach <= 2.0**50 * grid and both <= 2.0**53 * both_grid
    exact = exact and left <= 2.0**53 * left_grid and right <= 2.0**53 * right_grid
    # The sum of left and right is rounded, but its sign is right, and it is 0 only if that is.
    exact = exact and both < min(left_grid, right_grid)
    if not exact or 2 * (left + right + both) >= grid:
        return 0.0, 0.0
    # So it is below a quarter of a last place; also of 2^-149, that of sums below 2^-126.
    return grid, 2.0**27 * (left + right + both)


@inline(result=True)
def with_dust(
    emit: Emitter,
    c: Any,
    x: Any,
    x_dust: Any,
    stride: Any,
    y: Any,
    y_dust: Any,
    x_masks: Any,
    y_masks: Any,
    steps: Any,
    padded: Any,
    least: Any,
    subnormal: Any,
) -> Any:
    """The steps of a block: C[PART, COLUMNS] += x y, rounded to FP32 after each; C stays as it was,
    and the result is not 0, if dust makes a difference to a sum that is no tie, or if a sum might
    be beyond FP32's numbers.

    A sum of main parts is a multiple of a grid (`proof_of_parts`), beside which it has some bits to
    spare. Where there is dust, it moves by a last place or two: a tie is none then, and nothing
    else changes.

    Args:
        x, x_dust: main parts and dust `[PART, steps products]`, with rows `stride` apart.
        y, y_dust: `[steps products, COLUMNS]`.
        x_masks, y_masks: `[steps, ROWS]` and `[steps, COLUMNS]`, of which products have dust.
        padded: products of a step.
        least: the word of the second result of `proof_of_parts`.
        subnormal: not 0 if sums that are not 0 might be below FP32's normal numbers.
    """
    builder, zero = emit.builder, emit.number(0.0)
    least = emit.all_equal(builder.bitcast(least, emit.element))
    rows, dusty_rows = (rows_of(emit, at, stride, PART) for at in (x, x_dust))
    c, y, y_dust, x_masks, y_masks = (emit.at(v) for v in (c, y, y_dust, x_masks, y_masks))
    sign, last_place = emit.word(1 << 63), emit.number(2.0**-52).words()
    places = {(i, j): emit.place(c, i * COLUMNS + j) for i, j in ELEMENTS}
    sums = {at: emit.variable(emit.load(place)) for at, place in places.items()}
    failed = emit.integer_variable(0)

    def add(step: Any, *kinds: tuple[list[Any], Any, Variables]) -> None:
        """Products of rows and columns to sums."""
        with emit.loop(padded) as product:
            index = builder.add(emit.times(step, padded), product)
            for rows, columns, to in kinds:
                at = emit.place(columns, emit.times(index, COLUMNS))
                factors = {j: emit.load(emit.place(at, j)) for j in HALVES}
                for i, row in enumerate(rows):
                    number = emit.load_all_equal(emit.place(row, index))
                    for j, factor in factors.items():
                        emit.put(to[i, j], number.times_plus(factor, emit.get(to[i, j])))

    with emit.loop(steps) as step:
        left, right = ({at: emit.variable(zero) for at in ELEMENTS} for _ in range(2))
        # Two of these sums at once, as all do not fit in every processor's registers.
        add(step, (rows, y, sums))
        add(step, (rows, y_dust, right), (dusty_rows, y, left))
        dust = {at: emit.variable(emit.get(left[at]) + emit.get(right[at])) for at in ELEMENTS}
        doubts, lost = {}, []
        for i, j in ELEMENTS:
            bits = emit.load_all_equal(emit.place(x_masks, emit.times(step, ROWS), i)).words()
            columns = emit.load(emit.place(y_masks, emit.times(step, COLUMNS), j)).words()
            some = ~(bits & columns).same_words(emit.word(0))  # products of dust with dust
            total, mixed = emit.get(sums[i, j]), emit.get(dust[i, j])
            tie = (total.words() & emit.word(_BELOW_FP32)).same_words(emit.word(_HALF_OF_IT))
            tie = tie | (total.size() < emit.number(LEAST))  # other places count there
            doubts[i, j] = some & tie & mixed.equals(zero)
            small = (total.size() < least) & (some | ~mixed.equals(zero))
            lost.append(small | (total.size() >= emit.number(2.0**127)))
        bits = functools.reduce(Vector.__or__, lost).bits()
        builder.store(builder.or_(builder.load(failed), bits), failed)
        with emit.when(functools.reduce(Vector.__or__, doubts.values()).bits()):
            both = {at: emit.variable(zero) for at in ELEMENTS}
            add(step, (dusty_rows, y_dust, both))
            for at, doubt in doubts.items():
                emit.put(dust[at], doubt.where(emit.get(both[at]), emit.get(dust[at])))
        for at, variable in sums.items():
            total, mixed = emit.get(variable), emit.get(dust[at])
            by = ((mixed.words() & sign) | last_place).numbers()
            moved = total.size().times_plus(by, total)
            emit.put(variable, mixed.equals(zero).where(total, moved))
        exact = {at: emit.get(variable) for at, variable in sums.items()}
        for at, total in exact.items():
            emit.put(sums[at], in_24_bits(emit, total))
        with emit.when(subnormal):
            for at, total in exact.items():
                small = total.size() < emit.number(LEAST)
                emit.put(sums[at], small.where(to_subnormal(emit, total), emit.get(sums[at])))
    with emit.unless(builder.load(failed)):
        for at, place in places.items():
            emit.store(emit.get(sums[at]), place)
    return builder.load(failed)
