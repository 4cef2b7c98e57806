"""`estimate` and `run`: one program, read for its time and, for `run`, for its values."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from emulator import overlap as two_engines
from emulator.energy import energy
from emulator.machines import Machine
from emulator.memory import MemoryUse, communicator_bytes, peak
from emulator.program.auto_sharded import trace_divided
from emulator.program.costs import Costs, cost
from emulator.program.trace import (
    Program,
    dynamic_sites,
    held,
    host_sites,
    is_array_like,
    walk,
)
from emulator.report.result import Bound, Estimate, Run
from emulator.timeline import CollectiveOp, Step, each, play

NO_OVERLAP = "no overlap of compute and communication"
OVERLAP = (
    "collectives overlap with kernels that do not wait for them, at no cost to either "
    "(overlap=True): the most that overlap can give in the program's order"
)


class OutOfMemoryError(jax.errors.JaxRuntimeError):
    """A program that does not fit the memory of one device: `memory` says by how much and why."""

    def __init__(self, memory: MemoryUse) -> None:
        self.memory = memory
        super().__init__(
            f"{memory.explain()}\nDivide the program over more devices, donate arguments "
            "(jax.jit(donate_argnums=...)) or recompute (jax.checkpoint); allow_oom=True "
            "(--allow-oom) answers nevertheless."
        )


def estimate(
    fun: Callable[..., Any],
    *args: Any,
    on: Machine,
    algorithms: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    fusion: str = "chains",
    overlap: bool = False,
    allow_oom: bool = False,
) -> Estimate:
    """Time, memory and energy of `fun(*args)` on the machine `on`, from shapes alone.

    Args:
        fun: a JAX function, usually over `on.mesh(...)`.
        args: arrays or `jax.ShapeDtypeStruct`, or trees of them. Nothing is computed with them.
        on: the machine.
        algorithms: collective operation -> algorithm name or callable; default is the machine's
            choice.
        counts: what only values can tell: "while_0" -> trips, "cond_0" -> shares of the branches
            (or such a row for each device), "ragged_dot_0" -> rows of each group (likewise),
            "ragged_all_to_all_0" -> rows [source][destination] (or such a table for each group of
            devices). `run(...).counts` is of this form. A call to the host takes the seconds that
            are given for it: "pure_callback_0", "io_callback_0".
        fusion: "chains" (what a graph compiler makes of neighbours: chains of element-wise
            operations and reductions are one kernel) or "eager" (each operation is one, every
            intermediate goes through memory).
        overlap: whether collectives run beside kernels that do not wait for them. Traces of such
            machines show next to none.
        allow_oom: answer also if the program does not fit the memory of a device.

    Raises:
        OutOfMemoryError: the program does not fit, with the largest buffers by name.
        TypeError: `on` is not a machine, or an argument is neither an array nor a shape.
        NotImplementedError: an operation without a cost rule, by name.
        ValueError: a mesh that the machine cannot hold, or a count that only values can tell.
    """
    args = held(fun, args)
    with _no_collections():
        program = _trace("estimate", fun, args, on)
        costs = _costs(program, args, on, algorithms, counts, fusion)
        return Estimate(**_answer(costs, _name(fun), on, _memory(costs, on, allow_oom), overlap))


def run(
    fun: Callable[..., Any],
    *args: Any,
    on: Machine,
    arithmetic: Any = None,
    algorithms: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    fusion: str = "chains",
    tiling: Any = None,
    overlap: bool = False,
    allow_oom: bool = False,
    devices: Sequence[Any] | None = None,
) -> Run:
    """What `fun(*args)` computes on the machine `on`, and everything that `estimate` says.

    Args:
        fun, args: as for `estimate`, the arguments with values. As under `jax.jit`, a function is
            traced once for equal shapes.
        on, algorithms, fusion, overlap, allow_oom: as for `estimate`.
        arithmetic: as for `em.emulate`: None is the machine's own, "native" leaves matmuls to XLA.
        counts: the seconds of calls to the host, "pure_callback_0" and "io_callback_0". Trip counts
            and branches that depend on values are counted while these are computed.
        tiling: as for `em.emulate`; it changes values, not times.
        devices: the real ones that compute, as for `em.emulate`.

    Raises:
        OutOfMemoryError: the program does not fit; nothing has been computed.
        TypeError, ValueError, NotImplementedError: as for `estimate` and `em.emulate`, and for an
            argument that is a shape without values.
    """
    # Imported here because an estimate needs nothing of the values reading.
    from emulator.program.emulate import evaluate_with_counts, trace_once

    args = held(fun, args)
    program = _trace("run", fun, args, on, trace_once)
    given = dict(counts or {})
    if others := set(given) - set(host_sites(program.jaxpr).values()):
        raise ValueError(
            f"run: counts names {', '.join(sorted(others))}, which run counts itself; give only "
            "the seconds of calls to the host"
        )
    counts = _never_reached(program) | given
    # What cannot be costed or does not fit is said before any value is computed, but for calls to
    # the host in branches, which may never be taken.
    costs = _costs(program, args, on, algorithms, _in_branches(program) | counts, fusion)
    memory = _memory(costs, on, allow_oom)
    value, counted = evaluate_with_counts(
        program, args, on, arithmetic, algorithms, tiling=tiling, devices=devices
    )
    counts |= counted
    if counted:
        costs = _costs(program, args, on, algorithms, counts, fusion)
        memory = _memory(costs, on, allow_oom)
    answer = _answer(costs, _name(fun), on, memory, overlap)
    return Run(**answer, value=value, counts=counts)


def estimate_program(
    program: Program,
    args: Sequence[Any],
    name: str,
    *,
    on: Machine,
    algorithms: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any],
    fusion: str = "chains",
    overlap: bool = False,
    allow_oom: bool = False,
) -> Estimate:
    """The estimate of a program that is traced already. Loops and branches that `counts` does not
    name count as never reached.

    Raises what `estimate` does.
    """
    known = _never_reached(program) | {**counts}
    costs = _costs(program, tuple(args), on, algorithms, known, fusion)
    return Estimate(**_answer(costs, name, on, _memory(costs, on, allow_oom), overlap))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without the cyclic garbage collector, which would go over the whole program again and again
    while it grows and find nothing: up to a third of the time of a long one.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _never_reached(program: Program) -> dict[str, Any]:
    """Counts of loops and branches that no execution came to: no trips, and any branch."""
    counts: dict[str, Any] = {}
    eqns = dict(walk(program.jaxpr))
    for path, name in dynamic_sites(program.jaxpr).items():
        branches = len(eqns[path].params.get("branches", ()))
        counts[name] = (1.0,) + (0.0,) * (branches - 1) if branches else 0.0
    return counts


def _in_branches(program: Program) -> dict[str, Any]:
    """No seconds for calls to the host inside branches."""
    return {n: 0.0 for path, n in host_sites(program.jaxpr).items() if re.search(r"\.\d", path)}


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
    if isinstance(fun, functools.partial):
        return _name(fun.func)
    return getattr(fun, "__name__", type(fun).__name__)


def _answer(
    costs: Costs, name: str, on: Machine, memory: MemoryUse, overlap: bool
) -> dict[str, Any]:
    """The fields of an Estimate."""
    slowness = on.slowness(costs.devices)
    if overlap:
        timeline = two_engines.play(costs.steps, costs.needs, costs.devices, slowness)
    else:
        timeline = play(costs.steps, costs.devices, slowness)
    notes = (OVERLAP if overlap else NO_OVERLAP, *costs.assumptions, *on.faults.describe())
    return {
        "name": name,
        "machine": on,
        "mesh_shapes": costs.mesh_shapes,
        "steps": costs.steps,
        "timeline": timeline,
        "memory": memory,
        "energy": energy(
            costs.steps,
            timeline.time_s,
            len(costs.devices),
            on,
            sum(slowness) / len(slowness),
        ),
        "bound": _bound(costs.steps, len(costs.devices)),
        "assumptions": tuple(dict.fromkeys(notes)),
        "overlap": overlap,
    }


def _memory(costs: Costs, on: Machine, allow_oom: bool) -> MemoryUse:
    """What the program needs; raises if that is more than there is."""
    fullest = peak(costs.life)
    communication = costs.communicators * communicator_bytes(on)
    use = MemoryUse(
        peak_bytes=fullest.bytes + communication,
        capacity_bytes=on.memory_bytes_per_device,
        arguments_bytes=costs.arguments_bytes,
        results_bytes=costs.results_bytes,
        communication_bytes=communication,
        at=fullest.at,
        alive=fullest.alive,
    )
    if not (use.fits or allow_oom):
        raise OutOfMemoryError(use)
    return use


def _bound(steps: tuple[Step, ...], count: int) -> Bound:
    """Each engine's least seconds on the device whose engine has most to do."""
    matmul = vector = memory = 0.0  # of what all devices do alike
    own = np.zeros((3, count))
    links = np.zeros(count)
    for step, times in each(steps):
        if isinstance(step, CollectiveOp):
            for (positions, _), bounds in zip(step.groups, step.bounds_s, strict=True):
                links[positions] += times * bounds[:, None]
        elif step.each:
            work = [(op.matmul_s, op.vector_s, op.memory_s) for op in step.each]
            own += times * np.array(work).T
        else:
            matmul += times * step.matmul_s
            vector += times * step.vector_s
            memory += times * step.memory_s
    most = own.max(axis=1, initial=0.0).tolist()
    return Bound(
        matmul_s=matmul + most[0],
        vector_s=vector + most[1],
        memory_s=memory + most[2],
        links_s=float(links.max(initial=0.0)),
    )


def _trace(
    call: str, fun: Any, args: tuple[Any, ...], on: Any, how: Callable[..., Program] = trace_divided
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
