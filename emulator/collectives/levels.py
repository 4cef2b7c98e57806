"""Building blocks: reduce blocks to their owners, or spread them, among the members of one group.

`members` lists ranks; `blocks[b]` lists the slots that travel together and that member b owns. A
reduction returns, besides its rounds, who holds each block at its end, as positions in `members`.
Flat algorithms use one group with all ranks; hierarchical ones run these for many groups side by
side (`parallel`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from emulator.collectives.schedule import IntArray, Round, join_rounds, make_round

Blocks = Sequence[IntArray]


def reduce_full_mesh(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Everybody sends each owner its block; the owner adds to its own in ascending rank order. One
    step.
    """
    owners = np.arange(len(blocks))
    if len(members) == 1:
        return [], owners
    return [_exchange(members, blocks, owners, reduce=True)], owners


def spread_full_mesh(
    members: IntArray, blocks: Blocks, holders: IntArray, slots: int
) -> list[Round]:
    """Each holder sends its block to all others. One step."""
    if len(members) == 1:
        return []
    return [_exchange(members, blocks, holders, reduce=False)]


def reduce_ring(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Block b starts at member b and visits b+1, b+2, ...; each adds its own. m - 1 steps; ends at
    member b - 1.
    """
    m = len(members)
    holders = (np.arange(len(blocks)) - 1) % m
    return _circulate(members, blocks, np.arange(len(blocks)), slots, reduce=True), holders


def spread_ring(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Each block goes once round the ring from its holder. m - 1 steps."""
    return _circulate(members, blocks, holders, slots, reduce=False)


def deliver(members: IntArray, blocks: Blocks, holders: IntArray) -> list[Round]:
    """Copies each block from its holder to its owner; no step where they already are the same."""
    moving = [b for b in range(len(blocks)) if holders[b] != b and len(blocks[b])]
    if not moving:
        return []
    counts = [len(blocks[b]) for b in moving]
    slot = np.concatenate([blocks[b] for b in moving])
    src = np.repeat(members[holders[moving]], counts)
    return [make_round(src, np.repeat(members[moving], counts), slot, slot, reduce=False)]


REDUCE = {"ring": reduce_ring, "full_mesh": reduce_full_mesh}
SPREAD = {"ring": spread_ring, "full_mesh": spread_full_mesh}


def parallel(groups: Sequence[Sequence[Round]], slots: int) -> list[Round]:
    """The rounds of several groups, step by step at the same time."""
    groups = [g for g in groups if g]
    if len(groups) <= 1:
        return list(groups[0]) if groups else []
    shapes = {tuple(part.repeat for part in g) for g in groups}
    if len(shapes) == 1:
        columns = list(zip(*groups, strict=True))
        turns = [_joint_turn(column, slots) for column in columns]
        if all(ok for ok, _ in turns):
            return [
                join_rounds(c, c[0].repeat, turn)
                for c, (_, turn) in zip(columns, turns, strict=True)
            ]
    unrolled = [[step for part in g for step in part.steps()] for g in groups]
    return [
        join_rounds([s for s in steps if s is not None], 1, None)
        for steps in itertools.zip_longest(*unrolled)
    ]


def _exchange(members: IntArray, blocks: Blocks, holders: IntArray, *, reduce: bool) -> Round:
    """Between each block's holder and every other member: towards the holder to reduce, away from
    it to spread.
    """
    m = len(members)
    block = np.repeat(np.arange(len(blocks)), [len(b) for b in blocks])
    slot = np.concatenate([np.asarray(b, dtype=np.int32) for b in blocks])
    others = np.sort(np.asarray(members))
    far = np.repeat(others, len(slot))  # listed by ascending rank: the order of addition
    near = np.tile(members[holders[block]], m)
    slot = np.tile(slot, m)
    keep = far != near
    far, near, slot = far[keep], near[keep], slot[keep]
    src, dst = (far, near) if reduce else (near, far)
    return make_round(src, dst, slot, slot, reduce=reduce)


def _circulate(
    members: IntArray, blocks: Blocks, starts: IntArray, slots: int, *, reduce: bool
) -> list[Round]:
    """Every block travels m - 1 hops round the ring of members, from position starts[b]."""
    m = len(members)
    counts = np.array([len(b) for b in blocks])
    if m == 1 or not counts.sum():
        return []
    start = np.repeat(starts, counts)
    slot = np.concatenate([np.asarray(b, dtype=np.int32) for b in blocks])

    def hop(src_position: IntArray, slot: IntArray, repeat: int, turn: IntArray | None) -> Round:
        src = members[src_position % m]
        dst = members[(src_position + 1) % m]
        return make_round(src, dst, slot, slot, reduce=reduce, repeat=repeat, turn=turn)

    regular = (
        len(blocks) == m
        and len(set(counts.tolist())) == 1
        and len(set((starts - np.arange(m)) % m)) == 1
    )
    if (
        regular
    ):  # every member sends in every step: block b now, block b - 1 (which follows it) next
        turn = np.arange(slots, dtype=np.int32)
        for b in range(m):
            turn[blocks[b]] = blocks[b - 1]
        return [hop(start, slot, m - 1, turn)]
    return [hop(start + t, slot, 1, None) for t in range(m - 1)]


def _joint_turn(parts: Sequence[Round], slots: int) -> tuple[bool, IntArray | None]:
    """One turn that does for each part what its own does to the slots that it uses; False where
    they disagree.
    """
    if parts[0].repeat == 1:
        return True, None
    merged = np.arange(slots, dtype=np.int32)
    owner = np.zeros(slots, dtype=bool)
    for part in parts:
        if part.turn is None:
            return False, None
        used = np.unique(part.src_slot)
        clash = owner[used] & (merged[used] != part.turn[used])
        if clash.any():
            return False, None
        merged[used] = part.turn[used]
        owner[used] = True
    if not np.array_equal(np.sort(merged), np.arange(slots)):
        return False, None
    return True, merged
