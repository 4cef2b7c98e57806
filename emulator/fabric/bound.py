"""The least time that physics allows a collective: bytes that must cross a cut, over the cut's
capacity.

Cuts are taken round one device, one package and one node (or block of a user's fabric) at a time,
with what is left of their links. Latencies are left out: a bound, not a model.
"""

from __future__ import annotations

import functools
from collections import Counter

from emulator.fabric.routes import network_of
from emulator.machines import Machine

_ROUNDING = 1e-12  # relative


@functools.lru_cache(maxsize=4096)
def bound_s(
    op: str,
    nbytes: int,
    machine: Machine,
    devices: tuple[int, ...],
    root: int = 0,
    pairs: tuple[tuple[int, int], ...] = (),
) -> float:
    """Seconds below which no algorithm can finish `op`. `nbytes` as in nccl-tests; `root`, `pairs`
    are ranks.
    """
    n = len(devices)
    worst = 0.0
    for parts, capacities in network_of(machine).cuts(devices):
        capacity = dict(zip(parts, capacities.tolist(), strict=True))
        if op == "permute":
            for part, moved in _permute_bytes(parts, pairs, nbytes).items():
                worst = max(worst, crossing_s(moved, capacity[part]))
            continue
        sizes = Counter(parts)
        if len(sizes) == 1:
            continue  # nothing is outside
        if op == "all_reduce" and not machine.fabric.in_network_reduction:
            # m parts hold m partial sums: m - 1 of them must leave, and the result must come back
            # to as many.
            m = len(sizes)
            worst = max(worst, crossing_s(2 * (m - 1) * nbytes, sum(capacity.values())))
        for part, inside in sizes.items():
            crossing = _crossing_bytes(op, nbytes, n, inside, parts[root] == part)
            worst = max(worst, crossing_s(crossing, capacity[part]))
    return worst


def not_below(time_s: float, bound_s: float) -> float:
    """`time_s`, or the bound where only the rounding of sums puts it above."""
    return bound_s if time_s < bound_s <= time_s * (1 + _ROUNDING) else time_s


def crossing_s(crossing: float, bytes_per_s: float) -> float:
    """Seconds that so many bytes need across a cut."""
    if not crossing:
        return 0.0
    return crossing / bytes_per_s if bytes_per_s else float("inf")


def _crossing_bytes(op: str, nbytes: int, n: int, inside: int, has_root: bool) -> float:
    """Bytes that must cross, in the busier direction, a cut with `inside` of the n ranks on one
    side.
    """
    outside = n - inside
    if op in ("all_reduce", "broadcast", "reduce"):
        return nbytes
    if op == "all_to_all":
        return inside * outside / n * nbytes
    if op in ("reduce_scatter", "all_gather"):
        return max(inside, outside) / n * nbytes
    return (outside if has_root else inside) / n * nbytes  # scatter, gather


def _permute_bytes(
    parts: list[int], pairs: tuple[tuple[int, int], ...], nbytes: int
) -> dict[int, int]:
    """Bytes that leave or enter each part, in the busier direction."""
    leaving = Counter(parts[s] for s, d in pairs if parts[s] != parts[d])
    entering = Counter(parts[d] for s, d in pairs if parts[s] != parts[d])
    return {part: nbytes * max(leaving[part], entering[part]) for part in leaving | entering}
