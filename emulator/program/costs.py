"""The time reading: a traced program -> timed steps and the lives of its buffers. Shapes only, no
values.

The walk follows the flattened graph of each body (`emulator.program.graph`). Inside `shard_map`
shapes are local; outside they follow from the layouts that `emulator.program.layout` infers, and
data that must move between layouts is charged as the collective that moves it. Every primitive has
a rule here or raises by name.

Fusion "chains" is what a graph compiler does: element-wise operations, reductions and slices that
depend on one another between two matmuls, collectives or layout changes form one kernel, which
reads and writes memory once. Fusion "eager": one kernel per operation, every intermediate through
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emulator.collectives import check_algorithms
from emulator.machines import Machine
from emulator.program import (
    cost_attention,
    cost_bodies,
    cost_collectives,
    cost_kernels,
    cost_linalg,
    cost_matmuls,
    cost_offload,
    cost_ragged,
)
from emulator.program.fused import fuse
from emulator.program.graph import flatten
from emulator.program.groups import Groups
from emulator.program.partitioned_reductions import KINDS
from emulator.program.trace import (
    DIVIDED,
    OF_THE_HOST,
    Program,
    dynamic_sites,
    host_sites,
    is_emulated,
    walk,
)
from emulator.program.walker import ATTENTION, Costs, Rule, Walker
from emulator.program.weights import CUMULATIVE, FREE, MOVES

FUSIONS = ("chains", "eager")

# What is no part of a fused kernel. Whatever is neither here nor in `weights` raises by name.
RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, cost_kernels.move),
    "device_put": cost_offload.device_put,
    **dict.fromkeys(CUMULATIVE, cost_kernels.cumulative),
    **dict.fromkeys(FREE, cost_kernels.free),
    **dict.fromkeys(("sort", "top_k", "approx_top_k"), cost_kernels.sort),
    **dict.fromkeys(
        """reduce_window reduce_window_sum reduce_window_max reduce_window_min
        select_and_scatter_add select_and_gather_add select_and_scatter""".split(),
        cost_kernels.window,
    ),
    "gather": cost_kernels.gather,
    "dynamic_update_slice": cost_kernels.update,
    **dict.fromkeys(
        "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max".split(),
        cost_kernels.scatter,
    ),
    "dot_general": cost_matmuls.dot,
    "conv_general_dilated": cost_matmuls.conv,
    "ragged_dot_general": cost_ragged.ragged_dot,
    "ragged_all_to_all": cost_ragged.ragged_all_to_all,
    **dict.fromkeys(OF_THE_HOST, cost_kernels.host_call),
    **dict.fromkeys(cost_linalg.LINEAR, cost_linalg.linear_algebra),
    ATTENTION: cost_attention.attention,
    **dict.fromkeys(
        """psum psum_invariant unreduced_psum pmax pmin unreduced_pmax unreduced_pmin all_gather
        all_gather_invariant all_gather_reduced reduce_scatter unreduced_reduce_scatter all_to_all
        ppermute pbroadcast""".split()
        + [*KINDS],
        cost_collectives.collective,
    ),
    "shard_map": cost_bodies.shard_map,
    "scan": cost_bodies.scan,
    "while": cost_bodies.while_,
    "cond": cost_bodies.cond,
}


def cost(
    program: Program,
    on: Machine,
    *,
    algorithms: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    fusion: str = "chains",
    names: Sequence[str] = (),
) -> Costs:
    """Costs of `program` on `on`.

    `algorithms` maps a collective operation to an algorithm, `counts` the name of a `while` to its
    trips, of a `cond` to the shares of its branches and of a call to the host to its seconds;
    `names` labels the flat arguments.

    Raises:
        NotImplementedError: a primitive without a rule, by name.
        ValueError: a trip count or branch that only values can tell; a mesh larger than the
            machine.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion={fusion!r}: expected one of {', '.join(map(repr, FUSIONS))}")
    if any(is_emulated(eqn) for _, eqn in walk(program.jaxpr)):
        raise ValueError(
            "the program calls a function made by em.emulate or em.pmap, whose time is not that of "
            "the machine; estimate the program that em.emulate was given"
        )
    groups = Groups(on, meshes(program.jaxpr), dict(check_algorithms(algorithms)))
    sites = dynamic_sites(program.jaxpr) | host_sites(program.jaxpr)
    if counts is not None and not isinstance(counts, Mapping):
        raise TypeError(f'counts must map names such as "while_0" to numbers, got {counts!r}')
    unknown = set(counts or {}) - set(sites.values())
    if unknown:
        raise ValueError(
            f"counts names {', '.join(sorted(unknown))}, which the program does not have; "
            f"it has {', '.join(sites.values()) or 'no while or cond'}"
        )
    graph = flatten(program.jaxpr)
    walker = Walker(on, groups, sites, dict(counts or {}), fusion == "chains", RULES, fuse)
    if any(eqn.params.get("name") == DIVIDED for _, eqn in walk(program.jaxpr)):
        walker.assume(
            "the program leaves the division of its arrays to the compiler: XLA's partitioner "
            "divided it; another compiler may choose other collectives"
        )
    return walker.program(graph, names)


_SHARDINGS = ("sharding", "dst_sharding", "in_shardings", "out_shardings")


def meshes(jaxpr: Any) -> list[Any]:
    """Every mesh that the program names, in `shard_map` or in a sharding."""
    found: dict[Any, None] = {}
    for _, eqn in walk(jaxpr):
        candidates = [eqn.params.get("mesh")]
        for key in [key for key in _SHARDINGS if key in eqn.params]:
            value = eqn.params[key]
            candidates.extend(
                getattr(s, "mesh", None)
                for s in (value if isinstance(value, tuple | list) else (value,))
            )
        for mesh in candidates:
            if mesh is not None and getattr(mesh, "axis_names", None):
                found.setdefault(mesh)
    return list(found)
