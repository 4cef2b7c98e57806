"""Ring: neighbours only, n - 1 steps for each half; every port carries the least possible bytes.

Chunk c starts at rank c and visits c+1, c+2, ..., so its result is ((x[c] + x[c+1]) + x[c+2]) + ...
with indices modulo n, rounded at each addition. A reduce_scatter adds in the same order and hands
block r to rank r in one more step, so that reduce_scatter followed by all_gather equals all_reduce
bit for bit.
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, circulate
from emulator.collectives.schedule import (
    Group,
    IntArray,
    Round,
    Schedule,
    join_rounds,
    make_round,
)


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


def all_to_all_rounds(n: int) -> list[Round]:
    """The rounds of the ring all_to_all over ranks 0 .. n-1 with 3n slots."""
    rank = np.arange(n, dtype=np.int32)
    source, hops = (a.reshape(-1) for a in np.meshgrid(rank, rank, indexing="ij"))
    rounds = [
        make_round(
            source,
            source,
            (source + hops) % n,
            np.where(hops == 0, n + source, 2 * n + hops),
            reduce=False,
        )
    ]
    after = (rank + 1) % n
    for step in range(n - 1):
        arriving = make_round(rank, after, 2 * n + step + 1, n + (rank - step) % n, reduce=False)
        going_on = n - 2 - step
        if going_on:
            onward = make_round(
                rank, after, 2 * n + step + 2, 2 * n + step + 2, reduce=False, width=going_on
            )
            arriving = join_rounds([arriving, onward])
        rounds.append(arriving)
    return rounds
