"""Collectives of a partitioned StableHLO program as those of `jax.lax` over mesh axes.

Groups that run over whole axes of the mesh name these axes; others name all axes and list the
groups (`axis_index_groups`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from numpy.typing import NDArray

from emulator.program.partitioned_reductions import PRIMITIVES, reduced
from emulator.program.stablehlo_constants import PerPartition, shape_of
from emulator.program.stablehlo_rules import combiner

_Collective = Callable[[Any, Any, list[Any]], list[Any]]


def scattered(t: Any, op: Any, operands: list[Any], env: Mapping[Any, Any]) -> Any:
    """The result of a `dynamic_slice` that leaves each device its own part of a sum over devices,
    as one reduce_scatter; None if it is another.

    XLA makes this of an all_reduce and a slice where it compiles for accelerators, after the
    partitioner; without it gradients of divided parameters would be sent twice.
    """
    source = op.operands[0].owner
    if getattr(source, "name", "") != "stablehlo.all_reduce" or len(source.operands) != 1:
        return None
    if len(list(op.operands[0].uses)) != 1 or combiner(source) != "add":
        return None
    whole, part = shape_of(op.operands[0].type), shape_of(op.results[0].type)
    cut = [d for d, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
    groups = _groups(t, source)
    if len(cut) != 1 or not isinstance(start := operands[1 + cut[0]], PerPartition):
        return None
    size, ranks = part[cut[0]], groups.shape[1]
    places = start.values.reshape(-1).astype(np.int64)[groups]
    each_its_own = np.sort(places, 1) == np.arange(ranks) * size
    if whole[cut[0]] != ranks * size or not each_its_own.all():
        return None
    in_order = np.take_along_axis(groups, np.argsort(places, 1), 1)
    axes = t.mesh.axes_of(in_order)
    return lax.psum_scatter(
        t.array(env.get(source.operands[0])),
        t.mesh.names if axes is None else axes,
        scatter_dimension=cut[0],
        tiled=True,
        axis_index_groups=_listed(in_order if axes is None else None),
    )


def _of_channel(t: Any, op: Any) -> NDArray[np.int64]:
    """Partitions [group, rank] of a collective; empty if it is one of all devices."""
    custom = op.name == "stablehlo.custom_call"
    said = str(op.attributes["backend_config" if custom else "channel_handle"])
    channel = re.search(r"(?:handle|channel_id) = (\d+)", said)
    assert channel is not None
    groups: NDArray[np.int64] = t.groups[int(channel[1])]
    return groups


def _groups(t: Any, op: Any) -> NDArray[np.int64]:
    """Partitions [group, rank] of a collective."""
    groups = _of_channel(t, op)
    return groups if groups.size else np.arange(t.mesh.count)[None]


def _over(t: Any, op: Any) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """The axes of a collective and, where they alone do not say its groups, the groups."""
    groups = _of_channel(t, op)
    if groups.size == 0:  # all devices
        return t.mesh.names, None
    axes = t.mesh.axes_of(groups)
    return (t.mesh.names, groups) if axes is None else (axes, None)


def _listed(groups: NDArray[np.int64] | None) -> list[list[int]] | None:
    return None if groups is None else groups.tolist()


def _all_reduce(t: Any, op: Any, arrays: list[Any]) -> list[Any]:
    axes, groups = _over(t, op)
    if not axes:
        return arrays
    how = combiner(op)
    rules = {"add": lax.psum, "maximum": lax.pmax, "minimum": lax.pmin}
    if how not in rules and how not in PRIMITIVES:
        raise NotImplementedError(f"an all_reduce that combines values by {how!r} has no rule here")

    def reduce(x: Any) -> Any:
        sent = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        if how in PRIMITIVES:
            return reduced(how, sent, axes, _listed(groups)).astype(x.dtype)
        return rules[how](sent, axes, axis_index_groups=_listed(groups)).astype(x.dtype)

    return [reduce(x) for x in arrays]


def _all_gather(t: Any, op: Any, arrays: list[Any]) -> list[Any]:
    axes, groups = _over(t, op)
    dim = op.attributes["all_gather_dim"].value
    if not axes:
        return arrays
    return [
        lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=_listed(groups))
        for x in arrays
    ]


def _reduce_scatter(t: Any, op: Any, arrays: list[Any]) -> list[Any]:
    axes, groups = _over(t, op)
    if combiner(op) != "add":
        raise NotImplementedError(f"a reduce_scatter by {combiner(op)!r} has no rule here")
    dim = op.attributes["scatter_dimension"].value
    if not axes:
        return arrays
    return [
        lax.psum_scatter(
            x, axes, scatter_dimension=dim, tiled=True, axis_index_groups=_listed(groups)
        )
        for x in arrays
    ]


def _all_to_all(t: Any, op: Any, arrays: list[Any]) -> list[Any]:
    axes, groups = _over(t, op)
    split, concat = (op.attributes[f"{k}_dimension"].value for k in ("split", "concat"))
    if not axes:
        return arrays
    return [
        lax.all_to_all(x, axes, split, concat, tiled=True, axis_index_groups=_listed(groups))
        for x in arrays
    ]


def _collective_permute(t: Any, op: Any, arrays: list[Any]) -> list[Any]:
    pairs = np.array(ir.DenseIntElementsAttr(op.attributes["source_target_pairs"])).reshape(-1, 2)
    axes, local = t.mesh.permutation([(int(s), int(t)) for s, t in pairs])
    if not axes:  # everyone keeps what it has
        return arrays
    return [lax.ppermute(x, axes, local) for x in arrays]


def _ragged_all_to_all(t: Any, op: Any, arrays: list[Any]) -> list[Any]:
    axes, groups = _over(t, op)
    if not axes:  # each device moves its own rows
        axes, groups = t.mesh.names, np.arange(t.mesh.count)[:, None]
    found = lax.ragged_all_to_all(*arrays, axis_name=axes, axis_index_groups=_listed(groups))
    return [found]


RULES: Mapping[str, _Collective] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "collective_permute": _collective_permute,
    "ragged_all_to_all": _ragged_all_to_all,
}
