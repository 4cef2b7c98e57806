"""Pipelines: a chain for messages from or to a root; between and inside nodes at once for the rest.

An all_gather passes blocks round a ring of nodes, one place of each node per ring; what arrived in
one step is handed to the rest of the node while the next is under way. A reduce_scatter runs this
backwards. With N nodes that is N steps.

Source: HCCL's documentation of its pipeline algorithm, max(inter, intra) (N-1) + intra
(documented). Into how many pieces a chain cuts a message is assumed.
"""

from __future__ import annotations

import functools

import numpy as np

from emulator.collectives.hierarchical import member_table, node_sizes
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, Step, Wide, make_round
from emulator.collectives.traffic import Chain, Made


def broadcast(group: Group, root: int = 0, pieces: int | None = None) -> Schedule:
    """From the root to the next rank, from there to the one after it, and so on; in `pieces`,
    by default as many as there are ranks.
    """
    return _chain("broadcast", group, root, root, pieces)


def reduce_to(group: Group, root: int = 0, pieces: int | None = None) -> Schedule:
    """From the rank after the root upwards, each adding its own, round to the root."""
    return _chain("reduce", group, root, root + 1, pieces)


def all_gather(group: Group) -> Schedule:
    """N steps over N nodes."""
    rounds = _gather_rounds(group)
    return Schedule(
        op="all_gather",
        algorithm="pipeline",
        ranks=group.n,
        slots=group.n,
        rounds=tuple(rounds),
    )


def reduce_scatter(group: Group) -> Schedule:
    """`all_gather` backwards, adding."""
    rounds = _reduce_rounds(group)
    return Schedule(
        op="reduce_scatter",
        algorithm="pipeline",
        ranks=group.n,
        slots=group.n,
        rounds=tuple(rounds),
    )


def all_reduce(group: Group) -> Schedule:
    """A reduce_scatter, then an all_gather."""
    rounds = [*_reduce_rounds(group), *_gather_rounds(group)]
    return Schedule(
        op="all_reduce",
        algorithm="pipeline",
        ranks=group.n,
        slots=group.n,
        rounds=tuple(rounds),
    )


def _gather_rounds(group: Group) -> list[Step]:
    nodes = group.members()
    if len({len(members) for members in nodes}) == 1:
        return [*_even_gather(np.stack(nodes))]
    return _uneven(group, reduce=False)


def _reduce_rounds(group: Group) -> list[Step]:
    nodes = group.members()
    if len({len(members) for members in nodes}) == 1:
        return [*_even_reduce(np.stack(nodes))]
    return _uneven(group, reduce=True)


def _uneven(group: Group, *, reduce: bool) -> list[Step]:
    """For nodes of any sizes: a step for each node, and no two alike."""
    table, sizes = member_table(group), node_sizes(group)
    count, widest = table.shape
    here, place = np.arange(count)[:, None], np.arange(widest)[None]
    after = (here + 1) % count

    def moves(step: int) -> tuple[IntArray, IntArray, IntArray]:
        """(source, destination, block). At each node are the blocks of the node `home`, each with
        the member that stands for its place.
        """
        home = (here + 1 + step if reduce else here - step) % count
        block = table[home, place]
        holder = table[here, place % sizes[here]]
        other = np.broadcast_to(table[:, None], (count, widest, widest))  # of the holder's node
        inside = (block[..., None] >= 0) & (other >= 0) & (other != holder[..., None])
        wide = (np.broadcast_to(x[..., None], inside.shape)[inside] for x in (holder, block))
        holders, blocks = wide
        ends = (other[inside], holders) if reduce else (holders, other[inside])
        if step == (0 if reduce else count - 1):  # nothing between nodes
            return *ends, blocks
        there = table[after, place % sizes[after]]
        between = (there, holder) if reduce else (holder, there)
        real = block >= 0
        src, dst = (
            np.concatenate([one, two[real]]) for one, two in zip(ends, between, strict=True)
        )
        return src, dst, np.concatenate([blocks, block[real]])

    def listed(step: int) -> Round:
        src, dst, block = moves(step)
        return make_round(src, dst, block, block, reduce=reduce)

    def transfers(step: int) -> tuple[IntArray, IntArray, IntArray]:
        src, dst, _ = moves(step)
        return src, dst, np.ones_like(src)

    return [
        Wide((Made(functools.partial(transfers, step), reduce),), functools.partial(listed, step))
        for step in range(count)
    ]


def _even_gather(nodes: IntArray) -> list[Round]:
    """For nodes of one size [node, place]: but for the last one, all steps are alike, each with the
    blocks of the node before.
    """
    holder, member = _inside(nodes)
    after, before = np.roll(nodes, -1, axis=0).reshape(-1), np.roll(nodes, 1, axis=0).reshape(-1)
    own = nodes.reshape(-1)
    src, dst = np.concatenate([own, own[holder]]), np.concatenate([after, own[member]])
    alike = _alike(src, dst, src, len(nodes) - 1, _turn(own, before), reduce=False)
    return alike + _alike(
        own[holder], own[member], after[holder], min(1, len(holder)), None, reduce=False
    )


def _even_reduce(nodes: IntArray) -> list[Round]:
    """`_even_gather` backwards: but for the first one, all steps are alike."""
    holder, member = _inside(nodes)
    after, second = (np.roll(nodes, -by, axis=0).reshape(-1) for by in (1, 2))
    own = nodes.reshape(-1)
    first = _alike(own[member], own[holder], after[holder], min(1, len(holder)), None, reduce=True)
    src, dst = np.concatenate([own[member], after]), np.concatenate([own[holder], own])
    slot = np.concatenate([second[holder], second])
    return first + _alike(src, dst, slot, len(nodes) - 1, _turn(own, after), reduce=True)


def _inside(nodes: IntArray) -> tuple[IntArray, IntArray]:
    """Each place, counted through `nodes`, with every other one of its node, upwards."""
    places = np.arange(nodes.size).reshape(nodes.shape)
    one, other = (x.reshape(-1) for x in np.broadcast_arrays(places[:, :, None], places[:, None]))
    return one[one != other], other[one != other]


def _turn(slots: IntArray, following: IntArray) -> IntArray:
    """What carries each of all slots to the one that follows it."""
    turn = np.empty(len(slots), dtype=np.int32)
    turn[slots] = following
    return turn


def _alike(
    src: IntArray,
    dst: IntArray,
    slot: IntArray,
    repeat: int,
    turn: IntArray | None,
    *,
    reduce: bool,
) -> list[Round]:
    """`repeat` alike steps as a round; none if that is 0."""
    if not repeat:
        return []
    return [make_round(src, dst, slot, slot, reduce=reduce, repeat=repeat, turn=turn)]


def _chain(op: str, group: Group, root: int, first: int, pieces: int | None) -> Schedule:
    """n - 1 hops upwards from rank `first`, one piece behind the other."""
    n = group.n
    pieces = pieces or n
    adds = op == "reduce"
    ranks = (first + np.arange(n)) % n

    def listed(step: int, low: int, high: int) -> Round:
        hop = np.arange(high, low - 1, -1)  # the foremost piece is the first
        piece = step - hop
        return make_round(ranks[hop], ranks[hop + 1], piece, piece, reduce=adds)

    rounds = []
    for step in range(n + pieces - 2 if n > 1 else 0):
        low, high = max(0, step - pieces + 1), min(step, n - 2)
        traffic = Chain(ranks, low, high, adds)
        rounds.append(Wide((traffic,), functools.partial(listed, step, low, high)))
    return Schedule(
        op=op,
        algorithm="ring" if pieces == 1 < n else "pipeline",
        ranks=n,
        slots=pieces,
        rounds=tuple(rounds),
        root=root,
    )
