"""One-step forms of the rooted operations and of permute: every message goes straight to where it
belongs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emulator.collectives.schedule import Group, Round, Schedule, make_round


def broadcast(group: Group, root: int = 0) -> Schedule:
    """The root sends the whole message to each other rank."""
    others = _others(group, root)
    return _schedule(
        "broadcast", group, root, 1, make_round(_full(others, root), others, 0, 0, reduce=False)
    )


def reduce(group: Group, root: int = 0) -> Schedule:
    """Every rank sends its buffer to the root, which adds them to its own by ascending rank."""
    others = _others(group, root)
    return _schedule(
        "reduce", group, root, 1, make_round(others, _full(others, root), 0, 0, reduce=True)
    )


def scatter(group: Group, root: int = 0) -> Schedule:
    """The root sends each rank its block."""
    others = _others(group, root)
    step = make_round(_full(others, root), others, others, others, reduce=False)
    return _schedule("scatter", group, root, group.n, step)


def gather(group: Group, root: int = 0) -> Schedule:
    """Each rank sends its block to the root."""
    others = _others(group, root)
    step = make_round(others, _full(others, root), others, others, reduce=False)
    return _schedule("gather", group, root, group.n, step)


def permute(group: Group, pairs: Sequence[tuple[int, int]]) -> Schedule:
    """Each (source, destination) pair of ranks in one step.

    Raises:
        ValueError: a rank is outside the group, or a source or destination occurs twice.
    """
    pairs = tuple((int(s), int(d)) for s, d in pairs)
    for name, ranks in (("source", [s for s, _ in pairs]), ("destination", [d for _, d in pairs])):
        outside = [r for r in ranks if not 0 <= r < group.n]
        if outside:
            raise ValueError(
                f"permute: {name} {outside[0]} is outside the group's ranks 0..{group.n - 1}"
            )
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"permute: a {name} occurs more than once in pairs {pairs[:8]}")
    src, dst = (
        np.array([s for s, _ in pairs], dtype=int),
        np.array([d for _, d in pairs], dtype=int),
    )
    step = make_round(src, dst, 0, 1, reduce=False)
    rounds = (step,) if pairs else ()
    return Schedule(
        op="permute", algorithm="direct", ranks=group.n, slots=2, rounds=rounds, pairs=pairs
    )


def _others(group: Group, root: int) -> np.ndarray:
    return np.delete(np.arange(group.n), root)


def _full(like: np.ndarray, value: int) -> np.ndarray:
    return np.full_like(like, value)


def _schedule(op: str, group: Group, root: int, slots: int, step: Round) -> Schedule:
    rounds = (step,) if group.n > 1 else ()
    return Schedule(op=op, algorithm="direct", ranks=group.n, slots=slots, rounds=rounds, root=root)
