"""Bruck's all_to_all: ceil(log2 n) steps of about half the blocks each, for small messages.

Scratch slot 2n + i of rank r holds the block that has i positions to go upwards; in step k those
whose distance has bit k set move 2^k on.

Source: Bruck et al. (1997).
"""

from __future__ import annotations

import functools

import numpy as np

from emulator.collectives.schedule import Group, IntArray, Round, Schedule, Wide, make_round
from emulator.collectives.traffic import Shift


def all_to_all(group: Group) -> Schedule:
    """Local copies into scratch, the steps, and local copies to where the blocks belong."""
    n = group.n
    ranks, distances = np.arange(n), np.arange(n)

    def out() -> Round:
        rank, distance = _pairs(ranks, distances)
        return make_round(rank, rank, (rank + distance) % n, 2 * n + distance, reduce=False)

    def onward(k: int, moving: IntArray) -> Round:
        rank, distance = _pairs(ranks, moving)
        slot = 2 * n + distance
        return make_round(rank, (rank + (1 << k)) % n, slot, slot, reduce=False)

    def home() -> Round:
        rank, distance = _pairs(ranks, distances)
        return make_round(rank, rank, 2 * n + distance, n + (rank - distance) % n, reduce=False)

    steps = []
    for k in range((n - 1).bit_length()):
        moving = distances[(distances >> k) & 1 == 1]
        traffic = Shift(ranks[None], 1 << k, len(moving), reduce=False)
        steps.append(Wide((traffic,), functools.partial(onward, k, moving)))
    rounds = (Wide((), out), *steps, Wide((), home))
    return Schedule(op="all_to_all", algorithm="bruck", ranks=n, slots=3 * n, rounds=rounds)


def _pairs(a: IntArray, b: IntArray) -> tuple[IntArray, IntArray]:
    """Every a with every b."""
    return np.repeat(a, len(b)), np.tile(b, len(a))
