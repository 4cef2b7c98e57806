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
from emulator.fabric.steps import StepLoad, load_round
from emulator.fabric.wide_steps import WideSteps
from emulator.machines import Machine
from emulator.machines.fabric import Transport


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
    places = np.asarray(dies)
    wide = WideSteps(machine, places, transport)
    steps: list[StepLoad] = []
    many: list[int] = []
    for part in schedule.rounds:
        if isinstance(part, Round):
            # Repetitions move other slots between the same ranks, and slots are equal: one stands
            # for all.
            step = load_round(part, machine, places, transport)
        else:
            step = wide.load(part)
        if step is None:
            continue
        if steps and steps[-1].alike(step):
            many[-1] += step.repeat
        else:
            steps.append(step)
            many.append(step.repeat)
    return ScheduleLoad(
        transport=transport,
        steps=tuple(
            step if step.repeat == count else dataclasses.replace(step, repeat=count)
            for step, count in zip(steps, many, strict=True)
        ),
        reduces=any(step.added for step in steps),
    )


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
