"""Which algorithm and transport a machine takes for a collective, by its vendor's published rules
where they exist.
"""

from __future__ import annotations

from collections.abc import Sequence

from emulator.collectives import OPS, group_of
from emulator.machines import Machine

KB, MB = 1024, 1024 * 1024

# HCCL on A3, one server: the vector-core path up to so many bytes of a rank's shard; another form
# of it from a total on.
_AIV_SMALL_BYTES = {
    "all_reduce": MB,
    "reduce_scatter": MB,
    "all_gather": 512 * KB,
    "all_to_all": 512 * KB,
}
_AIV_LARGE_TOTAL_BYTES = 16 * MB
_HCCL = "HCCL's rule (cann-hccl 9aeddc0)"


def choose(op: str, nbytes: int, devices: Sequence[int], machine: Machine) -> tuple[str, str]:
    """(algorithm, reason) for `op` of `nbytes` (nccl-tests' size, per device) over `devices`.

    Raises:
        ValueError: unknown operation.
    """
    algorithm, _, reason = choose_with_transport(op, nbytes, tuple(devices), machine)
    return algorithm, reason


def choose_with_transport(
    op: str, nbytes: int, devices: tuple[int, ...], machine: Machine
) -> tuple[str, str, str]:
    """(algorithm, transport, reason)."""
    if op not in OPS:
        raise ValueError(f"unknown collective operation {op!r}; known: {', '.join(OPS)}")
    names = {t.name for t in machine.fabric.transports}
    if {"aiv_small", "aiv_large", "sdma"} <= names:
        return _hccl(op, nbytes, devices, machine)
    return _nccl_like(op, nbytes, machine)


def _hccl(op: str, nbytes: int, devices: tuple[int, ...], machine: Machine) -> tuple[str, str, str]:
    if op not in _AIV_SMALL_BYTES:
        return "direct", "sdma", "the only form modelled"
    group = group_of(devices, machine)
    die_bytes = -(-nbytes // machine.dies_per_device)
    shard = die_bytes // group.n if op in ("all_gather", "reduce_scatter") else die_bytes
    total = die_bytes if op in ("all_gather", "reduce_scatter") else die_bytes * group.n
    if max(group.nodes) == 0:
        limit = _AIV_SMALL_BYTES[op]
        if shard <= limit:
            return (
                "full_mesh",
                "aiv_small",
                f"{_HCCL}: one server, at most {limit // KB} KiB a die: vector cores",
            )
        if total >= _AIV_LARGE_TOTAL_BYTES:
            return (
                "full_mesh",
                "aiv_large",
                f"{_HCCL}: one server, at least 16 MiB in total: vector cores",
            )
        if op == "all_reduce" and die_bytes > MB * group.n:
            return "ring", "sdma", f"{_HCCL}: one server, over 1 MiB x ranks: ring (there doubled)"
        return (
            "full_mesh",
            "sdma",
            f"{_HCCL}: one server, between the vector-core sizes: mesh by SDMA",
        )
    if op == "all_to_all":
        return "full_mesh", "sdma", "several nodes: every pair at once over the switched fabric"
    if len(set(group.nodes)) == group.n:
        return (
            "ring",
            "sdma",
            f"{_HCCL}, level 1: ring between nodes, one rank in each (its NHR is not modelled)",
        )
    return (
        "hierarchical",
        "sdma",
        f"{_HCCL}: mesh in the node, ring between nodes (its NHR and double ring are not modelled)",
    )


def _nccl_like(op: str, nbytes: int, machine: Machine) -> tuple[str, str, str]:
    transport = machine.fabric.transports[-1].name
    if op not in _AIV_SMALL_BYTES:
        return "direct", transport, "the only form modelled"
    if op == "all_to_all":
        return "full_mesh", transport, "every pair at once over the switch"
    if nbytes <= 4 * MB:
        return "full_mesh", transport, "at most 4 MiB: one- or two-shot, as in XLA:GPU's cost model"
    return "ring", transport, "over 4 MiB: ring (in-network reduction is not modelled)"
