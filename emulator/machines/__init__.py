"""Machines as sourced records: CloudMatrix 384, GB200 NVL72, or a user's own.

Where to read:

- the records: `machine`, `chip` (with `engines` and `vector_engines`), `fabric`, `power`; `fact`
  keeps the source of every number;
- the machines: `cloudmatrix384` with `cloudmatrix384_transports`, `gb200_nvl72`, the single dies of
  `chips`; `custom` joins known chips by `levels`, written as `fabric_text`;
- their links: `wiring`, `level_wiring`; `faults` are what is wrong with them;
- `calibration` holds the measured points that numbers were fitted to.
"""

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
