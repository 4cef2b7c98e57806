"""Chains of fused multiply-adds on an x86's own vectors, compiled by numba: `[batch, m, k] x
[batch, k, n]`.

The same results as `kernels.chain`, bit for bit. The processor's FP32 multiply-add is the unit's
own, so every `ROWS x COLUMNS` elements of a tile run through a block of k. But where numbers are
subnormal, some processors take a hundred times as long (`keeps_quickly` tells which); unless they
flush them, and then they are as quick as ever and tell that they did. A unit that flushes is done.
For one that does not, on such a processor, a block counts if its operands are normal numbers or 0
and nothing was flushed. Others go in parts of `_PART` products and `CAREFUL` columns, for each of
which the quickest of these ways is taken (the first two also for more products at once, where no
part before has failed there):

- direct, if operands are normal numbers or 0, and again nothing was flushed;
- firm, if some are subnormal, but no sum is small: all is times a power of two by which they are
  normal, or sums are so large that they do not notice them;
- wide, in FP64, and rounded from there.

Where products are small, there are quicker ones, for whole blocks: all is times a power of two, by
which all numbers are normal ones, and what is below 2^-126 is rounded to a multiple of 2^-149:

- whole, all columns at once: if in most steps all products are such multiples anyway, or so small
  that they change no sum;
- seldom, if few sums are below 2^-126, as the first part tells or the block before;
- low, if many are; and deep, if all are below 2^-127.

Where many sums are small and rows or columns are of different sizes, a tile is begun again with
these in order: so most groups have sums that are all small, or none.

Tiles are of doubles between the blocks, for these hold subnormal numbers of FP32 as normal ones.
The ways are in `kernels.native_chain_steps`.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit

from kernels import native
from kernels import native_chain_steps as steps_of
from kernels.native_chain_steps import CAREFUL, COLUMNS, ROWS, VECTOR
from kernels.native_operands import (
    FP32,
    GROUP,
    WORDS,
    address,
    bytes_of,
    decoded,
    read_doubles,
    read_words,
    word_at,
)
from kernels.native_steps import EXPONENT, rows_of
from kernels.vectors import COMPILED, INLINED, LANES, Emitter, Vector, inline, pointer

_BLOCK = 256  # products of a block
_PART = 32  # products of a part of it

# Bits of `unit` (see `compute`).
FLUSH, PROPAGATE, TURNED, POSITIVE_ZERO, NARROW, QUICK = (1 << bit for bit in range(6))

_FLOATS = FP32, 0, 0  # as a form
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = 0x7F800000
_QUIET = 0x00400000
_NORMAL = 0x00800000  # the word of 2^-126
_MOVED = 256 << 23
_DEEP = (1023 - 127) << 52  # of 2^-127, a double


@functools.cache
def keeps_quickly() -> bool:
    """Whether this processor computes with subnormal numbers about as quickly as with others, by
    the seconds that some products take: where these mislead, it is time that is lost, no bits.
    """

    def seconds(factor: float) -> float:
        x = np.full(1 << 12, 2.0**-70, np.float32)
        y, out = np.full_like(x, factor), np.empty_like(x)
        least = np.inf
        for _ in range(20):
            start = time.perf_counter()
            np.multiply(x, y, out=out)
            least = min(least, time.perf_counter() - start)
        return least

    return seconds(2.0**-70) < 4 * seconds(1.0)


# Operands.


@njit(**COMPILED)
def _turned(index: int, products: int) -> int:
    """When the product at an index is added: in its step, the last one comes first."""
    return index - 2 * (index % products) + products - 1


@njit(**COMPILED)
def pack_rows(
    a: int, form: Any, i0: int, order: Any, k: int, k0: int, length: int, products: int, x: Any
) -> None:
    """Words `x[rows, length]`, from product k0 on, of rows of the matrix `[m, k]` at `a` in an
    order; the last group's rows are filled up with zeros.
    """
    rows = len(order)
    count = min(length, k - k0)
    row = np.empty(count, np.uint32)
    at_x, at_row = address(x, 0), address(row, 0)
    if count < length or rows % ROWS != 0:
        x[: -(-rows // ROWS) * length * ROWS] = 0
    for i in range(rows):
        source = a + ((i0 + order[i]) * k + k0) * bytes_of(form)
        start = i * length
        if products == 1:
            read_words(source, form, count, at_x + 4 * start, WORDS)
        else:
            read_words(source, form, count, at_row, WORDS)
            for index in range(count):
                x[start + _turned(index, products)] = row[index]


@njit(**COMPILED)
def pack_columns(
    b: int,
    form: Any,
    j0: int,
    order: Any,
    sizes: Any,
    k0: int,
    length: int,
    products: int,
    is_sorted: bool,
    y: Any,
) -> None:
    """Words `y[groups, length, COLUMNS]` of columns of the matrix `[k, n]` at `b`, in an order if
    it `is_sorted`.
    """
    k, n = sizes
    columns = len(order)
    count = min(length, k - k0)
    groups = -(-columns // COLUMNS)
    row = np.empty(columns, np.uint32)
    at_y, at_row = address(y, 0), address(row, 0)
    if count < length or columns % COLUMNS != 0:
        y[: groups * length * COLUMNS] = 0
    for index in range(count):
        source = b + ((k0 + index) * n + j0) * bytes_of(form)
        start = _turned(index, products) * COLUMNS
        if not is_sorted:
            read_words(source, form, columns, at_y + 4 * start, length * COLUMNS)
            continue
        read_words(source, form, columns, at_row, WORDS)
        for j in range(columns):
            y[start + j // COLUMNS * length * COLUMNS + j % COLUMNS] = row[order[j]]


@inline(result=False)
def _sizes(emit: Emitter, words: Any, count: Any, least: Any, most: Any, zeros: Any) -> None:
    """Of so many times VECTOR words of FP32 into VECTOR words each: the least magnitudes less 1,
    and the largest finite ones; also, bit 31 of `zeros` is set if one is 0.
    """
    singles = emit.floats()
    words, *places = (singles.at(x) for x in (words, least, most, zeros))
    low, high, any_zero = (emit.variable(singles.load(x)) for x in places)
    infinity, minus_one = singles.word(_INFINITY), singles.word(0xFFFFFFFF)
    with emit.loop(count) as index:
        word = singles.load(singles.place(words, emit.times(index, VECTOR))).words()
        size = word & singles.word(0x7FFFFFFF)
        finite = size.less_word(infinity).where(size, singles.word(0))
        less = size.plus_words(minus_one)
        emit.put(low, less.smaller_word(emit.get(low).words()).numbers())
        emit.put(any_zero, (less | emit.get(any_zero).words()).numbers())
        emit.put(high, finite.larger_word(emit.get(high).words()).numbers())
    for variable, place in zip((low, high, any_zero), places, strict=True):
        singles.store(emit.get(variable), place)


@njit(**COMPILED)
def extent(words: Any, start: int, count: int, found: Any) -> None:
    """What is known of a group at first, into `found`."""
    lanes = np.zeros(3 * VECTOR, np.uint32)
    lanes[:VECTOR] = 0xFFFFFFFF
    vectors = count // VECTOR
    ends = address(lanes, 0), address(lanes, VECTOR), address(lanes, 2 * VECTOR)
    _sizes((address(words, start), vectors, *ends))
    least, most, zero = np.uint32(0xFFFFFFFF), np.uint32(0), np.uint32(0)
    for i in range(VECTOR):
        least, most = min(least, lanes[i]), max(most, lanes[VECTOR + i])
        zero = max(zero, lanes[2 * VECTOR + i] >> np.uint32(31))
    for i in range(start + vectors * VECTOR, start + count):
        magnitude = np.uint32(words[i] & _MAGNITUDE)
        less = np.uint32(magnitude - np.uint32(1))  # 0 comes last
        least, zero = min(least, less), max(zero, less >> np.uint32(31))
        most = max(most, magnitude if magnitude < np.uint32(_INFINITY) else np.uint32(0))
    found[SUBNORMAL], found[LEAST] = least < np.uint32(_NORMAL - 1), int(least) + 1
    found[_ZERO] = zero
    found[MOST] = _exponent(decoded(most)) if most > 0 else -400


@njit(**COMPILED)
def _exponent(size: float) -> int:
    """Of a normal double."""
    word: Any = np.float64(size).view(np.int64)
    return int(((word & np.int64(EXPONENT)) >> 52) - 1023)


def _map(emit: Emitter, words: Any, target: Any, count: Any, function: Any) -> None:
    """`function` of sizes and signs, of so many words of FP32, LANES or more."""
    builder, singles = emit.builder, emit.floats(LANES)
    words, target = singles.at(words), singles.at(target)
    last = builder.sub(count, emit.integer(LANES))
    vectors = builder.udiv(builder.add(count, emit.integer(LANES - 1)), emit.integer(LANES))
    with emit.loop(vectors) as index:
        place = emit.times(index, LANES)
        place = builder.select(builder.icmp_unsigned("<", place, last), place, last)
        word = singles.load(singles.place(words, place)).words()
        size = word & singles.word(0x7FFFFFFF)
        found = function(singles, size) | (word & singles.word(1 << 31))
        singles.store(found.numbers(), singles.place(target, place))


@inline(result=False)
def _scale(emit: Emitter, words: Any, target: Any, count: Any, scale: Any, dust: Any) -> None:
    """A copy of `count` numbers times 2^scale; those that would be below 2^-126 are that,
    but zeros stay, and sizes whose word is less than `dust` are 0.
    """
    limit = emit.builder.trunc(dust, ir.IntType(32))
    bits = emit.builder.trunc(emit.builder.shl(scale, emit.integer(23)), ir.IntType(32))

    def scaled(singles: Emitter, size: Vector) -> Vector:
        more = singles.all_words_equal(bits)
        of_subnormal = size.counted().words().plus_words(singles.word((-149 << 23) % (1 << 32)))
        found = size.less_word(singles.word(_NORMAL)).where(of_subnormal, size).plus_words(more)
        # Exponents may be negative here, and all are above -256.
        moved = found.plus_words(singles.word(_MOVED))
        normal = singles.word(_NORMAL)
        found = moved.less_word(singles.word(_MOVED + _NORMAL)).where(normal, found)
        usual = (size.plus_words(singles.word(0xFFFFFFFF))).less_word(singles.word(_INFINITY - 1))
        is_dust = size.less_word(singles.all_words_equal(limit))
        return is_dust.where(singles.word(0), usual.where(found, size))

    _map(emit, words, target, count, scaled)


def _end(singles: Emitter, words: Vector) -> Vector:
    """Of words of FP32, which are no subnormal numbers, p + 277 in the upper bits, from 2^23 on,
    if 2^p is the last bit that is set; of 0 the largest word.
    """
    fraction = (words & singles.word(0x7FFFFF)) | singles.word(_NORMAL)
    last = fraction & (~fraction).plus_words(singles.word(1))
    place = (words & singles.word(_INFINITY)).plus_words(last.counted().words())
    zero = (words & singles.word(0x7FFFFFFF)).same_words(singles.word(0))
    return zero.where(singles.word(0xFFFFFFFF), place)


@inline(result=False)
def _row_ends(emit: Emitter, words: Any, ends: Any, length: Any) -> None:
    """Of FP32 `[ROWS, length]`: the least p + 277 of each column, as `_end` has it; and of what is
    beyond the last one, to whole LANES.
    """
    singles = emit.floats(LANES)
    ends, rows = singles.at(ends), rows_of(singles, words, length, ROWS)
    more = emit.builder.add(length, emit.integer(LANES - 1))
    with emit.loop(emit.builder.udiv(more, emit.integer(LANES))) as index:
        k = emit.times(index, LANES)
        each = [_end(singles, singles.load(singles.place(row, k)).words()) for row in rows]
        least = functools.reduce(Vector.smaller_word, each).shifted_down(singles.word(23))
        singles.store(least.numbers(), singles.place(ends, k))


@inline(result=False)
def _column_ends(emit: Emitter, words: Any, ends: Any, length: Any) -> None:
    """As `_row_ends`, of FP32 `[length, COLUMNS]`."""
    singles = emit.floats(LANES)
    words, builder = singles.at(words), emit.builder
    ends = builder.inttoptr(ends, ir.IntType(32).as_pointer())
    with emit.loop(length) as k:
        row = singles.place(words, emit.times(k, COLUMNS))
        parts = [singles.load(singles.place(row, j)) for j in range(0, COLUMNS, LANES)]
        each = [_end(singles, part.words()) for part in parts]
        least = functools.reduce(Vector.smaller_word, each).least_word()
        builder.store(builder.lshr(least, ir.Constant(least.type, 23)), emit.place(ends, k))


# Tiles.

_NONE, _SELDOM, _OFTEN = range(3)  # the care that a group of C needs: how often sums are small
_FEW = 0.3  # of `seldom` in a step: more take longer than `low`
_FAR_APART = 8  # exponents of rows or columns that are worth sorting
_LOW = -102  # where `low` serves, products are below 2^_LOW

# What is known of a group of rows or columns in a block: whether any number is subnormal or 0, the
# exponent of the largest finite one (-400 without any), the word of the least size but 0, and which
# copies are made.
SUBNORMAL, _ZERO, MOST, LEAST, *_COPIED = np.arange(11)
_SCALED, _RAISED, _CLEARED, _DOUBLES, _ENDS, _CLEARED_ENDS, KNOWN = _COPIED
_COPIES = KNOWN - _SCALED + 1  # of as many words as a group has numbers; doubles take two
_MADE = 1 << 10  # more than any exponent
_NEAR = 16  # exponents in which copies of groups differ
_ROOM = 10  # exponents that `_own_scale` leaves to C and to sums on either side


@njit(**COMPILED)
def _buffers(rows: int, columns: int, length: int) -> Any:
    """What a thread needs for tiles of at most this size and blocks of `length` products."""
    row_groups, column_groups = -(-rows // ROWS), -(-columns // COLUMNS)
    groups = row_groups * column_groups
    x, y = row_groups * ROWS * length, column_groups * COLUMNS * length
    return (
        np.empty(groups * ROWS * COLUMNS),  # 0: C
        np.empty(x, np.uint32),  # 1: x
        np.empty(y, np.uint32),  # 2: y
        np.empty(_COPIES * x, np.uint32),  # 3: copies of x, see `_copy`
        np.empty(_COPIES * y, np.uint32),  # 4: of y
        np.empty((row_groups, KNOWN), np.int64),  # 5: of groups of x
        np.empty((column_groups, KNOWN), np.int64),  # 6: of y
        np.empty(groups, np.int64),  # 7: of groups of C: whether care is needed
        np.empty(1, np.int64),  # 8: in how many parts some sums were small
        np.empty(1, np.int64),  # 9: how much oftener blocks without dust failed than served
        np.empty(rows, np.int64),  # 10: in which order rows are computed
        np.empty(columns, np.int64),  # 11: and columns
    )


@njit(**COMPILED)
def _operand(
    words: int, known: int, copies: int, group: int, count: int, scale: int, dust: int
) -> Any:
    """Of a group, as for `_copy`, from where the first group's are."""
    first_copy = copies + 4 * _COPIES * group * count
    return words, known + 8 * group * KNOWN, first_copy, count, scale, dust


@njit(**COMPILED)
def _dust(others: Any) -> int:
    """The word of a power of two: products of less with numbers of these groups, of which this is
    known, are below 2^-150, so they change no sum but a zero's sign.
    """
    most = -400
    for known in others:
        most = max(most, int(known[MOST]))
    exponent = min(-151 - most, 126)
    if exponent < -126:
        return 1 << (exponent + 149) if exponent >= -149 else 0
    return (exponent + 127) << 23


@njit(**COMPILED)
def _has_dust(operand: Any) -> bool:
    return _known(operand)[LEAST] < operand[5]


@njit(**COMPILED)
def _known(operand: Any) -> Any:
    return carray(pointer(operand[1]), (KNOWN,), np.int64)


@njit(**COMPILED)
def _own_scale(operand: Any) -> int:
    """The exponent of a power of two, at most the usual one, by which a group's numbers are less
    than 2^55 and sums of products finite.
    """
    return operand[4] - max(0, _known(operand)[MOST] + _ROOM)


@njit(**COMPILED)
def _fit(x: Any, y: Any, reach: int, x_scale: int, y_scale: int) -> bool:
    """Whether numbers and sums times powers of two are finite if these are below 2^reach."""
    most_x, most_y = _known(x)[MOST] + x_scale, _known(y)[MOST] + y_scale
    return most_x <= 126 and most_y <= 126 and reach + x_scale + y_scale <= 127


@njit(**COMPILED)
def _copy(operand: Any, kind: int) -> int:
    """Where a group's copy of a kind is, which is made when it is first asked for.

    Args:
        operand: the address of its words and of what is known; where its copies are, a space of
            `count` words for each, of twice as many for doubles, and then two for what `_ends`
            makes; `count`; the exponent of the scale; the word of the least size that is no dust.
    """
    words, _, copies, count, scale, dust = operand
    target = copies + 4 * count * (kind - _SCALED)
    known = _known(operand)
    if known[kind] == 0:
        known[kind] = 1
        if kind == _DOUBLES:
            read_doubles(words, _FLOATS, count, target, GROUP)
        else:
            _scale((words, target, count, scale, dust if kind == _CLEARED else 0))
    return target


@njit(**COMPILED)
def _raised(operand: Any, scale: int) -> int:
    """As `_copy`, of a group times 2^scale."""
    words, _, copies, count = operand[:4]
    target, known = copies + 4 * count * (_RAISED - _SCALED), _known(operand)
    if known[_RAISED] != scale + _MADE:
        known[_RAISED] = scale + _MADE
        _scale((words, target, count, scale, 0))
    return target


@njit(**COMPILED)
def _ends(operand: Any, kind: int, of_rows: bool, length: int) -> int:
    """Where a group has for each product p + 277 such that the numbers of a copy are multiples of
    2^p; see `_copy`.
    """
    copies, count = operand[2:4]
    words, known = _copy(operand, kind), _known(operand)
    which = _CLEARED_ENDS if kind == _CLEARED else _ENDS
    ends = copies + 4 * count * (_COPIES + which - KNOWN)
    if known[which] == 0:
        known[which] = 1
        if of_rows:
            _row_ends((words, ends, length))
        else:
            _column_ends((words, ends, length))
    return ends


@njit(**COMPILED)
def _steps_not_whole(x_ends: int, y_ends: int, length: int) -> int:
    """How many steps there are in which `native_chain_steps.whole` rounds."""
    left = carray(pointer(x_ends), (length,), np.int32)
    right = carray(pointer(y_ends), (length,), np.int32)
    found = np.int32(0)
    for k in range(length):
        less = np.int32(left[k] + right[k]) < np.int32(steps_of.WHOLE)
        found += np.int32(1) if less else np.int32(0)
    return int(found)


@njit(**COMPILED)
def _ends_in_zero(words: int, lines: int, apart: int, count: int, further: int) -> int:
    """Of lines of numbers, so many words `apart` and each `further`: 2 if one ends in a zero after
    others, 1 if one is all zeros, else 0.
    """
    found = 0
    for i in range(lines):
        line, k = words + 4 * i * apart, count
        while k > 0 and _is_zero(line + 4 * (k - 1) * further):
            k -= 1
        if k < count:
            found = max(found, 2 if k > 0 else 1)
    return found


@njit(**COMPILED)
def _is_zero(word: int) -> bool:
    return carray(pointer(word), (1,), np.uint32)[0] & _MAGNITUDE == 0


@njit(**COMPILED)
def _flushing_part(x: Any, y: Any, x_at: int, y_at: int, c_and_sizes: Any, reach: int) -> bool:
    """A part for C[ROWS, CAREFUL] on the flushing way that may serve; whether it has failed."""
    of_x, of_y = _known(x), _known(y)
    if of_x[SUBNORMAL] == 0 and of_y[SUBNORMAL] == 0:
        x_at, y_at = x_at + x[0], y_at + y[0]
        ends = steps_of.FLUSHING, steps_of.UNDERFLOW
        return steps_of.direct_careful((x_at, y_at, *c_and_sizes, *ends)) != 0
    # Sums of 2 and more do not notice what is below 2^-25: neither a product of a number below
    # 2^-126 nor that of 2^-126 in its place.
    x_scale, y_scale = _own_scale(x), _own_scale(y)
    if x_scale + y_scale < 0 or not _fit(x, y, reach, x_scale, y_scale):
        x_scale = y_scale = 0
        if of_x[MOST] > -400 and of_y[MOST] > -400:  # x and y of about one size, sums as they are
            x_scale = (of_y[MOST] - of_x[MOST]) // (2 * _NEAR) * _NEAR
            y_scale = -x_scale
            if max(of_x[MOST] + x_scale, of_y[MOST] + y_scale) >= 100:
                return True
    x_at, y_at = x_at + _raised(x, x_scale), y_at + _raised(y, y_scale)
    operands = x_at, y_at, *c_and_sizes, x_scale + y_scale
    if of_x[_ZERO] | of_y[_ZERO] == 0:
        return steps_of.firm(operands) != 0
    return steps_of.firm_with_zeros(operands) != 0


@njit(**COMPILED)
def _low_part(operands: Any, found: int) -> None:
    """A part for C[ROWS, CAREFUL], of which `kinds` found this, where `low` serves."""
    x, y, here, width, count, length = operands
    last = count - 1
    x_last, y_last = x + 4 * last, y + 4 * last * COLUMNS
    of_x = _ends_in_zero(x, ROWS, length, count, 1)
    of_y = _ends_in_zero(y, CAREFUL, 1, count, COLUMNS)
    # C that is +0 stays that, whatever zeros are added.
    stays = max(of_x, of_y) == 0 or (max(of_x, of_y) == 1 and found & steps_of.MINUS_ZERO == 0)
    if not stays:
        if found >= _DEEP or steps_of.deep_with_zeros(operands) != 0:
            steps_of.low_with_zeros(operands)
    elif found < _DEEP and steps_of.deep((x, y, here, width, last, length)) == 0:
        steps_of.low((x_last, y_last, here, width, 1, length))  # a zero's sign
    else:
        steps_of.low(operands)


@njit(**COMPILED)
def _low_block(x: int, y: int, here: int, width: int, length: int, found: int, care: int) -> int:
    """A block for C[ROWS, CAREFUL], of which `kinds` found this, where `low` serves; the care that
    is needed after it.
    """
    first, size = 0, _PART
    tried = care == _SELDOM  # whether it is known how often sums are small
    while first < length:
        count = length - first if tried and found >= _DEEP else min(size, length - first)
        operands = x + 4 * first, y + 4 * first * COLUMNS, here, width, count, length
        if found < _DEEP or (tried and care == _OFTEN):
            _low_part(operands, found)
            tried, care = found >= _DEEP, _OFTEN
        else:
            times = steps_of.seldom(operands)
            few = _NONE if times == 0 else _SELDOM
            tried, care = True, few if times <= count * _FEW else _OFTEN
        found = steps_of.kinds((here, width))
        first += count
        size = 2 * size if found < _DEEP else _PART
    return care


@njit(**COMPILED)
def _sizes_of(x: Any, y: Any, found: int, length: int) -> Any:
    """Of what `kinds` found this: no product is as large as 2^product, no sum as 2^reach; and
    whether all numbers times the usual powers of two are normal ones.
    """
    product = _known(x)[MOST] + _known(y)[MOST] + 2
    reach = 1 + max((found >> 52) - 1022, product + _exponent(float(length)) + 1)
    return product, reach, _fit(x, y, reach, steps_of.SCALE_X, steps_of.SCALE_Y)


@njit(**COMPILED)
def _kinds(here: int, width: int) -> int:
    """Of C[ROWS, COLUMNS], the largest word of `kinds`, and whether any says `TINY`."""
    most = tiny = 0
    for first in range(0, COLUMNS, CAREFUL):
        found = steps_of.kinds((here + 8 * first, width))
        most, tiny = max(most, found), tiny | found & steps_of.TINY
    return most | tiny


@njit(**COMPILED)
def _whole(x: Any, y: Any, here: int, width: int, length: int, refusals: Any) -> bool:
    """A block for C[ROWS, COLUMNS] at `here`, if it has few steps that round; whether it has.
    Without dust, unless that has failed more often than it served.
    """
    found = _kinds(here, width)
    product, _, scalable = _sizes_of(x, y, found, length)
    if not scalable:
        return False
    # Without dust, zeros may have lost their sign.
    cleared = (_has_dust(x) or _has_dust(y)) and refusals[0] <= 0
    while True:
        kind = _CLEARED if cleared else _SCALED
        x_ends, y_ends = _ends(x, kind, True, length), _ends(y, kind, False, length)
        count, done = _steps_not_whole(x_ends, y_ends, length), False
        if count == 0 or (product <= _LOW and 2 * count <= length):
            x_at, y_at, refused = _copy(x, kind), _copy(y, kind), -1 if cleared else 0
            ends = x_ends, y_ends, refused
            done = steps_of.whole((x_at, y_at, here, width, length, length, *ends)) == 0
        if done or not cleared:
            refusals[0] -= cleared
            return done
        refusals[0] += 1
        cleared = False


@njit(**COMPILED)
def _careful(
    x: Any, y: Any, column: int, c: Any, length: int, narrow: bool, care: int, slow: Any
) -> int:
    """A block for C[ROWS, CAREFUL], whatever there is; the care that is needed after it.

    Args:
        x, y: as for `_copy`.
        c: its address, and how far its rows are apart.
        slow: a count of parts of which some sums were small, to be increased.
    """
    here, width = c
    found = steps_of.kinds((here, width))
    product, reach, scalable = _sizes_of(x, y, found, length)
    if scalable and product <= _LOW and found & steps_of.SETTLED == 0:
        slow[0] += -(-length // _PART)
        x_at, y_at = _copy(x, _SCALED), _copy(y, _SCALED) + 4 * column
        return _low_block(x_at, y_at, here, width, length, found, care)
    first, size, failed = 0, _PART if found >> 52 == 0 else length, False
    while first < length:
        x_at, y_at = 4 * first, 4 * (first * COLUMNS + column)
        if found & steps_of.SETTLED != 0:  # then what is finite might as well be another number
            x_part, y_part = _raised(x, 0) + x_at, _raised(y, 0) + y_at
            ends = length - first, length, steps_of.FLUSHING, 0
            steps_of.direct_careful((x_part, y_part, here, width, *ends))
            return _NONE
        count = min(size, length - first)
        failed = found & steps_of.TINY != 0 or _flushing_part(
            x, y, x_at, y_at, (here, width, count, length), reach
        )
        size *= 2
        if failed:
            slow[0] += 1
            size, count = _PART, min(_PART, count)
            x_part, y_part = _copy(x, _DOUBLES) + 2 * x_at, _copy(y, _DOUBLES) + 2 * y_at
            operands = x_part, y_part, here, width, count, length
            if narrow:
                steps_of.wide(operands)
            else:
                steps_of.wide_odd(operands)
            found = steps_of.kinds((here, width))
        first += count
    return _SELDOM if failed or found & steps_of.TINY != 0 else _NONE


@njit(**COMPILED)
def _tile(
    a: int,
    b: int,
    form: Any,
    sizes: Any,
    corner: Any,
    orders: Any,
    options: Any,
    is_sorted: bool,
    buffers: Any,
) -> bool:
    """C of a tile after all steps, in `buffers[0]`, whose rows are as wide as whole groups are;
    but not if sums in its first groups are so often small that `orders` have become others.
    """
    k, n = sizes
    row_order, column_order = orders
    rows, columns = len(row_order), len(column_order)
    products, unit, _, _, _ = options
    c, x, y, x_copies, y_copies, of_rows, of_columns, care, slow, refusals = buffers[:10]
    slow[0], refusals[0], asked = 0, 0, False
    row_groups, column_groups = -(-rows // ROWS), -(-columns // COLUMNS)
    of_rows, of_columns = of_rows[:row_groups], of_columns[:column_groups]
    width = column_groups * COLUMNS
    number = -(-k // products) * products
    block = max(1, _BLOCK // products) * products
    careful, narrow = unit & (FLUSH | QUICK) == 0, unit & NARROW != 0
    control = steps_of.FLUSHING if unit & FLUSH != 0 else steps_of.KEEPING
    x_dust = y_dust = np.int64(0)
    at_c, at_x, at_y = address(c, 0), address(x, 0), address(y, 0)
    at_x_copies, at_y_copies = address(x_copies, 0), address(y_copies, 0)
    at_rows, at_columns = address(of_rows, 0), address(of_columns, 0)
    for ig in range(row_groups if careful else 0):
        for jg in range(column_groups):
            here = at_c + 8 * (ig * ROWS * width + jg * COLUMNS)
            is_tiny = _kinds(here, width) & steps_of.TINY != 0
            care[ig * column_groups + jg] = _SELDOM if is_tiny else _NONE
    for first in range(0, number, block):
        length = min(block, number - first)
        pack_rows(a, form, corner[0], row_order, k, first, length, products, x)
        pack_columns(b, form, corner[1], column_order, sizes, first, length, products, is_sorted, y)
        of_rows[:], of_columns[:] = 0, 0
        x_size, y_size = length * ROWS, length * COLUMNS
        if careful:
            for ig in range(row_groups):
                extent(x, ig * x_size, x_size, of_rows[ig])
            for jg in range(column_groups):
                extent(y, jg * y_size, y_size, of_columns[jg])
            x_dust, y_dust = _dust(of_columns), _dust(of_rows)
        for jg in range(column_groups):
            for ig in range(row_groups):
                group = ig * column_groups + jg
                here = at_c + 8 * (ig * ROWS * width + jg * COLUMNS)
                xs, ys = at_x + 4 * ig * x_size, at_y + 4 * jg * y_size
                operands = xs, ys, here, width, length, length
                if not careful:
                    steps_of.direct((*operands, control, 0))
                    continue
                small = care[group] | of_rows[ig, SUBNORMAL] | of_columns[jg, SUBNORMAL]
                ends = steps_of.FLUSHING, steps_of.UNDERFLOW
                if small == 0 and steps_of.direct((*operands, *ends)) == 0:
                    continue
                left = _operand(xs, at_rows, at_x_copies, ig, x_size, steps_of.SCALE_X, x_dust)
                right = _operand(ys, at_columns, at_y_copies, jg, y_size, steps_of.SCALE_Y, y_dust)
                before, care[group] = care[group], _SELDOM
                if _whole(left, right, here, width, length, refusals):
                    continue
                care[group] = _NONE
                for column in range(0, COLUMNS, CAREFUL):
                    of_c = here + 8 * column, width
                    after = _careful(left, right, column, of_c, length, narrow, before, slow)
                    care[group] = max(care[group], after)
            parts = (jg + 1) * row_groups * (COLUMNS // CAREFUL) * -(-length // _PART)
            if first == 0 and not (is_sorted or asked) and 4 * slow[0] > parts:
                asked = True
                if _sort(a, b, form, sizes, corner, orders):
                    return False
    return True


@njit(**COMPILED)
def _exponents_of_rows(a: int, form: Any, k: int, found: Any) -> None:
    """Of rows of `[rows, k]`: the exponents of their largest numbers."""
    row = np.empty(k, np.uint32)
    for i in range(len(found)):
        read_words(a + i * k * bytes_of(form), form, k, address(row, 0), WORDS)
        top = np.uint32(0)
        for index in range(k):
            top = max(top, np.uint32(row[index] & _MAGNITUDE))
        found[i] = top >> 23


@njit(**COMPILED)
def _exponents_of_columns(b: int, form: Any, sizes: Any, found: Any) -> None:
    """As `_exponents_of_rows`, of the first columns of `[k, n]`."""
    k, n = sizes
    columns = len(found)
    row, top = np.empty(columns, np.uint32), np.zeros(columns, np.uint32)
    for index in range(k):
        read_words(b + index * n * bytes_of(form), form, columns, address(row, 0), WORDS)
        for j in range(columns):
            top[j] = max(top[j], np.uint32(row[j] & _MAGNITUDE))
    for j in range(columns):
        found[j] = top[j] >> 23


@njit(**COMPILED)
def _sort(a: int, b: int, form: Any, sizes: Any, corner: Any, orders: Any) -> bool:
    """The orders of a tile's rows and columns, by the exponents of the largest numbers if these are
    far apart; whether any are.
    """
    k = sizes[0]
    of_rows, of_columns = np.empty(len(orders[0]), np.int64), np.empty(len(orders[1]), np.int64)
    _exponents_of_rows(a + corner[0] * k * bytes_of(form), form, k, of_rows)
    _exponents_of_columns(b + corner[1] * bytes_of(form), form, sizes, of_columns)
    rows, columns = _put_in_order(of_rows, orders[0]), _put_in_order(of_columns, orders[1])
    return rows or columns


@njit(**COMPILED)
def _put_in_order(exponents: Any, order: Any) -> bool:
    """Whether they were far apart, so that the order is by them."""
    least = most = exponents[0]
    for exponent in exponents:
        least, most = min(least, exponent), max(most, exponent)
    if most - least < _FAR_APART:
        return False
    place = 0
    for exponent in range(least, most + 1):
        for i in range(len(order)):
            if exponents[i] == exponent:
                order[place] = i
                place += 1
    return True


@njit(**COMPILED)
def buffers_for(tile: tuple[int, int], products: int) -> Any:
    """What a thread needs to compute such tiles, one after the other."""
    return _buffers(tile[0], tile[1], max(1, _BLOCK // products) * products)


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
        options: products of a step, the last of which is added first; bits of the unit: whether it
            flushes subnormal operands and results (else it keeps them), whether NaN operands are
            passed on (`TURNED`: b before a), whether zeros are +0, and whether products have 24
            bits at most; whether the processor `keeps_quickly`; the word of a NaN.
        buffers: `buffers_for` these.
    """
    _, m, n = out.shape
    products, unit, nan, _, _ = options
    matrix, corner, size = native.place_of(number, tile, m, n)
    a += matrix * m * k * bytes_of(form)
    b += matrix * k * n * bytes_of(form)
    before = steps_of.control(())
    orders = buffers[10][: size[0]], buffers[11][: size[1]]
    for order in orders:
        for i in range(len(order)):
            order[i] = i
    is_done = is_sorted = False
    while not is_done:
        _start(c, matrix, corner, orders, buffers[0])
        is_done = _tile(a, b, form, (k, n), corner, orders, options, is_sorted, buffers)
        is_sorted = True
    steps_of.restore((before,))
    found = _finish(buffers[0], corner, orders, unit, nan, out[matrix])
    if found and unit & PROPAGATE != 0:
        _pass_on(a, b, form, (k, n), c, matrix, corner, size, products, unit, out[matrix])


@njit(**COMPILED)
def _start(c: Any, matrix: int, corner: Any, orders: Any, tile: Any) -> None:
    """The first accumulators of a tile."""
    row_order, column_order = orders
    rows, columns = len(row_order), len(column_order)
    width = -(-columns // COLUMNS) * COLUMNS
    tile[: -(-rows // ROWS) * ROWS * width] = 0
    if c.size > 0:
        for i in range(rows):
            for j in range(columns):
                word = c[matrix, corner[0] + row_order[i], corner[1] + column_order[j]]
                tile[i * width + j] = decoded(word)


@njit(**COMPILED)
def _finish(tile: Any, corner: Any, orders: Any, unit: int, nan: int, out: Any) -> bool:
    """A tile written into `out[m, n]`; whether any element is no number."""
    row_order, column_order = orders
    rows, columns = len(row_order), len(column_order)
    width = -(-columns // COLUMNS) * COLUMNS
    zero = 0.0 if unit & POSITIVE_ZERO != 0 else -0.0
    any_nan, is_sorted = False, False
    for j in range(columns):
        is_sorted |= column_order[j] != j
    row, words = address(tile, 0), np.empty(columns, np.uint32)
    for i in range(rows):
        line = out[corner[0] + row_order[i]]
        target = address(words, 0) if is_sorted else address(line, corner[1])
        if native.results(row + 8 * i * width, columns, zero, nan, target):
            any_nan = True
        if is_sorted:
            for j in range(columns):
                line[corner[1] + column_order[j]] = words[j]
    return any_nan


# NaNs.


@njit(**COMPILED)
def _nan_word(address: int, form: Any) -> int:
    """The quiet NaN that an operand is, or 0."""
    word = word_at(address, form)
    return int(word | _QUIET) if word & 0x7FFFFFFF > _INFINITY else 0


@njit(**COMPILED)
def _pass_on(
    a: int,
    b: int,
    form: Any,
    sizes: Any,
    c: Any,
    matrix: int,
    corner: Any,
    size: Any,
    products: int,
    unit: int,
    out: Any,
) -> None:
    """Elements that are no numbers get the word of the last operand that is none, or else of C's.

    Of two operands of one product, a's counts, or b's if the product is `TURNED`.
    """
    k, n = sizes
    rows, columns = size
    # When the last NaN of a row or column comes, counted from 1, and its word.
    row_last, column_last = np.zeros((rows, 2), np.int64), np.zeros((columns, 2), np.int64)
    for index in range(k):
        time = _turned(index, products) + 1
        for i in range(rows):
            word = _nan_word(a + ((corner[0] + i) * k + index) * bytes_of(form), form)
            if word != 0 and time > row_last[i, 0]:
                row_last[i, 0], row_last[i, 1] = time, word
        for j in range(columns):
            word = _nan_word(b + (index * n + corner[1] + j) * bytes_of(form), form)
            if word != 0 and time > column_last[j, 0]:
                column_last[j, 0], column_last[j, 1] = time, word
    row_first = 0 if unit & TURNED != 0 else 1
    for i in range(rows):
        for j in range(columns):
            row, column = corner[0] + i, corner[1] + j
            if out[row, column] & _MAGNITUDE <= np.uint32(_INFINITY):
                continue
            if row_last[i, 0] + column_last[j, 0] > 0:
                of_row = 2 * row_last[i, 0] + row_first > 2 * column_last[j, 0]
                word = row_last[i, 1] if of_row else column_last[j, 1]
                out[row, column] = np.uint32(word)
            elif c.size > 0:
                word = np.int64(c[matrix, row, column])
                if word & 0x7FFFFFFF > _INFINITY:
                    out[row, column] = np.uint32(word | _QUIET)
