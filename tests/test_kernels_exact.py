"""Exact sums: every record of the family against the definition, and which way computes what."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import Arithmetic, arithmetic, exact, fixed_point, operands, pairs, product, split
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, draw_matrices, words

ASCEND = kernels.ASCEND_910C


CANDIDATES = arithmetic.ASCEND_910C_CANDIDATES


def unit(products: int, **fields) -> Arithmetic:
    name = ", ".join(f"{key}={value}" for key, value in fields.items())
    return Arithmetic(
        name=f"L={products}, {name}",
        products=products,
        dtypes=("bfloat16", "float16", "float32"),
        **fields,
    )


FAMILY = [
    (ASCEND, BF16),
    (ASCEND, FP16),
    (ASCEND, FP32),
    (kernels.ASCEND_910C_HF32, FP32),
    (kernels.AMD_CDNA1, BF16),
    (kernels.AMD_CDNA1, FP16),
    *[
        (CANDIDATES[key], BF16)
        for key in (
            "products_8",
            "products_4",
            "late_addend",
            "toward_zero",
            "flush_inputs",
            "saturation",
        )
    ],
    (unit(1, addend="late", zero="ieee"), BF16),
    (unit(1, addend="late", rounding="toward_zero", subnormal_results="flush"), FP32),
    (unit(2, zero="ieee", subnormal_inputs="flush"), FP32),
    (unit(3, zero="ieee", subnormal_inputs="plus_zero", addend="late"), BF16),
    (unit(4, subnormal_results="flush", rounding="toward_zero"), FP32),
    (unit(5, product_overflow="inf", overflow="saturate", specials="saturate"), BF16),
    (unit(6, subnormal_results="flush", product_overflow="inf", nan=0x7FFADBAD), BF16),
    (unit(8, rounding="toward_zero", addend="late", zero="ieee", overflow="saturate"), FP32),
    (unit(64, rounding="toward_zero", zero="ieee"), BF16),
]
NEIGHBOURS = [CANDIDATES[key] for key in ("products_8", "products_4", "flush_inputs")]
"""Each is between two others of the family."""
family = pytest.mark.parametrize(
    ("record", "dtype"),
    [
        pytest.param(
            record,
            dtype,
            id=f"{record.name}-{dtype.name}",
            marks=pytest.mark.slow if record in NEIGHBOURS else (),
        )
        for record, dtype in FAMILY
    ],
)


@functools.partial(jax.jit, static_argnums=3)
def by_xla(a, b, c, mode):
    """What a GPU computes, also where a CPU has a way of its own."""
    if mode.specials == "saturate" and c is not None:
        c = operands.saturate(c)
    return exact.accumulate(a, b, c, mode)


def check(a, b, c, record):
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=record))
    found = {"matmul": kernels.matmul(a, b, c, arithmetic=record)}
    mode = record.mode(a.dtype.name, b.dtype.name)
    if product.is_native(mode):
        shapes = [x if x is None else x.reshape(-1, *x.shape[-2:]) for x in (a, b, c)]
        found["exact"] = by_xla(*shapes, mode).reshape(expected.shape)
    for way, result in found.items():
        got = words(result)
        wrong = np.argwhere(expected != got)
        assert not len(wrong), (
            f"{way}: {len(wrong)} of {got.size} differ, first at {wrong[0]}: "
            f"{expected[tuple(wrong[0])]:#010x} expected, {got[tuple(wrong[0])]:#010x} got"
        )


def stacked(drawn):
    """All generators in one batch."""
    a, b, c = zip(*drawn, strict=True)
    shape = a[0].shape[:-1] + b[0].shape[-1:]
    c = [np.zeros(shape, np.float32) if x is None else x for x in c]
    return np.stack(a), np.stack(b), np.stack(c)


@pytest.mark.parametrize("fields", [{}, {"addend": "late"}, {"subnormal_results": "flush"}])
def test_a_c_that_is_read_as_minus_zero(fields):
    """Beside nothing but -0, and no +0 that fills up a step."""
    record = dataclasses.replace(CANDIDATES["flush_inputs"], **fields)
    c = np.array([[0x80000001], [0x807FFFFF], [0x80000000], [0x00000001]], np.uint32)
    a, b = np.full((4, 32), -0.0, BF16), np.ones((32, 3), BF16)
    check(a, b, np.tile(c.view(np.float32), 3), record)


@family
def test_single_dots(record, dtype):
    check(*stacked([draw(name, 21, 24, 37, dtype) for name in GENERATORS]), record)


@family
def test_exact_sums_alone(record, dtype):
    """What decides in the end, asked for everything."""
    mode = record.mode(dtype.name, dtype.name)
    a, b, c = stacked([draw(name, 3, 40, 2 * mode.products, dtype) for name in GENERATORS])
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=record))

    def sums(a, b, c):
        with jax.enable_x64(True):
            x, y = (
                kernels.floats.to_float64(kernels.floats.bits32(operands.read(v, mode))).reshape(
                    -1, 2, mode.products
                )
                for v in (a, b)
            )
            products = (x * y).transpose(1, 2, 0)
            start = kernels.floats.bits32(c.reshape(-1))
            return fixed_point.steps(start, products, dtype == FP32, mode)

    assert (np.asarray(jax.jit(sums)(a, b, c)) == expected.reshape(-1)).all()


@pytest.mark.parametrize(("record", "dtype"), FAMILY[::6], ids=lambda x: x.name)
def test_matrices(record, dtype):
    a, b, c = stacked([draw_matrices(name, 22, 6, 40, 7, dtype) for name in GENERATORS])
    check(a, b, c, record)


@pytest.mark.parametrize(
    ("record", "dtype"),
    [(ASCEND, BF16), pytest.param(ASCEND, FP32, marks=pytest.mark.slow)],
    ids=["BF16", "FP32"],
)
def test_tiles_of_every_shape(record, dtype, monkeypatch):
    """Small tiles that do not divide the result: the last ones overlap those before."""
    monkeypatch.setattr(exact, "_TILE", 70)
    monkeypatch.setattr(exact, "_WIDTH", 8)
    jax.clear_caches()
    a, b, c = stacked([draw_matrices(name, 23, 19, 36, 21, dtype) for name in GENERATORS])
    check(a, b, c, record)
    check(a[:, :3], b, c[:, :3], record)
    check(a[:, :, :20], b[:, :20, :5], c[:, :, :5], record)
    jax.clear_caches()


WAYS = (
    ("plain", exact, "_plain"),
    ("checked", exact, "_checked"),
    ("split", split, "steps"),
    ("exact", fixed_point, "steps"),
    ("pairs", pairs, "steps"),
)
taken: collections.Counter[str] = collections.Counter()


@functools.partial(jax.jit, static_argnums=2)
def counted(a, b, mode):
    """A product that counts in `taken` which way a block goes."""

    def counting(name, original):
        def function(*arguments):
            jax.debug.callback(lambda _: taken.update([name]), arguments[0].ravel()[0])
            return original(*arguments)

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name, module, attribute in WAYS:
            patch.setattr(module, attribute, counting(name, getattr(module, attribute)))
        return exact.accumulate(a[None], b[None], None, mode)[0]


def ways(a, b, record=ASCEND) -> dict[str, int]:
    """How many blocks went which way, and how many rows were added up exactly; the result is
    right.
    """
    a, b = np.asarray(a), np.asarray(b)
    taken.clear()
    out = words(counted(a, b, record.mode(a.dtype.name, b.dtype.name)))
    jax.effects_barrier()
    some = np.random.default_rng(0).permutation(len(a))[:3]
    expected = words(kernels.reference.matmul(a[some], b[:, :9], arithmetic=record))
    assert np.array_equal(out[some, :9], expected)
    return dict(taken)


def test_each_way_is_taken_by_what_it_is_for():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2, 128, 128)).astype(np.float32)
    a, b = normal.astype(BF16)
    assert ways(a, b) == {"plain": 8}
    assert ways(a * BF16.type(2**-60), b) == {"plain": 8}
    wide = (normal * 2.0 ** rng.integers(-12, 13, normal.shape)).astype(BF16)
    assert set(ways(*wide)) == {"checked"}
    gradients = (1e-8 * normal[0] * np.exp(3 * normal[1])).astype(BF16)
    assert set(ways(gradients, b)) == {"checked"}
    assert ways(*normal)["checked"] == 8  # a block that fails is split
    assert set(ways(*np.round(8 * normal))) == {"plain"}
    tiny = (normal * 2.0**-74).astype(BF16)
    assert ways(*tiny)["split"] == 8
    special = a.copy()
    special[5, 7], special[7, 9] = np.inf, np.nan
    assert ways(special, b) == {"checked": 8}


def test_two_products_are_plain_or_pairs():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2, 128, 128)).astype(np.float32)
    assert ways(*normal.astype(BF16), kernels.AMD_CDNA1) == {"plain": 16}
    a, b = (normal * 2.0 ** rng.integers(-40, 41, normal.shape)).astype(BF16)
    assert ways(a, b, kernels.AMD_CDNA1) == {"pairs": 16}
    a[5, 7], b[7, 9] = np.inf, np.nan
    assert ways(a, b, kernels.AMD_CDNA1) == {"pairs": 16}
    assert "pairs" not in ways(*normal, unit(2))  # products of 48 bits


def test_overflow_and_subnormal_results_need_no_exact_rows():
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(2, 64, 64)) * 2.0**63).astype(BF16)
    assert ways(a, b) == {"checked": 4}
    a, b = (rng.normal(size=(2, 64, 64)) * 2.0**-70).astype(BF16)
    assert set(ways(a, b)) == {"checked", "split"}


def test_far_dust_beside_a_tie_is_added_up_exactly():
    a, b = np.zeros((40, 16), BF16), np.zeros((16, 30), BF16)
    a[:, :3] = [1, 2.0**-12, 2.0**-60]
    b[:3] = np.array([[1], [2.0**-12], [2.0**-60]])
    assert set(ways(a, b)) == {"checked", "split", "exact"}
    out = words(kernels.matmul(a, b))
    assert (out == 0x3F800001).all()  # 1 + 2^-24 + 2^-120
    a[:7, 2] *= -1
    out = words(kernels.matmul(a, b))
    assert (out[:7] == 0x3F800000).all() and (out[7:] == 0x3F800001).all()


@pytest.mark.parametrize(("size", "word"), [(-75, 1), (0, 0x3F800001), (55, 0x76800001)])
def test_dust_that_cancels_beside_a_tie(size, word):
    """What is left of it is lost in FP64, and decides: 2^-150, 1 + 2^-24 or 2^110 times that."""
    tie = 0 if size == -75 else 2.0 ** (size - 12)
    left = np.array([2.0**size, 0, 0, tie, 2.0 ** (size - 26), 0, 2.0 ** (size - 57)] + [0] * 9)
    right = left.copy()
    left[8], right[8] = -left[4], right[4]
    for sign, decided in ((1, word), (-1, word - 1)):
        left[6] = sign * abs(left[6])
        a, b = np.tile(left, (20, 1)).astype(BF16), np.tile(right[:, None], (1, 20)).astype(BF16)
        assert "exact" in ways(a, b)
        assert (words(kernels.matmul(a, b)) == decided).all()


def test_far_dust_of_many_bits_is_added_up_exactly():
    """Products of 26 bits that cancel but for their last, beside a tie."""
    record = unit(4, operand_fraction_bits=12, operand_rounding="nearest_even")
    x = 2.0**-60 * (1 + 2.0**-12)
    a = np.tile(np.array([1, 2.0**-12, x, -(2.0**-60)], FP32), (40, 1))
    b = np.tile(np.array([[1], [2.0**-12], [x], [2.0**-60 * (1 + 2.0**-11)]], FP32), (1, 30))
    out = words(kernels.matmul(a, b, arithmetic=record))
    assert (out == 0x3F800001).all()  # 1 + 2^-24 + 2^-144


def test_a_tiny_accumulator_beside_a_tie_is_not_dropped():
    """Both blocks are exact by themselves; 16 + 2^-20 + C with C = 2^-50 has 54 bits."""
    a, b = np.zeros((20, 32), BF16), np.zeros((32, 20), BF16)
    a[:, [0, 1, 2, 16, 17]] = [1, 1, 2.0**-25, 4, 2.0**-10]
    b[[0, 1, 2, 16, 17]] = np.array([[1], [-1], [2.0**-25], [4], [2.0**-10]])
    assert ways(a, b) == {"plain": 2, "checked": 2, "split": 1}
    assert (words(kernels.matmul(a, b)) == 0x41800001).all()


@pytest.mark.parametrize(
    ("record", "size", "expected"),
    [
        (ASCEND, 16, {"plain": 2, "checked": 4, "split": 1}),
        (kernels.AMD_CDNA1, 8, {"plain": 2, "pairs": 4}),
    ],
    ids=["ASCEND_910C", "AMD_CDNA1"],
)
def test_a_tiny_accumulator_is_not_dropped_before_an_overflow(record, size, expected):
    """C = 2^-50 is too small beside 16 + 2^-20; the block after that has no bound."""
    a, b = np.zeros((20, 3 * size), BF16), np.zeros((3 * size, 20), BF16)
    places = [0, size, size + 1, 2 * size, 2 * size + 1]
    a[:, places] = [2.0**-25, 4, 2.0**-10, 2.0**64, 2.0**-10]
    b[places] = np.array([[2.0**-25], [4], [2.0**-10], [2.0**63], [2.0**-10]])
    assert ways(a, b, record) == expected
    assert (words(kernels.matmul(a, b, arithmetic=record)) == 0x7F000000).all()


def test_doubts_one_step_beyond_those_resolved_together():
    """Ties beside far dust; in a row the next one is just out of the reach of the first."""
    width = exact._COLUMNS
    a, b = np.zeros((5, 16), BF16), np.zeros((16, 3 * width), BF16)
    a[:, :3] = [1, 2.0**-12, 2.0**-60]
    b[0] = 1
    for columns in ([0, width], [width - 1, 2 * width - 1], [0, 3 * width - 1], [5, 6, width + 5]):
        b[1:3] = 0
        b[1, columns], b[2, columns] = 2.0**-12, 2.0**-60
        assert set(ways(a, b)) == {"checked", "split", "exact"}
        out = words(kernels.matmul(a, b))
        assert (out[:, columns] == 0x3F800001).all()
        assert (np.delete(out, columns, 1) == 0x3F800000).all()


def test_few_and_many_specials():
    a, b, _ = draw_matrices("normal_without_c", 9, 70, 32, 90, BF16)
    a[3, 5], b[7, 11] = np.inf, np.nan
    check(a, b, None, ASCEND)
    a[:] = np.inf
    check(a, b, None, ASCEND)


def test_many_doubtful_elements():
    """More than one round, and bad elements side by side."""
    rng = np.random.default_rng(3)
    a = np.zeros((70, 20), BF16)
    b = np.zeros((20, 90), BF16)
    a[:, :3] = [1, 2.0**-12, 2.0**-60]
    b[:3] = np.array([[1], [2.0**-12], [2.0**-60]])
    a[:, 2] *= rng.choice([-1, 0, 1], 70)
    a[:, 16] = rng.choice([0, 2.0**-12], 70)
    b[16] = 2.0**-13
    for record in (
        ASCEND,
        dataclasses.replace(ASCEND, rounding="toward_zero"),
        CANDIDATES["products_8"],  # a block of two steps, the first of them in doubt
    ):
        check(a, b, None, record)


def test_no_way_depends_on_jit():
    a, b, c = draw_matrices("wide", 24, 33, 64, 35, BF16)
    product = jax.jit(lambda *x: kernels.matmul(*x))
    assert np.array_equal(words(product(a, b, c)), words(kernels.matmul(a, b, c)))
    assert np.array_equal(words(product(jnp.asarray(a), b)), words(kernels.matmul(a, b)))


@pytest.mark.parametrize(
    ("record", "dtype"), [(ASCEND, BF16), (kernels.ASCEND_910C_HF32, FP32)], ids=["BF16", "HF32"]
)
def test_operands_are_not_copied(record, dtype):
    a, b = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((64, 8192), (8192, 64)))
    product = jax.jit(lambda a, b: kernels.matmul(a, b, arithmetic=record))
    memory = product.lower(a, b).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 2


def test_fp64_sums_are_plain_up_to_their_last_integer():
    """2^53 + 2^29 is halfway between two FP32 numbers; FP64 drops a 1 beside it."""
    a, b = np.zeros((2, 1, 16), BF16)
    a[0, [0, 2, 4]], b[0, [0, 2, 4]] = [2.0**27, 2.0**15, 1], [2.0**26, 2.0**14, 1]
    result = kernels.matmul(a, b.T, arithmetic=ASCEND)
    assert float(result[0, 0]) == 2.0**53 + 2.0**30
    check(a, b.T, None, ASCEND)
