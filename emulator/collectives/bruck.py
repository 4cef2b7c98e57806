"""Bruck's all_to_all: ceil(log2 n) steps of about half the blocks each, for small messages.

Scratch slot 2n + i of rank r holds the block that has i positions to go upwards; in step k those
whose distance has bit k set move 2^k on.

Source: Bruck et al. (1997).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.schedule import Group, Round, Schedule, make_round


def all_to_all(group: Group) -> Schedule:
    """Local copies into scratch, the steps, and local copies to where the blocks belong."""
    n = group.n
    rank = np.arange(n)
    rounds = [
        # Blocks for ranks from one's own on, then for those below it: two runs.
        make_round(rank, rank, rank, 2 * n, width=n - rank, reduce=False),
        make_round(rank[1:], rank[1:], 0, 3 * n - rank[1:], width=rank[1:], reduce=False),
    ]
    rounds += [_step(n, k) for k in range((n - 1).bit_length())]
    # One distance after the other: as it grows by one, the source is one lower.
    every = np.arange(3 * n)
    turn = every.copy()
    turn[n : 2 * n] = n + (every[:n] - 1) % n
    turn[2 * n :] = 2 * n + (every[:n] + 1) % n
    rounds.append(make_round(rank, rank, 2 * n, n + rank, repeat=n, turn=turn, reduce=False))
    return Schedule(op="all_to_all", algorithm="bruck", ranks=n, slots=3 * n, rounds=tuple(rounds))


def _step(n: int, k: int) -> Round:
    """All distances with bit k set, in as few runs as there are: of neighbours, or of distances
    that are alike below bit k.
    """
    bit = 1 << k
    neighbours = np.arange(bit, n, 2 * bit)
    alike = np.arange(bit, min(2 * bit, n))
    if len(neighbours) <= len(alike):
        first, width, stride = neighbours, np.minimum(bit, n - neighbours), 1
    else:
        first, width, stride = alike, -(-(n - alike) // (2 * bit)), 2 * bit
    rank = np.repeat(np.arange(n), len(first))
    slot = 2 * n + np.tile(first, n)
    return make_round(
        rank,
        (rank + bit) % n,
        slot,
        slot,
        width=np.tile(width, n),
        stride=stride,
        reduce=False,
    )
