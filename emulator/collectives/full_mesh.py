"""Full mesh: everybody talks to everybody at once; fewest steps, for switched fabrics and small
messages.

The owner of chunk c is rank c. It starts with its own contribution and adds the others in ascending
rank order.
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import reduce_full_mesh, spread_full_mesh
from emulator.collectives.schedule import Group, Schedule, make_round


def all_reduce(group: Group) -> Schedule:
    """Two steps: a reduce_scatter, then an all_gather, each of one n-th of the payload per pair."""
    members, blocks = _flat(group)
    reduced, holders = reduce_full_mesh(members, blocks, group.n)
    rounds = [*reduced, *spread_full_mesh(members, blocks, holders, group.n)]
    return Schedule(
        op="all_reduce", algorithm="full_mesh", ranks=group.n, slots=group.n, rounds=tuple(rounds)
    )


def reduce_scatter(group: Group) -> Schedule:
    """One step."""
    members, blocks = _flat(group)
    rounds, _ = reduce_full_mesh(members, blocks, group.n)
    return Schedule(
        op="reduce_scatter",
        algorithm="full_mesh",
        ranks=group.n,
        slots=group.n,
        rounds=tuple(rounds),
    )


def all_gather(group: Group) -> Schedule:
    """One step."""
    members, blocks = _flat(group)
    rounds = spread_full_mesh(members, blocks, members, group.n)
    return Schedule(
        op="all_gather", algorithm="full_mesh", ranks=group.n, slots=group.n, rounds=tuple(rounds)
    )


def all_to_all(group: Group) -> Schedule:
    """One step; a rank's block for itself is a local copy."""
    n = group.n
    src, dst = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    step = make_round(src, dst, dst, n + src, reduce=False)
    return Schedule(op="all_to_all", algorithm="full_mesh", ranks=n, slots=2 * n, rounds=(step,))


def _flat(group: Group) -> tuple[np.ndarray, list[np.ndarray]]:
    members = np.arange(group.n, dtype=np.int32)
    return members, [np.array([r], dtype=np.int32) for r in range(group.n)]
