"""The network of a machine: who routes what over which links."""

from __future__ import annotations

import functools

from emulator.fabric.level_network import LevelNetwork
from emulator.fabric.network import Network
from emulator.fabric.plane_network import Bundles, Planes
from emulator.machines import Machine


@functools.lru_cache(maxsize=64)
def network_of(machine: Machine) -> Network:
    """The network of `machine`, with its faults."""
    if machine.fabric.levels:
        return LevelNetwork(machine)
    return Planes(machine) if machine.faults.in_fabric else Bundles(machine)
