"""Collective algorithms, each written once as a Schedule: executed on data (`execute`) and timed
(`emulator.fabric`).
"""

from emulator.collectives.build import (
    ALGORITHMS,
    Algorithm,
    build,
    check_algorithms,
    find,
    group_of,
    known,
)
from emulator.collectives.check import check
from emulator.collectives.ragged import ragged_all_to_all
from emulator.collectives.schedule import OPS, Group, Round, Schedule, make_round

__all__ = [
    "ALGORITHMS",
    "OPS",
    "Algorithm",
    "Group",
    "Round",
    "Schedule",
    "build",
    "check",
    "check_algorithms",
    "find",
    "group_of",
    "known",
    "make_round",
    "ragged_all_to_all",
]
