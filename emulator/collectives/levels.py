"""Building blocks: reduce blocks to their owners, or spread them, among the members of one group.

`members` lists ranks; `blocks[b]` lists the slots that travel together and that member b owns
(blocks may be fewer than members). A level of an algorithm is two functions,

    reduce(members, blocks, slots) -> rounds, holders      adds every member's share of each block
    spread(members, blocks, holders, slots) -> rounds      copies each block to every member

where `holders` are positions in `members`. Flat algorithms use one group with all ranks;
hierarchical ones run these for many groups side by side (`parallel`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emulator.collectives.schedule import IntArray, Round, join_rounds, make_round

Blocks = Sequence[IntArray]


def deliver(members: IntArray, blocks: Blocks, holders: IntArray) -> list[Round]:
    """Copies each block from its holder to its owner; no step where they already are the same."""
    moving = [b for b in range(len(blocks)) if holders[b] != b and len(blocks[b])]
    if not moving:
        return []
    counts = [len(blocks[b]) for b in moving]
    slot = np.concatenate([blocks[b] for b in moving])
    src = np.repeat(members[holders[moving]], counts)
    return [make_round(src, np.repeat(members[moving], counts), slot, slot, reduce=False)]


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


def travel(
    members: IntArray,
    blocks: Blocks,
    starts: IntArray,
    steps: Sequence[Sequence[tuple[int, int]]],
    *,
    reduce: bool,
) -> list[Round]:
    """Every block goes the same way, seen from its own position starts[b]: in each step it is sent
    from each position `starts[b] + source` to `starts[b] + destination`, modulo the members.
    """
    m = len(members)
    start = np.repeat(starts, [len(b) for b in blocks])
    if m == 1 or not len(start):
        return []
    slot = np.concatenate([np.asarray(b, dtype=np.int32) for b in blocks])
    rounds = []
    for hops in steps:
        source, destination = np.array(hops).T[:, :, None]
        rounds.append(
            make_round(
                members[(start + source) % m].reshape(-1),
                members[(start + destination) % m].reshape(-1),
                np.tile(slot, len(hops)),
                np.tile(slot, len(hops)),
                reduce=reduce,
            )
        )
    return rounds


Hops = Callable[[int], Sequence[Sequence[tuple[int, int]]]]


def there_and_back(hops: Hops) -> tuple[Callable[..., Any], Callable[..., list[Round]]]:
    """The two functions of a level that spreads by `hops(members)`, as in `travel`, and reduces by
    the same steps backwards, to the owners.
    """

    def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
        owners = np.arange(len(blocks))
        steps = [[hop[::-1] for hop in step] for step in reversed(hops(len(members)))]
        return travel(members, blocks, owners, steps, reduce=True), owners

    def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
        return travel(members, blocks, holders, hops(len(members)), reduce=False)

    return reduce, spread


def send(
    members: IntArray,
    blocks: Blocks,
    source: IntArray,
    destination: IntArray,
    block: IntArray,
    *,
    reduce: bool,
) -> list[Round]:
    """One step in which `block[i]` goes from position `source[i]` to `destination[i]`; no step if
    nothing moves.
    """
    sizes = np.array([len(b) for b in blocks], dtype=int)
    away = (source != destination) & (sizes[block] > 0)
    if not away.any():
        return []
    source, destination, block = source[away], destination[away], block[away]
    count = sizes[block]
    every = np.concatenate([np.asarray(b, dtype=np.int32) for b in blocks])
    first = (np.cumsum(sizes) - sizes)[block]
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    slot = every[np.repeat(first, count) + offset]
    src, dst = (members[np.repeat(ends, count)] for ends in (source, destination))
    return [make_round(src, dst, slot, slot, reduce=reduce)]


def grid(*sizes: int) -> list[IntArray]:
    """All combinations of indices below the sizes, flat, the last one fastest."""
    return [x.reshape(-1) for x in np.indices(sizes)]


def circulate(
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

    if len(blocks) == m and len(set(counts.tolist())) == 1:
        for way in (1, -1):  # every member sends in every step: block b, then what follows it
            if len(set((starts - way * np.arange(m)) % m)) == 1:
                turn = np.arange(slots, dtype=np.int32)
                for b in range(m):
                    turn[blocks[b]] = blocks[(b - way) % m]
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
