"""Operations -> per-device clocks, in integer picoseconds, all devices at once.

Every device runs the same program in order and has a clock of its own. An operation adds its
duration to all clocks (longer on a slow device); a collective makes the devices of each group wait
for the last of them. Loops run until the clocks' increments repeat, and the remaining trips are
multiplied: adding a constant to all clocks that wait for one another changes nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

PS_PER_S = 10**12
LONGEST_S = 2**63 / PS_PER_S  # what a clock of 64 bits holds

# Kinds of kernels whose operations are those of the matrix unit.
ON_MATRIX = ("matmul", "attention")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """Work that each device does by itself: a kernel.

    Attributes:
        kind: "matmul", "attention", "vector", "move" or "sort": what the report groups by.
        time_s: seconds on each device; `bound_s` what physics allows.
        limited_by: the engine that decides.
        flops: floating-point operations; bytes: memory traffic; l2_bytes: what cores read from and
            write to the cache, if more; all per device.
        matmul_s, vector_s, memory_s: least seconds of each engine at its peak rate, for the bound.
        where: the line of the user's program.
        each: the kernel of each device where they differ: `time_s` and `bound_s` are then those of
            the longest, the amounts and engines' seconds those of a mean device.
    """

    name: str
    kind: str
    time_s: float
    bound_s: float
    limited_by: str
    flops: int
    bytes: int
    matmul_s: float = 0.0
    vector_s: float = 0.0
    memory_s: float = 0.0
    l2_bytes: int = 0
    where: str = ""
    detail: str = ""
    each: tuple[Op, ...] = ()

    def on(self, position: int) -> Op:
        """The kernel that the device at this position runs."""
        return self.each[position] if self.each else self

    def mean_s(self, count: int) -> float:
        """Seconds of one of `count` devices on average."""
        return sum(op.time_s for op in self.each) / count if self.each else self.time_s


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CollectiveOp:
    """One collective in all its groups at once.

    `groups` pairs device positions [group, rank] with seconds [group]; groups of different sizes
    are separate pairs, each with the groups' least seconds in `bounds_s` [group]. `nbytes` follows
    nccl-tests; `link_bytes` is what crosses links, per tier, all devices together; `pairs` are a
    permute's (source, destination) ranks.
    """

    name: str
    op: str
    algorithm: str
    reason: str
    nbytes: int
    dtype: str
    groups: tuple[tuple[NDArray[np.int64], NDArray[np.float64]], ...]
    bounds_s: tuple[NDArray[np.float64], ...]
    link_bytes: tuple[tuple[str, int], ...]
    axes: tuple[str, ...] = ()
    where: str = ""
    detail: str = ""
    kind: str = "collective"
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def time_s(self) -> float:
        """The slowest group's seconds, when all its devices arrive together."""
        return max(float(seconds.max()) for _, seconds in self.groups)

    @property
    def bound_s(self) -> float:
        """Least seconds of the group that needs most."""
        return max(float(bounds.max()) for bounds in self.bounds_s)

    def mean_s(self, count: int) -> float:
        """Seconds of one of `count` devices on average, in a group that arrives together."""
        return sum(p.shape[1] * float(seconds.sum()) for p, seconds in self.groups) / count

    def group_s(self, position: int) -> float:
        """Seconds of the group that the device at this position is in, 0 if it is in none."""
        for positions, seconds in self.groups:
            if len(found := np.nonzero(positions == position)[0]):
                return float(seconds[found[0]])
        return 0.0

    @property
    def ranks(self) -> int:
        return max(positions.shape[1] for positions, _ in self.groups)

    @property
    def limited_by(self) -> str:
        return "links"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Numbers of the values that a step waits for and of those that it makes."""

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loop:
    """A body that runs `trips` times; a fraction is a mean over executions (a branch taken half the
    time), and `device_trips` the fraction of each device where they differ (a branch that some of
    them take); `trips` is then the mean. `needs` has one entry per step of the body.
    """

    name: str
    trips: float
    device_trips: tuple[float, ...] = ()
    body: tuple[Step, ...]
    needs: tuple[Needs, ...] = ()
    kind: str = "loop"


Step = Op | CollectiveOp | Loop


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One step on all devices: start and end clocks in picoseconds. Loops show their first trip, or
    the mean of executions if that is less than one trip.
    """

    step: Step
    depth: int
    start_ps: NDArray[np.int64]
    end_ps: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Clocks of all devices at the end, and when each step ran on each of them."""

    devices: tuple[int, ...]
    clocks_ps: NDArray[np.int64]
    spans: tuple[Span, ...]

    @property
    def time_ps(self) -> int:
        return int(self.clocks_ps.max(initial=0))

    @property
    def time_s(self) -> float:
        return self.time_ps / PS_PER_S

    def lanes(self) -> list[list[int]]:
        """Positions of devices grouped by identical clocks throughout, so that a trace shows each
        story once.
        """
        if not self.spans:
            return [list(range(len(self.devices)))]
        table = np.stack([s.start_ps for s in self.spans] + [s.end_ps for s in self.spans])
        lanes: dict[bytes, list[int]] = {}
        for i, column in enumerate(np.ascontiguousarray(table.T)):
            lanes.setdefault(column.tobytes(), []).append(i)
        return list(lanes.values())


def play(
    steps: Sequence[Step], devices: Sequence[int], slowness: Sequence[float] | None = None
) -> Timeline:
    """Runs `steps` on devices that all start at zero. `slowness` says how many times longer kernels
    take on each device.

    Raises:
        ValueError: it takes longer than a clock can hold.
    """
    return Player(devices, slowness).play(steps, ())


class Player:
    """One step after the other, on every device."""

    def __init__(self, devices: Sequence[int], slowness: Sequence[float] | None) -> None:
        self.devices = tuple(devices)
        self.count = len(self.devices)
        self.slow = np.ones(self.count) if slowness is None else np.asarray(slowness, np.float64)
        self.alike = bool((self.slow == 1).all())
        self.spans: list[Span] = []
        self.quiet = False

    def play(self, steps: Sequence[Step], needs: Sequence[Needs]) -> Timeline:
        most_s = _most_s(steps) * float(self.slow.max(initial=1.0))
        if not most_s < LONGEST_S:
            raise ValueError(
                f"the program takes up to {most_s:.3g} s, but clocks in picoseconds end at "
                f"{LONGEST_S:.3g} s ({LONGEST_S / 86400:.0f} days): let it do less, such as fewer "
                "trips of its loops"
            )
        clocks = self.run(steps, needs, np.zeros(self.count, np.int64), 0)
        return Timeline(devices=self.devices, clocks_ps=clocks, spans=tuple(self.spans))

    def run(
        self,
        steps: Sequence[Step],
        needs: Sequence[Needs],
        clocks: NDArray[np.int64],
        depth: int,
    ) -> NDArray[np.int64]:
        """The clocks after `steps`, which all start at `clocks`."""
        for step in steps:
            start = clocks
            slot = len(self.spans)
            if isinstance(step, Op):
                clocks = clocks + self.kernel_ps(step)
            elif isinstance(step, CollectiveOp):
                clocks = meet(step, clocks)
            else:
                clocks = self.loop(step, clocks, depth + 1)
            if not self.quiet:
                self.spans.insert(slot, Span(step=step, depth=depth, start_ps=start, end_ps=clocks))
        return clocks

    def kernel_ps(self, step: Op) -> int | NDArray[np.int64]:
        if step.each:
            seconds = np.array([op.time_s for op in step.each])
            return np.ceil(seconds * self.slow * PS_PER_S).astype(np.int64)
        if self.alike:
            return math.ceil(step.time_s * PS_PER_S)
        return np.ceil(step.time_s * self.slow * PS_PER_S).astype(np.int64)

    def loop(self, step: Loop, clocks: NDArray[np.int64], depth: int) -> NDArray[np.int64]:
        if step.trips <= 0 or not step.body:
            return clocks
        if step.trips < 1:
            first = len(self.spans)
            after = self.run(step.body, step.needs, clocks, depth)
            trips = np.array(step.device_trips) if step.device_trips else step.trips
            self.spans[first:] = [
                dataclasses.replace(
                    span,
                    start_ps=_part(clocks, span.start_ps, trips),
                    end_ps=_part(clocks, span.end_ps, trips),
                )
                for span in self.spans[first:]
            ]
            return _part(clocks, after, trips)
        partners = _partners(step.body, self.count)
        left = step.trips
        was_quiet = self.quiet
        while left >= 1:
            before = clocks
            clocks = self.run(step.body, step.needs, clocks, depth)
            self.quiet = True  # only the first trip is kept as spans
            left -= 1
            grown = clocks - before
            if _steady(grown, partners):
                clocks = clocks + np.round(grown * left).astype(np.int64)
                left = 0.0
        if left > 0:
            clocks = _part(clocks, self.run(step.body, step.needs, clocks, depth), left)
        self.quiet = was_quiet
        return clocks


def meet(step: CollectiveOp, clocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The clocks after a collective, whose groups each wait for the last of their devices."""
    clocks = clocks.copy()
    for positions, seconds in step.groups:
        start = clocks[positions].max(axis=1)
        end = start + np.ceil(seconds * PS_PER_S).astype(np.int64)
        clocks[positions] = end[:, None]
    return clocks


def _most_s(steps: Sequence[Step]) -> float:
    """Seconds that no healthy device exceeds if it never waits."""
    return sum(
        max(step.device_trips, default=step.trips) * _most_s(step.body)
        if isinstance(step, Loop)
        else step.time_s
        for step in steps
    )


def _part(
    start: NDArray[np.int64], end: NDArray[np.int64], share: float | NDArray[np.float64]
) -> NDArray[np.int64]:
    """The clocks after a share of the way from `start` to `end`; shares may differ by device."""
    return start + np.round((end - start) * share).astype(np.int64)


def _partners(steps: Sequence[Step], count: int) -> NDArray[np.int64]:
    """Label of each device: equal labels for devices that some chain of collectives in `steps` ties
    together.
    """
    labels = np.arange(count)
    changed = True
    groups = [positions for positions in _groups(steps) if positions.shape[1] > 1]
    while changed:
        before = labels
        for positions in groups:
            low = labels[positions].min(axis=1)
            labels = labels.copy()
            np.minimum.at(labels, positions, low[:, None])
        changed = not np.array_equal(before, labels)
    return labels


def _groups(steps: Sequence[Step]) -> Iterator[NDArray[np.int64]]:
    for step in steps:
        if isinstance(step, CollectiveOp):
            yield from (positions for positions, _ in step.groups)
        elif isinstance(step, Loop):
            yield from _groups(step.body)


def _steady(grown: NDArray[np.int64], partners: NDArray[np.int64]) -> bool:
    """Whether all devices that depend on one another advanced equally, so that every further trip
    does the same.
    """
    low = np.full(len(grown), np.iinfo(np.int64).max)
    np.minimum.at(low, partners, grown)
    high = np.full(len(grown), np.iinfo(np.int64).min)
    np.maximum.at(high, partners, grown)
    seen = low <= high
    return bool(np.array_equal(low[seen], high[seen]))


def each(steps: Sequence[Step], times: float = 1.0) -> Iterator[tuple[Op | CollectiveOp, float]]:
    """Every kernel and collective with how often it runs."""
    for step in steps:
        if isinstance(step, Loop):
            yield from each(step.body, times * step.trips)
        else:
            yield step, times
