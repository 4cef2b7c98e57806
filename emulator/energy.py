"""Energy of a run as an interval whose ends are explained. No loaded power reading of these
machines is public.

Low end: every device draws its lowest idle power throughout, plus what its matrix and vector units
need for the work at full rate (the step from idle to the lowest peak power), plus the least energy
per byte of memory and links. High end: highest idle power, the step to the highest peak power for
as long as a device computes at all, plus the most energy per byte that crosses links; memory is
part of the peak power there. A device never exceeds its highest peak power. The pod's overhead
(CPUs, switches, cooling, supply loss) counts in proportion to the devices used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from emulator.machines import Machine
from emulator.timeline import CollectiveOp, Op, Step, each


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnergyPart:
    """One contribution in joules, all devices of the mesh together."""

    name: str
    low_j: float
    high_j: float
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Joules of the run over all devices it uses, as an interval."""

    parts: tuple[EnergyPart, ...]
    time_s: float
    flops: float

    @property
    def low_j(self) -> float:
        return sum(p.low_j for p in self.parts)

    @property
    def high_j(self) -> float:
        return sum(p.high_j for p in self.parts)

    @property
    def power_w(self) -> tuple[float, float]:
        """Mean watts over the run (low, high)."""
        if not self.time_s:
            return (0.0, 0.0)
        return (self.low_j / self.time_s, self.high_j / self.time_s)

    @property
    def flops_per_j(self) -> tuple[float, float]:
        """Floating-point operations of matmuls per joule (low, high)."""
        if not self.high_j:
            return (0.0, 0.0)
        return (self.flops / self.high_j, self.flops / self.low_j)


def energy(steps: Sequence[Step], time_s: float, num_devices: int, on: Machine) -> Energy:
    """Energy in joules of `steps` that take `time_s` on `num_devices` devices of `on`."""
    busy_s = full_s = memory_bytes = matmul_flops = 0.0
    links: dict[str, float] = {}
    for step, times in each(steps):
        if isinstance(step, Op):
            busy_s += times * step.time_s
            full_s += times * max(step.matmul_s, step.vector_s)
            memory_bytes += times * step.bytes
            if step.kind == "matmul":
                matmul_flops += times * step.flops
        elif isinstance(step, CollectiveOp):
            for tier, count in step.link_bytes:
                links[tier] = links.get(tier, 0.0) + times * count
    power = on.power
    busy_s = min(busy_s, time_s)
    full_s = min(full_s, busy_s)
    idle_low, idle_high = power.idle_device_w
    peak_low, peak_high = power.peak_device_w
    rates = dict(power.link_j_per_byte)
    if unknown := sorted(set(links) - set(rates)):
        raise ValueError(
            f"{on.name}: power.link_j_per_byte has no energy for the links {', '.join(unknown)}, "
            "which the program uses; give it one"
        )
    link_low = sum(rates[tier][0] * count for tier, count in links.items())
    link_high = sum(rates[tier][1] * count for tier, count in links.items())
    share = num_devices / on.num_devices
    memory_low = power.memory_j_per_byte[0] * memory_bytes
    step_low = max(0.0, peak_low - idle_low)
    step_high = max(0.0, peak_high - idle_high)
    parts = (
        EnergyPart(
            name="idle devices",
            low_j=num_devices * idle_low * time_s,
            high_j=num_devices * idle_high * time_s,
            why=f"{idle_low:.0f} to {idle_high:.0f} W per {on.device_kind} for the whole time",
        ),
        EnergyPart(
            name="compute and memory",
            low_j=num_devices * min(step_low * full_s + memory_low, step_high * busy_s),
            high_j=num_devices * step_high * busy_s,
            why=(
                f"low: {peak_low:.0f} W while units work at full rate, and memory traffic; "
                f"high: {peak_high:.0f} W whenever a kernel runs"
            ),
        ),
        EnergyPart(
            name="links",
            low_j=link_low,
            high_j=link_high,
            why="bytes over each tier, both ends and all hops",
        ),
        EnergyPart(
            name="pod overhead",
            low_j=share * power.overhead_w[0] * time_s,
            high_j=share * power.overhead_w[1] * time_s,
            why=(
                f"{power.overhead_w[0] / 1e3:.0f} to {power.overhead_w[1] / 1e3:.0f} kW of the "
                f"whole machine, for {share:.0%} of its devices"
            ),
        ),
    )
    return Energy(parts=parts, time_s=time_s, flops=matmul_flops * num_devices)
