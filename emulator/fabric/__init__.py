"""The interconnect in time: the Schedule that computes a collective, routed over the machine's
links.

Where to read:

- what is asked: `collective`, `concurrent`, `expert_exchange`, `ragged`, after `arguments`;
  `choose` and `best` name an algorithm, `bound` what physics allows, `production` what practice
  adds;
- a Schedule in seconds: `cost`, of listed transfers in `steps`, of very many in `wide_steps`;
  `flows` share links, `in_network` are switches that add;
- which links: `routes` finds the `network` of a machine, `plane_network` where planes of switches
  join dies; of a user's own fabric `level_network`, with `level_exchange`, `level_rotation` and
  `detours`.
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
