"""A part of a chain for a few rows and columns on an x86's vectors: the arithmetic of
`kernels.native_chain`.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from kernels.native_steps import EXPONENT, LEAST, rows_of, sum_and_rest, to_odd
from kernels.vectors import LANES, Emitter, Vector, inline

ROWS = 8
COLUMNS = 4 * LANES
HALF = 2 * LANES  # columns at once on the careful ways

# The processor's control word, MXCSR (Intel 64 manual, volume 1, 10.2.3).
_FLUSHING = 0x9FC0  # to nearest; subnormal operands and results are zeros; nothing interrupts
UNDERFLOW = 0x10  # a result has been flushed

_SIGN = 1 << 63
_LEAST_EXPONENT = (1023 - 126) << 52
_TO_FP32 = (29 << 52) | (1 << 51)  # turns the exponent E of a word into the number 1.5 * 2^(E + 29)
_TO_END = 2.0**896  # of the doubles, from that of FP32


def _set_control(emit: Emitter, word: ir.Value) -> None:
    _control(emit, "llvm.x86.sse.ldmxcsr", word)


def _get_control(emit: Emitter) -> ir.Value:
    return _control(emit, "llvm.x86.sse.stmxcsr", emit.integer(0))


def _control(emit: Emitter, name: str, word: ir.Value) -> ir.Value:
    """The processor's control word, set or read by way of memory."""
    place = emit.integer_variable(0)
    emit.builder.store(word, place)
    byte = ir.IntType(8).as_pointer()
    emit.call(name, ir.VoidType(), emit.builder.bitcast(place, byte))
    return emit.builder.load(place)


@inline(result=True)
def control(emit: Emitter) -> Any:
    return _get_control(emit)


@inline(result=False)
def restore(emit: Emitter, word: Any) -> None:
    _set_control(emit, word)


@inline(result=True)
def direct(
    emit: Emitter, x: Any, y: Any, c: Any, width: Any, count: Any, stride: Any, refused: Any
) -> Any:
    """C[ROWS, COLUMNS] += x y in FP32, flushing; C stays as it was if one of the control word's
    flags in `refused` is raised, which is the result.

    Args:
        x, y: FP32 `[ROWS, count]`, with rows `stride` apart, and `[count, COLUMNS]`.
        c: doubles, with rows `width` apart.
    """
    singles = emit.floats()
    rows, y, c = rows_of(singles, x, stride, ROWS), singles.at(y), emit.at(c)
    _set_control(emit, emit.integer(_FLUSHING))
    halves = range(0, COLUMNS, 2 * LANES)
    places = [[emit.place(c, emit.times(width, i), j) for j in halves] for i in range(ROWS)]
    sums = [
        [
            emit.variable(emit.load(place).to_floats(emit.load(emit.place(place, LANES))))
            for place in row
        ]
        for row in places
    ]
    with emit.loop(count) as k:
        ys = singles.place(y, emit.times(k, COLUMNS))
        right = [singles.load(singles.place(ys, j)) for j in halves]
        for i, row in enumerate(sums):
            left = singles.load_all_equal(singles.place(rows[i], k))
            for total, factor in zip(row, right, strict=True):
                emit.put(total, left.times_plus(factor, emit.get(total)))
    raised = emit.builder.and_(_get_control(emit), refused)
    with emit.unless(raised):
        for row, row_places in zip(sums, places, strict=True):
            for total, place in zip(row, row_places, strict=True):
                low, high = emit.get(total).to_doubles()
                emit.store(low, place)
                emit.store(high, emit.place(place, LANES))
    return raised


def _sums(emit: Emitter, c: Any, width: Any, scale: Vector) -> list[tuple[Any, Any]]:
    """Of C[ROWS, HALF]: where a row is, and a variable with its floats times `scale`."""
    places = [emit.place(c, emit.times(width, i)) for i in range(ROWS)]

    def floats_at(place: ir.Value) -> Vector:
        upper = emit.load(emit.place(place, LANES))
        return (emit.load(place) * scale).to_floats(upper * scale)

    return [(place, emit.variable(floats_at(place))) for place in places]


def _store(emit: Emitter, row: Vector, place: ir.Value, scale: Vector) -> None:
    lower, upper = row.to_doubles()
    emit.store(lower * scale, place)
    emit.store(upper * scale, emit.place(place, LANES))


def _on_grid(
    emit: Emitter,
    any_size: bool,
    x: Any,
    y: Any,
    c: Any,
    width: Any,
    count: Any,
    stride: Any,
    up: Any,
    down: Any,
    least: Any,
) -> None:
    singles = emit.floats()
    rows, y, c = rows_of(singles, x, stride, ROWS), singles.at(y), emit.at(c)
    scale, back = (emit.all_equal(emit.builder.bitcast(v, emit.element)) for v in (up, down))
    once = singles.all_words_equal(emit.builder.trunc(least, ir.IntType(32))).numbers()
    twice, sign, zero = -(once + once), singles.word(1 << 31), singles.number(0.0)
    far = once * singles.number(2.0**24)
    _set_control(emit, emit.integer(_FLUSHING))
    sums = _sums(emit, c, width, scale)
    with emit.loop(count) as k:
        right = singles.load(singles.place(y, emit.times(k, COLUMNS)))
        for i, (_, variable) in enumerate(sums):
            left = singles.load_all_equal(singles.place(rows[i], k))
            before = emit.get(variable)
            total = left.times_plus(right, before)
            negative = total.words() & sign
            along = (before.words() ^ negative).numbers()  # C in the direction of the sum
            grid = (along < once).where(once, twice)
            grid = (grid.words() ^ negative).numbers()
            rounds = total.size() < once
            if any_size:
                rounds = rounds & (before.size() < far)
            grid = rounds.where(grid, zero)
            found = left.times_plus(right, before + grid) - grid
            emit.put(variable, (found.words() | negative).numbers())  # a zero's sign
    for place, variable in sums:
        _store(emit, emit.get(variable), place, back)


@inline(result=False)
def low(emit: Emitter, *operands: Any) -> None:
    """C[ROWS, HALF] += x y, where all numbers times a power of two are normal in FP32, and C and
    sums are below 2^-102.

    Args:
        operands: x, y, c, width, count, stride: as for `direct`, but of y's and C's rows HALF
            counts, and xy is `up` times as large.
            up, down: words of that power, 2^23 at least, and of its inverse, as doubles.
            least: word of 2^-126 times `up`, in FP32.

    A sum below `least` is rounded once, where numbers above `least` are, by being added to `least`
    or, if C alone is as large and of its sign, taken from twice that. C plus or minus these is
    exact.
    """
    _on_grid(emit, False, *operands)


@inline(result=False)
def low_or_large(emit: Emitter, *operands: Any) -> None:
    """As `low`, where C and sums may be larger.

    Of a C of 2^-102 and more, a product leaves less than 2^-126 only if it is as large but for the
    24th bit; then its last place is 2^-149 at least, and the sum is exact.
    """
    _on_grid(emit, True, *operands)


@inline(result=False)
def deep(
    emit: Emitter,
    x: Any,
    y: Any,
    c: Any,
    width: Any,
    count: Any,
    stride: Any,
    up: Any,
    down: Any,
    least: Any,
) -> None:
    """As `low`, where no sum reaches half of `least`; a zero's sign is lost.

    Added onto 1.5 times `least`, all sums are rounded where they have to be.
    """
    singles = emit.floats()
    rows, y, c = rows_of(singles, x, stride, ROWS), singles.at(y), emit.at(c)
    scale, back = (emit.all_equal(emit.builder.bitcast(v, emit.element)) for v in (up, down))
    once = singles.all_words_equal(emit.builder.trunc(least, ir.IntType(32))).numbers()
    middle = once * singles.number(1.5)
    _set_control(emit, emit.integer(_FLUSHING))
    sums = _sums(emit, c, width, scale)
    for _, variable in sums:
        emit.put(variable, emit.get(variable) + middle)
    with emit.loop(count) as k:
        right = singles.load(singles.place(y, emit.times(k, COLUMNS)))
        for i, (_, variable) in enumerate(sums):
            left = singles.load_all_equal(singles.place(rows[i], k))
            emit.put(variable, left.times_plus(right, emit.get(variable)))
    for place, variable in sums:
        _store(emit, emit.get(variable) - middle, place, back)


@inline(result=True)
def firm(
    emit: Emitter,
    x: Any,
    y: Any,
    c: Any,
    width: Any,
    count: Any,
    stride: Any,
    up: Any,
    down: Any,
    limit: Any,
    zeros: Any,
) -> Any:
    """C[ROWS, HALF] += x y in FP32, flushing; operands as for `low`. C stays as it was, and the
    result is not 0, if any sum on the way is below `limit` (a word of FP32) but 0, or if something
    was flushed and either a result is 0 or `zeros` is 0.
    """
    builder, singles = emit.builder, emit.floats()
    rows, y, c = rows_of(singles, x, stride, ROWS), singles.at(y), emit.at(c)
    _set_control(emit, emit.integer(_FLUSHING))
    scale, back = (emit.all_equal(emit.builder.bitcast(v, emit.element)) for v in (up, down))
    magnitude, minus_one = singles.word(0x7FFFFFFF), singles.word(0xFFFFFFFF)
    sums = _sums(emit, c, width, scale)
    leasts = [emit.variable(minus_one) for _ in sums]  # of the sizes' words less 1
    with emit.loop(count) as k:
        right = singles.load(singles.place(y, emit.times(k, COLUMNS)))
        for i, ((_, variable), least) in enumerate(zip(sums, leasts, strict=True)):
            left = singles.load_all_equal(singles.place(rows[i], k))
            total = left.times_plus(right, emit.get(variable))
            size = (total.words() & magnitude).plus_words(minus_one)
            emit.put(variable, total)
            emit.put(least, size.smaller_word(emit.get(least)))
    flushed = builder.and_(_get_control(emit), emit.integer(UNDERFLOW))
    least_allowed = builder.trunc(builder.sub(limit, emit.integer(1)), ir.IntType(32))
    bound = singles.all_words_equal(least_allowed)
    below, is_zero = emit.integer(0), emit.integer(0)
    for (_, variable), least in zip(sums, leasts, strict=True):
        below = builder.or_(below, emit.get(least).less_word(bound).bits())
        is_zero = builder.or_(is_zero, emit.get(variable).equals(singles.number(0.0)).bits())
    some = builder.icmp_unsigned("!=", is_zero, emit.integer(0))
    none = builder.icmp_unsigned("==", zeros, emit.integer(0))
    lost = builder.select(builder.or_(some, none), flushed, emit.integer(0))
    failed = builder.or_(below, lost)
    with emit.unless(failed):
        for place, variable in sums:
            _store(emit, emit.get(variable), place, back)
    return failed


def _rounded(emit: Emitter, total: Vector) -> Vector:
    """To FP32, also below and beyond its normal numbers, zeros with their sign."""
    exponent = (total.words() & emit.word(EXPONENT)).larger_word(emit.word(_LEAST_EXPONENT))
    grid = exponent.plus_words(emit.word(_TO_FP32)).numbers()  # its last place is that of FP32
    found = (total + grid) - grid
    found = (found.words() | (total.words() & emit.word(_SIGN))).numbers()
    return (found * emit.number(_TO_END)) * emit.number(1 / _TO_END)  # infinite from 2^128 on


def _in_float64(
    emit: Emitter, narrow: bool, x: Any, y: Any, c: Any, width: Any, count: Any, stride: Any
) -> None:
    rows, y, c = rows_of(emit, x, stride, ROWS), emit.at(y), emit.at(c)
    offsets = range(0, HALF, LANES)
    places = [[emit.place(c, emit.times(width, i), j) for j in offsets] for i in range(ROWS)]
    sums = [[emit.variable(emit.load(place)) for place in row] for row in places]
    with emit.loop(count) as k:
        right = [emit.load(emit.place(y, emit.times(k, COLUMNS), j)) for j in offsets]
        for i, row in enumerate(sums):
            left = emit.load_all_equal(emit.place(rows[i], k))
            for variable, factor in zip(row, right, strict=True):
                before = emit.get(variable)
                if narrow:
                    total = left.times_plus(factor, before)
                else:
                    total = to_odd(emit, *sum_and_rest(left * factor, before))
                emit.put(variable, _rounded(emit, total))
    for row, row_places in zip(sums, places, strict=True):
        for total, place in zip(row, row_places, strict=True):
            emit.store(emit.get(total), place)


@inline(result=False)
def wide(emit: Emitter, *operands: Any) -> None:
    """C[ROWS, HALF] += x y, whatever they are; products have 24 bits at most.

    FP64's multiply-add rounds so far below FP32's last place that rounding again is harmless: to
    nearest, FP32 has 24 bits and 53 >= 2 * 24 + 2, and a sum below 2^-126 that FP64 rounds at all
    is within 2^-155 of a multiple of 2^-149.

    Args:
        operands: x, y, c, width, count, stride: as for `direct`, but x and y are doubles, and of
            y's and C's rows HALF counts.
    """
    _in_float64(emit, True, *operands)


@inline(result=False)
def wide_odd(emit: Emitter, *operands: Any) -> None:
    """As `wide`, where products have up to 48 bits: sums are rounded to odd first."""
    _in_float64(emit, False, *operands)


@inline(result=True)
def kinds(emit: Emitter, c: Any, width: Any, largest: Any) -> Any:
    """Of C[ROWS, COLUMNS]: 1 if an element is subnormal, 2 if none is finite; into `largest` a
    vector of sizes of which the largest is that of the finite elements.
    """
    c, builder = emit.at(c), emit.builder
    tiny, finite = emit.integer(0), emit.integer(0)
    zero, least, infinity = emit.number(0.0), emit.number(LEAST), emit.number(math.inf)
    top = zero
    for i in range(ROWS):
        for j in range(0, COLUMNS, LANES):
            size = emit.load(emit.place(c, emit.times(width, i), j)).size()
            tiny = builder.or_(tiny, ((zero < size) & (size < least)).bits())
            finite = builder.or_(finite, (size < infinity).bits())
            top = (size < infinity).where(top.larger(size), top)
    emit.store(top, emit.at(largest))
    none = emit.integer(0)
    tiny = builder.zext(builder.icmp_unsigned("!=", tiny, none), none.type)
    settled = builder.zext(builder.icmp_unsigned("==", finite, none), none.type)
    return builder.or_(tiny, builder.shl(settled, emit.integer(1)))
