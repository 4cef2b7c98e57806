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
from emulator.collectives.levels import MANY, Blocks, deliver, parallel, side_by_side
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, Step, Wide, make_round
from emulator.collectives.traffic import Exchange, Sends, Traffic

_Column = tuple[IntArray, list[IntArray]]
_LISTED = 2**19  # transfers of a step that are no burden


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

    def reduce(members: IntArray) -> tuple[Sequence[Step], IntArray]:
        return LEVELS[inner].reduce(members, blocks, slots)

    def spread(members: IntArray) -> Sequence[Step]:
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

    def inside(members: IntArray) -> list[Step]:
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

    def inside(members: IntArray) -> Sequence[Step]:
        blocks = _whole(_blocks_inside(group, len(members)), cuts)
        return LEVELS[inner].spread(members, blocks, np.arange(len(members)), slots)

    rounds = [*parallel(between, slots), *side_by_side(nodes, inside, slots)]
    return _schedule("all_gather", group, slots, rounds, inner, outer, cuts)


def all_to_all(group: Group) -> Schedule:
    """Two steps: inside the node to the rank with the destination's place, then straight to the
    destination's node.
    """
    n = group.n
    sizes = np.array([len(members) for members in group.members()])

    def one() -> Round:
        return _by_place(group)[0]

    def two() -> Round:
        return _by_place(group)[1]

    rounds = [Wide(_inside_traffic(group), one), Wide(_outside_traffic(group), two)]
    return Schedule(
        op="all_to_all",
        algorithm="hierarchical",
        ranks=n,
        slots=2 * n + int(sizes.max()) * n,
        rounds=tuple(rounds[: min(2, len(sizes))]),
    )


def _by_place(group: Group) -> tuple[Round, Round]:
    """The two steps of the all_to_all, block by block."""
    n = group.n
    place, table, sizes = _places(group), member_table(group), node_sizes(group)
    node_of = np.asarray(group.nodes)
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
    return one, two


def _inside_traffic(group: Group) -> tuple[Traffic, ...]:
    """Member j of a node gets from each other one what is meant for the ranks of its place."""
    place, traffic, listed = _places(group), [], []
    for members in group.members():
        size = len(members)
        take = np.bincount(place % size, minlength=size)
        step = Exchange(members, members, np.ones_like(members), take, reduce=False)
        if size > MANY:
            traffic.append(step)
        else:
            listed += step.listed()
    if listed:
        src, dst, width = (np.concatenate(x) for x in zip(*listed, strict=True))
        return (*traffic, Sends(src, dst, width, np.zeros(len(src), bool)))
    return tuple(traffic)


def _outside_traffic(group: Group) -> tuple[Traffic, ...]:
    """Each rank gets a node's blocks from the member that stands for its place."""
    n, place, table, sizes = group.n, _places(group), member_table(group), node_sizes(group)
    if n * len(sizes) <= _LISTED:
        home, dst = np.repeat(np.arange(len(sizes)), n), np.tile(np.arange(n), len(sizes))
        away = home != np.asarray(group.nodes)[dst]
        home, dst = home[away], dst[away]
        src = table[home, place[dst] % sizes[home]]
        return (Sends(src, dst, sizes[home], np.zeros(len(src), bool)),)
    traffic = []
    for size in np.unique(sizes).tolist():
        for at in range(size):
            senders = table[sizes == size, at]
            receivers = np.flatnonzero(place % size == at)  # of its own node, only the sender
            give, take = np.full(len(senders), size), np.ones_like(receivers)
            traffic.append(Exchange(senders, receivers, give, take, reduce=False))
    return tuple(traffic)


def member_table(group: Group) -> IntArray:
    """The ranks of each node [node, place], -1 beyond its last."""
    nodes = group.members()
    table = np.full((len(nodes), max(len(members) for members in nodes)), -1, dtype=np.int32)
    for row, members in zip(table, nodes, strict=True):
        row[: len(members)] = members
    return table


def node_sizes(group: Group) -> IntArray:
    """Ranks of each node."""
    return np.bincount(np.asarray(group.nodes))


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
    rounds: Sequence[Step],
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
