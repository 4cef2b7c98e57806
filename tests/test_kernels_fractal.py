"""Fractal layouts put each element where the vendor's convention says, and change no bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import fractal
from kernels.fractal import from_fractal, mmad, to_fractal
from tests.kernel_inputs import BF16, FP16, FP32, draw_matrices, from_bits, words

INT8 = np.dtype(np.int8)
layouts = pytest.mark.parametrize("layout", ["nd", "nz", "zz", "zn"])


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


@settings(max_examples=12)
@given(
    st.sampled_from(fractal.LAYOUTS),
    st.sampled_from([BF16, FP16, FP32, INT8, np.dtype(ml_dtypes.float8_e4m3fn)]),
    st.sampled_from([(), (2,), (2, 3)]),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_of_every_bit_pattern(layout, dtype, batch, shape, seed):
    x = from_bits(np.random.default_rng(seed), (*batch, *shape), dtype)
    there = to_fractal(jnp.asarray(x), layout)
    back = from_fractal(there, layout, shape)
    assert back.dtype == dtype and (bits(back) == bits(x)).all()
    filled = np.asarray(there).size - x.size
    assert np.count_nonzero(bits(there)) == np.count_nonzero(bits(x)) and filled >= 0


def index_of(layout, i, j, rows, columns):
    """Where element (i, j) lies: by rows or by columns inside a fractal, and of fractals."""
    (i1, i0), (j1, j0) = divmod(i, rows), divmod(j, columns)
    return {
        "nz": (j1, i1, i0, j0),  # fractals column by column, inside row by row
        "zz": (i1, j1, i0, j0),  # both row by row
        "zn": (i1, j1, j0, i0),  # fractals row by row, inside column by column
    }[layout]


@pytest.mark.parametrize("dtype", [BF16, FP32, INT8], ids=lambda d: d.name)
@pytest.mark.parametrize("layout", ["nz", "zz", "zn"])
def test_where_every_element_lies(layout, dtype):
    edge = 32 // dtype.itemsize
    rows, columns = (edge, 16) if layout == "zn" else (16, edge)
    h, w = 2 * rows + 3, 3 * columns - 5
    x = np.arange(h * w).reshape(h, w).astype(dtype)
    there = np.asarray(to_fractal(jnp.asarray(x), layout))
    expected = np.zeros(there.shape, dtype)
    for i in range(h):
        for j in range(w):
            expected[index_of(layout, i, j, rows, columns)] = x[i, j]
    assert (bits(there) == bits(expected)).all()
    assert there[(0,) * there.ndim].nbytes * rows * columns == 512


def test_accumulators_lie_in_fractals_of_16_by_16():
    x = jnp.arange(20 * 40, dtype=jnp.float32).reshape(20, 40)
    assert to_fractal(x, "nz").shape == (5, 2, 16, 8)
    there = to_fractal(x, "nz", edge=16)
    assert there.shape == (3, 2, 16, 16) and there[1, 0, 2, 3] == x[2, 19]
    assert (from_fractal(there, "nz", (20, 40), edge=16) == x).all()


@layouts
def test_moving_is_linear(layout):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 35)), jnp.float32)
    there = to_fractal(x, layout)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=there.shape), jnp.float32)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(to_fractal(x, layout) * weight)))(x)
    assert (slope == from_fractal(weight, layout, x.shape)).all()
    batch = jnp.stack([x, 2 * x])
    assert (jax.vmap(lambda x: to_fractal(x, layout))(batch) == to_fractal(batch, layout)).all()


@pytest.mark.parametrize(("dtype", "with_c"), [(BF16, True), (FP32, False)])
def test_mmad_has_the_bits_of_matmul(dtype, with_c):
    m, k, n = 32, 48, 80
    a, b, c = draw_matrices("tiny_with_zeros", 3, m, k, n, dtype)
    c = c if with_c else None
    out = mmad(
        to_fractal(jnp.asarray(a), "zz"),
        to_fractal(jnp.asarray(b), "zn"),
        to_fractal(jnp.asarray(c), "nz", edge=16) if with_c else None,
        arithmetic=kernels.NVIDIA_HOPPER,
    )
    assert out.shape == (5, 2, 16, 16)
    expected = kernels.matmul(a, b, c, arithmetic=kernels.NVIDIA_HOPPER)
    assert (words(from_fractal(out, "nz", (m, n), edge=16)) == words(expected)).all()


def test_mmads_chain_through_l0c():
    a, b, _ = draw_matrices("wide", 4, 16, 64, 32, BF16)
    first, second = (
        (to_fractal(jnp.asarray(x), "zz"), to_fractal(jnp.asarray(y), "zn"))
        for x, y in ((a[:, :32], b[:32]), (a[:, 32:], b[32:]))
    )
    unit = kernels.NVIDIA_HOPPER
    chained = mmad(*second, mmad(*first, arithmetic=unit), arithmetic=unit)
    out = from_fractal(chained, "nz", (16, 32), edge=16)
    assert (words(out) == words(kernels.matmul(a, b, arithmetic=unit))).all()


@pytest.mark.parametrize(("dtype", "k0"), [(jnp.int8, 32), (jnp.int4, 64)])
def test_mmad_of_integers(dtype, k0):
    rng = np.random.default_rng(5)
    least, end = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max + 1
    a, b = rng.integers(least, end, (20, 70)), rng.integers(least, end, (70, 10))
    left, right = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    zz, zn = to_fractal(left, "zz"), to_fractal(right, "zn")
    assert zz.shape == (2, -(-70 // k0), 16, k0) and zn.shape == (-(-70 // k0), 1, 16, k0)
    assert (from_fractal(zz, "zz", (20, 70)) == left).all()
    out = mmad(zz, zn)
    assert out.dtype == jnp.int32
    assert (np.asarray(from_fractal(out, "nz", (20, 10), edge=16)) == a @ b).all()


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (
            (zeros(8, 17, 16, 16), zeros(17, 4, 16, 16)),
            "a takes 69632 bytes, 4096 more than L0A has .65536.",
        ),
        (
            (zeros(4, 8, 16, 16), zeros(8, 17, 16, 16)),
            "b takes 69632 bytes, 4096 more than L0B has .65536.",
        ),
        (
            (zeros(16, 1, 16, 16), zeros(1, 16, 16, 16)),
            "the result takes 262144 bytes, 131072 more than L0C has .131072.",
        ),
        ((zeros(2, 3, 16, 16), zeros(4, 2, 16, 16)), "3 fractals along k, .* has 4"),
        ((zeros(32, 48), zeros(3, 2, 16, 16)), r"expected a in fractals \[..., 16, 16\] of bfl"),
        (
            (zeros(2, 3, 16, 8, dtype=jnp.float32), zeros(3, 2, 16, 16)),
            r"expected b in fractals \[..., 16, 8\] of float32, got bfloat16",
        ),
        (
            (zeros(2, 3, 16, 16), zeros(3, 5, 16, 16), zeros(2, 5, 16, 16, dtype=jnp.float32)),
            r"expected c in fractals \[..., 5, 2, 16, 16\], got \(2, 5, 16, 16\)",
        ),
    ],
)
def test_what_mmad_refuses(operands, message):
    with pytest.raises(ValueError, match=message):
        mmad(*operands)


def test_what_layouts_refuse():
    x = zeros(20, 40)
    with pytest.raises(ValueError, match="layout must be one of .* got 'zN'"):
        to_fractal(x, "zN")
    with pytest.raises(ValueError, match=r"expected x\[..., h, w\], got shape \(5,\)"):
        to_fractal(zeros(5), "nz")
    with pytest.raises(ValueError, match=r"has shape \[..., 3, 2, 16, 16\], got \(2, 3, 16, 16\)"):
        from_fractal(to_fractal(x, "zz"), "nz", (20, 40))
    with pytest.raises(TypeError, match="1, 2 or 4 bytes, got complex64"):
        to_fractal(zeros(4, 4, dtype=jnp.complex64), "nz")
