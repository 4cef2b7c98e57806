"""Exact step sums on a CPU's own vectors, compiled by numba: `[batch, m, k] x [batch, k, n]`.

The same results as `kernels.exact`, bit for bit, for units that add the products of a step and C
exactly and round once to nearest even. The result is cut into tiles whose accumulators are doubles
in a cache, each of which is added up along all of k, a block of k after the other. In a block every
`ROWS x COLUMNS` elements go one of these ways:

- plain, where the operands' exponents prove that no FP64 sum of the block can round, so that the
  only rounding is the one to FP32 that the unit makes;
- directed, by two sums of a step, one of which is rounded down and the other up: if both are the
  same in FP32, so is the exact sum;
- in two parts, for the elements in which it is not: a first sum takes of every term what is a
  multiple of a power of two that it can hold exactly, and two directed ones take the rests;
- in as many parts as it takes, for what is still in doubt.

These ways are in `kernels.native_steps`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import carray, njit

from kernels import native_steps as steps_of
from kernels.native_operands import GROUP, address, bytes_of, decoded, read_doubles
from kernels.native_steps import COLUMNS, EXPONENT, LEAST, NONE, PART, QUAD, ROWS
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_BLOCK = 128  # products of a block, about
_HEIGHT = 256  # rows of a tile
_WIDTH = 256  # columns of a tile

_LARGEST = float(np.finfo(np.float32).max)
_FRACTION = (1 << 52) - 1
_PATIENCE = 63  # steps at most before directed sums are tried again


# Operands.


@njit(**COMPILED)
def _pack_rows(
    a: int, form: Any, i0: int, rows: int, k: int, k0: int, steps: int, shape: Any, x: Any, row: Any
) -> None:
    """Doubles `x[rows, steps padded]` of rows and steps of the matrix `[m, k]` at `a`; the last
    group's rows are filled up with zeros.
    """
    products, padded = shape
    count = min(steps * products, k - k0)
    length = steps * padded
    groups = -(-rows // ROWS)
    at_x, at_row = address(x, 0), address(row, 0)
    if count < length or rows < groups * ROWS:
        x[: groups * length * ROWS] = 0
    for i in range(rows):
        source = a + ((i0 + i) * k + k0) * bytes_of(form)
        start = i * length
        if products == padded:
            read_doubles(source, form, count, at_x + 8 * start, GROUP)
        else:
            read_doubles(source, form, count, at_row, GROUP)
            for index in range(count):
                x[start + index // products * padded + index % products] = row[index]


@njit(**COMPILED)
def _apart(length: int) -> int:
    """Doubles of a group of columns and of a gap: multiples of a power of two, all groups would be
    in the same few places of a cache.
    """
    return (length + 1) * COLUMNS


@njit(**COMPILED)
def _pack_columns(
    b: int,
    form: Any,
    j0: int,
    columns: int,
    k: int,
    n: int,
    k0: int,
    steps: int,
    shape: Any,
    y: Any,
) -> None:
    """Doubles `y[groups, steps padded, COLUMNS]` of columns and steps of `[k, n]` at `b`, with
    groups `_apart`.
    """
    products, padded = shape
    count = min(steps * products, k - k0)
    length = steps * padded
    groups = -(-columns // COLUMNS)
    at_y = address(y, 0)
    if count < length or columns < groups * COLUMNS:
        y[: groups * _apart(length)] = 0
    for index in range(count):
        source = b + ((k0 + index) * n + j0) * bytes_of(form)
        place = index // products * padded + index % products
        read_doubles(source, form, columns, at_y + 8 * place * COLUMNS, _apart(length))


@njit(**COMPILED)
def _power_of(magnitude: int) -> float:
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
def _extent_of_rows(x: Any, start: int, length: int, found: Any) -> tuple[float, float]:
    """Of a group `x[ROWS, length]` from `start` on: a bound on the rows' Euclidean norms, none of
    which is finite that has an infinity (a NaN may go unnoticed, for plain sums heed it), and a
    power of two that is not above any size but 0.
    """
    _measured_rows((address(x, start), length, address(found, 0)))
    square, least = 0.0, _least(found)
    for lane in range(LANES):
        square += found[lane]
    for index in range(length // LANES * LANES, length):
        most = 0.0
        for i in range(ROWS):
            size = abs(x[start + i * length + index])
            most = max(most, size) if size == size else np.inf
            least = min(least, size if size > 0 else np.inf)
        square += most * most
    return _extent(square, least)


@njit(**COMPILED)
def _extent_of_columns(y: Any, start: int, length: int, found: Any) -> tuple[float, float]:
    """As `_extent_of_rows`, of the columns of `y[length, COLUMNS]`."""
    _measured_columns((address(y, start), length, address(found, 0)))
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
    power = _power_of(np.float64(least).view(np.int64)) if least < np.inf else NONE
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
def _bounds_of_rows(
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
def _bounds_of_columns(
    emit: Emitter, y: Any, length: Any, steps: Any, padded: Any, unit: Any, tops: Any, sizes: Any
) -> None:
    """As `_bounds_of_rows`, of the columns of `y[length, COLUMNS]`, for any steps."""
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
def _bounds_of_short_steps(
    x: int, length: int, steps: int, padded: int, unit: float, tops: Any, sizes: Any
) -> None:
    """As `_bounds_of_rows`, for any steps."""
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
                    tops[step, i] = max(tops[step, i], 2 * _power_of(size))
            sizes[k] = 2 * _power_of(most)
            sizes[length + k] = _power_of(least) * unit if most < EXPONENT else 0.0


# Tiles.


@njit(**COMPILED)
def _buffers(rows: int, columns: int, length: int, padded: int) -> Any:
    """What a thread needs for tiles of at most this size and blocks of `length` products."""
    rows, columns = -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS
    steps = length // padded
    return (
        np.empty(rows * columns),  # 0: C
        np.empty(rows * length),  # 1: x
        np.empty(columns // COLUMNS * _apart(length)),  # 2: y
        (  # 3: tops and sizes of x
            np.empty((rows // ROWS, steps, ROWS)),
            np.empty((rows // ROWS, 2 * length)),
        ),
        (  # 4: of y
            np.empty((columns // COLUMNS, steps, COLUMNS)),
            np.empty((columns // COLUMNS, 2 * length)),
        ),
        np.empty(max(length, LANES)),  # 5: a row
        np.empty(2 * PART * COLUMNS),  # 6: results of a step, in two ways
        np.empty((padded + 1) * COLUMNS),  # 7: terms
        np.empty(20 * COLUMNS),  # 8: parts
        np.empty((rows // ROWS) * (columns // COLUMNS)),  # 9: what all of C is a multiple of
        np.empty((rows // ROWS + columns // COLUMNS, 3)),  # 10: extents of groups
        np.empty(2 * LANES),  # 11: what is measured of a group
        np.zeros(ROWS * COLUMNS),  # 12: C before the first step, if there is none
        np.empty(((rows // ROWS) * (columns // COLUMNS), 2), np.int64),  # 13: words of C's sizes
        np.empty(((rows // ROWS) * (columns // COLUMNS), ROWS // PART, 2), np.int64),  # 14: pauses
        np.empty(1, np.int64),  # 15: how many steps are done
        np.empty((rows // ROWS) * (columns // COLUMNS), np.bool_),  # 16: is a group of C in FP32
    )


@njit(**COMPILED)
def _many_parts(
    x: int, y: int, c: int, out: int, unknown: int, padded: int, scratch: tuple[int, int, int]
) -> None:
    """`out[COLUMNS]`, where unknown: a step of one row, whatever the terms."""
    terms, parts, needed = scratch
    steps_of.terms((x, y, c, terms, padded))
    count = 0
    while steps_of.part((terms, padded + 1, parts + 8 * count * COLUMNS, needed)) != 0:
        count += 1
    steps_of.sum_of_parts((parts, max(count, 1), out, unknown, needed))


@njit(**COMPILED)
def _careful_steps(in_parts: bool, operands: Any, c: int, first: int, steps: int, ends: Any) -> int:
    """Steps of C[PART, COLUMNS] from the first one on, directed or in two parts, as
    `native_steps._steps` has it.
    """
    x, stride, y, tops, sizes, padded = operands
    out, done, needed = ends
    k = 8 * first * padded
    of_steps = x + k, stride, y + k * COLUMNS, tops[0] + 8 * first * ROWS
    others = tops[1] + 8 * first * COLUMNS, c, steps, out, done, padded // QUAD, needed
    if in_parts:
        return int(steps_of.two_parts((*of_steps, *others, sizes[0] + k, sizes[1] + k)))
    return int(steps_of.directed((*of_steps, *others)))


@njit(**COMPILED)
def _careful_part(operands: Any, c: int, steps: int, pause: Any, done: Any, scratch: Any) -> None:
    """The steps of a block of C[PART, COLUMNS], whatever the operands. `pause` has how many steps
    to go before directed sums are tried again, and how many it was.
    """
    x, length, y, _, _, padded = operands
    out, other, terms, parts, needed = scratch
    step, unknown, in_parts = 0, 0, False
    while step < steps:
        again = unknown != 0  # the step that one way did not tell, the other way
        in_parts = not in_parts if again else pause[0] > 0
        count = 1 if again else min(pause[0], steps - step) if in_parts else steps - step
        ends = other if again else out, int(done.ctypes.data), needed
        found = _careful_steps(in_parts, operands, c, step, count, ends)
        if not again:
            unknown = found
            step += done[0]
            if in_parts:
                pause[0] = pause[0] - done[0] if done[0] > 0 else 0
            else:
                pause[1] = min(4 * pause[1] + 3, _PATIENCE) if done[0] == 0 else 0
                pause[0] = pause[1]
            continue
        if found != 0:  # else C is the result
            steps_of.merge((out, other, unknown))
            unknown &= found
            for i in range(PART):
                bits = unknown >> (COLUMNS * i) & ((1 << COLUMNS) - 1)
                if bits != 0:
                    xs = x + 8 * (i * length + step * padded)
                    ys = y + 8 * step * padded * COLUMNS
                    row, result = c + 8 * i * COLUMNS, out + 8 * i * COLUMNS
                    _many_parts(xs, ys, row, result, bits, padded, (terms, parts, needed))
            steps_of.write((out, c))
        step, unknown = step + 1, 0


@njit(**COMPILED)
def _tile(
    a: int,
    b: int,
    form: Any,
    k: int,
    n: int,
    corner: Any,
    size: Any,
    shape: Any,
    significand: int,
    has_c: bool,
    buffers: Any,
    constants: Any,
) -> None:
    """C of a tile after all steps, in `buffers[0]`: `C[ROWS, COLUMNS]` after the other, by columns.
    `buffers` has last which of them are FP32 numbers already.
    """
    i0, j0 = corner
    rows, columns = size
    products, padded = shape
    c, x, y, (x_tops, x_sizes), (y_tops, y_sizes), one_row, results, terms, parts = buffers[:9]
    held, extents, measured, nothing, words_of_c, pauses, done, finished = buffers[9:]
    row_groups, column_groups = -(-rows // ROWS), -(-columns // COLUMNS)
    quads = padded // QUAD
    unit = 2.0 ** (1 - significand)
    word = np.float64(unit).view(np.int64)
    number = -(-k // products)
    block = max(1, _BLOCK // padded)
    scratch = (
        address(results, 0),
        address(results, PART * COLUMNS),
        address(terms, 0),
        address(parts, 0),
        address(constants, 0),
    )
    at_c, at_x, at_y = address(c, 0), address(x, 0), address(y, 0)
    at_nothing, at_words = address(nothing, 0), address(words_of_c, 0)
    count = row_groups * column_groups
    held[:count], pauses[:count], finished[:count] = 0, 0, False
    words_of_c[:count, 0], words_of_c[:count, 1] = EXPONENT if has_c else 0, -1
    for first in range(0, number, block):
        steps = min(block, number - first)
        length = steps * padded
        _pack_rows(a, form, i0, rows, k, first * products, steps, shape, x, one_row)
        _pack_columns(b, form, j0, columns, k, n, first * products, steps, shape, y)
        for g in range(row_groups):
            norm, least = _extent_of_rows(x, g * length * ROWS, length, measured)
            extents[g, 0], extents[g, 1], extents[g, 2] = norm, least, 0
        for g in range(column_groups):
            norm, least = _extent_of_columns(y, g * _apart(length), length, measured)
            h = row_groups + g
            extents[h, 0], extents[h, 1], extents[h, 2] = norm, least, 0
        for jg in range(column_groups):
            h = row_groups + jg
            for ig in range(row_groups):
                index = jg * row_groups + ig
                here, words = at_c + 8 * index * ROWS * COLUMNS, at_words + 16 * index
                xs, ys = at_x + 8 * ig * length * ROWS, at_y + 8 * jg * _apart(length)
                before, found, settled = here, 0, False
                if first == 0 and not has_c:
                    before = at_nothing
                if words_of_c[index, 0] >= EXPONENT:
                    found = steps_of.sizes((here, words))
                    if found == ROWS * COLUMNS:
                        continue  # none is a number, and none will be
                    settled = (found & 0xFFFFFFFF) + (found >> 32) == ROWS * COLUMNS
                most, least = words_of_c[index, 0], words_of_c[index, 1]
                reach = np.int64(most).view(np.float64) + extents[ig, 0] * extents[h, 0]
                # C is a multiple of what its terms were, and of the last place of its least size.
                last = NONE if least == -1 else _power_of(least + 1) * 2.0**-23
                last = min(max(held[index], last), extents[ig, 1] * extents[h, 1] * unit**2)
                held[index] = last
                enough = found == 0 and last >= LEAST and reach < 2.0**127
                if enough and reach <= 2.0**53 * last:
                    operands = xs, length, ys, before, steps, quads
                    if first + steps == number:
                        finished[index] = steps_of.plain_last((here, *operands)) == 0
                    if not finished[index]:
                        steps_of.plain((here, words, *operands))
                    continue
                if settled:  # none is finite, so nothing is rounded
                    steps_of.plain((here, words, xs, length, ys, here, 1, steps * quads))
                    continue
                words_of_c[index, 0] = EXPONENT
                if before == at_nothing:
                    c[index * ROWS * COLUMNS : (index + 1) * ROWS * COLUMNS] = 0
                if extents[ig, 2] == 0:
                    extents[ig, 2] = 1
                    if padded % LANES == 0:
                        ends = address(x_tops[ig], 0), address(x_sizes[ig], 0)
                        _bounds_of_rows((xs, length, steps, padded, word, *ends))
                    else:
                        arrays = x_tops[ig], x_sizes[ig]
                        _bounds_of_short_steps(xs, length, steps, padded, unit, *arrays)
                if extents[h, 2] == 0:
                    extents[h, 2] = 1
                    ends = address(y_tops[jg], 0), address(y_sizes[jg], 0)
                    _bounds_of_columns((ys, length, steps, padded, word, *ends))
                for part in range(0, ROWS, PART):
                    tops = address(x_tops[ig], part), address(y_tops[jg], 0)
                    sizes = address(x_sizes[ig], 0), address(y_sizes[jg], 0)
                    xs = address(x, (ig * ROWS + part) * length)
                    of_part = xs, length, ys, tops, sizes, padded
                    rows_of_c = here + 8 * part * COLUMNS
                    pause = pauses[index, part // PART]
                    _careful_part(of_part, rows_of_c, steps, pause, done, scratch)


@njit(**COMPILED)
def cut(shape: Any, tiles: int, group: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile of a result `[batch, m, n]`, in whole groups; about so many tiles,
    if that is worth it.
    """
    batch, m, n = shape
    rows, columns = -(-m // _HEIGHT), -(-n // _WIDTH)
    while batch * rows * columns < tiles and max(m // rows, n // columns) > 64:
        if m // rows > n // columns:
            rows *= 2
        else:
            columns *= 2
    height, width = -(-m // rows), -(-n // columns)
    return -(-height // group[0]) * group[0], -(-width // group[1]) * group[1]


@njit(**COMPILED)
def place_of(number: int, tile: tuple[int, int], m: int, n: int) -> Any:
    """Of the tile of that number: its matrix, its first row and column, and its size."""
    columns = -(-n // tile[1])
    rest, column = divmod(number, columns)
    matrix, row = divmod(rest, -(-m // tile[0]))
    corner = row * tile[0], column * tile[1]
    return matrix, corner, (min(tile[0], m - corner[0]), min(tile[1], n - corner[1]))


@njit(**COMPILED)
def buffers_for(tile: tuple[int, int], products: int) -> Any:
    """What a thread needs to compute such tiles, one after the other."""
    padded = -(-products // QUAD) * QUAD
    return _buffers(tile[0], tile[1], max(1, _BLOCK // padded) * padded, padded)


@njit(**COMPILED)
def compute(
    a: int,
    b: int,
    k: int,
    c: Any,
    out: Any,
    form: Any,
    options: Any,
    number: int,
    tile: Any,
    buffers: Any,
) -> None:
    """Tile `number` of `out[batch, m, n]`, FP32 words.

    Args:
        a, b: addresses of `[batch, m, k]` and `[batch, k, n]`; no size is 0.
        form: of their numbers, see `kernels.native_operands`.
        c: FP32 words `[batch, m, n]`, or of size 0 for +0.
        options: products of a step, significant bits of an operand, whether overflow saturates,
            and the word of a NaN.
        tile: its rows and columns (`cut`).
        buffers: `buffers_for` these.
    """
    _, m, n = out.shape
    products, significand, saturates, nan = options
    padded = -(-products // QUAD) * QUAD
    matrix, corner, size = place_of(number, tile, m, n)
    _start(c, matrix, corner, size, buffers[0])
    _tile(
        a + matrix * m * k * bytes_of(form),
        b + matrix * k * n * bytes_of(form),
        form,
        k,
        n,
        corner,
        size,
        (products, padded),
        significand,
        c.size > 0,
        buffers,
        steps_of.constants(padded, _LARGEST if saturates != 0 else np.inf),
    )
    _finish(buffers[0], buffers[-1], corner, size, nan, out[matrix])


@njit(**COMPILED)
def _start(c: Any, matrix: int, corner: Any, size: Any, tile: Any) -> None:
    """The first accumulators of a tile, if they are given."""
    rows, columns = size
    if c.size == 0:
        return
    groups = -(-rows // ROWS)
    tile[: groups * -(-columns // COLUMNS) * ROWS * COLUMNS] = 0
    for i in range(rows):
        for j in range(columns):
            group = j // COLUMNS * groups + i // ROWS
            place = (group * ROWS + i % ROWS) * COLUMNS + j % COLUMNS
            tile[place] = decoded(c[matrix, corner[0] + i, corner[1] + j]) + 0.0


@njit(**COMPILED)
def _finish(tile: Any, finished: Any, corner: Any, size: Any, nan: int, out: Any) -> None:
    """A tile written into `out[m, n]`."""
    rows, columns = size
    row_groups, column_groups, n = -(-rows // ROWS), -(-columns // COLUMNS), out.shape[1]
    source, target = address(tile, 0), address(out, corner[0] * n + corner[1])
    for ig in range(row_groups):
        all_finished = columns % COLUMNS == 0
        for jg in range(column_groups):
            all_finished &= finished[jg * row_groups + ig]
        for i in range(min(ROWS, rows - ig * ROWS)):
            words = target + 4 * (ig * ROWS + i) * n
            if all_finished:
                first = source + 4 * (2 * ig * ROWS + i) * COLUMNS
                steps_of.write_row((first, 2 * row_groups * ROWS, column_groups, words))
                continue
            for jg in range(column_groups):
                index, count = jg * row_groups + ig, min(COLUMNS, columns - jg * COLUMNS)
                group, place = source + 8 * index * ROWS * COLUMNS, words + 4 * jg * COLUMNS
                if finished[index]:
                    _copy(group + 4 * i * COLUMNS, count, place)
                else:
                    results(group + 8 * i * COLUMNS, count, 0.0, nan, place)


@njit(**COMPILED)
def _copy(source: int, count: int, target: int) -> None:
    """So many words from an address to another."""
    words = carray(pointer(source), (count,), np.uint32)
    copied = carray(pointer(target), (count,), np.uint32)
    for i in range(count):
        copied[i] = words[i]


@njit(**COMPILED)
def results(row: int, count: int, zero: float, nan: int, out: int) -> bool:
    """So many doubles at an address plus `zero`, which tells -0 from +0, as FP32 words to another;
    whether any is no number, whose word is `nan`.
    """
    any_nan = False
    vectors = count // (2 * LANES)
    unusual = steps_of.to_words((row, out, vectors, np.float64(zero).view(np.int64)))
    first = 0 if unusual != 0 else vectors * 2 * LANES
    if first == count:
        return False
    numbers = carray(pointer(row), (count,), np.float64)
    words = carray(pointer(out), (count,), np.uint32)
    for i in range(first, count):
        value = numbers[i] + zero
        extent = abs(value)
        magnitude = np.int64(np.float32(extent).view(np.uint32))
        if extent < LEAST:
            magnitude = np.int64(extent * 2.0**149)
        word = magnitude | ((np.float64(value).view(np.int64) >> 63) & np.int64(1 << 31))
        if value != value:
            word, any_nan = np.int64(nan), True
        words[i] = np.uint32(word)
    return any_nan
