"""A Schedule on the links of a machine: what each step loads, and so how long it takes.

The ranks of a Schedule are dies (all of them in the same position of their packages). Within a step
all transfers run at once, each slot a flow of its own, and a link shared is a link slowed: shared
max-min fairly, equal flows last exactly as long as the busiest link (`flows` says why, and how
several collectives share). Which links there are, and which a transfer crosses, is the network's
(`routes`). A transport reaches only part of a die's port, and the same part of each of its lanes
(assumption), so a lost lane costs what it carried. Slots are equally large, so a step is a few
numbers times the slot's bytes.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from emulator.collectives import Round, Schedule
from emulator.fabric.network import Loads, present
from emulator.fabric.routes import network_of
from emulator.machines import Machine
from emulator.machines.fabric import Transport


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """One step (or `repeat` alike ones), per byte of a slot.

    `port_s`: seconds on the busiest port; `added`: slots that the busiest die adds up;
    `tier_slots`: slots that cross each tier, all ranks together; `latency_s` of the farthest
    transfer; `message_s`: what the messages of the busiest die cost whatever their size.
    """

    repeat: int
    port_s: float
    added: int
    latency_s: float
    message_s: float
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
            fixed, wire = self.step_s(step, slot_bytes)
            total += step.repeat * (fixed + wire)
        return total

    def step_s(self, step: StepLoad, slot_bytes: int) -> tuple[float, float]:
        """Seconds of one repetition: those that need no link, and those on the busiest link."""
        transport = self.transport
        wire = max(0.0, slot_bytes * step.port_s - transport.overlap_s)
        added = slot_bytes * step.added * transport.reduce_s_per_byte
        return transport.step_s + step.latency_s + step.message_s + added, wire

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
    names = machine.fabric.tier_names
    if machine.fabric.levels:
        reach = len(names) - 1
    else:
        per_pod = machine.num_dies // machine.pods
        pods = {die // per_pod for die in dies}
        nodes = {node_of_die(machine, die) for die in dies}
        reach = names.index("pods" if len(pods) > 1 else "pod" if len(nodes) > 1 else "node")
    return tuple(t for t in machine.fabric.transports if names.index(t.scope) >= reach)


def node_of_die(machine: Machine, die: int) -> int:
    """The node of a die number."""
    return die // (machine.devices_per_node * machine.dies_per_device)


def _load_step(
    part: Round, machine: Machine, dies: np.ndarray, transport: Transport
) -> StepLoad | None:
    transfers = transfers_of(part, machine, dies)
    if transfers is None:
        return None
    src, dst, tier, width, adding = transfers
    names = machine.fabric.tier_names
    network = network_of(machine)
    loads = link_loads(machine, transfers, transport)
    added = int(np.bincount(dst[adding], weights=width[adding]).max()) if adding.any() else 0
    copies = 1 if network.symmetric else machine.dies_per_device
    crossed = tuple((names[i], int(width[tier == i].sum()) // copies) for i in present(tier))
    return StepLoad(
        repeat=part.repeat,
        port_s=_steady(max(float(busy.max()) for _, busy in loads)),
        added=added,
        latency_s=network.latency_s(src, dst, tier, transport.reads),
        message_s=_message_s(src, dst, tier, transport, names),
        tier_slots=crossed,
    )


Transfers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def transfers_of(part: Round, machine: Machine, dies: np.ndarray) -> Transfers | None:
    """(source die, destination die, tier, slots, whether it is added) of what leaves a die in a
    step; None if nothing does. Rank i is die `dies[i]`, and on a network that is not symmetric also
    the other dies of that device.
    """
    network = network_of(machine)
    src, dst = dies[part.src], dies[part.dst]
    width, adding = part.width.astype(float), part.reduce
    if not network.symmetric and machine.dies_per_device > 1:
        places = np.arange(machine.dies_per_device)[:, None]
        src, dst = (src + places).reshape(-1), (dst + places).reshape(-1)
        width, adding = (np.tile(values, machine.dies_per_device) for values in (width, adding))
    tier = network.tier_between(src, dst)
    away = tier >= 0
    if not away.any():
        return None
    if away.all():
        return src, dst, tier, width, adding
    return src[away], dst[away], tier[away], width[away], adding[away]


def link_loads(machine: Machine, transfers: Transfers, transport: Transport) -> Loads:
    """Seconds per byte of a slot for which each link works."""
    src, dst, tier, width, _ = transfers
    names = machine.fabric.tier_names
    rates = dict(transport.rates_bytes_per_s)
    for i in present(tier):
        if names[i] not in rates:
            raise ValueError(
                f"transport {transport.name!r} does not reach across tier {names[i]!r}; it is "
                f"limited to one {transport.scope}"
            )
    reached = np.array([rates.get(name, np.nan) for name in names])
    return network_of(machine).loads(src, dst, width, tier, reached)


def _message_s(
    src: np.ndarray,
    dst: np.ndarray,
    tier: np.ndarray,
    transport: Transport,
    names: tuple[str, ...],
) -> float:
    """Seconds for starting messages, one after the other, at the die that starts most of them.

    All that goes from one die to another in a step is one message; the receiver starts it where the
    transport reads.
    """
    costs = dict(transport.message_s)
    if not costs:
        return 0.0
    pairs, first = np.unique(src.astype(np.int64) << 32 | dst, return_index=True)
    starts = pairs & 0xFFFFFFFF if transport.reads else pairs >> 32
    each = np.array([costs.get(t, 0.0) for t in names])[tier[first]]
    return _steady(float(np.bincount(starts, weights=each).max()))


def _steady(seconds: float) -> float:
    """To 13 digits: sums in another order shall not make like things differ."""
    return float(f"{seconds:.12e}")
