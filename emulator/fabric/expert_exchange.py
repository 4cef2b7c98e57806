"""Expert exchange: the fused dispatch and combine of mixture-of-experts layers, in seconds.

Every die sends each of its tokens to `top_k` experts' dies (dispatch), or gets as many results back
(combine). The vector cores write each copy straight to where it belongs, so the time has three
parts:

- a fixed one per phase: start, routing, packing, flags (`Fabric.exchange_s`, fitted);
- the wire: bytes on the busiest link at the rate that writes reach. Copies that stay on their die
  are free, so 1/ranks of them are;
- latencies: each core writes its copies one after the other and waits for each, so a die with c
  copies and v cores waits c/v times, longer between nodes than inside one.

In a dispatch the cores quantise a copy, write it and wait, all in step, so that the wire and the
latencies add up. In a combine they do nothing but write, and while one waits the others keep the
link busy: the longer of the two counts.

Among more dies fewer copies stay at home and more leave the node, which is why the time grows with
the number of dies, ever more slowly. It dips where another device fills a package or a node: until
then one device has fewer neighbours than the others, and all wait for it.

Routing is taken as uniformly random: the busiest of n dies then gets more than the mean, by the
expected largest of n normal deviates (balls in bins). `counts` replace all that
by what was really sent.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

from emulator.fabric.arguments import LARGEST_BYTES, device_key, whole
from emulator.fabric.bound import bound_s as bound_of
from emulator.fabric.collective import Collective
from emulator.fabric.ragged import bound_of_table, check_table
from emulator.fabric.routes import network_of
from emulator.machines import Machine

PHASES = ("dispatch", "combine")

Floats = np.ndarray
Counts = tuple[tuple[int, ...], ...]


def expert_exchange(
    phase: str,
    tokens: int,
    top_k: int,
    token_bytes: int,
    on: Machine,
    devices: Sequence[int] | None = None,
    counts: Sequence[Sequence[int]] | None = None,
) -> Collective:
    """The time of one dispatch or combine among `devices` (default: all of `on`).

    Args:
        phase: "dispatch" (tokens to experts) or "combine" (results back).
        tokens: that each device holds.
        top_k: experts to which each token goes.
        token_bytes: of one copy of one token, scales and padding included.
        on: the machine. Where a device is a package, its two dies share its tokens.
        devices: device numbers in rank order.
        counts: copies [source rank][expert's rank] that really are sent in a dispatch (and come
            back in a combine); each row sums to tokens x top_k.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: the machine has no figures for such a kernel.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
    if not isinstance(on, Machine):
        raise TypeError(f"on must be a Machine, e.g. cloudmatrix384(); got {type(on).__name__}")
    sizes = {"tokens": tokens, "top_k": top_k, "token_bytes": token_bytes}
    sizes = {name: whole(name, value) for name, value in sizes.items()}
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0; got {value}")
    if math.prod(sizes.values()) > LARGEST_BYTES:
        raise ValueError("tokens x top_k x token_bytes must be at most 2^60")
    if phase not in dict(on.fabric.exchange_s):
        raise NotImplementedError(
            f"expert_exchange is not modelled on {on.name}: its fabric gives no exchange_s"
        )
    numbers = _numbers(on, device_key(devices))
    given = None if counts is None else _check_counts(counts, len(numbers), tokens * top_k)
    return _expert_exchange(phase, *sizes.values(), on, numbers, given)


@functools.lru_cache(maxsize=1024)
def _numbers(on: Machine, devices: Sequence[int] | None) -> tuple[int, ...]:
    """The device numbers in rank order; all of `on` by default."""
    return on.check_devices(on.devices if devices is None else devices)


@functools.lru_cache(maxsize=4096)
def _expert_exchange(
    phase: str,
    tokens: int,
    top_k: int,
    token_bytes: int,
    on: Machine,
    devices: tuple[int, ...],
    counts: Counts | None,
) -> Collective:
    nbytes = tokens * top_k * token_bytes
    network = network_of(on)
    copies = _copies(tokens * top_k, len(devices), counts)
    if phase == "combine":
        copies = copies.T
    src, dst, sent = _transfers(copies, on, devices)
    tier = network.tier_between(src, dst)
    away = (tier >= 0) & (sent > 0)
    time_s, crossed, reason = 0.0, {}, "nothing leaves its device"
    if len(devices) > 1 and nbytes and away.any():
        src, dst, tier, sent = src[away], dst[away], tier[away], sent[away]
        dies = len(devices) * on.dies_per_device
        skew = 1.0 if counts is not None else _busiest(tokens * top_k, len(devices), dies)
        tiers = on.fabric.tiers
        rates = np.array([t.write_bytes_per_s for t in tiers])
        loads = network.loads(src, dst, sent * skew, tier, rates)
        wire_s = token_bytes * max(float(busy.max()) for _, busy in loads)
        wait_s = _waiting_s(src, dst, tier, sent, on, skew if phase == "combine" else 1.0)
        fixed_s = dict(on.fabric.exchange_s)[phase]
        busy_s = wait_s + wire_s if phase == "dispatch" else max(wait_s, wire_s)
        time_s = fixed_s + busy_s
        alike = on.dies_per_device if network.symmetric else 1
        for i in np.unique(tier).tolist():
            crossed[tiers[i].name] = round(float(sent[tier == i].sum()) * alike * token_bytes)
        reason = (
            f"fixed {fixed_s * 1e6:.1f} us, busiest link {wire_s * 1e6:.1f} us "
            f"{'and' if phase == 'dispatch' else 'or, if longer,'} writes one after the other "
            f"{wait_s * 1e6:.1f} us"
        )
    return Collective(
        op=phase,
        nbytes=nbytes,
        dtype="int8",
        devices=devices,
        algorithm="fused",
        transport="vector cores, writes",
        reason=reason,
        time_s=time_s,
        bound_s=_bound_s(nbytes, token_bytes, on, devices, counts),
        steps=1 if time_s else 0,
        link_bytes=tuple(crossed.items()),
        assumptions=_ASSUMPTIONS if time_s else (),
    )


_ASSUMPTIONS = (
    "expert exchange: the fixed part of each phase is fitted to one published point (8 dies)",
    "expert exchange: a vector core writes its copies one after the other, each with the latency "
    "of its way; in a combine, but not in a dispatch, others use the link meanwhile",
    "expert exchange: uniformly random routing unless counts are given; the busiest die gets the "
    "expected largest share",
)


def _check_counts(counts: Sequence[Sequence[int]], ranks: int, each: int) -> Counts:
    table = check_table(counts, ranks)
    for rank, row in enumerate(table):
        if sum(row) != each:
            raise ValueError(
                f"counts[{rank}] sums to {sum(row)}; each device sends tokens x top_k = {each}"
            )
    return table


def _copies(each: int, ranks: int, counts: Counts | None) -> Floats:
    """Copies [from device, to device] of a dispatch. `each`: copies that one device sends."""
    if counts is None:
        return np.full((ranks, ranks), each / ranks)
    return np.asarray(counts, dtype=float)


def _transfers(
    copies: Floats, on: Machine, devices: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, Floats]:
    """(source die, destination die, copies) of an exchange, of whose copies the dies of a device
    take equal parts.

    Where the dies of a device are loaded alike, those in the first place stand for all, and what
    they send to the others of another device counts as sent to its first.
    """
    per_device = on.dies_per_device
    first = np.array(devices) * per_device
    if network_of(on).symmetric:
        src, dst = np.meshgrid(first, first, indexing="ij")
        sent = copies / per_device
        sent[np.diag_indices_from(sent)] /= per_device  # what stays on the die
        beside = np.diag(copies) / per_device**2
        others = [(first, first + place, beside) for place in range(1, per_device)]
        parts = [(src.reshape(-1), dst.reshape(-1), sent.reshape(-1)), *others]
        joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return joined[0], joined[1], joined[2]
    dies = (first[:, None] + np.arange(per_device)).reshape(-1)
    src, dst = np.meshgrid(dies, dies, indexing="ij")
    shared = copies.repeat(per_device, axis=0).repeat(per_device, axis=1) / per_device**2
    return src.reshape(-1), dst.reshape(-1), shared.reshape(-1)


def _busiest(each: int, devices: int, dies: int) -> float:
    """The expected load of the busiest die over the mean, if all copies are thrown at random."""
    total = each * devices
    mean = total / dies
    deviation = math.sqrt(mean * (1 - 1 / dies))
    # The usual approximation of the expected largest of n normal deviates (Blom, 1958).
    largest = statistics.NormalDist().inv_cdf((dies - 0.375) / (dies + 0.25))
    return min(mean + largest * deviation, total) / mean


def _waiting_s(
    src: np.ndarray, dst: np.ndarray, tier: np.ndarray, sent: Floats, on: Machine, skew: float
) -> float:
    """Seconds for which the cores of the busiest die wait: the copies of one, one after the other;
    at least one write.
    """
    network = network_of(on)
    latency = np.zeros(len(on.fabric.tiers))
    for i in np.unique(tier).tolist():
        here = tier == i
        latency[i] = network.latency_s(src[here], dst[here], tier[here], False)
    waits = np.bincount(src, weights=sent * latency[tier]).max() * skew / on.chip.vector_cores
    return max(float(waits), float(latency.max()))


def _bound_s(
    nbytes: int, token_bytes: int, on: Machine, devices: tuple[int, ...], counts: Counts | None
) -> float:
    """Bytes across the cuts of the network, over their capacities; an all_to_all if uniform."""
    if counts is None:
        return bound_of("all_to_all", nbytes, on, devices)
    return bound_of_table(counts, token_bytes, on, devices)
