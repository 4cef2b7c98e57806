"""Programs that are one `shard_map` and nothing else: `jax.pmap`, a jitted `jax.shard_map`.

Where their arrays lie as the map wants them, nothing is left to the compiler, whatever shardings
arguments and jits name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emulator.mesh import device_numbers, entries
from emulator.program.trace import open_jaxpr

#: A variable of the outermost jaxpr -> the shardings that something asks for it.
Asked = dict[Any, list[NamedSharding]]


def is_one_map(jaxpr: core.ClosedJaxpr, given: Sequence[NamedSharding | None]) -> bool:
    """Whether the program is one `shard_map` over all axes of its mesh, within jits alone, whose
    arguments, `given` where they are placed, and results are divided as the map divides them.
    """
    body = jaxpr.jaxpr
    if body.constvars:
        return False
    asked: Asked = {v: [s] for v, s in zip(body.invars, given, strict=True) if s is not None}
    while len(body.eqns) == 1:
        (eqn,) = body.eqns
        if eqn.primitive.name == "shard_map":
            return _fits(eqn, asked)
        if eqn.primitive.name not in ("jit", "pjit"):
            return False
        inner: Any = open_jaxpr(eqn.params["jaxpr"])
        if inner.constvars:
            return False
        # What surrounds a variable is asked of the one that it is inside.
        around = (*zip(eqn.invars, inner.invars, strict=True),)
        around += (*zip(eqn.outvars, inner.outvars, strict=True),)
        wishes = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
        within: Asked = {}
        for (outer, variable), wish in zip(around, wishes, strict=True):
            if isinstance(variable, core.Literal):
                continue
            known = [] if isinstance(outer, core.Literal) else asked.get(outer, [])
            named = [wish] if isinstance(wish, NamedSharding) and wish.mesh.size > 1 else []
            within.setdefault(variable, []).extend([*known, *named])
        body, asked = inner, within
    return False


def _fits(eqn: Any, asked: Asked) -> bool:
    """Whether all shardings asked are those of the map."""
    params = eqn.params
    mesh = params["mesh"]
    if len(params["newly_manual_axes"]) < len(mesh.axis_names):
        return False
    if AxisType.Explicit in mesh.axis_types:
        return False
    variables: Iterable[Any] = (*eqn.invars, *eqn.outvars)
    wanted = dict.fromkeys(asked)
    for variable, spec in zip(variables, (*params["in_specs"], *params["out_specs"]), strict=True):
        if isinstance(variable, core.Literal):
            continue
        wanted.pop(variable, None)
        if not all(_same(s, mesh, spec) for s in asked.get(variable, [])):
            return False
    return not any(asked[v] for v in wanted)  # one that is passed by the map


def _same(sharding: NamedSharding, mesh: Any, spec: PartitionSpec) -> bool:
    over = sharding.mesh
    if dict(over.shape) != dict(mesh.shape) or device_numbers(over) != device_numbers(mesh):
        return False
    return not sharding.spec.unreduced and _tiles(sharding.spec, mesh) == _tiles(spec, mesh)


def _tiles(spec: PartitionSpec, mesh: Any) -> list[tuple[str, ...]]:
    """The axes that divide each dimension, without those at the end that nothing divides."""
    found = [tuple(a for a in axes if mesh.shape[a] > 1) for axes in entries(spec)]
    while found and math.prod(mesh.shape[a] for a in found[-1]) == 1:
        found.pop()
    return found
