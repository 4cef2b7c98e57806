"""One listed step of a Schedule on the links of a machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from emulator.collectives import Round
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

    def alike(self, other: StepLoad) -> bool:
        """Whether a repetition of both is the same."""
        return (
            self.port_s == other.port_s
            and self.added == other.added
            and self.latency_s == other.latency_s
            and self.message_s == other.message_s
            and self.tier_slots == other.tier_slots
        )


def load_round(
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
        port_s=steady(max(float(busy.max()) for _, busy in loads)),
        added=added,
        latency_s=network.latency_s(src, dst, tier, transport.reads),
        message_s=steady(float(starts_of(src, dst, tier, transport, machine).max())),
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
    check_reach(machine, transport, present(tier))
    return network_of(machine).loads(src, dst, width, tier, reached(machine, transport))


def check_reach(machine: Machine, transport: Transport, tiers: Iterable[int]) -> None:
    """Raises ValueError where `transport` does not cross one of `tiers`."""
    rates = dict(transport.rates_bytes_per_s)
    for name in (machine.fabric.tier_names[i] for i in tiers):
        if name not in rates:
            raise ValueError(
                f"transport {transport.name!r} does not reach across tier {name!r}; it is "
                f"limited to one {transport.scope}"
            )


def reached(machine: Machine, transport: Transport) -> np.ndarray:
    """What `transport` reaches of a die's port, by tier; NaN where it does not go."""
    rates = dict(transport.rates_bytes_per_s)
    return np.array([rates.get(name, np.nan) for name in machine.fabric.tier_names])


def message_costs(transport: Transport, machine: Machine) -> np.ndarray:
    """Seconds that a message costs whatever its size, by tier."""
    costs = dict(transport.message_s)
    return np.array([costs.get(name, 0.0) for name in machine.fabric.tier_names])


def starts_of(
    src: np.ndarray, dst: np.ndarray, tier: np.ndarray, transport: Transport, machine: Machine
) -> np.ndarray:
    """Seconds for starting messages, one after the other, at each die (none where they cost none).

    All that goes from one die to another in a step is one message; the receiver starts it where the
    transport reads.
    """
    if not transport.message_s:
        return np.zeros(1)
    pairs, first = np.unique(src.astype(np.int64) << 32 | dst, return_index=True)
    starts = pairs & 0xFFFFFFFF if transport.reads else pairs >> 32
    each = message_costs(transport, machine)[tier[first]]
    return np.bincount(starts, weights=each)


def steady(seconds: float) -> float:
    """To 13 digits: sums in another order shall not make like things differ."""
    return float(f"{seconds:.12e}")
