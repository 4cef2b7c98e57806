"""Steps that cut their terms to a common grid, on a CPU's vectors, compiled by numba: `[batch, m,
k] x [batch, k, n]`.

The same results as `kernels.aligned`, bit for bit. Tiles of accumulators run through blocks of k,
`ROWS x COLUMNS` elements at once. Products of significands are exact in FP32, and so is what a
power of two makes of them; an instruction cuts that to the grid. Where the finite operands of a
block are not further apart than `RANGE` exponents, the power is the same for all products of a step
(`narrow`), else each one has its own (`wide`). The two are in `kernels.native_aligned_steps`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kernels import native
from kernels import native_aligned_steps as steps_of
from kernels.native_aligned_steps import RANGE, ROWS
from kernels.native_chain import (
    KNOWN,
    LEAST,
    MOST,
    SUBNORMAL,
    extent,
    pack_columns,
    pack_rows,
)
from kernels.native_chain_steps import COLUMNS, VECTOR, restore
from kernels.native_chain_steps import ROWS as PACKED_ROWS
from kernels.native_operands import address, bytes_of
from kernels.vectors import COMPILED, INLINED

_BLOCK = 128  # products of a block, about


@njit(**COMPILED)
def buffers_for(tile: tuple[int, int], products: int) -> Any:
    """What a thread needs to compute such tiles, one after the other."""
    rows, columns = -(-tile[0] // PACKED_ROWS) * PACKED_ROWS, -(-tile[1] // COLUMNS) * COLUMNS
    length = max(1, _BLOCK // products) * products
    return (
        np.empty(3 * rows * columns, np.uint32),  # 0: accumulators
        np.empty((2, rows * (length + VECTOR)), np.uint32),  # 1: values and exponents of x
        np.empty((2, columns * length), np.uint32),  # 2: of y
        np.empty(columns, np.uint32),  # 3: a row of C
        np.arange(max(rows, columns)),  # 4: in which order rows and columns are computed
        np.empty((2, KNOWN), np.int64),  # 5: what is known of x and y
        np.empty(rows, np.int64),  # 6: of groups of x: whether any value is infinite or NaN
    )


@njit(**COMPILED)
def _is_narrow(known: Any) -> bool:
    return known[SUBNORMAL] == 0 and known[MOST] - ((known[LEAST] >> 23) - 127) <= RANGE


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
        a, b, k, c, form, tile: as for `native.compute`.
        options: products of a step, the exponent of the least normal number of the operands' type,
            the grid's fraction bits and least exponent, and the word of a NaN.
        buffers: `buffers_for` these.
    """
    _, m, n = out.shape
    products, lowest, cut, floor, nan = options
    matrix, corner, size = native.place_of(number, tile, m, n)
    a += matrix * m * k * bytes_of(form)
    b += matrix * k * n * bytes_of(form)
    rows, columns = size
    row_groups, column_groups = -(-rows // ROWS), -(-columns // COLUMNS)
    width = column_groups * COLUMNS
    apart = row_groups * ROWS * width
    accumulators, x, y, line, order, known, x_special = buffers
    at_c, at_line = address(accumulators, 0), address(line, 0)
    at_x, at_xe = address(x[0], 0), address(x[1], 0)
    at_y, at_ye = address(y[0], 0), address(y[1], 0)
    before = steps_of.toward_zero(())
    line[:] = 0
    for i in range(row_groups * ROWS):
        if c.size > 0 and i < rows:
            for j in range(columns):
                line[j] = c[matrix, corner[0] + i, corner[1] + j]
        steps_of.read((at_line, at_c + 4 * i * width, apart, width))
    block = max(1, _BLOCK // products) * products
    for first in range(0, k, block):
        length = -(-min(block, k - first) // products) * products
        stride = -(-length // VECTOR) * VECTOR
        pack_rows(a, form, corner[0], order[:rows], k, first, stride, 1, x[0])
        pack_columns(b, form, corner[1], order[:columns], (k, n), first, length, 1, False, y[0])
        x_count, y_count = row_groups * ROWS * stride, width * length
        extent(x[0], 0, x_count, known[0])
        extent(y[0], 0, y_count, known[1])
        is_narrow = _is_narrow(known[0]) and _is_narrow(known[1])
        x_top, y_top = known[0, MOST], known[1, MOST]
        shift = cut + 127 + (x_top + y_top if is_narrow else 0)
        is_wide = 0 if is_narrow else -1
        how = lowest, is_wide, x_top
        for ig in range(row_groups):
            xs, count = 4 * ig * ROWS * stride, ROWS * stride
            x_special[ig] = steps_of.split_rows((at_x + xs, at_xe + xs, count, *how))
        sizes = apart, width, stride, length // products, products, cut, floor, shift
        for jg in range(column_groups):
            ys, count = jg * COLUMNS * length, COLUMNS * length
            right = at_y + 4 * ys, at_ye + 2 * ys
            y_special = steps_of.split_columns((*right, count, lowest, is_wide, y_top))
            for ig in range(row_groups):
                xs = 4 * ig * ROWS * stride
                here = at_c + 4 * (ig * ROWS * width + jg * COLUMNS)
                special = x_special[ig] | y_special
                operands = at_x + xs, at_xe + xs, *right, here, *sizes, special
                if is_narrow:
                    steps_of.narrow(operands)
                else:
                    steps_of.wide(operands)
    for i in range(rows):
        steps_of.write((at_c + 4 * i * width, apart, at_line, width, nan))
        target = out[matrix, corner[0] + i]
        for j in range(columns):
            target[corner[1] + j] = line[j]
    restore((before,))
