"""Machines as sourced records: CloudMatrix 384, GB200 NVL72, or a user's own."""

from emulator.machines.chip import Chip
from emulator.machines.cloudmatrix384 import cloudmatrix384
from emulator.machines.custom import custom_machine
from emulator.machines.engines import Engines
from emulator.machines.fabric import Fabric, Tier, Transport
from emulator.machines.fact import Citation, Fact, build, cite
from emulator.machines.gb200_nvl72 import gb200_nvl72
from emulator.machines.levels import Level
from emulator.machines.machine import Machine
from emulator.machines.power import Power
from emulator.machines.vector_engines import VectorEngines

__all__ = [
    "Chip",
    "Citation",
    "Engines",
    "Fabric",
    "Fact",
    "Level",
    "Machine",
    "Power",
    "Tier",
    "Transport",
    "VectorEngines",
    "build",
    "cite",
    "cloudmatrix384",
    "custom_machine",
    "gb200_nvl72",
]
