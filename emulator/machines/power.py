"""What a machine draws, as intervals: no loaded reading of these machines is public."""

from __future__ import annotations

import dataclasses

from emulator.machines.fact import Citation, check_interval, is_interval

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Watts and joules as (low, high). A device here is a package or GPU, not a die.

    Attributes:
        idle_device_w: with nothing running.
        active_device_w: beyond idle while any kernel runs, whatever it does: clocks, control.
        peak_device_w: the most that a device ever draws.
        matmul_j_per_flop: of the matrix units in BF16; other types cost as many cycles.
        vector_j_per_flop: of one FP32 operation of a vector lane.
        memory_j_per_byte, l2_j_per_byte: of a byte to or from HBM, and the L2 cache.
        link_j_per_byte: of a byte on each tier, all hops and both ends, optics apart.
        optics_w: optical modules of the whole machine, which draw the same without traffic.
        cpu_w, switch_w: host CPUs; switches, cards and whatever else is no accelerator.
        cooling_share: cooling and supply loss, as a share of all the rest.
        system_w: the published draw of the whole machine under load.
    """

    idle_device_w: Interval
    active_device_w: Interval
    peak_device_w: Interval
    matmul_j_per_flop: Interval
    vector_j_per_flop: Interval
    memory_j_per_byte: Interval
    l2_j_per_byte: Interval
    link_j_per_byte: tuple[tuple[str, Interval], ...]
    optics_w: Interval
    cpu_w: Interval
    switch_w: Interval
    cooling_share: Interval
    system_w: Interval
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        fields = [f.name for f in dataclasses.fields(self) if f.type == "Interval"]
        check_interval(self, *fields)
        if not isinstance(self.link_j_per_byte, tuple):
            raise ValueError(
                "Power.link_j_per_byte must be pairs (tier, (low, high)) in a tuple; got "
                f"{self.link_j_per_byte!r}"
            )
        for tier, interval in self.link_j_per_byte:
            if not is_interval(interval):
                raise ValueError(
                    f"Power.link_j_per_byte[{tier!r}] must be a pair (low, high), "
                    f"0 <= low <= high; got {interval!r}"
                )
        if (
            self.idle_device_w[0] > self.peak_device_w[0]
            or self.idle_device_w[1] > self.peak_device_w[1]
        ):
            raise ValueError(
                f"Power.idle_device_w {self.idle_device_w} exceeds peak_device_w "
                f"{self.peak_device_w}"
            )
