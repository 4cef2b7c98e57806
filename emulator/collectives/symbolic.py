"""A Schedule run on symbols: which expression of the ranks' contributions ends up in each slot.

Expressions are numbered. Number r * slots + s is what slot s of rank r held at first; every
addition makes a new number, equal additions the same one. The additions of one step that depend on
nothing of that step form a batch, so everything is done with arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from emulator.collectives.schedule import IntArray, Round, Schedule

EMPTY = -1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Additions `left[i] + right[i]`, numbered from `first` on; `step` and `dst` say where they
    happened.
    """

    first: int
    left: IntArray
    right: IntArray
    step: int
    dst: IntArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Expressions:
    """`leaves` initial contributions, the additions, and the number in each slot [ranks, slots] at
    the end.
    """

    leaves: int
    batches: tuple[Batch, ...]
    final: IntArray

    @property
    def count(self) -> int:
        """Numbers in use: leaves and additions."""
        last = self.batches[-1] if self.batches else None
        return self.leaves if last is None else last.first + len(last.left)


def initial_slots(schedule: Schedule) -> IntArray:
    """Expression numbers of what slots [ranks, slots] hold at first; EMPTY elsewhere."""
    n, slots, op = schedule.ranks, schedule.slots, schedule.op
    filled = np.zeros((n, slots), dtype=bool)
    rank = np.arange(n)
    if schedule.counts:
        for r, row in enumerate(schedule.counts):
            filled[r, : sum(row)] = True
    elif op in ("all_reduce", "reduce"):
        filled[:] = True
    elif op in ("reduce_scatter", "all_to_all"):
        filled[:, : n * schedule.cuts] = True
    elif op in ("all_gather", "gather"):
        for piece in range(schedule.cuts):
            filled[rank, rank * schedule.cuts + piece] = True
    elif op == "broadcast":
        filled[schedule.root] = True
    elif op == "scatter":
        filled[schedule.root, :n] = True
    else:  # permute
        filled[:, 0] = True
    numbers = np.arange(n * slots).reshape(n, slots)
    return np.where(filled, numbers, EMPTY)


def trace(schedule: Schedule) -> Expressions:
    """Runs the schedule on symbols.

    Raises:
        ValueError: a step sends from or adds to an empty slot, or writes a slot twice in
        conflicting ways; the
            message names step and ranks.
    """
    n, slots = schedule.ranks, schedule.slots
    state = initial_slots(schedule).reshape(-1).copy()
    batches: list[Batch] = []
    fresh = n * slots
    for number, step in enumerate(schedule.steps()):
        src, dst, src_at, dst_at, reduce = _flatten(step, slots)
        incoming = state[src_at]
        _check_filled(schedule, number, src, dst, incoming, "sends from")
        copies, adds = np.flatnonzero(~reduce), np.flatnonzero(reduce)
        _check_copies(schedule, number, dst, dst_at, copies, adds)
        _check_filled(schedule, number, dst[adds], src[adds], state[dst_at[adds]], "adds into")
        for turn in _turns(dst_at[adds]):
            at = adds[turn]
            pairs = np.stack([state[dst_at[at]], incoming[at]], axis=1)
            unique, where, back = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
            batches.append(Batch(fresh, unique[:, 0], unique[:, 1], number, dst[at][where]))
            state[dst_at[at]] = fresh + back.reshape(-1)
            fresh += len(unique)
        state[dst_at[copies]] = incoming[copies]
    return Expressions(n * slots, tuple(batches), state.reshape(n, slots))


def _flatten(step: Round, slots: int) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """One row for each slot moved: source and destination rank, flat source and destination place,
    reduce.
    """
    one = step.single_slots()
    a, b = (
        ranks.astype(np.int64) * slots + at
        for ranks, at in ((one.src, one.src_slot), (one.dst, one.dst_slot))
    )
    return one.src, one.dst, a, b, one.reduce


def _turns(places: IntArray) -> Sequence[IntArray]:
    """Indices split so that each part hits every place at most once, keeping the listed order per
    place.
    """
    if not len(places):
        return []
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    occurrence = np.arange(len(places)) - np.repeat(starts, np.diff([*starts, len(places)]))
    by_turn = order[np.argsort(occurrence, kind="stable")]
    return np.split(by_turn, np.cumsum(np.bincount(occurrence))[:-1])


def _check_filled(
    schedule: Schedule, step: int, ranks: IntArray, partners: IntArray, numbers: IntArray, what: str
) -> None:
    empty = np.flatnonzero(numbers == EMPTY)
    if len(empty):
        rank, partner = int(ranks[empty[0]]), int(partners[empty[0]])
        raise ValueError(
            f"{schedule.op} by {schedule.algorithm!r}, step {step}: rank {rank} {what} a slot that "
            "holds nothing yet "
            f"(partner rank {partner})"
        )


def _check_copies(
    schedule: Schedule, step: int, dst: IntArray, dst_at: IntArray, copies: IntArray, adds: IntArray
) -> None:
    places = dst_at[copies]
    first = np.unique(places, return_index=True)[1]
    clash = np.setdiff1d(np.arange(len(places)), first)
    if not len(clash) and len(copies) and len(adds):
        clash = np.flatnonzero(np.isin(places, dst_at[adds]))
    if len(clash):
        rank = int(dst[copies[clash[0]]])
        raise ValueError(
            f"{schedule.op} by {schedule.algorithm!r}, step {step}: a slot of rank {rank} is "
            "written twice; "
            "copy into different slots or in different steps"
        )
