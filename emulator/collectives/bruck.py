"""Bruck's all_to_all: ceil(log2 n) steps of about half the blocks each, for small messages.

Scratch slot 2n + i of rank r holds the block that has i positions to go upwards; in step k those
whose distance has bit k set move 2^k on.

Source: Bruck et al. (1997).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.schedule import Group, Schedule, make_round


def all_to_all(group: Group) -> Schedule:
    """Local copies into scratch, the steps, and local copies to where the blocks belong."""
    n = group.n
    rank, distance = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    rounds = [make_round(rank, rank, (rank + distance) % n, 2 * n + distance, reduce=False)]
    for k in range((n - 1).bit_length()):
        moving = (distance >> k) & 1 == 1
        slot = 2 * n + distance[moving]
        rounds.append(
            make_round(rank[moving], (rank[moving] + (1 << k)) % n, slot, slot, reduce=False)
        )
    rounds.append(make_round(rank, rank, 2 * n + distance, n + (rank - distance) % n, reduce=False))
    return Schedule(op="all_to_all", algorithm="bruck", ranks=n, slots=3 * n, rounds=tuple(rounds))
