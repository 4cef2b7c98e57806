"""Star: one member collects everything and gives everything out; two steps, for few bytes.

Source: HCCL's documentation of star: alpha + beta n (documented).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, grid, send
from emulator.collectives.schedule import IntArray, Round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """The first member adds all others' data to its own, in their order. One step."""
    i, block = grid(len(members), len(blocks))
    rounds = send(members, blocks, i, np.zeros_like(i), block, reduce=True)
    return rounds, np.zeros(len(blocks), dtype=int)


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Everything goes to the first member, and from it to all. At most two steps."""
    holders, every = np.asarray(holders), np.arange(len(blocks))
    inward = send(members, blocks, holders, np.zeros_like(holders), every, reduce=False)
    i, block = grid(len(members), len(blocks))
    lacks = holders[block] != i
    i, block = i[lacks], block[lacks]
    return inward + send(members, blocks, np.zeros_like(i), i, block, reduce=False)
