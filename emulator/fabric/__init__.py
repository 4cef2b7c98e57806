"""The interconnect in time: the Schedule that computes a collective, routed over the machine's
links.
"""

from emulator.fabric.bound import bound_s
from emulator.fabric.choose import choose
from emulator.fabric.collective import Collective, collective
from emulator.fabric.concurrent import concurrent, together_s
from emulator.fabric.cost import time_schedule
from emulator.fabric.expert_exchange import expert_exchange
from emulator.fabric.ragged import all_to_all_v
from emulator.fabric.routes import network_of

__all__ = [
    "Collective",
    "all_to_all_v",
    "bound_s",
    "choose",
    "collective",
    "concurrent",
    "expert_exchange",
    "network_of",
    "time_schedule",
    "together_s",
]
