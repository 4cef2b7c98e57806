"""The least time that physics allows a collective: bytes that must cross a cut, over the cut's
capacity.

Cuts are taken round one die, one package and one node at a time. Latencies are left out: a bound,
not a model.
"""

from __future__ import annotations

import functools
from collections import Counter

from emulator.machines import Machine


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
    for parts, capacity in _cuts(machine, devices):
        if op == "permute":
            worst = max(worst, _permute_bytes(parts, pairs, nbytes) / capacity)
            continue
        sizes = Counter(parts)
        if len(sizes) == 1:
            continue  # nothing is outside
        if op == "all_reduce" and not machine.fabric.in_network_reduction:
            # m parts hold m partial sums: m - 1 of them must leave, and the result must come back
            # to as many.
            m = len(sizes)
            worst = max(worst, 2 * (m - 1) / m * nbytes / capacity)
        for part, inside in sizes.items():
            crossing = _crossing_bytes(op, nbytes, n, inside, parts[root] == part)
            worst = max(worst, crossing / capacity)
    return worst


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


def _permute_bytes(parts: list[int], pairs: tuple[tuple[int, int], ...], nbytes: int) -> int:
    leaving = Counter(parts[s] for s, d in pairs if parts[s] != parts[d])
    entering = Counter(parts[d] for s, d in pairs if parts[s] != parts[d])
    return nbytes * max([*leaving.values(), *entering.values(), 0])


def _cuts(machine: Machine, devices: tuple[int, ...]) -> list[tuple[list[int], float]]:
    """Ways to divide the ranks into parts, each with the bytes per second one part can send."""
    fabric = machine.fabric
    links = {tier.link: tier.bytes_per_s for tier in fabric.tiers}
    outer = {t.link: t.bytes_per_s for t in fabric.tiers if t.name != "package"}
    dies, per_package = machine.dies_per_device, machine.num_dies // machine.packages
    cuts = [
        (list(range(len(devices))), dies * sum(links.values() if dies == 1 else outer.values()))
    ]
    if dies < per_package:  # devices that share a package
        cuts.append(([d * dies // per_package for d in devices], per_package * sum(outer.values())))
    if any(t.name == "pod" for t in fabric.tiers):
        nodes = [d // machine.devices_per_node for d in devices]
        ports = machine.devices_per_node * dies * sum(outer.values())
        cuts.append((nodes, min(fabric.node_uplink_bytes_per_s, ports)))
    return cuts
