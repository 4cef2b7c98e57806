"""Fractal layouts of matrices, and the matrix instruction on them, for people who write kernels.

The cube takes matrices in fractals of 512 bytes: 16 rows of 32 bytes. Huawei names a layout by two
letters (asc-devkit, "data layout formats", documented): the order inside a fractal and the order of
the fractals, Z for row by row, N for column by column. CATLASS writes the same with the inner
letter small; ops and graphs write FRACTAL_ before it.

| here | CATLASS | fractals | inside | shape of `x[..., h, w]` | where |
|---|---|---|---|---|---|
| `nd` | RowMajor | none | | `[..., h, w]` | memory |
| `nz` | zN | by columns | by rows | `[..., w1, h1, 16, w0]` | memory, L1, L0C (C) |
| `zz` | zZ | by rows | by rows | `[..., h1, w1, 16, w0]` | L0A (A) |
| `zn` | nZ | by rows | by columns | `[..., h1, w1, 16, h0]` | L0B (B) |

w0 (in `zn` h0, for its fractals are 16 columns wide) is 32 bytes of elements: 16 for BF16 and FP16,
8 for FP32, 32 for INT8, 64 for INT4. An accumulator's fractals in L0C are 16 x 16 whatever their
type: pass `edge=16`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.arithmetic import ASCEND_910C, Arithmetic
from kernels.matmul import matmul

Layout = Literal["nd", "nz", "zz", "zn"]

LAYOUTS = ("nd", "nz", "zz", "zn")

BUFFER_BYTES = {"L0A": 64 * 1024, "L0B": 64 * 1024, "L0C": 128 * 1024}
"""Of one core of 910B and 910C (documented, asc-devkit)."""

_FRACTAL = 16
_ROW_BYTES = 32
_ROW_BITS = 8 * _ROW_BYTES


def to_fractal(x: Array, layout: Layout, *, edge: int | None = None) -> Array:
    """`x[..., h, w]` in `layout`, filled up with zeros to whole fractals.

    `edge` is w0 (for `zn`, h0) if it is not 32 bytes: 16 for FP32 accumulators in L0C. Only words
    are moved, so the bits stay as they are.

    Raises:
        ValueError: an unknown layout, or fewer than two dimensions.
        TypeError: a type that does not fill 32 bytes, such as a complex one.
    """
    _check(layout, x.ndim, 2, "to_fractal: expected x[..., h, w]", x.shape)
    if layout == "nd":
        return x
    rows, columns = _fractal_shape(x.dtype, layout, edge)
    *batch, h, w = x.shape
    h1, w1 = -(-h // rows), -(-w // columns)
    widths = [(0, 0)] * len(batch) + [(0, h1 * rows - h), (0, w1 * columns - w)]

    def move(x: Array) -> Array:
        tiles = jnp.pad(x, widths).reshape(*batch, h1, rows, w1, columns)
        return _permute(tiles, _ORDERS[layout])

    return _moved(x, move)


def from_fractal(
    x: Array, layout: Layout, shape: tuple[int, int], *, edge: int | None = None
) -> Array:
    """The matrix `[..., h, w]` of `shape = (h, w)` that `to_fractal` put in `layout`.

    Raises:
        ValueError: an unknown layout, or an `x` whose fractals are not those of `shape`.
    """
    h, w = shape
    if layout == "nd":
        _check(layout, x.ndim, 2, "from_fractal: expected x[..., h, w]", x.shape)
        expected: tuple[int, ...] = (h, w)
    else:
        _check(layout, x.ndim, 4, "from_fractal: expected x[..., 2 of fractals, 2 inside]", x.shape)
        rows, columns = _fractal_shape(x.dtype, layout, edge)
        blocks = (-(-h // rows), rows, -(-w // columns), columns)
        expected = tuple(blocks[axis] for axis in _ORDERS[layout])
    if x.shape[x.ndim - len(expected) :] != expected:
        raise ValueError(
            f"from_fractal: a {h} x {w} matrix of {x.dtype} in layout {layout!r} has shape "
            f"[..., {', '.join(map(str, expected))}], got {x.shape}; shape is that of the matrix "
            "before it was filled up"
        )
    if layout == "nd":
        return x
    back = tuple(sorted(range(4), key=_ORDERS[layout].__getitem__))

    def move(x: Array) -> Array:
        whole = _permute(x, back).reshape(*x.shape[:-4], blocks[0] * rows, blocks[2] * columns)
        return whole[..., :h, :w]

    return _moved(x, move)


def mmad(
    a: Array, b: Array, c: Array | None = None, *, arithmetic: Arithmetic = ASCEND_910C
) -> Array:
    """The matrix instruction: `c + a b` on fractals, as it runs on what lies in L0A, L0B and L0C.

    K fractals are the outermost loop: each adds its products to the whole accumulator, which starts
    at `c` (default +0). So the bits are those of `matmul` on the matrices that the fractals hold,
    zeros that fill K up included.

    Args:
        a: L0A, layout `zz`: `[..., m1, k1, 16, k0]`, BF16, FP16, FP32, INT8 or INT4.
        b: L0B, layout `zn`: `[..., k1, n1, 16, k0]`.
        c: L0C, layout `nz` with fractals of 16 x 16: `[..., n1, m1, 16, 16]`, FP32 or, for
            integers, INT32.
        arithmetic: the unit's.

    Returns:
        L0C: `[..., n1, m1, 16, 16]`.

    Raises:
        ValueError: shapes that are no such fractals or do not fit each other, or operands that do
            not fit their buffer (64, 64 and 128 KiB).
        TypeError: types that the unit does not take.
    """
    k0 = _ROW_BITS // _bits(a.dtype)
    for name, x in (("a", a), ("b", b)):
        if x.ndim < 4 or x.shape[-2:] != (_FRACTAL, k0):
            raise ValueError(
                f"mmad: expected {name} in fractals [..., 16, {k0}] of {a.dtype}, got {x.dtype} "
                f"{x.shape}; make them with to_fractal({name}, {_OPERANDS[name]!r})"
            )
    m1, k1, n1 = a.shape[-4], a.shape[-3], b.shape[-3]
    if b.shape[-4] != k1:
        raise ValueError(
            f"mmad: a {a.shape} has {k1} fractals along k, b {b.shape} has {b.shape[-4]}; "
            "expected a[..., m1, k1, 16, k0] and b[..., k1, n1, 16, k0]"
        )
    if c is not None and c.shape[-4:] != (n1, m1, _FRACTAL, _FRACTAL):
        raise ValueError(
            f"mmad: expected c in fractals [..., {n1}, {m1}, 16, 16], got {c.shape}; make them "
            "with to_fractal(c, 'nz', edge=16)"
        )
    for buffer, name, nbytes in (
        ("L0A", "a", m1 * k1 * _FRACTAL * _ROW_BYTES),
        ("L0B", "b", k1 * n1 * _FRACTAL * _ROW_BYTES),
        ("L0C", "the result", m1 * n1 * _FRACTAL * _FRACTAL * 4),
    ):
        if nbytes > BUFFER_BYTES[buffer]:
            raise ValueError(
                f"mmad: {name} takes {nbytes} bytes, {nbytes - BUFFER_BYTES[buffer]} more than "
                f"{buffer} has ({BUFFER_BYTES[buffer]}); cut the matrices in smaller tiles"
            )
    m, k, n = m1 * _FRACTAL, k1 * k0, n1 * _FRACTAL
    out = matmul(
        from_fractal(a, "zz", (m, k)),
        from_fractal(b, "zn", (k, n)),
        None if c is None else from_fractal(c, "nz", (m, n), edge=_FRACTAL),
        arithmetic=arithmetic,
    )
    return to_fractal(out, "nz", edge=_FRACTAL)


_OPERANDS = {"a": "zz", "b": "zn"}

# Axes of [h1, rows, w1, columns] in each layout.
_ORDERS = {"nz": (2, 0, 1, 3), "zz": (0, 2, 1, 3), "zn": (0, 2, 3, 1)}


def _fractal_shape(dtype: jnp.dtype, layout: str, edge: int | None) -> tuple[int, int]:
    """Rows and columns of one fractal."""
    if edge is None:
        if dtype.itemsize not in (1, 2, 4):
            raise TypeError(f"fractals hold types of 1, 2 or 4 bytes, got {dtype}")
        edge = _ROW_BITS // _bits(dtype)
    return (edge, _FRACTAL) if layout == "zn" else (_FRACTAL, edge)


def _bits(dtype: jnp.dtype) -> int:
    """Of an element in a fractal, where two of INT4 share a byte."""
    return 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize


def _permute(x: Array, order: tuple[int, ...]) -> Array:
    """The last four axes in another order."""
    lead = x.ndim - 4
    return x.transpose(*range(lead), *(lead + axis for axis in order))


def _check(layout: str, rank: int, least: int, expected: str, shape: tuple[int, ...]) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if rank < least:
        raise ValueError(f"{expected}, got shape {shape}")


def _moved(x: Array, move: Callable[[Array], Array]) -> Array:
    """`move(x)`, on bit patterns where XLA could flush subnormals; linear in its derivative."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return move(x)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]

    @jax.custom_jvp
    def moved(x: Array) -> Array:
        return lax.bitcast_convert_type(move(lax.bitcast_convert_type(x, unsigned)), x.dtype)

    @moved.defjvp
    def _moved_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return moved(*primals), move(tangents[0])

    return moved(x)
