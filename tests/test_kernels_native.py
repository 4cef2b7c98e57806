"""Exact sums compiled for the processor: what only they can get wrong.

That their bits are the definition's on every generator is in test_kernels_exact.py.
"""

import dataclasses
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest

import kernels
from kernels import compiled, native_chain, native_operands, native_steps, operands, vectors
from tests.kernel_inputs import BF16, FP16, FP32, words

ASCEND = kernels.ASCEND_910C

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or jax.default_backend() != "cpu", reason="XLA's operations serve here"
)


def check(a, b, c=None, record=ASCEND, expected=None):
    """Chains both as where subnormal numbers take no longer and as where they do. What is expected
    is computed unless it is given.
    """
    if expected is None:
        expected = words(kernels.reference.matmul(a, b, c, arithmetic=record))
    for quick in (True, False) if record.is_chain else (None,):
        with mock.patch.object(native_chain, "keeps_quickly", lambda quick=quick: quick):
            got = words(jax.jit(lambda a, b: kernels.matmul(a, b, c, arithmetic=record))(a, b))
        wrong = np.argwhere(expected != got)
        assert not len(wrong), (
            f"{len(wrong)} of {got.size} differ, first at {wrong[0]}: "
            f"{expected[tuple(wrong[0])]:#010x} expected, {got[tuple(wrong[0])]:#010x} got"
        )


def spread(rng, shape, span):
    return rng.normal(size=shape) * 2.0 ** rng.integers(-span, span + 1, shape)


def sparse(rng, m, k, n):
    """Products far below what the largest operands suggest."""
    return [
        np.where(rng.random(shape) < 0.8, 0, spread(rng, shape, 60)) for shape in ((m, k), (k, n))
    ]


def cancelling(rng, m, k, n):
    """Terms of 2^100 that cancel and leave ordinary ones."""
    a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
    a[:, 0::8], b[0::8] = 2.0**50, 2.0**50
    a[:, 3::8], b[3::8] = -(2.0**50), 2.0**50
    return a, b


def dust(rng, m, k, n):
    """Sums half way between two numbers of FP32, and a term hundreds of bits below that decides."""
    a, b = np.zeros((m, k)), np.ones((k, n))
    a[:, 0::16], a[:, 5::16] = 1, 2.0**-24
    b[9::16] = 2.0**-60
    a[:, 9::16] = 2.0 ** rng.integers(-60, -20, (m, a[:, 9::16].shape[1]))
    a[:, 9::16] *= rng.choice([-1, 0, 1], a[:, 9::16].shape)
    return a, b


def tiny(rng, m, k, n):
    """Sums at the last places of subnormal numbers, whose halves are decided by dust."""
    a, b = np.zeros((m, k)), np.ones((k, n))
    a[:, 0::16] = rng.integers(-3, 4, a[:, 0::16].shape) * 2.0**-75
    b[0::16] = 2.0**-75
    a[:, 7::16], b[7::16] = rng.choice([-1, 0, 1], a[:, 7::16].shape) * 2.0**-110, 2.0**-110
    return a, b


def steep(rng, m, k, n):
    """Every operand of a size of its own: nearly all of what FP64 can hold apart."""
    return spread(rng, (m, k), 100), spread(rng, (k, n), 100) * 2.0**-80


def one_sided(rng, m, k, n):
    """Sums as large as their terms allow, of either sign, and terms that fill up all places."""
    a, b = rng.uniform(1.9, 2, (m, k)), rng.uniform(1.9, 2, (k, n))
    a[:, 2::5] *= 2.0 ** -rng.integers(20, 55, a[:, 2::5].shape)
    a[:, 7::16] *= 2.0**-100
    return a * rng.choice([-1, 1], (m, 1)), b


@pytest.mark.parametrize("draw", [sparse, cancelling, dust, tiny, steep, one_sided])
@pytest.mark.parametrize("products", [16, 4, 11])
def test_data_that_need_more_than_two_parts(draw, products):
    rng = np.random.default_rng(products)
    with np.errstate(over="ignore"):
        a, b = (x.astype(np.float32).astype(BF16) for x in draw(rng, 9, 53, 19))
    c = spread(rng, (9, 19), 40).astype(np.float32)
    record = dataclasses.replace(ASCEND, products=products)
    check(a, b, None, record)
    c[2, 3], c[4, 5] = np.inf, np.nan
    check(a, b, c, record)


@pytest.mark.parametrize("last", [1, 2.0**-30, 2.0**-31, 2.0**-60, 2.0**-99, 2.0**-120, 2.0**-200])
@pytest.mark.parametrize("sign", [1, 0, -1])
def test_what_lies_below_a_tie_decides_it(last, sign):
    """Beside 1 + 2^-24, which is half way, and beside numbers that make the sum start high."""
    a = np.zeros((3, 16))
    a[:, :3] = [1, 2.0**-24, sign * last]
    a[1, 3:5] = 2.0**40, -(2.0**40)
    a[2, 3:5] = 2.0**120, -(2.0**120)
    b = np.ones((16, 2))
    b[2] = min(last, 2.0**-60)
    a[:, 2] /= b[2, 0]
    check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16))


@pytest.mark.parametrize("tie", [(40, 16), (80, 56)])
def test_rests_whose_own_sum_rounds(tie):
    """Beside 2^100, which cancels: +1.5 beside 2^53 is +2 in the sum of the rests, so that the tie
    seems to be exceeded by a quarter where a quarter is missing.
    """
    terms = [(1, 100), (1, 53), (1.5, 0), (-1, 53), (1, tie[0]), (1, tie[1]), (-1.75, 0), (-1, 100)]
    a, b = np.zeros((1, 16)), np.zeros((16, 1))
    for k, (factor, exponent) in enumerate(terms):
        a[0, k], b[k] = factor * 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    assert float(kernels.matmul(a.astype(BF16), b.astype(BF16))[0, 0]) == 2.0 ** tie[0]
    check(a.astype(BF16), b.astype(BF16))


@pytest.mark.parametrize("size", [0, 2.0**50])
def test_sums_as_large_as_their_terms_allow(size):
    """Ten terms of nearly 4, and dust between them that decides a tie; with a larger pair that
    cancels, their sum is a second part.
    """
    a, b = np.zeros((1, 16)), np.zeros((16, 1))
    a[0, :6], a[0, 7:11], b[:11] = -1.984375, -1.984375, 1.984375
    a[0, 6], b[6] = -(2.0**-27), 2.0**-27
    a[0, 11], b[11] = -(2.0**-10), 2.0**-9
    a[0, 12:14], b[12:14, 0] = size, [size, -size]
    check(a.astype(BF16), b.astype(BF16))
    assert (
        float(kernels.matmul(a.astype(BF16), b.astype(BF16))[0, 0]) == -10 * 1.984375**2 - 2.0**-18
    )


def test_the_last_bit_of_a_product_beside_a_sum():
    """2^40 and half a last place of FP32; FP64 has no room for 2^-14 beside them."""
    a, b = np.zeros((1, 16)), np.zeros((16, 1))
    a[0, :4] = 2.0**20, 255 / 128, -127 / 64, 2.0**8
    b[:4, 0] = 2.0**20, 255 / 128, 2, 2.0**8
    assert float(kernels.matmul(a.astype(BF16), b.astype(BF16))[0, 0]) == 2.0**40 + 2.0**17
    check(a.astype(BF16), b.astype(BF16))


def test_the_last_bit_of_an_accumulator_beside_later_sums():
    """From the steps of an earlier block, and from C."""
    a, b = np.zeros((1, 160), BF16), np.ones((160, 1), BF16)
    a[0, 0], b[0, 0] = 255 / 128, 255 / 128
    a[0, 144:146], b[144:146] = [2.0**20, -(2.0**20)], 2.0**20
    c = np.full((1, 1), (255 / 128) ** 2, np.float32)
    assert float(kernels.matmul(a, b)[0, 0]) == c[0, 0]
    assert float(kernels.matmul(a[:, 144:], b[144:], c)[0, 0]) == c[0, 0]


@pytest.mark.parametrize("dust", [[], [(1, -60)]])
def test_an_accumulator_beside_whose_last_place_later_sums_end(dust):
    """2^40, from an earlier block (a plain one or not) or as C, half a last place of it, and what
    decides the tie.
    """
    a, b = np.zeros((1, 160), BF16), np.zeros((160, 1), BF16)
    for k, size in ((0, 20), (144, 8), (145, -10), *dust):
        a[0, k], b[k] = 2.0**size, 2.0**size
    c = np.full((1, 1), 2.0**40, np.float32)
    assert float(kernels.matmul(a, b)[0, 0]) == 2.0**40 + 2.0**17
    assert float(kernels.matmul(a[:, 144:], b[144:], c)[0, 0]) == 2.0**40 + 2.0**17


def test_the_last_place_of_c_beside_what_cancels():
    a, b = np.zeros((1, 16), BF16), np.ones((16, 1), BF16)
    a[0, [0, 2, 3, 5]] = 2.0**50, 2.0**27, -(2.0**27), -(2.0**50)
    b[[0, 2, 3, 5], 0] = 2.0**50, 2.0**26, 2.0**26, 2.0**50
    c = np.array([[2.0**20 + 2.0**-3]], np.float32)
    assert float(kernels.matmul(a, b, c)[0, 0]) == c[0, 0]


@pytest.mark.parametrize("size", [2.0**-126, 2.0**-127, 2.0**-149, 2.0**126, 2.0**127])
def test_the_ends_of_fp32(size):
    rng = np.random.default_rng(5)
    a = rng.integers(-9, 10, (16, 40)) * 2.0**-20
    b = rng.integers(-9, 10, (40, 16)) * 2.0**-20
    scale = 2.0 ** round(np.log2(size) / 2)
    with np.errstate(over="ignore"):
        x, y = ((v * scale * 2.0**18).astype(np.float32) for v in (a, b))
        c = (rng.integers(-3, 4, (16, 16)) * np.float64(size)).astype(np.float32)
        for record in (ASCEND, kernels.ASCEND_910C_CANDIDATES["saturation"]):
            check(x.astype(BF16), y.astype(BF16), c, record)
            check(x, y, c, record)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="an x86's names")
@pytest.mark.parametrize(
    "processor, features",
    [
        pytest.param(
            "haswell",
            "+avx,+avx2,+fma",
            id="four doubles",
            marks=pytest.mark.skipif(vectors.LANES <= 4, reason="so has this processor"),
        ),
        pytest.param("x86-64", "", id="no multiply-add", marks=pytest.mark.slow),
    ],
)
def test_a_processor_with_less(processor, features, tmp_path):
    """The same, compiled for one that has shorter vectors, or no fused multiply-add."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    careful = Path(__file__).with_name("test_kernels_native_careful.py")
    chosen = "decides_it or rests or infinity_that_arises or parts or ends_of_fp32 or fp64_rounds"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    for arguments in ([__file__, "-k", chosen], [str(careful)]):
        ran = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout[-2000:]


def test_an_infinity_that_arises_within_a_block_stays():
    a, b = np.zeros((9, 96), BF16), np.ones((96, 17), BF16)
    a[3, 16:18], b[16:18] = 2.0**64, 2.0**63
    a[5, 20], b[20] = -(2.0**127), 2.0**10
    b[70, 4] = np.nan
    a[5, 71], a[7, 30], a[8, 90] = np.inf, np.inf, -np.inf
    b[40:, 9] = -1
    check(a, b)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_several_tiles_by_several_threads(dtype):
    """Whole numbers, whose sums FP32 holds exactly."""
    rng = np.random.default_rng(6)
    a, b = rng.integers(-9, 10, (3, 530, 37)), rng.integers(-9, 10, (3, 37, 270))
    c = rng.integers(-9, 10, (3, 530, 270)).astype(np.float32)
    for batch, m, n in ((3, 530, 270), (1, 257, 16), (1, 8, 257), (2, 1, 1), (3, 33, 15)):
        x, y, z = a[:batch, :m], b[:batch, :, :n], c[:batch, :m, :n]
        got = kernels.matmul(x.astype(dtype), y.astype(dtype), z)
        assert np.array_equal(got, x @ y + z)


@pytest.mark.parametrize("draw", [sparse, cancelling])
def test_doubts_in_several_tiles(draw):
    """Some rows and columns of each tile."""
    a, b = (
        x.astype(np.float32).astype(BF16) for x in draw(np.random.default_rng(10), 264, 40, 270)
    )
    got = np.asarray(kernels.matmul(a, b))
    rows, columns = np.array([0, 7, 131, 132, 263]), np.array([0, 17, 134, 135, 144, 269])
    expected = kernels.reference.matmul(a[rows], b[:, columns], arithmetic=ASCEND)
    assert np.array_equal(words(got[np.ix_(rows, columns)]), words(expected))


def test_products_side_by_side():
    """Of one program and of several at once; every one shares XLA's threads."""
    rng = np.random.default_rng(7)
    shapes = (200, 64), (64, 300)
    operands = [[jnp.asarray(rng.integers(-4, 5, x), BF16) for x in shapes] for _ in range(6)]
    expected = [np.asarray(a, np.float32) @ np.asarray(b, np.float32) for a, b in operands]
    together = jax.jit(lambda pairs: [kernels.matmul(a, b) for a, b in pairs])
    wrong = []

    def work():
        for _ in range(10):
            found = together(operands)
            wrong.extend(not np.array_equal(x, y) for x, y in zip(found, expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 240 and not any(wrong)


def test_operands_of_a_loop_and_a_branch():
    """Custom calls within control flow, and under vmap."""
    rng = np.random.default_rng(8)
    a = jnp.asarray(rng.integers(-2, 3, (4, 24, 24)), BF16)

    def power(x):
        def body(_, y):
            done = y[0, 0] > 1
            return jax.lax.cond(done, lambda y: y, lambda y: kernels.matmul(x, y.astype(BF16)), y)

        return jax.lax.fori_loop(0, 2, body, jnp.eye(24, dtype=jnp.float32))

    found = jax.jit(jax.vmap(power))(a)
    for x, got in zip(np.asarray(a, np.float32), found, strict=True):
        expected = np.eye(24)
        for _ in range(2):
            expected = expected if expected[0, 0] > 1 else x @ expected
        assert np.array_equal(got, expected)


def test_without_numba_xla_serves(monkeypatch):
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(5, 20)).astype(BF16), rng.normal(size=(20, 18)).astype(BF16)
    monkeypatch.setitem(sys.modules, "kernels.custom_call", None)
    monkeypatch.delattr(kernels, "custom_call", raising=False)
    compiled.compiled.cache_clear()
    jax.clear_caches()
    try:
        with pytest.warns(UserWarning, match="numba does not work here"):
            check(a, b)
    finally:
        compiled.compiled.cache_clear()
        jax.clear_caches()


@pytest.mark.parametrize("k", [16, 130, 300])
@pytest.mark.parametrize("with_c", [False, True])
def test_the_word_of_a_nan_is_the_units(k, with_c):
    """Whatever words operands have, among numbers that are nothing but ordinary."""
    rng = np.random.default_rng(k)
    a, b = rng.normal(size=(9, k)).astype(BF16), rng.normal(size=(k, 40)).astype(BF16)
    c = rng.normal(size=(9, 40)).astype(np.float32) if with_c else None
    for at in (0, k - 1):
        a[3, at] = np.uint16(0xFF91).view(BF16)
        b[at, 20 + at % 2] = np.uint16(0x7FA5).view(BF16)
        check(a, b, c)


@numba.njit
def read(source, form, count, doubles, words, apart):
    native_operands.read_doubles(source, form, count, doubles.ctypes.data + 8, apart[0])
    native_operands.read_words(source, form, count, words.ctypes.data + 4, apart[1])


@pytest.mark.parametrize(
    "dtype, cut, rounding",
    [
        (BF16, 0, "toward_zero"),
        (FP16, 0, "toward_zero"),
        (FP32, 0, "toward_zero"),
        (FP32, 11, "toward_zero"),
        (FP32, 11, "nearest_even"),
    ],
)
def test_operands_of_every_kind(dtype, cut, rounding):
    """All codes of 16 bits, and as many of 32; one by one at the end of what is read."""
    short = np.arange(1 << 16, dtype=np.uint16)
    codes = short
    if dtype == FP32:
        codes = short.astype(np.uint32) * 65537 ^ (short >> 3)
        codes[:4] = 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF
    record = dataclasses.replace(
        ASCEND, operand_fraction_bits=23 - cut if cut else None, operand_rounding=rounding
    )
    numbers = np.asarray(operands.read(jnp.asarray(codes.view(dtype)), record))
    with np.errstate(invalid="ignore"):  # NaNs that signal
        expected, single = numbers.astype(np.float64), numbers.astype(np.float32)
    kind = [BF16, FP16, FP32].index(dtype)
    form = kind, cut, int(rounding == "nearest_even")
    for count in (len(codes), 70, 33, 32, 31, 16, 15, 1):
        groups = native_operands.GROUP, native_operands.WORDS
        apart = groups[0] + 2, groups[1] + 3
        doubles = np.full(2 * len(codes), 7.0)
        words = np.full(2 * len(codes), 7, np.uint32)
        read(codes.ctypes.data, form, count, doubles, words, apart)
        at = np.arange(count)
        found = doubles[1 + at // groups[0] * apart[0] + at % groups[0]]
        assert np.array_equal(found, expected[:count], equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(expected[:count]))
        found = words[1 + at // groups[1] * apart[1] + at % groups[1]].view(np.float32)
        assert np.array_equal(found, single[:count], equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(expected[:count]))
        assert (doubles == 7).sum() == len(doubles) - count + (expected[:count] == 7).sum()


def of_all(function):
    """What `function` of an emitter and a vector makes of arrays of doubles."""

    @vectors.inline(result=False)
    def of_one(emit, x, out):
        emit.store(function(emit, emit.load(emit.at(x))), emit.at(out))

    @numba.njit
    def of_each(x, out):
        for i in range(0, len(x), vectors.LANES):
            of_one((x.ctypes.data + 8 * i, out.ctypes.data + 8 * i))

    return of_each


def test_doubles_rounded_to_24_bits():
    """By multiply-adds as by the processor's conversion: ties, the doubles beside them, and those
    around powers of two, odd last places among them.
    """
    rng = np.random.default_rng(3)
    fraction = rng.integers(0, 1 << 52, 4096)
    upper = rng.integers(0, 1 << 23, 4096) << 29
    ends = [upper + beside for beside in ((1 << 28) + np.arange(-1, 2)[:, None])]
    powers = np.concatenate([np.arange(1 << 10), (1 << 52) - 1 - np.arange(1 << 10)])
    fractions = np.concatenate([fraction, *ends, upper, powers, (powers << 20) % (1 << 52)])
    for exponent in (-126, -90, -1, 0, 1, 60, 126):
        words = fractions | (exponent + 1023) << 52
        x = np.concatenate([words, words | -1 << 63]).view(np.float64)
        x = np.concatenate([x, np.zeros(-len(x) % vectors.LANES + vectors.LANES)])
        out = np.empty_like(x)
        of_all(native_steps.in_24_bits)(x, out)
        assert np.array_equal(out, x.astype(np.float32).astype(np.float64))
        assert np.array_equal(np.signbit(out), np.signbit(x))


def test_doubles_rounded_to_fp32():
    """Subnormal numbers too: ties, the doubles beside them, and those around powers of two, where
    one way ends and the other begins among them.
    """
    rng = np.random.default_rng(4)
    ties = (np.arange(1, 1 << 13) * 2.0**-150).view(np.int64)
    ends = ((1 << 24) + np.arange(-(1 << 11), 1 << 11)) * 2.0**-150
    middle = (3 * (1 << 23) + np.arange(-(1 << 11), 1 << 11)) * 2.0**-150
    exact = np.concatenate([ties, ends.view(np.int64), middle.view(np.int64)])
    fraction = rng.integers(0, 1 << 52, 1 << 14) | rng.integers(-160, 127, 1 << 14) + 1023 << 52
    words = np.concatenate([*(exact + np.arange(-2, 3)[:, None]), fraction])
    x = np.concatenate([words, words | -1 << 63]).view(np.float64)
    x = np.concatenate([x, np.zeros(-len(x) % vectors.LANES + vectors.LANES)])
    out = np.empty_like(x)
    of_all(native_steps.in_float32)(x, out)
    assert np.array_equal(out, x.astype(np.float32).astype(np.float64))
    assert not np.signbit(out[out == 0]).any()


@pytest.mark.parametrize("exponents", [(-30, -30), (-62, -63), (-64, -63), (-67, -70), (-74, -74)])
@pytest.mark.parametrize("steps", [1, 20])
def test_exact_sums_below_normal_numbers(exponents, steps):
    """Where operands prove that sums do not round in FP64, in one block or in several."""
    rng = np.random.default_rng(steps)
    shapes = (2 * native_steps.ROWS + 1, 16 * steps), (16 * steps, 2 * native_steps.COLUMNS + 3)
    for draw in (rng.standard_normal, lambda shape: rng.integers(-3, 4, shape)):
        a, b = (draw(s) * 2.0**e for s, e in zip(shapes, exponents, strict=True))
        a, b = (x.astype(np.float32).astype(BF16) for x in (a, b))
        c = (rng.standard_normal((len(a), b.shape[1])) * 2.0**-126).astype(np.float32)
        check(a, b)
        check(a, b, c)


@pytest.mark.parametrize("size", [2.0**-50, 2.0**-61, 2.0**-66])
def test_small_sums_that_fp64_would_round(size):
    """1 + 2^-24 + 2^-54, times `size` squared: all of it has 55 bits."""
    odd = 1 + 2.0**-7
    a = size * np.array([1, 2.0**-12, odd * 2.0**-20, -(1 + 2.0**-6) * 2.0**-20])
    b = size * np.array([1, 2.0**-12, odd * 2.0**-20, 2.0**-20])
    a, b = np.tile(a, (9, 1)), np.tile(b[:, None], (1, 33))
    check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16))


@pytest.mark.parametrize("special", [np.inf, np.nan, 2.0**60])
def test_a_few_small_sums_beside_others(special):
    """As many sums below normal numbers as are told alone, and more, and some that are in doubt."""
    rng = np.random.default_rng(5)
    for share in (0.02, 0.3, 1.0):
        a, b = rng.standard_normal((13, 96)), rng.standard_normal((96, 35)) * 2.0**-63
        a *= np.where(rng.random((13, 1)) < share, 2.0**-63, 1)
        a[rng.random(a.shape) < 0.01] = special
        check(*(x.astype(np.float32).astype(BF16) for x in (a, b)))


@pytest.mark.parametrize("products", [16, 8, 5])
def test_blocks_that_need_more_care_and_less(products):
    """Along k: ordinary numbers, ties at every step, powers of two that are far apart in each row,
    ties whose terms are, what cancels, and ordinary ones again.
    """
    rng = np.random.default_rng(products)
    m, n, k = 2 * native_steps.BAND + 1, native_steps.COLUMNS + 3, 256
    parts = []
    for draw in range(6):
        a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
        if draw in (1, 3):
            a, b = np.zeros((m, k)), np.ones((k, n))
            a[:, ::products] = rng.integers(1, 9, a[:, ::products].shape) * 2.0**20
            a[:, 1::products] = 2.0 ** -rng.integers(0, 8, a[:, 1::products].shape)
            a[:, 2::products] = rng.choice([-1, 0, 1], a[:, 2::products].shape) * 2.0**-60
            if draw == 3:
                a[:, 3::products], b[3::products] = 2.0**60, 2.0**-70
                a[:, 4::products], b[4::products] = 2.0**-60, 2.0**62
        elif draw == 2:
            a, b = (v * 2.0 ** rng.integers(-50, 51, v.shape) for v in (a, b))
        elif draw == 4:
            a, b = cancelling(rng, m, k, n)
        parts.append((a, b))
    a, b = np.concatenate([a for a, _ in parts], 1), np.concatenate([b for _, b in parts])
    record = dataclasses.replace(ASCEND, products=products)
    a, b = (v.astype(np.float32).astype(BF16) for v in (a, b))
    check(a, b, None, record)
    check(a, b, spread(rng, (m, n), 30).astype(np.float32), record)


@pytest.mark.parametrize("products", [16, 8])
@pytest.mark.parametrize("share", [0, 0.003])
def test_ties_that_are_exact_but_for_dust(share, products):
    """Along k: ordinary numbers, of which a share is far below the others."""
    rng = np.random.default_rng(products)
    m, n, k = native_steps.BAND + 1, native_steps.COLUMNS, 60 * products
    a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
    a[rng.random(a.shape) < share] *= 2.0**-60
    a, b = (v.astype(np.float32).astype(BF16) for v in (a, b))
    a[0, 3] = 2.0**-100  # no other way is taken
    check(a, b, None, dataclasses.replace(ASCEND, products=products))


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_two_nans_of_one_sum(overflow):
    """Which of their words an instruction passes on is no difference between two bounds."""
    rng = np.random.default_rng(15)
    a, b = (spread(rng, shape, 30).astype(BF16) for shape in ((8, 48), (48, 32)))
    c = rng.normal(size=(8, 32)).astype(np.float32)
    words(c)[5, 7], a.view(np.uint16)[5, 3] = 0x7FA01234, 0xFFC1
    b.view(np.uint16)[4, 9], b.view(np.uint16)[3, 11] = 0x7FD5, 0xFFA2
    a[2, 20], a[2, 21], b[20, 15], b[21, 15] = np.inf, np.inf, 1, -1
    check(a, b, c, dataclasses.replace(ASCEND, overflow=overflow))


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
@pytest.mark.parametrize("where", ["c", "a"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_one_element_that_is_not_finite(value, where, overflow):
    """Among others that need care: a single one is no tie."""
    rng = np.random.default_rng(13)
    a, b = (spread(rng, shape, 30).astype(BF16) for shape in ((8, 48), (48, 32)))
    c = rng.normal(size=(8, 32)).astype(np.float32)
    (c if where == "c" else a)[5, 7] = value
    record = dataclasses.replace(ASCEND, overflow=overflow)
    check(a, b, c, record)
    check(a, np.where(np.arange(32) == 9, b, 0), c, record)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("gap", range(4, 76, 2))
def test_what_large_terms_leave_when_they_cancel(dtype, gap):
    """Of smaller ones at any distance, which have a part in the first of two sums or have none."""
    rng = np.random.default_rng(gap)
    a, b = (rng.normal(size=shape) * 2.0 ** -(gap / 2) for shape in ((9, 48), (48, 33)))
    a[:, ::15], b[::15] = 1.5, 1.5 * np.array([1, -1, 1, -1])[:, None]
    check(a.astype(dtype), b.astype(dtype))


def test_whole_numbers_beside_what_cancels():
    """Too large for FP64 to have all whole numbers there, though no product is by itself."""
    rng, large = np.random.default_rng(3), 255 / 128 * 2.0**25
    a, b = np.zeros((13, 64)), np.zeros((64, 17))
    for first in range(0, 64, 16):
        a[:, first : first + 7], b[first : first + 7] = large, large
        a[:, first + 8 : first + 15], b[first + 8 : first + 15] = large, -large
    a[:, 7::16], b[7::16] = rng.integers(-20, 21, (13, 4)), 1
    c = rng.integers(1 << 23, 1 << 24, (13, 17)).astype(np.float32)
    check(a.astype(BF16), b.astype(BF16), c)


# Chains.

FMA, X86 = kernels.FP32_FMA_CHAIN, kernels.X86_AVX512_BF16
KEEPING = dataclasses.replace(X86, subnormal_inputs="keep", subnormal_results="keep", products=3)


def far_apart(rng, m, k, n, center):
    return [spread(rng, shape, 8) * 2.0**center for shape in ((m, k), (k, n))]


def mixed(rng, m, k, n, center):
    """Small and ordinary operands, side by side."""
    small = 2.0 ** (2 * center)
    return [rng.normal(size=s) * np.where(rng.random(s) < 0.5, 1, small) for s in ((m, k), (k, n))]


def subnormal(rng, m, k, n, center):
    """A few subnormal operands beside others of which these are no lower end."""
    sizes = [2.0 ** rng.uniform(-abs(center), abs(center), s) for s in ((m, k), (k, n))]
    return [np.where(rng.random(x.shape) < 0.02, 2.0**-130, x) for x in sizes]


def cancelled(rng, m, k, n, center):
    """Sums that return to what C was, or to nothing."""
    a, b = far_apart(rng, m, k, n, center)
    a[:, 1::2] = -a[:, 0::2][:, : a[:, 1::2].shape[1]]
    b[1::2] = b[0::2][: b[1::2].shape[0]]
    return a, b


@pytest.mark.parametrize("draw", [far_apart, mixed, subnormal, cancelled])
@pytest.mark.parametrize("center", [-75, -66, -62, -52, 0, 58])
def test_chains_that_are_flushed_scaled_or_rounded(draw, center):
    rng = np.random.default_rng(100 + center)
    with np.errstate(over="ignore"):
        a, b = (x.astype(np.float32) for x in draw(rng, 11, 150, 21, center))
        c = (spread(rng, (11, 21), 40) * 2.0**-100).astype(np.float32)
    c[2, 3], c[4, 5], c[5, 6], c[6] = np.inf, np.nan, 2.0**-140, -0.0
    for start in (None, c):
        check(a.astype(BF16), b.astype(BF16), start, FMA)
        check(a[:5].astype(BF16), b.astype(BF16), start if start is None else c[:5], X86)
    check(a, b[:, :7].copy(), c[:, :7].copy(), FMA)
    check(a[:5].astype(BF16), b.astype(BF16), c[:5], KEEPING)


@pytest.mark.parametrize("record", [FMA, KEEPING], ids=["fma", "keeping"])
@pytest.mark.parametrize("far", ["rows", "columns", "both"])
def test_chains_of_rows_and_columns_of_different_sizes(far, record):
    """They are computed in an order of their own, of which results, C and NaNs tell nothing."""
    rng = np.random.default_rng(4)
    m, k, n = 19, 40, 37
    a, b = rng.normal(size=(m, k)) * 2.0**-63, rng.normal(size=(k, n)) * 2.0**-63
    rows, columns = (2.0 ** rng.integers(-20, 21, size) for size in ((m, 1), n))
    a, b = (a * rows if far != "columns" else a), (b * columns if far != "rows" else b)
    a, b = (x.astype(np.float32).astype(BF16) for x in (a, b))
    exponents = np.log2(abs(a.astype(np.float64)).max(1)), np.log2(abs(b.astype(np.float64)).max(0))
    orders = np.arange(m), np.arange(n)
    found = sorted_tile(a, b, native_operands.BF16, orders)
    assert found
    for order, of, is_far in zip(orders, exponents, (far != "columns", far != "rows"), strict=True):
        assert sorted(order) == list(range(len(order)))
        assert (np.diff(np.floor(of[order])) >= 0).all() if is_far else (np.diff(order) == 1).all()
    check(a, b, None, record)
    c = (rng.normal(size=(m, n)) * 2.0**-125 * np.arange(n)).astype(np.float32)
    check(a, b, c, record)
    a[3, 7], b[20, 11], c[8, 2] = np.nan, -np.nan, np.nan
    check(a, b, c, record)


@numba.njit
def sort_tile(a, b, kind, orders):
    sizes = b.shape
    return native_chain._sort(a.ctypes.data, b.ctypes.data, (kind, 0, 0), sizes, (0, 0), orders)


def sorted_tile(a, b, kind, orders):
    return sort_tile(a.view(np.uint16), b.view(np.uint16), kind, orders)


@pytest.mark.parametrize("record", [FMA, X86, KEEPING], ids=["fma", "x86", "keeping"])
@pytest.mark.parametrize("m, n", [(70, 3), (3, 70), (9, 33)])
def test_chains_of_every_bit_pattern(record, m, n):
    """More rows than columns and fewer, so that the product is turned or is not."""
    rng = np.random.default_rng(m)
    a, b = (rng.integers(0, 1 << 16, s).astype(np.uint16).view(BF16) for s in ((m, 7), (7, n)))
    c = rng.integers(0, 1 << 32, (m, n)).astype(np.uint32).view(np.float32)
    for count in (1, 2, 7):
        check(a[:, :count], b[:count], c, record)


def crowded(cases, dtype, largest=2.0**120):
    """Chains `(C, a, b)`, one to a row, which meet their b in a column of their own. Elsewhere C is
    `largest`: beside it no power of two makes all numbers normal ones.
    """
    k, rows, columns = max(len(a) for _, a, _ in cases), -(-len(cases) // 8) * 8, 64
    a, b, c = (np.zeros(shape) for shape in ((rows, k), (k, columns), (rows, columns)))
    c[:] = largest
    for i, (start, left, right) in enumerate(cases):
        a[i, : len(left)], b[: len(right), i], c[i, i] = left, right, start
    return *(x.astype(np.float32).astype(dtype) for x in (a, b)), c.astype(np.float32)


@pytest.mark.parametrize("beside", [0.0, 2.0**120])
def test_subnormal_operands_count(beside):
    """Alone, and beside sums that are just so large as not to lose them."""
    cases = [
        (0.0, [2.0**-130, 2.0**-133], [2.0**10, -(2.0**3)]),
        (0.0, [2.0**-133] * 2, [1.5 * 2.0**-16] * 2),
        *[(2.0**-e * (1 + 2.0**-23), [2.0**-130], [2.0**20]) for e in range(79, 104)],
        *[(-(2.0**-e) * (1 + 2.0**-23), [3 * 2.0**-132], [2.0**20]) for e in range(79, 104)],
    ]
    a, b, c = crowded(cases, BF16, beside)
    check(a, b, c, FMA)
    check(b.T.copy(), a.T.copy(), c.T.copy(), FMA)
    check(a.astype(np.float32), b.astype(np.float32), c, FMA)


@pytest.mark.parametrize("beside", [0.0, 2.0**20, 2.0**120])
@pytest.mark.parametrize(
    "case",
    [
        (-(2.0**-116), [2.0**-130], [2.0**10]),  # as the product of 2^-126 would be
        (0.0, [2.0**-130], [2.0**-10]),
        (2.0 + 2.0**-22, [2.0**-127], [-(2.0**99)]),
        (2.0 + 2.0**-21, [2.0**-127], [1.5 * 2.0**103]),
    ],
)
def test_a_subnormal_operand_beside_one_sum(case, beside):
    """Which it changes, or just does not."""
    for dtype in (BF16, np.float32):
        a, b, c = crowded([case], dtype, beside)
        check(a, b, c, FMA)
        check(b.T.copy(), a.T.copy(), c.T.copy(), FMA)


@pytest.mark.parametrize("zeros", [[], [0.0]])
def test_subnormal_sums_beside_a_subnormal_operand(zeros):
    """552.78 times 2^-149 is rounded, and then half of it added."""
    left, right = [2.0**-70 * (1 + 5 * 2.0**-7)] * 2, [2.0**-130, 2.0**-20]
    a = np.tile([left[0], right[0], *zeros], (8, 1)).astype(np.float32)
    b = np.tile([[left[1]], [right[1]], *([zero] for zero in zeros)], (1, 32)).astype(np.float32)
    check(a, b, None, FMA)
    check(a.astype(BF16), b.astype(BF16), None, FMA)


def test_sums_beyond_all_numbers_beside_a_subnormal_operand():
    """They do not come back."""
    left = [2.0**127, -(2.0**126), -(2.0**126) * (1 - 2.0**-23), 1.0]
    check(*crowded([(0.0, left, [2.0**20] * 3 + [2.0**-130])], np.float32, 0.0), FMA)


@pytest.mark.parametrize("quick", [True, False])
def test_a_processor_s_word_about_subnormal_numbers_is_taken(quick, monkeypatch):
    """It is asked once for a product, and the bits are the same whatever it says."""
    asked = []
    monkeypatch.setattr(native_chain, "keeps_quickly", lambda: asked.append(quick) or quick)
    a = np.full((9, 40), 2.0**-70, BF16)
    got = jax.jit(lambda a: kernels.matmul(a, a.T, arithmetic=FMA))(a)
    assert asked == [quick] and np.array_equal(got, np.full((9, 9), 40 * 2.0**-140, np.float32))


def test_whether_subnormal_numbers_take_long_is_measured(monkeypatch):
    """By a clock that counts multiplications: those whose results are subnormal take longer."""
    for times, expected in ((1, True), (3, True), (5, False), (100, False)):
        now = [0.0]

        def multiply(x, y, out, times=times, now=now):
            now[0] += times if 0 < x[0] * y[0] < 2.0**-126 else 1

        monkeypatch.setattr(np, "multiply", multiply)
        monkeypatch.setattr(native_chain.time, "perf_counter", lambda now=now: now[0])
        assert native_chain.keeps_quickly.__wrapped__() is expected


@pytest.mark.parametrize("center", [-30, 0, 45])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_subnormal_operands_among_ordinary_ones(center, zeros):
    """Whole groups, and more blocks than one."""
    rng = np.random.default_rng(60 + center)
    a, b = (rng.normal(size=s) * 2.0**center for s in ((8, 290), (290, 32)))
    for x, least in ((a, 2.0**-133), (b, 2.0**-149)):
        tiny = rng.random(x.shape) < 0.1
        x[tiny] = (rng.integers(1, 128, x.shape) * least)[tiny]
        x[rng.random(x.shape) < zeros] = 0.0
    c = rng.normal(size=(8, 32)) * 2.0 ** rng.integers(-126, 2, (8, 32))
    check(a.astype(np.float32), b.astype(np.float32), c.astype(np.float32), FMA)
    check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16), None, FMA)


@pytest.mark.parametrize("exponent", range(78, 86))
def test_subnormal_operands_beside_sums_of_one_size(exponent):
    """Whether these notice is told by the least of them."""
    for start in (2.0**-exponent, 2.0**-exponent * (1 + 2.0**-23)):
        cases = [(start, [s * 2.0**-130], [1.9375 * 2.0**20]) for s in (1, -1)]
        check(*crowded(cases, BF16), FMA)


@pytest.mark.parametrize("exponent", range(-4, 8))
def test_subnormal_operands_beside_a_large_sum(exponent):
    """That may be too large for a power of two by which all numbers are normal ones."""
    start = 1.75 * 2.0**exponent
    check(*crowded([(start, [2.0**-130], [2.0**-3])], BF16, start), FMA)


@pytest.mark.parametrize("exponent", range(94, 112, 2))
def test_products_that_leave_little_of_a_sum(exponent):
    """2^-28 of it; some products are so large that 2^-126 beside them is below the last place."""
    factor = 2.0 ** -(exponent // 2) * (1 + 2.0**-14)
    start = 2.0**-exponent * (1 + 2.0**-13)
    cases = [(start, [-factor], [factor]), (-start, [factor], [factor])]
    check(*crowded(cases, np.float32, 0.0), FMA)


@pytest.mark.parametrize("exponent", [60, 61, 62, 63, 64, 70, 100])
def test_large_operands_beside_subnormal_ones(exponent):
    """Some would be too large times that power of two."""
    a, b, c = crowded([(2.0**-40, [1.75 * 2.0**exponent], [2.0**-130])], BF16, 2.0**-40)
    check(a, b, c, FMA)
    check(b.T.copy(), np.tile(a.T, (1, 4)), np.tile(c.T, (1, 4)), FMA)


@pytest.mark.parametrize("beside", [2.0**-120, 0.0])
@pytest.mark.parametrize("after", [[], [2.0**-75]])
def test_products_of_about_half_of_the_last_place(beside, after):
    """Most are below: they change nothing, but may be the sign of a zero."""
    factor = (2.0 - 2.0**-7) * 2.0**-60
    sizes = [2.0**-90, 1.5 * 2.0**-91, 2.0**-91, (2.0 - 2.0**-7) * 2.0**-92, 2.0**-92, 2.0**-130]
    starts = [0.0, 2.0**-149, 3 * 2.0**-149, 2.0**-126 - 2.0**-149, 2.0**-126, 2.0**-110]
    products = [(s * size, start) for s in (1, -1) for size in sizes for start in starts]
    cases = [
        (sign * start, [size, *after, *[0.0] * 20], [factor, *[2.0**-74 for _ in after]])
        for sign in (1, -1)
        for size, start in products
    ]
    for dtype in (BF16, np.float32):
        for first in range(0, len(cases), 48):
            a, b, c = crowded(cases[first : first + 48], dtype, beside)
            check(a, b, c, FMA)
            turned = words(kernels.matmul(a, b, c, arithmetic=FMA)).T  # as it should be, as seen
            check(b.T.copy(), a.T.copy(), c.T.copy(), FMA, turned)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_dust_among_whole_numbers_of_the_last_place(share):
    """In more blocks than one, beside zeros of either sign, infinities and NaNs."""
    rng = np.random.default_rng(9)
    a, b = (rng.integers(-99, 100, s) * 2.0**-74 for s in ((9, 270), (270, 40)))
    for x, dust in ((a, 2.0**-130), (b, -(2.0**-149))):
        x[rng.random(x.shape) < share] = dust
    a[3], a[5, 10:], b[:, 4], b[7:, 39] = 2.0**-140, -0.0, -(2.0**-133), 0.0
    c = rng.integers(-3, 4, (9, 40)) * 2.0**-149
    c[c == 0] = -0.0
    for dtype in (BF16, np.float32):
        left, right = (x.astype(np.float32).astype(dtype) for x in (a, b))
        for start in (None, c.astype(np.float32)):
            check(left, right, start, FMA)
    a[2, 7], b[9, 30] = np.inf, np.nan
    check(a.astype(np.float32), b.astype(np.float32), None, FMA)


@pytest.mark.parametrize("center", [60, 116])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_large_numbers_times_subnormal_ones(center, zeros):
    """In sums of ordinary size and in such that overflow."""
    rng = np.random.default_rng(center)
    a, b = rng.normal(size=(9, 80)), rng.normal(size=(80, 40))
    a *= 2.0 ** rng.integers(center - 40, center + 1, a.shape)
    b *= 2.0 ** rng.integers(-149, 1, b.shape)
    a[4:6] *= 2.0**7
    for x in (a, b):
        x[rng.random(x.shape) < zeros] = 0.0
    c = rng.normal(size=(9, 40)) * 2.0 ** rng.integers(-126, 100, (9, 40))
    left, right, start = (x.astype(np.float32) for x in (a, b, c))
    check(left, right, start, FMA)
    check(right.T.copy(), left.T.copy(), start.T.copy(), FMA)
    check(left.astype(BF16), right.astype(BF16), None, FMA)


def test_the_largest_sums_beside_a_subnormal_operand():
    """Twice as large, they would be infinite; and 2^-126 in place of 2^-130 would count."""
    cases = [
        (0.0, [1.5 * 2.0**100, 2.0**100], [2.0**27, 2.0**-130]),
        (4.0, [2.0**127, 0.0], [2.0**-130, 2.0**127]),
    ]
    for dtype in (BF16, np.float32):
        a, b, c = crowded(cases, dtype, 2.0**10)
        check(a, b, c, FMA)
        check(b.T.copy(), a.T.copy(), c.T.copy(), FMA)
        for case in cases:
            check(*crowded([case], dtype, 2.0**10), FMA)


def test_what_is_flushed_adds_up():
    """Of 31 products of 2^-127 none comes near the smallest normal number; beside them, a subnormal
    operand.
    """
    cases = [
        (0.0, [2.0**-70] * 31 + [2.0**-50], [2.0**-57] * 31 + [2.0**-49]),
        (2.0**100, [2.0**-130], [2.0**-60]),
    ]
    check(*crowded(cases, BF16), FMA)


@pytest.mark.parametrize("beside", [0.0, 2.0**120])
def test_what_is_flushed_decides_a_tie(beside):
    """Products of 48 bits that are half way between two numbers, after a sum of 2^-135."""
    half, tie = 1 + 2.0**-12, (2.0**-70, 2.0**-65)
    cases = [
        (0.0, [tie[0], half], [tie[1], half]),
        (0.0, [-tie[0], half], [tie[1], half]),
        (0.0, [half], [half]),
    ]
    check(*crowded(cases, np.float32, beside), FMA)
    cases += [(2.0**-140, [0.0, half], [0.0, half]), (-(2.0**-140), [half], [half])]
    check(*crowded(cases, np.float32, beside), FMA)


@pytest.mark.parametrize("beside", [0.0, 2.0**120])
def test_sums_that_vanish_leave_their_sign(beside):
    cases = [
        (c, [s * 2.0**-80], [2.0**-e])
        for s in (-1, 1)
        for e in (69, 70, 71, 90)
        for c in (0.0, -0.0, s * 2.0**-149, -s * 2.0**-149)
    ]
    for dtype in (BF16, np.float32):
        check(*crowded(cases, dtype, beside), FMA)
    check(*crowded(cases, BF16, beside), kernels.ASCEND_910C_CANDIDATES["sequential"])


@pytest.mark.parametrize("largest", [1.0, 2.0**100])
def test_sums_that_fp64_rounds_to_a_tie(largest):
    """1 + 2^-23 + 2^-24 - 2^-70, beside a subnormal number."""
    odd, near = 1 + 2.0**-23, [1 + 2.0**-23, 2.0**-24 * (1 - 2.0**-23)]
    cases = [
        (odd, near[:1], near[1:]),
        (-odd, near[:1], [-near[1]]),
        (1.0, near[:1], near[1:]),
        (0.0, [2.0**-140, largest], [1.0, 1.0]),
    ]
    check(*crowded(cases, np.float32), FMA)


def test_no_power_of_two_serves_a_row_of_all_sizes():
    a = np.array([[2.0**127, 2.0**-130, 1.0], [2.0**-130, 2.0**-131, 2.0**-133]])
    b = np.full((3, 2), 2.0**-100)
    b[:, 1] = [2.0**-60, 2.0**-51, 2.0**-50]
    check(a.astype(np.float32).astype(BF16), b.astype(BF16), None, FMA)


@pytest.mark.parametrize(
    "center",
    [
        *(-78, -72, -66, -62, -56, -52),
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (-76, -74, -70, -68, -64, -60, -58, -54)
        ),
    ],
)
def test_sums_of_about_the_smallest_normal_number(center):
    """Of some, all are smaller; products have bits far below the last place."""
    rng = np.random.default_rng(100 + center)
    a, b = (rng.normal(size=s) * 2.0**center for s in ((16, 20), (20, 32)))
    a[8:, 19], b[0] = rng.choice([0.0, -0.0, 2.0**center], 8), -b[1]
    c = (rng.integers(-3, 4, (16, 32)) * 2.0 ** (2 * center)).astype(np.float32)
    for start in (None, c, -0.0 * np.abs(c)):
        check(a.astype(np.float32), b.astype(np.float32), start, FMA)
        check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16), start, FMA)
        turned = None if start is None else start.T.copy()
        check(b.T.astype(np.float32), a.T.astype(np.float32), turned, FMA)


def test_sums_that_were_normal_a_part_ago():
    """Beside 1.5 times 2^-126, the last place of 1.25 * 2^-125 + 2^-148 has no room."""
    left = [1.25 * 2.0**-61, *[2.0**-60, -(2.0**-60)] * 15, 2.0**-84]
    left += [-1.25 * 2.0**-61, *[2.0**-66, -(2.0**-66)] * 15, 2.0**-66]
    a, b = np.tile(np.array([left]), (8, 1)), np.full((64, 32), 2.0**-64)
    check(a.astype(np.float32).astype(BF16), b.astype(np.float32).astype(BF16), None, FMA)


@numba.njit
def steps_that_round(x, y, length):
    """Of words `x[groups of rows, ROWS, length]` and `y[groups of columns, length, COLUMNS]`, which
    are scaled here as in a chain: by pairs of groups, how many steps round.
    """
    found = np.zeros((len(x), len(y)), np.int64)
    of_x = np.zeros((len(x), native_chain.KNOWN), np.int64)
    of_y = np.zeros((len(y), native_chain.KNOWN), np.int64)
    x_copies = np.zeros(native_chain._COPIES * x.size, np.uint32)
    y_copies = np.zeros(native_chain._COPIES * y.size, np.uint32)
    for i in range(len(x)):
        left = native_chain._operand(
            x[i].ctypes.data, of_x.ctypes.data, x_copies.ctypes.data, i, x[i].size, 64, 0
        )
        for j in range(len(y)):
            right = native_chain._operand(
                y[j].ctypes.data, of_y.ctypes.data, y_copies.ctypes.data, j, y[j].size, 63, 0
            )
            x_ends = native_chain._ends(left, native_chain._SCALED, True, length)
            y_ends = native_chain._ends(right, native_chain._SCALED, False, length)
            found[i, j] = native_chain._steps_not_whole(x_ends, y_ends, length)
    return found


def last_place(x):
    """Of FP32 numbers, p of the last bit 2^p; of zeros and what is not finite a large number."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    usual = np.isfinite(x) & (x != 0)
    count = np.where(usual, np.abs(np.where(usual, fraction, 1.0)) * 2.0**24, 1).astype(np.int64)
    return np.where(usual, np.log2(count & -count).astype(np.int64) + exponent - 24, 1000)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 30])
@pytest.mark.parametrize("bits", [1, 3, 8, 24])
def test_steps_whose_products_have_bits_below_the_last_place(length, bits):
    """As counted beforehand for each group of rows and columns; many products end in 2^-149 or
    2^-150.
    """
    rng = np.random.default_rng(length)
    shapes = (3, native_chain.ROWS, length), (2, length, native_chain.COLUMNS)
    x, y = (np.zeros(shape, np.float32) for shape in shapes)
    for operand in (x, y):
        count = rng.integers(1, 1 << bits, operand.shape) | (1 << bits >> 1)
        more = rng.integers(0, 6, operand.shape) * (rng.random(operand.shape) < 0.1)
        scale = 2.0 ** (more - 75)
        operand[:] = rng.choice([-1.0, 1.0], operand.shape) * count * scale
        operand[rng.random(operand.shape) < 0.1] = 0.0
    x[1] *= np.float32(2.0**-60) * (np.arange(length) % 3 == 0)  # some are subnormal
    x[2, :, ::2], y[1, ::3] = 2.0, -0.0
    x[2, 5, 0], y[1, 0, -12] = np.inf, np.nan
    rows, columns = np.arange(native_chain.ROWS), np.arange(native_chain.COLUMNS)
    for at in range(length):  # in one row or column only
        x[0, :, at] = np.where(rows == at % len(rows), x[0, :, at], 1.0)
        y[0, at] = np.where(columns == 5 * at % len(columns), y[0, at], 1.0)
    places = last_place(x).min(1)[:, None] + last_place(y).min(2)[None]
    found = steps_that_round(x.view(np.uint32), y.view(np.uint32), length)
    assert np.array_equal(found, (places < -149).sum(-1))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_steps_of_which_few_round(dtype):
    """Products of whole numbers of 2^-149, and a few of halves or quarters; sums of all sizes about
    2^-126, and zeros of either sign.
    """
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-255, 256, shape).astype(np.float64) for shape in ((19, 90), (90, 70)))
    a[:, ::9] *= 2.0 ** -rng.integers(1, 3, (19, 10))
    a[:, 5::9], b[2::9, 1::3] = a[:, 5::9] * 2.0**12, b[2::9, 1::3] / 2
    b[rng.random(b.shape) < 0.2] = -0.0
    a[8:16, 60:], b[::7], b[:, 40] = 0.0, 1.0, -0.0
    c = rng.integers(-9, 10, (19, 70)) * 2.0 ** rng.integers(-149, -120, (19, 70))
    c[:, 7::8], c[3], c[:, 40], c[9, 1] = -0.0, 1.5 * 2.0**-110, -0.0, 2.0**100
    a, b = ((x * e).astype(np.float32).astype(dtype) for x, e in ((a, 2.0**-75), (b, 2.0**-74)))
    for start in (None, c.astype(np.float32)):
        check(a, b, start, FMA)
    check(b.T.copy(), a.T.copy(), c.T.astype(np.float32), FMA)


@pytest.mark.parametrize("end", [69, 70, 71, 90])
def test_sums_that_vanish_among_zeros(end):
    """One step of four rounds, and zeros come after it and before."""
    cases = [
        (c, [0.0, s * 2.0**-80, -0.0, 0.0], [-0.0, 2.0**-end, 0.0, -0.0])
        for s in (-1, 1)
        for c in (0.0, -0.0, s * 2.0**-149, -s * 2.0**-149)
    ]
    for dtype in (BF16, np.float32):
        check(*crowded(cases, dtype, 0.0), FMA)


def test_a_large_sum_that_vanishes_where_another_rounds():
    """In the same step; 2^-126 has no room beside it."""
    cases = [(2.0**-90, [2.0**-40, 0, 0], [-(2.0**-50), 0, 0]), (0.0, [2.0**-80], [2.0**-80])]
    check(*crowded(cases, BF16, 0.0), FMA)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_all_sums_are_small(dtype):
    """But some are 2^-127 or more."""
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=shape) * 2.0**-70 for shape in ((8, 50), (50, 32)))
    c = (rng.uniform(1, 1.9, (8, 32)) * rng.choice([-1, 1], (8, 32)) * 2.0**-127).astype(np.float32)
    check(a.astype(np.float32).astype(dtype), b.astype(np.float32).astype(dtype), c, FMA)


@pytest.mark.parametrize("center", [-58, -60, -62])
def test_small_sums_are_seldom(center):
    """Or often, in later parts of a chain, beside rows and columns of zeros; some sums cancel."""
    rng = np.random.default_rng(-center)
    a, b = (rng.normal(size=shape) * 2.0**center for shape in ((11, 300), (300, 20)))
    a[3], b[:, 5], b[:, 19] = 0.0, -0.0, b[:, 4]
    a[:, 151:280:2], b[151:280:2] = a[:, 150:280:2], -b[150:280:2]
    a[rng.random(a.shape) < 0.1] = 0.0
    c = (rng.choice([0.0, -0.0, 1.0, -1.0], (11, 20)) * 2.0 ** (2 * center + 4)).astype(np.float32)
    a, b = a.astype(np.float32), b.astype(np.float32)
    check(a, b, c, FMA)
    check(a[:5].astype(BF16), b.astype(BF16), c[:5], FMA)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_chains_that_are_infinite_or_no_number_meet_subnormals(special):
    """Infinity times a subnormal number is infinity, times 0 it is no number."""
    a, b = np.ones((8, 300), np.float32), np.ones((300, 32), np.float32)
    a[:, 0], a[::2, 299], a[1::4, 280] = special, 2.0**-130, 0.0
    b[270, ::3], b[280, 1::2], b[290, ::5] = 2.0**-131, -np.inf, np.inf
    a[3, 290] = -(2.0**-129)
    check(a.astype(BF16), b.astype(BF16), None, FMA)


@pytest.mark.parametrize("turned", [False, True])
def test_which_nan_a_chain_passes_on(turned):
    """The last one that is added; a's of two; C's if no operand is one. A step goes backwards."""
    a, b = np.ones((40, 6), BF16), np.ones((6, 3), BF16)
    c = np.zeros((40, 3), np.float32)
    nans = (0x7F91 + np.arange(5)).astype(np.uint16).view(BF16)  # conversions would make one of all
    a[0, 0], a[0, 1] = nans[0], nans[1]
    a[1, 2], b[2, 1] = nans[2], nans[3]
    b[5, 2], b[4, 0], b[5, 0] = nans[4], nans[1], nans[0]
    c[3], c[0] = np.array([0x7F812345, 0xFF854321], np.uint32).view(np.float32)
    if turned:
        a, b, c = b.T.copy(), a.T.copy(), c.T.copy()
    for record in (X86, KEEPING):
        check(a, b, c, record)


def test_parts_of_a_chain_change_their_way():
    """Along k: small sums, then large ones, then what cancels, each in a block of its own."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 700)), rng.normal(size=(700, 18))
    a[:, :256] *= 2.0**-70
    b[:256] *= 2.0**-64
    a[:, 300:330], b[300:330] = 2.0**-129, 2.0**3
    a[:, 400:420] *= 2.0**60
    b[400:420] *= 2.0**50
    a[:, 420:440], b[420:440] = -a[:, 419:399:-1], b[419:399:-1]
    a[3:6, 600:] *= 2.0**-100
    a, b = a.astype(np.float32), b.astype(np.float32)
    check(a[:, :700].astype(BF16), b.astype(BF16), None, FMA)
    check(a, b[:, :3].copy(), None, FMA)


def test_tiles_of_chains_are_shared_by_threads():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300, 70)).astype(BF16), rng.normal(size=(70, 130)).astype(BF16)
    a[1, 7, 3], a[0, 299] = np.nan, 2.0**-120
    whole = words(kernels.matmul(a, b, arithmetic=KEEPING))
    parts = [kernels.matmul(a[:, i : i + 31], b, arithmetic=KEEPING) for i in range(0, 300, 31)]
    assert (whole == words(np.concatenate(parts, 1))).all()
    columns = [kernels.matmul(a, b[:, j : j + 1], arithmetic=KEEPING) for j in (0, 64, 129)]
    assert (whole[..., [0, 64, 129]] == words(np.concatenate(columns, 2))).all()


def test_fp16_operands_are_flushed_before_they_are_wider():
    """Numbers below 2^-14 are normal ones in FP32."""
    record = dataclasses.replace(X86, dtypes=("float16",))
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s) * 2.0**-13 for s in ((5, 20), (20, 7)))
    check(a.astype(FP16), b.astype(FP16), None, record)
    check(a.astype(FP16), b.astype(FP16), None, dataclasses.replace(FMA, dtypes=("float16",)))


@pytest.mark.parametrize("zeros", ["scattered", "last", "columns", "rows"])
@pytest.mark.parametrize("before", ["none", "either zero", "small"])
def test_deep_chains_with_zeros_keep_their_signs(before, zeros):
    """Sums below 2^-127, many of them so small that they are rounded to a zero of their sign, which
    a product that is -0 keeps and +0 does not.
    """
    rng = np.random.default_rng(14)
    for case in range(3):
        a, b = rng.normal(size=(16, 96)) * 2.0**-60, rng.normal(size=(96, 40))
        a *= 2.0 ** rng.integers(-8, 9, (16, 1))
        b *= 2.0 ** -rng.integers(72, 94, (1, 40))
        if case == 0:  # where products with zeros are all -0
            a, b = (abs(x) if zeros == kind else x for x, kind in ((a, "columns"), (b, "rows")))
        for x, axis, kind in ((a, 1, "rows"), (b, 0, "columns")):
            line = (len(x), 1) if axis else (1, x.shape[1])
            where = {
                "scattered": rng.random(x.shape) < 0.3,
                "last": (np.indices(x.shape)[axis] > 80 - case) & (rng.random(line) < 0.5),
                kind: np.broadcast_to(rng.random(line) < 0.4, x.shape),
            }.get(zeros, np.zeros(x.shape, bool))
            x[where] = rng.choice([0.0, -0.0] if case % 2 else [-0.0], where.sum())
        c = None
        if before != "none":
            c = rng.choice([0.0, -0.0], (16, 40)).astype(np.float32)
        if before == "small":
            c[rng.random(c.shape) < 0.5] = 2.0**-149
        check(a.astype(BF16), b.astype(BF16), c, kernels.FP32_FMA_CHAIN)
