"""The sum of a step of one element as a fixed-point number that has all bits of all terms: for
`kernels.native`, where sums in two or three parts do not do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kernels.native_steps import COLUMNS, LEAST, TO_SUBNORMAL
from kernels.vectors import COMPILED, pointer

DIGITS = 24  # of 32 bits; terms take 20 of them, and their sums are read two below the first one
_LOW = (1 << 32) - 1
_FRACTION = (1 << 52) - 1  # of a double
_LEAST_FIELD = 1023 - 298  # the exponent of the least product of FP32 numbers, 2^-298
_PLACE = _LEAST_FIELD - 1023 - 52 - 2 * 32  # exponent of the first digit's last bit
_SPARE = 11  # bits of 64 for which a double has no room


@njit(**COMPILED)
def _add(term: float, digits: Any) -> None:
    """A term, if it is finite, into digits, which may be any 64-bit numbers then."""
    word = np.float64(term).view(np.int64)
    field = word >> 52 & 0x7FF
    if not 0 < field < 0x7FF:
        return
    place = field - _LEAST_FIELD
    index, shift, negative = 2 + (place >> 5), place & 31, word >> 63
    significand = word & _FRACTION | 1 << 52
    low, high = (significand & _LOW) << shift, significand >> 32 << shift
    for n, part in enumerate((low & _LOW, (low >> 32) + (high & _LOW), high >> 32)):
        digits[index + n] += (part ^ negative) - negative


@njit(**COMPILED)
def _carried(digits: Any, sign: int) -> int:
    """`sign` times these digits, all of them from 0 on below 2^32; what the next one would be."""
    carry = 0
    for n in range(DIGITS):
        total = carry + sign * digits[n]
        digits[n], carry = total & _LOW, total >> 32
    return carry


@njit(**COMPILED)
def rounded(x: int, y: int, c: float, products: int, limit: float, scratch: int) -> float:
    """`x y + c`, of finite terms, rounded once to FP32, at most `limit`. A zero is +0.

    Args:
        x, y: addresses of `x[products]` and of a column of `y[products, COLUMNS]`.
        scratch: of as many words as there are digits.
    """
    row = carray(pointer(x), (products,), np.float64)
    column = carray(pointer(y), (products, COLUMNS), np.float64)
    digits = carray(pointer(scratch), (DIGITS,), np.int64)
    digits[:] = 0
    for k in range(products):
        _add(row[k] * column[k, 0], digits)
    _add(c, digits)
    negative = _carried(digits, 1) < 0
    if negative:
        _carried(digits, -1)
    first = DIGITS - 1
    while first >= 2 and digits[first] == 0:
        first -= 1
    found = _in_float32(digits, first, limit) if first >= 2 else 0.0
    return 0.0 - found if negative else found


@njit(**COMPILED)
def _in_float32(digits: Any, first: int, limit: float) -> float:
    """The number whose digits these are, the first one not 0, rounded to FP32."""
    # The bits of the first digits that a double has room for, the last one set if any are dropped:
    # rounded to odd, it is rounded to FP32 as the sum is.
    place = _PLACE + 32 * (first - 1)
    upper, lower, lowest = digits[first], digits[first - 1], digits[first - 2]
    if upper >> _SPARE != 0:
        bits, dropped = upper << (32 - _SPARE) | lower >> _SPARE, lower << (32 - _SPARE) & _LOW
        dropped, place = dropped | lowest, place + _SPARE
    else:
        bits = upper << 42 | lower << 10 | lowest >> 22
        dropped, place = lowest & ((1 << 22) - 1), place - 10
    for n in range(first - 2):
        dropped |= digits[n]
    odd = np.float64(bits | (dropped != 0)) * np.int64(1023 + place << 52).view(np.float64)
    if odd < LEAST:
        return float(odd + TO_SUBNORMAL - TO_SUBNORMAL)
    return min(float(np.float64(np.float32(odd))), limit)
