"""Pairwise exchange: n - 1 steps; in step s every rank sends to the rank s above it, straight.

Source: HCCL's documentation of pairwise: (n-1) alpha + beta times the sum of each step's largest
message (documented).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, runs_of
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, make_round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """The owner of block b adds to its own those of b-1, b-2, ... as they arrive."""
    return _exchange(members, blocks, -1, reduce=True), np.arange(len(blocks))


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """The owner sends its block to one member after the other."""
    return _exchange(members, blocks, 1, reduce=False)


def _exchange(members: IntArray, blocks: Blocks, way: int, *, reduce: bool) -> list[Round]:
    """In step s each owner's block, to the member s above it or from the one s below (`way`)."""
    m, every = len(members), np.arange(len(blocks))
    owner, slot, width, stride = runs_of(blocks, every, np.ones_like(every), 1)
    rounds = []
    for step in range(1, m if len(slot) else 1):
        ends = members[owner], members[(owner + way * step) % m]
        src, dst = ends[::-1] if reduce else ends
        rounds.append(make_round(src, dst, slot, slot, reduce=reduce, width=width, stride=stride))
    return rounds


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
