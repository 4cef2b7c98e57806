"""Calls to the host: `pure_callback`, `io_callback`, `debug.print`, `debug.callback`.

A call is made once for each device that reaches it, one device after the other in the order of the
mesh (the last axis fastest), with that device's own values. A pure callback is made once for
devices whose arguments cannot differ, as XLA may do. Outside `shard_map` a call is made once.

Where the mesh is divided over several real devices, each makes its own part's calls at its own
time, and a pure callback may be made by all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from emulator.program.folded import Folded, FoldedMesh, spread, union_axes
from emulator.program.real_devices import first_of_copies


def host_call(
    bind: Callable[..., Any],
    eqn: Any,
    values: list[Folded],
    mesh: FoldedMesh,
    here: Folded | None = None,
) -> list[Folded]:
    """The equation on every device in turn, or on those that are `here`; others have zeros."""
    pure = eqn.primitive.name == "pure_callback"
    axes = union_axes(mesh, [*values, *([here] if here else [])]) if pure else mesh.manual
    if not axes and not mesh.parts:
        return [Folded(x) for x in bind(*(v.array for v in values))]
    sizes = mesh.shape(axes)
    count = math.prod(sizes)
    arrays = [spread(v, axes, mesh).array for v in values]
    flat = tuple(a.reshape(count, *a.shape[len(axes) :]) for a in arrays)
    mine = None if here is None else spread(here, axes, mesh).array.reshape(count)

    def one(i: Array) -> list[Array]:
        def made() -> list[Array]:
            return list(bind(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in flat)))

        def none() -> list[Array]:
            return [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]

        return made() if mine is None else lax.cond(mine[i], made, none)

    if mesh.parts and not pure:
        if eqn.outvars or eqn.params.get("ordered"):
            raise NotImplementedError(
                f"primitive {eqn.primitive.name!r} with results or in order is not modelled on "
                "several real devices, which do not wait for each other's calls; leave out "
                "devices=, or use pure_callback"
            )
        first = first_of_copies(mesh, axes)  # else the call is another's to make
        lax.cond(first, lambda: lax.fori_loop(0, count, lambda i, _: (one(i), 0)[1], 0), lambda: 0)
        return []
    results = lax.map(one, jnp.arange(count))
    return [Folded(r.reshape(*sizes, *r.shape[1:]), axes) for r in jax.tree.leaves(results)]
