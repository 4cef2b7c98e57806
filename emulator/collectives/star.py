"""Star: one member collects everything and gives everything out; two steps, for few bytes.

Source: HCCL's documentation of star: alpha + beta n (documented).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, runs, send
from emulator.collectives.schedule import IntArray, Round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """The first member adds all others' data to its own, in their order. One step."""
    every = np.arange(len(members))
    rounds = send(members, blocks, every, 0, 0, reduce=True, count=len(blocks))
    return rounds, np.zeros(len(blocks), dtype=int)


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Everything goes to the first member, and from it to all. At most two steps."""
    holders = np.asarray(holders)
    inward = send(members, blocks, holders, 0, np.arange(len(blocks)), reduce=False)
    lacking, block, count = runs(holders != np.arange(len(members))[:, None])
    return inward + send(members, blocks, 0, lacking, block, reduce=False, count=count)
