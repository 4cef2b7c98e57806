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
from typing import Any, NamedTuple

import numpy as np

from emulator.collectives.schedule import (
    IntArray,
    Round,
    Step,
    Wide,
    join_steps,
    make_round,
    unrolled,
)

Blocks = Sequence[IntArray] | IntArray

MANY = 64
"""Members from which on a step between all pairs is not listed for the time reading."""


class Hop(NamedTuple):
    """One step of every block, in positions seen from its owner: from `first` and those `apart`
    upwards, `number` in all, each to the one `distance` further.
    """

    first: int
    apart: int
    number: int
    distance: int


def deliver(members: IntArray, blocks: Blocks, holders: IntArray) -> list[Round]:
    """Copies each block from its holder to its owner; no step where they already are the same."""
    every = np.arange(len(blocks))
    return send(members, blocks, np.asarray(holders), every, every, reduce=False)


def parallel(groups: Sequence[Sequence[Step]], slots: int) -> list[Step]:
    """The steps of several groups, one by one at the same time."""
    groups = [g for g in groups if g]
    if len(groups) <= 1:
        return list(groups[0]) if groups else []
    shapes = {tuple(part.repeat for part in g) for g in groups}
    if len(shapes) == 1:
        columns = list(zip(*groups, strict=True))
        turns = [_joint_turn(column, slots) for column in columns]
        if all(ok for ok, _ in turns):
            return [
                join_steps(c, c[0].repeat, turn)
                for c, (_, turn) in zip(columns, turns, strict=True)
            ]
    unrolled = [
        [step for part in g for step in ([part] if isinstance(part, Wide) else part.steps())]
        for g in groups
    ]
    return [
        join_steps([s for s in steps if s is not None], 1, None)
        for steps in itertools.zip_longest(*unrolled)
    ]


def side_by_side(
    groups: Sequence[IntArray], make: Callable[[IntArray], Sequence[Step]], slots: int
) -> list[Step]:
    """The steps `make(members)` of several groups of ranks at the same time; groups of one size do
    the same with the same slots.
    """
    tables: dict[int, list[IntArray]] = {}
    for members in groups:
        tables.setdefault(len(members), []).append(members)
    return parallel(
        [
            [_copies(part, np.stack(table)) for part in make(np.arange(size))]
            for size, table in tables.items()
        ],
        slots,
    )


def _copies(part: Step, table: IntArray) -> Step:
    """A step among positions done by each row of `table` [group, position]."""
    if isinstance(part, Wide):
        traffic = tuple(moved for item in part.traffic for moved in item.among(table))
        return Wide(traffic, lambda: _round_copies(part.listed(), table))
    return _round_copies(part, table)


def _round_copies(part: Round, table: IntArray) -> Round:
    src, dst = (table[:, ends].astype(np.int32).reshape(-1) for ends in (part.src, part.dst))
    first, last, width, reduce = (
        np.tile(x, len(table)) for x in (part.src_slot, part.dst_slot, part.width, part.reduce)
    )
    return Round(src, dst, first, last, width, reduce, part.repeat, part.turn, part.stride)


def travel(members: IntArray, blocks: Blocks, steps: Sequence[Hop], *, reduce: bool) -> list[Round]:
    """Every block goes the same way, seen from its owner's position: each step, a `Hop`, sends it
    from each of its positions to the one `distance` further, modulo the members.

    So what a member sends in a step are blocks `apart`: one run of them, or two where the numbers
    of the members begin again.
    """
    m, total = len(members), len(blocks)
    position = np.arange(m)
    rounds: list[Round] = []
    for first, apart, most, distance in steps:
        source, block, number = [], [], []
        for turn in (-m, 0, m):
            highest = position - first + turn  # the others are lower, those below 0 are no blocks
            skipped = np.maximum(0, -((total - 1 - highest) // apart))
            until = np.minimum(most, highest // apart + 1)
            some = until > skipped
            source.append(position[some])
            block.append((highest - (until - 1) * apart)[some])
            number.append((until - skipped)[some])
        at = np.concatenate(source)
        rounds += send(
            members,
            blocks,
            at,
            (at + distance) % m,
            np.concatenate(block),
            reduce=reduce,
            count=np.concatenate(number),
            apart=apart,
        )
    return rounds


def there_and_back(
    hops: Callable[[int], Sequence[Hop]],
) -> tuple[Callable[..., Any], Callable[..., list[Round]]]:
    """The two functions of a level that spreads by `hops(members)`, as in `travel`, and reduces by
    the same steps backwards, to the owners. What it spreads is with the owners at first.
    """

    def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
        steps = [
            Hop(hop.first + hop.distance, hop.apart, hop.number, -hop.distance)
            for hop in reversed(hops(len(members)))
        ]
        return travel(members, blocks, steps, reduce=True), np.arange(len(blocks))

    def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
        return travel(members, blocks, hops(len(members)), reduce=False)

    return reduce, spread


def send(
    members: IntArray,
    blocks: Blocks,
    source: IntArray | int,
    destination: IntArray | int,
    block: IntArray | int,
    *,
    reduce: bool,
    count: IntArray | int = 1,
    apart: int = 1,
) -> list[Round]:
    """One step in which `count[i]` blocks, `block[i]` and then every one `apart`, go from position
    `source[i]` to `destination[i]`; no step if nothing moves.

    What goes together is one run of slots, or few, where the blocks lie evenly.
    """
    ends = [np.asarray(x) for x in np.broadcast_arrays(source, destination, block, count)]
    away = (ends[0] != ends[1]) & (ends[3] > 0)
    starts, stops, firsts, counts = ends if away.all() else (x[away] for x in ends)
    row, slot, width, stride = runs_of(blocks, firsts, counts, apart)
    if not len(row):
        return []
    src, dst = members[starts[row]], members[stops[row]]
    return [make_round(src, dst, slot, slot, reduce=reduce, width=width, stride=stride)]


def runs_of(
    blocks: Blocks, block: IntArray, count: IntArray, apart: int
) -> tuple[IntArray, IntArray, IntArray, int]:
    """The slots of `count[i]` blocks, `block[i]` and then every one `apart`, as few runs: the i,
    first slot and width of each, and the stride of all.
    """
    line = _line(blocks)
    stride = 1
    if line is None:
        sizes = np.array([len(b) for b in blocks], dtype=int)
        row, nth = unrolled(count)
        block = block[row] + nth * apart
        every = np.concatenate([np.asarray(b, dtype=np.int32) for b in blocks])
        start = np.cumsum(sizes) - sizes
        if stride := _spacing(every, start, sizes):  # a run for each block, of its own length
            some = sizes[block] > 0
            row, block = row[some], block[some]
            return row, every[start[block]], sizes[block], stride
        halves = [[b[first::2] for b in blocks] for first in (0, 1)]
        if all(_evenly(half) for half in halves):  # two interleaved ones, as of blocks cut in two
            found = [runs_of(half, block, np.ones_like(block), 1) for half in halves]
            if found[0][3] == found[1][3]:
                at, slot, width = (
                    np.concatenate(x) for x in zip(*(f[:3] for f in found), strict=True)
                )
                return row[at], slot, width, found[0][3]
        of, nth = unrolled(sizes[block])
        slot = every[start[block[of]] + nth]
        return row[of], slot, np.ones_like(slot), 1
    starts, between, size, inside = line
    if not size:
        none = np.zeros(0, dtype=np.int32)
        return none, none, none, stride
    if apart * between == size * inside and len(starts) == 1:  # blocks without gaps: one run
        row, slot, width, stride = np.arange(len(block)), block * between, count * size, inside
    elif count.sum() > size * len(count):  # a run through the blocks for each of their slots
        row, nth = unrolled(np.full(len(count), size))
        slot, width, stride = block[row] * between + nth * inside, count[row], apart * between
    else:  # a run for each block
        row, nth = unrolled(count)
        slot, stride = (block[row] + nth * apart) * between, inside
        width = np.full(len(row), size)
    if len(starts) == 1:
        slot = slot + starts[0]
    else:
        slot = np.concatenate([slot + start for start in starts])
        row, width = (np.tile(x, len(starts)) for x in (row, width))
    return row, slot, width, stride if width.max(initial=1) > 1 else 1


def runs(mask: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """(row, first, count) of the runs of what is True in the rows of `mask`."""
    rows, columns = mask.shape
    padded = np.zeros((rows, columns + 2), dtype=bool)
    padded[:, 1:-1] = mask
    edges = np.flatnonzero(padded[:, 1:] != padded[:, :-1]).reshape(-1, 2)
    row, first = np.divmod(edges[:, 0], columns + 1)
    return row, first, edges[:, 1] - edges[:, 0]


def _evenly(blocks: Sequence[IntArray]) -> bool:
    """Whether the slots of each block are evenly spaced, those of all alike."""
    sizes = np.array([len(b) for b in blocks], dtype=int)
    return bool(_spacing(np.concatenate(blocks), np.cumsum(sizes) - sizes, sizes))


def _spacing(every: IntArray, start: IntArray, sizes: IntArray) -> int:
    """How far apart the slots of each block are if all are evenly spaced upwards; 0 if not."""
    inside = np.ones(len(every), dtype=bool)
    inside[start[sizes > 0]] = False
    apart = np.diff(every, prepend=0)[inside]
    even = len(apart) == 0 or (apart[0] > 0 and bool((apart == apart[0]).all()))
    return (int(apart[0]) if len(apart) else 1) if even else 0


def _line(blocks: Blocks) -> tuple[list[int], int, int, int] | None:
    """(starts, between, size, inside) if each block is one line, or two interleaved ones, of `size`
    slots `inside` apart, from each of `starts` and then `between` on for each block; None if not.
    """
    if not len(blocks) or len({len(b) for b in blocks}) > 1:
        return None
    table = np.stack(list(blocks)) if not isinstance(blocks, np.ndarray) else blocks
    one = _even(table)
    if one is not None or table.shape[1] % 2:
        return None if one is None else ([one[0]], *one[1:])
    halves = [_even(table[:, first::2]) for first in (0, 1)]
    if halves[0] is None or halves[1] is None or halves[0][1:] != halves[1][1:]:
        return None
    return [half[0] for half in halves if half is not None], *halves[0][1:]


def _even(table: IntArray) -> tuple[int, int, int, int] | None:
    """(start, between, size, inside) if the rows of slots are evenly spaced upwards."""
    count, size = table.shape
    if not size:
        return 0, 1, 0, 1
    start = int(table[0, 0])
    inside = int(table[0, 1]) - start if size > 1 else 1
    between = int(table[1, 0]) - start if count > 1 else size * inside
    even = start + np.arange(count)[:, None] * between + np.arange(size) * inside
    if inside < 1 or between < 1 or not np.array_equal(table, even):
        return None
    return start, between, size, inside


def circulate(
    members: IntArray, blocks: Blocks, starts: IntArray, slots: int, *, reduce: bool
) -> list[Round]:
    """Every block travels m - 1 hops round the ring of members, from position starts[b]."""
    m = len(members)
    counts = np.array([len(b) for b in blocks])
    if m == 1 or not counts.sum():
        return []
    every = np.arange(len(blocks))
    row, first, width, stride = runs_of(blocks, every, np.ones_like(every), 1)
    start = starts[row]

    def hop(at: IntArray, repeat: int, turn: IntArray | None) -> Round:
        return make_round(
            members[at % m],
            members[(at + 1) % m],
            first,
            first,
            reduce=reduce,
            width=width,
            repeat=repeat,
            turn=turn,
            stride=stride,
        )

    if len(blocks) == m and len(set(counts.tolist())) == 1:
        for way in (1, -1):  # every member sends in every step: block b, then what follows it
            if len(set((starts - way * np.arange(m)) % m)) == 1:
                turn = np.arange(slots, dtype=np.int32)
                for b in range(m):
                    turn[blocks[b]] = blocks[(b - way) % m]
                return [hop(start, m - 1, turn)]
    return [hop(start + t, 1, None) for t in range(m - 1)]


def _joint_turn(parts: Sequence[Step], slots: int) -> tuple[bool, IntArray | None]:
    """One turn that does for each part what its own does to the slots that it uses; False where
    they disagree.
    """
    if parts[0].repeat == 1:
        return True, None
    merged = np.arange(slots, dtype=np.int32)
    owner = np.zeros(slots, dtype=bool)
    for part in parts:
        if isinstance(part, Wide) or part.turn is None:
            return False, None
        used = np.unique(part.single_slots().src_slot)
        clash = owner[used] & (merged[used] != part.turn[used])
        if clash.any():
            return False, None
        merged[used] = part.turn[used]
        owner[used] = True
    if not np.array_equal(np.sort(merged), np.arange(slots)):
        return False, None
    return True, merged
