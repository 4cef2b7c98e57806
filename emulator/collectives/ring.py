"""Ring: neighbours only, n - 1 steps for each half; every port carries the least possible bytes.

Chunk c starts at rank c and visits c+1, c+2, ..., so its result is ((x[c] + x[c+1]) + x[c+2]) + ...
with indices modulo n, rounded at each addition. A reduce_scatter adds in the same order and hands
block r to rank r in one more step, so that reduce_scatter followed by all_gather equals all_reduce
bit for bit.
"""

from __future__ import annotations

import functools

import numpy as np

from emulator.collectives.levels import Blocks, circulate
from emulator.collectives.schedule import (
    Group,
    IntArray,
    Round,
    Schedule,
    Step,
    Wide,
    join_rounds,
    make_round,
)
from emulator.collectives.traffic import Shift


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Block b starts at member b and visits b+1, b+2, ...; each adds its own. m - 1 steps; ends at
    member b - 1.
    """
    owners = np.arange(len(blocks))
    holders = (owners - 1) % len(members)
    return circulate(members, blocks, owners, slots, reduce=True), holders


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Each block goes once round the ring from its holder. m - 1 steps."""
    return circulate(members, blocks, holders, slots, reduce=False)


def all_to_all(group: Group) -> Schedule:
    """n - 1 steps in which every block is handed on until it arrives: n (n - 1) / 2 block hops for
    each rank.

    Scratch slot 2n + k holds the block that has k hops to go from its source, so what travels on is
    one run of slots.
    """
    n = group.n
    return Schedule(
        op="all_to_all", algorithm="ring", ranks=n, slots=3 * n, rounds=tuple(all_to_all_rounds(n))
    )


def all_to_all_rounds(n: int) -> list[Step]:
    """The steps of the ring all_to_all over ranks 0 .. n-1 with 3n slots."""
    rank = np.arange(n, dtype=np.int32)
    after = (rank + 1) % n

    def filled() -> Round:
        source, hops = (a.reshape(-1) for a in np.meshgrid(rank, rank, indexing="ij"))
        slot = np.where(hops == 0, n + source, 2 * n + hops)
        return make_round(source, source, (source + hops) % n, slot, reduce=False)

    def handed(step: int) -> Round:
        arriving = make_round(rank, after, 2 * n + step + 1, n + (rank - step) % n, reduce=False)
        going_on = n - 2 - step
        if not going_on:
            return arriving
        slot = 2 * n + step + 2
        onward = make_round(rank, after, slot, slot, reduce=False, width=going_on)
        return join_rounds([arriving, onward])

    ranks = rank[None]
    steps = (
        Wide((Shift(ranks, 1, n - 1 - step, reduce=False),), functools.partial(handed, step))
        for step in range(n - 1)
    )
    return [Wide((), filled), *steps]
