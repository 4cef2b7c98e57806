"""Ragged all_to_all: every rank sends every other as much as it likes, straight and whole.

The full mesh sends all at once; pairwise in n - 1 steps, in step s to the rank s above, so that a
step takes as long as its largest message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emulator.collectives.schedule import Round, Schedule, make_round

RAGGED = ("full_mesh", "pairwise")

Counts = tuple[tuple[int, ...], ...]


def ragged_all_to_all(counts: Sequence[Sequence[int]], algorithm: str = "full_mesh") -> Schedule:
    """The Schedule that takes counts[source][destination] slots to where they belong.

    Raises:
        ValueError: an unknown algorithm, or counts that are negative or not square.
    """
    if algorithm not in RAGGED:
        raise ValueError(
            f"unknown algorithm {algorithm!r} for a ragged all_to_all; known: {', '.join(RAGGED)}"
        )
    table = tuple(tuple(row) for row in counts)
    n = len(table)
    if not n or any(len(row) != n for row in table) or min(map(min, table)) < 0:
        raise ValueError("counts must be as many rows as ranks, of as many numbers, none below 0")
    moved = [move for move in deliveries(table) if move[4]]
    if algorithm == "full_mesh":
        steps = [moved]
    else:  # distance 0 is a local copy, which costs nothing
        steps = [[m for m in moved if (m[1] - m[0]) % n == s] for s in range(n)]
    received = max(sum(column) for column in zip(*table, strict=True))
    return Schedule(
        op="all_to_all",
        algorithm=algorithm,
        ranks=n,
        slots=max(1, max(map(sum, table)) + received),
        rounds=tuple(_round(step) for step in steps if step),
        counts=table,
    )


def deliveries(counts: Counts) -> Iterator[tuple[int, int, int, int, int]]:
    """(source, destination, first slot there, first slot here, slots) of every pair of ranks."""
    start = max(sum(row) for row in counts)
    kept_at = [start] * len(counts)
    for source, row in enumerate(counts):
        sent_at = 0
        for destination, count in enumerate(row):
            yield source, destination, sent_at, kept_at[destination], count
            sent_at += count
            kept_at[destination] += count


def _round(moves: list[tuple[int, int, int, int, int]]) -> Round:
    src, dst, sent_at, kept_at, width = zip(*moves, strict=True)
    return make_round(src, dst, sent_at, kept_at, reduce=False, width=width)
