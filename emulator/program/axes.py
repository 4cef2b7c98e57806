"""Which mesh axes a value varies over, found without evaluating anything.

Loops need it: a carried value must be given all the axes that any iteration will give it before the
loop starts. The answer may name an axis too many (the value is then stored once per device), never
one too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from emulator.program.collective_rules import collective_axes
from emulator.program.folded import FoldedMesh
from emulator.program.trace import open_jaxpr, scan_counts, sub_jaxprs

Axes = tuple[str, ...]

_INVARIANT = frozenset(
    "psum psum_invariant pmax pmin all_gather all_gather_invariant pbroadcast".split()
)


def infer_axes(mesh: FoldedMesh, jaxpr: Any, in_axes: Sequence[Axes]) -> list[Axes]:
    """The axes of each output of `jaxpr`, given those of its inputs, in mesh order."""
    body = open_jaxpr(jaxpr)
    env: dict[Any, Axes] = dict.fromkeys(body.constvars, ())
    env.update(zip(body.invars, in_axes, strict=True))
    for eqn in body.eqns:
        ins = [() if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, _equation(mesh, eqn, ins), strict=True))
    return [() if isinstance(v, core.Literal) else env[v] for v in body.outvars]


def _equation(mesh: FoldedMesh, eqn: Any, ins: list[Axes]) -> list[Axes]:
    name, params = eqn.primitive.name, eqn.params
    joined = _union(mesh, ins)
    if used := collective_axes(eqn):
        if name in _INVARIANT and params.get("axis_index_groups") is None:
            return [tuple(a for a in axes if a not in used) for axes in ins]
        return [mesh.ordered({*joined, *used})] * len(eqn.outvars)
    if name == "shard_map":
        entered = [
            mesh.ordered({*a, *_named(spec)})
            for a, spec in zip(ins, params["in_specs"], strict=True)
        ]
        outs = infer_axes(mesh, params["jaxpr"], entered)
        return [tuple(a for a in axes if a not in params["newly_manual_axes"]) for axes in outs]
    if name == "scan":
        return _loop(mesh, params["jaxpr"], ins, *scan_counts(params), None)
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        test = (params["cond_jaxpr"], ins[:n_cond])
        return _loop(
            mesh, params["body_jaxpr"], ins[n_cond:], n_body, len(ins) - n_cond - n_body, test
        )
    if name == "cond":
        columns = zip(*(infer_axes(mesh, b, ins[1:]) for b in params["branches"]), strict=True)
        return [_union(mesh, [ins[0], *column]) for column in columns]
    bodies = sub_jaxprs(eqn)
    if len(bodies) == 1 and len(open_jaxpr(bodies[0][1]).invars) == len(ins):
        outs = infer_axes(mesh, bodies[0][1], ins)
        if len(outs) == len(eqn.outvars):
            return outs
    if name in ("optimization_barrier", "pvary", "pcast"):
        return ins
    return [joined] * len(eqn.outvars)


def _loop(
    mesh: FoldedMesh, body: Any, ins: list[Axes], n_consts: int, n_carry: int, test: Any
) -> list[Axes]:
    consts, carry, xs = (
        ins[:n_consts],
        ins[n_consts : n_consts + n_carry],
        ins[n_consts + n_carry :],
    )
    while True:
        outs = infer_axes(mesh, body, [*consts, *carry, *xs])
        extra = infer_axes(mesh, test[0], [*test[1], *carry])[0] if test else ()
        new = [_union(mesh, [a, b, extra]) for a, b in zip(carry, outs[:n_carry], strict=True)]
        if new == carry:
            return [*carry, *outs[n_carry:]]
        carry = new


def _named(spec: Any) -> list[str]:
    return [a for entry in spec for a in ((entry,) if isinstance(entry, str) else entry or ())]


def _union(mesh: FoldedMesh, axes: Sequence[Axes]) -> Axes:
    return mesh.ordered({name for group in axes for name in group})
