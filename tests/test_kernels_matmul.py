"""The JAX twin has the bits of the definition, for every input and however it is called."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import kernels
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, draw_matrices, words

PRESETS = [kernels.ASCEND_910C, kernels.FP32_FMA_CHAIN, kernels.NVIDIA_HOPPER]

preset = pytest.mark.parametrize("arithmetic", PRESETS, ids=lambda p: p.name)

# Chains, which take longest to compile, have the same tests in a file of their own.
quick_preset = pytest.mark.parametrize(
    "arithmetic",
    [
        pytest.param(p, marks=pytest.mark.slow if p is kernels.FP32_FMA_CHAIN else ())
        for p in PRESETS
    ],
    ids=lambda p: p.name,
)


@preset
@pytest.mark.parametrize("k", [1, 17])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_no_c_is_a_c_of_plus_zero(dtype, k, arithmetic):
    """Where XLA would take `0 + x` for x, and a product beyond FP32 for a fused multiply-add."""
    rng = np.random.default_rng(k)
    zeros = np.copysign(0.0, rng.choice([-1, 1], (4, k))), rng.choice([-1.0, 0.0, 1.0], (k, 6))
    huge = [rng.choice([-1, 1], s) * 2.0 ** rng.integers(62, 65, s) for s in ((4, k), (k, 6))]
    multiply = jax.jit(lambda *x: kernels.matmul(*x, arithmetic=arithmetic))
    for a, b in (zeros, huge):
        a, b = np.asarray(a).astype(dtype), np.asarray(b).astype(dtype)
        expected = words(kernels.reference.matmul(a, b, arithmetic=arithmetic))
        assert np.array_equal(words(multiply(a, b)), expected)
        assert np.array_equal(words(multiply(a, b, np.zeros((4, 6), np.float32))), expected)


def check(a, b, c, arithmetic):
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=arithmetic))
    got = words(kernels.matmul(a, b, c, arithmetic=arithmetic))
    wrong = np.argwhere(expected != got)
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} differ, first at {wrong[0]}: "
        f"{expected[tuple(wrong[0])]:#010x} expected, {got[tuple(wrong[0])]:#010x} got"
    )


EXACT = [
    (kernels.ASCEND_910C, BF16),
    (kernels.ASCEND_910C, FP16),
    (kernels.ASCEND_910C, FP32),
    (kernels.ASCEND_910C_HF32, FP32),
    (kernels.AMD_CDNA1, BF16),
    (kernels.ASCEND_910C_CANDIDATES["products_8"], BF16),
]


@pytest.mark.parametrize("arithmetic,dtype", EXACT, ids=lambda x: x.name)
def test_small_exact_products_on_every_generator(arithmetic, dtype):
    """Large ones, and all other records, have test files of their own."""
    drawn = [draw(name, 1, 60, 37, dtype) for name in GENERATORS]
    a, b, c = zip(*drawn, strict=True)
    c = [np.zeros((60, 1, 1), np.float32) if x is None else x for x in c]
    check(np.concatenate(a), np.concatenate(b), np.concatenate(c), arithmetic)
    drawn = [draw_matrices(name, 2, 9, 40, 20, dtype) for name in GENERATORS]
    a, b, _ = zip(*drawn, strict=True)
    check(np.stack(a), np.stack(b), None, arithmetic)


@quick_preset
@settings(max_examples=25)
@given(
    st.sampled_from(sorted(GENERATORS)),
    st.sampled_from([BF16, FP32]),
    st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9)),
    st.integers(0, 2**32 - 1),
)
def test_any_shape_and_seed(arithmetic, name, dtype, shape, seed):
    m, k, n = shape
    a, b, c = draw_matrices(name, seed, 9, 40, 9, dtype)  # one compilation serves all shapes
    a, b = a.copy(), b.copy()
    a[m:], b[:, n:] = 0, 0
    a[:, k:] = 0
    check(a, b, c, arithmetic)


@preset
def test_mixed_fp32_operand(arithmetic):
    a, _, _ = draw_matrices("normal", 3, 20, 33, 17, FP32)
    _, b, _ = draw_matrices("normal", 3, 20, 33, 17, BF16)
    check(a, b, None, arithmetic)
    check(b.T.copy(), a.T.copy(), None, arithmetic)


@quick_preset
def test_jit_vmap_and_batch_splits_keep_bits(arithmetic):
    a, b, _ = draw_matrices("wide", 4, 6 * 5, 48, 40, BF16)
    a, b = a.reshape(6, 5, 48), b.reshape(48, 8, 5).transpose(1, 0, 2)[:6]

    def product(x, y):
        return kernels.matmul(x, y, arithmetic=arithmetic)

    whole = words(product(a, b))
    assert (words(jax.jit(product)(a, b)) == whole).all()
    assert (words(jax.vmap(product)(a, b)) == whole).all()
    assert (
        words(jax.jit(jax.vmap(jax.vmap(product, (0, None))))(a[:, :, None], b))[:, :, 0] == whole
    ).all()
    assert (words(np.stack([product(x, y) for x, y in zip(a, b, strict=True)])) == whole).all()
    shared = words(jax.vmap(product, (0, None))(a, b[0]))
    assert (shared == words(np.stack([product(x, b[0]) for x in a]))).all()


@preset
def test_rows_and_columns_are_independent(arithmetic):
    a, b, c = draw_matrices("cancelling", 5, 24, 64, 40, BF16)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(24), rng.permutation(40)
    whole = words(kernels.matmul(a, b, c, arithmetic=arithmetic))
    moved = kernels.matmul(a[rows], b[:, columns], c[rows][:, columns], arithmetic=arithmetic)
    assert (words(moved) == whole[rows][:, columns]).all()


@preset
def test_k_splits_chain_at_whole_steps(arithmetic):
    a, b, c = draw_matrices("wide", 6, 10, 96, 20, BF16)
    cut = 3 * 16
    first = kernels.matmul(a[:, :cut], b[:cut], c, arithmetic=arithmetic)
    chained = kernels.matmul(a[:, cut:], b[cut:], first, arithmetic=arithmetic)
    assert (words(chained) == words(kernels.matmul(a, b, c, arithmetic=arithmetic))).all()


FUSED = [
    kernels.ASCEND_910C,
    kernels.ASCEND_910C_CANDIDATES["late_addend"],
    kernels.NVIDIA_HOPPER,
    kernels.NVIDIA_AMPERE,
    kernels.AMD_CDNA3,
]


@pytest.mark.parametrize("arithmetic", FUSED, ids=lambda p: p.name)
def test_order_matters_between_steps_only(arithmetic):
    a, b, _ = draw_matrices("cancelling", 7, 30, 64, 30, BF16)
    rng = np.random.default_rng(0)
    width = arithmetic.products
    inside = np.concatenate([width * s + rng.permutation(width) for s in range(64 // width)])
    across = rng.permutation(64)
    orders = [np.arange(64), inside, across]
    products = kernels.matmul(  # one batch
        np.stack([a[:, order] for order in orders]),
        np.stack([b[order] for order in orders]),
        arithmetic=arithmetic,
    )
    whole, moved_inside, moved_across = words(products)
    assert (moved_inside == whole).all()
    assert (moved_across != whole).any()


SYMMETRIC = [
    kernels.ASCEND_910C,
    kernels.FP32_FMA_CHAIN,
    kernels.X86_AVX512_BF16,
    kernels.NVIDIA_HOPPER,
    kernels.AMD_CDNA1,
    kernels.AMD_CDNA2,
    kernels.ASCEND_910C_CANDIDATES["guard_2_truncate"],
]
ONE_SIDED = [kernels.AMD_CDNA3, kernels.ASCEND_910C_CANDIDATES["guard_2_floor"]]


def with_sign_and_scale(arithmetic, name):
    """Words of a product, of its negation, and of it with `a` and `c` times 2^9."""
    a, b, c = draw_matrices(name, 8, 12, 48, 20, BF16)
    c = np.zeros((12, 20), np.float32) if c is None else c
    big = BF16.type(2**9), np.float32(2**9)
    products = kernels.matmul(
        np.stack([a, -a, a * big[0]]), b, np.stack([c, -c, c * big[1]]), arithmetic=arithmetic
    )
    return np.asarray(products)


@pytest.mark.parametrize("arithmetic", SYMMETRIC + ONE_SIDED, ids=lambda p: p.name)
def test_negation_and_scaling_by_powers_of_two(arithmetic):
    for name in ("normal", "wide"):
        plain, negated, scaled = with_sign_and_scale(arithmetic, name)
        assert (words(scaled) == words(plain * np.float32(2**9))).all()
        same = words(negated) == words(-plain)
        if arithmetic in SYMMETRIC:
            assert same.all()
        elif name == "wide":  # what is cut toward minus infinity has a direction
            assert not same.all()


@pytest.mark.parametrize("arithmetic", SYMMETRIC + ONE_SIDED, ids=lambda p: p.name)
def test_every_bf16_code(arithmetic):
    """All 65,536 codes as one operand, beside a few as the other and in C."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    a = np.zeros((1 << 16, 16), BF16)
    a[:, 3] = codes
    b = np.zeros((16, 3), BF16)
    b[3] = np.array([1.0, -3.0, 2.0**-40], BF16)
    c = np.array([[-0.0, 1.0, 2.0**-149]], np.float32)
    got = words(kernels.matmul(a, b, np.repeat(c, len(a), 0), arithmetic=arithmetic))
    some = np.unique(np.concatenate([np.arange(0, 1 << 16, 97), np.arange(0x7F70, 0x7FA0)]))
    start = np.repeat(c, len(some), 0)
    expected = kernels.reference.matmul(a[some], b, start, arithmetic=arithmetic)
    assert (got[some] == words(expected)).all()
    # Alone, times one and onto -0, a code comes back: what the record's rules leave of it.
    magnitude = np.arange(1 << 16) & 0x7FFF
    normal = (magnitude >= 0x80) & (magnitude < 0x7F80)
    assert (got[normal, 0] == np.arange(1 << 16)[normal] << 16).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_dimensions(shape):
    m, k, n = shape
    c = np.full((4, m, n), 2.5, np.float32)
    a, b = np.zeros((4, m, k), BF16), np.zeros((k, n), BF16)
    assert kernels.matmul(a, b).shape == (4, m, n)
    assert (words(kernels.matmul(a, b, c)) == words(c)).all()
    assert kernels.matmul(a[:0], b).shape == (0, m, n)


def test_narrow_output_rounds_once():
    a, b, _ = draw_matrices("normal", 10, 20, 64, 20, BF16)
    wide = np.asarray(kernels.matmul(a, b))
    narrow = np.asarray(kernels.matmul(a, b, out_dtype=jnp.bfloat16))
    assert narrow.dtype == BF16
    assert (narrow.view(np.uint16) == wide.astype(BF16).view(np.uint16)).all()


@pytest.mark.parametrize("key,beyond", [("default", np.inf), ("saturation", None)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_is_beyond_a_narrow_output(key, beyond, dtype):
    unit = kernels.ASCEND_910C_CANDIDATES[key]
    largest = jnp.finfo(dtype).max
    beyond = beyond or float(largest)
    a, b = jnp.array([[largest], [-largest], [1]]), jnp.array([[largest]])

    def product(a, b):
        return kernels.matmul(a, b, arithmetic=unit, out_dtype=dtype)

    out, pull = jax.vjp(product, a, b)
    assert out[:, 0].tolist() == [beyond, -beyond, float(largest)]
    rows = kernels.dot_general(a, b, (((1,), (0,)), ((), ())), arithmetic=unit)
    assert rows[:, 0].tolist() == [beyond, -beyond, float(largest)]
    if dtype == jnp.float16:  # what is beyond BF16 is beyond the FP32 mode, too
        to_a, _ = pull(jnp.array([[2], [-2], [1]], dtype))
        assert to_a[:, 0].tolist() == [beyond, -beyond, float(largest)]


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_of_pythons_are_fp32(x64):
    with jax.enable_x64(x64):
        for one, half in ((1, 0.5), (1.0, 0.5)):
            got = kernels.matmul([[one, one]], [[half], [half]], one)
            assert got.dtype == jnp.float32
            assert got == 2
        assert kernels.matmul(np.ones((1, 2), np.int8), np.ones((2, 1), np.int8), 3) == 5


def test_gradient_is_that_of_a_product():
    a, b, c = (jnp.asarray(x) for x in draw_matrices("normal", 11, 5, 24, 6, BF16))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)), jnp.float32)

    def loss(a, b, c):
        return jnp.sum(kernels.matmul(a, b, c) * weight)

    to_a, to_b, to_c = jax.jit(jax.grad(loss, (0, 1, 2)))(a, b, c)
    mode = kernels.ASCEND_910C
    expected = kernels.matmul(weight, b.astype(jnp.float32).T, arithmetic=mode, out_dtype=a.dtype)
    assert (np.asarray(to_a).view(np.uint16) == np.asarray(expected).view(np.uint16)).all()
    expected = kernels.matmul(a.astype(jnp.float32).T, weight, arithmetic=mode, out_dtype=b.dtype)
    assert (np.asarray(to_b).view(np.uint16) == np.asarray(expected).view(np.uint16)).all()
    assert (words(to_c) == words(weight)).all()
    assert np.abs(np.asarray(to_a, np.float32)).max() > 0.1


def test_forward_derivatives_are_sums_of_products():
    a, b, c, da, db, dc = (
        jnp.asarray(x) for seed in (11, 12) for x in draw_matrices("normal", seed, 5, 24, 6, BF16)
    )

    def product(a, b, c):
        return kernels.matmul(a, b, c)

    out, tangent = jax.jit(lambda *v: jax.jvp(product, v[:3], v[3:]))(a, b, c, da, db, dc)
    assert (words(out) == words(product(a, b, c))).all()
    assert (words(tangent) == words(dc + kernels.matmul(da, b) + kernels.matmul(a, db))).all()
    _, of_b = jax.jvp(lambda b: product(a, b, c), (b,), (db,))
    assert (words(of_b) == words(kernels.matmul(a, db))).all()
    (back,) = jax.linear_transpose(lambda a: kernels.matmul(a, b), a)(c)
    _, pull = jax.vjp(lambda a: kernels.matmul(a, b), a)
    assert (back == pull(c)[0]).all() and back.dtype == a.dtype


@pytest.mark.parametrize("unit", [kernels.ASCEND_910C, kernels.NVIDIA_HOPPER], ids=lambda u: u.name)
def test_second_derivatives(unit):
    x, w = (jnp.asarray(v, jnp.float32) for v in draw_matrices("normal", 3, 1, 4, 4, FP32)[:2])

    def loss(product):
        return lambda x: jnp.sum(jnp.tanh(product(jnp.tanh(product(x, w)), w)))

    found = jax.hessian(loss(lambda x, y: kernels.matmul(x, y, arithmetic=unit)))(x)
    want = jax.hessian(loss(lambda x, y: jnp.matmul(x, y, precision="highest")))(x)
    np.testing.assert_allclose(found, want, atol=1e-2 * np.abs(want).max())
    rows = jax.vmap(jax.jacfwd(loss(lambda x, y: kernels.matmul(x, y, arithmetic=unit))))(x[None])
    assert rows.shape == (1, *x.shape)


A, B = np.zeros((2, 4), BF16), np.zeros((4, 3), BF16)
I8 = np.zeros((4, 4), np.int8)
BAD_CALLS = [
    ((A, A), {}, ValueError, "last axis of a"),
    ((A, B[:, 0]), {}, ValueError, r"expected a\[..., m, k\] and b\[..., k, n\], got"),
    ((A[0], B), {}, ValueError, "last axis of a"),
    ((np.zeros((2, 2, 4), BF16), np.zeros((3, 4, 3), BF16)), {}, ValueError, "batch dimensions"),
    ((A, B, np.zeros((3, 3), np.float32)), {}, ValueError, r"c of shape \(2, 3\)"),
    ((A, B, np.zeros((1, 2, 3), np.float32)), {}, ValueError, r"c of shape \(2, 3\)"),
    ((A, B, np.zeros((2, 3), BF16)), {}, TypeError, "c in float32, got bfloat16"),
    ((A, B, np.zeros((2, 3))), {}, TypeError, "expected c in .*, got float64"),
    ((I8, I8, np.zeros((4, 4), np.float32)), {}, TypeError, "c in int32, got float32"),
    ((I8, I8, np.zeros((4, 4), np.int64)), {}, TypeError, "expected c in .*, got int64"),
    ((A, B.astype(np.float16)), {}, TypeError, "one dtype"),
    ((A, np.zeros((4, 3), np.int32)), {}, TypeError, "int32"),
    ((A, B.astype(np.float64)), {}, TypeError, "got .*float64"),
    ((A, B), {"tiling": ()}, TypeError, "kernels.Tiling, got"),
    ((A, B), {"arithmetic": "NVIDIA_HOPPER"}, TypeError, "kernels.Arithmetic, got 'NVIDIA_HOPPER'"),
    ((A, B), {"arithmetic": kernels.NVIDIA_VOLTA}, TypeError, "NVIDIA_VOLTA takes"),
]


@pytest.mark.parametrize(
    "function", [kernels.reference.matmul, kernels.matmul], ids=["reference", "twin"]
)
@pytest.mark.parametrize("operands,options,error,message", BAD_CALLS)
def test_bad_calls_are_named(operands, options, error, message, function):
    with pytest.raises(error, match=message):
        function(*operands, **{"arithmetic": kernels.ASCEND_910C} | options)


def test_what_cannot_come_out_is_refused_before_any_work(monkeypatch):
    module = importlib.import_module("kernels.matmul")  # kernels.matmul is the function
    monkeypatch.setattr(module, "multiply", lambda *_: pytest.fail("work was done"))
    for operands, out_dtype in (
        ((A, B), jnp.int32),
        ((A, B), np.float64),
        ((I8, I8), jnp.float32),
    ):
        with pytest.raises(TypeError, match="out_dtype"):
            kernels.matmul(*operands, out_dtype=out_dtype)
    with pytest.raises(TypeError, match="expected out_dtype in .*, got junk"):
        kernels.matmul(A, B, out_dtype="junk")
    with pytest.raises(TypeError, match="expected a to be an array, got NoneType"):
        kernels.matmul(None, B)


@pytest.mark.parametrize("unit", kernels.PRESETS.values(), ids=lambda unit: unit.name)
@pytest.mark.parametrize("tiling", [None, kernels.Tiling(base_m=2, base_n=2, base_k=4, split_k=2)])
def test_every_unit_within_a_shard_map_that_checks_what_varies(unit, tiling):
    kind = "bfloat16" if "bfloat16" in unit.dtypes else unit.dtypes[0]
    a, b = jax.ShapeDtypeStruct((4, 40), kind), jax.ShapeDtypeStruct((40, 6), kind)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def product(a, b):
        return kernels.matmul(a, b, arithmetic=unit, tiling=tiling)

    inside = jax.shard_map(product, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    jax.jit(inside).lower(a, b)


@pytest.mark.parametrize("divided", [(P("x"), P(), P("x")), (P(), P(None, "x"), P(None, "x"))])
def test_within_a_shard_map_that_checks_what_varies(divided):
    """One operand varies over the mesh, the other does not; the derivatives keep to that."""
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.normal(size=(4, 40)), jnp.bfloat16)
    b = jnp.asarray(rng.normal(size=(40, 6)), jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(
        kernels.matmul, mesh=mesh, in_specs=divided[:2], out_specs=divided[2], check_vma=True
    )
    assert np.array_equal(words(inside(a, b)), words(kernels.matmul(a, b)))

    def gradients(product):
        return jax.grad(lambda a, b: product(a, b).sum(), (0, 1))(a, b)

    for found, expected in zip(gradients(inside), gradients(kernels.matmul), strict=True):
        assert np.array_equal(found, expected)
