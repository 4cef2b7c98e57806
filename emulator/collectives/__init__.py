"""Collective algorithms, each written once as a Schedule: executed on data (`execute`) and timed
(`emulator.fabric`).

Where to read:

- `schedule` is the record, `build` finds an algorithm by its name, `check` proves what it does on
  the symbols of `symbolic`;
- the algorithms: `ring`, `double_ring`, `full_mesh`, `rhd`, `nhr`, `nb`, `star`, `pairwise`,
  `bruck`, `grid`, `direct`, `tree`, `pipeline`, `ragged`; `flat` names those of one level,
  `hierarchical` composes two, from the blocks in `levels`; `traffic` writes down steps of very many
  transfers;
- on data: `plan` arranges a Schedule's additions, `execute` does them or lets `evaluate` (XLA) or
  `kernels.native_sums` do them, `combine` and `multiply` are one addition, or product.
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
