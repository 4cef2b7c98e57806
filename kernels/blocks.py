"""Loops for sums along K: the result is cut into tiles that stay in a cache, and K into blocks of
a few steps.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, operands
from kernels.arithmetic import Arithmetic

SIZE = 16  # products added between two passes over the accumulators
_TILE = 1 << 17  # elements of a tile, at most
_COLUMNS = 256  # of a tile: a block of b stays in the first-level cache
_PARTS = 8  # of a result, so that a tile's own memory stays well below the result's
_LEAST = 1 << 13  # elements of a tile or piece that are worth a pass


def size_of(k: int, products: int) -> int:
    """Products of a block: whole steps, about `SIZE` products, no more than there are."""
    return products * min(max(1, SIZE // products), -(-k // products))


def pad(a: Array, b: Array, size: int, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """Operands with K filled up to whole blocks.

    A short step is filled up with products +0. Whole steps of nothing but -0 change no accumulator
    that is the result of a step; where a step flushes or saturates what it reads they change none
    that a step has read, so they come first there.
    """
    k = a.shape[-1]
    short = -k % arithmetic.products
    rest = -(k + short) % size
    if short == 0 and rest == 0:
        return a, b
    keeps = arithmetic.subnormal_inputs == "keep" and arithmetic.specials == "ieee"
    idle = (0, rest) if keeps else (rest, 0)
    minus_zero = np.array(1 << (8 * a.dtype.itemsize - 1), unsigned(a))
    x, y = (lax.bitcast_convert_type(v, unsigned(v)) for v in (a, b))  # floats might be rounded
    x = jnp.pad(x, ((0, 0), (0, 0), (0, short)))
    x = jnp.pad(x, ((0, 0), (0, 0), idle), constant_values=minus_zero)
    y = jnp.pad(y, ((0, 0), (0, short), (0, 0)))
    y = jnp.pad(y, ((0, 0), idle, (0, 0)))
    return lax.bitcast_convert_type(x, a.dtype), lax.bitcast_convert_type(y, b.dtype)


def unsigned(x: Array) -> np.dtype:
    """The type of the words of `x`."""
    return np.dtype(np.uint32 if x.dtype.itemsize == 4 else np.uint16)


Place = tuple[tuple[Array, Array, Array], tuple[int, int, int]]


def in_pieces(fun: Callable[[Array], tuple[Array, ...]], x: Array, axis: int) -> tuple[Array, ...]:
    """`fun(x)` of `x[batch, m, n]`, piece by piece along `axis` so that little memory is needed.

    Results of `fun` have `axis` at the same place, or last if `fun` removes one.
    """
    whole = x.shape[axis]
    piece = max(_LEAST, x.size // (2 * _PARTS)) * whole // x.size
    piece = min(max(piece, 1), whole)
    if piece == whole:
        return fun(x)
    words = lax.bitcast_convert_type(x, unsigned(x))

    def at(start: Array) -> tuple[Array, ...]:
        part = lax.dynamic_slice_in_dim(words, start, piece, axis)
        return fun(lax.bitcast_convert_type(part, x.dtype))

    def body(index: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        start = jnp.minimum(index * piece, whole - piece)
        return tuple(
            lax.dynamic_update_slice_in_dim(y, z, start, min(axis, y.ndim - 1))
            for y, z in zip(found, at(start), strict=True)
        )

    def empty(like: jax.ShapeDtypeStruct) -> Array:
        shape = list(like.shape)
        shape[min(axis, like.ndim - 1)] = whole
        return jnp.zeros(shape, like.dtype)

    start = tuple(empty(like) for like in jax.eval_shape(at, jnp.int32(0)))
    return lax.fori_loop(jnp.int32(0), jnp.int32(-(-whole // piece)), body, start)


Walk = Callable[..., Array]


def over_tiles(
    a: Array,
    b: Array,
    c: Array | None,
    size: int,
    arithmetic: Arithmetic,
    solve: Callable[[Array, Walk], Array],
    finish: Callable[[Array, Place], Array],
) -> Array:
    """FP32 results `[batch, m, n]` after all blocks.

    Args:
        a, b, c: operands, not yet read, K padded to whole blocks, and the first accumulators.
        size: products of a block.
        arithmetic: how operands are read.
        solve: `solve(words, walk)` gives the last FP32 words `[g, r, s]` of a tile's accumulators
            from the first ones. `walk(state, advance)` goes through the blocks: `advance(state, x,
            y, index)` takes words `[g, r, size]` and `[g, size, s]` of the operands of block
            `index` and gives the state after it; `walk(..., start, stop)` through some of them.
        finish: `finish(words, place)` gives a tile's results from its last words; `place` is where
            it starts and its shape.

    Tiles at the end overlap the ones before them, and compute some results twice.
    """
    batch, m, k = a.shape
    n = b.shape[-1]
    columns = min(n, _COLUMNS)
    tile_size = min(_TILE, max(_LEAST, batch * m * n // _PARTS))
    rows = min(m, max(1, tile_size // columns))
    group = min(batch, max(1, tile_size // (rows * columns)))
    counts = [math.ceil(x / y) for x, y in ((batch, group), (m, rows), (n, columns))]
    shape = group, rows, columns
    # XLA:CPU does whatever moves BF16 numbers about in FP32; their words it leaves alone.
    a_words, b_words = (lax.bitcast_convert_type(x, unsigned(x)) for x in (a, b))

    # +0, but only data can tell: XLA takes `0 + x` for x, which is wrong where x is -0.
    nothing = ((a_words[0, 0, 0] | 1) == 0).astype(jnp.uint32)

    def part(words: Array, like: Array, start: tuple, sizes: tuple) -> Array:
        found = lax.dynamic_slice(words, start, sizes)
        found = lax.bitcast_convert_type(found, like.dtype)
        return floats.bits32(operands.read(found, arithmetic))

    def tile(index: Array, out: Array) -> Array:
        first = jnp.minimum(index // (counts[2] * counts[1]) * group, batch - group)
        row = jnp.minimum(index // counts[2] % counts[1] * rows, m - rows)
        column = jnp.minimum(index % counts[2] * columns, n - columns)
        corner = first, row, column

        def walk(
            state: Array,
            advance: Callable[..., Array],
            start: Array | int = 0,
            stop: Array | int | None = None,
        ) -> Array:
            def body(index: Array, state: Array) -> Array:
                x = part(a_words, a, (first, row, index * size), (group, rows, size))
                y = part(b_words, b, (first, index * size, column), (group, size, columns))
                return advance(state, x, y, index)

            stop = k // size if stop is None else stop
            return lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, state)

        words = jnp.full(shape, nothing)
        if c is not None:
            words = floats.bits32(lax.dynamic_slice(c, corner, shape))
        found = floats.from_bits32(finish(solve(words, walk), (corner, shape)))
        return lax.dynamic_update_slice(out, found, corner)

    out = jnp.zeros((batch, m, n), jnp.float32)
    return lax.fori_loop(jnp.int32(0), jnp.int32(math.prod(counts)), tile, out)


def pair(x: Array, y: Array, index: int) -> tuple[Array, Array]:
    """Column `index` of `x[g, r, s]` and that row of `y[g, s, t]`, both as [g, r, t].

    In primitives, because a kernel has hundreds of these to trace.
    """
    shape = (x.shape[0], x.shape[1], y.shape[2])
    column = lax.slice_in_dim(x, index, index + 1, axis=2)
    row = lax.slice_in_dim(y, index, index + 1, axis=1)
    left, right = (lax.broadcast_in_dim(v, shape, (0, 1, 2)) for v in (column, row))
    return left, right


def outer(x: Array, y: Array, index: int) -> Array:
    """The products of column `index` of `x[g, r, s]` and its row of `y[g, s, t]`."""
    column, row = pair(x, y, index)
    return column * row


def in_float64(x: Array, y: Array, part: int) -> tuple[Array, Array]:
    """FP64 operands of a block, `part` products at a time: `[parts, g, r, part]` and
    `[parts, g, part, s]`.
    """
    group, rows, size = x.shape
    x = floats.to_float64(x).reshape(group, rows, size // part, part).transpose(2, 0, 1, 3)
    y = floats.to_float64(y).reshape(group, size // part, part, -1).transpose(1, 0, 2, 3)
    return x, y


def paired(terms: list[Array]) -> Array:
    """Their sum, neighbours first."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]
