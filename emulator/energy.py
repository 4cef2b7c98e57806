"""Energy of a run as an interval whose ends are explained. No loaded power reading of these
machines is public.

Each end adds up the same parts from the least or the most that each may cost. Devices draw idle
power throughout; their units, memory, cache and links cost what the program asks of them; "clocks
and control" is whatever else a running kernel may draw. What a device adds to its idle power never
exceeds the step to its peak. Host CPUs, optics, switches and cooling draw on all the time, in
proportion to the devices used. The high end never exceeds what is published for the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from emulator.machines import Machine, cloudmatrix384, gb200_nvl72
from emulator.timeline import ON_MATRIX, CollectiveOp, Op, Step, each


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnergyPart:
    """One contribution in joules, all devices of the mesh together. `per_device` parts are drawn by
    the devices themselves, the others by the pod around them.
    """

    name: str
    low_j: float
    high_j: float
    why: str
    per_device: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """FLOP per joule, which is FLOP/s per watt, as (low, high)."""

    name: str
    flops_per_j: tuple[float, float]
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Joules of the run over all devices it uses, as an interval.

    `nominal` are whole machines at their quoted peak and published power, to compare with.
    """

    parts: tuple[EnergyPart, ...]
    time_s: float
    flops: float
    num_devices: int
    nominal: tuple[Efficiency, ...]

    @property
    def low_j(self) -> float:
        return sum(p.low_j for p in self.parts)

    @property
    def high_j(self) -> float:
        return sum(p.high_j for p in self.parts)

    @property
    def device_j(self) -> tuple[float, float]:
        """Joules of one device alone (low, high): without links between devices and the pod."""
        own = [p for p in self.parts if p.per_device]
        return (
            sum(p.low_j for p in own) / self.num_devices,
            sum(p.high_j for p in own) / self.num_devices,
        )

    @property
    def power_w(self) -> tuple[float, float]:
        """Mean watts over the run (low, high)."""
        return self._mean_w((self.low_j, self.high_j))

    @property
    def device_w(self) -> tuple[float, float]:
        """Mean watts of one device alone (low, high)."""
        return self._mean_w(self.device_j)

    def _mean_w(self, joules: tuple[float, float]) -> tuple[float, float]:
        if not self.time_s:
            return (0.0, 0.0)
        return (joules[0] / self.time_s, joules[1] / self.time_s)

    @property
    def flops_per_j(self) -> tuple[float, float]:
        """Floating-point operations of matmuls per joule (low, high)."""
        if not self.low_j:
            return (0.0, 0.0)
        return (self.flops / self.high_j, self.flops / self.low_j)


@dataclasses.dataclass(slots=True)
class _Work:
    """What one device does, and the bytes that cross links, all devices together."""

    busy_s: float = 0.0
    matmul_s: float = 0.0
    vector_s: float = 0.0
    memory_bytes: float = 0.0
    l2_bytes: float = 0.0
    flops: float = 0.0
    links: dict[str, float] = dataclasses.field(default_factory=dict)


def _work(steps: Sequence[Step], num_devices: int) -> _Work:
    work = _Work()
    for step, times in each(steps):
        if isinstance(step, Op):
            work.busy_s += times * step.mean_s(num_devices)
            work.matmul_s += times * step.matmul_s
            work.vector_s += times * step.vector_s
            work.memory_bytes += times * step.bytes
            work.l2_bytes += times * max(step.bytes, step.l2_bytes)
            if step.kind in ON_MATRIX:
                work.flops += times * step.flops
        elif isinstance(step, CollectiveOp):
            for tier, count in step.link_bytes:
                work.links[tier] = work.links.get(tier, 0.0) + times * count
    return work


def energy(
    steps: Sequence[Step], time_s: float, num_devices: int, on: Machine, slowness: float = 1.0
) -> Energy:
    """Energy in joules of `steps` that take `time_s` on `num_devices` devices of `on`, whose
    kernels take `slowness` times as long as on healthy ones, on average.
    """
    work = _work(steps, num_devices)
    links_j = _links_j(work.links, on)
    # Power is known by the package; a device may be one die of it.
    packages = num_devices * on.packages / on.num_devices
    share = num_devices / on.num_devices
    parts = [
        EnergyPart(
            name="idle devices",
            low_j=packages * on.power.idle_device_w[0] * time_s,
            high_j=packages * on.power.idle_device_w[1] * time_s,
            why=f"{_watts(on.power.idle_device_w)} each, all the time",
            per_device=True,
        ),
        *_device_parts(work, min(slowness * work.busy_s, time_s), num_devices, packages, on),
        EnergyPart(
            name="links",
            low_j=links_j[0],
            high_j=links_j[1],
            why="bytes over each tier, both ends and all hops; optics apart",
        ),
        *_pod_parts(share * time_s, on),
    ]
    loss, power = on.power.cooling_share, on.power
    cooling = EnergyPart(
        name="cooling and supply loss",
        low_j=loss[0] * sum(p.low_j for p in parts),
        high_j=loss[1] * sum(p.high_j for p in parts),
        why=f"{loss[0]:.0%} to {loss[1]:.0%} of all the rest",
    )
    parts.append(cooling)
    excess = sum(p.high_j for p in parts) - power.system_w[1] * share * time_s
    if excess > 0 and sum(p.low_j for p in parts) <= sum(p.high_j for p in parts) - excess:
        limit = f"the whole machine is said to draw {_watts(power.system_w)} under load"
        parts.append(EnergyPart(name="less", low_j=0.0, high_j=-excess, why=limit))
    return Energy(
        parts=tuple(parts),
        time_s=time_s,
        flops=work.flops * num_devices,
        num_devices=num_devices,
        nominal=tuple(dict.fromkeys(nominal(m) for m in (on, cloudmatrix384(), gb200_nvl72()))),
    )


def _device_parts(
    work: _Work, busy_s: float, num_devices: int, packages: float, on: Machine
) -> list[EnergyPart]:
    """What kernels add to idle power, no more than the step from it to the peak."""
    power, dies = on.power, on.dies_per_device
    flops = work.matmul_s * dies * on.chip.matmul_flops_per_s("bfloat16")
    ops = work.vector_s * dies * on.chip.vector_flops_per_s("float32")
    uses = {
        "matrix units": (flops, power.matmul_j_per_flop, f"{_pj(power.matmul_j_per_flop)} a FLOP"),
        "vector units": (ops, power.vector_j_per_flop, f"{_pj(power.vector_j_per_flop)} a FLOP"),
        "memory": (
            work.memory_bytes,
            power.memory_j_per_byte,
            f"{_pj(power.memory_j_per_byte)} a byte",
        ),
        "L2 cache": (work.l2_bytes, power.l2_j_per_byte, f"{_pj(power.l2_j_per_byte)} a byte"),
        "clocks and control": (
            busy_s * packages / num_devices,
            power.active_device_w,
            f"{_watts(power.active_device_w)} each while kernels run",
        ),
    }
    scales, cut = [], ""
    for end in (0, 1):
        total = num_devices * sum(amount * cost[end] for amount, cost, _ in uses.values())
        room = packages * (power.peak_device_w[end] - power.idle_device_w[end]) * busy_s
        scales.append(min(1.0, room / total) if total else 1.0)
    if min(scales) < 1:
        cut = f"; no more than {_watts(power.peak_device_w)} in all"
    return [
        EnergyPart(
            name=name,
            low_j=num_devices * amount * cost[0] * scales[0],
            high_j=num_devices * amount * cost[1] * scales[1],
            why=why + cut,
            per_device=True,
        )
        for name, (amount, cost, why) in uses.items()
    ]


def _links_j(links: Mapping[str, float], on: Machine) -> tuple[float, float]:
    rates = dict(on.power.link_j_per_byte)
    if unknown := sorted(set(links) - set(rates)):
        raise ValueError(
            f"{on.name}: power.link_j_per_byte has no energy for the links {', '.join(unknown)}, "
            "which the program uses; give it one"
        )
    low = sum(rates[tier][0] * count for tier, count in links.items())
    return low, sum(rates[tier][1] * count for tier, count in links.items())


def _pod_parts(share_s: float, on: Machine) -> list[EnergyPart]:
    """What draws on whatever the program does: the machine's power for the devices' share."""
    power = on.power
    whole = {
        "optics": (power.optics_w, "modules draw the same with and without traffic"),
        "CPUs": (power.cpu_w, "hosts"),
        "switches and cards": (power.switch_w, "and whatever else is no accelerator"),
    }
    return [
        EnergyPart(
            name=name,
            low_j=watts[0] * share_s,
            high_j=watts[1] * share_s,
            why=f"{why}: {_watts(watts)} for the whole machine",
        )
        for name, (watts, why) in whole.items()
        if watts[1]
    ]


def nominal(on: Machine) -> Efficiency:
    """A whole machine at its headline peak and published power."""
    peak, (low, high) = on.headline_bf16_flops_per_s, on.power.system_w
    return Efficiency(
        name=on.name,
        flops_per_j=(peak / high, peak / low),
        why=f"{peak / 1e15:.0f} PFLOPS in BF16 as quoted, over {_watts(on.power.system_w)}",
    )


def _watts(interval: tuple[float, float]) -> str:
    low, high = interval
    if high >= 1e4:
        return f"{low / 1e3:.0f} to {high / 1e3:.0f} kW"
    return f"{low:.0f} to {high:.0f} W"


def _pj(interval: tuple[float, float]) -> str:
    return f"{interval[0] * 1e12:.2g} to {interval[1] * 1e12:.2g} pJ"
