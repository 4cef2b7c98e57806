"""The steps of a block whose sums FP64 may round, of a few rows and columns: for `kernels.native`.

Nearly all elements are told by one sum and a bound on its error, or because it is exact, which is
looked at where it pays (`kernels.native_bounds`). A few that are not are told one by one by sums in
two parts, and in three if that does not do; if they are many, all elements are, by vectors of them,
for some steps on (`kernels.native_elements`, `kernels.native_extraction`). What is left has sums of
all its bits (`kernels.native_fixed_point`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kernels import native_bounds as bounds_of
from kernels import native_elements as elements_of
from kernels import native_extraction as extraction
from kernels import native_fixed_point as fixed_point
from kernels import native_steps as steps_of
from kernels.native_steps import BAND, COLUMNS, PART, QUAD
from kernels.vectors import COMPILED, INLINED, align_stack, pointer

_LONG = 16  # products of steps for which it is worth while to look at their exponents
_PATIENCE = 63  # steps at most before sums with bounds are tried again
_CREDIT = 16  # by how many elements more sums may have been exact lately than were not
_OFTEN = 127  # steps in which exact sums are told with the others, when all of that is reached
_SELDOM = 15  # steps before it is looked again whether they are, when that is used up


@njit(**COMPILED)
def _with_all_bits(operands: Any, c: int, step: int, unknown: int, scratch: Any) -> None:
    """A step of the elements whose bits are set, into `out`, whatever the terms."""
    x, stride, y, _, _, _, padded = operands
    out, digits, _, needed = scratch
    before = carray(pointer(c), (BAND * COLUMNS,), np.float64)
    after = carray(pointer(out), (BAND * COLUMNS,), np.float64)
    limit = carray(pointer(needed), (1,), np.float64)[0]
    for index in range(BAND * COLUMNS):
        if unknown >> index & 1 != 0:
            row = x + 8 * (index // COLUMNS * stride + step * padded)
            column = y + 8 * (step * padded * COLUMNS + index % COLUMNS)
            of = before[index], padded, limit, digits
            after[index] = fixed_point.rounded(row, column, *of)


@njit(**COMPILED)
def _first_time(done: int) -> bool:
    """Whether it is, from now on not."""
    flag = carray(pointer(done), (1,), np.int64)
    before = flag[0]
    flag[0] = 1
    return bool(before == 0)


@njit(**COMPILED)
def _find_exponents(operands: Any) -> None:
    """Of the operands, if they are not known."""
    x, stride, y, (of_x, _, _), (of_y, _, _, _), _, _ = operands
    if _first_time(of_x[0]):
        extraction.exponents_of_rows((x, BAND * stride, of_x[1]))
    if _first_time(of_y[0]):
        extraction.exponents_of_columns((y, stride, of_y[1]))


@njit(**COMPILED)
def _find_sizes(operands: Any) -> None:
    """Of the operands in each step, if they are not known."""
    x, stride, y, (_, of_x, _), (_, of_y, _, _), _, padded = operands
    if _first_time(of_x[0]):
        bounds_of.sums_of_rows(x, stride, padded, of_x[1])
    if _first_time(of_y[0]):
        bounds_of.tops_of_columns((y, stride // padded, padded, of_y[1]))


@njit(**COMPILED)
def _grids(operands: Any, step: int) -> tuple[int, int, int]:
    """Of the operands from that step on, as for `native_bounds.told_exactly`."""
    x, stride, y, (_, _, of_x), (_, _, of_y, _), _, padded = operands
    count = stride // padded
    if _first_time(of_x[0]):
        bounds_of.grids_of_rows((x, BAND * count, padded, of_x[1]))
    if _first_time(of_y[0]):
        bounds_of.grids_of_columns((y, count, padded, of_y[1]))
    return of_x[1] + 8 * step, count, of_y[1] + 8 * step * COLUMNS


@njit(**INLINED)
def _bounded(
    operands: Any, c: int, step: int, steps: int, exactly: bool, done: int, scratch: Any
) -> int:
    """Steps of C[BAND, COLUMNS] from that one on by sums with bounds on their errors, as
    `native_bounds` has it; if `exactly`, which is for long ones, those that are exact, too.
    """
    x, stride, y, (of_x, sums, _), (of_y, tops, _, _), last, padded = operands
    out, _, parts, needed = scratch
    k, count = step * padded, stride // padded
    ends = c, steps - step, out, done, padded // QUAD, needed, last, parts
    of_steps = x + 8 * k, stride, y + 8 * k * COLUMNS, *ends
    powers = parts + 8 * 3 * BAND * COLUMNS
    if padded >= _LONG:
        exponents = of_x[1] + 2 * k, of_y[1] + 2 * k * COLUMNS
        if exactly:
            grids = _grids(operands, step)
            return int(bounds_of.bounded_or_exact((*grids, *exponents, powers, *of_steps)))
        return int(bounds_of.bounded_by_exponents((*exponents, powers, *of_steps)))
    sizes = sums[1] + 8 * step, count, tops[1] + 8 * step * COLUMNS
    return int(bounds_of.bounded_by_sizes((*sizes, powers, *of_steps)))


@njit(**INLINED)
def _exactly(operands: Any, c: int, step: int, unknown: int, scratch: Any) -> int:
    """The same step for elements whose sums are exact; bits of the others."""
    out, _, parts, _ = scratch
    padded = operands[6]
    factor = np.float64(8 * padded if padded >= _LONG else 2).view(np.int64)
    sums = parts, parts + 8 * 3 * BAND * COLUMNS, factor
    return int(bounds_of.told_exactly((*sums, c, *_grids(operands, step), out, unknown)))


@njit(**INLINED)
def _elements(operands: Any, c: int, step: int, elements: int, parts_of: int, scratch: Any) -> int:
    """A step of the elements whose bits are set, into `out`; bits of those still in doubt."""
    x, stride, y, _, (_, _, _, columns), last, padded = operands
    out, _, parts, needed = scratch
    if _first_time(columns[0]):
        elements_of.transposed(y, stride, columns[1])
    k, powers = 8 * step * padded, parts + 8 * 3 * BAND * COLUMNS
    of_step = x + k, stride, columns[1] + k, stride, c, elements, padded, needed, powers, out, last
    if parts_of == 2:
        return int(elements_of.in_two_parts(of_step))
    return int(elements_of.in_three_parts(of_step))


@njit(**INLINED)
def _all_in_parts(operands: Any, c: int, step: int, scratch: Any) -> int:
    """A step of C[BAND, COLUMNS] into `out`; bits of elements still in doubt."""
    x, stride, y, (of_x, _, _), (of_y, _, _, _), last, padded = operands
    out, _, parts, needed = scratch
    quads, k, powers = padded // QUAD, step * padded, parts + 8 * 3 * BAND * COLUMNS
    if padded < _LONG:
        _find_exponents(operands)
    exponents = of_x[1] + 2 * k, stride, of_y[1] + 2 * k * COLUMNS
    extraction.powers_of_step((*exponents, quads, powers))
    extraction.starts_of_step((c, powers, needed, parts))
    for first in range(0, BAND, PART):
        of_part = x + 8 * (first * stride + k), stride, y + 8 * k * COLUMNS, quads
        for half in range(2):
            extraction.extracted((*of_part, parts + 8 * first * COLUMNS, half))
    return int(extraction.rounded_parts((parts, out, needed, last)))


@njit(**COMPILED)
def careful(operands: Any, c: int, steps: int, pause: Any, done: Any, scratch: Any) -> None:
    """The steps of a block of C[BAND, COLUMNS], whatever the operands. `pause` has how many steps
    to go before sums with bounds are tried again, how many it was, the credit of looking whether
    sums are exact, and in how many steps to come that is done with all sums.
    """
    padded, (out, digits, parts, needed) = operands[6], scratch
    align_stack(())
    if padded >= _LONG:
        _find_exponents(operands)
    else:
        _find_sizes(operands)
    step, size, here = np.int64(0), BAND * COLUMNS, c
    while step < steps:
        scratch = out, digits, parts, needed
        in_parts = pause[0] > 0
        if in_parts:
            pause[0] -= 1
        else:
            exactly, at_done = pause[3] > 0 and padded >= _LONG, int(done.ctypes.data)
            unknown = _bounded(operands, here, step, steps, exactly, at_done, scratch)
            step += done[0]
            pause[3] = max(0, pause[3] - done[0] - 1)
            if unknown == 0:
                break
            count = elements_of.number_of((unknown,))
            if pause[2] < 0:
                pause[2] += 1
            elif not exactly:
                unknown = _exactly(operands, here, step, unknown, scratch)
                left = elements_of.number_of((unknown,))
                pause[2] = min(pause[2] + count - 2 * left, _CREDIT)
                if pause[2] < 0:
                    pause[2] = -_SELDOM
                elif pause[2] == _CREDIT:
                    pause[2], pause[3] = _CREDIT // 2, _OFTEN
                count = left
            pause[1] = min(2 * pause[1] + 1, _PATIENCE) if 3 * count > size else 0
            pause[0] = pause[1]
            in_parts = 2 * count > size
        if in_parts:
            unknown = _all_in_parts(operands, here, step, scratch)
        for number in range(3 if in_parts else 2, 4):
            if unknown != 0:
                unknown = _elements(operands, here, step, unknown, number, scratch)
        if unknown != 0:
            _with_all_bits(operands, here, step, unknown, scratch)
        here, out = out, here
        step += 1
    if here != c:
        steps_of.write((here, c))
