"""A ragged all_to_all in seconds: what mixture-of-experts layers send without fused kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from emulator.collectives import group_of, ragged_all_to_all
from emulator.collectives.ragged import Counts
from emulator.fabric.arguments import ITEM_BYTES, device_key, dtype_name, whole
from emulator.fabric.bound import crossing_s, not_below
from emulator.fabric.collective import Collective, loads_of
from emulator.fabric.routes import network_of
from emulator.machines import Machine

_AIV_PAIR_BYTES = 2**20
_LARGEST_SUM = 2**29  # of a row; slots are numbered in 32 bits


def all_to_all_v(
    counts: Sequence[Sequence[int]],
    on: Machine,
    devices: Sequence[int] | None = None,
    algorithm: str | None = None,
    dtype: object = "bfloat16",
    transport: str | None = None,
) -> Collective:
    """The time of an all_to_all in which rank i sends counts[i][j] items to rank j.

    Args:
        counts: items of `dtype` [source rank][destination rank].
        on: the machine. The dies of a package halve what it sends, rounded up to whole items.
        devices: device numbers in rank order (default: all).
        algorithm: "full_mesh" or "pairwise"; None for the machine's rule.
        dtype: what is sent.
        transport: as for `collective`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    if not isinstance(on, Machine):
        raise TypeError(f"on must be a Machine, e.g. cloudmatrix384(); got {type(on).__name__}")
    for what, value in (("algorithm", algorithm), ("transport", transport)):
        if not isinstance(value, str | None):
            raise TypeError(f"{what} must be a name; got {value!r}")
    item = dtype_name(dtype)
    if item not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {item!r}; known: {', '.join(ITEM_BYTES)}")
    numbers = on.check_devices(device_key(on.devices if devices is None else devices) or ())
    table = check_table(counts, len(numbers))
    return _all_to_all_v(table, on, numbers, algorithm, item, transport)


@functools.lru_cache(maxsize=256)
def _all_to_all_v(
    counts: Counts,
    on: Machine,
    devices: tuple[int, ...],
    algorithm: str | None,
    dtype: str,
    transport: str | None,
) -> Collective:
    item_bytes = ITEM_BYTES[dtype]
    table = np.array(counts, dtype=object)
    reason = "given by the caller"
    if algorithm is None:
        largest = int(table.max()) * item_bytes // on.dies_per_device
        algorithm, rule_transport, reason = _choose(largest, devices, on)
        transport = rule_transport if transport is None else transport
    each = tuple(tuple(-(-c // on.dies_per_device) for c in row) for row in counts)
    schedule = ragged_all_to_all(each, algorithm)
    loads = loads_of(schedule, on, devices, transport)
    load = min(loads, key=lambda load: load.time_s(item_bytes))
    bound_s = bound_of_table(counts, item_bytes, on, devices)
    crossed = {t: b * on.dies_per_device for t, b in load.link_bytes(item_bytes).items()}
    return Collective(
        op="all_to_all",
        nbytes=max(sum(row) for row in counts) * item_bytes,
        dtype=dtype,
        devices=devices,
        algorithm=algorithm,
        transport=load.transport.name,
        reason=reason,
        time_s=not_below(load.time_s(item_bytes), bound_s),
        bound_s=bound_s,
        steps=load.num_steps,
        link_bytes=tuple(crossed.items()),
        assumptions=("ragged all_to_all: as much as its counts say, without exchanging them first",)
        if load.num_steps
        else (),
    )


def _choose(pair_bytes: int, devices: tuple[int, ...], on: Machine) -> tuple[str, str | None, str]:
    """(algorithm, transport, reason); `pair_bytes`: the largest message of a die."""
    names = {t.name for t in on.fabric.transports}
    if not {"aiv_small", "sdma"} <= names:
        return "full_mesh", None, "every pair at once over the switch"
    if max(group_of(devices, on).nodes) == 0 and pair_bytes <= _AIV_PAIR_BYTES:
        reason = "HCCL's rule (cann-hccl 9aeddc0): one server, at most 1 MiB a pair: vector cores"
        return "full_mesh", "aiv_small", reason
    return "full_mesh", "sdma", "HCCL's direct mesh by SDMA, every pair at once"


def check_table(counts: Sequence[Sequence[int]], ranks: int) -> Counts:
    """`counts` as tuples of whole numbers, `ranks` by `ranks`, or why not."""
    try:
        rows = [tuple(row) for row in counts]
    except TypeError as error:
        raise TypeError(f"counts must be rows of whole numbers; got {counts!r}") from error
    try:
        table = tuple(tuple(whole("every count", c) for c in row) for row in rows)
    except TypeError as error:
        raise TypeError(f"counts must be rows of whole numbers: {error}") from error
    if len(table) != ranks or any(len(row) != ranks for row in table):
        raise ValueError(f"counts must have {ranks} rows of {ranks} numbers, one for each device")
    for rank, row in enumerate(table):
        if min(row) < 0:
            raise ValueError(f"counts[{rank}] has a negative number: {min(row)}")
        if sum(row) > _LARGEST_SUM:
            raise ValueError(f"counts[{rank}] sums to {sum(row)}; at most 2^29 are modelled")
    if max(sum(column) for column in zip(*table, strict=True)) > _LARGEST_SUM:
        raise ValueError("counts send more than 2^29 to one rank, which is not modelled")
    return table


def bound_of_table(counts: Counts, item_bytes: int, on: Machine, devices: tuple[int, ...]) -> float:
    """Seconds that the bytes across each cut need at the cut's capacity; no latencies."""
    table = np.asarray(counts, dtype=float)
    worst = 0.0
    for parts, capacity in network_of(on).cuts(devices):
        labels = np.array(parts)
        for part in np.unique(labels):
            inside = labels == part
            crossing = max(table[inside][:, ~inside].sum(), table[~inside][:, inside].sum())
            worst = max(worst, crossing_s(float(crossing) * item_bytes, float(capacity[inside][0])))
    return worst
