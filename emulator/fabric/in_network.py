"""An all_reduce whose switches add (NVLink SHARP, "nvls"): every rank sends its buffer once and
receives the sum once.

A Schedule moves slots between ranks and cannot say that a switch adds, so this one is timed and
never executed: which order a switch adds in is not published. Each rank fetches its 1/n of the sums
through the switch and multicasts it: a port carries the buffer once, and 1/n of it again, in each
direction.
"""

from __future__ import annotations

import dataclasses

from emulator.machines import Machine
from emulator.machines.fabric import Transport
from emulator.machines.wiring import wiring

NAME = "nvls"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What it loads, as `ScheduleLoad` says it for a Schedule; a slot is the whole buffer. `left`
    is the part of a port that faults leave.
    """

    transport: Transport
    tier: str
    latency_s: float
    ranks: int
    left: float = 1.0

    @property
    def num_steps(self) -> int:
        """One to fetch sums, one to multicast them."""
        return 2 if self.ranks > 1 else 0

    def time_s(self, slot_bytes: int) -> float:
        """Seconds for a buffer of `slot_bytes`."""
        if self.ranks == 1 or slot_bytes == 0:
            return 0.0
        transport = self.transport
        rate = dict(transport.rates_bytes_per_s)[self.tier] * self.left
        steps_s = self.num_steps * (transport.step_s + self.latency_s)
        return transport.startup_s + steps_s + slot_bytes * (1 + 1 / self.ranks) / rate

    def link_bytes(self, slot_bytes: int) -> dict[str, int]:
        """Bytes that leave the ranks, all together."""
        return {self.tier: (self.ranks + 1) * slot_bytes} if self.ranks > 1 else {}


def load(on: Machine, devices: tuple[int, ...], transport: str | None) -> Load:
    """The load of an all_reduce among `devices` of one switch domain.

    Raises:
        ValueError: the machine's switches do not add.
    """
    if not on.fabric.in_network_reduction:
        raise ValueError(
            f"algorithm {NAME!r} needs switches that add; those of {on.name} do not. "
            'Use a ring, or "best"'
        )
    chosen = on.fabric.transports[0] if transport is None else on.fabric.transport(transport)
    tier = on.fabric.tiers[-1]
    latency_s = tier.read_latency_s if chosen.reads else tier.write_latency_s
    return Load(
        transport=chosen,
        tier=tier.name,
        latency_s=latency_s,
        ranks=len(devices),
        left=_left(on, devices),
    )


def _left(on: Machine, devices: tuple[int, ...]) -> float:
    """The part of a port that is left where all devices take part in every plane: each plane goes
    as fast as its slowest lane.
    """
    if not on.faults.in_fabric or len(devices) == 1:
        return 1.0
    lanes = wiring(on).lanes[:, list(devices)]
    left = float(lanes.min(axis=(0, 1)).sum()) / on.fabric.tiers[-1].bytes_per_s
    if not left:
        raise ValueError(
            f"algorithm {NAME!r}: no plane of this {on.name} reaches all of the devices; "
            f"{'; '.join(on.faults.describe()[:4])}. Use a ring, or leave devices out"
        )
    return left
