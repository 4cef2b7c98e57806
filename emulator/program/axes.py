"""Which mesh axes a value varies over, found without evaluating anything.

Loops need it: a carried value must be given all the axes that any iteration will give it before the
loop starts. The answer may name an axis too many (the value is then stored once per device), never
one too few.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from emulator.mesh import entries
from emulator.program.calls import call_body, is_call
from emulator.program.collective_rules import REDUCTIONS, collective_axes
from emulator.program.folded import FoldedMesh
from emulator.program.partitioned_reductions import KINDS
from emulator.program.primitives import HOST
from emulator.program.trace import open_jaxpr, scan_counts

Axes = tuple[str, ...]

_INVARIANT = frozenset(
    """psum psum_invariant unreduced_psum pmax pmin unreduced_pmax unreduced_pmin all_gather
    all_gather_invariant all_gather_reduced pbroadcast""".split()
) | frozenset(KINDS)


def infer_axes(
    mesh: FoldedMesh,
    jaxpr: Any,
    in_axes: Sequence[Axes],
    differ: Callable[[FoldedMesh, Any], bool],
    choices: bool = True,
) -> list[Axes]:
    """The axes of each output of `jaxpr`, given those of its inputs, in mesh order.

    `differ` says of a reduction whether its groups use different schedules, so that even a value
    that is the same everywhere ends up different from group to group. Without `choices`, devices
    that take different branches do not make a difference.
    """
    return _Inference(mesh, differ, choices).outputs(jaxpr, in_axes)


def largest_value(
    mesh: FoldedMesh,
    jaxpr: Any,
    in_axes: Sequence[Axes],
    differ: Callable[[FoldedMesh, Any], bool],
    axis: str,
) -> int:
    """The bytes of the largest value in `jaxpr` that varies over `axis`, on all devices."""
    sizes = [0]
    _Inference(mesh, differ, True, (axis, sizes)).outputs(jaxpr, in_axes)
    return max(sizes)


def left_empty(branch: Any) -> list[bool]:
    """Which results of a branch are arrays without content: what the derivative of another branch
    keeps.
    """
    body = open_jaxpr(branch)
    makers = {v: eqn for eqn in body.eqns for v in eqn.outvars}

    def empty(v: Any) -> bool:
        eqn = None if isinstance(v, core.Literal) else makers.get(v)
        if eqn is None:
            return False
        if eqn.primitive.name in ("pvary", "broadcast_in_dim"):
            return empty(eqn.invars[0])
        return eqn.primitive.name in ("empty", "empty2")

    return [empty(v) for v in body.outvars]


@dataclasses.dataclass(frozen=True, slots=True)
class _Inference:
    mesh: FoldedMesh
    differ: Callable[[FoldedMesh, Any], bool]
    choices: bool
    noted: tuple[str, list[int]] | None = None  # bytes of values that vary over an axis

    def outputs(self, jaxpr: Any, in_axes: Sequence[Axes]) -> list[Axes]:
        body = open_jaxpr(jaxpr)
        env: dict[Any, Axes] = dict.fromkeys(body.constvars, ())
        env.update(zip(body.invars, in_axes, strict=True))
        for eqn in body.eqns:
            ins = [() if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            outs = self.equation(eqn, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
            if self.noted is not None:
                self.note(eqn, outs, *self.noted)
        return [() if isinstance(v, core.Literal) else env[v] for v in body.outvars]

    def note(self, eqn: Any, outs: list[Axes], axis: str, sizes: list[int]) -> None:
        for v, axes in zip(eqn.outvars, outs, strict=True):
            if axis in axes and hasattr(v.aval, "dtype"):
                sizes.append(v.aval.size * v.aval.dtype.itemsize * math.prod(self.mesh.shape(axes)))

    def equation(self, eqn: Any, ins: list[Axes]) -> list[Axes]:
        name, params = eqn.primitive.name, eqn.params
        joined = self.union(ins)
        if used := collective_axes(eqn):
            return self.collective(eqn, used, ins)
        if name == "shard_map":
            return self.shard_map(params, ins)
        if name == "scan":
            return self.loop(params["jaxpr"], ins, *scan_counts(params), None)
        if name == "while":
            n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
            test = (params["cond_jaxpr"], ins[:n_cond])
            n_carry = len(ins) - n_cond - n_body
            return self.loop(params["body_jaxpr"], ins[n_cond:], n_body, n_carry, test)
        if name == "cond" and not is_call(eqn):
            branches = params["branches"]
            columns = zip(*(self.outputs(b, ins[1:]) for b in branches), strict=True)
            made = [list(out).count(False) for out in zip(*map(left_empty, branches), strict=True)]
            index = ins[0] if self.choices else ()
            return [
                self.union([index if n > 1 else (), *column])
                for n, column in zip(made, columns, strict=True)
            ]
        if (call := call_body(eqn)) is not None:
            return self.outputs(call[0], [ins[i] for i in call[1]])
        if name in ("optimization_barrier", "shard_alike"):
            return ins
        if name in HOST and name != "pure_callback":
            return [self.mesh.manual] * len(eqn.outvars)
        return [joined] * len(eqn.outvars)

    def collective(self, eqn: Any, used: Axes, ins: list[Axes]) -> list[Axes]:
        name = eqn.primitive.name
        extra = self.mesh.manual if name in REDUCTIONS and self.differ(self.mesh, eqn) else ()
        if name in _INVARIANT and eqn.params.get("axis_index_groups") is None:
            kept = [{*axes, *extra} - {*used} for axes in ins]
            return [self.mesh.ordered(axes) for axes in kept]
        return [self.union([*ins, used, extra])] * len(eqn.outvars)

    def shard_map(self, params: Any, ins: list[Axes]) -> list[Axes]:
        if not self.mesh.names:  # seen from outside every shard_map: nothing varies
            return [()] * len(params["out_specs"])
        entered = [
            self.mesh.ordered({*a, *_named(spec)})
            for a, spec in zip(ins, params["in_specs"], strict=True)
        ]
        manual = self.mesh.ordered({*self.mesh.manual, *params["newly_manual_axes"]})
        inner = dataclasses.replace(self, mesh=dataclasses.replace(self.mesh, manual=manual))
        outs = inner.outputs(params["jaxpr"], entered)
        return [tuple(a for a in axes if a not in params["newly_manual_axes"]) for axes in outs]

    def loop(
        self, body: Any, ins: list[Axes], n_consts: int, n_carry: int, test: Any
    ) -> list[Axes]:
        consts, rest = ins[:n_consts], ins[n_consts:]
        carry, xs = rest[:n_carry], rest[n_carry:]
        while True:
            outs = self.outputs(body, [*consts, *carry, *xs])
            extra = self.outputs(test[0], [*test[1], *carry])[0] if test else ()
            new = [self.union([a, b, extra]) for a, b in zip(carry, outs[:n_carry], strict=True)]
            if new == carry:
                return [*carry, *outs[n_carry:]]
            carry = new

    def union(self, axes: Sequence[Axes]) -> Axes:
        return self.mesh.ordered({name for group in axes for name in group})


def _named(spec: Any) -> list[str]:
    return [axis for entry in entries(spec) for axis in entry]
