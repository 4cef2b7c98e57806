"""Full mesh: everybody talks to everybody at once; fewest steps, for switched fabrics and small
messages.

The owner of chunk c is rank c. It starts with its own contribution and adds the others in ascending
rank order.
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import MANY, Blocks, runs_of
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, Step, Wide, make_round
from emulator.collectives.traffic import Exchange


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Step], IntArray]:
    """Everybody sends each owner its block; the owner adds to its own in ascending rank order. One
    step.
    """
    owners = np.arange(len(blocks))
    if len(members) == 1:
        return [], owners
    return _exchange(members, blocks, owners, reduce=True), owners


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Step]:
    """Each holder sends its block to all others. One step."""
    if len(members) == 1:
        return []
    return _exchange(members, blocks, holders, reduce=False)


def all_to_all(group: Group) -> Schedule:
    """One step; a rank's block for itself is a local copy."""
    n = group.n
    rank = np.arange(n)
    each = np.ones(n, dtype=int)
    step = Wide((Exchange(rank, rank, each, each, reduce=False),), lambda: _all_blocks(n))
    return Schedule(op="all_to_all", algorithm="full_mesh", ranks=n, slots=2 * n, rounds=(step,))


def _all_blocks(n: int) -> Round:
    """Block d of every rank to slot n + r of rank d."""
    src, dst = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    return make_round(src, dst, dst, n + src, reduce=False)


def _exchange(members: IntArray, blocks: Blocks, holders: IntArray, *, reduce: bool) -> list[Step]:
    """Between each block's holder and every other member: towards the holder to reduce, away from
    it to spread.
    """
    slots = np.bincount(holders, weights=[len(block) for block in blocks], minlength=len(members))
    if not slots.any():
        return []
    if len(members) <= MANY:
        return [_listed(members, blocks, holders, reduce=reduce)]
    every, held = np.ones_like(members), slots.astype(int)
    give, take = (every, held) if reduce else (held, every)
    step = Exchange(np.asarray(members), np.asarray(members), give, take, reduce)
    return [Wide((step,), lambda: _listed(members, blocks, holders, reduce=reduce))]


def _listed(members: IntArray, blocks: Blocks, holders: IntArray, *, reduce: bool) -> Round:
    """`_exchange` with each transfer."""
    m, every = len(members), np.arange(len(blocks))
    block, slot, width, stride = runs_of(blocks, every, np.ones_like(every), 1)
    ranks = np.asarray(members, dtype=np.int32)
    far = np.repeat(np.sort(ranks), len(slot))  # listed by ascending rank: the order of addition
    near = np.tile(ranks[holders[block]], m)
    keep = far != near
    far, near = far[keep], near[keep]
    slot, width = (np.tile(x.astype(np.int32), m)[keep] for x in (slot, width))
    src, dst = (far, near) if reduce else (near, far)
    return make_round(src, dst, slot, slot, reduce=reduce, width=width, stride=stride)
