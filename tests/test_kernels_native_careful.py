"""The ways a processor takes to a step's sum where FP64 may round it, each by itself.

What they make of whole matmuls is in test_kernels_native.py and test_kernels_exact.py.
"""

import dataclasses
import sys
from fractions import Fraction

import jax
import numba
import numpy as np
import pytest

import kernels
from kernels import native_bounds as bounds
from kernels import native_elements as elements_of
from kernels import native_extents as extents
from kernels import native_extraction as extraction
from kernels import native_fixed_point as fixed_point
from kernels import native_steps, vectors
from kernels.native_operands import address
from tests.kernel_inputs import BF16

ASCEND = kernels.ASCEND_910C
LONG_FP32 = dataclasses.replace(ASCEND.fp32, products=16)
SHAPE = native_steps.BAND, native_steps.COLUMNS
SIZE = SHAPE[0] * SHAPE[1]
LARGEST = float(np.finfo(np.float32).max)

BOUNDS = ["by exponents", "by sizes", "or exact"]
PARTS = ["vectors", "two parts", "three parts", "all bits"]
WAYS = {way: number for number, way in enumerate([*BOUNDS, *PARTS])}

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or jax.default_backend() != "cpu", reason="XLA's operations serve here"
)


@numba.njit
def still_here(found, *arrays):
    """What is found, while the arrays are used by address alone; else numba frees them before."""
    return found


@numba.njit
def bounded(way, x, y, c, out, done, padded, constants, last):
    """Steps along all of x and y; bits of elements of the next one that are not told."""
    rows, columns = x.shape[0], y.shape[1]
    length, steps = len(y), len(y) // padded
    powers, totals = np.empty(c.size), np.empty(c.size)
    ends = address(c, 0), steps, address(out, 0), address(done, 0), padded // 4
    ends = *ends, address(constants, 0), last, address(totals, 0)
    of_steps = address(x, 0), length, address(y, 0), *ends
    if way != 1:
        of_x, of_y = np.empty(x.size, np.int16), np.empty(y.size, np.int16)
        extraction.exponents_of_rows((address(x, 0), x.size, address(of_x, 0)))
        extraction.exponents_of_columns((address(y, 0), length, address(of_y, 0)))
        operands = address(of_x, 0), address(of_y, 0), address(powers, 0), *of_steps
        if way == 0:
            return still_here(bounds.bounded_by_exponents(operands), of_x, of_y, powers, totals)
        x_grids, y_grids = np.empty((rows, steps)), np.empty((steps, columns))
        bounds.grids_of_rows((address(x, 0), rows * steps, padded, address(x_grids, 0)))
        bounds.grids_of_columns((address(y, 0), steps, padded, address(y_grids, 0)))
        grids = address(x_grids, 0), steps, address(y_grids, 0)
        found = bounds.bounded_or_exact((*grids, *operands))
        return still_here(found, of_x, of_y, powers, totals, x_grids, y_grids)
    sums, tops = np.empty((rows, steps)), np.empty((steps, columns))
    bounds.sums_of_rows(address(x, 0), length, padded, address(sums, 0))
    bounds.tops_of_columns((address(y, 0), steps, padded, address(tops, 0)))
    sizes = address(sums, 0), steps, address(tops, 0), address(powers, 0)
    return still_here(bounds.bounded_by_sizes((*sizes, *of_steps)), sums, tops, powers, totals)


@numba.njit
def in_parts(way, x, y, c, out, parts, constants, last, elements):
    """One step; bits of elements that are in doubt."""
    length = len(y)
    of_x, of_y = np.empty(x.size, np.int16), np.empty(y.size, np.int16)
    extraction.exponents_of_rows((address(x, 0), x.size, address(of_x, 0)))
    extraction.exponents_of_columns((address(y, 0), length, address(of_y, 0)))
    powers, columns, needed = np.empty(c.size), np.empty(y.size), address(constants, 0)
    exponents = address(of_x, 0), length, address(of_y, 0), length // 4
    extraction.powers_of_step((*exponents, address(powers, 0)))
    if way == 3:
        extraction.starts_of_step((address(c, 0), address(powers, 0), needed, address(parts, 0)))
        for first in range(0, x.shape[0], native_steps.PART):
            of_part = address(x, first * length), length, address(y, 0), length // 4
            for half in range(2):
                extraction.extracted((*of_part, address(parts, first * y.shape[1]), half))
        found = extraction.rounded_parts((address(parts, 0), address(out, 0), needed, last))
        return still_here(found, of_x, of_y, powers)
    if way == 6:
        digits, limit = np.empty(fixed_point.DIGITS, np.int64), constants[0]
        for i in range(x.shape[0]):
            for j in range(y.shape[1]):
                of = address(x, i * length), address(y, j), c[i, j], length, limit
                out[i, j] = fixed_point.rounded(*of, address(digits, 0))
        return still_here(np.int64(0), digits)
    elements_of.transposed(address(y, 0), length, address(columns, 0))
    of_step = address(x, 0), length, address(columns, 0), length, address(c, 0), elements, length
    operands = *of_step, needed, address(powers, 0), address(out, 0), last
    if way == 4:
        found = elements_of.in_two_parts(operands)
    else:
        found = elements_of.in_three_parts(operands)
    return still_here(found, powers, columns)


def as_bits(answers):
    """One for each element, as a 64-bit integer with sign."""
    word = sum(1 << int(i) for i in np.flatnonzero(answers))
    return np.int64(word - (1 << 64) if word >> 63 else word)


def as_answers(bits, shape=SHAPE):
    return np.array([int(bits) >> i & 1 == 1 for i in range(shape[0] * shape[1])]).reshape(shape)


def step(way, x, y, c, limit=np.inf, last=0.0):
    """A step of C[BAND, COLUMNS] after it, and which elements are told."""
    x, y, c = (np.array(v, np.float64, order="C") for v in (x, y, c))
    constants, out = native_steps.constants.py_func(len(y), limit), np.full(c.shape, np.nan)
    word = np.float64(last).view(np.int64)
    if way in BOUNDS:
        done = np.empty(1, np.int64)
        unknown = bounded(WAYS[way], x, y, c, out, done, len(y), constants, word)
        assert done[0] == (unknown == 0)
        out = c if unknown == 0 else out
    else:
        every = as_bits(np.ones(c.size, bool))
        unknown = in_parts(WAYS[way], x, y, c, out, np.empty(3 * SIZE), constants, word, every)
    return out, ~as_answers(unknown)


def ties_and_zeros(scale, last):
    """Operands of a step that adds up to ties, which `last` decides on either side of either sign,
    or to exact ones (0), or to nothing (-1); and its results.
    """
    sign, side = np.indices(SHAPE) % 2 * 2 - 1
    x, y = np.zeros((SHAPE[0], 16)), np.full((16, SHAPE[1]), scale)
    half = 0.25 if scale == 2.0**-148 else 2.0**-24
    x[:, :2], x[:, 2] = sign[:, :1] * [1, half if last >= 0 else 0], last
    expected = 1.0 * sign
    if last > 0:
        y[2] *= side[0]
        expected += np.where(sign == side, sign * 2 * half, 0)
    elif last < 0:
        x[:, 2] *= sign[:, 0]
        expected *= 0
    return x, y, expected * scale


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 2.0**-148])
@pytest.mark.parametrize("last", [2.0**-27, 2.0**-30, 2.0**-70, 2.0**-120, 0, -1])
def test_ties_and_zeros(last, scale, way):
    """Ties that a term far below decides, on either side of either sign; exact ones; and what
    cancels. Subnormal numbers of FP32, too. One sum tells what FP64 can hold, and what has no term
    that it cannot.
    """
    x, y, expected = ties_and_zeros(scale, last)
    unit = min(2.0**-25, abs(last) or 1) * scale
    after, known = step(way, x, y, np.zeros(SHAPE), last=unit if way in BOUNDS else 0)
    assert known.all() == (way in PARTS or last <= 0 or last > 2.0**-60)
    assert np.array_equal(after[known], expected[known])
    assert not np.signbit(after[known & (expected == 0)]).any()
    if way in BOUNDS:
        after, known = step(way, x, y, np.zeros(SHAPE))
        assert not known.any() or last > 2.0**-60 or last == -1 or way == "or exact" and last == 0
        assert np.array_equal(after[known], expected[known])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tie", [2.0**-150, 3 * 2.0**-150, -(2.0**-150), -3 * 2.0**-150])
@pytest.mark.parametrize("rest", [0, 2.0**-220, -(2.0**-220)])
def test_halves_of_the_least_number(tie, rest, way):
    """By parts, that of the number itself is left to all bits; and all, by sizes alone."""
    x, y = np.zeros((SHAPE[0], 16)), np.ones((16, SHAPE[1]))
    x[:, 3], y[3], x[:, 8], y[8] = tie * 2.0**75, 2.0**-75, rest * 2.0**100, 2.0**-100
    after, known = step(way, x, y, np.zeros(SHAPE), last=2.0**-150 if rest == 0 else 0)
    of_terms = way in BOUNDS and way != "by sizes" and rest == 0
    sure = of_terms or way == "all bits" or way in PARTS and abs(tie) > 2.0**-150
    assert known.all() == sure
    whole = round(tie * 2.0**149 + np.sign(rest) / 4)
    assert not known.any() or (after == whole * 2.0**-149).all()
    a, b = (v.astype(np.float32).astype(BF16) for v in (x, y))
    assert (kernels.matmul(a, b) == np.float32(whole * 2.0**-149)).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limit", [np.inf, LARGEST])
def test_sums_about_the_largest_number(limit, way):
    """2^128 less half a last place is the first one beyond it, but for a term far below. One sum
    does not tell what is beyond the largest number.
    """
    for last, beyond in ((0.0, True), (2.0**40, True), (-(2.0**40), False)):
        x, y = np.zeros((SHAPE[0], 16)), np.zeros((16, SHAPE[1]))
        x[:, 2], y[2] = 2.0**51, 2.0**52
        c = np.full(SHAPE, LARGEST)
        x[:, 5], y[5] = last * 2.0**-20, 2.0**20
        for sign in (1, -1):
            unit = 2.0**30 if last else 2.0**103
            after, known = step(way, sign * x, y, sign * c, limit, unit)
            assert known.all() == (way in PARTS)
            assert (after[known] == sign * (limit if beyond else LARGEST)).all()
    x[:], y[:] = 0, 0
    after, known = step(way, x, y, c, limit)
    assert known.all() and (after == c).all()


def draws(rng, case, scale):
    """Whatever the sizes: terms that add up or cancel, C larger than all of them or smaller, small
    terms between them, ties that one or two of them decide.
    """
    sizes = rng.choice([0, 0, 0, -12, -30, -45, -60, -90], (16,))
    x = rng.uniform(1.9, 2, (SHAPE[0], 16)) * 2.0**sizes
    y = rng.choice([-1, 1] if case % 3 else [-1], (16, SHAPE[1])) * rng.uniform(1.9, 2, (16, 1))
    if case % 4 == 1:  # nearly all cancels
        x[:, 8:], y[8:] = x[:, :8], -y[:8]
        x[:, rng.integers(16)] *= 2.0**-25
    c = rng.normal(size=SHAPE) * 2.0 ** rng.choice([-60, -20, 0, 6, 40])
    if case % 4 == 2:  # ties, by what is far below
        places = rng.permutation(16)[:4]
        x, y, c = np.zeros(x.shape), np.zeros(y.shape), np.ones(c.shape)
        x[:, places], y[places[0]] = 2.0**-12, 2.0**-12 * rng.choice([-1, 1], SHAPE[1])
        y[places[1]] = 2.0 ** -rng.integers(20, 90, SHAPE[1]) * rng.choice([-1, 1], SHAPE[1])
        y[places[2:]] = rng.choice([-1, 0, 0.5, 1], (2, SHAPE[1])) * y[places[1]]
    if case % 4 == 3:
        x[rng.random(x.shape) < 0.5] = 0
    x, c = x * min(scale, 2.0**-100) ** 0.5, c * scale
    y = y * scale / min(scale, 2.0**-100) ** 0.5
    with np.errstate(under="ignore"):
        return x.astype(BF16), y.astype(BF16), c.astype(np.float32)


@pytest.mark.parametrize("scale", [1, 2.0**-60, 2.0**-126, 2.0**-140])
def test_what_is_told_is_right(scale):
    rng = np.random.default_rng(11)
    told = dict.fromkeys(WAYS, 0)
    for case in range(120):
        a, b, c = draws(rng, case, scale)
        expected = kernels.reference.matmul(a, b, c, arithmetic=ASCEND)
        for way in WAYS:
            after, known = step(way, *(v.astype(np.float64) for v in (a, b, c)))
            assert np.array_equal(after[known], expected[known]), (case, way)
            told[way] += known.sum() / SIZE / 120
    assert told["three parts"] >= told["two parts"] > 0.9 and told["vectors"] > 0.9
    assert min(told[way] for way in BOUNDS) > 0.3


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("far", [2.0**-50, 2.0**-200])
def test_rests_that_cancel_exactly(far, way):
    """Beside ties: all of them multiples of a power of two that is not too far below them, or not
    so, which a third part may tell.
    """
    x, y = np.zeros((SHAPE[0], 16)), np.ones((16, SHAPE[1]))
    x[:, 0], x[:, 3], x[:, 7], x[:, 9] = 2.0**-24, 5 * far, -3 * far, -2 * far
    after, known = step(way, x, y, np.ones(SHAPE), last=far)
    assert known.all() and (after == 1).all()
    x[:, 11] = far * 2.0**-60
    after, known = step(way, x, y, np.ones(SHAPE), last=far * 2.0**-60)
    assert known.all() == (way in ("three parts", "all bits"))
    assert (after[known] == 1 + 2.0**-23).all()


@pytest.mark.parametrize("way", WAYS)
def test_elements_that_are_no_numbers(way):
    """They are told, but one by one, of which none is taken that is not finite, or by all bits."""
    rng = np.random.default_rng(15)
    x, y, c = rng.normal(size=(SHAPE[0], 16)), rng.normal(size=(16, SHAPE[1])), np.ones(SHAPE)
    x[0, 3], y[7, 1], c[1], c[2, 1] = np.inf, -np.inf, -np.inf, np.nan
    with np.errstate(invalid="ignore"):
        expected = x @ y + c
    after, known = step(way, x, y, c)
    wild = ~np.isfinite(expected)
    if way in ("two parts", "three parts", "all bits"):
        wild[:2], wild[:, 1] = False, False
    assert known[wild].all() and np.array_equal(after[wild], expected[wild], equal_nan=True)
    ordinary = np.isfinite(expected)
    assert np.isfinite(after[ordinary]).all()


@pytest.mark.parametrize("spread", [8, 30, 100, 260])
def test_all_bits_of_all_terms(spread):
    """Terms from 2^-298, the least product of FP32 numbers, to 2^256, and C; of which some are 0,
    cancel, or are ties that the least one decides.
    """
    rng = np.random.default_rng(spread)
    least, most = max(-spread // 2, -142), spread // 2 - 4

    def numbers(shape):
        sizes = 2.0 ** rng.integers(least, max(most, least + 1), shape)
        return (rng.integers(-255, 256, shape) / 128 * sizes).astype(np.float32)

    for case in range(60):
        x, y = numbers((SHAPE[0], 16)), numbers((16, SHAPE[1]))
        c = numbers(SHAPE)
        if case % 3 == 1:
            x[:, 8:], y[8:], c = x[:, :8], -y[:8], c * np.float32(case % 2)
        if case % 3 == 2:  # half a last place of C, and a number far below, or 0
            x, y, c = np.zeros_like(x), np.zeros_like(y), np.abs(c[:1] + 1) * np.ones_like(c)
            x[:, 2], x[:, 9] = 1, rng.choice([-1, 0, 1], SHAPE[0]) * 2.0**-149
            y[2], y[9] = np.spacing(c[0]) / 2, 2.0**-149
        expected = kernels.reference.matmul(x, y, c, arithmetic=LONG_FP32)
        after, known = step("all bits", x, y, c)
        assert known.all() and np.array_equal(after, expected)
        assert np.array_equal(np.signbit(after), np.signbit(expected))


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("before", range(16))
def test_extracted_terms_that_end_where_they_began(before, way):
    """C and some equal terms, a small one, and as many of the other sign, which leave it: what is
    extracted must not have come near zero, where it takes more of a small term than it can keep.
    """
    large = 255 / 128
    x, y = np.full((SHAPE[0], 16), large), np.full((16, SHAPE[1]), large)
    x[:, :before] = -large
    x[:, before], y[before] = large * 2.0**-22, 171 / 128 * 2.0**-23
    c = np.full(SHAPE, (2 * before - 15) * large**2)
    after, known = step(way, x, y, c)
    assert known.all() and (after == large * 171 / 128 * 2.0**-45).all()


@pytest.mark.parametrize("products", [4, 16, 32, 64])
def test_parts_are_what_they_are_said_to_be(products):
    """What is extracted is a multiple of sigma's last place, and the sum of the rests is off by at
    most what the squares allow: terms as large as they can be, of one sign or two.
    """
    rng, nearly_two = np.random.default_rng(products), 255 / 128
    constants = native_steps.constants.py_func(products, np.inf)
    for case in range(9):
        sizes = rng.choice([0, 0, 0, -9, -36, -45, -60], (SHAPE[0], products))
        x = nearly_two * 2.0 ** (sizes if case > 2 else np.zeros(sizes.shape))
        if case < 3:
            far = rng.random(x.shape) < 0.3
            x[far] *= 2.0 ** -rng.integers(40, 57, far.sum())
        signs = [1, -1, rng.choice([-1, 1], (products, SHAPE[1]))][case % 3]
        y = nearly_two * signs * rng.choice([1, 129 / 255], (products, SHAPE[1]))
        c = np.full(SHAPE, nearly_two**2 * (2.0**-26 if case == 8 else np.mean(signs)))
        parts, out = np.empty((3, *SHAPE)), np.empty(SHAPE)
        none, operands = np.int64(0), (x, y, c, out, parts.reshape(-1), constants)
        in_parts(WAYS["vectors"], *operands, none, none)
        for i in range(SHAPE[0]):
            for j in range(SHAPE[1]):
                terms = [Fraction(u) * Fraction(v) for u, v in zip(x[i], y[:, j], strict=True)]
                high, rest, square = (Fraction(float(v)) for v in parts[:, i, j])
                top = max(
                    2.0 ** (np.frexp(u)[1] + np.frexp(v)[1] - 2)
                    for u, v in zip(x[i], y[:, j], strict=True)
                )
                top = max(top, 2.0 ** (np.frexp(c[i, j])[1] - 1))
                place = Fraction(np.spacing(constants[1] * top))
                assert high % place == 0
                error = sum(terms) + Fraction(c[i, j]) - high - rest
                assert error**2 <= square * Fraction(2) ** -106 * (products + 1) ** 3
                assert abs(rest) <= (products + 1) * place / 2


@pytest.mark.parametrize("way", BOUNDS)
@pytest.mark.parametrize("padded", [4, 16, 20])
@pytest.mark.parametrize("stop", range(6))
def test_steps_up_to_one_that_is_not_told(stop, padded, way):
    """C is what it is before that step, and what is told of it is there, too."""
    rng = np.random.default_rng(stop)
    count, record = 5, dataclasses.replace(ASCEND, products=padded)
    x, y = (
        rng.integers(-9, 10, v) for v in ((SHAPE[0], count * padded), (count * padded, SHAPE[1]))
    )
    x, y, c = x.astype(np.float64), y.astype(np.float64), np.full(SHAPE, 0.5)  # no sum is 0
    odd = SHAPE[0] - 1, SHAPE[1] - 2
    if stop < count:  # 2^60 and half a last place of it, which C decides
        k = stop * padded
        x[odd[0], k : k + padded] = 0
        x[odd[0], k : k + 2], y[k : k + 2], y[k + 1, odd[1]] = [2.0**60, 2.0**30], 1, 2.0**6
    at, expected = c, [c]
    for first in range(0, count * padded, padded):
        a, b = x[:, first : first + padded], y[first : first + padded]
        a, b, at = a.astype(BF16), b.astype(BF16), at.astype(np.float32)
        at = kernels.reference.matmul(a, b, at, arithmetic=record)
        expected.append(at)
    out, done = np.empty(SHAPE), np.empty(1, np.int64)
    constants = native_steps.constants.py_func(padded, np.inf)
    unknown = bounded(WAYS[way], x, y, c, out, done, padded, constants, np.int64(0))
    known = ~as_answers(unknown)
    assert done[0] == min(stop, count) and np.array_equal(c, expected[done[0]])
    assert known.sum() == SIZE - (stop < count) and known[odd] == (stop >= count)
    if stop < count:
        assert np.array_equal(out[known], expected[stop + 1][known])


def test_ties_that_are_exact_in_some_steps():
    """At each step 1 is half a last place of 2^24. What is told of steps depends on the operands of
    each, and on C, which is no more than it was if all terms are whole numbers.
    """
    count, least = 4, 2.0**-31
    of_row, of_column, of_c = (1, 2), (SHAPE[0] - 1, SHAPE[1] - 1), (0, 3)
    for odd, at in ((None, count), (of_row, 2), (of_column, 1), (of_c, 0)):
        x, y = np.zeros((SHAPE[0], 16 * count)), np.zeros((16 * count, SHAPE[1]))
        x[:, ::16], y[::16], c, out = 1, 1, np.full(SHAPE, 2.0**24), np.zeros(SHAPE)
        first, expected = 16 * at, np.ones(SHAPE, bool)
        if odd == of_c:  # which is added to 2^24, instead of being that
            c[odd], x[odd[0], 5], y[5, odd[1]] = least, 2.0**24, 1
        elif odd == of_row:
            x[odd[0], first + 1], y[first + 1] = least, 1
        elif odd == of_column:
            x[:, first + 2], y[first + 2, odd[1]] = 1, least
        if odd is not None:
            other = {of_row: np.s_[odd[0]], of_column: np.s_[:, odd[1]], of_c: odd}[odd]
            expected[other] = False
        done, constants = np.empty(1, np.int64), native_steps.constants.py_func(16, np.inf)
        unknown = bounded(WAYS["or exact"], x, y, c, out, done, 16, constants, np.int64(0))
        assert done[0] == at and np.array_equal(~as_answers(unknown), expected)
        assert (c == np.where(c == least, least, 2.0**24)).all()
        assert odd is None or (out[expected] == 2.0**24).all()


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("of_c", [True, False])
def test_a_rest_that_is_half_a_last_place(of_c, way):
    """Of what is left when others cancel, 2^-26; with a term far below, its own sum rounds."""
    x, y = np.zeros((SHAPE[0], 16)), np.ones((16, SHAPE[1]))
    half, last = 2.0**-50, 2.0**-110
    x[:, 0], x[:, 5], x[:, 9], x[:, 11] = 1, -1, 2.0**-26, half if not of_c else last
    after, known = step(way, x, y, np.full(SHAPE, half if of_c else last))
    assert known.all() == (way in ("three parts", "all bits"))
    assert (after[known] == 2.0**-26 + 2.0**-49).all()


@pytest.mark.parametrize("last", [2.0**-125, 0, -(2.0**-125)])
def test_subnormal_ties_that_only_all_bits_tell(last):
    """Numbers on four scales, most of which cancel; on XLA's threads, too, which flush."""
    row = 2.0 ** np.array([30, 30, -70, -75, -95, -95, -125])
    x, y = np.zeros((SHAPE[0], 16)), np.zeros((16, SHAPE[1]))
    x[:, :7], y[:7] = row * [1, -1, 1, 1, 1, -1, np.sign(last)], row[:, None]
    _, known = step("three parts", x, y, np.zeros(SHAPE))
    after, all_known = step("all bits", x, y, np.zeros(SHAPE))
    assert not known.any() or last == 0
    assert all_known.all() and (after == 2.0**-140 + (2.0**-149 if last > 0 else 0)).all()
    a, b = (v.astype(np.float32).astype(BF16) for v in (x, y))
    assert np.array_equal(kernels.matmul(a, b, arithmetic=ASCEND), after)


@pytest.mark.parametrize("way", ["two parts", "three parts"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, SIZE])
@pytest.mark.parametrize("products", [4, 12, 16, 64])
def test_only_these_elements_are_written(products, count, way):
    rng = np.random.default_rng(count)
    x = rng.normal(size=(SHAPE[0], products)).astype(np.float32).astype(BF16).astype(np.float64)
    y = rng.normal(size=(products, SHAPE[1])).astype(np.float32).astype(BF16).astype(np.float64)
    c, out = rng.integers(-9, 10, SHAPE) / 8, np.full(SHAPE, 99.0)
    chosen = np.zeros(SIZE, bool)
    chosen[rng.permutation(SIZE)[:count]] = True
    constants = native_steps.constants.py_func(products, np.inf)
    rest = np.empty(3 * SIZE), constants, np.int64(0), as_bits(chosen)
    assert in_parts(WAYS[way], x, y, c, out, *rest) == 0
    # Sums of so few bits are exact in FP64.
    expected = (x @ y + c).astype(np.float32)
    assert np.array_equal(out, np.where(chosen.reshape(SHAPE), expected, 99.0))


@numba.njit
def told_exactly(x, y, c, out, unknown):
    """Of a step that by sizes is not told at all."""
    padded, size = len(y), c.size
    sums, tops = np.empty(x.shape[0]), np.empty(y.shape[1])
    x_grids, y_grids = np.empty(x.shape[0]), np.empty(y.shape[1])
    bounds.sums_of_rows(address(x, 0), padded, padded, address(sums, 0))
    bounds.tops_of_columns((address(y, 0), 1, padded, address(tops, 0)))
    bounds.grids_of_rows((address(x, 0), x.shape[0], padded, address(x_grids, 0)))
    bounds.grids_of_columns((address(y, 0), 1, padded, address(y_grids, 0)))
    totals, powers = np.empty(size), np.empty(size)
    for i in range(x.shape[0]):
        for j in range(y.shape[1]):
            total = c[i, j]
            for k in range(padded):
                total += x[i, k] * y[k, j]
            totals[i * y.shape[1] + j], powers[i * y.shape[1] + j] = total, sums[i] * tops[j]
    operands = address(totals, 0), address(powers, 0), np.float64(2).view(np.int64), address(c, 0)
    grids = address(x_grids, 0), 1, address(y_grids, 0)
    found = bounds.told_exactly((*operands, *grids, address(out, 0), unknown))
    return still_here(found, sums, tops, totals, powers), x_grids, y_grids


def test_sums_that_are_exact():
    """Ties are told, but not where a term, C's last place among them, is too far below the others;
    nor what is beyond the largest number.
    """
    x, y = np.zeros((SHAPE[0], 16)), np.ones((16, SHAPE[1]))
    x[:, 3], x[:, 7], y[7], y[9] = 3, 1, 2.0**-23, 0
    c, out, far = np.full(SHAPE, 4.0), np.full(SHAPE, -1.0), SHAPE[1] - 1
    x[1, 12], y[5, far], c[0, 2] = 2.0**-40, 2.0**-60, 2.0**-40
    x[2, 0] = np.inf
    every = as_bits(np.ones(SIZE, bool))
    left, x_grids, y_grids = told_exactly(x, y, c, out, every)
    told = ~as_answers(left)
    expected = np.ones(SHAPE, bool)
    expected[1:3], expected[:, far], expected[0, 2] = False, False, False
    assert np.array_equal(told, expected)
    assert (out[told] == 7).all() and (out[~told] == -1).all()
    assert x_grids[0] == 1 and x_grids[1] == 2.0**-40
    assert np.isclose(y_grids[[0, far]], np.array([2.0**-23, 2.0**-60]) * 2.0**53, rtol=1e-5).all()
    assert told_exactly(x, y, c, out, np.int64(0))[0] == 0
    x[:], c[:], x[:, 3], y[3] = 0, LARGEST, 2.0**52, 2.0**51
    left, *_ = told_exactly(x, y, c, out, every)
    assert left == every


@numba.njit
def grid(x, found):
    return extents.grid_of(address(x, 0), x.size, found)


def test_the_last_bit_of_some_numbers():
    rng, found = np.random.default_rng(0), np.empty(2 * vectors.LANES)
    for case in range(200):
        size = 2.0 ** rng.integers(-130, 120)
        x = rng.integers(-255, 256, 2 * vectors.LANES) * size * rng.choice([1, 2, 4], 1)
        if case % 3 == 0:
            x[rng.integers(x.size)] = rng.choice([np.inf, np.nan, -np.inf, 0])
        whole = [abs(int(v / size)) for v in x if np.isfinite(v) and v != 0]
        least = min((v & -v for v in whole), default=0)
        assert grid(x, found) == (least * size if whole else native_steps.NONE)
    assert grid(np.zeros(vectors.LANES), found) == native_steps.NONE
