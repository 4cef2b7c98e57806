"""Steps that cut their terms to a common grid, for a few rows and columns on a processor's vectors:
the arithmetic of `kernels.native_aligned`.

An accumulator is held as three words: `number`, a float that is an integer of 24 bits at most;
`unit`, the exponent that belongs to it, and 127; and `exponent`, the one that alignment sees. Zeros
have `NO_EXPONENT`; infinities have `INFINITE`, and what is no number has `NAN`, so that no finite
term changes them.

The processor has to round toward zero. What is multiplied here is exact; only `counted_with_sign`
rounds, and that is how a unit rounds its sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from kernels.native_chain_steps import COLUMNS, VECTOR
from kernels.native_steps import rows_of
from kernels.vectors import TOWARD_ZERO, Emitter, Vector, inline

ROWS = 2

NO_EXPONENT = -10000  # of a zero, also among operands: never the largest
INFINITE, NAN = 2000, 3000  # of an infinity, and of what is no number: always the largest
RANGE = 48  # exponents of nonzero numbers that `narrow` takes, from the largest one down

_BIAS = 127
_LOWEST = -126
_LAST = -149  # the exponent of the last bit
_FEW_BITS = 30  # sums of fewer bits have not been too long for a word
_SIZE, _SIGN, _INFINITY = 0x7FFFFFFF, 1 << 31, 0x7F800000

_Terms = Callable[[Any], list[Vector]]


class _Group:
    """Operands of `ROWS x COLUMNS` elements: values and exponents, see `narrow`."""

    def __init__(self, emit: Emitter, operands: tuple[Any, ...], stride: Any) -> None:
        x, xs, y, ys = operands
        self.singles = emit.floats()
        self._rows, self._row_exponents = (
            rows_of(self.singles, at, stride, ROWS) for at in (x, xs)
        )
        self._columns, self._column_exponents = (self.singles.at(at) for at in (y, ys))

    def factors(self, k: Any) -> list[tuple[Vector, Vector]]:
        """Of product k: the values of each element."""
        singles = self.singles
        row = singles.place(self._columns, singles.times(k, COLUMNS))
        right = [singles.load(singles.place(row, j)) for j in range(0, COLUMNS, VECTOR)]
        left = [singles.load_all_equal(singles.place(at, k)) for at in self._rows]
        return [(x, y) for x in left for y in right]

    def exponents(self, k: Any) -> list[Vector]:
        """The exponents of product k: of each row, as 16-bit integers."""
        singles = self.singles
        row = singles.place(self._column_exponents, singles.times(k, COLUMNS // 2))
        right = singles.load(row).halves()
        left = [singles.load_all_equal(singles.place(at, k)) for at in self._row_exponents]
        return [x.halves().plus_words(right) for x in left]


def _all_equal(singles: Emitter, value: Any) -> Vector:
    return singles.all_words_equal(singles.builder.trunc(value, ir.IntType(32)))


def _power_of_two(singles: Emitter, biased: Vector, least: int) -> Vector:
    """2^(biased - 127), or 2^least if that is larger; at most 2^127."""
    most = singles.word(2 * _BIAS)
    biased = biased.larger_integer(singles.word(_BIAS + least))
    return biased.smaller_word(most).shifted_up(singles.word(23)).numbers()


def _scaled_by_steps(group: _Group, tops: list[Vector], shift: Vector) -> _Terms:
    scales = [_power_of_two(group.singles, shift.minus_words(top), -3) for top in tops]

    def terms(k: Any) -> list[Vector]:
        factors = group.factors(k)
        return [(x * y * scale).integers() for (x, y), scale in zip(factors, scales, strict=True)]

    return terms


def _scaled_one_by_one(group: _Group, tops: list[Vector], shift: Vector) -> _Terms:
    grids = [top.minus_words(shift) for top in tops]
    none, places = group.singles.word(_BIAS - 3), group.singles.word(23)

    def terms(k: Any) -> list[Vector]:
        exponents = [half for row in group.exponents(k) for half in row.to_integers()]
        found = []
        for (x, y), exponent, grid in zip(group.factors(k), exponents, grids, strict=True):
            scale = exponent.minus_words(grid).larger_integer(none).shifted_up(places).numbers()
            found.append((x * y * scale).integers())
        return found

    return terms


def _steps(
    emit: Emitter,
    terms_of: Callable[[_Group, list[Vector], Vector], _Terms],
    operands: tuple[Any, ...],
    c: Any,
    apart: Any,
    width: Any,
    stride: Any,
    steps: Any,
    products: Any,
    *rest: Any,
) -> None:
    group, singles = _Group(emit, operands, stride), emit.floats()
    cut, floor, shift = (_all_equal(singles, value) for value in rest[:3])
    starts = range(0, COLUMNS, VECTOR)
    c = singles.at(c)
    places = [singles.place(c, singles.times(width, i), j) for i in range(ROWS) for j in starts]
    parts = [emit.integer(0), apart, singles.times(apart, 2)]
    sums = [
        [emit.variable(singles.load(singles.place(place, part))) for part in parts]
        for place in places
    ]
    to_biased = cut.minus_words(singles.word(_BIAS))
    to_place = cut.plus_words(singles.word(_BIAS))
    lowest = singles.word(2 * NO_EXPONENT * 0x10001 % (1 << 32)).halves()

    def get(variable: Any) -> Vector:
        return emit.get(variable).words()

    def put(variables: list[Any], number: Vector, unit: Vector, exponent: Vector) -> None:
        for variable, value in zip(
            variables, (number, unit.numbers(), exponent.numbers()), strict=True
        ):
            emit.put(variable, value)

    with emit.loop(steps) as step:
        first = emit.times(step, products)
        highest = [emit.variable(lowest) for _ in range(ROWS)]
        with emit.loop(products) as p:
            exponents = group.exponents(emit.builder.add(first, p))
            for top, exponent in zip(highest, exponents, strict=True):
                emit.put(top, emit.get(top).larger_integer(exponent))
        tops = [half for top in highest for half in emit.get(top).to_integers()]
        tops = [
            top.larger_integer(floor.larger_integer(get(exponent)))
            for top, (*_, exponent) in zip(tops, sums, strict=True)
        ]
        terms = terms_of(group, tops, shift)
        totals = [emit.variable(singles.word(0)) for _ in sums]
        with emit.loop(products) as p:
            for total, term in zip(totals, terms(emit.builder.add(first, p)), strict=True):
                emit.put(total, emit.get(total).plus_words(term))
        before, added, fields, exponents = [], [], [], []
        for variables, top, total in zip(sums, tops, totals, strict=True):
            number, unit, exponent_before = variables
            before.append((emit.get(number), get(exponent_before)))
            unit_now = top.minus_words(to_biased)
            moved = get(unit).minus_words(unit_now).plus_words(singles.word(_BIAS))
            moved = moved.larger_integer(singles.word(_BIAS - 40))
            scale = moved.shifted_up(singles.word(23)).numbers()
            term = (emit.get(number) * scale).integers()
            rounded = emit.get(total).plus_words(term).counted_with_sign()
            field = _field(singles, rounded)
            exponent = field.plus_words(top.minus_words(to_place))
            put(variables, rounded, unit_now, exponent)
            added.append((emit.get(total), term, unit_now))
            fields.append(field)
            exponents.append(exponent)
        with emit.when(_any_negative(singles, _unusual(singles, fields, exponents))):
            each = [
                _unusual(singles, [field], [exponent]) & top.minus_words(singles.word(INFINITE))
                for field, exponent, top in zip(fields, exponents, tops, strict=True)
            ]
            with emit.when(_any_negative(singles, functools.reduce(Vector.__or__, each))):
                for variables, (total, term, unit) in zip(sums, added, strict=True):
                    put(variables, *_sum(singles, total, term, unit))
        with emit.when(rest[3]):
            kinds = [emit.variable(_kind(singles, *old)) for old in before]
            with emit.loop(products) as p:
                factors = group.factors(emit.builder.add(first, p))
                for kind, (left, right) in zip(kinds, factors, strict=True):
                    emit.put(kind, emit.get(kind) + left * right)
            for kind, variables in zip(kinds, sums, strict=True):
                now = [emit.get(variables[0]), *(get(variable) for variable in variables[1:])]
                put(variables, *_unless_special(singles, emit.get(kind), *now))
    for place, variables in zip(places, sums, strict=True):
        for part, variable in zip(parts, variables, strict=True):
            singles.store(emit.get(variable), singles.place(place, part))


def _field(singles: Emitter, number: Vector) -> Vector:
    """The exponent of its leading bit and 127; of a zero, 0."""
    return number.words().shifted_up(singles.word(1)).shifted_down(singles.word(24))


def _outside(singles: Emitter, values: list[Vector], least: int, most: int) -> Vector:
    """Negative where any of the values is."""
    low = functools.reduce(Vector.smaller_integer, values).minus_words(singles.word(least))
    return low | singles.word(most).minus_words(functools.reduce(Vector.larger_integer, values))


def _unusual(singles: Emitter, fields: list[Vector], exponents: list[Vector]) -> Vector:
    """Negative where a sum is zero, may have been too long, or is no normal number."""
    return _outside(singles, fields, _BIAS, _BIAS + _FEW_BITS - 1) | _outside(
        singles, exponents, _LOWEST, _BIAS
    )


def _any_negative(singles: Emitter, words: Vector) -> ir.Value:
    return singles.word(_SIZE).less_word(words).bits()


def _kind(singles: Emitter, number: Vector, exponent: Vector) -> Vector:
    """An infinity or NaN for an accumulator that is that, else 0."""
    infinite, nan = (exponent.less_integer(singles.word(x)) for x in (INFINITE, NAN))
    kind = nan.where(number * singles.number(math.inf), singles.number(math.nan))
    return infinite.where(singles.number(0.0), kind)


def _unless_special(
    singles: Emitter, kind: Vector, number: Vector, unit: Vector, exponent: Vector
) -> tuple[Vector, Vector, Vector]:
    """An accumulator, or an infinity or NaN if the kind is that."""
    size, sign = kind.words() & singles.word(_SIZE), kind.words() & singles.word(_SIGN)
    finite, infinity = size.less_word(singles.word(_INFINITY)), singles.word(INFINITE)
    special = size.same_words(singles.word(_INFINITY)).where(infinity, singles.word(NAN))
    one = (singles.number(1.0).words() | sign).numbers()
    return (
        finite.where(number, one),
        finite.where(unit, special.plus_words(singles.word(_BIAS))),
        finite.where(exponent, special),
    )


def _sum(
    singles: Emitter, total: Vector, term: Vector, unit: Vector
) -> tuple[Vector, Vector, Vector]:
    """The accumulator of a sum of products and C, whatever they are: 32 bits may be one too few."""
    zero, none, one = singles.word(0), singles.word(NO_EXPONENT), singles.number(1.0)
    wrapped = total.plus_words(term)
    wraps = (total ^ wrapped) & (term ^ wrapped)
    negative = (wrapped ^ wraps).signs()
    size = (wrapped ^ negative).minus_words(negative)
    longer = size.shifted_down(singles.word(31))
    size, unit = size.shifted_down(longer), unit.plus_words(longer)
    exponent = _field(singles, size.counted_with_sign()).plus_words(unit)
    exponent = exponent.minus_words(singles.word(2 * _BIAS))
    below = singles.word(_LAST + _BIAS).minus_words(unit).larger_integer(zero)
    tiny = exponent.less_integer(singles.word(_LOWEST))
    size = tiny.where(size.shifted_out(below), size)
    unit = tiny.where(unit.plus_words(below), unit)
    exponent = tiny.where(singles.word(_LOWEST), exponent)
    is_zero = size.same_words(zero)
    infinite = singles.word(_BIAS).less_integer(exponent)
    number = infinite.where(one, size.counted_with_sign())
    number = (number.words() | (negative & singles.word(_SIGN))).numbers()
    limit = exponent.larger_integer(singles.word(INFINITE))
    unit = infinite.where(limit.plus_words(singles.word(_BIAS)), unit)
    exponent = infinite.where(limit, exponent)
    number = is_zero.where(singles.number(0.0), number)
    return number, is_zero.where(none, unit), is_zero.where(none, exponent)


@inline(result=True)
def toward_zero(emit: Emitter) -> Any:
    """The control word, after which the processor rounds toward zero."""
    before = emit.control()
    emit.set_control(emit.builder.or_(before, emit.integer(TOWARD_ZERO)))
    return before


@inline(result=False)
def narrow(emit: Emitter, *operands: Any) -> None:
    """The accumulators `C[ROWS, COLUMNS]` after some steps.

    Args:
        operands: x, x_exponents, y, y_exponents, c, apart, width, stride, steps, products, cut,
            floor, shift, special:
            x, y: values `[ROWS, steps * products]`, rows `stride` apart, and `[.., COLUMNS]`:
                floats of at most 12 bits, less than 2, and not less than 2^-RANGE but for zeros:
                those that were read, each divided by a power of two that all of x or y share.
            x_exponents, y_exponents: what alignment sees, 16-bit integers; those of x are twice in
                a word.
            c: the numbers, then units and exponents, `apart` words from each other; rows are
                `width` apart.
            cut, floor: fraction bits of the grid, and its least exponent.
            shift: cut + 127 and the exponents of the powers of two.
            special: not 0 if values are infinite or NaN.

    What is computed of infinities and NaNs before that is looked at does not count.
    """
    _steps(emit, _scaled_by_steps, operands[:4], *operands[4:])


@inline(result=False)
def wide(emit: Emitter, *operands: Any) -> None:
    """As `narrow`, but each value was divided by two to the power of its own exponent, and `shift`
    is cut + 127.
    """
    _steps(emit, _scaled_one_by_one, operands[:4], *operands[4:])


def _map(emit: Emitter, count: Any, function: Callable[[Any], None]) -> None:
    """`function` of the index of every VECTOR of so many words; those are whole vectors."""
    with emit.loop(emit.builder.udiv(count, emit.integer(VECTOR))) as index:
        function(emit.times(index, VECTOR))


def _exponents(singles: Emitter, size: Vector, lowest: Vector) -> Vector:
    """Of the sizes of FP32 words, in a type whose normal numbers begin at 2^lowest."""
    place = size.shifted_down(singles.word(23)).minus_words(singles.word(_BIAS))
    is_zero = size.same_words(singles.word(0))
    return is_zero.where(singles.word(NO_EXPONENT), place.larger_integer(lowest))


def _split(
    emit: Emitter, of_rows: bool, words: Any, exponents: Any, count: Any, *options: Any
) -> ir.Value:
    singles = emit.floats()
    words, exponents = singles.at(words), singles.at(exponents)
    lowest, is_wide, top = (_all_equal(singles, option) for option in options)
    places, zero, infinity = singles.word(23), singles.word(0), singles.word(_INFINITY)
    is_wide, largest = is_wide.signs(), emit.variable(zero)

    def split(index: Any) -> None:
        here = singles.place(words, index)
        word = singles.load(here).words()
        size = word & singles.word(_SIZE)
        emit.put(largest, emit.get(largest).larger_word(size))
        finite = size.less_word(infinity)
        exponent = _exponents(singles, size, lowest)
        down = (exponent & is_wide) | (top & ~is_wide)
        subnormal = size.counted().words().plus_words(singles.word((_LAST << 23) % (1 << 32)))
        normal = size.less_word(singles.word(1 << 23)).where(subnormal, size)
        value = normal.minus_words(down.shifted_up(places)) | (word & singles.word(_SIGN))
        value = size.same_words(zero).where(zero, finite.where(value, word))
        exponent = finite.where(exponent, singles.word(NO_EXPONENT))
        singles.store(value.numbers(), here)
        upper = exponent.shifted_up(singles.word(16))
        if of_rows:
            both = upper | (exponent & singles.word(0xFFFF))
            singles.store(both.numbers(), singles.place(exponents, index))
        else:
            half = emit.builder.udiv(index, emit.integer(2))
            singles.store_short(upper, singles.place(exponents, half))

    _map(emit, count, split)
    return (~emit.get(largest).less_word(infinity)).bits()


@inline(result=True)
def split_rows(emit: Emitter, *operands: Any) -> Any:
    """FP32 words become values and exponents of x; the result is not 0 if any is infinite or NaN.

    Args:
        operands: words, exponents, count, lowest, is_wide, top: the exponent of the type's least
            normal number; -1 for `wide`, else 0; and the exponent of the power of two by which
            `narrow` has them divided.
    """
    return _split(emit, True, *operands)


@inline(result=True)
def split_columns(emit: Emitter, *operands: Any) -> Any:
    """As `split_rows`, of y."""
    return _split(emit, False, *operands)


@inline(result=False)
def read(emit: Emitter, words: Any, c: Any, apart: Any, count: Any) -> None:
    """Accumulators of FP32 words; see `narrow`."""
    singles = emit.floats()
    words, c = singles.at(words), singles.at(c)

    def decode(index: Any) -> None:
        word = singles.load(singles.place(words, index)).words()
        size = word & singles.word(_SIZE)
        leading, fraction = singles.word(1 << 23), size & singles.word((1 << 23) - 1)
        significand = size.less_word(leading).where(size, fraction | leading)
        exponent = _exponents(singles, size, singles.word(_LOWEST))
        place = singles.place(c, index)
        number = significand.with_sign_of(word).counted_with_sign()
        unit = exponent.plus_words(singles.word(_BIAS - 23))
        found = _unless_special(singles, word.numbers(), number, unit, exponent)
        for part, value in enumerate((found[0], found[1].numbers(), found[2].numbers())):
            singles.store(value, singles.place(place, *[apart] * part))

    _map(emit, count, decode)


@inline(result=False)
def write(emit: Emitter, c: Any, apart: Any, words: Any, count: Any, nan: Any) -> None:
    """FP32 words of accumulators, one of which is what is no number."""
    singles = emit.floats()
    nan = _all_equal(singles, nan)
    words, c = singles.at(words), singles.at(c)

    def encode(index: Any) -> None:
        place = singles.place(c, index)
        word = singles.load(place).words()
        unit = singles.load(singles.place(place, apart)).words()
        exponent = singles.load(singles.place(place, apart, apart)).words()
        size, sign = word & singles.word(_SIZE), word & singles.word(_SIGN)
        field = _field(singles, word.numbers()).plus_words(unit)
        unit, places = unit.minus_words(singles.word(_BIAS)), singles.word(23)
        normal = size.plus_words(unit.shifted_up(places))
        raised = unit.minus_words(singles.word(_LAST)).shifted_up(places)
        subnormal = size.plus_words(raised).numbers().integers()
        found = field.less_integer(singles.word(_BIAS + 1)).where(subnormal, normal)
        infinite = exponent.same_words(singles.word(INFINITE))
        found = infinite.where(singles.word(_INFINITY), found) | sign
        found = size.same_words(singles.word(0)).where(singles.word(0), found)
        found = exponent.same_words(singles.word(NAN)).where(nan, found)
        singles.store(found.numbers(), singles.place(words, index))

    _map(emit, count, encode)
