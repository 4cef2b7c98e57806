"""Two levels: one algorithm inside each node, another between nodes.

An all_reduce reduces inside the nodes, all-reduces between them, and gathers inside again, so only
one L-th of the payload of each rank crosses between nodes (L: ranks per node). With nodes of
unequal size, L is the smallest: the first L ranks of each node own the pieces, the others
contribute to them and receive them. A reduce_scatter goes inside first as well (HCCL's own starts
between nodes), so that for equal nodes reduce_scatter followed by all_gather equals all_reduce bit
for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emulator.collectives.flat import LEVELS
from emulator.collectives.levels import Blocks, deliver, parallel, side_by_side
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, make_round

_Column = tuple[IntArray, list[IntArray]]


def all_reduce(group: Group, inner: str = "full_mesh", outer: str = "ring") -> Schedule:
    """Reduce inside nodes, all_reduce between them, gather inside. The payload is cut in nodes x L
    chunks.
    """
    _check_levels(inner, outer)
    nodes = group.members()
    count, local = len(nodes), min(len(m) for m in nodes)
    cuts = _cuts(inner, outer)
    slots = count * local * cuts
    # Chunk a L + b: owner b in node a.
    chunks = [_cut(np.arange(b, count * local, local), cuts) for b in range(local)]
    blocks = [pieces.reshape(-1) for pieces in chunks]

    def reduce(members: IntArray) -> tuple[list[Round], IntArray]:
        return LEVELS[inner].reduce(members, blocks, slots)

    def spread(members: IntArray) -> list[Round]:
        return LEVELS[inner].spread(members, blocks, places[len(members)], slots)

    places = {size: reduce(np.arange(size))[1] for size in {len(m) for m in nodes}}
    holders = [members[places[len(members)]] for members in nodes]
    between, back = [], []
    for b in range(local):
        column = np.array([holder[b] for holder in holders])
        rounds, holder = LEVELS[outer].reduce(column, chunks[b], slots)
        between.append(rounds)
        back.append(LEVELS[outer].spread(column, chunks[b], holder, slots))
    rounds = [
        *side_by_side(nodes, lambda members: reduce(members)[0], slots),
        *parallel(between, slots),
        *parallel(back, slots),
        *side_by_side(nodes, spread, slots),
    ]
    return _schedule("all_reduce", group, slots, rounds, inner, outer)


def reduce_scatter(group: Group, inner: str = "full_mesh", outer: str = "ring") -> Schedule:
    """Reduce inside nodes, to the rank with the destination's place there, then between nodes."""
    _check_levels(inner, outer)
    nodes, cuts = group.members(), _cuts(inner, outer)
    slots = group.n * cuts

    def inside(members: IntArray) -> list[Round]:
        blocks = _whole(_blocks_inside(group, len(members)), cuts)
        rounds, holders = LEVELS[inner].reduce(members, blocks, slots)
        return [*rounds, *deliver(members, blocks, holders)]

    between = []
    for column, pieces in columns(group):
        blocks = _whole(pieces, cuts)
        rounds, holders = LEVELS[outer].reduce(column, blocks, slots)
        between.append([*rounds, *deliver(column, blocks, holders)])
    rounds = [*side_by_side(nodes, inside, slots), *parallel(between, slots)]
    return _schedule("reduce_scatter", group, slots, rounds, inner, outer, cuts)


def all_gather(group: Group, inner: str = "full_mesh", outer: str = "ring") -> Schedule:
    """Spread each block between nodes, to the rank with its owner's place, then inside them."""
    _check_levels(inner, outer)
    nodes, cuts = group.members(), _cuts(inner, outer)
    slots = group.n * cuts
    between = [
        LEVELS[outer].spread(column, _whole(pieces, cuts), np.arange(len(column)), slots)
        for column, pieces in columns(group)
    ]

    def inside(members: IntArray) -> list[Round]:
        blocks = _whole(_blocks_inside(group, len(members)), cuts)
        return LEVELS[inner].spread(members, blocks, np.arange(len(members)), slots)

    rounds = [*parallel(between, slots), *side_by_side(nodes, inside, slots)]
    return _schedule("all_gather", group, slots, rounds, inner, outer, cuts)


def all_to_all(group: Group) -> Schedule:
    """Two steps: inside the node to the rank with the destination's place, then straight to the
    destination's node.
    """
    n = group.n
    nodes = group.members()
    place = _places(group)
    node_of = np.asarray(group.nodes)
    sizes = np.array([len(m) for m in nodes])
    table = np.full((len(nodes), sizes.max()), -1, dtype=np.int32)
    for g, members in enumerate(nodes):
        table[g, : len(members)] = members
    src, dst = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    middle = table[node_of[src], place[dst] % sizes[node_of[src]]]
    # Scratch: one slot for each (place of the source in the node, destination).
    scratch = 2 * n + place[src] * n + dst
    inside = node_of[src] == node_of[dst]
    one = make_round(
        src, np.where(inside, dst, middle), dst, np.where(inside, n + src, scratch), reduce=False
    )
    out = ~inside
    two = make_round(middle[out], dst[out], scratch[out], n + src[out], reduce=False)
    slots = 2 * n + int(sizes.max()) * n
    rounds = [one, two] if out.any() else [one]
    return Schedule(
        op="all_to_all", algorithm="hierarchical", ranks=n, slots=slots, rounds=tuple(rounds)
    )


def _places(group: Group) -> IntArray:
    """Each rank's place among the ranks of its node."""
    places = np.empty(group.n, dtype=np.int32)
    for members in group.members():
        places[members] = np.arange(len(members))
    return places


def _blocks_inside(group: Group, size: int) -> Blocks:
    """Which destination blocks each place of a node with `size` ranks gathers."""
    place = _places(group) % size
    return [np.flatnonzero(place == j).astype(np.int32) for j in range(size)]


def columns(group: Group) -> list[_Column]:
    """Sets of ranks, one in each node, that exchange between nodes, and the blocks that each node's
    rank owns.
    """
    nodes = group.members()
    return [
        (
            np.array([members[place % len(members)] for members in nodes]),
            [members[place : place + 1].astype(np.int32) for members in nodes],
        )
        for place in range(max(len(members) for members in nodes))
    ]


def _cuts(inner: str, outer: str) -> int:
    return max(LEVELS[inner].cuts, LEVELS[outer].cuts)


def _cut(blocks: IntArray, cuts: int) -> IntArray:
    """The slots of each block [block, cut]."""
    return (blocks[:, None] * cuts + np.arange(cuts)).astype(np.int32)


def _whole(blocks: Blocks, cuts: int) -> list[IntArray]:
    """The slots of each set of blocks."""
    return [_cut(block, cuts).reshape(-1) for block in blocks]


def _check_levels(inner: str, outer: str) -> None:
    for name, value in (("inner", inner), ("outer", outer)):
        if value not in LEVELS:
            raise ValueError(
                f"hierarchical: {name} must be one of {', '.join(LEVELS)}; got {value!r}"
            )


def _schedule(
    op: str,
    group: Group,
    slots: int,
    rounds: Sequence[Round],
    inner: str,
    outer: str,
    cuts: int = 1,
) -> Schedule:
    default = (inner, outer) == ("full_mesh", "ring")
    return Schedule(
        op=op,
        algorithm="hierarchical" if default else f"{inner}/{outer}",
        ranks=group.n,
        slots=slots,
        rounds=tuple(rounds),
        cuts=cuts,
    )
