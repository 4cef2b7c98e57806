"""Flat collectives: one level over all ranks, whatever its algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from emulator.collectives import (
    direct,
    double_ring,
    full_mesh,
    nb,
    nhr,
    pairwise,
    rhd,
    ring,
    star,
    tree,
)
from emulator.collectives.levels import Blocks, deliver
from emulator.collectives.schedule import Group, IntArray, Round, Schedule, Step, Wide, make_round
from emulator.collectives.traffic import Exchange


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """How one level reduces and spreads blocks, and into how many slots it wants each cut."""

    reduce: Callable[[IntArray, Blocks, int], tuple[Sequence[Step], IntArray]]
    spread: Callable[[IntArray, Blocks, IntArray, int], Sequence[Step]]
    cuts: int = 1


LEVELS: Mapping[str, Level] = {
    "ring": Level(ring.reduce, ring.spread),
    "double_ring": Level(double_ring.reduce, double_ring.spread, cuts=2),
    "full_mesh": Level(full_mesh.reduce, full_mesh.spread),
    "rhd": Level(rhd.reduce, rhd.spread),
    "nhr": Level(nhr.reduce, nhr.spread),
    "nb": Level(nb.reduce, nb.spread),
    "pairwise": Level(pairwise.reduce, pairwise.spread),
    "star": Level(star.reduce, star.spread),
    "binary_tree": Level(tree.reduce, tree.spread),
}


def all_reduce(group: Group, algorithm: str) -> Schedule:
    """A reduction to the owners, then from wherever the sums are to all."""
    level, members, blocks, slots = _flat(group, algorithm)
    reduced, holders = level.reduce(members, blocks, slots)
    rounds = [*reduced, *level.spread(members, blocks, holders, slots)]
    return _schedule("all_reduce", group, algorithm, slots, rounds)


def reduce_scatter(group: Group, algorithm: str) -> Schedule:
    """A reduction, and a step that hands each block to its rank if it is elsewhere."""
    level, members, blocks, slots = _flat(group, algorithm)
    reduced, holders = level.reduce(members, blocks, slots)
    rounds = [*reduced, *deliver(members, blocks, holders)]
    return _schedule("reduce_scatter", group, algorithm, slots, rounds, level.cuts)


def all_gather(group: Group, algorithm: str) -> Schedule:
    """From the owners to all."""
    level, members, blocks, slots = _flat(group, algorithm)
    rounds = level.spread(members, blocks, members, slots)
    return _schedule("all_gather", group, algorithm, slots, rounds, level.cuts)


def broadcast(group: Group, root: int, algorithm: str) -> Schedule:
    """The root's blocks are scattered (by halves; a full mesh at once), then gathered by all."""
    level, members, blocks, slots = _flat(group, algorithm)
    scattered = (direct if algorithm == "full_mesh" else tree).scatter(group, root)
    spread = level.spread(members, blocks, members, slots)
    held = np.zeros(group.n, dtype=int)  # slots that each rank has from the scatter, its own first
    held[root] = group.n
    for part in scattered.rounds:
        assert isinstance(part, Round)  # neither scatter makes wide steps
        np.add.at(held, part.dst, part.width)
    rounds = [*scattered.rounds, *(_without(part, held) for part in spread)]
    return _schedule("broadcast", group, algorithm, slots, rounds, root=root)


def reduce(group: Group, root: int, algorithm: str) -> Schedule:
    """A reduce_scatter, whose blocks the root then gathers."""
    level, members, blocks, slots = _flat(group, algorithm)
    reduced, holders = level.reduce(members, blocks, slots)
    gathered = (direct if algorithm == "full_mesh" else tree).gather(group, root)
    rounds = [*reduced, *deliver(members, blocks, holders), *gathered.rounds]
    return _schedule("reduce", group, algorithm, slots, rounds, root=root)


def _flat(group: Group, algorithm: str) -> tuple[Level, IntArray, Blocks, int]:
    level = LEVELS[algorithm]
    blocks = np.arange(group.n * level.cuts, dtype=np.int32).reshape(group.n, level.cuts)
    return level, np.arange(group.n, dtype=np.int32), blocks, group.n * level.cuts


def _without(part: Step, held: IntArray) -> Step:
    """The copies of a step but for what their receivers hold already: `held[r]` slots from slot r
    of rank r on, past the last to the first.
    """
    if isinstance(part, Round):
        return _round_without(part, held)
    # Only the full mesh spreads in a wide step, and its scatter leaves each rank its own block.
    lacking = held < len(held)
    traffic = tuple(
        dataclasses.replace(item, take=np.where(lacking[item.receivers], item.take, 0))
        for item in part.traffic
        if isinstance(item, Exchange)
    )
    return Wide(traffic, lambda: _round_without(part.listed(), held))


def _round_without(part: Round, held: IntArray) -> Round:
    """`_without` of a round."""
    n, first, stride = len(held), part.src_slot, part.stride
    end = part.dst + held[part.dst]
    rows, nths, widths = [], [], []
    for low, high in ((end, n), (np.maximum(end - n, 0), part.dst)):  # what they lack
        skipped = np.maximum(0, -((first - low) // stride))
        width = np.minimum(part.width, -((first - high) // stride)) - skipped
        row = np.flatnonzero(width > 0)
        rows.append(row)
        nths.append(skipped[row])
        widths.append(width[row])
    row, width = np.concatenate(rows), np.concatenate(widths)
    slot = first[row] + np.concatenate(nths) * stride
    ends = part.src[row], part.dst[row]
    return make_round(*ends, slot, slot, reduce=False, width=width, stride=stride)


def _schedule(
    op: str,
    group: Group,
    algorithm: str,
    slots: int,
    rounds: Sequence[Step],
    cuts: int = 1,
    root: int = 0,
) -> Schedule:
    return Schedule(
        op=op,
        algorithm=algorithm,
        ranks=group.n,
        slots=slots,
        rounds=tuple(rounds),
        cuts=cuts,
        root=root,
    )
