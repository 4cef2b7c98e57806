"""Evaluation outside of the meshes that the program's own arrays and its caller speak of.

The devices of a program are folded into leading axes of ordinary arrays. Arrays that lie on several
real devices would be divided once more, a mesh with explicit axes would do so in their types, and a
context of an abstract mesh has no devices to compute on; so none of them is left in force where
values are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.core import trace_state_clean
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

NO_MESH = AbstractMesh((), ())


def outside_meshes(run: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    """`run(*arrays)` under no mesh, the arrays on one device and without shardings in their types.

    A `shard_map` around the call stays: its axes are not the program's.
    """
    context = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in context.axis_types:
        return run(*arrays)

    if trace_state_clean():  # no transformation is under way, and every array is at hand
        with jax.set_mesh(None):
            return run(*(of_the_host(x) for x in arrays))

    def without(*untyped: Any) -> Any:
        with jax.sharding.use_abstract_mesh(NO_MESH):
            return run(*untyped)

    mesh = typed_over(arrays)
    if mesh is None:
        return without(*arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(without, out_sharding=PartitionSpec())(*arrays)


def typed_over(arrays: Sequence[Any]) -> AbstractMesh | None:
    """The mesh with explicit axes that the type of any traced array speaks of."""
    for x in arrays:
        if isinstance(x, jax.core.Tracer):
            mesh = getattr(getattr(x.aval, "sharding", None), "mesh", None)
            if mesh is not None and AxisType.Explicit in mesh.axis_types:
                return mesh
    return None


def of_the_host(x: Any) -> Any:
    """An array of several of this process's devices, whole and bound to none: XLA's partitioner
    would divide the evaluation along with it, in an order of its own.
    """
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return x
    if len(x.devices()) == 1 or not x.is_fully_addressable:
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():
            words = jnp.asarray(np.asarray(jax.random.key_data(x)))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    return np.asarray(x)
