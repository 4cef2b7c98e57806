"""Which algorithm and transport a machine takes for a collective, by its vendor's published rules
where they exist.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from emulator.collectives import OPS, Group, group_of
from emulator.machines import Machine

KB, MB = 1024, 1024 * 1024

# HCCL on A3, one server: the vector-core path up to so many bytes of a rank's share; another form
# of it from a total on.
_AIV_SMALL_BYTES = {
    "all_reduce": MB,
    "reduce_scatter": MB,
    "all_gather": 512 * KB,
    "all_to_all": 512 * KB,
}
_AIV_LARGE_TOTAL_BYTES = 16 * MB
_SHARDED = ("all_gather", "reduce_scatter")
_SMALLEST_RING = 3  # HCCL has no mesh of SDMA tasks for shards among two ranks
_HCCL = "HCCL's rule (cann-hccl 9aeddc0)"
# The rings of its two levels have as many ranks in each server, so it takes one level
# (`multiModuleDiffDeviceNumMode`); which algorithm then depends on its version.
_ONE_LEVEL = "servers with unequal numbers of ranks, for which HCCL has one level (NHR is assumed)"

# NVLink domains have at most 576 GPUs; in larger groups nobody talks to everybody at once.
_LARGEST_MESH = 576
# Where everybody sends a message to everybody there would be tens of millions of transfers among
# more; no machine that the vendors' rules were made for is so large.
_MANY = 2048

Choice = tuple[str, str | None, str]


def choose(op: str, nbytes: int, devices: Sequence[int], machine: Machine) -> tuple[str, str]:
    """(algorithm, reason) for `op` of `nbytes` (nccl-tests' size, per device) over `devices`.

    Raises:
        ValueError: unknown operation.
    """
    algorithm, _, reason = choose_with_transport(op, nbytes, tuple(devices), machine)
    return algorithm, reason


def choose_with_transport(
    op: str, nbytes: int, devices: tuple[int, ...], machine: Machine
) -> Choice:
    """(algorithm, transport, reason). No transport: whichever is fastest."""
    if op not in OPS:
        raise ValueError(f"unknown collective operation {op!r}; known: {', '.join(OPS)}")
    names = {t.name for t in machine.fabric.transports}
    group = group_of(devices, machine)
    if {"aiv_small", "aiv_large", "sdma"} <= names:
        die_bytes = -(-nbytes // machine.dies_per_device)
        return _hccl(op, die_bytes, group)
    return _nccl_like(op, nbytes, group)


def _hccl(op: str, die_bytes: int, group: Group) -> Choice:
    """`die_bytes`: the operation's size for one die, which is HCCL's rank."""
    if group.n > _MANY:
        algorithm, _, reason = _nccl_like(op, die_bytes, group)
        return algorithm, "sdma", f"HCCL's rules are not for over {_MANY} ranks; {reason}"
    one_server = max(group.nodes) == 0
    if op in ("scatter", "gather", "permute"):
        return "direct", "sdma", "each message goes straight to where it belongs"
    if op in ("broadcast", "reduce"):
        if one_server:
            return "full_mesh", "sdma", "HCCL's vector-core path lacks it; one server: mesh by SDMA"
        return "nhr", "sdma", f"{_HCCL}: halving-doubling is replaced by NHR between servers"
    if one_server:
        return _one_server(op, die_bytes, group)
    if op == "all_to_all":
        return "full_mesh", "sdma", "several servers: HCCL's direct mesh, every pair at once"
    return _several_servers(op, die_bytes, group)


def _one_server(op: str, die_bytes: int, group: Group) -> Choice:
    shard = die_bytes // group.n if op in _SHARDED else die_bytes
    total = die_bytes if op in _SHARDED else die_bytes * group.n
    limit = _AIV_SMALL_BYTES[op]
    if shard <= limit:
        reason = f"{_HCCL}: one server, at most {limit // KB} KiB a die: vector cores"
        return "full_mesh", "aiv_small", reason
    if total >= _AIV_LARGE_TOTAL_BYTES:
        reason = f"{_HCCL}: one server, at least 16 MiB in total: vector cores, large form"
        return "full_mesh", "aiv_large", reason
    between = f"{_HCCL}: one server, between the vector-core sizes"
    if op == "all_reduce":
        if die_bytes <= MB * group.n:
            return "full_mesh", "sdma", f"{between}, at most 1 MiB x ranks: mesh by SDMA"
        return "double_ring", "sdma", f"{between}, over 1 MiB x ranks: double ring by SDMA"
    if op == "all_to_all":
        return "full_mesh", "sdma", f"{between}: every pair at once by SDMA"
    if shard <= 2 * MB and group.n >= _SMALLEST_RING:
        return "full_mesh", "sdma", f"{between}, shards of at most 2 MiB: mesh by SDMA"
    return "double_ring", "sdma", f"{between}, two ranks or over 2 MiB: double ring by SDMA"


def _several_servers(op: str, die_bytes: int, group: Group) -> Choice:
    """Between superpods HCCL has a third level; here all their servers count as one level."""
    if len(set(group.nodes)) == group.n:
        return "nhr", "sdma", f"{_HCCL}, level 1: one rank in each server: NHR between them"
    if len({*collections.Counter(group.nodes).values()}) > 1:
        return "nhr", "sdma", f"{_ONE_LEVEL}: NHR over all"
    if op == "all_reduce" and die_bytes <= 256 * KB * group.n:
        return "nhr", "sdma", f"{_HCCL}: one superpod, at most 256 KiB x ranks: NHR over all"
    reason = f"{_HCCL}: double ring in each server, NHR between them (its form of halving-doubling)"
    return "double_ring/nhr", "sdma", reason


def _nccl_like(op: str, nbytes: int, group: Group) -> Choice:
    """NCCL picks by a table of times; with two protocols, the faster one stands for that."""
    if op in ("scatter", "gather", "permute"):
        return "direct", None, "each message goes straight to where it belongs"
    if op == "all_to_all" and group.n > _MANY:
        return "grid", None, f"over {_MANY} ranks: along columns and rows of a grid (assumed)"
    if op == "all_to_all":
        return "full_mesh", None, "every pair at once over the switch"
    if nbytes <= 4 * MB and group.n <= _LARGEST_MESH:
        reason = "at most 4 MiB: one- or two-shot, as in XLA:GPU's cost model"
        return "full_mesh", None, reason
    if op == "all_reduce" and nbytes <= 4 * MB * max(1, group.n // 8):
        return "double_binary_tree", None, "NCCL-like: up to 4 MiB for each 8 ranks: two trees"
    if op in ("broadcast", "reduce"):
        if group.n > _LARGEST_MESH:
            return "double_binary_tree", None, f"NCCL-like: over {_LARGEST_MESH} ranks: two trees"
        return "pipeline", None, "NCCL-like: over 4 MiB: a chain in pieces"
    reason = "NCCL-like: large: ring (in-network reduction is algorithm='nvls', timed only)"
    return "ring", None, reason
