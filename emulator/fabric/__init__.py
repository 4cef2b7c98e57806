"""The interconnect in time: the Schedule that computes a collective, routed over the machine's
links.
"""

from emulator.fabric.bound import bound_s
from emulator.fabric.choose import choose
from emulator.fabric.collective import Collective, collective
from emulator.fabric.cost import time_schedule

__all__ = ["Collective", "bound_s", "choose", "collective", "time_schedule"]
