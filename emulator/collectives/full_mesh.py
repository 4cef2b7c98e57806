"""Full mesh: everybody talks to everybody at once; fewest steps, for switched fabrics and small
messages.

The owner of chunk c is rank c. It starts with its own contribution and adds the others in ascending
rank order.
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, runs_of
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, make_round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Everybody sends each owner its block; the owner adds to its own in ascending rank order. One
    step.
    """
    owners = np.arange(len(blocks))
    if len(members) == 1:
        return [], owners
    return _exchange(members, blocks, owners, reduce=True), owners


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Each holder sends its block to all others. One step."""
    if len(members) == 1:
        return []
    return _exchange(members, blocks, holders, reduce=False)


def all_to_all(group: Group) -> Schedule:
    """One step; a rank's block for itself is a local copy."""
    n = group.n
    src, dst = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    step = make_round(src, dst, dst, n + src, reduce=False)
    return Schedule(op="all_to_all", algorithm="full_mesh", ranks=n, slots=2 * n, rounds=(step,))


def _exchange(members: IntArray, blocks: Blocks, holders: IntArray, *, reduce: bool) -> list[Round]:
    """Between each block's holder and every other member: towards the holder to reduce, away from
    it to spread.
    """
    m, every = len(members), np.arange(len(blocks))
    block, slot, width, stride = runs_of(blocks, every, np.ones_like(every), 1)
    if not len(slot):
        return []
    ranks = np.asarray(members, dtype=np.int32)
    far = np.repeat(np.sort(ranks), len(slot))  # listed by ascending rank: the order of addition
    near = np.tile(ranks[holders[block]], m)
    keep = far != near
    far, near = far[keep], near[keep]
    slot, width = (np.tile(x.astype(np.int32), m)[keep] for x in (slot, width))
    src, dst = (far, near) if reduce else (near, far)
    return [make_round(src, dst, slot, slot, reduce=reduce, width=width, stride=stride)]
