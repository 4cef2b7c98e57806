"""Peak memory of one device by liveness, and whether it fits.

The program is given as moments in order, each with the buffers it reads and the buffers it creates.
A buffer lives from the moment that creates it to the last one that reads it. Arguments live
throughout unless donated; results until the end. A kernel that may work in place takes over the
space of an operand of its size that dies there. The carry of a loop passes into its body and out
again; what the loop stacks up (residuals of a gradient among it) is there from its first trip on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from emulator.machines import Machine
from emulator.units import capacity

LARGEST = 10  # buffers that an error names


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

    @property
    def type(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One step: what it reads and writes, and the bodies that run inside it (only the largest
    counts).

    Attributes:
        writes: created when the step starts.
        results: created when the bodies end, whose own buffers they were until then.
        in_place: each of `writes` may take over an operand of its size that dies here.
        handed: operands that pass into the bodies: if they die here, their space is the bodies'.
        scratch: what only the step itself needs.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    results: tuple[int, ...] = ()
    in_place: bool = False
    handed: tuple[int, ...] = ()
    inner: tuple[Lifetimes, ...] = ()
    scratch: tuple[Buffer, ...] = ()


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
    """One device's memory. `communication_bytes` are the collective library's own buffers;
    `alive` is everything else that is there at the fullest moment `at`.
    """

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
    def share(self) -> str:
        """How much of the memory is used."""
        used, room = capacity(self.peak_bytes), capacity(self.capacity_bytes)
        return f"{used} of {room} per device ({self.peak_bytes / self.capacity_bytes:.1%})"

    @property
    def message(self) -> str:
        """One line: how much is used, or, in the words people know, that it does not fit."""
        if self.fits:
            return self.share
        used, room = capacity(self.peak_bytes), capacity(self.capacity_bytes)
        over = capacity(self.peak_bytes - self.capacity_bytes)
        return (
            f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {self.peak_bytes} bytes: "
            f"the program needs {used} of {room} per device at {self.at}. Exceeded capacity by "
            f"{over}."
        )

    def explain(self) -> str:
        """The message, and the largest buffers at the fullest moment, one a line."""
        rows = [(b.bytes, b.type, b.name) for b in self.alive[:LARGEST]]
        if rest := self.alive[LARGEST:]:
            rows.append((sum(b.bytes for b in rest), "", f"{len(rest)} smaller ones"))
        if self.communication_bytes:
            rows.append((self.communication_bytes, "", "collective library's buffers"))
        wide = max((len(kind) for _, kind, _ in rows), default=0)
        lines = [f"  {capacity(size):>12}  {kind:<{wide}}  {name}" for size, kind, name in rows]
        return "\n".join([self.message, "Largest buffers on each device then:", *lines])


def peak(life: Lifetimes) -> Peak:
    """The fullest moment of a body."""
    most, at = 0, -1
    insides: dict[int, Peak] = {}
    for i, (here, _, inside) in enumerate(_moments(life), start=-1):
        if inside is not None:
            insides[i] = inside
        if here > most:
            most, at = here, i
    for i, (_, alive, _) in enumerate(_moments(life, insides), start=-1):
        if i == at:
            buffers = [life.buffers[v] for v in alive]
            break
    moment = life.moments[at] if at >= 0 else None
    name = moment.name if moment else "the start"
    if moment and at in insides:
        buffers += insides[at].alive
        if insides[at].bytes and life.moments[at].inner:
            name = f"{moment.name}: {insides[at].at}"
    if moment:
        buffers += moment.scratch
    return Peak(bytes=most, at=name, alive=tuple(sorted(buffers, key=lambda b: -b.bytes)))


def _moments(
    life: Lifetimes, insides: Mapping[int, Peak] | None = None
) -> Iterator[tuple[int, Mapping[int, None], Peak | None]]:
    """At the start and during each moment: bytes, what is alive, and the fullest of the bodies
    inside (taken from `insides` if given).
    """
    buffers = life.buffers
    last = _last_uses(life)
    alive = {v: None for v in sorted(life.held | life.given) if v in buffers}
    size = sum(buffers[v].bytes for v in alive)
    yield size, alive, None

    def end(values: Sequence[int]) -> None:
        nonlocal size
        for v in values:
            del alive[v]
            size -= buffers[v].bytes

    def start(values: Sequence[int]) -> None:
        nonlocal size
        for v in values:
            alive[v] = None
            size += buffers[v].bytes

    for i, moment in enumerate(life.moments):
        dying = [v for v in dict.fromkeys(moment.reads) if v in alive and last[v] == i]
        new = [v for v in moment.writes if v in buffers and v not in alive]
        gone = [v for v in dying if v in moment.handed]
        if moment.in_place:
            gone += _taken_over([v for v in dying if v not in gone], new, buffers)
        end(gone)
        start(new)
        if not moment.inner:
            inside = None
        elif insides is not None:
            inside = insides[i]
        else:
            inside = max((peak(body) for body in moment.inner), key=lambda p: p.bytes)
        scratch = sum(b.bytes for b in moment.scratch)
        yield size + scratch + (inside.bytes if inside else 0), alive, inside
        late = [v for v in moment.results if v in buffers and v not in alive]
        start(late)
        end([v for v in (*dying, *new, *late) if v in alive and last[v] <= i])


def _last_uses(life: Lifetimes) -> dict[int, int]:
    """The last moment at which each value is read; one that nobody reads dies at once."""
    last: dict[int, int] = {}
    for i, moment in enumerate(life.moments):
        for v in moment.reads:
            last[v] = i
        for v in (*moment.writes, *moment.results):
            last.setdefault(v, i)
    for v in life.held | life.results:
        last[v] = len(life.moments)
    return last


def _taken_over(
    dying: Sequence[int], new: Sequence[int], buffers: Mapping[int, Buffer]
) -> list[int]:
    """Dying operands whose space the new buffers reuse: one of the same size for each."""
    free = list(dying)
    taken = []
    for v in new:
        fit = next((f for f in free if buffers[f].bytes == buffers[v].bytes), None)
        if fit is not None:
            free.remove(fit)
            taken.append(fit)
    return taken


def communicator_bytes(on: Machine) -> int:
    """Device memory that the collective library keeps for each group a device belongs to.

    HCCL: two buffers of 200 MB (HCCL_BUFFSIZE) per communicator and die, documented. NCCL: 4 MiB
        (NCCL_BUFFSIZE) in each of 16 channels, in both directions, assumed.
    """
    if on.chip.name.startswith("Ascend"):
        return 2 * 200 * 10**6 * on.dies_per_device
    return 2 * 16 * 4 * 2**20
