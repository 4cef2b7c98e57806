"""`kernels.dot_general` means what `lax.dot_general` means, with the unit's bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kernels
from tests.kernel_inputs import words

UNIT = kernels.ASCEND_910C


def dot(*args, **kwargs):
    return kernels.dot_general(*args, arithmetic=UNIT, **kwargs)


def random(seed, shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


CASES = {
    "plain": ((5, 20), (20, 7), (((1,), (0,)), ((), ()))),
    "transposed": ((20, 5), (7, 20), (((0,), (1,)), ((), ()))),
    "batch": ((3, 5, 20), (3, 20, 7), (((2,), (1,)), ((0,), (0,)))),
    "two batches, two free": ((3, 5, 2, 20, 4), (20, 2, 6, 3), (((3,), (0,)), ((0, 2), (3, 1)))),
    "two contracted": ((4, 3, 5, 6), (6, 7, 4, 5), (((2, 3), (3, 0)), ((0,), (2,)))),
    "two contracted, swapped": ((4, 3, 5, 6), (6, 7, 4, 5), (((3, 2), (0, 3)), ((0,), (2,)))),
    "vectors": ((20,), (20,), (((0,), (0,)), ((), ()))),
    "outer": ((4,), (6,), (((), ()), ((), ()))),
    "empty k": ((4, 0), (0, 6), (((1,), (0,)), ((), ()))),
    "empty m": ((0, 8), (8, 6), (((1,), (0,)), ((), ()))),
    "empty batch": ((0, 2, 8), (0, 8, 6), (((2,), (1,)), ((0,), (0,)))),
}


@pytest.mark.parametrize("case", CASES)
def test_dimension_numbers(case):
    left, right, numbers = CASES[case]
    x, y = random(1, left), random(2, right)
    got = dot(x, y, numbers, preferred_element_type=jnp.float32)
    expected = lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = np.abs(np.asarray(expected)).max(initial=1)
    # Two FP32 summations of at most 30 products differ by less than 60 ulp of the largest sum.
    assert np.abs(np.asarray(got) - np.asarray(expected)).max(initial=0) <= 60 * 2.0**-23 * scale


def test_contracting_dimensions_flatten_first_slowest():
    x, y = random(3, (8, 9, 10)), random(4, (9, 10, 6))
    flat = kernels.matmul(x.reshape(8, 90), y.reshape(90, 6), arithmetic=UNIT)
    got = dot(x, y, (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    assert (words(got) == words(flat)).all()
    other = dot(x, y, (((2, 1), (1, 0)), ((), ())), preferred_element_type=jnp.float32)
    assert (words(other) != words(flat)).any()


MATRIX = (((1,), (0,)), ((), ()))


def test_output_dtypes():
    x, y = random(5, (6, 40)), random(6, (40, 5))
    full = dot(x, y, MATRIX, preferred_element_type=jnp.float32)
    narrow = dot(x, y, MATRIX)
    assert narrow.dtype == jnp.bfloat16
    assert (
        np.asarray(narrow).view(np.uint16) == np.asarray(full).astype(narrow.dtype).view(np.uint16)
    ).all()
    assert dot(x, y.astype(jnp.float32), MATRIX).dtype == jnp.float32
    assert dot(x, y.astype(jnp.float16), MATRIX).dtype == jnp.float32


def test_a_float32_operand_selects_fp32_mode():
    x, y = random(7, (6, 40)), random(8, (40, 5))
    mixed = dot(x.astype(jnp.float32), y, MATRIX)
    expected = kernels.reference.matmul(
        np.asarray(x, np.float32), np.asarray(y, np.float32), arithmetic=UNIT.fp32
    )
    assert (words(mixed) == words(expected)).all()
    assert (words(mixed) != words(dot(x, y, MATRIX, preferred_element_type=jnp.float32))).any()


def test_integers_are_exact_and_wide_types_pass_through():
    x = jnp.arange(-60, 60, dtype=jnp.int8).reshape(4, 30)
    got = dot(x, x.T, MATRIX, preferred_element_type=jnp.int32)
    assert (np.asarray(got) == np.asarray(x, np.int64) @ np.asarray(x, np.int64).T).all()
    nibbles = (x % 16 - 8).astype(jnp.int4)
    exact = np.asarray(nibbles, np.int64) @ np.asarray(nibbles, np.int64).T
    for wanted, least in ((jnp.int32, -(2**31)), (jnp.int8, -128), (jnp.int4, -8), (None, -8)):
        got = dot(nibbles, nibbles.T, MATRIX, preferred_element_type=wanted)
        assert got.dtype == (wanted or jnp.int4)
        assert (np.asarray(got, np.int64) == (exact - least) % (-2 * least) + least).all()
    z = random(9, (3, 4), jnp.float32) + 1j * random(10, (3, 4), jnp.float32)
    assert dot(z, z.T, MATRIX).dtype == jnp.complex64
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 4))
        for other in (x, x.astype(np.float32)):
            got = dot(jnp.asarray(x), jnp.asarray(other.T), MATRIX)
            np.testing.assert_allclose(np.asarray(got), x @ other.T, rtol=1e-14)


def test_float8_is_not_modelled():
    x = jnp.ones((4, 4), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        dot(x, x, MATRIX)


def test_gradient_uses_the_unit():
    x, y = random(11, (6, 40)), random(12, (40, 5))

    def loss(dot, x, y):
        return jnp.sum(dot(x, y, MATRIX, preferred_element_type=jnp.float32) ** 2)

    ours = jax.grad(lambda x, y: loss(dot, x, y), (0, 1))(x, y)
    native = jax.grad(lambda x, y: loss(lax.dot_general, x, y), (0, 1))(x, y)
    for left, right in zip(ours, native, strict=True):
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        # One BF16 rounding on each side of sums that differ in FP32.
        assert np.abs(left - right).max() <= 2.0**-7 * np.abs(right).max()
        assert np.abs(left).max() > 1


def test_precision():
    x, y = random(13, (6, 40), jnp.float32), random(14, (40, 5), jnp.float32)

    def bits(arithmetic, precision):
        return words(kernels.dot_general(x, y, MATRIX, arithmetic=arithmetic, precision=precision))

    chain = bits(kernels.FP32_FMA_CHAIN, None)
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert (bits(kernels.NVIDIA_HOPPER, highest) == chain).all()
    assert (bits(kernels.NVIDIA_HOPPER, None) != chain).any()
    assert (bits(UNIT, highest) == bits(UNIT, None)).all()
    reduced = lax.DotAlgorithmPreset.TF32_TF32_F32
    hf32 = bits(kernels.ASCEND_910C_HF32, None)
    assert (bits(UNIT, reduced) == hf32).all() and (bits(UNIT, None) != hf32).any()
    assert (bits(kernels.ASCEND_910C_HF32, highest) == bits(UNIT, None)).all()
    assert (bits(kernels.NVIDIA_HOPPER, reduced) == bits(kernels.NVIDIA_HOPPER, None)).all()
    full = lax.DotAlgorithmPreset.F32_F32_F32
    assert (bits(kernels.ASCEND_910C_HF32, full) == bits(UNIT, None)).all()
    with pytest.raises(NotImplementedError, match="BF16_BF16_F32_X3"):
        bits(UNIT, lax.DotAlgorithmPreset.BF16_BF16_F32_X3)


def test_algorithms_that_narrow_their_operands(monkeypatch):
    """`jax.nn.dot_product_attention` asks for them, also where gradients make operands FP32."""
    x, y = random(15, (6, 40), jnp.float32), random(16, (40, 5), jnp.float32)
    seen = []

    def multiply(a, b, c, arithmetic, tiling):
        seen.append((a[0], b[0], arithmetic))
        return jnp.zeros((1, 6, 5), jnp.float32)

    monkeypatch.setattr("kernels.dot.multiply", multiply)
    for name, dtype in (("BF16_BF16_F32", jnp.bfloat16), ("F16_F16_F32", jnp.float16)):
        for a, b in ((x, y), (x.astype(dtype), y)):
            out = kernels.dot_general(
                a, b, MATRIX, arithmetic=UNIT, precision=lax.DotAlgorithmPreset[name]
            )
            assert out.dtype == jnp.float32
            left, right, mode = seen.pop()
            assert mode == UNIT.mode(jnp.dtype(dtype).name, jnp.dtype(dtype).name, "default")
            for got, want in ((left, x), (right, y)):
                assert got.dtype == dtype
                narrow = np.asarray(want.astype(dtype)).view(np.uint16)
                assert np.array_equal(np.asarray(got).view(np.uint16), narrow)


@pytest.mark.parametrize("unit", [UNIT, kernels.X86_AVX512_BF16], ids=lambda unit: unit.name)
def test_operands_that_lie_the_other_way_round_give_the_same_bits(unit):
    x, y = (np.array(random(seed, (3, 24, 18)), np.float32) for seed in (9, 10))
    x[0, 3, 4], y[1, 5, 6], x[2, 7, 8], y[2, 7, 9] = np.inf, -np.inf, np.nan, np.nan
    x, y = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    # Two NaNs with words of their own: a unit may let one of them, that of `lhs`, through.
    bits = lax.bitcast_convert_type(y, jnp.uint16) | jnp.where(jnp.isnan(y), jnp.uint16(0x8001), 0)
    y = lax.bitcast_convert_type(bits.astype(jnp.uint16), y.dtype)
    options = {"arithmetic": unit, "preferred_element_type": jnp.float32}
    lying = kernels.dot_general(x, y.swapaxes(1, 2), (((1,), (2,)), ((0,), (0,))), **options)
    plain = kernels.dot_general(x.swapaxes(1, 2), y, (((2,), (1,)), ((0,), (0,))), **options)
    assert lying.shape == plain.shape
    assert (words(lying) == words(plain)).all()
