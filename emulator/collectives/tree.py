"""Binary trees, and two at once of which each rank is a leaf of one: few steps, pipelined.

The tree over positions 1 .. n is the one in which x lies between its children and half of all
positions, the odd ones, are leaves. The second tree is the first moved by one position, so those
leaves have children there. Payloads are cut in pieces that follow each other through the tree; an
all_reduce sends each piece down as soon as the root has it.

Source: Sanders, Speck and Traeff (2009); NCCL's double binary trees. How many pieces is assumed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from emulator.collectives.levels import Blocks, runs, send
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, make_round

PIECES = 16
"""Pieces that follow each other through one tree."""


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """All blocks to the root of one tree, level by level."""
    parent, depth = (np.array(x) for x in _tree(len(members)))
    rounds: list[Round] = []
    for level in range(depth.max(), 0, -1):
        at = np.flatnonzero(depth == level)
        rounds += send(members, blocks, at, parent[at], 0, reduce=True, count=len(blocks))
    return rounds, np.full(len(blocks), _root(len(members)), dtype=int)


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Each block up to the root, then all blocks down."""
    m = len(members)
    parent, depth = (np.array(x) for x in _tree(m))
    rounds: list[Round] = []
    at, every = np.array(holders, dtype=int), np.arange(len(blocks))
    has = np.zeros((m, len(blocks)), dtype=bool)
    has[at, every] = True
    for level in range(depth.max(), 0, -1):
        up = np.where(depth[at] == level, parent[at], at)
        rounds += send(members, blocks, at, up, every, reduce=False)
        at = up
        has[at, every] = True
    for level in range(1, depth.max() + 1):
        below = np.flatnonzero(depth == level)
        lacking, block, count = runs(~has[below])
        to = below[lacking]
        rounds += send(members, blocks, parent[to], to, block, reduce=False, count=count)
    return rounds


def all_reduce(group: Group, trees: int = 1) -> Schedule:
    """Up and down, pipelined."""
    n = group.n
    parent, depth = (np.array(x) for x in _tree(n))
    below, last = np.flatnonzero(depth), depth.max()
    moves = []
    for tree, piece in itertools.product(range(trees), range(PIECES)):
        slot = piece * trees + tree
        low, high = (below + tree) % n, (parent[below] + tree) % n
        moves.append(_moves(piece + last - depth[below], low, high, slot, True))
        moves.append(_moves(piece + last + depth[below] - 1, high, low, slot, False))
    return _schedule("all_reduce", group, moves, trees)


def broadcast(group: Group, root: int = 0, trees: int = 1) -> Schedule:
    """Down from the root, pipelined."""
    return _one_way("broadcast", group, root, trees)


def reduce_to(group: Group, root: int = 0, trees: int = 1) -> Schedule:
    """Up to the root, pipelined."""
    return _one_way("reduce", group, root, trees)


def scatter(group: Group, root: int = 0) -> Schedule:
    """Whoever holds a range of blocks passes on its upper half. ceil(log2 n) steps."""
    n = group.n
    rounds = []
    for step in _halvings(n):
        src, dst, first, count = (np.array(x) for x in zip(*step, strict=True))
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        slot = (np.repeat(first, count) + offset + root) % n
        src, dst = (np.repeat((x + root) % n, count) for x in (src, dst))
        rounds.append(make_round(src, dst, slot, slot, reduce=False))
    return Schedule(
        op="scatter",
        algorithm="binary_tree",
        ranks=n,
        slots=n,
        rounds=tuple(rounds),
        root=root,
    )


def gather(group: Group, root: int = 0) -> Schedule:
    """`scatter` backwards."""
    rounds = [
        make_round(r.dst, r.src, r.dst_slot, r.src_slot, reduce=False)
        for r in reversed([*scatter(group, root).steps()])
    ]
    return Schedule(
        op="gather",
        algorithm="binary_tree",
        ranks=group.n,
        slots=group.n,
        rounds=tuple(rounds),
        root=root,
    )


def _one_way(op: str, group: Group, root: int, trees: int) -> Schedule:
    n = group.n
    parent, depth = (np.array(x) for x in _tree(n))
    below, last = np.flatnonzero(depth), depth.max()
    moves = []
    for tree, piece in itertools.product(range(trees), range(PIECES)):
        # The second tree has its own root; the real root hands it the piece, or takes it, aside.
        turn = root - _root(n) + tree
        head, slot, aside = (_root(n) + turn) % n, piece * trees + tree, int(tree > 0)
        low, high = (below + turn) % n, (parent[below] + turn) % n
        if op == "broadcast":
            new = low != root
            step = piece + aside + depth[below] - 1
            moves.append(_moves(step[new], high[new], low[new], slot, False))
            if head != root:
                moves.append(_moves(piece, root, head, slot, False))
        else:
            moves.append(_moves(piece + last - depth[below], low, high, slot, True))
            if head != root:
                moves.append(_moves(piece + last, head, root, slot, False))
    return _schedule(op, group, moves, trees, root)


def _moves(
    step: IntArray | int,
    src: IntArray | int,
    dst: IntArray | int,
    slot: int,
    reduce: bool,
) -> IntArray:
    """Transfers as rows: step, source, destination, slot, reduce."""
    return np.stack(np.broadcast_arrays(np.atleast_1d(step), src, dst, slot, reduce))


def _schedule(
    op: str, group: Group, moves: Sequence[IntArray], trees: int, root: int = 0
) -> Schedule:
    rows = np.concatenate(moves, axis=1)
    rows = rows[:, np.argsort(rows[0], kind="stable")]
    steps = np.split(rows, np.flatnonzero(np.diff(rows[0])) + 1, axis=1)
    return Schedule(
        op=op,
        algorithm="binary_tree" if trees == 1 else "double_binary_tree",
        ranks=group.n,
        slots=PIECES * trees,
        rounds=tuple(
            make_round(src, dst, slot, slot, reduce=reduce)
            for _, src, dst, slot, reduce in steps
            if len(src)
        ),
        root=root,
    )


@functools.lru_cache(maxsize=16)
def _tree(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parent and depth of each position 0 .. n-1 (position x - 1 stands for x)."""
    parent = []
    for x in range(1, n + 1):
        low, up = x & -x, x
        while up == x or up > n:
            up = (up - low) | (2 * low)
            low *= 2
            if low > n:
                up = 0
                break
        parent.append(up - 1)
    depth = [0] * n
    for i in range(n):
        at = i
        while parent[at] >= 0:
            at = parent[at]
            depth[i] += 1
    return tuple(parent), tuple(depth)


def _root(n: int) -> int:
    """The position without a parent."""
    return (1 << (n.bit_length() - 1)) - 1


def _halvings(n: int) -> list[list[tuple[int, int, int, int]]]:
    """Steps of (source, destination, first block, blocks), relative to the root."""
    ranges, steps = [(0, n)], []
    while any(size > 1 for _, size in ranges):
        step, following = [], []
        for at, size in ranges:
            half = (size + 1) // 2
            following.append((at, half))
            if size > half:
                step.append((at, at + half, at + half, size - half))
                following.append((at + half, size - half))
        steps.append(step)
        ranges = following
    return steps
