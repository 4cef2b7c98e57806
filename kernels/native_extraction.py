"""The sums of a step in two parts, whatever its terms are, by extraction: for `kernels.native`.

As in Rump, Ogita and Oishi, "Accurate floating-point summation, part I: faithful rounding" (SIAM J.
Sci. Comput. 31, 2008, 189-224), a sum that starts at a number sigma, far above all terms, takes of
each what is a multiple of its own last place, and is exact. Here it does so in one pass for all
terms of a step, and what it leaves of them is added up to a rest, whose error is bounded by what
was added. The rest decides ties.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kernels.native_steps import (
    BAND,
    COLUMNS,
    EXPONENT,
    HALVES,
    PART,
    QUAD,
    limited,
    power_below,
    rows_of,
)
from kernels.vectors import LANES, Emitter, Vector, inline

_BIAS = 1023  # of the exponents of doubles; those of operands have half of it
_X_BIAS, _Y_BIAS = 512, 511
_OF_ZERO = -15000  # the exponent: less than all others
_LARGEST = 300  # what the exponent of an infinity or a NaN counts as; FP32's end at 127
_LOWEST = -300  # the exponent where there is none
HALF_OF_LEAST = 2.0**-150  # of FP32's numbers
ENOUGH = 2.0**600  # no finite term is as large

_WORD, _SHORT = ir.IntType(32), ir.IntType(16)
_WORDS, _SHORTS = ir.VectorType(_WORD, COLUMNS), ir.VectorType(_SHORT, 2 * COLUMNS)


# Exponents of operands, in 16 bits.


def _exponents(emit: Emitter, number: Vector, bias: int) -> Vector:
    """Of doubles, none of which is subnormal."""
    fields = number.words().shifted_down(emit.word(52)) & emit.word(0x7FF)
    zero = fields.same_words(emit.word(0))
    finite = fields.smaller_word(emit.word(_LARGEST + _BIAS))
    found = finite.minus_words(emit.word(_BIAS - bias))
    return zero.where(emit.word(_OF_ZERO), found) & emit.word(0xFFFF)


@inline(result=False)
def exponents_of_rows(emit: Emitter, x: Any, count: Any, found: Any) -> None:
    """Of so many doubles at `x`, whole vectors."""
    builder = emit.builder
    found = builder.inttoptr(found, _SHORT.as_pointer())
    with emit.loop(builder.udiv(count, emit.integer(LANES))) as index:
        at = emit.times(index, LANES)
        words = _exponents(emit, emit.load(emit.place(emit.at(x), at)), _X_BIAS).value
        narrow = builder.trunc(words, ir.VectorType(_SHORT, LANES))
        place = builder.bitcast(emit.place(found, at), narrow.type.as_pointer())
        builder.store(narrow, place).align = 2


def _lane(column: int) -> int:
    """Where the exponents of a column are: those of a half come out of the lower parts of 128 bits
    together, those of the other out of the upper ones.
    """
    half, lane = divmod(column, LANES)
    return lane // 2 * 4 + half * 2 + lane % 2


@inline(result=False)
def exponents_of_columns(emit: Emitter, y: Any, length: Any, found: Any) -> None:
    """Of `y[length, COLUMNS]`: those of two products side by side, in a word for each column."""
    builder = emit.builder
    found, narrow = builder.inttoptr(found, _WORD.as_pointer()), ir.VectorType(_WORD, LANES)
    columns = sorted(range(COLUMNS), key=_lane)
    with emit.loop(builder.udiv(length, emit.integer(2))) as pair:
        halves = []
        for j in HALVES:
            source = emit.place(emit.at(y), emit.times(pair, 2 * COLUMNS), j)
            low, high = (
                _exponents(emit, emit.load(emit.place(source, i * COLUMNS)), _Y_BIAS)
                for i in range(2)
            )
            both = high.shifted_up(emit.word(16)) | low
            halves.append(builder.trunc(both.value, narrow))
        words = builder.shuffle_vector(*halves, ir.Constant(_WORDS, columns))
        place = emit.place(found, emit.times(pair, COLUMNS))
        builder.store(words, builder.bitcast(place, _WORDS.as_pointer())).align = 4


def rounded_to_places(emit: Emitter, total: Vector, rests: tuple[Vector, Vector]) -> list[Vector]:
    """`total` and each rest, rounded once to where FP32 has the last place of the total, see
    `native_steps.in_24_bits`; that is 2^-149, of 2^-97, below its normal numbers. A total of
    HALF_OF_LEAST stays as it is.

    Where a rest and its negative give the same, neither is half of that place. The total may be
    just above a power of two and a sum just below it, whose last place is half as large: an eighth
    of the rest does not get as far as that matters.
    """
    power = total.words() & emit.word(EXPONENT)
    far = emit.word((2 * _BIAS - 97) << 52).minus_words(power).numbers()
    far = far.larger(emit.number(2.0**29))
    factor = emit.number(1.0) - far
    return [total.times_plus(far, total.times_plus(factor, rest)) for rest in rests]


def _largest(emit: Emitter, x: Any, stride: Any, y: Any, quads: Any) -> list[ir.Value]:
    """The largest exponents in the products of a step, of BAND rows: those of even and of odd
    products in a word for each column.
    """
    builder = emit.builder
    x, y = (builder.inttoptr(v, _WORD.as_pointer()) for v in (x, y))
    lowest = Vector(builder, ir.Constant(_SHORTS, [_LOWEST + _BIAS] * _SHORTS.count))
    largest = [emit.variable(lowest) for _ in range(BAND)]
    half = builder.udiv(stride, emit.integer(2))
    rows = [emit.place(x, emit.times(half, i)) for i in range(BAND)]
    words = Emitter(builder, _WORD, COLUMNS)
    with emit.loop(emit.times(quads, QUAD // 2)) as pair:
        right = words.load(emit.place(y, emit.times(pair, COLUMNS))).value
        right = Vector(builder, builder.bitcast(right, _SHORTS))
        for row, variable in zip(rows, largest, strict=True):
            left = words.load_all_equal(emit.place(row, pair)).value
            total = right.plus_words(Vector(builder, builder.bitcast(left, _SHORTS)))
            emit.put(variable, total.larger_integer(emit.get(variable)))
    return largest


def _powers(emit: Emitter, largest: Vector) -> dict[int, Vector]:
    """For each half of a row, the largest powers of two in its products."""
    builder = emit.builder
    words = builder.bitcast(largest.value, _WORDS)
    upper = builder.lshr(words, ir.Constant(_WORDS, [16] * COLUMNS))
    chosen = largest.larger_integer(Vector(builder, builder.bitcast(upper, _SHORTS)))
    words = builder.bitcast(chosen.value, _WORDS)
    fields = builder.shl(words, ir.Constant(_WORDS, [20] * COLUMNS))  # upper halves of doubles
    zeros, powers = ir.Constant(_WORDS, [0] * COLUMNS), {}
    for j in HALVES:
        lanes = [COLUMNS + _lane(j + n // 2) if n % 2 else 0 for n in range(COLUMNS)]
        wide = builder.shuffle_vector(zeros, fields, ir.Constant(_WORDS, lanes))
        powers[j] = Vector(builder, builder.bitcast(wide, emit.vector))
    return powers


def find_powers(emit: Emitter, x: Any, stride: Any, y: Any, quads: Any, found: Any) -> None:
    """`found[BAND, COLUMNS]`: the largest powers of two in the products of a step.

    Args:
        x, y: exponents, of `[BAND, products of the step]` with rows `stride` apart, and of
            `[products of the step, COLUMNS]`.
        quads: of the step.
    """
    found = emit.at(found)
    for i, largest in enumerate(_largest(emit, x, stride, y, quads)):
        for j, power in _powers(emit, emit.get(largest)).items():
            emit.store(power, emit.place(found, i * COLUMNS + j))


powers_of_step = inline(result=False)(find_powers)


@inline(result=False)
def starts_of_step(emit: Emitter, c: Any, powers: Any, constants: Any, parts: Any) -> None:
    """`parts[3, BAND, COLUMNS]` as `extracted` takes them: sigma and what it holds of C, the rest
    of that, and sigma.

    Args:
        powers: by `powers_of_step`.
    """
    c, powers, parts = (emit.at(v) for v in (c, powers, parts))
    scale, enough = emit.load_all_equal(emit.place(emit.at(constants), 1)), emit.number(ENOUGH)
    size = BAND * COLUMNS
    with emit.loop(emit.integer(size // LANES)) as index:
        at = emit.times(index, LANES)
        value = emit.load(emit.place(c, at))
        power = emit.load(emit.place(powers, at)).larger(power_below(emit, value))
        sigma = power.smaller(enough) * scale
        total = sigma + value
        for n, found in enumerate((total, value - (total - sigma), sigma)):
            emit.store(found, emit.place(parts, at, n * size))


@inline(result=False)
def extracted(
    emit: Emitter, x: Any, stride: Any, y: Any, quads: Any, parts: Any, half: Any
) -> None:
    """The sum of a step in parts, of half of the columns, as many as all processors have registers
    for: into `parts[3, BAND, COLUMNS]`, from its first row on, what is extracted, the sum of the
    rests and that of their squares, where there is what `starts_of_step` left.

    Args:
        x: `[PART, products of the step]`, with rows `stride` apart.
        y: `[products of the step, COLUMNS]`.
        quads: of the step.
        half: its number.
    """
    rows, first = rows_of(emit, x, stride, PART), emit.times(half, LANES)
    columns, parts = (emit.place(emit.at(v), first) for v in (y, parts))
    sums, rests, squares = [], [], []

    def place(i: int, part: int) -> Any:
        return emit.place(parts, (part * BAND + i) * COLUMNS)

    for i in range(PART):
        total, rest = (emit.load(place(i, part)) for part in range(2))
        sums.append(emit.variable(total))
        rests.append(emit.variable(rest))
        squares.append(emit.variable(rest * rest))
    with emit.loop(emit.times(quads, QUAD // 2)) as pair:
        first = emit.times(pair, 2)
        line = emit.place(columns, emit.times(first, COLUMNS))
        right = [emit.load(emit.place(line, n * COLUMNS)) for n in range(2)]
        for i, row in enumerate(rows):
            of_two = []
            for n, factor in enumerate(right):
                left, before = emit.load_all_equal(emit.place(row, first, n)), emit.get(sums[i])
                total = left.times_plus(factor, before)
                of_two.append(left.times_plus(factor, -(total - before)))
                emit.put(sums[i], total)
            rest = of_two[0] + of_two[1]
            emit.put(rests[i], emit.get(rests[i]) + rest)
            emit.put(squares[i], rest.times_plus(rest, emit.get(squares[i])))
    for i in range(PART):
        extracted_part = emit.get(sums[i]) - emit.load(place(i, 2))
        for part, value in enumerate((extracted_part, emit.get(rests[i]), emit.get(squares[i]))):
            emit.store(value, place(i, part))


class Rounding:
    """How the sum of a step becomes an FP32 number, by its parts: what is exact, the sum of the
    rests, and that of their squares.

    The root of the last one is taken from its word: half of it is the root's word but for the bias,
    or up to 1.07 times as much. That of 0 is then what is subtracted again. Where it is small
    beside the word `last` of what all terms are multiples of, sums of rests are exact.
    """

    def __init__(self, emit: Emitter, constants: Any, last: Any) -> None:
        self._emit, constants = emit, emit.at(constants)
        self._limit, self._error, room = (
            emit.load_all_equal(emit.place(constants, i)) for i in (0, 2, 3)
        )
        self._firm = emit.all_equal(emit.builder.bitcast(last, emit.element)) * room

    def rounded(self, high: Vector, rest: Vector, square: Vector) -> tuple[Vector, Vector, Any]:
        """The sum in FP64 and in FP32, and bits of those in doubt; where it is usual."""
        emit = self._emit
        total = high + rest
        dropped = rest - (total - high)  # high is a multiple of the rest's last place
        words = square.words().shifted_down(emit.word(1))
        bound = words.plus_words(self._error.words()).numbers() - self._error
        bound = (bound < self._firm).where(emit.number(0.0), bound)
        lowest, largest = rounded_to_places(emit, total, (dropped - bound, dropped + bound))
        doubts = ~lowest.equals(largest), total.size().equals(emit.number(HALF_OF_LEAST))
        return total, lowest, emit.builder.or_(*(doubt.bits() for doubt in doubts))

    def unusual(self, sizes: Vector) -> Any:
        """Bits, if among sums whose sizes add up to that there may be one beyond FP32's numbers, or
        none of whose terms is finite.
        """
        return (~(sizes < self._emit.number(2.0**127))).bits()

    def of_any(self, high: Vector, rest: Vector, found: Vector) -> tuple[Vector, Any]:
        """The sum in FP32, given what `rounded` found, and bits of those that are no number, of
        which the exact part is the sum.
        """
        total = high + rest
        value = limited(self._emit, found, self._limit)
        finite = total.equals(total)
        return finite.where(value, high), (~finite).bits()


@inline(result=True)
def rounded_parts(emit: Emitter, parts: Any, after: Any, constants: Any, last: Any) -> Any:
    """`after[BAND, COLUMNS]` of C by their parts `[3, BAND, COLUMNS]`; bits of those in doubt."""
    builder, rounding = emit.builder, Rounding(emit, constants, last)
    parts, after = emit.at(parts), emit.at(after)
    size, unsure = BAND * COLUMNS, emit.integer_variable(0)
    count = emit.integer(size // LANES)
    sizes = emit.variable(emit.number(0.0))

    def parts_of(at: Any) -> list[Vector]:
        return [emit.load(emit.place(parts, at, n * size)) for n in range(3)]

    with emit.loop(count) as index:
        at = emit.times(index, LANES)
        total, found, doubts = rounding.rounded(*parts_of(at))
        emit.store(found, emit.place(after, at))
        emit.put(sizes, total.size() + emit.get(sizes))
        builder.store(builder.or_(builder.load(unsure), builder.shl(doubts, at)), unsure)
    with emit.when(rounding.unusual(emit.get(sizes))), emit.loop(count) as index:
        at = emit.times(index, LANES)
        high, rest, _ = parts_of(at)
        place = emit.place(after, at)
        value, none = rounding.of_any(high, rest, emit.load(place))
        emit.store(value, place)
        none = builder.not_(builder.shl(none, at))
        builder.store(builder.and_(builder.load(unsure), none), unsure)
    return builder.load(unsure)
