"""`estimate` and `run`: one program, read for its time and, for `run`, for its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from emulator.energy import energy
from emulator.machines import Machine
from emulator.memory import MemoryUse, communicator_bytes, peak
from emulator.program.costs import Costs, cost
from emulator.program.trace import Program, dynamic_sites, is_array_like, trace, walk
from emulator.report.result import Bound, Estimate, Run
from emulator.timeline import Op, Step, each, play


def estimate(
    fun: Callable[..., Any],
    *args: Any,
    on: Machine,
    algorithms: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    fusion: str = "fused",
) -> Estimate:
    """Time, memory and energy of `fun(*args)` on the machine `on`, from shapes alone.

    Args:
        fun: a JAX function, usually over `on.mesh(...)`.
        args: arrays or `jax.ShapeDtypeStruct`, or trees of them. Nothing is computed with them.
        on: the machine.
        algorithms: collective operation -> algorithm name or callable; default is the machine's
            choice.
        counts: what only values can tell: "while_0" -> trips, "cond_0" -> shares of the branches.
        fusion: "fused" (chains of element-wise operations are one kernel) or "none" (each is one).

    Raises:
        TypeError: `on` is not a machine, or an argument is neither an array nor a shape.
        NotImplementedError: an operation without a cost rule, by name.
        ValueError: a mesh that the machine cannot hold, or a count that only values can tell.
    """
    program = _trace("estimate", fun, args, on)
    costs = _costs(program, args, on, algorithms, counts, fusion)
    return Estimate(**_answer(costs, _name(fun), on))


def run(
    fun: Callable[..., Any],
    *args: Any,
    on: Machine,
    arithmetic: Any = None,
    algorithms: Mapping[str, Any] | None = None,
    fusion: str = "fused",
    tiling: Any = None,
) -> Run:
    """What `fun(*args)` computes on the machine `on`, and everything that `estimate` says.

    `arithmetic` is the machine's own if None; "native" leaves matmuls to XLA. `tiling` is that of
    `em.emulate`; it changes values, not times. Trip counts and
    branches that depend on values are counted while the values are computed. As under `jax.jit`, a
    function is traced once for equal shapes.
    """
    # Imported here because an estimate needs nothing of the values reading.
    from emulator.program.emulate import evaluate_with_counts, trace_once

    program = _trace("run", fun, args, on, trace_once)
    counts = _never_reached(program)
    # What cannot be costed is said before any value is computed.
    costs = _costs(program, args, on, algorithms, counts, fusion)
    value, counted = evaluate_with_counts(program, args, on, arithmetic, algorithms, tiling=tiling)
    if counted:
        costs = _costs(program, args, on, algorithms, counts | counted, fusion)
    return Run(**_answer(costs, _name(fun), on), value=value, counts=counted)


def _never_reached(program: Program) -> dict[str, Any]:
    """Counts of loops and branches that no execution came to: no trips, and any branch."""
    counts: dict[str, Any] = {}
    eqns = dict(walk(program.jaxpr))
    for path, name in dynamic_sites(program.jaxpr).items():
        branches = len(eqns[path].params.get("branches", ()))
        counts[name] = (1.0,) + (0.0,) * (branches - 1) if branches else 0.0
    return counts


def _costs(
    program: Program,
    args: tuple[Any, ...],
    on: Machine,
    algorithms: Mapping[str, Any] | None,
    counts: Mapping[str, Any] | None,
    fusion: str,
) -> Costs:
    paths, _ = jax.tree_util.tree_flatten_with_path(args)
    names = [f"args{jax.tree_util.keystr(path)}" for path, leaf in paths if is_array_like(leaf)]
    return cost(program, on, algorithms=algorithms, counts=counts, fusion=fusion, names=names)


def _name(fun: Any) -> str:
    return getattr(fun, "__name__", type(fun).__name__)


def _answer(costs: Costs, name: str, on: Machine) -> dict[str, Any]:
    """The fields of an Estimate."""
    timeline = play(costs.steps, costs.devices, on.slowness(costs.devices))
    return {
        "name": name,
        "machine": on,
        "mesh_shape": costs.mesh_shape,
        "steps": costs.steps,
        "timeline": timeline,
        "memory": _memory(costs, on),
        "energy": energy(costs.steps, timeline.time_s, len(costs.devices), on),
        "bound": _bound(costs.steps),
        "assumptions": tuple(dict.fromkeys((*costs.assumptions, *on.faults.describe()))),
    }


def _memory(costs: Costs, on: Machine) -> MemoryUse:
    fullest = peak(costs.life)
    communication = costs.communicators * communicator_bytes(on)
    return MemoryUse(
        peak_bytes=fullest.bytes + communication,
        capacity_bytes=on.memory_bytes_per_device,
        arguments_bytes=costs.arguments_bytes,
        results_bytes=costs.results_bytes,
        communication_bytes=communication,
        at=fullest.at,
        alive=fullest.alive,
    )


def _bound(steps: tuple[Step, ...]) -> Bound:
    matmul = vector = memory = links = 0.0
    for step, times in each(steps):
        if isinstance(step, Op):
            matmul += times * step.matmul_s
            vector += times * step.vector_s
            memory += times * step.memory_s
        else:
            links += times * step.bound_s
    return Bound(matmul_s=matmul, vector_s=vector, memory_s=memory, links_s=links)


def _trace(
    call: str, fun: Any, args: tuple[Any, ...], on: Any, how: Callable[..., Program] = trace
) -> Program:
    """The program, after checking what can be checked of the call."""
    if not isinstance(on, Machine):
        raise TypeError(f"{call}(on={on!r}): expected a Machine, such as em.cloudmatrix384()")
    leaves, _ = jax.tree_util.tree_flatten_with_path(args)
    constants = [(path, leaf) for path, leaf in leaves if not is_array_like(leaf)]
    try:
        return how(fun, args)
    except TypeError as error:
        if not constants or not callable(fun):
            raise
        path, leaf = constants[0]
        raise TypeError(
            f"{call}: args{jax.tree_util.keystr(path)} is {leaf!r}, not an array, a number or a "
            f"jax.ShapeDtypeStruct, and {_name(fun)} cannot be traced with it: {error}"
        ) from error
