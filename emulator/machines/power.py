"""What a machine draws, as intervals: no loaded reading of these machines is public."""

from __future__ import annotations

import dataclasses

from emulator.machines.fact import Citation, check_interval

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Watts as (low, high). A device is what the machine's packages or GPUs are, not a die.

    `overhead_w` is everything of the whole machine that is no accelerator (CPUs, switches, optics,
    cooling, supply loss). `system_w` is the published draw of the whole machine under load.
    `link_j_per_byte` is what a byte costs on each tier, all hops and both ends included;
    `memory_j_per_byte` what a byte to or from HBM costs. The dynamic parts are contained in
    `peak_device_w`: they are not to be added on top of it.
    """

    idle_device_w: Interval
    peak_device_w: Interval
    overhead_w: Interval
    system_w: Interval
    link_j_per_byte: tuple[tuple[str, Interval], ...]
    memory_j_per_byte: Interval
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        check_interval(
            self, "idle_device_w", "peak_device_w", "overhead_w", "system_w", "memory_j_per_byte"
        )
        if (
            self.idle_device_w[0] > self.peak_device_w[0]
            or self.idle_device_w[1] > self.peak_device_w[1]
        ):
            raise ValueError(
                f"Power.idle_device_w {self.idle_device_w} exceeds peak_device_w "
                f"{self.peak_device_w}"
            )
