"""Chains of fused multiply-adds: the twins against the definition, on each of their ways."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

import kernels
from kernels import FP32_FMA_CHAIN, X86_AVX512_BF16, Arithmetic, blocks, chain, extents, product
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, draw_matrices, words

_FLUSHING = Arithmetic(
    name="inputs flushed, results kept, saturating",
    products=3,
    summation="chain",
    subnormal_inputs="flush",
    specials="saturate",
    overflow="saturate",
    zero="ieee",
)
_ODD = Arithmetic(
    name="results flushed toward zero, infinite products",
    products=5,
    summation="chain",
    rounding="toward_zero",
    subnormal_inputs="plus_zero",
    subnormal_results="flush",
    product_overflow="inf",
    overflow="saturate",
    nan_rule="propagate",
    nan=0xFFC00000,
    zero="ieee",
)
_SEQUENTIAL = kernels.ASCEND_910C_CANDIDATES["sequential"]

CASES = [
    (FP32_FMA_CHAIN, BF16),
    (FP32_FMA_CHAIN, FP16),
    (FP32_FMA_CHAIN, FP32),
    (X86_AVX512_BF16, BF16),
    (_SEQUENTIAL, BF16),
    (_FLUSHING, BF16),
    (_ODD, BF16),
    (replace(_ODD, name="FP32", dtypes=("float32",), subnormal_results="keep"), FP32),
]
case = pytest.mark.parametrize("arithmetic, dtype", CASES, ids=lambda x: x.name)


def near(exponents, rng, rows, k, dtype):
    """Numbers of these exponents; C as large as their products."""
    low, high = exponents
    with np.errstate(over="ignore", under="ignore"):
        scale = 2.0 ** rng.integers(low, high, (2, rows, k))
        a, b = (rng.normal(size=(2, rows, k)) * scale).astype(np.float32).astype(dtype)
        scale = 2.0 ** rng.integers(max(2 * low, -149), min(2 * high, 127), rows)
        c = (rng.normal(size=rows) * scale).astype(np.float32)
    return a[:, None, :], b[:, :, None], c[:, None, None]


def inputs(rows, k, dtype):
    """Every generator's, and numbers near both ends of FP32; C always given."""
    for seed, name in enumerate(GENERATORS):
        a, b, c = draw(name, seed, rows, k, dtype)
        yield name, a, b, np.zeros((rows, 1, 1), np.float32) if c is None else c
    rng = np.random.default_rng(1)
    ranges = (-12, -3), (-9, 8) if dtype == FP16 else (58, 66), (-80, -60), (-126, 1)
    for exponents in ranges[:2] if dtype == FP16 else ranges:
        yield exponents, *near(exponents, rng, rows, k, dtype)


@functools.partial(jax.jit, static_argnums=3)
def by_xla(a, b, c, arithmetic):
    """What a GPU computes, also where a CPU has a way of its own."""
    return chain.accumulate(a, b, c, arithmetic)


def by_xla_in_squares(a, b, c, arithmetic):
    """Of matrices, filled up with zeros to whole squares: XLA compiles for seconds for each shape,
    and for C given or not.
    """
    m, n = len(a), b.shape[1]
    c = np.zeros((m, n), FP32) if c is None else c
    above, beside = -m % 32, -n % 32
    a, b = np.pad(a, [(0, above), (0, 0)]), np.pad(b, [(0, 0), (0, beside)])
    c = np.pad(c, [(0, above), (0, beside)])
    return by_xla(a[None], b[None], c[None], arithmetic)[0, :m, :n]


def check(name, a, b, c, arithmetic):
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=arithmetic))
    found = {"matmul": kernels.matmul(a, b, c, arithmetic=arithmetic)}
    if product.is_native(arithmetic):
        by = by_xla if a.ndim == 3 else by_xla_in_squares
        found["chain"] = by(a, b, c, arithmetic)
    for way, result in found.items():
        got = words(result)
        wrong = np.argwhere(expected != got)
        assert not len(wrong), (
            f"{name}, {way}: {len(wrong)} of {got.size} differ, first at {wrong[0]}: "
            f"{expected[tuple(wrong[0])]:#010x} expected, {got[tuple(wrong[0])]:#010x} got"
        )


@case
def test_single_dots(arithmetic, dtype):
    for name, a, b, c in inputs(64, 35, dtype):
        check(name, a, b, c, arithmetic)


@pytest.mark.parametrize("arithmetic, dtype", CASES[2:4], ids=lambda x: x.name)
def test_matrices_without_c(arithmetic, dtype):
    for name in GENERATORS:
        a, b, _ = draw_matrices(name, 2, 9, 37, 11, dtype)
        check(name, a[None], b[None], None, arithmetic)


@pytest.mark.parametrize(
    "arithmetic",
    [X86_AVX512_BF16, pytest.param(FP32_FMA_CHAIN, marks=pytest.mark.slow)],
    ids=lambda x: x.name,
)
def test_tiles_jit_and_vmap_keep_bits(arithmetic, monkeypatch):
    """XLA's operations are cut into tiles as this says; the processor's own ways, elsewhere."""
    a, b, c = draw_matrices("raw", 3, 3 * 20, 40, 24, BF16)
    a[30:], b[:, 12:] = draw_matrices("wide", 4, 30, 40, 12, BF16)[:2]
    a, c = a.reshape(3, 20, 40), c.reshape(3, 20, 24)

    def multiplied(x, y, z):
        return kernels.matmul(x, y, z, arithmetic=arithmetic)

    whole = words(multiplied(a, b, c))
    assert (words(jax.jit(jax.vmap(multiplied, (0, None, 0)))(a, b, c)) == whole).all()
    columns = words(
        np.stack([multiplied(a[0], b[:, j : j + 1], c[0, :, j : j + 1]) for j in (0, 23)])
    )
    assert (columns[:, :, 0] == whole[0][:, [0, 23]].T).all()
    monkeypatch.setattr(product, "is_native", lambda arithmetic: False)
    monkeypatch.setattr(blocks, "_TILE", 7 * 10)
    monkeypatch.setattr(blocks, "_COLUMNS", 10)
    monkeypatch.setattr(blocks, "_LEAST", 70)
    jax.clear_caches()
    assert (words(multiplied(a, b, c)) == whole).all()


def ways_of(a, b, c, arithmetic):
    with jax.enable_x64(True):
        a, b = (jax.numpy.asarray(x)[None] for x in (a, b))
        c = None if c is None else jax.numpy.asarray(c)[None]
        size = blocks.size_of(a.shape[-1], arithmetic.products)
        found = extents.ways(extents.extents(a, b, c, size, arithmetic), arithmetic)[0]
    return set(np.asarray(found).tolist())


@pytest.mark.parametrize(
    "exponents, dtype, way",
    [
        ((-6, 6), BF16, extents.PLAIN),
        ((-56, -52), BF16, extents.SCALED),
        ((-80, -70), BF16, extents.LOW),
        ((58, 66), BF16, extents.HIGH),
        ((-126, 127), BF16, extents.WIDE),
        ((-6, 6), FP16, extents.PLAIN),
        ((-6, 6), FP32, extents.CLOSE),
        ((-80, -70), FP32, extents.WIDE),
    ],
)
def test_every_way_is_taken_and_right(exponents, dtype, way):
    a, b, _ = near(exponents, np.random.default_rng(5), 32, 32, dtype)
    a, b = a[:, 0, :], b[:, :, 0].T.copy()
    assert ways_of(a, b, None, FP32_FMA_CHAIN) == {way}
    check(exponents, a, b, None, FP32_FMA_CHAIN)


def test_narrow_data_in_fp32_take_the_plain_way():
    a, b, _ = draw_matrices("normal", 6, 32, 32, 32, BF16)
    a, b = a.astype(np.float32), b.astype(np.float32)
    assert ways_of(a, b, None, FP32_FMA_CHAIN) == {extents.PLAIN}
    check("narrow", a, b, None, FP32_FMA_CHAIN)


def test_a_sum_near_the_middle_is_rounded_once():
    """c + p is just above the middle of two FP32 numbers, by less than FP64 sees."""
    p = np.float32(1 + 2.0**-23)
    a = np.array([[2.0**-24, 2.0**-40 * p]], np.float32)
    b = np.array([[1.0], [2.0**-40 * p]], np.float32)
    c = np.ones((1, 1), np.float32)
    for sign in (1, -1):
        a[0, 1] *= sign
        check("middle", a[:, ::-1].copy(), b[::-1].copy(), c, FP32_FMA_CHAIN)
        one = np.array([[2.0**-24 + 2.0**-47]], np.float32)
        check("middle", one, np.array([[1 + sign * 2.0**-23]], np.float32), c, FP32_FMA_CHAIN)


def test_below_the_smallest_normal_number_c_may_lie_above_it():
    """C = 2^-126 + 2^-149 and a product that reaches across, with bits below 2^-149."""
    last = np.arange(1, 200)
    c = np.float32(2.0**-126) + np.arange(40, dtype=np.float32)[:, None] * np.float32(2.0**-149)
    a = np.full((40, 1), -(2.0**-70)).astype(BF16)
    b = (last * 2.0**-82).astype(BF16)[None]
    c = np.broadcast_to(c, (40, 199)).copy()
    for arithmetic in (FP32_FMA_CHAIN, X86_AVX512_BF16, _SEQUENTIAL, _FLUSHING):
        check(arithmetic.name, a, b, c, arithmetic)


MIXED = [
    FP32_FMA_CHAIN,
    X86_AVX512_BF16,
    *[
        replace(
            base, name=f"{inputs} {results}", subnormal_inputs=inputs, subnormal_results=results
        )
        for base, inputs, results in (
            (FP32_FMA_CHAIN, "plus_zero", "flush"),
            (FP32_FMA_CHAIN, "flush", "keep"),
            (X86_AVX512_BF16, "plus_zero", "keep"),
            (X86_AVX512_BF16, "keep", "flush"),
        )
    ],
]


# Each compiles for seconds.
mixed = pytest.mark.parametrize(
    "arithmetic",
    [
        record if index in (0, 1, 3) else pytest.param(record, marks=pytest.mark.slow)
        for index, record in enumerate(MIXED)
    ],
    ids=lambda x: x.name,
)


@mixed
@pytest.mark.parametrize("scale", [2.0**-75, 2.0**-70, 2.0**-64])
def test_sums_far_below_the_normal_numbers(arithmetic, scale):
    """Some products are zeros and some sums cancel, so that signs of zeros are at stake."""
    rng = np.random.default_rng(7)
    a, b = (rng.normal(size=(2, 32, 32)) * scale).astype(BF16)
    if scale == 2.0**-70:
        a[rng.random(a.shape) < 0.2] = -0.0
    b[1::2, ::3] = -b[::2, ::3]
    a[::3, 1::2] = a[::3, ::2]
    c = (rng.integers(-3, 4, (32, 32)) * 2.0**-149).astype(np.float32)
    for start in (np.zeros_like(c), c):
        check("tiny", a, b, start, arithmetic)


@mixed
@pytest.mark.parametrize("small", [2.0**-68, 2.0**-71])
def test_small_products_follow_large_ones_that_cancel(arithmetic, small):
    """Few sums are below 2^-126, and the products that reach those have bits below 2^-149."""
    rng = np.random.default_rng(9)
    sign = rng.choice([-1.0, 1.0], (2, 64, 16))
    a, b = (sign * rng.uniform(1, 2, sign.shape)).astype(np.float32)  # small products are alike
    scale = np.where(np.arange(16) % 8 < 4, 2.0**-54, small).astype(np.float32)
    a, b = a * scale, b * scale
    a[:, 1::8], b[:, 1::8] = a[:, ::8], -b[:, ::8]
    a[:, 3::8], b[:, 3::8] = -a[:, 2::8], b[:, 2::8]
    a, b = a.astype(BF16)[:, None], b.astype(BF16)[:, :, None]
    check(small, a, b, None, arithmetic)


@pytest.mark.parametrize(
    "largest", [0.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (2.0**-30, 2.0**-10))]
)
@pytest.mark.parametrize("dtype, bits", [(BF16, 8), (FP32, 12)], ids=str)
def test_products_of_every_kind_beside_the_last_place(dtype, bits, largest):
    """Products at all distances to multiples of 2^-149, also halves, beside C at the ends of each
    binade; the largest C elsewhere leaves less room for these.
    """
    rng = np.random.default_rng(bits)
    count = rng.integers(1, 2 ** rng.integers(1, bits + 1, (2, 256)))  # some have few bits
    a, b = rng.choice([-1.0, 1.0], (2, 256)) * count
    a, b = a * 2.0**-70, b * 2.0 ** rng.integers(-79 - 2 * bits, -78, 256)
    a, b = a.astype(FP32).astype(dtype)[:64, None], b.astype(FP32).astype(dtype)[None]
    ends = 2.0 ** rng.integers(0, 27, (64, 256)) + rng.integers(-3, 4, (64, 256))
    c = (rng.choice([-1.0, 1.0], ends.shape) * ends * 2.0**-149).astype(FP32)
    c[0], c[1, ::2], c[1, 1::2] = 0.0, -0.0, largest
    b[0, :8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 0.0, -0.0, 2.0**-133]
    assert ways_of(a, b, c, FP32_FMA_CHAIN) == {extents.LOW}
    twice = np.concatenate([a, a], 1), np.concatenate([b, b])
    check(largest, *twice, c, FP32_FMA_CHAIN)


WATCHED = [FP32_FMA_CHAIN, X86_AVX512_BF16, MIXED[3], _FLUSHING]


def signed(rng, scale):
    return rng.choice([-1.0, 1.0], scale.shape) * rng.uniform(1, 2, scale.shape) * scale


@pytest.mark.parametrize("arithmetic", WATCHED, ids=lambda x: x.name)
@pytest.mark.parametrize("small", [-60, -64, -68])
def test_small_sums_beside_large_ones(arithmetic, small):
    """A large sum elsewhere leaves FP32 no room for the smallest products, and small sums need
    those.
    """
    rng = np.random.default_rng(-small)
    a, b = signed(rng, 2.0 ** rng.integers(small - 6, small, (2, 32, 32)))
    a[0], b[0] = signed(rng, np.full((2, 32), 2.0**58))
    a[::3, 1::2], b[::2, 1::2] = a[::3, ::2], -b[::2, ::2]  # some cancel
    a, b = (x.astype(np.float32).astype(BF16) for x in (a, b.T.copy()))
    c = (rng.integers(-3, 4, (32, 32)) * 2.0 ** rng.integers(-149, -110, (32, 32))).astype(FP32)
    for start in (np.zeros_like(c), c):
        assert ways_of(a, b, start, FP32_FMA_CHAIN) == {extents.WIDE}
        check(small, a, b, start, arithmetic)


@pytest.mark.parametrize("arithmetic", WATCHED, ids=lambda x: x.name)
@pytest.mark.parametrize("first", [-58, -48])
def test_products_that_are_lost_add_up(arithmetic, first):
    """No sum comes near zero, and the products that FP32 may lose beside the largest sum matter in
    the smallest; as C does, which is subnormal.
    """
    rng = np.random.default_rng(3)
    a, b = signed(rng, 2.0 ** rng.integers(-68, -64, (2, 32, 32)))
    a[:, 0], b[:, 0] = 2.0**first, 2.0**first
    a[0], b[0] = signed(rng, np.full((2, 32), 2.0**58))
    a, b = (x.astype(np.float32).astype(BF16) for x in (a, b.T.copy()))
    c = (rng.integers(1, 2**23, (32, 32)) * 2.0**-149).astype(FP32)
    for start in (np.zeros_like(c), c):
        check(first, a, b, start, arithmetic)


@pytest.mark.parametrize("arithmetic", WATCHED, ids=lambda x: x.name)
@pytest.mark.parametrize("largest", [56, 60, 63])
def test_large_sums_that_a_product_is_lost_beside(arithmetic, largest):
    """With `largest` 63 some sums overflow."""
    rng = np.random.default_rng(largest)
    a, b = signed(rng, 2.0 ** rng.integers(largest - 30, largest + 2, (2, 32, 32)))
    a[5, 20], b[3, 20] = 2.0**-100, 2.0**-100
    a, b = (x.astype(np.float32).astype(BF16) for x in (a, b.T.copy()))
    assert ways_of(a, b, None, FP32_FMA_CHAIN) == {extents.WIDE}
    if largest == 63 and arithmetic.overflow == "inf":
        total = np.asarray(kernels.matmul(a, b, arithmetic=arithmetic))
        assert 0 < np.isinf(total).sum() < total.size
    check(largest, a, b, np.zeros((32, 32), FP32), arithmetic)


def after_ones(a: list[float], b: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Products that come after a block of others, which FP64 takes."""
    rest = [0.0] * (blocks.SIZE - len(a))
    left, right = [1.0] * blocks.SIZE + a + rest, [1.0] * blocks.SIZE + b + rest
    return np.array([left], FP32).astype(BF16), np.array([right], FP32).T.astype(BF16)


@pytest.mark.parametrize("then", [-1, 1, -(2.0**-10), np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("sign", [-1, 1])
def test_what_has_overflowed_does_not_come_back(sign, then):
    """Beside a product that FP32 may lose, so that sums are scaled down and watched."""
    p = 1.875 * 2.0**63
    left = [sign * p, sign * p, *[then * sign * p] * 3, 2.0**-100]
    a, b = after_ones(left, [2.0**64] * 5 + [2.0**-100])
    assert ways_of(a, b, None, FP32_FMA_CHAIN) == {extents.WIDE}
    for arithmetic in (FP32_FMA_CHAIN, X86_AVX512_BF16):
        result = np.asarray(kernels.matmul(a, b, arithmetic=arithmetic))
        assert np.isnan(result) if then in (-np.inf, np.nan) else result == sign * np.inf
        check(then, a, b, None, arithmetic)


@pytest.mark.parametrize("arithmetic", [FP32_FMA_CHAIN, X86_AVX512_BF16], ids=lambda x: x.name)
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_products_beyond_all_sums_beside_specials(arithmetic, special):
    """Products of 2^256 overflow whatever C is, and no two of them make a NaN; infinities and NaNs
    before and after them do as ever.
    """
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 24, 4 * blocks.SIZE)).astype(FP32)
    b = b.T.copy()
    largest = float(np.finfo(FP32).max) * (1 - 2.0**-8)
    for row, (places, value) in enumerate([([20], 1), ([20, 40], -1), ([3, 40], 1), ([40], -1)]):
        a[row, places] = value * largest
    b[[3, 20], :12] = [[largest], [-largest]]
    b[40, 4:18] = largest
    a[4:8] = a[:4]
    a[[4, 5, 6, 7], [10, 30, 50, 41]] = special
    a[8, 17] = special
    b[18, 20] = special
    expected = words(
        kernels.reference.matmul(a.astype(BF16), b.astype(BF16), arithmetic=arithmetic)
    )
    assert ((expected & 0x7FFFFFFF) == 0x7F800000).any()
    check(special, a.astype(BF16), b.astype(BF16), None, arithmetic)
    a[~np.isfinite(a)] = 1  # one is left, in b
    check(special, a.astype(BF16), b.astype(BF16), None, arithmetic)


def test_operands_that_fp32_loses_count_beside_small_sums():
    """One row's numbers leave no room for another row's subnormals, whose sums need them."""
    rng = np.random.default_rng(1)
    a = np.ones((3, 64), FP32)
    a[0, 20:] = 2.0**126
    a[1] = signed(rng, np.full(64, 2.0**-112))
    a[1, 20:] = signed(rng, np.full(44, 2.0**-129))
    a, b = a.astype(BF16), signed(rng, np.ones((64, 16))).astype(BF16)
    for arithmetic in (FP32_FMA_CHAIN, MIXED[3]):
        check("lost", a, b, None, arithmetic)
    a, b = after_ones([-16.0, 2.0**-129, 2.0**-130], [1.0, 1.0, 1.0])
    check(
        "lost beside zero", np.concatenate([a, np.full_like(a, 2.0**126)]), b, None, FP32_FMA_CHAIN
    )


@pytest.mark.parametrize("largest", [2.0**126, 2.0**127])
def test_a_sum_that_was_small_for_a_while(largest):
    """2^-127, lost beside `largest`, decides how the sum is rounded when 2^`last` comes."""
    last = np.arange(-89.0, -81)
    smalls = np.full_like(last, 2.0**-104), 2.0 ** (last - 24), np.full_like(last, 2.0**-127)
    rows = np.ones((len(last) + 1, 2 * blocks.SIZE), FP32)
    rows[:, blocks.SIZE :] = 0.0
    rows[:-1, blocks.SIZE : blocks.SIZE + 5] = np.stack(
        [np.full_like(last, -blocks.SIZE), *smalls, 2.0**last], 1
    )
    rows[-1] = largest
    b = np.ones((2 * blocks.SIZE, 16), FP32)
    b[:, 1] = largest * 2.0**-126
    check(largest, rows.astype(BF16), b.astype(BF16), None, FP32_FMA_CHAIN)


@mixed
def test_finite_numbers_of_every_size(arithmetic):
    rng = np.random.default_rng(8)
    c = (rng.integers(-3, 4, (32, 32)) * 2.0**-130).astype(np.float32)
    for largest, start in ((127.9, np.zeros_like(c)), (-62, np.zeros_like(c)), (-62, c)):
        sign = rng.choice([-1.0, 1.0], (2, 32, 32))
        a, b = (sign * 2.0 ** rng.uniform(-133, largest, (2, 32, 32))).astype(np.float32)
        a, b = a.astype(BF16), b.astype(BF16)
        check(largest, a, b, start, arithmetic)
