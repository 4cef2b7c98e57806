"""`ragged_all_to_all` on folded arrays: slices of unequal length between the devices of a group.

Nothing is rounded. Every row of a device's result finds the slice that is written there; where
slices overlap, which JAX leaves undefined, the one that starts later wins.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from emulator.program.collective_rules import Layout, collective_axes
from emulator.program.folded import Folded, FoldedMesh, spread, union_axes
from emulator.program.real_devices import gather, together
from emulator.program.words import on_words

_NOWHERE = np.iinfo(np.int32).max


def ragged_all_to_all(eqn: Any, values: list[Folded], mesh: FoldedMesh) -> Folded:
    """The equation's result, of the shape of its second operand."""

    def rule(mesh: FoldedMesh, *values: Folded) -> Folded:
        return _exchanged(eqn, list(values), mesh)

    return together(rule, collective_axes(eqn), mesh, values)


def _exchanged(eqn: Any, values: list[Folded], mesh: FoldedMesh) -> Folded:
    axes = union_axes(mesh, values)
    operand, output = (spread(v, axes, mesh) for v in values[:2])
    numbers = [spread(v, axes, mesh) for v in values[2:]]

    def rule(operand: Folded, output: Folded) -> Folded:
        layouts = [Layout(v, mesh, eqn) for v in (operand, output, *numbers)]
        arrays = [jnp.moveaxis(each.array, 2, 1) for each in layouts]  # [groups, batch, ranks, ..]
        out = jax.vmap(jax.vmap(_exchange))(*arrays[:5])
        return layouts[1].one_each(jnp.moveaxis(out, 1, 2))

    return on_words(rule)(operand, output)


def ranks_of(eqn: Any) -> int:
    """How many devices one group of the exchange has."""
    groups = eqn.params.get("axis_index_groups")
    return int(eqn.params["axis_size"]) if groups is None else len(groups[0])


def sent(eqn: Any, values: list[Folded], mesh: FoldedMesh) -> Array:
    """Rows that each rank sends to each rank, [groups, source, destination], over all groups of the
    mesh.
    """
    sizes, mesh = gather(values[3], mesh.names, mesh), mesh.whole(mesh.names)
    sizes = spread(sizes, mesh.names, mesh)
    layout = Layout(sizes, mesh, eqn)
    rows = jnp.moveaxis(layout.array, 2, 1)
    n = layout.ranks
    return rows.reshape(-1, n, n, rows.shape[-1] // n).sum(-1).astype(jnp.int32)


def _exchange(operand: Array, output: Array, starts: Array, sizes: Array, places: Array) -> Array:
    """One group: operand [n, rows, ...], output [n, rows, ...], the others [n, slices]."""
    n, slices = sizes.shape
    each = slices // n
    source = jnp.asarray(np.repeat(np.arange(n), each))

    def arriving(x: Array) -> Array:  # [destination, source x slice]
        return x.reshape(n, n, each).transpose(1, 0, 2).reshape(n, slices).astype(jnp.int32)

    def receive(old: Array, starts: Array, sizes: Array, places: Array) -> Array:
        begins = jnp.where(sizes > 0, places, _NOWHERE)
        order = jnp.argsort(begins, stable=True)
        row = np.arange(old.shape[0])
        at = jnp.searchsorted(begins[order], row, side="right") - 1
        slice_ = order[jnp.maximum(at, 0)]
        within = row - begins[slice_]
        hit = (at >= 0) & (within < sizes[slice_])
        taken = jnp.clip(starts[slice_] + within, 0, max(operand.shape[1] - 1, 0))
        new = operand[source[slice_], taken]
        return jnp.where(hit.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    if not (operand.shape[1] and output.shape[1]):
        return output
    return jax.vmap(receive)(output, arriving(starts), arriving(sizes), arriving(places))
