"""The sums of a step in two parts, whatever its terms are, by extraction: for `kernels.native`.

As in Rump, Ogita and Oishi, "Accurate floating-point summation, part I: faithful rounding" (SIAM J.
Sci. Comput. 31, 2008, 189-224), a sum that starts at a number sigma, far above all terms, takes of
each what is a multiple of its own last place, and is exact. Here it does so in one pass for all
terms of a step, and what it leaves of them is added up to a rest, whose error is bounded by what
was added. The rest decides ties.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from kernels.native_steps import (
    COLUMNS,
    EXPONENT,
    HALVES,
    PART,
    QUAD,
    rows_of,
)
from kernels.vectors import LANES, Emitter, Vector, inline

_BIAS = 1023  # of the exponents of doubles; those of operands have half of it
_X_BIAS, _Y_BIAS = 512, 511
_OF_ZERO = -15000  # the exponent: less than all others
_LARGEST = 300  # what the exponent of an infinity or a NaN counts as; FP32's end at 127
_LOWEST = -300  # the exponent where there is none
_ENOUGH = 2.0**600  # no finite term is as large

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


def _power(emit: Emitter, x: Vector) -> Vector:
    """The largest power of two that is not above the size of `x`; 0 of 0."""
    return (x.words() & emit.word(EXPONENT)).numbers()


def _rounded_to_24_bits(
    emit: Emitter, total: Vector, rests: tuple[Vector, Vector], far: Vector
) -> list[Vector]:
    """`total` and each rest, rounded once to where `far total` has its last place, see
    `native_steps.in_24_bits`.

    Where a rest and its negative give the same, neither is half of FP32's last place. The total may
    be just above a power of two and a sum just below it, whose last place is half as large: an
    eighth of the rest does not get as far as that matters.
    """
    factor = emit.number(1.0) - far
    return [total.times_plus(far, total.times_plus(factor, rest)) for rest in rests]


def _limited(emit: Emitter, found: Vector, limit: Vector) -> Vector:
    """What is found, or the limit with its sign if that is beyond FP32's numbers."""
    sign = found.words() & emit.word(1 << 63)
    within = found.size() < emit.number(2.0**128)
    return within.where(found, (limit.words() | sign).numbers())


def _largest(emit: Emitter, x: Any, stride: Any, y: Any, quads: Any) -> list[ir.Value]:
    """The largest exponents in the products of a step, of PART rows: those of even and of odd
    products in a word for each column.
    """
    builder = emit.builder
    x, y = (builder.inttoptr(v, _WORD.as_pointer()) for v in (x, y))
    lowest = Vector(builder, ir.Constant(_SHORTS, [_LOWEST + _BIAS] * _SHORTS.count))
    largest = [emit.variable(lowest) for _ in range(PART)]
    half = builder.udiv(stride, emit.integer(2))
    rows = [emit.place(x, emit.times(half, i)) for i in range(PART)]
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


@inline(result=False)
def powers_of_step(emit: Emitter, x: Any, stride: Any, y: Any, quads: Any, found: Any) -> None:
    """`found[PART, COLUMNS]`: the largest powers of two in the products of a step.

    Args:
        x, y: exponents, of `[PART, products of the step]` with rows `stride` apart, and of
            `[products of the step, COLUMNS]`.
        quads: of the step.
    """
    found = emit.at(found)
    for i, largest in enumerate(_largest(emit, x, stride, y, quads)):
        for j, power in _powers(emit, emit.get(largest)).items():
            emit.store(power, emit.place(found, i * COLUMNS + j))


@inline(result=False)
def extracted(
    emit: Emitter,
    x: Any,
    stride: Any,
    y: Any,
    c: Any,
    quads: Any,
    constants: Any,
    powers: Any,
    parts: Any,
    half: Any,
) -> None:
    """The sum of a step in parts, of half of the columns, as many as all processors have registers
    for: into `parts[3, PART, COLUMNS]` what is extracted, the sum of the rests and that of their
    squares.

    Args:
        x: `[PART, products of the step]`, with rows `stride` apart.
        y: `[products of the step, COLUMNS]`.
        quads: of the step.
        powers: by `powers_of_step`.
        half: its number.
    """
    rows, first = rows_of(emit, x, stride, PART), emit.times(half, LANES)
    columns, powers, parts, c = (emit.place(emit.at(v), first) for v in (y, powers, parts, c))
    scale = emit.load_all_equal(emit.place(emit.at(constants), 1))
    sigmas, sums, rests, squares = [], [], [], []
    for i in range(PART):
        value = emit.load(emit.place(c, i * COLUMNS))
        power = emit.load(emit.place(powers, i * COLUMNS)).larger(_power(emit, value))
        sigma = power.smaller(emit.number(_ENOUGH)) * scale
        total = sigma + value
        rest = value - (total - sigma)
        sigmas.append(sigma)
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
        found = emit.get(sums[i]) - sigmas[i], emit.get(rests[i]), emit.get(squares[i])
        for n, value in enumerate(found):
            emit.store(value, emit.place(parts, (n * PART + i) * COLUMNS))


@inline(result=True)
def rounded_parts(
    emit: Emitter, parts: Any, after: Any, constants: Any, last: Any, half: Any
) -> Any:
    """Half of the columns of `after[PART, COLUMNS]` of C by parts that were `extracted`; bits of
    elements for which that does not do.

    The sum of what is extracted and of rests, which are at most some of its last places, is a
    double and what that drops: by Dekker's sum, which asks for a first term that is 0, larger or a
    multiple of such places.

    The root of the sum of the rests' squares is taken from its word: half of it is the root's word
    but for the bias, or up to 1.07 times as much. That of 0 is then what is subtracted again. Where
    it is small beside the word `last` of what all terms are multiples of, sums of rests are exact.

    Below FP32's normal numbers, the last place is 2^-149, that of 2^-97; for all but 2^-150 itself.
    """
    first = emit.times(half, LANES)
    parts, after = (emit.place(emit.at(v), first) for v in (parts, after))
    constants = emit.at(constants)
    limit, error = (emit.load_all_equal(emit.place(constants, i)) for i in (0, 2))
    tie, unsure = emit.number(2.0**-150), []
    zero, room = emit.number(0.0), emit.load_all_equal(emit.place(constants, 3))
    firm = emit.all_equal(emit.builder.bitcast(last, emit.element)) * room
    for i in range(PART):
        at = i * COLUMNS
        high, rest, square = (
            emit.load(emit.place(parts, n * PART * COLUMNS + at)) for n in range(3)
        )
        total = high + rest
        dropped = rest - (total - high)
        words = square.words().shifted_down(emit.word(1))
        bound = words.plus_words(error.words()).numbers() - error
        bound = (bound < firm).where(zero, bound)
        power = total.words() & emit.word(EXPONENT)
        far = emit.word((2 * _BIAS - 97) << 52).minus_words(power).numbers()
        far = far.larger(emit.number(2.0**29))
        rests = dropped - bound, dropped + bound
        lowest, largest = _rounded_to_24_bits(emit, total, rests, far)
        finite = total.equals(total)
        unsure.append(finite & (~lowest.equals(largest) | total.size().equals(tie)))
        value = _limited(emit, lowest, limit)
        emit.store(finite.where(value, high), emit.place(after, at))
    bits = emit.integer_variable(0)
    emit.builder.store(emit.integer(0), bits)
    with emit.when(functools.reduce(Vector.__or__, unsure).bits()):
        for i, answer in enumerate(unsure):
            place = emit.builder.add(first, emit.integer(i * COLUMNS))
            here = emit.builder.shl(answer.bits(), place)
            emit.builder.store(emit.builder.or_(emit.builder.load(bits), here), bits)
    return emit.builder.load(bits)
