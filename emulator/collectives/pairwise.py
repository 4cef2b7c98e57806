"""Pairwise exchange: n - 1 steps; in step s every rank sends to the rank s above it, straight.

Source: HCCL's documentation of pairwise: (n-1) alpha + beta times the sum of each step's largest
message (documented).
"""

from __future__ import annotations

import functools

import numpy as np

from emulator.collectives.levels import MANY, Blocks, runs_of
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, Step, Wide, make_round
from emulator.collectives.traffic import Shift


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Step], IntArray]:
    """The owner of block b adds to its own those of b-1, b-2, ... as they arrive."""
    return _exchange(members, blocks, -1, reduce=True), np.arange(len(blocks))


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Step]:
    """The owner sends its block to one member after the other."""
    return _exchange(members, blocks, 1, reduce=False)


def _exchange(members: IntArray, blocks: Blocks, way: int, *, reduce: bool) -> list[Step]:
    """In step s each owner's block, to the member s above it or from the one s below (`way`)."""
    m, every = len(members), np.arange(len(blocks))
    runs = runs_of(blocks, every, np.ones_like(every), 1)
    owner, slot, width, stride = runs

    def listed(step: int) -> Round:
        ends = members[owner], members[(owner + way * step) % m]
        src, dst = ends[::-1] if reduce else ends
        return make_round(src, dst, slot, slot, reduce=reduce, width=width, stride=stride)

    steps = range(1, m if len(slot) else 1)
    sizes = {len(block) for block in blocks}
    if m <= MANY or len(blocks) < m or len(sizes) > 1:
        return [listed(step) for step in steps]
    ranks, size = np.asarray(members)[None], sizes.pop()
    return [
        Wide((Shift(ranks, step, size, reduce),), functools.partial(listed, step)) for step in steps
    ]


def all_to_all(group: Group) -> Schedule:
    """n - 1 steps of one block; a rank's block for itself is a local copy beside the first."""
    n = group.n
    rank = np.arange(n)

    def listed(step: int) -> Round:
        above = (rank + step) % n
        return make_round(rank, above, above, n + rank, reduce=False)

    ranks = rank[None]
    own = make_round(rank, rank, rank, n + rank, reduce=False)
    steps = (
        Wide((Shift(ranks, step, 1, reduce=False),), functools.partial(listed, step))
        for step in range(1, n)
    )
    return Schedule(
        op="all_to_all", algorithm="pairwise", ranks=n, slots=2 * n, rounds=(own, *steps)
    )
