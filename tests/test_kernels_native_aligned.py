"""A CPU's own way of units that cut their terms to a grid: the bits of the definition and of XLA's
operations, whatever the data.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import NVIDIA_HOPPER, aligned
from kernels.compiled import ALIGNED, compiled
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, draw_matrices, words
from tests.test_kernels_aligned import by_xla

MODES = [
    (mode, dtype)
    for preset in kernels.PRESETS.values()
    for dtype in (BF16, FP16, FP32)
    if dtype.name in preset.dtypes or dtype == FP32
    for mode in [preset.mode(dtype.name, dtype.name)]
    if mode.fraction_bits is not None and aligned.is_native(mode, dtype.name)
]
UNITS = {  # one of those that are alike
    (mode.products, mode.fraction_bits, dtype.name): (mode, dtype) for mode, dtype in MODES
}
TF32 = kernels.NVIDIA_HOPPER.mode("float32", "float32")

HOPPER = dataclasses.replace(NVIDIA_HOPPER, name="custom", fp32=None, fp32_full=None)
CUSTOM: dict[str, tuple[dict[str, object], np.dtype]] = {
    "one product, finest": ({"products": 1, "fraction_bits": 29}, FP16),
    "odd step, coarse": ({"products": 5, "fraction_bits": 5, "min_exponent": -400}, FP16),
    "64 products": ({"products": 64, "fraction_bits": 23}, BF16),
    "high floor": ({"products": 7, "fraction_bits": 26, "min_exponent": -126}, BF16),
    "12-bit operands": ({"fraction_bits": 25, "operand_fraction_bits": 11}, FP32),
    "rounded operands": (
        {"operand_fraction_bits": 3, "operand_rounding": "nearest_even", "products": 2},
        FP32,
    ),
}

pytestmark = pytest.mark.skipif(compiled(ALIGNED) is None, reason="numba does not work here")


@functools.partial(jax.jit, static_argnames="arithmetic")
def by_cpu(a, b, c, *, arithmetic):
    return compiled(ALIGNED).accumulate(a, b, c, arithmetic)


def check(name, a, b, c, arithmetic, way=None):
    """A way, or else the compiled one alone, against the definition."""
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=arithmetic))
    if way is None:
        a, b, c = (x if x is None or x.ndim == 3 else x[None] for x in (a, b, c))
        way = functools.partial(by_cpu, arithmetic=arithmetic)
    got = words(way(a, b, c)).reshape(expected.shape)
    wrong = np.argwhere(expected != got)
    assert not len(wrong), (
        f"{arithmetic.name}, {name}: {len(wrong)} differ, first {wrong[0]}: "
        f"{expected[tuple(wrong[0])]:#x}, not {got[tuple(wrong[0])]:#x}"
    )


def filled(shape, dtype, value):
    return np.full(shape, value, np.float32).astype(dtype)


def test_every_nvidia_unit_has_the_way():
    units = {name for name in kernels.PRESETS if name.startswith("NVIDIA")}
    reduced = {f"NVIDIA_{name} TF32" for name in ("AMPERE", "ADA", "HOPPER", "BLACKWELL")}
    assert {mode.name for mode, _ in MODES} == units | reduced


def check_all(k, arithmetic, dtype):
    for seed, name in enumerate(GENERATORS):
        a, b, c = draw(name, seed, 20, k, dtype)
        c = np.zeros((20, 1, 1), np.float32) if c is None else c
        check(name, a, b, c, arithmetic, functools.partial(kernels.matmul, arithmetic=arithmetic))


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_presets(unit):
    check_all(37, *UNITS[unit])


@pytest.mark.parametrize("name", CUSTOM)
def test_records(name):
    changes, dtype = CUSTOM[name]
    unit = dataclasses.replace(HOPPER, name=name, dtypes=(dtype.name,), **changes)
    assert aligned.is_native(unit, dtype.name)
    check_all(35, unit, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"addend": "late"},
        {"alignment": "floor"},
        {"rounding": "nearest_even"},
        {"zero": "ieee"},
        {"subnormal_inputs": "flush"},
        {"subnormal_results": "flush"},
        {"specials": "saturate", "overflow": "saturate"},
        {"product_overflow": "inf"},
        {"overflow": "saturate"},
        {"operand_fraction_bits": 12, "fraction_bits": 24, "products": 4},
        {"fraction_bits": 30},
        {"products": 17},
    ],
    ids=str,
)
def test_other_records_have_not(changes):
    dtype = "float32" if "operand_fraction_bits" in changes else "bfloat16"
    unit = dataclasses.replace(HOPPER, dtypes=(dtype,), **changes)
    assert not aligned.is_native(unit, dtype)


@pytest.mark.parametrize("unit", [HOPPER, TF32], ids=["BF16", "TF32"])
def test_all_data_has_xlas_bits(unit):
    """In tiles and blocks of k, with rests of all kinds."""
    for name in GENERATORS:
        a, b, c = draw_matrices(name, 5, 299, 281, 275, BF16 if unit is HOPPER else FP32)
        c = np.zeros((299, 275), np.float32) if c is None else c
        expected = by_xla(a[None], b[None], c[None], arithmetic=unit)
        got = by_cpu(a[None], b[None], c[None], arithmetic=unit)
        assert (words(expected) == words(got)).all(), name


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinities_and_nans_anywhere(value):
    """In a, b, C or in two of them, in steps before and after sums that overflow."""
    rng = np.random.default_rng(2)
    for k in (16, 150):
        large = rng.choice([-1, 1], (2, 9, k)) * 2.0 ** rng.integers(-140, 128, (2, 9, k))
        for ways in itertools.product((False, True), repeat=3):
            a, b = (x.astype(BF16) for x in (large[0], large[1].T))
            c = rng.normal(size=(9, 9)).astype(np.float32)
            for x, has in zip((a, b, c), ways, strict=True):
                if has:
                    x[3, 5], x[8, 8], x[0, 0] = value, -value, 0
            check(ways, a, b, c, HOPPER)


@pytest.mark.parametrize("exponent", [0, -62, -70, 60])
def test_sums_that_are_too_long_for_32_bits(exponent):
    for sign in (1, -1):
        largest = 255 / 128 * 2.0**exponent
        a, b = filled((3, 64), BF16, sign * largest), filled((64, 5), BF16, largest)
        for size in (1.0, 1.999, 3.999, -3.999, 2.0**-30, 0.0):
            c = np.full((3, 5), sign * size * 4.0**exponent, np.float32)
            check(size, a, b, c, HOPPER)


def test_a_sum_one_bit_too_long_is_cut_by_eight():
    rng = np.random.default_rng(3)
    a = (rng.integers(250, 256, (40, 16)) / 128).astype(BF16)
    b = (rng.integers(250, 256, (16, 40)) / 128).astype(BF16)
    c = rng.uniform(1, 2, (40, 40)).astype(np.float32)
    check("positive", a, b, c, HOPPER)
    check("negative", -a, b, -c, HOPPER)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_overflow_stays(dtype):
    unit = HOPPER if dtype == BF16 else TF32
    a = np.ones((4, 160), np.float32)
    a[:, 20], a[:, 150] = 2.0**127, -(2.0**127)
    a[1] *= -1
    a[2, 20], a[3, 21] = 1, -(2.0**127)
    b = filled((160, 6), dtype, 2.0)
    b[:, 1] = 2.0**127
    b[:, 2] = 0.5
    check("sums", a.astype(dtype), b, None, unit)
    c = np.full((4, 6), np.finfo(np.float32).max, np.float32)
    check("with C", a.astype(dtype), b, c, unit)
    check("against C", a.astype(dtype), b, -c, unit)


def test_results_around_the_least_normal_number():
    for low in range(-76, -60):
        rng = np.random.default_rng(-low)
        a, b = (rng.normal(size=(2, 20, 20)) * 2.0**low).astype(BF16)
        c = (rng.normal(size=(20, 20)) * 2.0**-126).astype(np.float32)
        a[:5] = 0
        check(low, a, b, c, HOPPER)
        check(low, a, b, None, HOPPER)


@pytest.mark.parametrize("apart", [47, 48, 49, 53, 56])
def test_operands_just_in_range_or_not(apart):
    """Of the two ways, products at either end, and sums that only those have."""
    rng = np.random.default_rng(apart)
    a, b = (rng.uniform(1, 2, (2, 24, 24))).astype(np.float32)
    a[rng.random(a.shape) < 0.5] *= 2.0**-apart
    b[rng.random(b.shape) < 0.5] *= 2.0**-apart
    a[:8], b[:, :8] = 2.0**-apart * rng.uniform(1, 2, (8, 24)), 2.0**-apart
    a[8:10], a[10:14, ::2] = 0, 0
    for scale in (1.0, 2.0**60, 2.0**-60):
        check(scale, (a * scale).astype(BF16), b.astype(BF16), None, HOPPER)
    halves = np.ldexp(a, 14), np.ldexp(b, 14)
    check("FP16", halves[0].astype(FP16), halves[1].astype(FP16), None, HOPPER)


def test_zeros_after_large_sums():
    """A sum that vanished does not keep its grid."""
    a = np.ones((2, 48), np.float32)
    a[:, 16:32], a[:, 32:] = -1, 2.0**-40
    a *= np.array([[2.0**40], [1]], np.float32)
    check("cancelled", a.astype(BF16), filled((48, 3), BF16, 1.0), None, HOPPER)


@pytest.mark.parametrize("products", [1, 5, 16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 1, 20), (2, 65, 17, 1), (1, 9, 261, 31)])
def test_shapes(shape, products):
    batch, m, k, n = shape
    a, b, c = draw_matrices("wide", 7, batch * m, k, batch * n, BF16)
    a, b = a.reshape(batch, m, k), b.reshape(k, batch, n).swapaxes(0, 1)
    c = np.resize(c, (batch, m, n))
    unit = dataclasses.replace(HOPPER, products=products)
    check(shape, a, b, c, unit)
    check(shape, a, b, None, unit)
    way = functools.partial(kernels.matmul, arithmetic=unit)
    check(shape, a, b, c, unit, way)


def test_batches_jit_vmap_and_branches_keep_bits():
    a, b, _ = draw_matrices("wide", 6, 7 * 6, 24, 7 * 20, BF16)
    a, b = a.reshape(7, 6, 24), b.reshape(24, 7, 20).swapaxes(0, 1)

    def product(x, y):
        return kernels.matmul(x, y, arithmetic=HOPPER)

    whole = words(product(a, b))
    check("batches", a, b, None, HOPPER, lambda *_: whole.view(np.float32))
    assert (words(jax.jit(product)(a, b)) == whole).all()
    assert (words(jax.vmap(product)(a, b)) == whole).all()
    branch = jax.jit(
        lambda yes: jax.lax.cond(yes, product, lambda *_: jnp.zeros(whole.shape), a, b)
    )
    assert (words(branch(True)) == whole).all()
    found = jax.lax.map(lambda pair: product(*pair), (a, b))
    assert (words(found) == whole).all()


def test_the_processor_rounds_as_before():
    a, b, _ = draw_matrices("normal", 6, 40, 24, 40, BF16)
    product = jax.jit(lambda a, b: kernels.matmul(a, b, arithmetic=HOPPER) * 1.1)
    whole = np.asarray(kernels.matmul(a, b, arithmetic=HOPPER))
    for _ in range(20):
        assert (words(product(a, b)) == words(whole * np.float32(1.1))).all()


def test_without_numba_xla_takes_its_place(monkeypatch):
    unit = dataclasses.replace(HOPPER, products=3)
    a, b, c = draw_matrices("wide", 6, 9, 24, 20, BF16)
    monkeypatch.setattr(aligned, "compiled", lambda name: None)
    way = functools.partial(kernels.matmul, arithmetic=unit)
    check("by XLA", a, b, c, unit, way)
    text = jax.jit(lambda a, b: kernels.matmul(a, b, arithmetic=unit)).lower(a, b).as_text()
    assert ALIGNED not in text


def test_the_cpu_calls_what_is_compiled():
    a = jnp.zeros((32, 32), jnp.bfloat16)
    text = jax.jit(lambda a: kernels.matmul(a, a, arithmetic=HOPPER)).lower(a).as_text()
    assert ALIGNED in text
    exported = jax.export.export(
        jax.jit(lambda a: kernels.matmul(a, a, arithmetic=HOPPER)), platforms=["cuda"]
    )(a)
    assert ALIGNED not in exported.mlir_module()
