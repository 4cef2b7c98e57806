"""Exact step sums on a CPU's own vectors, compiled by numba: `[batch, m, k] x [batch, k, n]`.

The same results as `kernels.exact`, bit for bit, for units that add the products of a step and C
exactly and round once to nearest even. The result is cut into tiles whose accumulators are doubles
in a cache, each of which is added up along all of k, a block of k after the other. In a block every
`ROWS x COLUMNS` elements go one of these ways:

- plain, where the operands' exponents prove that no FP64 sum of the block can round, so that the
  only rounding is the one to FP32 that the unit makes;
- carefully, step by step, where they do not (`kernels.native_careful`).

The arithmetic of both is in `kernels.native_steps` and the files named there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kernels import native_steps as steps_of
from kernels.native_careful import careful
from kernels.native_extents import extent_of_columns, extent_of_rows, grid_of, power_of
from kernels.native_fixed_point import DIGITS
from kernels.native_operands import GROUP, address, bytes_of, decoded, read_doubles
from kernels.native_steps import BAND, COLUMNS, EXPONENT, LARGEST, LEAST, NONE, QUAD, ROWS
from kernels.vectors import COMPILED, INLINED, LANES, pointer

_BLOCK = 128  # products of a block, about
_HEIGHT = 256  # rows of a tile
_WIDTH = 256  # columns of a tile


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


# Tiles.


@njit(**COMPILED)
def _room(last: float) -> float:
    """Up to where FP64 has all multiples of `last`, or of half of it where that is below FP32's
    normal numbers: rounding at most doubles such a sum.
    """
    return last * (2.0**53 if last >= LEAST else 2.0**52)


@njit(**COMPILED)
def _buffers(rows: int, columns: int, length: int, padded: int) -> Any:
    """What a thread needs for tiles of at most this size and blocks of `length` products."""
    rows, columns = -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS
    steps = length // padded
    return (
        np.empty(rows * columns),  # 0: C
        np.empty(rows * length),  # 1: x
        np.empty(columns // COLUMNS * _apart(length)),  # 2: y
        np.empty((rows // ROWS, ROWS * length), np.int16),  # 3: exponents of x
        np.empty((columns // COLUMNS, length * COLUMNS), np.int16),  # 4: of y
        np.empty(max(length, LANES)),  # 5: a row
        np.empty(ROWS * COLUMNS),  # 6: results of a step
        np.empty(DIGITS, np.int64),  # 7: digits of a sum
        np.empty(4 * BAND * COLUMNS),  # 8: parts
        np.empty((rows // ROWS) * (columns // COLUMNS)),  # 9: what all of C is a multiple of
        np.empty((rows // ROWS + columns // COLUMNS, 3)),  # 10: extents of groups
        np.empty(2 * LANES),  # 11: what is measured of a group
        np.zeros(ROWS * COLUMNS),  # 12: C before the first step, if there is none
        np.empty(((rows // ROWS) * (columns // COLUMNS), 2), np.int64),  # 13: words of C's sizes
        np.empty(((rows // ROWS) * (columns // COLUMNS), ROWS // BAND, 4), np.int64),  # 14: pauses
        np.empty(1, np.int64),  # 15: how many steps are done
        (  # 16: of x: whether exponents, sums and grids of a group are known; these
            np.empty((3, rows // BAND), np.int64),
            np.empty((2, rows * steps)),
        ),
        (  # 17: of a group of y: whether exponents, tops, grids and columns are known; these
            np.empty(4, np.int64),
            np.empty((2, steps * COLUMNS)),
            np.empty(length * COLUMNS),
        ),
        np.empty((rows // ROWS) * (columns // COLUMNS), np.bool_),  # 18: is a group of C in FP32
    )


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
    c, x, y, x_exponents, y_exponents, one_row, results, digits, parts = buffers[:9]
    held, extents, measured, nothing, words_of_c, pauses, done = buffers[9:16]
    (x_flags, x_bounds), (y_flags, y_bounds, y_columns), finished = buffers[16:]
    row_groups, column_groups = -(-rows // ROWS), -(-columns // COLUMNS)
    quads = padded // QUAD
    unit = 2.0 ** (1 - significand)
    number = -(-k // products)
    block = max(1, _BLOCK // padded)
    scratch = (
        address(results, 0),
        address(digits, 0),
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
            norm, least = extent_of_rows(at_x + 8 * g * length * ROWS, length, measured)
            extents[g, 0], extents[g, 1], extents[g, 2] = norm, least, 0
        for g in range(column_groups):
            norm, least = extent_of_columns(at_y + 8 * g * _apart(length), length, measured)
            h = row_groups + g
            extents[h, 0], extents[h, 1], extents[h, 2] = norm, least, 0
        x_flags[...] = 0
        for jg in range(column_groups):
            h = row_groups + jg
            y_flags[:] = 0
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
                last = NONE if least == -1 else power_of(least + 1) * 2.0**-23
                of_c = max(held[index], last, 2.0**-149)
                last = min(of_c, extents[ig, 1] * extents[h, 1] * unit**2)
                small = found == 0 and reach < 2.0**127
                if not small or reach > _room(last):  # operands may have fewer bits than they could
                    if extents[ig, 2] == 0:
                        extents[ig, 2] = grid_of(xs, ROWS * length, measured)
                    if extents[h, 2] == 0:
                        extents[h, 2] = grid_of(ys, length * COLUMNS, measured)
                    last = min(of_c, extents[ig, 2] * extents[h, 2])
                held[index] = last
                if small and reach <= _room(last):
                    operands = xs, length, ys, before, steps, quads
                    if last < LEAST:
                        steps_of.plain_of_any((here, words, *operands))
                        continue
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
                word = np.float64(last).view(np.int64)
                at_flags = address(y_flags, 0)
                of_y = (
                    (at_flags, address(y_exponents[jg], 0)),
                    (at_flags + 8, address(y_bounds, 0)),
                    (at_flags + 16, address(y_bounds, y_bounds.shape[1])),
                    (at_flags + 24, address(y_columns, 0)),
                )
                for part in range(0, ROWS, BAND):
                    row = ig * ROWS + part
                    at_flags, apart = address(x_flags, row // BAND), 8 * x_flags.shape[1]
                    of_x = (
                        (at_flags, address(x_exponents[ig], part * length)),
                        (at_flags + apart, address(x_bounds, row * steps)),
                        (at_flags + 2 * apart, address(x_bounds, row * steps + x_bounds.shape[1])),
                    )
                    of_part = address(x, row * length), length, ys, of_x, of_y, word, padded
                    pause = pauses[index, part // BAND]
                    careful(of_part, here + 8 * part * COLUMNS, steps, pause, done, scratch)


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


@njit(**INLINED)
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
    products, significand, saturates, nan, _ = options
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
        steps_of.constants(padded, LARGEST if saturates != 0 else np.inf),
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
