"""Additions and roundings that keep subnormals, against NumPy and ml_dtypes, bit by bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import fixpipe, floats
from tests.kernel_inputs import BF16, FP16, FP32, from_bits

dtypes = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda d: d.name)
# Exponent fields cut down to the lowest ones, so that most sums are subnormal.
LOW = {BF16: 0x83FF, FP16: 0x8FFF, FP32: 0x83FFFFFF}
UNSIGNED = {BF16: np.uint16, FP16: np.uint16, FP32: np.uint32}


def same(x, y) -> np.ndarray:
    """Equal bits, or NaN on both sides."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    unsigned = UNSIGNED[x.dtype]
    both_nan = np.isnan(x.astype(np.float32)) & np.isnan(y.astype(np.float32))
    return (x.view(unsigned) == y.view(unsigned)) | both_nan


def numpy_sum(x, y):
    with np.errstate(all="ignore"):
        return x + y


@dtypes
@pytest.mark.parametrize("low", [False, True])
def test_add_of_raw_bits(dtype, low):
    x, y = from_bits(np.random.default_rng(3), (2, 200_000), dtype)
    if low:
        mask = UNSIGNED[dtype](LOW[dtype])
        x, y = ((z.view(mask.dtype) & mask).view(dtype) for z in (x, y))
    assert same(floats.add(jnp.asarray(x), jnp.asarray(y)), numpy_sum(x, y)).all()
    assert same(jax.jit(floats.add)(x, y), numpy_sum(x, y)).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: d.name)
def test_add_of_every_word_and_a_few(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    for word in (0x0000, 0x8000, 0x0001, 0x8001, 0x0080, 0x3F80, 0x3C00, 0x7BFF, 0x7F7F, 0xFF80):
        other = np.full_like(every, np.array(word, np.uint16).view(dtype))
        assert same(
            floats.add(jnp.asarray(every), jnp.asarray(other)), numpy_sum(every, other)
        ).all()


@dtypes
@given(data=st.data())
def test_add_law(dtype, data):
    bits = st.integers(0, (1 << 8 * dtype.itemsize) - 1)
    near = data.draw(
        st.lists(st.tuples(bits, st.integers(-3, 3), st.booleans()), min_size=8, max_size=8)
    )
    top = 8 * dtype.itemsize - 1
    x = np.array([word for word, _, _ in near], UNSIGNED[dtype])
    y = np.array([(word + d) % (1 << top) | flip << top for word, d, flip in near], UNSIGNED[dtype])
    x, y = x.view(dtype), y.view(dtype)
    assert same(floats.add(jnp.asarray(x), jnp.asarray(y)), numpy_sum(x, y)).all()


def test_add_results_are_quiet_and_differentiable():
    nan = np.array([0x7F800001], np.uint32).view(np.float32)
    total = np.asarray(floats.add(jnp.asarray(nan), jnp.ones(1))).view(np.uint32)
    assert total[0] & 0x400000
    x = jnp.asarray([1.0, 2.0], jnp.bfloat16)
    gradient = jax.grad(lambda x: floats.add(x, x).astype(jnp.float32).sum())(x)
    assert gradient.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: d.name)
def test_round_to_around_every_word(dtype):
    """Each value, and the middle between it and the next, and their FP32 neighbours."""
    values = (
        np.arange(0x7C00 if dtype == FP16 else 0x7F80, dtype=np.uint16)
        .view(dtype)
        .astype(np.float32)
    )
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    bits = np.concatenate([values, middles]).view(np.uint32).astype(np.int64)
    bits = np.concatenate([bits - 1, bits, bits + 1]).clip(0, 0x7F800000).astype(np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(1 << 31)])
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = x.astype(dtype)
    assert same(fixpipe.round_to(jnp.asarray(x), dtype), expected).all()
    assert same(jax.jit(lambda x: fixpipe.round_to(x, dtype))(x), expected).all()


def test_round_to_specials():
    x = np.array(
        [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0x7F7FFFFF], np.uint32
    )
    for dtype in (BF16, FP16):
        with np.errstate(all="ignore"):
            expected = x.view(np.float32).astype(dtype)
        assert same(fixpipe.round_to(jnp.asarray(x.view(np.float32)), dtype), expected).all()
        expected[-1] = ml_dtypes.finfo(dtype).max  # the only finite one
        got = fixpipe.round_to(jnp.asarray(x.view(np.float32)), dtype, "saturate")
        assert same(got, expected).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: d.name)
def test_widening_is_exact(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    assert same(floats.to_float32(jnp.asarray(every)), every.astype(np.float32)).all()
    with jax.enable_x64(True):
        bits = floats.bits32(jnp.asarray(every))
        wide = np.asarray(floats.to_float64(bits))
    with np.errstate(all="ignore"):
        expected = every.astype(np.float64)
    assert np.array_equal(wide, expected, equal_nan=True)


def test_wrong_dtypes_are_named():
    with pytest.raises(TypeError, match="two equal dtypes"):
        floats.add(jnp.ones(2, jnp.bfloat16), jnp.ones(2))
    with pytest.raises(TypeError, match="int32"):
        floats.add(jnp.ones(2, jnp.int32), jnp.ones(2, jnp.int32))
    with pytest.raises(TypeError, match="float32"):
        fixpipe.round_to(jnp.ones(2, jnp.bfloat16), jnp.bfloat16)
    with pytest.raises(TypeError, match="int8"):
        fixpipe.round_to(jnp.ones(2), jnp.int8)
