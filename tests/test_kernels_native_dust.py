"""Ordinary numbers among which some are dust, whose sums the processor adds apart."""

import dataclasses

import numba
import numpy as np
import pytest

import kernels
from kernels import native_dust
from kernels.native_steps import COLUMNS, PART, ROWS
from tests.kernel_inputs import BF16, FP32
from tests.test_kernels_native import ASCEND, check, pytestmark  # noqa: F401


@numba.njit
def split_and_add(x, y, c, steps, padded, norms, x_parts, y_parts, measured, proof):
    """What C is a multiple of afterwards, and whether it could be done."""
    x_at = (x_parts[0].ctypes.data, x_parts[1].ctypes.data, x_parts[2].ctypes.data)
    y_at = (y_parts[0].ctypes.data, y_parts[1].ctypes.data, y_parts[2].ctypes.data)
    x_all, y_all = (*x_at, x_parts[3].ctypes.data), (*y_at, y_parts[3].ctypes.data)
    native_dust.split_rows(x.ctypes.data, norms[0], steps, padded, x_all, measured.ctypes.data)
    native_dust.split_columns(y.ctypes.data, norms[1], steps, padded, y_all, measured.ctypes.data)
    grid, least = native_dust.proof_of_parts(x_all, y_all, proof)
    operands = x_at[0], x_at[1], steps * padded, y_at[0], y_at[1], x_at[2], y_at[2]
    ends = np.float64(least).view(np.int64), int(grid < 2.0**-126)
    failed = native_dust.with_dust((c.ctypes.data, *operands, steps, padded, *ends))
    return grid, failed


def added(a, b, c, padded=16):
    """C[PART, COLUMNS] after steps of `a` `[ROWS, k]` and `b`; the grid, and whether it failed."""
    x, y = (np.ascontiguousarray(v, np.float64) for v in (a, b))
    steps = x.shape[1] // padded
    x_parts, y_parts = (
        (
            np.full(v.shape, np.nan),
            np.full(v.shape, np.nan),
            np.zeros((steps, width), np.int64),
            np.zeros(native_dust.KNOWN),
        )
        for v, width in ((x, ROWS), (y, COLUMNS))
    )
    norms = np.linalg.norm(x, axis=1).max(), np.linalg.norm(y, axis=0).max()
    out = np.array(c, np.float64)
    grid_of_c = max(2.0**-23 * 2.0 ** np.floor(np.log2(abs(c[c != 0]).min())), 2.0**-149)
    proof = abs(c).max() + norms[0] * norms[1], grid_of_c, 2.0**-14
    parts = norms, x_parts, y_parts, np.empty(16), proof
    grid, failed = split_and_add(x, y, out, steps, padded, *parts)
    assert np.array_equal(x_parts[0] + x_parts[1], x) and np.array_equal(y_parts[0] + y_parts[1], y)
    return out, grid, failed


def dusty(rng, shape, share, scale=1.0):
    """Ordinary BF16 numbers, some replaced by such as are subnormal."""
    small = rng.integers(1, 9, shape) * rng.choice([-1, 1], shape) * 2.0**-130
    values = np.where(rng.random(shape) < share, small, rng.normal(size=shape) * scale)
    return values.astype(np.float32).astype(BF16)


@pytest.mark.parametrize("padded", [8, 16, 64])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("scale", [1, 2.0**-62, 2.0**-66, 2.0**-70])
def test_dust_is_added_apart(share, padded, scale):
    """Also where sums of main parts are subnormal numbers of FP32."""
    rng = np.random.default_rng(padded)
    record = dataclasses.replace(ASCEND, products=padded)
    a, b = (dusty(rng, shape, share, scale=scale) for shape in ((8, 256), (256, 16)))
    c = (rng.normal(size=(4, 16)) * scale**2).astype(np.float32)
    a, b, c = a[:ROWS], b[:, :COLUMNS], c[:PART, :COLUMNS]  # the same numbers for each processor
    out, grid, failed = added(a, b, c, padded)
    assert grid > 0 and failed == 0
    expected = kernels.reference.matmul(a[:PART], b, c, arithmetic=record)
    assert np.array_equal(out, expected) and not (out / grid % 1).any()


@pytest.mark.parametrize("products", [16, 8, 64, 4, 11])
@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_subnormal_numbers_among_ordinary_ones(dtype, share, products):
    rng = np.random.default_rng(products)
    record = dataclasses.replace(ASCEND, products=products)
    a, b = (dusty(rng, shape, share).astype(dtype) for shape in ((9, 150), (150, 19)))
    check(a, b, None, record)
    check(a, b, rng.normal(size=(9, 19)).astype(np.float32), record)
    check(a, rng.integers(-3, 4, b.shape).astype(dtype), None, record)
    a[2, 5], b[70, 3], b[9, 8] = np.nan, -np.inf, np.nan
    check(a, b, None, record)


def test_what_dust_decides():
    """Sums half way between two numbers, of either sign. Beside them products of main parts with
    dust, which may cancel, and of dust with dust: three times nothing, more and less.
    """
    cases = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, [-1, 1], [1, 3])).reshape(5, -1).T
    a, b = np.zeros((len(cases), 48)), np.ones((48, COLUMNS))
    b[1], b[6] = 2.0**-12, 2.0**-131
    for row, (mixed, more, both, sign, large) in zip(a, cases, strict=True):
        row[:2] = [large, 2.0**-12 * 2.0 ** (large > 2)]
        row[2:4], row[4:6] = mixed * 2.0**-129, [more * 2.0**-128, 0]
        row[:2] *= sign
        row[6] = both * 2.0**-133
    a, b = (v.astype(np.float32).astype(BF16) for v in (a, b))
    check(a, b)
    c = np.full((len(cases), COLUMNS), 2.0, np.float32)
    check(a, b, c)


def test_products_of_dust_with_dust_count_where_those_with_main_parts_cancel():
    record = dataclasses.replace(ASCEND, products=64)
    for at in (4, 5, 11, 63):
        for sign in (-1, 0, 1):
            a, b = np.zeros((ROWS, 64)), np.zeros((64, COLUMNS))
            a[:, :2], b[0], b[1] = [1, 2.0**-12], 1, 2.0**-11
            a[:, 2:4], b[2:4] = [2.0**-130, -(2.0**-130)], 1
            a[:, at], b[at] = sign * 2.0**-131, 2.0**-133
            c = np.full((PART, COLUMNS), 2.0, np.float32)
            out, grid, failed = added(a, b, c, 64)
            assert grid > 0 and failed == 0
            expected = kernels.reference.matmul(
                a[:PART].astype(BF16), b.astype(BF16), c, arithmetic=record
            )
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("side", [-1, 1])
def test_dust_moves_no_sum_across_a_tie(side, sign):
    """One last place beside it, where sums are as large as they may be."""
    more, less = 2.0**-17 * (1 + 2.0**-7), 2.0**-17
    a, b = np.zeros((ROWS, 16)), np.zeros((16, COLUMNS))
    a[:, :5] = sign * np.array([-(2.0**-11), side * more, -side * more, -side * more, side * less])
    b[:5, 0] = [2.0**-12, more, less, less, less]  # together 2^-23 and 2^-48
    a[:, 5], b[5] = -side * sign * 2.0**-130, less
    c = np.full((PART, COLUMNS), sign * (3 + 2.0**-22), np.float32)
    out, grid, failed = added(a, b, c)
    assert grid == 2.0**-48 and failed == 0
    assert out[0, 0] == sign * (3 if side < 0 else 3 + 2.0**-22)


@pytest.mark.parametrize("tie", [2.0**-150, -3 * 2.0**-150])
@pytest.mark.parametrize("dust", [-(2.0**-130), 0, 2.0**-130])
def test_dust_beside_half_of_a_subnormal_number(tie, dust):
    a, b = np.zeros((ROWS, 16)), np.zeros((16, COLUMNS))
    a[:, 0], b[0] = tie * 2.0**75, 2.0**-75
    a[:, 1], b[1] = dust, 2.0**-75
    a[:, 2], b[2] = 2.0**-130, 2.0**-130
    a[:, 3], b[3] = -(2.0**-130) if dust else 0, 2.0**-130
    c = np.full((PART, COLUMNS), 2.0**-149, np.float32)
    out, grid, failed = added(a, b, c)
    assert grid > 0 and failed == 0
    expected = kernels.reference.matmul(a[:PART].astype(BF16), b.astype(BF16), c, arithmetic=ASCEND)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("mixed", [0, 1])
def test_what_cancels_beside_dust_is_left_to_others(mixed):
    a, b = np.zeros((ROWS, 16)), np.ones((16, COLUMNS))
    a[:, 0], a[:, 1] = 1, 2.0**-130 * mixed
    c = np.full((PART, COLUMNS), -1 + 2.0**-20)
    assert added(a, b, c)[2] == 0
    c[1, 1] = -1
    assert (added(a, b, c)[2] != 0) == (mixed > 0)
    check(a[:PART].astype(np.float32).astype(BF16), b.astype(BF16), c.astype(np.float32))


def test_small_sums_notice_more_of_dust_than_ties():
    a, b = np.zeros((ROWS, 16)), np.ones((16, COLUMNS))
    a[:, 0], a[:, 1] = 1, 2.0**-40
    c = np.ones((PART, COLUMNS))
    assert added(a, b, c)[1:] == (2.0**-23, 0)
    c[2, 3] = -1 + 2.0**-20
    _, grid, failed = added(a, b, c)
    assert grid > 0 and failed != 0
    check(a[:PART].astype(BF16), b.astype(BF16), c.astype(np.float32))


@pytest.mark.parametrize("of_dust", ["main", "dust"])
def test_sums_of_dust_only_are_left_to_others(of_dust):
    a, b = np.zeros((ROWS, 32)), np.ones((32, COLUMNS))
    a[:, :3], a[:, 16:18] = [-1, 0.5, 0.5], 1
    a[2, 2:4] = [0.25, 0.25]
    a[1, 4] = 2.0**-130
    b[4] = 1 if of_dust == "main" else 2.0**-130
    c = np.zeros((PART, COLUMNS)) + 2.0**-20
    a[:, 5] = -(2.0**-20)
    out, grid, failed = added(a, b, c)
    assert grid > 0 and failed != 0 and np.array_equal(out, c)
    check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16))


@pytest.mark.parametrize("shift", [0, 30, 60, -60])
@pytest.mark.parametrize("cancels", [False, True])
def test_dust_of_one_operand_far_above_the_other_s(shift, cancels):
    """Ties that products of the larger dust decide or, if these cancel, those of the smaller."""
    rng = np.random.default_rng(5)
    a, b = (rng.choice([-1.0, 1.0], shape) for shape in ((ROWS, 32), (32, COLUMNS)))
    a, b = a * 2.0**shift, b * 2.0**-shift
    a[:, 3], b[5] = 2.0**-130, rng.choice([-1, 1], COLUMNS) * 2.0**-130
    a[:, 5:7] = 2.0**shift
    if cancels:
        b[6] = -b[5]
        a[:, 19], b[21], a[:, 21:23] = a[:, 3], b[5], a[:, 5:7]
        b[22] = -b[21]
    c = np.where(np.indices((PART, COLUMNS)).sum(0) % 2, 2.0**24 + 2, 2.0**25)
    out, grid, failed = added(a, b, c)
    assert grid > 0 and failed == 0
    x, y = a.astype(np.float32), b.astype(np.float32)
    expected = kernels.reference.matmul(
        x[:PART].astype(BF16), y.astype(BF16), c.astype(np.float32), arithmetic=ASCEND
    )
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_sums_beside_dust_that_may_be_beyond_fp32(overflow):
    rng = np.random.default_rng(6)
    a, b = (rng.choice([-1.0, 1.0], shape) * 2.0**62 for shape in ((ROWS, 48), (48, COLUMNS)))
    a[:, 3], b[20] = 2.0**-130, 2.0**-130
    a[2, 33:], b[33:] = 2.0**62, 2.0**62
    record = dataclasses.replace(ASCEND, overflow=overflow)
    c = (rng.choice([-1, 1], (ROWS, COLUMNS)) * 3e38).astype(np.float32)
    for before in (None, c):
        check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16), before, record)


@numba.njit
def proof_of(x, y, proof):
    at = x.ctypes.data, y.ctypes.data
    return native_dust.proof_of_parts((0, 0, 0, at[0]), (0, 0, 0, at[1]), proof)


#: That they are split; main parts from 2^-10 to 2^2, dust from 2^-130 to 2^-125.
KNOWN = [2, 2.0**2, 2.0**-10, 2.0**-125, 2.0**-130]


@pytest.mark.parametrize(
    ("x", "y", "proof"),
    [
        ({0: 1}, {}, {}),
        ({}, {0: 1}, {}),
        ({}, {}, {0: 2.0**17}),  # sums of 2^50 main parts' grids and more
        ({}, {}, {1: 2.0**-47}),  # of C's
        ({}, {3: 2.0**-99}, {}),  # sums of main parts with dust
        ({4: 2.0**-156}, {}, {}),
        ({}, {4: 2.0**-156}, {}),
        (  # of dust alone, which are as large as the last places of those
            {1: 1, 2: 1, 3: 2.0**-17, 4: 2.0**-53},
            {1: 1, 2: 1, 3: 2.0**-17, 4: 2.0**-17},
            {1: 2.0**-14},
        ),
        ({3: 2.0**-110, 4: 2.0**-136}, {3: 2.0**-110, 4: 2.0**-136}, {}),  # of dust alone
        ({3: 2.0**-37, 4: 2.0**-44}, {}, {}),  # that are no dust beside others
    ],
)
def test_what_is_proved_beforehand(x, y, proof):
    """Each of them is the only reason why that is nothing."""
    places = {0: 2.0**5, 1: 2.0**-32, 2: 2.0**-14}
    known = [np.array([of.get(i, KNOWN[i]) for i in range(5)]) for of in (x, y)]
    usual = np.array(KNOWN)
    assert proof_of(usual, usual, tuple(places.values())) == (
        2.0**-34,
        2.0**27 * (2.0**-122 + 2.0**-250),
    )
    assert proof_of(*known, tuple((places | proof).values())) == (0, 0)


@pytest.mark.parametrize("wide", ["main", "mixed", "both", "near"])
def test_parts_whose_sums_might_be_rounded_are_left_to_others(wide):
    """Main parts that are far apart, dust that is, and dust that is too large."""
    rng = np.random.default_rng(3)
    a, b = (rng.choice([-1.0, 1.0], shape) for shape in ((ROWS, 32), (32, COLUMNS)))
    a[:, 5], b[9] = 2.0**-130, 2.0**-130
    c = np.ones((PART, COLUMNS))
    assert added(a, b, c)[1] > 0
    if wide == "main":
        a[0, 0], b[0, 0] = 2.0**12, 2.0**12
        a[1, 1], b[1, 1] = 2.0**-6, 2.0**-6
    elif wide == "mixed":
        b[9], b[10] = 2.0**-80, 2.0**-133
    elif wide == "both":
        a[0, 6], b[10, 0] = 2.0**-112, 2.0**-112
        a[0, 7], b[11, 0] = 2.0**-133, 2.0**-133
    else:
        a[:, 5], b[9] = 2.0**-25, 2.0**-25
    assert added(a, b, c)[1] == 0
    check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16))
