"""Peak memory of one device by liveness, and whether it fits.

The program is given as moments in order, each with the buffers it reads and the buffers it creates.
A buffer lives from the moment that creates it to the last one that reads it. Arguments live
throughout unless donated; results until the end. A kernel that may work in place takes over the
space of an operand of at least its size that dies there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from emulator.machines import Machine
from emulator.units import capacity


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """One array on one device."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ValueError(f"Buffer(bytes={self.bytes}): expected at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One step: what it reads and writes, and the bodies that run inside it (only the largest
    counts).

    `credit_bytes` are bytes that both `writes` and the bodies count: a loop's carry.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    in_place: bool = False
    credit_bytes: int = 0
    inner: tuple[Lifetimes, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lifetimes:
    """A body: its moments, the buffers of its values, and those that must survive its end.

    `held` are alive from the start to the end and belong to this body (arguments that were not
    donated, constants); `given` are alive at the start, belong to this body and may be freed
    (donated arguments). Values of the enclosing body are simply not among `buffers`.
    """

    buffers: Mapping[int, Buffer]
    moments: tuple[Moment, ...]
    held: frozenset[int] = frozenset()
    given: frozenset[int] = frozenset()
    results: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Bytes at the fullest moment of a body, the moment's name, and what is alive then, largest
    first.
    """

    bytes: int
    at: str
    alive: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """One device's memory. `communication_bytes` are the collective library's own buffers."""

    peak_bytes: int
    capacity_bytes: int
    arguments_bytes: int
    results_bytes: int
    communication_bytes: int
    at: str
    alive: tuple[Buffer, ...]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity_bytes

    @property
    def message(self) -> str:
        """One line: how much is used, or, in the words people know, that it does not fit."""
        used, room = capacity(self.peak_bytes), capacity(self.capacity_bytes)
        if self.fits:
            share = self.peak_bytes / self.capacity_bytes
            return f"{used} of {room} per device ({share:.1%})"
        over = capacity(self.peak_bytes - self.capacity_bytes)
        return (
            f"RESOURCE_EXHAUSTED: Out of memory: the program needs {used} of {room} per device "
            f"at {self.at}. Exceeded capacity by {over}."
        )


def peak(life: Lifetimes) -> Peak:
    """The fullest moment of a body."""
    last: dict[int, int] = {}
    for i, moment in enumerate(life.moments):
        for v in moment.reads:
            last[v] = i
        for v in moment.writes:
            last.setdefault(v, i)  # never read: dies at once
    for v in life.held | life.results:
        last[v] = len(life.moments)

    buffers = life.buffers
    alive = {v: None for v in sorted(life.held | life.given) if v in buffers}
    size = sum(buffers[v].bytes for v in alive)
    most, at, snapshot = size, "the start", list(alive)
    extra: tuple[Buffer, ...] = ()
    for i, moment in enumerate(life.moments):
        dying = [v for v in dict.fromkeys(moment.reads) if v in alive and last[v] == i]
        new = [v for v in moment.writes if v in buffers and v not in alive]
        if moment.in_place:
            for v in _taken_over(dying, new, buffers):
                del alive[v]
                size -= buffers[v].bytes
        for v in new:
            alive[v] = None
            size += buffers[v].bytes
        inside = max((peak(body) for body in moment.inner), key=lambda p: p.bytes, default=None)
        here = size + (max(0, inside.bytes - moment.credit_bytes) if inside else 0)
        if here > most:
            most, snapshot = here, list(alive)
            extra = inside.alive if inside else ()
            at = f"{moment.name}: {inside.at}" if inside and inside.bytes else moment.name
        for v in (*dying, *new):
            if v in alive and last[v] <= i:
                del alive[v]
                size -= buffers[v].bytes
    largest = sorted([*(buffers[v] for v in snapshot), *extra], key=lambda b: -b.bytes)
    return Peak(bytes=most, at=at, alive=tuple(largest))


def _taken_over(
    dying: Sequence[int], new: Sequence[int], buffers: Mapping[int, Buffer]
) -> list[int]:
    """Dying operands whose space the new buffers reuse: each at least as large as the one that
    takes it.
    """
    free = sorted(dying, key=lambda v: buffers[v].bytes)
    taken = []
    for v in sorted(new, key=lambda v: -buffers[v].bytes):
        fit = next((f for f in free if buffers[f].bytes >= buffers[v].bytes), None)
        if fit is not None:
            free.remove(fit)
            taken.append(fit)
    return taken


def communicator_bytes(on: Machine) -> int:
    """Device memory that the collective library keeps for each group a device belongs to.

    HCCL: two buffers of 200 MB (HCCL_BUFFSIZE) per communicator and die, documented. NCCL: 4 MiB
        (NCCL_BUFFSIZE) in each of 16 channels, in both directions, assumed.
    """
    if on.arithmetic.startswith("ASCEND"):
        return 2 * 200 * 10**6 * on.dies_per_device
    return 2 * 16 * 4 * 2**20
