"""The twin of units that cut terms to a grid: every record of the family has the definition's bits,
on both paths, in both integer widths and for any shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import AMD_CDNA3, NVIDIA_HOPPER, Arithmetic, aligned, encode, reference
from kernels.aligned_step import Grid
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, draw_matrices, words

MODES = [field.name for field in dataclasses.fields(Arithmetic) if field.name.startswith("fp")]
UNITS = [
    (mode, dtype)
    for preset in kernels.PRESETS.values()
    for mode in (preset, *(getattr(preset, name) for name in MODES))
    for dtype in (BF16, FP16, FP32)
    if mode is not None and mode.fraction_bits is not None and dtype.name in mode.dtypes
]
UNITS += [
    (kernels.ASCEND_910C_CANDIDATES[name], BF16) for name in ("guard_2_truncate", "guard_4_floor")
]


def _sums(unit: Arithmetic, dtype: np.dtype) -> object:
    """What two units that only differ in name and evidence share."""
    plain = {"name": "", "evidence": "assumed", "source": "", "dtypes": (dtype.name,)}
    return dataclasses.replace(unit, **plain, **dict.fromkeys(MODES))


CASES = list({_sums(unit, dtype): (unit, dtype) for unit, dtype in UNITS}.values())

ALIGNED = dataclasses.replace(NVIDIA_HOPPER, name="custom", **dict.fromkeys(MODES))
ANY = ("bfloat16", "float16", "float32")
IEEE = {"zero": "ieee"}  # looks for specials always, so that there is one path to compile
CUSTOM: dict[str, tuple[dict[str, object], np.dtype]] = {
    "one product, coarse": (
        {"products": 1, "fraction_bits": 1, "alignment": "floor", **IEEE},
        BF16,
    ),
    "64 products": (
        {"products": 64, "fraction_bits": 23, "rounding": "nearest_even", **IEEE},
        BF16,
    ),
    "odd step": ({"products": 5, "fraction_bits": 5, "alignment": "nearest_even"}, FP16),
    "widest int32 lane": ({"fraction_bits": 29, **IEEE}, FP16),
    "widest, to nearest": ({"fraction_bits": 28, "alignment": "nearest_even", **IEEE}, BF16),
    "int64 lane": ({"fraction_bits": 30, "subnormal_results": "flush", **IEEE}, BF16),
    "finest": (
        {"products": 64, "fraction_bits": 48, "alignment": "nearest_even", **IEEE},
        FP32,
    ),
    "15-bit FP32": ({"fraction_bits": 25, "operand_fraction_bits": 14, **IEEE}, FP32),
    "late": ({"addend": "late", "subnormal_results": "flush", **IEEE}, BF16),
    "late, to nearest, saturating": (
        {"addend": "late", "rounding": "nearest_even", "overflow": "saturate", "products": 8},
        BF16,
    ),
    "flush": (
        {
            "subnormal_inputs": "flush",
            "subnormal_results": "flush",
            "rounding": "nearest_even",
            "min_exponent": -400,
            **IEEE,
        },
        BF16,
    ),
    "plus zero": ({"subnormal_inputs": "plus_zero", **IEEE}, FP16),
    "saturating": ({"specials": "saturate", "overflow": "saturate"}, BF16),
    "saturating, cut operands": (
        {
            "specials": "saturate",
            "overflow": "saturate",
            "operand_fraction_bits": 3,
            "operand_rounding": "nearest_even",
            **IEEE,
        },
        FP32,
    ),
    "saturating, infinite products": (
        {"specials": "saturate", "overflow": "saturate", "product_overflow": "inf", **IEEE},
        BF16,
    ),
    "overflow": ({"product_overflow": "inf", "overflow": "saturate", **IEEE}, BF16),
    "overflow, FP32": (
        {
            "product_overflow": "inf",
            "fraction_bits": 40,
            "products": 4,
            "min_exponent": -126,
            **IEEE,
        },
        FP32,
    ),
    "joined, finest": (
        {
            "addend": "joined",
            "products": 20,
            "fraction_bits": 48,
            "sum_fraction_bits": 48,
            "addend_fraction_bits": 48,
            "result_fraction_bits": 48,
            **IEEE,
        },
        FP32,
    ),
    "joined, coarse": (
        {
            "addend": "joined",
            "fraction_bits": 30,
            "sum_fraction_bits": 3,
            "addend_fraction_bits": 9,
            "result_fraction_bits": 2,
            "alignment": "floor",
            **IEEE,
        },
        BF16,
    ),
}


def everything(rows: int, k: int, dtype: np.dtype):
    """Rows of every generator in one call, which is one compilation."""
    drawn = [draw(name, 3, rows, k, dtype) for name in GENERATORS]
    zero = np.zeros((rows, 1, 1), np.float32)
    a, b = (np.concatenate([x[i] for x in drawn]) for i in (0, 1))
    c = np.concatenate([zero if x[2] is None else x[2].astype(np.float32) for x in drawn])
    return a, b, c


def check_both_paths(parts, arithmetic):
    """Once as they are, and once with the first row in place of rows that have specials or may
    have products that overflow.
    """
    with np.errstate(invalid="ignore"):  # NaN
        plain = [np.abs(x.astype(np.float64)) < 2.0**60 for x in parts]
    rows = np.all([x.all((1, 2)) for x in plain], axis=0)
    assert rows[0] and not rows.all()
    check(*parts, arithmetic)
    if arithmetic.zero != "ieee":
        check(*(np.where(rows[:, None, None], x, x[:1]) for x in parts), arithmetic)


@functools.partial(jax.jit, static_argnames="arithmetic")
def by_xla(a, b, c, *, arithmetic):
    """What a GPU computes, also where a CPU has a way of its own."""
    return aligned._by_xla(a, b, c, arithmetic)


def check(a, b, c, arithmetic, multiply=kernels.matmul):
    if multiply is kernels.matmul and a.ndim == 3 and aligned.is_native(arithmetic, a.dtype.name):
        check(a, b, c, arithmetic, by_xla)
    expected = words(reference.matmul(a, b, c, arithmetic=arithmetic))
    got = words(multiply(a, b, c, arithmetic=arithmetic))
    wrong = np.argwhere(expected != got)
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} differ, first at {wrong[0]}: "
        f"{expected[tuple(wrong[0])]:#010x} expected, {got[tuple(wrong[0])]:#010x} got"
    )


@pytest.mark.parametrize("unit,dtype", CASES, ids=lambda x: x.name)
def test_every_unit(unit, dtype):
    check_both_paths(everything(20, 2 * unit.products + 5, dtype), unit)


@pytest.mark.parametrize("name", CUSTOM)
def test_other_records(name):
    changes, dtype = CUSTOM[name]
    unit = dataclasses.replace(ALIGNED, dtypes=ANY, **changes)
    check_both_paths(everything(20, min(2 * unit.products + 1, 70), dtype), unit)


def test_an_fp16_operand_beside_an_fp32_one_is_read_as_fp32():
    """An FP16 subnormal is a normal FP32 number, and may have more bits than the unit keeps."""
    a, _, _ = draw_matrices("subnormal_inputs", 9, 8, 20, 17, FP16)
    _, b, _ = draw_matrices("normal", 9, 8, 20, 17, FP32)
    unit = dataclasses.replace(
        ALIGNED, dtypes=ANY, subnormal_inputs="flush", operand_fraction_bits=6, **IEEE
    )
    check(a, b, None, unit)


def test_lanes_are_what_the_records_above_say():
    def grid(name: str, precision: int) -> Grid:
        return Grid(dataclasses.replace(ALIGNED, **CUSTOM[name][0]), precision, -126)

    assert grid("widest int32 lane", 11).lane == grid("15-bit FP32", 15).lane == jnp.int32
    assert grid("int64 lane", 8).lane == grid("15-bit FP32", 16).lane == jnp.int64
    assert Grid(NVIDIA_HOPPER, 8, -126).group == 16
    assert Grid(kernels.ASCEND_910C_CANDIDATES["guard_4_floor"], 8, -126).group == 4


@pytest.mark.parametrize(
    "unit", [dataclasses.replace(ALIGNED, **IEEE), AMD_CDNA3], ids=lambda unit: unit.name
)
def test_largest_sums_do_not_wrap_around(unit):
    """All products as large as their exponent allows, with C of the same and of the other sign."""
    top = float(np.array(0x3FFF, np.uint16).view(FP16))
    signs = np.array([1.0, -1.0])[:, None]
    a, b = np.full((2, 64), top) * signs, np.full((64, 3), top)
    largest = np.float32(2.0 - 2.0**-23)
    c = np.array([[largest, -largest, 0.0]] * 2, np.float32)
    check(a.astype(FP16), b.astype(FP16), c, unit)


def paths(inputs, arithmetic: Arithmetic) -> list[bool]:
    """Which path each of the inputs took, to right results: `True` where it looked for specials."""
    taken = []
    original = aligned._accumulate

    def counting(*args):
        jax.debug.callback(lambda: taken.append(args[-1]))
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligned, "_accumulate", counting)
        product = jax.jit(lambda *parts: aligned._by_xla(*parts, arithmetic))
        for parts in inputs:
            check(*parts, arithmetic, lambda *x, arithmetic: product(*(y[None] for y in x))[0])
            jax.effects_barrier()
    return taken


def test_an_infinity_anywhere_takes_the_other_path():
    names = ("raw_finite", "tiny_with_zeros", "normal", "normal", "normal")
    inputs = [draw_matrices(name, 4, 6, 32, 20, BF16) for name in names]
    inputs[1] = (*inputs[1][:2], np.zeros((6, 20), np.float32))
    for place in range(3):
        inputs[2 + place][place][-1, -1] = -np.inf
    assert paths(inputs, NVIDIA_HOPPER) == [False, False, True, True, True]


def test_a_product_that_could_overflow_takes_the_other_path():
    zero = np.zeros((6, 20), np.float32)
    inputs = [draw_matrices("normal", 4, 6, 32, 20, BF16)]
    for exponents in ((62, 63), (63, 63), (64, 64)):
        parts = np.ones((6, 32)), np.ones((32, 20))
        for x, exponent in zip(parts, exponents, strict=True):
            x[0, 0] = 1.9921875 * 2.0**exponent
        inputs.append((*(x.astype(BF16) for x in parts), zero))
    a, b, _ = inputs[-1]
    a[1, 1], b[1, 1], b[1, 2] = 2.0**64, 2.0**63, 2.0**64  # just below, and just at, the limit
    assert paths(inputs, AMD_CDNA3) == [False, False, True, True]


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 17, 260), (260, 9, 3), (1, 33, 129), (129, 16, 16), (20, 40, 15), (2, 8, 128)],
    ids=str,
)
def test_any_shape(shape):
    """Tiles with and without padding, few columns, and blocks with steps too many."""
    m, k, n = shape
    a, b, c = draw_matrices("cancelling" if k > 1 else "wide", 5, m, k, n, BF16)
    units = [dataclasses.replace(ALIGNED, **IEEE)]
    if k in (17, 40):
        units.append(dataclasses.replace(ALIGNED, products=3, fraction_bits=20, **IEEE))
    for unit in units:
        whole = words(kernels.matmul(a, b, c, arithmetic=unit))
        rng = np.random.default_rng(0)
        rows, columns = rng.integers(0, m, 40), rng.integers(0, n, 40)
        picked = a[rows][:, None, :], b.T[columns][:, :, None], c[rows, columns][:, None, None]
        expected = words(reference.matmul(*picked, arithmetic=unit))[:, 0, 0]
        assert (whole[rows, columns] == expected).all()
        if n == 129:
            without = words(kernels.matmul(a, b, arithmetic=unit))
            zero = words(kernels.matmul(a, b, np.zeros((m, n), np.float32), arithmetic=unit))
            assert (without == zero).all()


def test_batches_jit_and_vmap_keep_bits():
    unit = dataclasses.replace(ALIGNED, **IEEE)
    a, b, _ = draw_matrices("wide", 6, 7 * 6, 24, 7 * 20, BF16)
    a, b = a.reshape(7, 6, 24), b.reshape(24, 7, 20).swapaxes(0, 1)

    def product(x, y):
        return kernels.matmul(x, y, arithmetic=unit)

    whole = words(product(a, b))
    check(a, b, None, unit)
    assert (words(jax.jit(product)(a, b)) == whole).all()
    assert (words(jax.vmap(product)(a, b)) == whole).all()
    assert (words(np.stack([product(x, y) for x, y in zip(a, b, strict=True)])) == whole).all()


@pytest.mark.parametrize(
    "changes", [IEEE, {}, {"rounding": "nearest_even", "overflow": "saturate", **IEEE}]
)
@pytest.mark.parametrize("results", ["keep", "flush"])
@pytest.mark.parametrize("integer", [np.uint32, np.uint64])
def test_integers_are_rounded_as_in_the_definition(integer, results, changes):
    unit = dataclasses.replace(ALIGNED, subnormal_results=results, **changes)
    rng = np.random.default_rng(7)
    bits = 8 * np.dtype(integer).itemsize
    magnitude = rng.integers(0, 2**bits, 4000, dtype=integer) >> rng.integers(0, bits, 4000).astype(
        integer
    )
    magnitude[:1500] |= magnitude[:1500] - 1  # runs of ones carry
    magnitude[-500:] = integer(1) << rng.integers(0, bits, 500).astype(integer)  # and ties
    magnitude[-300:] += integer(1) << rng.integers(0, 8, 300).astype(integer)
    unit_exponent = rng.integers(-230, 130, 4000)
    near = rng.random(4000) < 0.5  # the smallest normal number, and the largest
    width = np.array([int(x).bit_length() for x in magnitude])
    target = rng.choice([-127, -126, -149, -150, 127, 128], 4000)
    unit_exponent = np.where(near, target - width + 1, unit_exponent).astype(np.int32)
    negative = rng.random(4000) < 0.5
    expected = [
        reference._finish(-int(count) if minus else int(count), int(place), bool(minus), unit)
        for count, place, minus in zip(magnitude, unit_exponent, negative, strict=True)
    ]
    with jax.enable_x64(True):
        finish = jax.jit(encode.finish, static_argnums=4)
        got = finish(negative, magnitude, unit_exponent, negative, unit)
    assert np.array_equal(np.asarray(got), np.array(expected, np.uint32))


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
def test_additions_are_rounded_as_in_the_definition(rounding):
    unit = dataclasses.replace(ALIGNED, rounding=rounding, zero="ieee", subnormal_results="flush")
    rng = np.random.default_rng(8)
    x = rng.integers(0, 2**32, 6000, dtype=np.uint32)
    y = x ^ rng.integers(0, 2**32, 6000, dtype=np.uint32) >> rng.integers(0, 32, 6000).astype("u4")
    edges = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
    edges = np.concatenate([edges, edges | 0x80000000])
    x = np.concatenate([x, np.repeat(edges, len(edges))])
    y = np.concatenate([y, np.tile(edges, len(edges))])
    expected = [
        reference._add(reference.decode(int(p), "float32"), int(q), unit)
        for p, q in zip(x, y, strict=True)
    ]
    with jax.enable_x64(True):
        got = jax.jit(encode.add, static_argnums=2)(x, y, unit)
    assert np.array_equal(np.asarray(got), np.array(expected, np.uint32))
