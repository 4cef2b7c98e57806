"""`em.compare`: one program on several machines, values and times side by side."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import RenderableType

import kernels
from emulator.machines import Machine, cloudmatrix384, gb200_nvl72
from emulator.program.auto_sharded import trace_divided
from emulator.program.emulate import trace_once
from emulator.program.trace import held, walk
from emulator.program.wide import Wide, in_fp64
from emulator.report.answer import estimate, run
from emulator.report.errors import Errors, differing, errors
from emulator.report.result import Estimate, Run

#: A machine's program: a function and its arguments.
Prepare = Callable[[Machine], tuple[Callable[..., Any], tuple[Any, ...]]]

OWN = "own"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Column:
    """The program on one machine in one arithmetic; `answer` is a Run where values were computed.
    `title` is what the machine is called beside the others.

    `errors` has one entry for each output, `differing` how many elements of it have other bits than
    in the first column (None where shapes or types differ). `narrow` names what the FP64 values
    they are measured against had to compute in the program's own types.
    """

    machine: Machine
    title: str
    arithmetic: str
    answer: Estimate
    errors: tuple[Errors, ...] = ()
    differing: tuple[int | None, ...] = ()
    narrow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.title}, {self.arithmetic}"

    @property
    def rel_rms(self) -> float:
        """The worst floating output's error: root mean square over that of the exact values."""
        return max((e.rel_rms for e in self.errors if e.floating), default=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Comparison:
    """What `compare` found: a column for each machine and arithmetic, in the order asked for."""

    name: str
    columns: tuple[Column, ...]

    @property
    def machines(self) -> tuple[Column, ...]:
        """The first column of each machine."""
        first: dict[str, Column] = {}
        for column in self.columns:
            first.setdefault(column.title, column)
        return tuple(first.values())

    def of(self, machine: Machine) -> tuple[Column, ...]:
        """The columns of one machine."""
        return tuple(c for c in self.columns if c.machine == machine)

    def conclusions(self) -> tuple[str, ...]:
        """What the columns say, and whether it depends on the arithmetic that was chosen."""
        from emulator.report.compare_table import conclusions

        return conclusions(self)

    def table(self) -> RenderableType:
        """The comparison for a terminal: a rich renderable whose `str()` is plain text."""
        from emulator.report.compare_table import Tables

        return Tables(self)

    def to_json(self) -> str:
        """All numbers as JSON text."""
        from emulator.report.compare_table import as_json

        return as_json(self)

    def to_csv(self) -> str:
        """All numbers as CSV text, a line for each column and output."""
        from emulator.report.compare_table import as_csv

        return as_csv(self)

    def __str__(self) -> str:
        return str(self.table())


def compare(
    fun: Callable[..., Any],
    *args: Any,
    on: Sequence[Machine] | None = None,
    mesh: Callable[[Machine], Any] | None = None,
    arithmetics: Sequence[Any] | str | None = None,
    values: bool = True,
    algorithms: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    fusion: str = "chains",
    overlap: bool = False,
    allow_oom: bool = False,
) -> Comparison:
    """`fun(*args)` on each machine: seconds, memory and energy, and how far its values are from
    those of the same program in FP64.

    Args:
        fun: the program. One over a mesh of 384 devices runs on no machine of 72: let it have a
            parameter `mesh` then and say with `mesh` what it is on each machine.
        args: arrays, or trees of them; `jax.ShapeDtypeStruct` will do if `values` is False.
        on: the machines; default CloudMatrix 384 and GB200 NVL72.
        mesh: machine -> the mesh that `fun` gets by name.
        arithmetics: how matmuls sum, each on every machine: "own" (the machine's), "native" (XLA's)
            or what `em.emulate` takes. "candidates" is every machine's own and, where that is not
            known for certain, all that it might be: does a conclusion depend on it?
        values: whether to compute values, and their errors; otherwise the answer is of estimates.
        algorithms, fusion, overlap, allow_oom: as for `em.estimate`.
        counts: as for `em.estimate`, if no values are computed.

    Raises:
        TypeError, ValueError: what is wrong with an argument, and what `em.run` raises.
    """
    machines = _machines(on)
    _check_mesh(fun, mesh)

    def prepare(machine: Machine) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (fun if mesh is None else functools.partial(fun, mesh=mesh(machine))), args

    return compare_prepared(
        getattr(fun, "__name__", type(fun).__name__),
        prepare,
        machines,
        arithmetics,
        values,
        {"algorithms": algorithms, "fusion": fusion, "overlap": overlap, "allow_oom": allow_oom},
        counts,
    )


def compare_prepared(
    name: str,
    prepare: Prepare,
    machines: Sequence[Machine],
    arithmetics: Sequence[Any] | str | None,
    values: bool,
    how: Mapping[str, Any],
    counts: Mapping[str, Any] | None = None,
) -> Comparison:
    """`compare` of a program that is prepared for each machine."""
    if values and counts is not None:
        raise ValueError(
            f"compare(counts={counts!r}): trips and branches are counted while values are "
            "computed; leave it out, or ask for values=False"
        )
    if not values and arithmetics is not None:
        raise ValueError(
            f"compare(arithmetics={arithmetics!r}, values=False): times do not depend on how "
            "matmuls sum; leave one of the two out"
        )
    units = [_units(arithmetics, machine) for machine in machines]  # refuse before anything runs
    columns: list[Column] = []
    for machine, title, listed in zip(machines, _titles(machines), units, strict=True):
        fun, args = prepare(machine)
        args = held(fun, args)
        program = (trace_once if values else trace_divided)(fun, args)
        _check_fits(program.jaxpr, machine)
        if not values:
            answer = estimate(fun, *args, on=machine, counts=counts, **how)
            columns.append(
                Column(machine=machine, title=title, arithmetic="no values", answer=answer)
            )
            continue
        exact = None
        for label, arithmetic in listed:
            ran = run(fun, *args, on=machine, arithmetic=arithmetic, **how)
            exact = exact or in_fp64(program, args, machine)
            columns.append(_column(machine, title, label, ran, exact, columns))
    return Comparison(name=name, columns=tuple(columns))


def _column(
    machine: Machine, title: str, label: str, ran: Run, exact: Wide, before: Sequence[Column]
) -> Column:
    leaves = _leaves(ran)
    first = [leaf for _, leaf in (outputs(before[0]) if before else leaves)]
    alike = len(first) == len(leaves)
    return Column(
        machine=machine,
        title=title,
        arithmetic=label,
        answer=ran,
        errors=tuple(errors(n, x, e) for (n, x), e in zip(leaves, exact.leaves, strict=True)),
        differing=tuple(
            differing(x, first[i]) if alike else None for i, (_, x) in enumerate(leaves)
        ),
        narrow=exact.narrow,
    )


def outputs(column: Column) -> list[tuple[str, np.ndarray]]:
    """A column's outputs by name, random keys as the words they are made of."""
    return _leaves(column.answer)


def _leaves(ran: Any) -> list[tuple[str, np.ndarray]]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(ran.value):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            leaf = jax.random.key_data(leaf)
        found.append((jax.tree_util.keystr(path) or "result", np.asarray(leaf)))
    return found


def _machines(on: Any) -> tuple[Machine, ...]:
    if on is None:
        return cloudmatrix384(), gb200_nvl72()
    machines = (on,) if isinstance(on, Machine) else tuple(on) if isinstance(on, Sequence) else ()
    if not machines or not all(isinstance(machine, Machine) for machine in machines):
        raise TypeError(
            f"compare(on={on!r}): expected a list of machines, such as [em.cloudmatrix384(), "
            "em.gb200_nvl72()]"
        )
    if repeated := {m.name for m in machines if machines.count(m) > 1}:
        raise ValueError(
            f"compare(on=...): {', '.join(sorted(repeated))} is listed more than once; give "
            "different machines"
        )
    return machines


def _titles(machines: Sequence[Machine]) -> list[str]:
    """A name for each machine that is no other's: a pod and the same pod with faults, or of dies,
    have one name.
    """
    titles = [machine.name for machine in machines]
    repeated = {title for title in titles if titles.count(title) > 1}
    for i, machine in enumerate(machines):
        if machine.name in repeated:
            faults = " with faults" if machine.faults else ""
            titles[i] = f"{machine.name} ({machine.device_kind}s{faults})"
    return [
        title if title not in titles[:i] else f"{title} #{titles[:i].count(title) + 1}"
        for i, title in enumerate(titles)
    ]


def _check_mesh(fun: Any, mesh: Any) -> None:
    if not callable(fun):
        raise TypeError(f"compare: fun must be callable, got {type(fun).__name__}: {fun!r}")
    if mesh is not None and not callable(mesh):
        raise TypeError(
            f"compare(mesh={mesh!r}): machines differ, so it must be a function of the machine: "
            "mesh=lambda machine: machine.mesh(...)"
        )
    try:
        parameter = inspect.signature(fun).parameters.get("mesh")
    except ValueError:  # a builtin says nothing of its parameters
        return
    if parameter is None and mesh is not None:
        raise ValueError("compare(mesh=...): fun has no parameter 'mesh' to receive it")
    if parameter is not None and parameter.default is parameter.empty and mesh is None:
        raise ValueError(
            "compare: fun has a parameter 'mesh'; say what it is on each machine: "
            "mesh=lambda machine: machine.mesh(...)"
        )


def _check_fits(jaxpr: Any, machine: Machine) -> None:
    meshes = [e.params["mesh"] for _, e in walk(jaxpr) if e.primitive.name == "shard_map"]
    largest = max(meshes, key=lambda mesh: mesh.size, default=None)
    if largest is not None and largest.size > machine.num_devices:
        shape = " x ".join(f"{name}={size}" for name, size in largest.shape.items())
        raise ValueError(
            f"compare: the program is over a mesh {shape} of {largest.size} devices, but "
            f"{machine.name} has {machine.num_devices}: give the function a parameter 'mesh' and "
            "say what it is on each machine, mesh=lambda machine: machine.mesh(...)"
        )


def _units(arithmetics: Any, machine: Machine) -> list[tuple[str, Any]]:
    """(what it is called, what `em.run` takes) of each arithmetic on this machine."""
    if arithmetics is None:
        return [(machine.arithmetic, None)]
    if arithmetics == "candidates":
        known = kernels.ASCEND_910C_CANDIDATES if machine.arithmetic == "ASCEND_910C" else {}
        own = kernels.ASCEND_910C
        others = {name: unit for name, unit in known.items() if unit != own}
        return [(machine.arithmetic, None), *others.items()]
    if isinstance(arithmetics, str) or not isinstance(arithmetics, Sequence) or not arithmetics:
        raise TypeError(
            f'compare(arithmetics={arithmetics!r}): expected "candidates", or a list of names, '
            'records, "own" or "native"'
        )
    found: dict[str, Any] = {}
    for each in arithmetics:
        if each == OWN:
            found[machine.arithmetic] = None
        elif isinstance(each, str) and each == "native":
            found["native XLA"] = each
        else:
            if not isinstance(each, str | os.PathLike | kernels.Arithmetic):
                raise TypeError(
                    f"compare(arithmetics=[..., {each!r}]): expected a name, a file, a "
                    'kernels.Arithmetic, "own" or "native"'
                )
            unit = (
                each
                if isinstance(each, kernels.Arithmetic)
                else kernels.arithmetic_file.named(each)
            )
            found[unit.name] = unit
    return list(found.items())
