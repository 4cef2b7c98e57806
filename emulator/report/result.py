"""What an estimate says, and how it is shown."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from emulator.energy import Energy
from emulator.machines import Fact, Machine
from emulator.memory import MemoryUse
from emulator.timeline import ON_MATRIX, CollectiveOp, Op, Step, Timeline, each

DECISIVE = frozenset(
    """chip.clock_hz chip.matmul_peaks_flops_per_s chip.memory_bytes_per_s
    chip.memory_efficiency chip.l2_bytes_per_s chip.launch_s fabric.node.bytes_per_s
    fabric.pod.bytes_per_s power.idle_device_w power.peak_device_w power.matmul_j_per_flop
    power.optics_w power.cooling_share""".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Least seconds that physics allows one device: engines and links overlap perfectly, and
    collectives come one after the other.
    """

    matmul_s: float
    vector_s: float
    memory_s: float
    links_s: float

    @property
    def time_s(self) -> float:
        return max(self.matmul_s, self.vector_s, self.memory_s, self.links_s)

    @property
    def limited_by(self) -> str:
        """What takes that long: matmul, vector, memory or links; "nothing" if it is 0."""
        parts = dataclasses.asdict(self)
        if not self.time_s:
            return "nothing"
        return max(parts, key=lambda name: parts[name]).removesuffix("_s")


def _axis(name: str) -> str:
    """The name of a mesh axis; JAX gives one to the axis of a `jax.pmap` that has none."""
    return "pmap" if name == "_internal_pmap_axis_name" else name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Equal steps of one kind summed up: `count` executions, seconds on the device that takes
    longest.
    """

    name: str
    kind: str
    where: str
    count: float
    time_s: float
    bound_s: float
    flops: float
    bytes: float
    limited_by: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """The time, memory and energy of a program on a machine.

    `time_s` is when the last device finishes; `bound` what physics would allow at best.
    `assumptions` lists what the answer rests on that nobody measured.
    """

    name: str
    machine: Machine
    mesh_shapes: tuple[tuple[tuple[str, int], ...], ...]
    steps: tuple[Step, ...]
    timeline: Timeline
    memory: MemoryUse
    energy: Energy
    bound: Bound
    assumptions: tuple[str, ...]
    overlap: bool = False

    @property
    def time_s(self) -> float:
        """Seconds until the last device has finished."""
        return self.timeline.time_s

    @property
    def bound_s(self) -> float:
        """Seconds below which no schedule of this work on this machine can go that runs its
        collectives one after the other.
        """
        return self.bound.time_s

    @property
    def mesh(self) -> str:
        """The program's mesh as people read it, or its meshes: "dp=48 x tp=8", "x=8; y=2 x z=4".
        Parts of axes that the partitioner has made, "dp/0" and so on, are one axis here.
        """
        shapes = []
        for shape in self.mesh_shapes:
            whole: dict[str, int] = {}
            for name, size in shape:
                axis = re.sub(r"/\d+$", "", _axis(name))
                whole[axis] = whole.get(axis, 1) * size
            shapes.append(" x ".join(f"{axis}={size}" for axis, size in whole.items()))
        return "; ".join(shapes) or "one device"

    @property
    def devices(self) -> tuple[int, ...]:
        """The numbers of the devices that take part."""
        return self.timeline.devices

    @property
    def flops(self) -> float:
        """Floating-point operations of all matmuls on one device."""
        return sum(
            s.flops * n for s, n in each(self.steps) if isinstance(s, Op) and s.kind in ON_MATRIX
        )

    @property
    def utilization(self) -> float:
        """Matmul operations over the time, against the matrix units' BF16 peak."""
        peak = self.machine.chip.matmul_flops_per_s("bfloat16") * self.machine.dies_per_device
        return self.flops / (self.time_s * peak) if self.time_s else 0.0

    @property
    def collectives(self) -> tuple[CollectiveOp, ...]:
        """Each collective of the program, once per place it stands at."""
        return tuple(s for s, _ in each(self.steps) if isinstance(s, CollectiveOp))

    def by_kind(self) -> dict[str, float]:
        """Seconds on one device, on average, by kind of work, largest first; waiting for others is
        what is left of `time_s`.
        """
        count = len(self.devices)
        slow = sum(self.machine.slowness(self.devices)) / count
        total: dict[str, float] = {}
        for step, times in each(self.steps):
            time_s = times * step.mean_s(count) * (slow if isinstance(step, Op) else 1.0)
            total[step.kind] = total.get(step.kind, 0.0) + time_s
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def hidden_s(self) -> float:
        """Seconds of work on one device that overlap hides; 0 without overlap."""
        return max(0.0, sum(self.by_kind().values()) - self.time_s) if self.overlap else 0.0

    def rows(self) -> list[Row]:
        """Equal steps at the same line summed up, longest first."""
        found: dict[tuple[str, str, str], Row] = {}
        for step, n in each(self.steps):
            key = (step.kind, step.name, step.where)
            old = found.get(key)
            flops = n * step.flops if isinstance(step, Op) else 0.0
            moved = n * (step.bytes if isinstance(step, Op) else step.nbytes)
            found[key] = Row(
                name=step.name,
                kind=step.kind,
                where=step.where,
                count=n + (old.count if old else 0.0),
                time_s=n * step.time_s + (old.time_s if old else 0.0),
                bound_s=n * step.bound_s + (old.bound_s if old else 0.0),
                flops=flops + (old.flops if old else 0.0),
                bytes=moved + (old.bytes if old else 0.0),
                limited_by=step.limited_by,
                detail=step.detail,
            )
        return sorted(found.values(), key=lambda row: -row.time_s)

    def evidence(self) -> list[Fact]:
        """The machine's numbers that decide most, each with its source and evidence."""
        peak = self.machine.chip.matmul_flops_per_s("bfloat16")
        return [
            dataclasses.replace(f, value=peak) if f.name.endswith("matmul_peaks_flops_per_s") else f
            for f in self.machine.facts()
            if f.name in DECISIVE
        ]

    def table(self) -> RenderableType:
        """The whole answer for a terminal: a rich renderable whose `str()` is plain text."""
        from emulator.report.table import Tables

        return Tables(self)

    def to_perfetto(self, path: str | Path) -> Path:
        """Writes a trace that https://ui.perfetto.dev opens; returns its path."""
        from emulator.report.perfetto import write

        return write(self, Path(path))

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page; returns its path."""
        from emulator.report.html import write

        return write(self, Path(path))

    def to_chakra(self, folder: str | Path) -> Path:
        """Writes Chakra execution traces, one file per device, into a new folder; returns it."""
        from emulator.report.chakra import write

        return write(self, Path(folder))

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        from emulator.units import seconds, several

        return (
            f"{type(self).__name__}({self.name} on {several(len(self.devices), 'device')} of "
            f"{self.machine.name}: {seconds(self.time_s)}, bound {seconds(self.bound_s)})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Run(Estimate):
    """An estimate together with the values that the machine would compute."""

    value: Any
    counts: dict[str, Any]


def collective_rows(e: Estimate) -> list[tuple[CollectiveOp, float]]:
    """Each different collective of a program and how often it runs, the longest in all first."""
    rows: dict[tuple[object, ...], tuple[CollectiveOp, float]] = {}
    for step, times in each(e.steps):
        if isinstance(step, CollectiveOp):
            key = (step.name, step.op, step.nbytes, step.algorithm, step.time_s, groups_of(step))
            rows[key] = (step, times + (rows[key][1] if key in rows else 0.0))
    return sorted(rows.values(), key=lambda row: -row[0].time_s * row[1])


def groups_of(step: CollectiveOp) -> str:
    """How many groups of how many ranks: "48 x 8"; of the largest, where they differ."""
    return f"{sum(len(p) for p, _ in step.groups)} x {step.ranks}"
