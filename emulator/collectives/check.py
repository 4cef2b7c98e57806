"""Proof by execution that a Schedule does what its operation means, on symbolic chunks."""

from __future__ import annotations

import numpy as np

from emulator.collectives.ragged import deliveries
from emulator.collectives.schedule import REDUCING_OPS, IntArray, Schedule
from emulator.collectives.symbolic import EMPTY, Batch, Expressions, trace

_MOST_PLACES = 2**28


def check(schedule: Schedule) -> None:
    """Proves that every contribution arrives exactly once where it should.

    Raises:
        ValueError: a chunk is lost, repeated, mixed with another or sent before it exists; names
        rank and step.
    """
    if schedule.ranks * schedule.slots > _MOST_PLACES:
        raise ValueError(
            f"{_name(schedule)}: {schedule.slots} slots at each are too many to check; "
            "ranks x slots may be at most 2^28"
        )
    expressions = trace(schedule)
    if schedule.op in REDUCING_OPS:
        _check_sums(schedule, expressions)
    else:
        _check_copies(schedule, expressions)


def _check_copies(schedule: Schedule, expressions: Expressions) -> None:
    n, slots = schedule.ranks, schedule.slots
    if expressions.batches:
        step = expressions.batches[0].step
        raise ValueError(
            f"{_name(schedule)}, step {step}: adds, but a {schedule.op} only moves data"
        )
    rank = np.arange(n)
    expected = np.full((n, slots), EMPTY)
    if schedule.op == "all_gather":
        block = np.arange(n * schedule.cuts)
        expected[:, : len(block)] = block // schedule.cuts * slots + block
    elif schedule.counts:
        for source, destination, sent_at, kept_at, count in deliveries(schedule.counts):
            come = slice(kept_at, kept_at + count)
            expected[destination, come] = source * slots + sent_at + np.arange(count)
    elif schedule.op == "all_to_all":
        expected[:, n : 2 * n] = rank[None, :] * slots + rank[:, None]
    elif schedule.op == "broadcast":
        expected[:] = schedule.root * slots + np.arange(slots)
    elif schedule.op == "scatter":
        expected[rank, rank] = schedule.root * slots + rank
    elif schedule.op == "gather":
        expected[schedule.root, :n] = rank * slots + rank
    else:  # permute
        for source, destination in schedule.pairs:
            expected[destination, 1] = source * slots
    wrong = np.argwhere((expected != EMPTY) & (expressions.final != expected))
    if len(wrong):
        at, slot = wrong[0]
        meant, got = expected[at, slot], expressions.final[at, slot]
        raise ValueError(
            f"{_name(schedule)}: rank {at} should end with slot {meant % slots} of rank "
            f"{meant // slots} in its slot "
            f"{slot}, but {_describe(got, slots)}"
        )


def _check_sums(schedule: Schedule, expressions: Expressions) -> None:
    """Follows, as bit sets, whose contributions each expression contains, and of which chunk."""
    n, slots = schedule.ranks, schedule.slots
    chunk = np.empty(expressions.count, dtype=np.int64)
    chunk[: n * slots] = np.tile(np.arange(slots), n)
    members = np.zeros((expressions.count, -(-n // 64)), dtype=np.uint64)
    owner = np.repeat(np.arange(n), slots)
    members[np.arange(n * slots), owner // 64] = np.left_shift(
        np.uint64(1), (owner % 64).astype(np.uint64)
    )
    for batch in expressions.batches:
        _check_batch(schedule, batch, chunk, members)
        made = slice(batch.first, batch.first + len(batch.left))
        chunk[made] = chunk[batch.left]
        members[made] = members[batch.left] | members[batch.right]

    everybody = np.bitwise_or.reduce(members[np.arange(n) * slots], axis=0)
    if schedule.op == "all_reduce":
        places = np.indices((n, slots)).reshape(2, -1)
    elif schedule.op == "reduce_scatter":
        block = np.arange(n * schedule.cuts)
        places = np.stack([block // schedule.cuts, block])
    else:  # reduce
        places = np.stack([np.full(slots, schedule.root), np.arange(slots)])
    numbers = expressions.final[places[0], places[1]]
    held = members[np.maximum(numbers, 0)]
    wrong = (
        (numbers == EMPTY)
        | (chunk[np.maximum(numbers, 0)] != places[1])
        | (held != everybody).any(axis=1)
    )
    if wrong.any():
        first = np.flatnonzero(wrong)[0]
        rank, slot = places[:, first]
        if numbers[first] == EMPTY or chunk[numbers[first]] != slot:
            fault = _describe(numbers[first], slots)
        else:
            present = np.unpackbits(held[first].view(np.uint8), bitorder="little")[:n]
            absent = np.flatnonzero(present == 0)
            fault = (
                f"the contributions of ranks {absent[:5].tolist()} are missing ({len(absent)} of "
                f"{n})"
            )
        raise ValueError(
            f"{_name(schedule)}: rank {rank} should end with the sum of chunk {slot}, but {fault}"
        )


def _check_batch(schedule: Schedule, batch: Batch, chunk: IntArray, members: IntArray) -> None:
    mixed = np.flatnonzero(chunk[batch.left] != chunk[batch.right])
    if len(mixed):
        i = mixed[0]
        raise ValueError(
            f"{_name(schedule)}, step {batch.step}: rank {batch.dst[i]} adds chunk "
            f"{chunk[batch.right[i]]} to "
            f"chunk {chunk[batch.left[i]]}"
        )
    twice = np.flatnonzero((members[batch.left] & members[batch.right]).any(axis=1))
    if len(twice):
        i = twice[0]
        raise ValueError(
            f"{_name(schedule)}, step {batch.step}: rank {batch.dst[i]} adds a contribution to "
            "chunk "
            f"{chunk[batch.left[i]]} a second time"
        )


def _name(schedule: Schedule) -> str:
    return f"{schedule.op} by {schedule.algorithm!r} over {schedule.ranks} ranks"


def _describe(number: int, slots: int) -> str:
    if number == EMPTY:
        return "holds nothing"
    return (
        f"holds slot {number % slots} of rank {number // slots}"
        if number >= 0
        else "holds something else"
    )
