"""Pairwise exchange: n - 1 steps; in step s every rank sends to the rank s above it, straight.

Source: HCCL's documentation of pairwise: (n-1) alpha + beta times the sum of each step's largest
message (documented).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, travel
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, make_round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """The owner of block b adds to its own those of b-1, b-2, ... as they arrive."""
    owners = np.arange(len(blocks))
    steps = [[(-s, 0)] for s in range(1, len(members))]
    return travel(members, blocks, owners, steps, reduce=True), owners


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """The holder sends its block to one member after the other."""
    steps = [[(0, s)] for s in range(1, len(members))]
    return travel(members, blocks, holders, steps, reduce=False)


def all_to_all(group: Group) -> Schedule:
    """n - 1 steps of one block; a rank's block for itself is a local copy beside the first."""
    n = group.n
    rank = np.arange(n)
    rounds = [make_round(rank, rank, rank, n + rank, reduce=False)]
    for s in range(1, n):
        above = (rank + s) % n
        rounds.append(make_round(rank, above, above, n + rank, reduce=False))
    return Schedule(
        op="all_to_all", algorithm="pairwise", ranks=n, slots=2 * n, rounds=tuple(rounds)
    )
