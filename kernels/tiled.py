"""Products that sum K in the order of a `Tiling`, on top of the products of ascending K."""

from collections.abc import Callable
from functools import partial
from itertools import groupby

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, tiling
from kernels.tiling import Tiling

Product = Callable[[Array, Array, Array | None], Array]
"""`a[batch, m, k]`, `b[batch, k, n]`, `c[batch, m, n]` or None -> FP32 of ascending K."""

Sums = tuple[Array, Array]


def accumulate(
    a: Array, b: Array, c: Array | None, plan: Tiling, products: int, product: Product
) -> Array:
    """`product(a, b, c)` with K in the order of `plan`; no size is 0.

    `products` is the length of the unit's step, to which each Mmad call fills up its own piece of
    K with +0. Operands are moved as integers: XLA's float operations flush subnormals.
    """
    m, k, n = a.shape[1], a.shape[2], b.shape[2]
    m_tiles, n_tiles, k_tiles = plan.grid(m, k, n)
    outer = plan.step_k * _up(plan.base_k, products)
    first = np.asarray(tiling.starts(plan, m_tiles, n_tiles, k_tiles))
    x, y = _lay_out(_words(a), 2, plan, products), _lay_out(_words(b), 1, plan, products)

    def multiply(x: Array, y: Array, c: Array | None) -> Array:
        left, right = lax.bitcast_convert_type(x, a.dtype), lax.bitcast_convert_type(y, b.dtype)
        return product(left, right, c)

    if first.any():
        return _shifted(x, y, c, plan, first * outer, multiply)
    return _in_parts(x, y, c, plan, k_tiles, outer, multiply)


def _in_parts(
    x: Array, y: Array, c: Array | None, plan: Tiling, k_tiles: int, outer: int, multiply: Product
) -> Array:
    """One order for all output tiles: chains of ascending K, added one by one."""
    chains = []  # start, stop, whether it is the first of its part, the last of it
    for start, stop in tiling.parts(plan, k_tiles):
        edges = range(start, stop) if plan.accumulate_in == "gm" else [start]
        for at in edges:
            end = stop if plan.accumulate_in == "l0c" else at + 1
            chains.append((at * outer, min(end * outer, x.shape[2]), at == start, end == stop))
    if len(chains) == 1:
        return multiply(x, y, c)
    first_part = next(stop for _, stop, _, ends in chains if ends)
    c_words = None if c is None else _words(c)

    def add_chain(sums: Sums, chain: tuple[Array, Array, Array], length: int) -> tuple[Sums, None]:
        """`sums`: of the part so far, of the parts before it."""
        part, total = sums
        start, begins, ends = chain
        addend = None
        if c_words is not None:
            addend = floats.from_bits32(jnp.where(start == 0, c_words, 0))
        left = lax.dynamic_slice_in_dim(x, start, length, 2)
        right = lax.dynamic_slice_in_dim(y, start, length, 1)
        word = floats.bits32(multiply(left, right, addend))
        part = jnp.where(begins, word, floats.add_bits(part, word))
        so_far = jnp.where(start < first_part, part, floats.add_bits(total, part))
        return (part, jnp.where(ends, so_far, total)), None

    zero = jnp.zeros((x.shape[0], x.shape[1], y.shape[2]), jnp.uint32)
    sums = (zero, zero)
    # Chains of one length share one compiled loop; a short last one must not be filled up.
    for length, run in groupby(chains, lambda chain: chain[1] - chain[0]):
        begin, _, is_first, is_last = (jnp.asarray(column) for column in zip(*run, strict=True))
        sums, _ = lax.scan(partial(add_chain, length=length), sums, (begin, is_first, is_last))
    return floats.from_bits32(sums[1])


def _shifted(
    x: Array, y: Array, c: Array | None, plan: Tiling, first: np.ndarray, multiply: Product
) -> Array:
    """Output tiles that start at `first[m_tile, n_tile]` and wrap around: those with one start are
    batches of one product.
    """
    batch, m, k = x.shape
    n = y.shape[2]
    m_tiles, n_tiles = first.shape
    rows, columns = min(plan.base_m, m), min(plan.base_n, n)
    x = _pad(x, 1, m_tiles * rows).reshape(batch, m_tiles, rows, k)
    y = _pad(y, 2, n_tiles * columns).reshape(batch, k, n_tiles, columns).transpose(0, 2, 1, 3)
    tiles_of_c = None if c is None else _cut(_words(c), m_tiles, rows, n_tiles, columns)
    # Twice the length of K, so that every rotation of it is a slice.
    x, y = (jnp.concatenate([v, v], axis) for v, axis in ((x, 3), (y, 2)))
    groups, place = _groups(first, largest=max(1, (m + n) // (rows + columns)))

    def one_group(group: tuple[Array, Array]) -> Array:
        start, tiles = group
        at_x, at_y = tiles // n_tiles, tiles % n_tiles
        left = jnp.take(lax.dynamic_slice_in_dim(x, start, k, 3), at_x, axis=1)
        right = jnp.take(lax.dynamic_slice_in_dim(y, start, k, 2), at_y, axis=1)
        here = None if tiles_of_c is None else jnp.take(tiles_of_c, tiles, axis=1)
        addend = None if here is None else floats.from_bits32(here.reshape(-1, rows, columns))
        product = multiply(left.reshape(-1, rows, k), right.reshape(-1, k, columns), addend)
        return _words(product).reshape(batch, -1, rows, columns)

    out = lax.map(one_group, groups)  # [group, batch, tile, rows, columns]
    out = out.transpose(1, 0, 2, 3, 4).reshape(batch, -1, rows, columns)
    out = jnp.take(out, place, axis=1).reshape(batch, m_tiles, n_tiles, rows, columns)
    out = out.transpose(0, 1, 3, 2, 4).reshape(batch, m_tiles * rows, n_tiles * columns)
    return floats.from_bits32(out[:, :m, :n])


def _groups(first: np.ndarray, largest: int) -> tuple[tuple[Array, Array], Array]:
    """Starts [group] and tile numbers [group, tile] of tiles with one start, no group longer than
    `largest` (short ones repeat a tile); and where each tile is found in the flattened groups.
    """
    flat = first.ravel()
    lists = []
    for start in np.unique(flat):
        tiles = np.flatnonzero(flat == start)
        lists += [(start, some) for some in np.array_split(tiles, -(-len(tiles) // largest))]
    width = max(len(tiles) for _, tiles in lists)
    table = np.stack([np.pad(tiles, (0, width - len(tiles)), mode="edge") for _, tiles in lists])
    _, place = np.unique(table.ravel(), return_index=True)
    starts = np.array([start for start, _ in lists])
    return (jnp.asarray(starts, jnp.int32), jnp.asarray(table, jnp.int32)), jnp.asarray(place)


def _lay_out(x: Array, axis: int, plan: Tiling, products: int) -> Array:
    """K with each Mmad's piece filled up with zeros to whole steps; the last piece is its own
    length.
    """
    k, step = x.shape[axis], _up(plan.base_k, products)
    count = -(-k // plan.base_k)
    length = (count - 1) * step + _up(k - (count - 1) * plan.base_k, products)
    if step != plan.base_k:
        shape = x.shape
        x = _pad(x, axis, count * plan.base_k)
        x = x.reshape(*shape[:axis], count, plan.base_k, *shape[axis + 1 :])
        x = _pad(x, axis + 1, step).reshape(*shape[:axis], count * step, *shape[axis + 1 :])
        return lax.slice_in_dim(x, 0, length, axis=axis)
    return _pad(x, axis, length)


def _cut(c: Array, m_tiles: int, rows: int, n_tiles: int, columns: int) -> Array:
    """`[batch, m, n]` as `[batch, tile, rows, columns]`."""
    c = _pad(_pad(c, 1, m_tiles * rows), 2, n_tiles * columns)
    c = c.reshape(c.shape[0], m_tiles, rows, n_tiles, columns).transpose(0, 1, 3, 2, 4)
    return c.reshape(c.shape[0], -1, rows, columns)


def _pad(x: Array, axis: int, size: int) -> Array:
    """Zeros at the end of an axis, up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _words(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
