"""A Schedule on the links of a machine: what each step loads, and so how long it takes.

The ranks of a Schedule are dies (all of them in the same position of their packages). Within a step
all transfers run at once; the step lasts as long as its busiest port, and a port shared is a port
slowed. A port is a die's link in one direction, or a node's uplinks together. Slots are equally
large, so a step is a few numbers times the slot's bytes.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from emulator.collectives import Round, Schedule
from emulator.machines import Machine
from emulator.machines.fabric import TIERS, Transport


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """One step (or `repeat` alike ones), per byte of a slot.

    `port_s`: seconds on the busiest port; `added`: slots that the busiest die adds up;
    `tier_slots`: slots that cross each tier, all ranks together; `latency_s` of the farthest
    transfer.
    """

    repeat: int
    port_s: float
    added: int
    latency_s: float
    tier_slots: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleLoad:
    """All steps of a Schedule on given dies by one transport."""

    transport: Transport
    steps: tuple[StepLoad, ...]
    reduces: bool

    @property
    def num_steps(self) -> int:
        """Steps in which anything crosses a link."""
        return sum(step.repeat for step in self.steps)

    def time_s(self, slot_bytes: int) -> float:
        """Seconds with slots of `slot_bytes`; 0 if nothing moves between dies."""
        transport = self.transport
        if not self.steps or slot_bytes == 0:
            return 0.0
        total = transport.startup_s + (transport.reduce_startup_s if self.reduces else 0.0)
        for step in self.steps:
            wire = max(0.0, slot_bytes * step.port_s - transport.overlap_s)
            added = slot_bytes * step.added * transport.reduce_s_per_byte
            total += step.repeat * (transport.step_s + step.latency_s + wire + added)
        return total

    def link_bytes(self, slot_bytes: int) -> dict[str, int]:
        """Bytes that cross each tier, all ranks together."""
        total: dict[str, int] = {}
        for step in self.steps:
            for tier, slots in step.tier_slots:
                total[tier] = total.get(tier, 0) + slots * step.repeat * slot_bytes
        return total


@functools.lru_cache(maxsize=1024)
def load_schedule(
    schedule: Schedule, machine: Machine, dies: tuple[int, ...], transport: Transport
) -> ScheduleLoad:
    """What the steps of `schedule` load when rank i is die `dies[i]`."""
    steps = []
    reduces = False
    for part in schedule.rounds:
        # Repetitions move other slots between the same ranks, and slots are equal: one stands for
        # all.
        step = _load_step(part, machine, np.asarray(dies), transport)
        if step is not None:
            steps.append(step)
            reduces = reduces or bool(part.reduce.any())
    return ScheduleLoad(transport=transport, steps=tuple(steps), reduces=reduces)


def time_schedule(
    schedule: Schedule,
    machine: Machine,
    devices: tuple[int, ...],
    slot_bytes: int,
    transport: str | None = None,
) -> float:
    """Seconds of `schedule` with rank i on device `devices[i]`, each die moving slots of
    `slot_bytes`.

    The dies of a device run the same schedule side by side, each with its own share of the payload.
    `transport` defaults to the machine's first that reaches all of the devices.
    """
    dies = dies_of(machine, devices)[0]
    chosen = (
        transports_for(machine, dies)[0]
        if transport is None
        else machine.fabric.transport(transport)
    )
    return load_schedule(schedule, machine, dies, chosen).time_s(slot_bytes)


def dies_of(machine: Machine, devices: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """For each die position in a device, the die numbers of `devices`."""
    per_device = machine.dies_per_device
    return tuple(tuple(d * per_device + i for d in devices) for i in range(per_device))


def transports_for(machine: Machine, dies: tuple[int, ...]) -> tuple[Transport, ...]:
    """The transports that reach from each of these dies to every other."""
    nodes = {node_of_die(machine, die) for die in dies}
    reach = TIERS.index("node") if len(nodes) == 1 else TIERS.index("pod")
    return tuple(t for t in machine.fabric.transports if TIERS.index(t.scope) >= reach)


def node_of_die(machine: Machine, die: int) -> int:
    """The node of a die number."""
    return die // (machine.devices_per_node * machine.dies_per_device)


def tier_between(machine: Machine, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Index in TIERS of the closest enclosure that holds both dies; -1 for a die and itself."""
    per_package = machine.num_dies // machine.packages
    per_node = machine.devices_per_node * machine.dies_per_device
    tier = np.where(a // per_node == b // per_node, TIERS.index("node"), TIERS.index("pod"))
    tier = np.where(
        (a // per_package == b // per_package) & (per_package > 1), TIERS.index("package"), tier
    )
    return np.where(a == b, -1, tier)


def _load_step(
    part: Round, machine: Machine, dies: np.ndarray, transport: Transport
) -> StepLoad | None:
    src, dst = dies[part.src], dies[part.dst]
    tier = tier_between(machine, src, dst)
    away = tier >= 0
    if not away.any():
        return None
    src, dst, tier, width = src[away], dst[away], tier[away], part.width[away].astype(float)
    fabric = machine.fabric
    present = [TIERS[i] for i in np.unique(tier)]
    rates = dict(transport.rates_bytes_per_s)
    missing = [t for t in present if t not in rates]
    if missing:
        raise ValueError(
            f"transport {transport.name!r} does not reach across tier {missing[0]!r}; it is "
            "limited to one "
            f"{transport.scope}"
        )
    seconds = width * np.array([1.0 / rates[t] if t in rates else 0.0 for t in TIERS])[tier]

    busiest = 0.0
    for link in {fabric.tier(t).link for t in present}:
        on_link = np.isin(tier, [TIERS.index(t.name) for t in fabric.tiers if t.link == link])
        for end in (src, dst):
            busiest = max(busiest, float(np.bincount(end[on_link], weights=seconds[on_link]).max()))
    between = tier == TIERS.index("pod")
    if between.any():  # what leaves or enters a node shares its uplinks
        per_node = machine.devices_per_node * machine.dies_per_device
        for end in (src, dst):
            slots = np.bincount(end[between] // per_node, weights=width[between]).max()
            busiest = max(
                busiest, float(slots) * machine.dies_per_device / fabric.node_uplink_bytes_per_s
            )

    adding = part.reduce[away]
    added = int(np.bincount(dst[adding], weights=width[adding]).max()) if adding.any() else 0
    tiers = [fabric.tier(t) for t in present]
    latency = max(t.read_latency_s if transport.reads else t.write_latency_s for t in tiers)
    crossed = tuple((TIERS[i], int(width[tier == i].sum())) for i in np.unique(tier))
    return StepLoad(
        repeat=part.repeat, port_s=busiest, added=added, latency_s=latency, tier_slots=crossed
    )
