"""A part of a chain for a few rows and columns on an x86's vectors: the arithmetic of
`kernels.native_chain`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from llvmlite import ir

from kernels.native_steps import LEAST, rows_of, to_odd
from kernels.vectors import LANES, ROUNDS_BY_INSTRUCTION, ROWS, Emitter, Vector, inline

COLUMNS = 4 * LANES
CAREFUL = 2 * LANES if LANES == 8 else COLUMNS  # columns at once on the careful ways
VECTOR = 2 * LANES  # columns of one vector

# The processor's control word, MXCSR (Intel 64 manual, volume 1, 10.2.3).
KEEPING = 0x1F80  # to nearest; nothing interrupts
FLUSHING = 0x9FC0  # also, subnormal operands and results are zeros
UNDERFLOW = 0x10  # a result has been flushed

TINY, SETTLED, MINUS_ZERO = 1, 2, 4  # see `kinds`

SCALE_X, SCALE_Y = 64, 63  # exponents
SCALE = 2.0 ** (SCALE_X + SCALE_Y)  # of products and sums
_ONCE = 2.0**-126 * SCALE
_AT_LEAST_TWO = 1 << 30  # the bit that tells of a word of FP32; and `_ONCE` is 2
_FRACTION = (1 << 23) - 1
WHOLE = 2 * 277 + SCALE_X + SCALE_Y - 149  # see `whole`


@inline(result=True)
def control(emit: Emitter) -> Any:
    return emit.control()


@inline(result=False)
def restore(emit: Emitter, word: Any) -> None:
    emit.set_control(word)


def _direct(
    emit: Emitter,
    columns: int,
    x: Any,
    y: Any,
    c: Any,
    width: Any,
    count: Any,
    stride: Any,
    control: Any,
    refused: Any,
) -> Any:
    singles = emit.floats()
    rows, y = rows_of(singles, x, stride, ROWS), singles.at(y)
    emit.set_control(control)
    sums = _sums(emit, emit.at(c), width, 1.0, columns)
    with emit.loop(count) as k:
        factors = _factors(singles, rows, y, k, columns)
        for (_, total), (left, right) in zip(sums, factors, strict=True):
            emit.put(total, left.times_plus(right, emit.get(total)))
    raised = emit.builder.and_(emit.control(), refused)
    with emit.unless(raised):
        for place, total in sums:
            _store(emit, emit.get(total), place)
    return raised


@inline(result=True)
def direct(emit: Emitter, *operands: Any) -> Any:
    """C[ROWS, COLUMNS] += x y in FP32; C stays as it was if one of the control word's flags in
    `refused` is raised, which is the result.

    Args:
        operands: x, y, c, width, count, stride, control, refused:
            control: the control word, `FLUSHING` or `KEEPING`.
            x, y: FP32 `[ROWS, count]`, with rows `stride` apart, and `[count, COLUMNS]`.
            c: doubles, with rows `width` apart.
    """
    return _direct(emit, COLUMNS, *operands)


@inline(result=True)
def direct_careful(emit: Emitter, *operands: Any) -> Any:
    """As `direct`, where of y's and C's rows CAREFUL numbers count."""
    return _direct(emit, CAREFUL, *operands)


def _floats_at(emit: Emitter, place: ir.Value, scale: float | Vector = 1.0) -> Vector:
    """Doubles times `scale` as floats."""
    factor = scale if isinstance(scale, Vector) else emit.number(scale)
    low, high = (emit.load(emit.place(place, start)) * factor for start in (0, LANES))
    return low.to_floats(high)


def _store(emit: Emitter, row: Vector, place: ir.Value, scale: float | Vector = 1.0) -> None:
    factor = scale if isinstance(scale, Vector) else emit.number(scale)
    for half, start in zip(row.to_doubles(), (0, LANES), strict=True):
        emit.store(half * factor, emit.place(place, start))


def _sums(
    emit: Emitter, c: Any, width: Any, scale: float | Vector, columns: int = CAREFUL
) -> list[tuple[Any, Any]]:
    """Of C[ROWS, columns], vectors along rows: where one is, and a variable with its floats times
    `scale`.
    """
    starts = range(0, columns, VECTOR)
    places = [emit.place(c, emit.times(width, i), j) for i in range(ROWS) for j in starts]
    return [(place, emit.variable(_floats_at(emit, place, scale))) for place in places]


def _factors(
    singles: Emitter, rows: list[Any], y: Any, k: Any, columns: int = CAREFUL
) -> list[tuple[Vector, Vector]]:
    """Of step k: what is multiplied for each of `_sums`."""
    ys = singles.place(y, singles.times(k, COLUMNS))
    right = [singles.load(singles.place(ys, j)) for j in range(0, columns, VECTOR)]
    left = [singles.load_all_equal(singles.place(row, k)) for row in rows]
    return [(x, factor) for x in left for factor in right]


class _Grid:
    """How sums below `_ONCE` are rounded to multiples of 2^-149, all times SCALE.

    Such a sum is rounded once, where numbers above are: it is taken from twice `_ONCE` or, if C is
    of the other sign, added to `_ONCE`. C with these is exact where products are below 2^-102.
    """

    def __init__(self, singles: Emitter) -> None:
        self._singles = singles
        self._sign, self._size = singles.word(1 << 31), singles.word((1 << 31) - 1)
        self._half, self._three = singles.number(_ONCE / 2).words(), singles.number(3.0)

    def signed_half(self, number: Vector) -> Vector:
        """Half of `_ONCE` with the sign of a number."""
        return ((number.words() & self._sign) | self._half).numbers()

    def with_sign(self, number: Vector, sign: Vector) -> Vector:
        return ((number.words() & self._size) | (sign.words() & self._sign)).numbers()

    def rounded(self, factors: tuple[Vector, Vector], sums: Any, halves: Any) -> Vector:
        """A sum of C and a product, given C and what FP32 makes of it, and `signed_half` of these
        two; zeros may lose their sign.
        """
        (left, right), (before, total), (half_before, half_now) = factors, sums, halves
        grid = half_before.times_plus(self._three, half_now)
        on_grid = left.times_plus(right, before - grid) + grid
        bit, zero = self._singles.word(_AT_LEAST_TWO), self._singles.word(0)
        return (total.words() & bit).same_words(zero).where(on_grid, total)

    def found(self, factors: tuple[Vector, Vector], sums: tuple[Vector, Vector]) -> Vector:
        """As `rounded`, of any C; zeros have their sign."""
        before, total = (self.signed_half(x) for x in sums)
        return self.with_sign(self.rounded(factors, sums, (before, total)), sums[1])


def _on_grid(
    emit: Emitter, signs: bool, x: Any, y: Any, c: Any, width: Any, count: Any, stride: Any
) -> None:
    singles = emit.floats()
    rows, y, grid = rows_of(singles, x, stride, ROWS), singles.at(y), _Grid(singles)
    emit.set_control(emit.integer(FLUSHING))
    sums = _sums(emit, emit.at(c), width, SCALE)
    halves = [emit.variable(grid.signed_half(emit.get(variable))) for _, variable in sums]
    with emit.loop(count) as k:
        factors = _factors(singles, rows, y, k)
        for (_, variable), half, (left, right) in zip(sums, halves, factors, strict=True):
            before = emit.get(variable)
            total = left.times_plus(right, before)
            signed = grid.signed_half(total)
            found = grid.rounded((left, right), (before, total), (emit.get(half), signed))
            emit.put(variable, grid.with_sign(found, total) if signs else found)
            emit.put(half, signed)
    for (place, variable), last in zip(sums, halves, strict=True):
        _store(emit, grid.with_sign(emit.get(variable), emit.get(last)), place, 1 / SCALE)


@inline(result=False)
def low(emit: Emitter, *operands: Any) -> None:
    """C[ROWS, CAREFUL] += x y, where products are below 2^-102; the last product of none is 0.

    Args:
        operands: x, y, c, width, count, stride: as for `direct_careful`, but x and y are normal
            numbers and SCALE times as large together. So are C and sums here: 2^-126 is `_ONCE`.

    Zeros lose their sign, until another product comes.
    """
    _on_grid(emit, False, *operands)


@inline(result=False)
def low_with_zeros(emit: Emitter, *operands: Any) -> None:
    """As `low`, whatever the last products are."""
    _on_grid(emit, True, *operands)


@inline(result=True)
def whole(emit: Emitter, *operands: Any) -> Any:
    """C[ROWS, COLUMNS] += x y, all times SCALE as for `low`. Only steps whose products may have
    bits below 2^-149 round as that does: a sum of multiples of 2^-149 is a number of FP32 if it is
    below 2^-125, so that FP32 loses no bit but where it has to, whatever their sizes. Not 0 if
    nothing was done, as some sum would be 0 or none.

    Args:
        operands: x, y, c, width, count, stride, x_ends, y_ends, refused: as for `direct`; of each
            step what `native_chain` knows of x and y: together, it is less than `WHOLE` for those
            steps; and -1 if sums that are 0 or none are refused, else 0.
    """
    x, y, c, width, count, stride, x_ends, y_ends, refused = operands
    builder, singles = emit.builder, emit.floats()
    rows, y, grid = rows_of(singles, x, stride, ROWS), singles.at(y), _Grid(singles)
    ends = [builder.inttoptr(at, ir.IntType(32).as_pointer()) for at in (x_ends, y_ends)]
    emit.set_control(emit.integer(FLUSHING))
    sums = _sums(emit, emit.at(c), width, SCALE, COLUMNS)
    with emit.loop(count) as k:
        factors = _factors(singles, rows, y, k, COLUMNS)
        end = builder.add(*(builder.load(emit.place(at, k)) for at in ends))
        is_whole = builder.icmp_unsigned(">=", end, ir.Constant(end.type, WHOLE))
        with builder.if_else(is_whole, likely=True) as (quick, careful):
            with quick:
                for (_, variable), (left, right) in zip(sums, factors, strict=True):
                    emit.put(variable, left.times_plus(right, emit.get(variable)))
            with careful:
                for (_, variable), (left, right) in zip(sums, factors, strict=True):
                    before = emit.get(variable)
                    total = left.times_plus(right, before)
                    emit.put(variable, grid.found((left, right), (before, total)))
    zero = singles.number(0.0)
    usual = functools.reduce(Vector.__and__, [zero < emit.get(total).size() for _, total in sums])
    failed = builder.and_((~usual).bits(), refused)
    with emit.unless(failed):
        for place, variable in sums:
            _store(emit, emit.get(variable), place, 1 / SCALE)
    return failed


@inline(result=True)
def seldom(emit: Emitter, *operands: Any) -> Any:
    """As `low`, whatever the last products are, where few sums are below `_ONCE` but 0: in a step
    without any in half of the rows, these need no care. The result is how often they did.
    """
    x, y, c, width, count, stride = operands
    builder, singles = emit.builder, emit.floats()
    rows, y, grid = rows_of(singles, x, stride, ROWS), singles.at(y), _Grid(singles)
    minus_one, bit, zero = (singles.word(x) for x in (0xFFFFFFFF, _AT_LEAST_TWO, 0))
    times = emit.integer_variable(0)
    emit.set_control(emit.integer(FLUSHING))
    sums = _sums(emit, emit.at(c), width, SCALE)
    together = len(sums) // 2
    with emit.loop(count) as k:
        factors = _factors(singles, rows, y, k)
        for first in range(0, len(sums), together):
            steps = []
            for i in range(first, first + together):
                (_, variable), (left, right) = sums[i], factors[i]
                before = emit.get(variable)
                total = left.times_plus(right, before)
                emit.put(variable, total)
                steps.append((variable, (left, right), (before, total)))
            # Of one less, the bit is not set below `_ONCE` and there, but for zeros.
            less = [total.words().plus_words(minus_one) for _, _, (_, total) in steps]
            large = functools.reduce(Vector.__and__, less) & bit
            with emit.when(large.same_words(zero).bits()):
                builder.store(builder.add(builder.load(times), emit.integer(1)), times)
                for variable, pair, both in steps:
                    emit.put(variable, grid.found(pair, both))
    for place, variable in sums:
        _store(emit, emit.get(variable), place, 1 / SCALE)
    return builder.load(times)


def _deep(
    emit: Emitter, signs: bool, x: Any, y: Any, c: Any, width: Any, count: Any, stride: Any
) -> Any:
    singles = emit.floats()
    rows, y, grid = rows_of(singles, x, stride, ROWS), singles.at(y), _Grid(singles)
    middle, once = singles.number(1.5 * _ONCE), singles.number(_ONCE).words()
    emit.set_control(emit.integer(FLUSHING))
    sums = _sums(emit, emit.at(c), width, SCALE)
    lasts = [emit.variable(emit.get(variable)) for _, variable in sums]  # with the right signs
    for _, variable in sums:
        emit.put(variable, emit.get(variable) + middle)
    moved = emit.variable(singles.word(0))  # bits in which sums have differed from `_ONCE`

    def look() -> None:
        words = [emit.get(variable).words() ^ once for _, variable in sums]
        emit.put(moved, emit.get(moved) | functools.reduce(Vector.__or__, words))

    look()

    def without_middle(variable: Any, last: Any) -> Vector:
        found = emit.get(variable) - middle
        return grid.with_sign(found, emit.get(last)) if signs else found

    with emit.loop(count) as k:
        factors = _factors(singles, rows, y, k)
        for i, ((_, variable), last) in enumerate(zip(sums, lasts, strict=True)):
            left, right = factors[i]
            if signs:
                emit.put(last, left.times_plus(right, without_middle(variable, last)))
            emit.put(variable, left.times_plus(right, emit.get(variable)))
        look()
    failed = singles.word(_FRACTION).less_word(emit.get(moved)).bits()
    with emit.unless(failed):
        for (place, variable), last in zip(sums, lasts, strict=True):
            _store(emit, without_middle(variable, last), place, 1 / SCALE)
    return failed


@inline(result=True)
def deep(emit: Emitter, *operands: Any) -> Any:
    """As `low`, but zeros lose their sign; C stays as it was, and the result is not 0, if it or a
    sum reaches half of `_ONCE`.

    Added onto 1.5 times `_ONCE`, all others are rounded where they have to be.
    """
    return _deep(emit, False, *operands)


@inline(result=True)
def deep_with_zeros(emit: Emitter, *operands: Any) -> Any:
    """As `deep`; zeros have their sign."""
    return _deep(emit, True, *operands)


def _power_of_two(emit: Emitter, exponent: ir.Value) -> Vector:
    biased = emit.builder.add(exponent, emit.integer(1023))
    return emit.all_words_equal(emit.builder.shl(biased, emit.integer(52))).numbers()


def _firm(
    emit: Emitter,
    zeros: bool,
    x: Any,
    y: Any,
    c: Any,
    width: Any,
    count: Any,
    stride: Any,
    scale: Any,
) -> Any:
    builder, singles = emit.builder, emit.floats()
    rows, y = rows_of(singles, x, stride, ROWS), singles.at(y)
    minus_one, bit = singles.word(0xFFFFFFFF), singles.word(_AT_LEAST_TWO)

    def told(total: Vector) -> Vector:
        """Of one less, the bit is not set below 2 and there, but for zeros."""
        return total.words().plus_words(minus_one) if zeros else total.words()

    emit.set_control(emit.integer(FLUSHING))
    sums = _sums(emit, emit.at(c), width, _power_of_two(emit, scale))

    def all_told() -> Vector:
        return functools.reduce(Vector.__and__, [told(emit.get(total)) for _, total in sums])

    found = emit.variable(all_told() if zeros else bit)
    with emit.loop(count) as k:
        factors = _factors(singles, rows, y, k)
        for (_, total), (left, right) in zip(sums, factors, strict=True):
            emit.put(total, left.times_plus(right, emit.get(total)))
        emit.put(found, emit.get(found) & all_told())
    large = emit.get(found) & bit
    failed = large.same_words(singles.word(0)).bits()
    if zeros:
        flushed = builder.and_(emit.control(), emit.integer(UNDERFLOW))
        failed = builder.or_(failed, flushed)
    with emit.unless(failed):
        back = _power_of_two(emit, builder.neg(scale))
        for place, variable in sums:
            _store(emit, emit.get(variable), place, back)
    return failed


@inline(result=True)
def firm(emit: Emitter, *operands: Any) -> Any:
    """C[ROWS, CAREFUL] += x y in FP32, flushing, all times a power of two; C stays as it was, and
    the result is not 0, if any sum on the way is below 2.

    Args:
        operands: x, y, c, width, count, stride, scale: as for `direct_careful`, but x and y are
            normal numbers and 2^scale times as large together.
    """
    return _firm(emit, False, *operands)


@inline(result=True)
def firm_with_zeros(emit: Emitter, *operands: Any) -> Any:
    """As `firm`, but C and sums may be 0, if nothing is flushed; neither may be 2 or less else."""
    return _firm(emit, True, *operands)


def _in_float64(
    emit: Emitter, narrow: bool, x: Any, y: Any, c: Any, width: Any, count: Any, stride: Any
) -> None:
    rows, y, c = rows_of(emit, x, stride, ROWS), emit.at(y), emit.at(c)
    emit.set_control(emit.integer(KEEPING))
    with emit.loop(emit.integer(CAREFUL // VECTOR)) as part:
        first = emit.times(part, VECTOR)
        offsets = [emit.builder.add(first, emit.integer(j)) for j in (0, LANES)]
        places = [emit.place(c, emit.times(width, i), j) for i in range(ROWS) for j in offsets]
        sums = [emit.variable(emit.load(place)) for place in places]
        with emit.loop(count) as k:
            ys = emit.place(y, emit.times(k, COLUMNS))
            right = [emit.load(emit.place(ys, j)) for j in offsets]
            left = [emit.load_all_equal(emit.place(row, k)) for row in rows]
            factors = [(x, factor) for x in left for factor in right]
            for variable, (factor, other) in zip(sums, factors, strict=True):
                before = emit.get(variable)
                if narrow:
                    total = factor.times_plus(other, before)
                else:
                    total = _product_and_sum_to_odd(emit, factor, other, before)
                emit.put(variable, total.to_float32())
        for total, place in zip(sums, places, strict=True):
            emit.store(emit.get(total), place)


def _product_and_sum_to_odd(emit: Emitter, x: Vector, y: Vector, z: Vector) -> Vector:
    """`x y + z` rounded to odd; the product is exact. Of two numbers beside each other one is odd,
    and a zero is -0 only if it is on both sides.
    """
    if not ROUNDS_BY_INSTRUCTION:
        return to_odd(emit, *(x * y).sum_and_rest(z))
    down, up = (emit.bound(is_up, x, y, z) for is_up in (False, True))
    even = (down.words() & emit.word(1)).same_words(emit.word(0))
    return even.where(up, down)


@inline(result=False)
def wide(emit: Emitter, *operands: Any) -> None:
    """C[ROWS, CAREFUL] += x y, whatever they are; products have 24 bits at most.

    FP64's multiply-add rounds so far below FP32's last place that rounding again is harmless: to
    nearest, FP32 has 24 bits and 53 >= 2 * 24 + 2, and a sum below 2^-126 that FP64 rounds at all
    is within 2^-155 of a multiple of 2^-149. Conversions take no longer where numbers are
    subnormal.

    Args:
        operands: x, y, c, width, count, stride: as for `direct_careful`, but x and y are doubles.
    """
    _in_float64(emit, True, *operands)


@inline(result=False)
def wide_odd(emit: Emitter, *operands: Any) -> None:
    """As `wide`, where products have up to 48 bits: sums are rounded to odd first."""
    _in_float64(emit, False, *operands)


@inline(result=True)
def kinds(emit: Emitter, c: Any, width: Any) -> Any:
    """Of C[ROWS, CAREFUL]: the word of a double, the size of the largest finite element, whose last
    bits are free: `TINY` if an element is subnormal, `SETTLED` if none is finite, `MINUS_ZERO` if
    one is that.
    """
    c, builder = emit.at(c), emit.builder
    none = emit.integer(0)
    tiny, finite, minus_zero = none, none, none
    zero, least, infinity = emit.number(0.0), emit.number(LEAST), emit.number(math.inf)
    top = zero
    for i in range(ROWS):
        for j in range(0, CAREFUL, LANES):
            number = emit.load(emit.place(c, emit.times(width, i), j))
            size = number.size()
            tiny = builder.or_(tiny, ((zero < size) & (size < least)).bits())
            finite = builder.or_(finite, (size < infinity).bits())
            is_minus_zero = number.words().same_words(emit.word(1 << 63))
            minus_zero = builder.or_(minus_zero, is_minus_zero.bits())
            top = (size < infinity).where(top.larger(size), top)

    def flag(value: int, holds: Any) -> Any:
        return builder.select(holds, emit.integer(value), none)

    found = top.words().largest_word()
    found = builder.or_(found, flag(TINY, builder.icmp_unsigned("!=", tiny, none)))
    found = builder.or_(found, flag(SETTLED, builder.icmp_unsigned("==", finite, none)))
    return builder.or_(found, flag(MINUS_ZERO, builder.icmp_unsigned("!=", minus_zero, none)))
