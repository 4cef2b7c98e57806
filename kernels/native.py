"""Exact step sums on a CPU's own vectors, compiled by numba: `[batch, m, k] x [batch, k, n]`.

The same results as `kernels.exact`, bit for bit, for units that add the products of a step and C
exactly and round once to nearest even. The result is cut into tiles whose accumulators are doubles
in a cache, each of which is added up along all of k, a block of k after the other. In a block every
`_ROWS x _COLUMNS` elements go one of three ways:

- plain, where the operands' exponents prove that no FP64 sum of the block can round, so that the
  only rounding is the one to FP32 that the unit makes;
- in two parts: a first sum takes of every term what is a multiple of a power of two that it can
  hold exactly, a second one takes the rests. What the second one may round decides nothing, but in
  few elements;
- in as many parts as it takes, for these few.

Only normal doubles are computed with, since XLA's threads flush subnormal numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit

from kernels.vectors import LANES, Emitter, Vector, inline, pointer

BF16, FP16, FP32 = range(3)

_ROWS = 8
_COLUMNS = 2 * LANES
_QUAD = 4  # products with a common bound
_BLOCK = 128  # products of a block, about
_HEIGHT = 256  # rows of a tile
_WIDTH = 256  # columns of a tile

COMPILED: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
}

_FRACTION = (1 << 52) - 1
_EXPONENT = 0x7FF << 52
_DROPPED = (1 << 29) - 1  # the bits of a double's fraction that FP32 has not
_HALF = 1 << 28
_LEAST = 2.0**-126
_LARGE = 2.0**127
_DOUBT = 2.0**-90
_TO_SUBNORMAL = 1.5 * 2.0 ** (52 - 149)  # a double beside which the last place is 2^-149
_MANY = 40  # elements in doubt of a part, so that it would have been better to do without
_PAUSE = 7  # parts
_NONE = 2.0**500  # what nothing is a multiple of


# Vector code.


def _power(emit: Emitter, x: Vector) -> Vector:
    """The largest power of two that is not above the size of `x`; 0 of 0."""
    return (x.words() & emit.word(_EXPONENT)).doubles()


def _rounded(emit: Emitter, total: Vector, limit: Vector) -> Vector:
    """To FP32, subnormal numbers too, but not beyond `limit`; of a double that is exact or rounded
    to odd. A zero is +0.
    """
    grid = emit.number(_TO_SUBNORMAL)
    small = total.size() < emit.number(_LEAST)
    found = small.where((total + grid) - grid, total.to_float32())
    found = (limit < found).where(limit, found)
    return (found < -limit).where(-limit, found)


def _sum_and_rest(x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Knuth's sum of two numbers and what its rounding dropped."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _to_odd(emit: Emitter, total: Vector, rest: Vector) -> Vector:
    """`total + rest`, where `rest` is at most half a last place, rounded to odd: any shorter
    rounding of it is that of the sum.
    """
    zero = emit.number(0.0)
    one, sign = emit.word(1), emit.word(1 << 63)
    even = (total.words() & one).same_words(emit.word(0))
    same = (total.words() & sign).same_words(rest.words() & sign)
    moved = total.words().plus_words(same.where(one, emit.word((1 << 64) - 1))).doubles()
    return (even & ~rest.equals(zero)).where(moved, total)


@inline(result=False)
def _plain(emit: Emitter, x: Any, y: Any, c: Any, width: Any, steps: Any, quads: Any) -> None:
    """The steps of a block: C[_ROWS, _COLUMNS], whose rows are `width` apart, += x y."""
    x, y, c = emit.at(x), emit.at(y), emit.at(c)
    places = [
        [emit.place(c, emit.times(width, i), j * LANES) for j in range(_COLUMNS // LANES)]
        for i in range(_ROWS)
    ]
    sums = [[emit.variable(emit.load(place)) for place in row] for row in places]
    with emit.loop(steps) as step:
        with emit.loop(quads) as quad:
            index = emit.builder.add(emit.times(step, quads), quad)
            xs = emit.place(x, emit.times(index, _QUAD * _ROWS))
            ys = emit.place(y, emit.times(index, _QUAD * _COLUMNS))
            for k in range(_QUAD):
                right = [
                    emit.load(emit.place(ys, k * _COLUMNS + j)) for j in range(0, _COLUMNS, LANES)
                ]
                for i, row in enumerate(sums):
                    left = emit.load_all_equal(emit.place(xs, k * _ROWS + i))
                    for total, factor in zip(row, right, strict=True):
                        emit.put(total, left.times_plus(factor, emit.get(total)))
        for row in sums:
            for total in row:
                emit.put(total, emit.get(total).to_float32())
    for row, row_places in zip(sums, places, strict=True):
        for total, place in zip(row, row_places, strict=True):
            emit.store(emit.get(total), place)


_PART = 4  # rows at once in two parts


@inline(result=True)
def _two_parts(
    emit: Emitter,
    x: Any,  # [products, _ROWS]
    y: Any,  # [products, _COLUMNS]
    x_top: Any,  # [quads, _ROWS]
    y_top: Any,  # [quads, _COLUMNS]
    x_last: Any,  # [_ROWS]
    y_last: Any,  # [_COLUMNS]
    c: Any,  # [_PART, _COLUMNS], rows `width` apart
    width: Any,
    out: Any,  # [_PART, _COLUMNS]
    quads: Any,
    constants: Any,
) -> Any:
    """One step of `_PART` rows; of the result, bits for the elements that it does not know."""
    builder = emit.builder
    x, y, c, out, constants = (emit.at(v) for v in (x, y, c, out, constants))
    x_top, y_top, x_last, y_last = (emit.at(v) for v in (x_top, y_top, x_last, y_last))
    scale, least, held, limit = (emit.load_all_equal(emit.place(constants, i)) for i in range(4))
    zero = emit.number(0.0)
    elements = [(i, j) for i in range(_PART) for j in range(0, _COLUMNS, LANES)]
    tops = {at: emit.variable(zero) for at in elements}
    with emit.loop(quads) as quad:
        lefts = emit.place(x_top, emit.times(quad, _ROWS))
        rights = emit.place(y_top, emit.times(quad, _COLUMNS))
        for i, j in elements:
            bound = emit.load_all_equal(emit.place(lefts, i)) * emit.load(emit.place(rights, j))
            emit.put(tops[i, j], emit.get(tops[i, j]).larger(bound))
    highs, lows, starts = {}, {}, {}
    for i, j in elements:
        before = emit.load(emit.place(c, emit.times(width, i), j))
        start = emit.get(tops[i, j]).larger(_power(emit, before)) * scale
        high = start + before
        starts[i, j] = emit.variable(start)
        highs[i, j] = emit.variable(high)
        lows[i, j] = emit.variable(before - (high - start))
    with emit.loop(quads) as quad:
        xs = emit.place(x, emit.times(quad, _QUAD * _ROWS))
        ys = emit.place(y, emit.times(quad, _QUAD * _COLUMNS))
        for k in range(_QUAD):
            for i, j in elements:
                left = emit.load_all_equal(emit.place(xs, k * _ROWS + i))
                right = emit.load(emit.place(ys, k * _COLUMNS + j))
                before = emit.get(highs[i, j])
                after = left.times_plus(right, before)
                rest = left.times_plus(right, -(after - before))
                emit.put(highs[i, j], after)
                emit.put(lows[i, j], emit.get(lows[i, j]) + rest)
    unknown = emit.integer_variable(0)
    for index, (i, j) in enumerate(elements):
        start = emit.get(starts[i, j])
        total, rest = _sum_and_rest(emit.get(highs[i, j]) - start, emit.get(lows[i, j]))
        size = total.size()
        middle = (total.words() & emit.word(_DROPPED)).same_words(emit.word(_HALF))
        far = size >= start * least
        usual = far & ~middle & (size >= emit.number(_LEAST))
        known = usual & (size < emit.number(_LARGE))
        where = emit.place(out, i * _COLUMNS + j)
        emit.store(total.to_float32(), where)
        with emit.when((~known).bits()):
            before = emit.load(emit.place(c, emit.times(width, i), j))
            power = _power(emit, before)
            of_c = power.equals(zero).where(emit.number(_NONE), power * emit.number(2.0**-23))
            of_x, of_y = (
                emit.load_all_equal(emit.place(x_last, i)),
                emit.load(emit.place(y_last, j)),
            )
            exact = (of_x * of_y >= start * held) & (of_c >= start * held)
            decided = far & (rest.size() >= start * emit.number(_DOUBT))
            surely = (usual | exact | decided) & total.equals(total)
            result = _rounded(emit, _to_odd(emit, total, rest), limit)
            emit.store(known.where(total.to_float32(), result), where)
            bits = builder.shl((~(known | surely)).bits(), emit.integer(LANES * index))
            builder.store(builder.or_(builder.load(unknown), bits), unknown)
    return builder.load(unknown)


@inline(result=True)
def _special(
    emit: Emitter, x: Any, y: Any, c: Any, width: Any, out: Any, quads: Any, unknown: Any
) -> Any:
    """Elements of a step that are infinite or no number, by ordinary sums; of the `unknown` ones,
    bits for the others.
    """
    builder = emit.builder
    x, y, c, out = (emit.at(v) for v in (x, y, c, out))
    elements = [(i, j) for i in range(_PART) for j in range(0, _COLUMNS, LANES)]
    sums = {
        (i, j): emit.variable(emit.load(emit.place(c, emit.times(width, i), j)))
        for i, j in elements
    }
    with emit.loop(quads) as quad:
        xs = emit.place(x, emit.times(quad, _QUAD * _ROWS))
        ys = emit.place(y, emit.times(quad, _QUAD * _COLUMNS))
        for k in range(_QUAD):
            for i, j in elements:
                left = emit.load_all_equal(emit.place(xs, k * _ROWS + i))
                right = emit.load(emit.place(ys, k * _COLUMNS + j))
                emit.put(sums[i, j], left.times_plus(right, emit.get(sums[i, j])))
    found = emit.integer(0)
    for index, (i, j) in enumerate(elements):
        total = emit.get(sums[i, j])
        ordinary = total.size() < emit.number(math.inf)
        where = emit.place(out, i * _COLUMNS + j)
        emit.store(ordinary.where(emit.load(where), total), where)
        found = builder.or_(found, builder.shl(ordinary.bits(), emit.integer(LANES * index)))
    return builder.and_(found, unknown)


# Elements in doubt: terms `[products + 1, _COLUMNS]` of a row, the last ones C.

_HALVES = range(0, _COLUMNS, LANES)


@inline(result=False)
def _terms(emit: Emitter, x: Any, y: Any, c: Any, terms: Any, products: Any) -> None:
    """Of one row; 0 for what is no finite number."""
    x, y, c, terms = (emit.at(v) for v in (x, y, c, terms))

    def store(term: Vector, place: Any) -> None:
        finite = term.size() < emit.number(math.inf)
        emit.store(finite.where(term, emit.number(0.0)), place)

    with emit.loop(products) as k:
        left = emit.load_all_equal(emit.place(x, emit.times(k, _ROWS)))
        for j in _HALVES:
            right = emit.load(emit.place(y, emit.times(k, _COLUMNS), j))
            store(left * right, emit.place(terms, emit.times(k, _COLUMNS), j))
    for j in _HALVES:
        store(emit.load(emit.place(c, j)), emit.place(terms, emit.times(products, _COLUMNS), j))


@inline(result=True)
def _part(emit: Emitter, terms: Any, count: Any, part: Any, constants: Any) -> Any:
    """`part[_COLUMNS]`: the exact sum of what the terms have above a place that it can hold; it is
    taken from them. The result is not 0 if there was anything.
    """
    terms, part = emit.at(terms), emit.at(part)
    scale = emit.load_all_equal(emit.place(emit.at(constants), 4))
    zero = emit.number(0.0)
    tops = {j: emit.variable(zero) for j in _HALVES}
    with emit.loop(count) as k:
        for j, top in tops.items():
            size = emit.load(emit.place(terms, emit.times(k, _COLUMNS), j)).size()
            emit.put(top, emit.get(top).larger(size))
    powers = {j: _power(emit, emit.get(top)) for j, top in tops.items()}
    starts = {j: power * scale for j, power in powers.items()}
    sums = {j: emit.variable(start) for j, start in starts.items()}
    with emit.loop(count) as k:
        for j, total in sums.items():
            place = emit.place(terms, emit.times(k, _COLUMNS), j)
            term, before = emit.load(place), emit.get(total)
            after = before + term
            emit.put(total, after)
            emit.store(term - (after - before), place)
    found = emit.integer(0)
    for j, power in powers.items():
        emit.store(emit.get(sums[j]) - starts[j], emit.place(part, j))
        found = emit.builder.or_(found, (zero < power).bits())
    return found


@inline(result=False)
def _sum_of_parts(
    emit: Emitter, parts: Any, count: Any, out: Any, unknown: Any, constants: Any
) -> None:
    """`out[_COLUMNS]`, where unknown: the sum of the parts, the largest first, rounded once."""
    builder = emit.builder
    parts, out = emit.at(parts), emit.at(out)
    limit = emit.load_all_equal(emit.place(emit.at(constants), 3))
    last = builder.sub(count, emit.integer(1))
    rests = {j: emit.variable(emit.number(0.0)) for j in _HALVES}
    with emit.loop(last), emit.loop(last) as k:  # each pass brings what cancels one place up
        index = builder.sub(builder.sub(last, k), emit.integer(1))
        for j in _HALVES:
            upper = emit.place(parts, emit.times(index, _COLUMNS), j)
            lower = emit.place(upper, _COLUMNS)
            total, dropped = _sum_and_rest(emit.load(upper), emit.load(lower))
            emit.store(total, upper)
            emit.store(dropped, lower)
    with emit.loop(last) as k:
        for j, rest in rests.items():
            place = emit.place(parts, emit.times(builder.sub(last, k), _COLUMNS), j)
            emit.put(rest, emit.load(place) + emit.get(rest))
    for j, rest in rests.items():
        total = emit.load(emit.place(parts, j))
        result = _rounded(emit, _to_odd(emit, total, emit.get(rest)), limit)
        here = emit.answer(builder.lshr(unknown, emit.integer(j)))
        emit.store(here.where(result, emit.load(emit.place(out, j))), emit.place(out, j))


@inline(result=True)
def _sizes(emit: Emitter, c: Any, width: Any, largest: Any) -> Any:
    """Of C[_ROWS, _COLUMNS], the largest finite size of each lane; how many elements are no
    number, and 2^32 times how many are infinite.
    """
    builder = emit.builder
    c, largest = emit.at(c), emit.at(largest)
    top, infinity = emit.number(0.0), emit.number(math.inf)
    found = emit.integer(0)

    def count(answer: Vector, weight: int) -> Any:
        return builder.mul(builder.ctpop(answer.bits()), emit.integer(weight))

    for i in range(_ROWS):
        for j in range(0, _COLUMNS, LANES):
            size = emit.load(emit.place(c, emit.times(width, i), j)).size()
            top = (size < infinity).where(top.larger(size), top)
            found = builder.add(found, count(~size.equals(size), 1))
            found = builder.add(found, count(size.equals(infinity), 1 << 32))
    emit.store(top, largest)
    return found


@inline(result=True)
def _set_bits(emit: Emitter, bits: Any) -> Any:
    return emit.builder.ctpop(bits)


# Operands.


@njit(**COMPILED)
def _decoded(word: Any, kind: int) -> float:
    """The double of a word of a `kind` of number, by integer operations where it is subnormal."""
    if kind == FP16:
        magnitude = np.int64(word & 0x7FFF)
        sign = np.int64(word >> 15) << 63
        normal = np.int64(magnitude << 42) + np.int64((1023 - 15) << 52)
        tiny = float(magnitude) * 2.0**-24
        first, infinite = 1 << 10, 31 << 10
    else:
        word = np.int64(word) << (16 if kind == BF16 else 0)
        magnitude = word & np.int64(0x7FFFFFFF)
        sign = word >> 31 << 63
        normal = np.int64(magnitude << 29) + np.int64((1023 - 127) << 52)
        tiny = float(magnitude) * 2.0**-149
        first, infinite = 1 << 23, 255 << 23
    bits = normal if magnitude >= first else np.float64(tiny).view(np.int64)
    if magnitude >= infinite:
        bits = np.int64(_EXPONENT) if magnitude == infinite else np.int64(_EXPONENT | 1 << 51)
    return np.int64(bits | sign).view(np.float64)


@njit(**COMPILED)
def _cut(word: Any, cut: int, nearest: int) -> Any:
    """A word of FP32 without its last `cut` bits, as `kernels.operands` has it."""
    bits = np.int64(word)
    rounded = bits + (((np.int64(1) << cut) >> 1) - 1 + (bits >> cut & 1)) * nearest
    finite = bits & 0x7FFFFFFF < 255 << 23
    return rounded >> cut << cut if finite or nearest == 0 else bits


@njit(**COMPILED)
def _read(address: int, count: int, form: Any, target: Any, start: int) -> None:
    """So many numbers at an address, as doubles into `target`; `form` is their kind, how many bits
    of a word of FP32 are cut, and whether to nearest.
    """
    kind, cut, nearest = form
    if kind == FP32:
        words = carray(pointer(address), (count,), np.uint32)
        if cut == 0:
            for i in range(count):
                target[start + i] = _decoded(words[i], FP32)
        else:
            for i in range(count):
                target[start + i] = _decoded(_cut(words[i], cut, nearest), FP32)
    elif kind == FP16:
        short = carray(pointer(address), (count,), np.uint16)
        for i in range(count):
            target[start + i] = _decoded(short[i], FP16)
    else:
        short = carray(pointer(address), (count,), np.uint16)
        for i in range(count):
            target[start + i] = _decoded(short[i], BF16)


@njit(**COMPILED)
def _bytes(form: Any) -> int:
    return 4 if form[0] == FP32 else 2


@njit(**COMPILED)
def _pack_rows(
    a: int, form: Any, i0: int, rows: int, k: int, k0: int, steps: int, shape: Any, x: Any, row: Any
) -> None:
    """Doubles `x[groups, steps padded, _ROWS]` of rows and steps of the matrix `[m, k]` at `a`."""
    products, padded = shape
    count = min(steps * products, k - k0)
    length = steps * padded
    groups = -(-rows // _ROWS)
    if count < length or rows < groups * _ROWS:
        x[: groups * length * _ROWS] = 0
    for i in range(rows):
        _read(a + ((i0 + i) * k + k0) * _bytes(form), count, form, row, 0)
        start = i // _ROWS * length * _ROWS + i % _ROWS
        if products == padded:
            for index in range(count):
                x[start + index * _ROWS] = row[index]
        else:
            for index in range(count):
                place = index // products * padded + index % products
                x[start + place * _ROWS] = row[index]


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
    """Doubles `y[groups, steps padded, _COLUMNS]` of columns and steps of `[k, n]` at `b`."""
    products, padded = shape
    count = min(steps * products, k - k0)
    length = steps * padded
    groups = -(-columns // _COLUMNS)
    if count < length or columns < groups * _COLUMNS:
        y[: groups * length * _COLUMNS] = 0
    for index in range(count):
        source = b + ((k0 + index) * n + j0) * _bytes(form)
        place = index // products * padded + index % products
        for group in range(groups):
            first = group * _COLUMNS
            start = (group * length + place) * _COLUMNS
            _read(source + first * _bytes(form), min(_COLUMNS, columns - first), form, y, start)


@njit(**COMPILED)
def _power_of(magnitude: int) -> float:
    return np.int64(magnitude & _EXPONENT).view(np.float64)


def _measured(emit: Emitter, lanes: int, group: Any, count: Any, found: Any) -> None:
    """Of a group `[count, lanes]`: the largest sum of squares of a lane, and the least size that is
    not 0 (infinite if all are), each as `LANES` numbers of which the largest or least counts.
    """
    group, found = emit.at(group), emit.at(found)
    zero, infinity = emit.number(0.0), emit.number(math.inf)
    offsets = range(0, lanes, LANES)
    squares = [emit.variable(zero) for _ in offsets]
    least = emit.variable(infinity)
    with emit.loop(count) as k:
        for offset, square in zip(offsets, squares, strict=True):
            number = emit.load(emit.place(group, emit.times(k, lanes), offset))
            emit.put(square, number.times_plus(number, emit.get(square)))
            size = zero.equals(number).where(infinity, number.size())
            emit.put(least, (size < emit.get(least)).where(size, emit.get(least)))
    most = emit.get(squares[0])
    for square in squares[1:]:
        other = emit.get(square)
        # No number, or an infinity, is found in either.
        most = (other < most).where(most, other) + (most - most)
    emit.store(most, found)
    emit.store(emit.get(least), emit.place(found, LANES))


@inline(result=False)
def _measured_rows(emit: Emitter, group: Any, count: Any, found: Any) -> None:
    _measured(emit, _ROWS, group, count, found)


@inline(result=False)
def _measured_columns(emit: Emitter, group: Any, count: Any, found: Any) -> None:
    _measured(emit, _COLUMNS, group, count, found)


@njit(**COMPILED)
def _extent(group: int, count: int, lanes: int, found: Any) -> tuple[float, float]:
    """Of a group of rows or columns, `[count, lanes]`: a bound on their Euclidean norms, infinite
    for what is not finite, and a power of two that is not above any size but 0.
    """
    if lanes == _ROWS:
        _measured_rows((group, count, _address(found, 0)))
    else:
        _measured_columns((group, count, _address(found, 0)))
    most, least = 0.0, np.inf
    for lane in range(LANES):
        most = max(most, found[lane]) if found[lane] == found[lane] else np.inf
        least = min(least, found[LANES + lane])
    power = _power_of(np.float64(least).view(np.int64)) if least < np.inf else _NONE
    return math.sqrt(most) * (1 + 2.0**-20), power


@njit(**COMPILED)
def _bounds(
    words: Any,
    start: int,
    steps: int,
    quads: int,
    lanes: int,
    tops: Any,
    lasts: Any,
    place: int,
    unit: float,
) -> None:
    """Of a group `words[steps, quads, _QUAD, lanes]` at `start`: `tops[steps, quads, lanes]` powers
    of two above a quad's finite sizes, and `lasts[steps, lanes]`, which all of a step's numbers
    are multiples of; both for group number `place`.
    """
    for step in range(steps):
        for j in range(lanes):
            lasts[(place * steps + step) * lanes + j] = _NONE
        for quad in range(quads):
            index = step * quads + quad
            for j in range(lanes):
                most, least = np.int64(0), np.int64(_EXPONENT)
                for k in range(_QUAD):
                    size = words[start + (index * _QUAD + k) * lanes + j] & np.int64(
                        _EXPONENT | _FRACTION
                    )
                    most = max(most, size if size < _EXPONENT else np.int64(0))
                    least = min(least, size if size > 0 else np.int64(_EXPONENT))
                tops[(place * steps * quads + index) * lanes + j] = 2 * _power_of(most)
                last = _power_of(least) * unit if least < _EXPONENT else _NONE
                where = (place * steps + step) * lanes + j
                lasts[where] = min(lasts[where], last)


# Tiles.


@njit(**COMPILED)
def _buffers(rows: int, columns: int, length: int, padded: int) -> Any:
    """What a thread needs for tiles of at most this size and blocks of `length` products."""
    rows, columns = -(-rows // _ROWS) * _ROWS, -(-columns // _COLUMNS) * _COLUMNS
    quads = length // _QUAD
    return (
        np.empty(rows * columns),  # 0: C
        np.empty(rows * length),  # 1: x
        np.empty(columns * length),  # 2: y
        np.empty(rows * quads),  # 3: tops of x
        np.empty(columns * quads),  # 4: tops of y
        np.empty(rows * quads),  # 5: lasts of x
        np.empty(columns * quads),  # 6: lasts of y
        np.empty(max(length, LANES)),  # 7: a row
        np.empty(_PART * _COLUMNS),  # 8: results of a step
        np.empty((padded + 1) * _COLUMNS),  # 9: terms
        np.empty(20 * _COLUMNS),  # 10: parts
        np.empty((rows // _ROWS) * (columns // _COLUMNS)),  # 11: what all of C is a multiple of
        np.empty((rows // _ROWS + columns // _COLUMNS, 3)),  # 12: extents of groups
    )


@njit(**COMPILED)
def _address(array: Any, offset: int) -> int:
    """Of a double in `array`."""
    return int(array.ctypes.data) + 8 * offset


@njit(**COMPILED)
def _many_parts(
    x: int,
    y: int,
    c: int,
    out: int,
    unknown: int,
    padded: int,
    terms: Any,
    parts: Any,
    constants: Any,
) -> None:
    """`out[_COLUMNS]`, where unknown: a step of one row, whatever the terms."""
    _terms((x, y, c, _address(terms, 0), padded))
    count = 0
    while (
        _part(
            (
                _address(terms, 0),
                padded + 1,
                _address(parts, count * _COLUMNS),
                _address(constants, 0),
            )
        )
        != 0
    ):
        count += 1
    _sum_of_parts((_address(parts, 0), max(count, 1), out, unknown, _address(constants, 0)))


@njit(**COMPILED)
def _careful_block(
    x: int,
    y: int,
    tops: Any,
    c: int,
    width: int,
    steps: int,
    padded: int,
    buffers: Any,
    constants: Any,
) -> None:
    """The steps of a block of C[_ROWS, _COLUMNS], whatever the operands."""
    x_top, y_top, x_last, y_last = tops
    quads = padded // _QUAD
    out = _address(buffers[8], 0)
    pause = 0  # parts of which two sums would hardly tell anything
    for step in range(steps):
        xs = x + 8 * step * padded * _ROWS
        ys = y + 8 * step * padded * _COLUMNS
        for part in range(0, _ROWS, _PART):
            here = c + 8 * part * width
            if pause > 0:
                pause -= 1
                unknown = -1
            else:
                unknown = _two_parts(
                    (
                        xs + 8 * part,
                        ys,
                        x_top + 8 * (step * quads * _ROWS + part),
                        y_top + 8 * step * quads * _COLUMNS,
                        x_last + 8 * (step * _ROWS + part),
                        y_last + 8 * step * _COLUMNS,
                        here,
                        width,
                        out,
                        quads,
                        _address(constants, 0),
                    )
                )
            if unknown != 0:
                unknown = _special((xs + 8 * part, ys, here, width, out, quads, unknown))
                lanes = 0
                for i in range(_PART):
                    bits = (unknown >> (_COLUMNS * i)) & ((1 << _COLUMNS) - 1)
                    if bits != 0:
                        lanes += _set_bits((bits,))
                        _many_parts(
                            xs + 8 * (part + i),
                            ys,
                            here + 8 * i * width,
                            out + 8 * i * _COLUMNS,
                            bits,
                            padded,
                            buffers[9],
                            buffers[10],
                            constants,
                        )
                if pause == 0 and lanes > _MANY:
                    pause = _PAUSE
            for i in range(_PART):
                for j in range(0, _COLUMNS, LANES):
                    _copy((out + 8 * (i * _COLUMNS + j), here + 8 * (i * width + j)))


@inline(result=False)
def _copy(emit: Emitter, source: Any, target: Any) -> None:
    emit.store(emit.load(emit.at(source)), emit.at(target))


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
    """C of a tile after all steps, in `buffers[0]`, whose rows are as wide as whole groups are."""
    i0, j0 = corner
    rows, columns = size
    products, padded = shape
    c, x, y, x_tops, y_tops, x_lasts, y_lasts, row, _, _, parts, held, extents = buffers
    row_groups, column_groups = -(-rows // _ROWS), -(-columns // _COLUMNS)
    width = column_groups * _COLUMNS
    quads = padded // _QUAD
    unit = 2.0 ** (1 - significand)
    number = -(-k // products)
    block = max(1, _BLOCK // padded)
    largest = np.empty(2 * LANES)
    for group in range(row_groups * column_groups):
        held[group] = _NONE
    if has_c:
        for i in range(row_groups):
            for j in range(column_groups):
                least = _NONE
                for r in range(_ROWS):
                    start = (i * _ROWS + r) * width + j * _COLUMNS
                    for element in range(start, start + _COLUMNS):
                        size_of_c = abs(c[element])
                        least = min(least, size_of_c if size_of_c > 0 else _NONE)
                if least < _NONE:
                    held[i * column_groups + j] = (
                        _power_of(np.float64(least).view(np.int64)) * 2.0**-23
                    )
    for first in range(0, number, block):
        steps = min(block, number - first)
        length = steps * padded
        _pack_rows(a, form, i0, rows, k, first * products, steps, shape, x, row)
        _pack_columns(b, form, j0, columns, k, n, first * products, steps, shape, y)
        x_words, y_words = x.view(np.int64), y.view(np.int64)
        for g in range(row_groups):
            start = _address(x, g * length * _ROWS)
            extents[g, 0], extents[g, 1] = _extent(start, length, _ROWS, largest)
            extents[g, 2] = 0
        for g in range(column_groups):
            start = _address(y, g * length * _COLUMNS)
            h = row_groups + g
            extents[h, 0], extents[h, 1] = _extent(start, length, _COLUMNS, largest)
            extents[h, 2] = 0
        for jg in range(column_groups):
            of_y = extents[row_groups + jg]
            for ig in range(row_groups):
                of_x = extents[ig]
                place = ig * _ROWS * width + jg * _COLUMNS
                here = _address(c, place)
                xs, ys = _address(x, ig * length * _ROWS), _address(y, jg * length * _COLUMNS)
                found = _sizes((here, width, _address(largest, 0)))
                if found == _ROWS * _COLUMNS:
                    continue  # none is a number, and none will be
                if (found & 0xFFFFFFFF) + (found >> 32) == _ROWS * _COLUMNS:
                    _plain((xs, ys, here, width, steps, quads))  # infinite or no number for ever
                    continue
                most = 0.0
                for j in range(LANES):
                    most = max(most, largest[j])
                reach = most + of_x[0] * of_y[0]
                index = ig * column_groups + jg
                last = min(held[index], of_x[1] * of_y[1] * unit**2)
                held[index] = last
                if found == 0 and last >= _LEAST and reach < _LARGE and reach <= 2.0**53 * last:
                    _plain((xs, ys, here, width, steps, quads))
                    continue
                if of_x[2] == 0:
                    of_x[2] = 1
                    _bounds(
                        x_words, ig * length * _ROWS, steps, quads, _ROWS, x_tops, x_lasts, ig, unit
                    )
                if of_y[2] == 0:
                    of_y[2] = 1
                    _bounds(
                        y_words,
                        jg * length * _COLUMNS,
                        steps,
                        quads,
                        _COLUMNS,
                        y_tops,
                        y_lasts,
                        jg,
                        unit,
                    )
                bounds = (
                    _address(x_tops, ig * steps * quads * _ROWS),
                    _address(y_tops, jg * steps * quads * _COLUMNS),
                    _address(x_lasts, ig * steps * _ROWS),
                    _address(y_lasts, jg * steps * _COLUMNS),
                )
                _careful_block(xs, ys, bounds, here, width, steps, padded, buffers, constants)


@njit(**COMPILED)
def _constants(padded: int, saturates: bool) -> Any:
    power = 4
    while power < padded:
        power *= 2
    limit = float(np.finfo(np.float32).max) if saturates else np.inf
    return np.array([6.0 * power, power**2 * 2.0**-49, power * 2.0**-103, limit, 12.0 * power])


@njit(**COMPILED)
def cut(shape: Any, tiles: int) -> tuple[int, int]:
    """Rows and columns of a tile of a result `[batch, m, n]`; about so many tiles, if that is worth
    it.
    """
    batch, m, n = shape
    rows, columns = -(-m // _HEIGHT), -(-n // _WIDTH)
    while batch * rows * columns < tiles and max(m // rows, n // columns) > 4 * _COLUMNS:
        if m // rows > n // columns:
            rows *= 2
        else:
            columns *= 2
    height, width = -(-m // rows), -(-n // columns)
    return -(-height // _ROWS) * _ROWS, -(-width // _COLUMNS) * _COLUMNS


@njit(**COMPILED)
def buffers_for(tile: tuple[int, int], products: int) -> Any:
    """What a thread needs to compute such tiles, one after the other."""
    padded = -(-products // _QUAD) * _QUAD
    return _buffers(tile[0], tile[1], max(1, _BLOCK // padded) * padded, padded)


@njit(**COMPILED)
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
        form: of their numbers, see `_read`.
        c: FP32 words `[batch, m, n]`, or of size 0 for +0.
        options: products of a step, significant bits of an operand, whether overflow saturates,
            and the word of a NaN.
        tile: its rows and columns (`cut`).
        buffers: `buffers_for` these.
    """
    _, m, n = out.shape
    products, significand, saturates, nan = options
    padded = -(-products // _QUAD) * _QUAD
    columns = -(-n // tile[1])
    rest, column = divmod(number, columns)
    matrix, row = divmod(rest, -(-m // tile[0]))
    corner = row * tile[0], column * tile[1]
    size = min(tile[0], m - corner[0]), min(tile[1], n - corner[1])
    _start(c, matrix, corner, size, buffers[0])
    _tile(
        a + matrix * m * k * _bytes(form),
        b + matrix * k * n * _bytes(form),
        form,
        k,
        n,
        corner,
        size,
        (products, padded),
        significand,
        c.size > 0,
        buffers,
        _constants(padded, saturates != 0),
    )
    _finish(buffers[0], corner, size, nan, out[matrix])


@njit(**COMPILED)
def _start(c: Any, matrix: int, corner: Any, size: Any, tile: Any) -> None:
    """The first accumulators of a tile."""
    rows, columns = size
    has_c = c.size > 0
    height = -(-rows // _ROWS) * _ROWS
    width = -(-columns // _COLUMNS) * _COLUMNS
    if not has_c or height > rows or width > columns:
        tile[: height * width] = 0
    if has_c:
        for i in range(rows):
            for j in range(columns):
                tile[i * width + j] = _decoded(c[matrix, corner[0] + i, corner[1] + j], FP32) + 0.0


@njit(**COMPILED)
def _finish(tile: Any, corner: Any, size: Any, nan: int, out: Any) -> None:
    """A tile written into `out[m, n]`."""
    rows, columns = size
    width = -(-columns // _COLUMNS) * _COLUMNS
    for i in range(rows):
        for j in range(columns):
            value = tile[i * width + j]
            extent = abs(value)
            word = np.int64(np.float32(value).view(np.uint32))
            if extent < _LEAST:
                word = np.int64(extent * 2.0**149) | np.int64((value < 0) << 31)
            word = word if value == value else np.int64(nan)
            out[corner[0] + i, corner[1] + j] = np.uint32(word)
