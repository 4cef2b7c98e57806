"""The fastest algorithm of all that are known, by trying them."""

from __future__ import annotations

import dataclasses
import functools

from emulator.collectives import ALGORITHMS, Group, group_of
from emulator.fabric.collective import Collective, collective
from emulator.machines import Machine
from emulator.units import seconds

# Two levels: which are worth a try inside nodes and between them, and what the vendors use.
_INSIDE = ("full_mesh", "ring")
_BETWEEN = ("full_mesh", "nhr", "rhd")
_TWO_LEVELS = (
    *(f"{inner}/{outer}" for inner in _INSIDE for outer in _BETWEEN),
    "ring/ring",
    "double_ring/nhr",  # full_mesh/ring is called hierarchical
)
_LEVELLED = ("all_reduce", "reduce_scatter", "all_gather")
# Among many ranks these move no less than ring and full_mesh do, in no fewer messages, and take
# long to build.
_SMALL_GROUPS_ONLY = ("star", "pairwise", "double_ring")
_MANY = 64
_SHOWN = 4


def candidates(op: str, group: Group) -> tuple[str, ...]:
    """The names that a search tries for `op` among `group`."""
    names = list(ALGORITHMS[op])
    nodes = len(set(group.nodes))
    if op in _LEVELLED:
        if 1 < nodes < group.n:
            names += _TWO_LEVELS
        else:
            names.remove("hierarchical")  # one level only: full_mesh or ring
        if group.n > _MANY:
            names = [name for name in names if name not in _SMALL_GROUPS_ONLY]
    return tuple(names)


@functools.lru_cache(maxsize=4096)
def fastest(
    op: str,
    nbytes: int,
    on: Machine,
    devices: tuple[int, ...],
    dtype: str,
    root: int | None,
    pairs: tuple[tuple[int, int], ...] | None,
    transport: str | None,
    launch: str,
) -> Collective:
    """The fastest of `candidates`; its reason says what was tried and how long each took.

    Only algorithms that can also be executed on data are tried.
    """
    tried = [
        collective(
            op,
            nbytes,
            on=on,
            devices=devices,
            algorithm=name,
            dtype=dtype,
            root=root,
            pairs=pairs,
            transport=transport,
            launch=launch,
        )
        for name in candidates(op, group_of(devices, on))
    ]
    tried.sort(key=lambda answer: answer.time_s)  # stable: equal times keep the order of names
    shown = ", ".join(f"{a.algorithm} by {a.transport} {seconds(a.time_s)}" for a in tried[:_SHOWN])
    more = f", slowest {tried[-1].algorithm} {seconds(tried[-1].time_s)}" if tried[_SHOWN:] else ""
    reason = f"fastest of {len(tried)} algorithms tried: {shown}{more}"
    return dataclasses.replace(tried[0], reason=reason)
