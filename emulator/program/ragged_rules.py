"""Matmuls of groups of rows (`ragged_dot_general`) for all devices, on the matrix unit.

Each group is a matmul of its own, so K ascends from the group's first element. Three modes, by the
kind of the dimension that the groups divide:

- rows (the experts of a mixture): rows[m, k] x rhs[g, k, n] -> [m, n]. Tiles of rows that belong to
  one group each meet that group's matrix, all tiles as one batch.
- K (the gradient of those matrices): lhs[m, k] x rhs[k, n] -> [g, m, n]. Tiles of K are added one
  after the other onto the accumulator of their group.
- batch: groups of whole matmuls, which change nothing.

Rows and K beyond the last group give zeros. How large groups are may differ from device to device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import kernels
from emulator.program.folded import Folded, FoldedMesh, spread, union_axes
from emulator.program.real_devices import gather

_LONGEST_TILE = 512
_SHORTEST_TILE = 16


def ragged_dot_general(
    eqn: Any, values: list[Folded], mesh: FoldedMesh, arithmetic: kernels.Arithmetic
) -> Folded:
    """One `ragged_dot_general` equation for all devices."""
    axes = union_axes(mesh, values)
    arrays = [spread(v, axes, mesh).array for v in values]
    sizes = mesh.shape(axes)
    flat = [jnp.asarray(a).reshape(math.prod(sizes), *a.shape[len(axes) :]) for a in arrays]
    out = _grouped(eqn.params, flat, arithmetic, eqn.outvars[0].aval.dtype)
    return Folded(out.reshape(*sizes, *out.shape[1:]), axes)


def rows_of_groups(values: list[Folded], mesh: FoldedMesh) -> Array:
    """How long each group is on each device of the mesh, [devices, groups], over all batches."""
    gathered, mesh = gather(values[2], mesh.names, mesh), mesh.whole(mesh.names)
    sizes = spread(gathered, mesh.names, mesh).array
    *batch, groups = sizes.shape[len(mesh.names) :]
    flat = jnp.asarray(sizes).reshape(math.prod(mesh.sizes), math.prod(batch), groups)
    return flat.sum(1).astype(jnp.int32)


def mode_of(params: Any) -> tuple[str, int]:
    """("rows", "k" or "batch", the ragged dimension of lhs)."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contract, _), (batch, _) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    return ("k" if ragged in contract else "batch" if ragged in batch else "rows"), ragged


def _grouped(
    params: Any, arrays: list[Array], arithmetic: kernels.Arithmetic, out_type: Any
) -> Array:
    """[devices, ...] of each operand -> [devices, ...] of the result."""
    lhs, rhs, sizes = arrays
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    mode, ragged = mode_of(params)
    group_dims = tuple(numbers.rhs_group_dimensions)
    rows = [d for d in range(lhs.ndim - 1) if d not in (*lhs_contract, *lhs_batch)]
    columns = [d for d in range(rhs.ndim - 1) if d not in (*rhs_contract, *rhs_batch, *group_dims)]

    def shape(array: Array, dims: Any) -> list[int]:
        return [array.shape[1 + d] for d in dims]

    n_dev, groups = lhs.shape[0], sizes.shape[-1]
    b, m, k = (math.prod(shape(lhs, dims)) for dims in (lhs_batch, rows, lhs_contract))
    n = math.prod(shape(rhs, columns))
    a = _ordered(lhs, (*lhs_batch, *rows, *lhs_contract)).reshape(n_dev * b, m, k)
    c = _ordered(rhs, (*rhs_batch, *group_dims, *rhs_contract, *columns))
    product = _Product(params["precision"], arithmetic, {lhs.dtype.name, rhs.dtype.name}, out_type)
    batch_shape, out_shape = shape(lhs, lhs_batch), [*shape(lhs, rows), *shape(rhs, columns)]

    if mode == "batch":
        whole = product(a, c.reshape(n_dev * b, k, n))
        return whole.reshape(n_dev, *batch_shape, *out_shape)

    dims = rows if mode == "rows" else list(lhs_contract)
    outer, inner = _around(dims, ragged, lhs)
    # A size for each [device, batch, part]: parts are the dims before the ragged one.
    lengths = _prefixed(sizes, [b, outer], n_dev).reshape(n_dev * b * outer, groups) * inner
    if mode == "rows":
        parts = a.reshape(n_dev * b * outer, m // outer, k)
        matrices = c.reshape(n_dev * b, groups, k, n)
        owner = np.repeat(np.arange(n_dev * b), outer)
        out = _by_rows(parts, matrices, lengths, owner, product)
        return out.reshape(n_dev, *batch_shape, *out_shape)
    per_part = lengths.reshape(n_dev * b, outer * groups)
    starts = jnp.arange(outer, dtype=jnp.int32)[:, None] * (k // outer) + _starts(
        lengths.reshape(n_dev * b, outer, groups)
    )
    out = _by_k(
        a, c.reshape(n_dev * b, k, n), per_part, starts.reshape(per_part.shape), groups, product
    )
    out = jnp.moveaxis(out.reshape(n_dev, b, groups, m, n), 2, 1)
    return out.reshape(n_dev, groups, *batch_shape, *out_shape)


class _Product:
    """A batched matmul with the equation's options. K may be cut at multiples of `step`."""

    def __init__(
        self, precision: Any, arithmetic: kernels.Arithmetic, types: set[str], out_type: Any
    ) -> None:
        self.options = {"arithmetic": arithmetic, "precision": precision}
        self.out_type = jnp.dtype(out_type)
        on_unit = types <= set(kernels.floats.FLOAT_DTYPES)
        others = (arithmetic.fp16, arithmetic.fp32, arithmetic.fp32_full, arithmetic.fp32_reduced)
        self.step = math.lcm(arithmetic.products, *(m.products for m in others if m is not None))
        self.accumulator = jnp.dtype(jnp.float32) if on_unit else self.out_type

    def __call__(self, a: Array, b: Array) -> Array:
        """a[p, m, k] @ b[p, k, n]."""
        return self._dot(a, b, preferred_element_type=self.out_type)

    def onto(self, c: Array, a: Array, b: Array) -> Array:
        """c + a @ b, not yet rounded."""
        return self._dot(a, b, preferred_element_type=self.accumulator, c=c)

    def rounded(self, total: Array) -> Array:
        if self.out_type.name in kernels.floats.FLOAT_DTYPES:
            overflow = self.options["arithmetic"].overflow
            return kernels.fixpipe.round_to(total, self.out_type, overflow)
        return total.astype(self.out_type)

    def _dot(self, a: Array, b: Array, **options: Any) -> Array:
        numbers = (((2,), (1,)), ((0,), (0,)))
        return kernels.dot_general(a, b, numbers, **self.options, **options)


def _by_rows(
    a: Array, matrices: Array, lengths: Array, owner: np.ndarray, product: _Product
) -> Array:
    """a[p, m, k] by groups of rows x matrices[q, g, k, n] -> [p, m, n]; part p uses matrices
    `owner[p]`.
    """
    (parts, m, k), (_, groups, _, n) = a.shape, matrices.shape
    if not (parts and m and n and groups):
        return product(jnp.zeros((parts, m, 0), a.dtype), jnp.zeros((parts, 0, n), matrices.dtype))
    tile = _tile(m, groups)
    tiles = -(-m // tile) + groups
    group, first, stop, base = jax.vmap(lambda s: _tiles(s, m, tile, tiles))(lengths)
    rows = first[..., None] + np.arange(tile)  # [p, tiles, tile]
    inside = rows < stop[..., None]
    part = np.arange(parts)[:, None]
    taken = a[part[..., None], jnp.clip(rows, 0, m - 1)]
    taken = jnp.where(inside[..., None], taken, jnp.zeros((), a.dtype))
    right = matrices[owner[:, None], group]
    out = product(taken.reshape(parts * tiles, tile, k), right.reshape(parts * tiles, k, n))
    out = out.reshape(parts, tiles * tile, n)
    # Each row finds its group, the group's first tile, and its place there.
    ends = jnp.minimum(jnp.cumsum(lengths, axis=1), m)
    row = np.arange(m)
    of = jax.vmap(lambda e: jnp.searchsorted(e, row, side="right"))(ends)
    known = of < groups
    of = jnp.minimum(of, groups - 1)
    start = jnp.take_along_axis(_starts(lengths), of, 1)
    place = jnp.take_along_axis(base, of, 1) * tile + row - start
    found = out[part, jnp.clip(place, 0, tiles * tile - 1)]
    return jnp.where(known[..., None], found, jnp.zeros((), out.dtype))


def _by_k(
    a: Array, b: Array, lengths: Array, starts: Array, groups: int, product: _Product
) -> Array:
    """a[p, m, k] x b[p, k, n] -> [p, groups, m, n], where range r of K, `lengths[p, r]` long from
    `starts[p, r]`, belongs to group r modulo `groups`.
    """
    (parts, m, k), n = a.shape, b.shape[2]
    total = jnp.zeros((parts, groups, m, n), product.accumulator)
    if k and parts and groups:
        tile = _up(_tile(k, lengths.shape[1]), product.step)
        tiles = -(-k // tile) + lengths.shape[1]
        which, first, stop, _ = jax.vmap(lambda s, o: _tiles(s, k, tile, tiles, o))(lengths, starts)
        part, left_rows = np.arange(parts), a.transpose(0, 2, 1)

        def add(total: Array, at: Any) -> Any:
            which, first, stop = at
            rows = first[:, None] + np.arange(tile)
            inside = (rows < stop[:, None])[..., None]
            rows = jnp.clip(rows, 0, k - 1)
            left = jnp.where(inside, _taken(left_rows, rows), jnp.zeros((), a.dtype))
            right = jnp.where(inside, _taken(b, rows), jnp.zeros((), b.dtype))
            group = which % groups
            old = total[part, group]
            new = product.onto(old, left.transpose(0, 2, 1), right)
            new = jnp.where((first < stop)[:, None, None], new, old)  # a tile of no group
            return total.at[part, group].set(new), None

        steps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (which, first, stop))
        total, _ = lax.scan(add, total, steps)
    return product.rounded(total)


def _taken(array: Array, rows: Array) -> Array:
    """array[p, k, ...] at rows[p, tile]."""
    return array[np.arange(array.shape[0])[:, None], rows]


def _tiles(
    lengths: Array, limit: int, tile: int, tiles: int, starts: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Ranges cut into tiles: of each tile its range, first element and end (equal to the first if
    it is empty); of each range its first tile.
    """
    lengths = jnp.maximum(lengths.astype(jnp.int32), 0)
    starts = _starts(lengths) if starts is None else starts
    lengths = jnp.clip(lengths, 0, jnp.maximum(limit - starts, 0))
    needed = -(-lengths // tile)
    ends = jnp.cumsum(needed)
    base = ends - needed
    at = np.arange(tiles)
    which = jnp.minimum(jnp.searchsorted(ends, at, side="right"), lengths.shape[0] - 1)
    first = starts[which] + (at - base[which]) * tile
    stop = jnp.where(at < ends[-1], starts[which] + lengths[which], first)
    return which, first, stop, base


def _starts(lengths: Array) -> Array:
    lengths = lengths.astype(jnp.int32)
    return jnp.cumsum(lengths, axis=-1) - lengths


def _tile(length: int, groups: int) -> int:
    """A power of two near the mean group, so that tiles are about twice as many as groups."""
    mean = -(-length // max(groups, 1))
    return min(_LONGEST_TILE, max(_SHORTEST_TILE, 1 << (mean - 1).bit_length()))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _around(dims: list[int], ragged: int, lhs: Array) -> tuple[int, int]:
    """How many elements the dims before and after the ragged one have."""
    at = dims.index(ragged)
    before = math.prod(lhs.shape[1 + d] for d in dims[:at])
    return before, math.prod(lhs.shape[1 + d] for d in dims[at + 1 :])


def _prefixed(sizes: Array, prefix: list[int], n_dev: int) -> Array:
    """Group sizes [devices, *prefix, groups], from [devices, groups] or with all prefix dims."""
    groups = sizes.shape[-1]
    if sizes.ndim == 2:
        sizes = sizes.reshape(n_dev, *[1] * len(prefix), groups)
        return jnp.broadcast_to(sizes, (n_dev, *prefix, groups)).astype(jnp.int32)
    return sizes.reshape(n_dev, *prefix, groups).astype(jnp.int32)


def _ordered(x: Array, dims: Any) -> Array:
    return lax.transpose(x, (0, *(1 + d for d in dims)))
