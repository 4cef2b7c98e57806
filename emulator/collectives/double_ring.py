"""Double ring: each block in two halves that go round in opposite directions, so both directions of
every link are used.

The first half of block b is ((x[b+1] + x[b+2]) + ...) + x[b], the second ((x[b-1] + x[b-2]) + ...)
+ x[b]; both end at rank b.

Source: HCCL's choice inside a node of this machine (documented, cann-hccl 9aeddc0); where its rings
start is not published (assumed).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, circulate, parallel
from emulator.collectives.schedule import IntArray, Step


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Step], IntArray]:
    """m - 1 steps of half a block each way; ends at the owners."""
    m, owners = len(members), np.arange(len(blocks))
    return _both_ways(members, blocks, (owners + 1) % m, (owners - 1) % m, slots, True), owners


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Step]:
    """m - 1 steps of half a block each way."""
    return _both_ways(members, blocks, holders, holders, slots, False)


def _both_ways(
    members: IntArray,
    blocks: Blocks,
    up_starts: IntArray,
    down_starts: IntArray,
    slots: int,
    reduce: bool,
) -> list[Step]:
    up = [block[: (len(block) + 1) // 2] for block in blocks]
    down = [block[(len(block) + 1) // 2 :] for block in blocks]
    turned = len(members) - 1 - down_starts  # positions in the reversed list
    rounds = (
        circulate(members, up, up_starts, slots, reduce=reduce),
        circulate(members[::-1], down, turned, slots, reduce=reduce),
    )
    return parallel(rounds, slots)
