"""Calls to the host: `pure_callback`, `io_callback`, `debug.print`, `debug.callback`.

A call is made once for each device that reaches it, one device after the other in the order of the
mesh (the last axis fastest), with that device's own values. A pure callback is made once for
devices whose arguments cannot differ, as XLA may do. Outside `shard_map` a call is made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from emulator.program.folded import Folded, FoldedMesh, spread, union_axes


def host_call(
    bind: Callable[..., Any], eqn: Any, values: list[Folded], mesh: FoldedMesh
) -> list[Folded]:
    """The equation on every device in turn."""
    axes = union_axes(mesh, values) if eqn.primitive.name == "pure_callback" else mesh.manual
    if not axes:
        return [Folded(x) for x in bind(*(v.array for v in values))]
    sizes = mesh.shape(axes)
    count = math.prod(sizes)
    arrays = [spread(v, axes, mesh).array for v in values]
    flat = tuple(a.reshape(count, *a.shape[len(axes) :]) for a in arrays)

    def one(i: Array) -> list[Array]:
        return list(bind(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in flat)))

    results = lax.map(one, jnp.arange(count))
    return [Folded(r.reshape(*sizes, *r.shape[1:]), axes) for r in jax.tree.leaves(results)]
