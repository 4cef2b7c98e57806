"""Steps of two products and of a few FP16 ones, on terms that cancel, tie or are far apart."""

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest

import kernels
from kernels import Arithmetic, halves
from tests.kernel_inputs import BF16, FP16, FP32, words

BITS = {BF16: 8, FP16: 11, FP32: 12}  # of the significands drawn; a record below cuts FP32 to 12
GAPS = (0, 0, 1, 2, 8, 22, 23, 24, 25, 26, 28, 29, 30, 36, 38, 50, 51, 52, 53, 54, 56, 77, 100, 180)


def unit(**fields) -> Arithmetic:
    name = ", ".join(f"{key}={value}" for key, value in fields.items())
    return Arithmetic(
        name=name or "usual",
        products=2,
        operand_fraction_bits=11,
        dtypes=("bfloat16", "float16", "float32"),
        **fields,
    )


RECORDS = [
    (kernels.AMD_CDNA1, BF16),
    (unit(), FP16),
    (unit(), FP32),
    (unit(product_overflow="inf", nan=0x7FFFFFFF), BF16),
    (unit(zero="ieee"), BF16),
    (unit(zero="ieee", rounding="toward_zero"), FP32),
    (unit(zero="ieee", rounding="toward_zero", subnormal_results="flush"), FP32),
    (unit(zero="ieee", subnormal_inputs="flush"), BF16),
    (unit(subnormal_inputs="plus_zero", addend="late"), FP32),
    (unit(subnormal_results="flush", product_overflow="inf", addend="late"), BF16),
    (unit(zero="ieee", rounding="toward_zero", addend="late"), BF16),
    (unit(overflow="saturate", product_overflow="inf", specials="saturate"), BF16),
    (unit(overflow="saturate", zero="ieee", addend="late"), FP32),
]


def significands(rng, shape, bits):
    """From 1 up to 2: one bit, two, all, any."""
    last = 2.0 ** (1 - bits)
    two = 1 + 2.0 ** -rng.integers(1, bits, shape)
    some = 1 + rng.integers(0, 1 << (bits - 1), shape) * last
    return np.choose(rng.integers(0, 4, shape), [1.0, two, 2 - last, some])


def steps(seed, count, k, dtype):
    """Dots of length k whose terms lie `GAPS` apart, from below all FP32 numbers to above them."""
    rng = np.random.default_rng(seed)
    lowest, highest = (-24, 15) if dtype == FP16 else (-133, 127)

    def signs(*shape):
        return rng.choice([-1.0, 1.0], shape)

    base = rng.integers(-60, 60, count)
    for low, high in ((-152, -120), (118, 129), (-45, 30) if dtype == FP16 else (-240, 240)):
        base = np.where(rng.random(count) < 0.25, rng.integers(low, high, count), base)
    exponents = base[:, None] + (signs(count, k) * rng.choice(GAPS, (count, k))).astype(int)
    exponents[np.arange(count), rng.integers(0, k, count)] = base
    of_a = np.clip(exponents // 2 + rng.integers(-3, 4, (count, k)), lowest, highest)
    of_b = np.clip(exponents - of_a, lowest, highest)
    of_c = np.clip(base + signs(count) * rng.choice(GAPS, count), -149, 127)
    with np.errstate(all="ignore"):
        left, right = (significands(rng, (count, k), BITS[dtype]) for _ in "ab")
        a = (signs(count, k) * np.ldexp(left, of_a)).astype(dtype)
        b = np.ldexp(right, of_b).astype(dtype)
        a[rng.random((count, k)) < 0.04] = 0.0
        a[rng.random((count, k)) < 0.04] = -0.0
        some = rng.random(count) < 0.1  # two products cancel
        a[some, 1], b[some, 1] = -a[some, 0], b[some, 0]
        c = signs(count) * significands(rng, count, 24) * 2.0**of_c
        product = -np.float64(a[:, 0]) * np.float64(b[:, 0])  # cancels one of them
        off = rng.choice([0, 0, 1, -1], count) * 2.0 ** -rng.integers(15, 24, count)
        c = np.where(rng.random(count) < 0.3, product * (1 + off), c).astype(np.float32)
    c[rng.random(count) < 0.05] = -0.0
    few = count // 20
    values = [np.inf, -np.inf, np.nan, float(ml_dtypes.finfo(dtype).max)]
    a[:few, 0] = rng.choice(values, few).astype(dtype)
    c[few // 2 : 2 * few] = rng.choice(values[:3], 2 * few - few // 2)
    return a[:, None, :], b[:, :, None], c[:, None, None]


def check(a, b, c, record):
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=record)).ravel()
    got = words(kernels.matmul(a, b, c, arithmetic=record)).ravel()
    wrong = np.flatnonzero(expected != got)
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} differ, first {a[wrong[0]]} * {b[wrong[0]]} + {c[wrong[0]]}: "
        f"{expected[wrong[0]]:#010x} expected, {got[wrong[0]]:#010x} got"
    )


@pytest.mark.parametrize(
    ("record", "dtype"), RECORDS, ids=[f"{r.name}-{dtype.name}" for r, dtype in RECORDS]
)
def test_single_and_several_steps(record, dtype):
    check(*steps(0, 1200, 2, dtype), record)
    check(*steps(1, 300, 6, dtype), record)


@pytest.mark.parametrize("products", [3, 4])
def test_a_few_fp16_products(products):
    record = dataclasses.replace(unit(), products=products)
    assert halves.serve(record)
    check(*steps(2, 4000, products, FP16), record)
    check(*steps(3, 1000, 3 * products, FP16), record)
    record = kernels.AMD_CDNA1  # its FP16 mode
    check(*steps(4, 1000, 2 * products, FP16), record)


def test_fp16_products_at_both_ends_of_their_range():
    """2^-48 beside four of nearly 2^32, and beside a C that ties or cancels them."""
    large, least = 65504.0, 2.0**-24
    a = np.array([[large, large, large, least]] * 2 + [[large, -large, 0, least]] * 2, FP16)
    b = np.array([[large, large, large, least]] * 4, FP16)
    cancels = np.float32(-3 * large * large)  # 24 bits hold it: 3 * 2047^2 * 2^10
    c = np.float32([0, cancels, 2.0**-24, -(2.0**-48)])
    c = np.concatenate([c, -c, [2.0**-149, np.inf]]).astype(np.float32)
    a, b, c = (np.repeat(a, len(c), 0), np.repeat(b, len(c), 0), np.tile(c, 4))
    check(a[:, None, :], b[:, :, None], c[:, None, None], kernels.AMD_CDNA1)
    check(-a[:, None, :], b[:, :, None], c[:, None, None], kernels.AMD_CDNA1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_every_combination_of_rules(seed):
    for rounding, results, inputs, zero, overflow, addend in itertools.product(
        ("nearest_even", "toward_zero"),
        ("keep", "flush"),
        ("keep", "flush", "plus_zero"),
        ("positive", "ieee"),
        ("inf", "saturate"),
        ("fused", "late"),
    ):
        record = unit(
            rounding=rounding,
            subnormal_results=results,
            subnormal_inputs=inputs,
            zero=zero,
            overflow=overflow,
            addend=addend,
        )
        check(*steps(seed, 300, 2, FP32), record)


def result(terms, c, **fields):
    a, b = np.array(terms, np.float32).T
    record = unit(**fields)
    out = kernels.matmul(a[None], b[:, None], np.float32([[c]]), arithmetic=record)
    return words(out)[0, 0]


def test_dust_decides_a_tie():
    assert result([(2.0**-12, 2.0**-12), (2.0**-100, 2.0**-100)], 1) == 0x3F800001
    assert result([(2.0**-12, 2.0**-12), (2.0**-100, -(2.0**-100))], 1) == 0x3F800000
    assert result([(2.0**-12, 2.0**-12), (0, 0)], 1) == 0x3F800000
    assert result([(2.0**-75, 2.0**-75), (2.0**-120, 2.0**-120)], 0) == 1
    assert result([(2.0**-75, 2.0**-75), (2.0**-120, -(2.0**-120))], 0) == 0


def test_what_cancellation_leaves_is_whole():
    """The sum of the products has lost the low bits of what is left in the end."""
    small = 2.0**-20 * (1 + 2.0**-11)
    left = words(np.float32([small * small]))[0]
    assert result([(1, 1), (small, small)], -1) == left
    assert result([(small, small), (1, 1)], -1) == left


def test_losses_of_both_additions_reach_above_a_power_of_two():
    """1 + 2^-53 - 2^-53 + 2^-54: the sum of all but the third term is 1, and with it just below."""
    terms, c = [(1, 1), (2.0**-26, 2.0**-27)], -(2.0**-54)
    assert result(terms, c, rounding="toward_zero") == 0x3F800000
    terms = [(1, 1), (2.0**-26, 2.0**-28)]
    assert result(terms, c - 2.0**-77, rounding="toward_zero") == 0x3F7FFFFF
    assert result(terms, c, rounding="toward_zero") == 0x3F800000


def test_overflow_starts_at_the_middle():
    largest, half = 2.0**128 - 2.0**104, (2.0**51, 2.0**52)
    assert result([half, (0, 0)], largest) == 0x7F800000
    assert result([half, (2.0**-100, -(2.0**-100))], largest) == 0x7F7FFFFF
    assert result([half, half], -largest) == 0xFF7FFFFE
    back = (2.0**52, -(2.0**52))
    assert result([half, (0, 0), back, (0, 0)], largest) == 0x7F800000  # it stays infinite


@pytest.mark.parametrize("addend", ["fused", "late"])
def test_nothing_but_minus_zeros(addend):
    """In the first row; the last one is there because no FP64 sum holds it."""
    a = np.float32([[-0.0, -0.0], [-0.0, -0.0], [-0.0, 0.0], [1, 2.0**-60]])
    b, c = np.float32([[1], [2.0**-60]]), np.float32([[-0.0], [0.0], [-0.0], [1]])
    record = unit(zero="ieee", addend=addend)
    expected = [0x80000000, 0, 0, 0x40000000]
    assert words(kernels.matmul(a, b, c, arithmetic=record)).ravel().tolist() == expected
