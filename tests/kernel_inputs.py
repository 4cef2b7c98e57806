"""Inputs that catch mistakes in a matrix unit's arithmetic, and the comparison of bits.

Normal random data hide most mistakes; cancellation, wide exponents, tiny sums and subnormals find
them.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

BF16, FP16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)

Operands = tuple[NDArray, NDArray, NDArray | None]
"""`a[rows, k]`, `b[rows, k]` (one dot product per row) and `c[rows]` or None, as FP64 or bit-exact
arrays.
"""


def words(x) -> NDArray[np.uint32]:
    """FP32 bit patterns, compared in NumPy because XLA takes subnormals for zeros."""
    x = np.asarray(x)
    assert x.dtype == np.float32
    return x.view(np.uint32)


def from_bits(rng: Generator, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    return rng.integers(0, 256, shape + (dtype.itemsize,), dtype=np.uint8).view(dtype)[..., 0]


def normal(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    a, b = rng.normal(size=(2, rows, k)).astype(np.float32).astype(dtype)
    return a, b, rng.uniform(size=rows).astype(np.float32)


def normal_without_c(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    a, b, _ = normal(rng, rows, k, dtype)
    return a, b, None


def wide(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    span = 5 if dtype == FP16 else 12
    scale = 2.0 ** rng.integers(-span, span + 1, (2, rows, k))
    a, b = (rng.normal(size=(2, rows, k)) * scale).astype(dtype)
    return a, b, (rng.normal(size=rows) * 2.0 ** rng.integers(-24, 25, rows)).astype(np.float32)


def cancelling(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    """Pairs that cancel, in any order, and a small residue."""
    half = k // 2
    a, b = rng.normal(size=(2, rows, k)) * 2.0 ** rng.integers(0, 6, (2, rows, k))
    a[:, half : 2 * half], b[:, half : 2 * half] = -a[:, :half], b[:, :half]
    a[:, 0] *= 1 + 2.0**-7
    a[:, -1] *= 2.0 ** -rng.integers(8, 20, rows)
    order = rng.permuted(np.tile(np.arange(k), (rows, 1)), axis=1)
    a, b = np.take_along_axis(a, order, 1).astype(dtype), np.take_along_axis(b, order, 1)
    return (
        a,
        b.astype(dtype),
        (rng.normal(size=rows) * 2.0 ** -rng.integers(0, 30, rows)).astype(np.float32),
    )


def raw_finite(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    a, b = from_bits(rng, (2, rows, k), dtype)
    c = from_bits(rng, (rows,), FP32)
    return tuple(np.where(np.isfinite(x.astype(np.float32)), x, x.dtype.type(0)) for x in (a, b, c))


def raw(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    a, b = from_bits(rng, (2, rows, k), dtype)
    return a, b, from_bits(rng, (rows,), FP32)


def tiny_sums(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    """Products near 2^-149, where results are subnormal or vanish (FP16: as low as it goes)."""
    low = 11 if dtype == FP16 else 74
    scale = 2.0 ** -rng.integers(low - 2, low + 3, (2, rows, k))
    a, b = (rng.normal(size=(2, rows, k)) * scale).astype(dtype)
    return a, b, None


def tiny_with_zeros(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    a, b, _ = tiny_sums(rng, rows, k, dtype)
    a = np.where(rng.random((rows, k)) < 0.5, dtype.type(0), a)
    c = rng.integers(0, 1 << 23, rows, dtype=np.uint32) | (
        rng.integers(0, 2, rows, dtype=np.uint32) << 31
    )
    return a, b, c.view(np.float32)


def subnormal_inputs(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    fraction = {BF16: 7, FP16: 10, FP32: 23}[dtype]
    unsigned = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    sign = rng.integers(0, 2, (rows, k)) << (8 * dtype.itemsize - 1)
    a = (rng.integers(0, 1 << fraction, (rows, k)) | sign).astype(unsigned).view(dtype)
    span = 5 if dtype == FP16 else 20
    b = (rng.normal(size=(rows, k)) * 2.0 ** rng.integers(-span, span + 1, (rows, k))).astype(dtype)
    return a, b, None


def specials(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    """Ordinary values with a few infinities, NaNs, zeros of both signs and largest numbers."""
    a, b, c = normal(rng, rows, k, dtype)
    values = [np.inf, -np.inf, np.nan, 0.0, -0.0, float(ml_dtypes.finfo(dtype).max)]
    for x in (a, b):
        place = rng.random(x.shape) < 1 / k
        x[place] = rng.choice(values, np.count_nonzero(place)).astype(dtype)
    place = rng.random(rows) < 0.2
    c[place] = rng.choice(values[:5], np.count_nonzero(place))
    return a, b, c


def zeros(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    """Zeros of both signs, and sums that are exactly zero."""
    a, b = rng.choice([0.0, -0.0, 1.0, -1.0], (2, rows, k), p=[0.4, 0.4, 0.1, 0.1]).astype(dtype)
    c = rng.choice([0.0, -0.0, 1.0, -1.0], rows).astype(np.float32)
    a[: rows // 8], b[: rows // 8], c[: rows // 8] = -0.0, 1.0, -0.0  # nothing but -0
    c[: rows // 16] = np.float32(-(2.0**-149))  # or what is read as such
    return a, b, c


def ties(rng: Generator, rows: int, k: int, dtype: np.dtype) -> Operands:
    """Sums at or next to the middle of two FP32 numbers: a few bits around 2^24 and a far one."""
    a = rng.choice([0.0, 1.0, -1.0, 3.0], (rows, k))
    b = rng.choice([1.0, 2.0**-1, 2.0**-13, 2.0**-14], (rows, k)) * rng.integers(1, 4, (rows, k))
    a[:, k // 2] = rng.choice([0.0, 2.0**-14, -(2.0**-14)], rows)
    b[:, k // 2] = 2.0 ** -rng.integers(0, 15 if dtype == FP16 else 60, rows)
    a, b = a.astype(dtype), b.astype(dtype)
    return a, b, (rng.integers(1, 1 << 24, rows) * 2.0**-12).astype(np.float32)


GENERATORS: dict[str, Callable[[Generator, int, int, np.dtype], Operands]] = {
    fun.__name__: fun
    for fun in (
        normal,
        normal_without_c,
        wide,
        cancelling,
        raw_finite,
        raw,
        tiny_sums,
        tiny_with_zeros,
        subnormal_inputs,
        specials,
        zeros,
        ties,
    )
}


def draw(name: str, seed: int, rows: int, k: int, dtype: np.dtype) -> Operands:
    """Batches of one dot product each: `a[rows, 1, k]`, `b[rows, k, 1]`, `c[rows, 1, 1]`."""
    with np.errstate(all="ignore"):
        a, b, c = GENERATORS[name](np.random.default_rng(seed), rows, k, dtype)
    return a[:, None, :], b[:, :, None], None if c is None else c[:, None, None]


def draw_matrices(name: str, seed: int, m: int, k: int, n: int, dtype: np.dtype) -> Operands:
    """`a[m, k]`, `b[k, n]`, `c[m, n]` or None."""
    with np.errstate(all="ignore"):
        fun = GENERATORS[name]
        a, _, _ = fun(np.random.default_rng(seed), m, k, dtype)
        _, b, _ = fun(np.random.default_rng(seed + 1), n, k, dtype)
        _, _, c = fun(np.random.default_rng(seed + 2), m * n, 2, dtype)
    return a, b.T.copy(), None if c is None else c.reshape(m, n)
