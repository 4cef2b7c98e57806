"""Binary trees, and two at once of which each rank is a leaf of one: few steps, pipelined.

The tree over positions 1 .. n is the one in which x lies between its children and half of all
positions, the odd ones, are leaves. The second tree is the first moved by one position, so those
leaves have children there. Payloads are cut in pieces that follow each other through the tree; an
all_reduce sends each piece down as soon as the root has it.

Source: Sanders, Speck and Traeff (2009); NCCL's double binary trees. How many pieces is assumed.
"""

from __future__ import annotations

import itertools

import numpy as np

from emulator.collectives.levels import Blocks, grid, send
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, make_round

PIECES = 16
"""Pieces that follow each other through one tree."""

_Move = tuple[int, int, int, int, bool]  # step, source, destination, slot, reduce


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """All blocks to the root of one tree, level by level."""
    parent, depth = (np.array(x) for x in _tree(len(members)))
    i, block = grid(len(members), len(blocks))
    rounds: list[Round] = []
    for level in range(depth.max(), 0, -1):
        at = depth[i] == level
        rounds += send(members, blocks, i[at], parent[i[at]], block[at], reduce=True)
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
    i, block = grid(m, len(blocks))
    for level in range(1, depth.max() + 1):
        lacks = (depth[i] == level) & ~has[i, block]
        to, what = i[lacks], block[lacks]
        rounds += send(members, blocks, parent[to], to, what, reduce=False)
    return rounds


def all_reduce(group: Group, trees: int = 1) -> Schedule:
    """Up and down, pipelined."""
    n, slots = group.n, PIECES * trees
    moves: list[_Move] = []
    for tree, piece in itertools.product(range(trees), range(PIECES)):
        parent, depth = _tree(n)
        last, slot = max(depth), piece * trees + tree
        for i in range(n):
            if depth[i]:
                ends = _moved(i, tree, n), _moved(parent[i], tree, n)
                moves.append((piece + last - depth[i], *ends, slot, True))
                moves.append((piece + last + depth[i] - 1, *ends[::-1], slot, False))
    return _schedule("all_reduce", group, slots, moves, trees)


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
        for r in reversed(scatter(group, root).rounds)
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
    n, slots = group.n, PIECES * trees
    parent, depth = _tree(n)
    last = max(depth)
    moves: list[_Move] = []
    for tree, piece in itertools.product(range(trees), range(PIECES)):
        # The second tree has its own root; the real root hands it the piece, or takes it, aside.
        turn = root - _root(n) if tree == 0 else root - _root(n) + 1
        head, slot = (_root(n) + turn) % n, piece * trees + tree
        aside = int(tree > 0)
        for i in range(n):
            if depth[i]:
                low, high = (i + turn) % n, (parent[i] + turn) % n
                if op == "broadcast":
                    moves.append((piece + aside + depth[i] - 1, high, low, slot, False))
                else:
                    moves.append((piece + last - depth[i], low, high, slot, True))
        if aside and head != root:
            if op == "broadcast":
                moves.append((piece, root, head, slot, False))
            else:
                moves.append((piece + last, head, root, slot, False))
    if op == "broadcast":
        moves = [move for move in moves if move[2] != root]
    return _schedule(op, group, slots, moves, trees, root)


def _schedule(
    op: str, group: Group, slots: int, moves: list[_Move], trees: int, root: int = 0
) -> Schedule:
    steps: dict[int, list[_Move]] = {}
    for move in moves:
        steps.setdefault(move[0], []).append(move)
    rounds = []
    for number in sorted(steps):
        _, src, dst, slot, reduce = zip(*steps[number], strict=True)
        rounds.append(make_round(src, dst, slot, slot, reduce=reduce))
    return Schedule(
        op=op,
        algorithm="binary_tree" if trees == 1 else "double_binary_tree",
        ranks=group.n,
        slots=slots,
        rounds=tuple(rounds),
        root=root,
    )


def _tree(n: int) -> tuple[list[int], list[int]]:
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
    return parent, depth


def _root(n: int) -> int:
    """The position without a parent."""
    return (1 << (n.bit_length() - 1)) - 1


def _moved(position: int, tree: int, n: int) -> int:
    return (position + tree) % n


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
