"""`collective`: how long one collective takes, by which algorithm, and how near to what physics
allows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from emulator.collectives import OPS, Schedule, build, find, group_of, known
from emulator.fabric import in_network
from emulator.fabric.arguments import (
    ITEM_BYTES,
    LARGEST_BYTES,
    device_key,
    dtype_name,
    pair_key,
    rank_pairs,
    root_rank,
    whole,
)
from emulator.fabric.bound import bound_s as bound_of
from emulator.fabric.bound import not_below
from emulator.fabric.choose import choose_with_transport
from emulator.fabric.cost import ScheduleLoad, dies_of, load_schedule, transports_for
from emulator.fabric.production import LAUNCHES, in_production, published
from emulator.machines import Machine
from emulator.machines.fabric import Transport

# Bus bandwidth over algorithm bandwidth, as nccl-tests defines it.
_BUS_FACTOR: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    **dict.fromkeys(
        (
            "reduce_scatter",
            "all_gather",
            "all_to_all",
            "scatter",
            "gather",
            "dispatch",
            "combine",
        ),
        lambda n: (n - 1) / n,
    ),
    **dict.fromkeys(("broadcast", "reduce", "permute"), lambda n: 1.0),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective, timed. `nbytes` follows nccl-tests; bandwidths are bytes per second, one
    direction, per device.

    `link_bytes` are (tier, bytes) pairs: what crosses links, all devices together.
    """

    op: str
    nbytes: int
    dtype: str
    devices: tuple[int, ...]
    algorithm: str
    transport: str
    reason: str
    time_s: float
    bound_s: float
    steps: int
    link_bytes: tuple[tuple[str, int], ...]
    assumptions: tuple[str, ...]

    @property
    def algbw(self) -> float:
        """nbytes / time_s; 0 where nothing had to be done."""
        return self.nbytes / self.time_s if self.time_s else 0.0

    @property
    def busbw(self) -> float:
        """algbw times nccl-tests' factor for the operation: comparable with a link's rate."""
        return self.algbw * _BUS_FACTOR[self.op](len(self.devices))


def collective(
    op: str,
    nbytes: int,
    on: Machine,
    devices: Sequence[int] | None = None,
    algorithm: str | Callable[..., Schedule] | None = None,
    dtype: object = "bfloat16",
    root: int | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    transport: str | None = None,
    launch: str = "benchmark",
) -> Collective:
    """The time of one collective on `on`.

    Args:
        op: one of `emulator.collectives.OPS`.
        nbytes: per device, as in nccl-tests: the buffer of an all_reduce, the full result of an
            all_gather, the full input of a reduce_scatter, all that one rank sends in an
            all_to_all, the message of a broadcast or permute.
        on: the machine.
        devices: device numbers in rank order (default: all).
        algorithm: a name, a function group -> Schedule, "best" for the fastest known one, or None
            for the machine's own rule. "nvls" is an all_reduce whose switches add (timed only).
        dtype: what is sent; sizes are rounded up to whole elements.
        root: device number of the root, for broadcast, reduce, scatter, gather (default: the first
            device).
        pairs: (source, destination) device numbers, for permute.
        transport: the machine's transport to use. By default its rule for `algorithm=None`; for a
            given algorithm whichever is fastest, so that time never falls as bytes grow.
        launch: "benchmark", as in a loop of nothing else, or "production", as inside a served
            model: later starts and ranks that are out of step, as far as they were published.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: production on a machine of which nothing is published there.
    """
    if not isinstance(on, Machine):
        raise TypeError(f"on must be a Machine, e.g. cloudmatrix384(); got {type(on).__name__}")
    for what, value in (("op", op), ("transport", transport)):
        if not (isinstance(value, str) or (what == "transport" and value is None)):
            raise TypeError(f"{what} must be a name; got {value!r}")
    if not (algorithm is None or isinstance(algorithm, str) or callable(algorithm)):
        raise TypeError(
            f"algorithm must be a name, a function group -> Schedule, or None; got {algorithm!r}"
        )
    if launch not in LAUNCHES:
        raise ValueError(f"launch must be one of {', '.join(LAUNCHES)}; got {launch!r}")
    if launch == "production" and not published(on):
        raise NotImplementedError(
            f"launch='production': nothing is published about {on.name} there; take 'benchmark'"
        )
    nbytes = whole("nbytes", nbytes)
    if nbytes > LARGEST_BYTES:
        raise ValueError(f"nbytes must be at most 2^60; got {nbytes}")
    root = None if root is None else whole("root", root)
    numbers, both, item = device_key(devices), pair_key(pairs), dtype_name(dtype)
    return _collective(op, nbytes, on, numbers, algorithm, item, root, both, transport, launch)


@functools.lru_cache(maxsize=65536)
def _collective(
    op: str,
    nbytes: int,
    on: Machine,
    devices: Sequence[int] | None,
    algorithm: str | Callable[..., Schedule] | None,
    dtype: str,
    root: int | None,
    pairs: tuple[tuple[int, int], ...] | None,
    transport: str | None,
    launch: str,
) -> Collective:
    if op not in OPS:
        raise ValueError(f"unknown collective operation {op!r}; known: {', '.join(OPS)}")
    if nbytes < 0:
        raise ValueError(f"nbytes must be at least 0; got {nbytes}")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}")
    numbers = on.check_devices(on.devices if devices is None else devices)
    ranks = {device: rank for rank, device in enumerate(numbers)}
    root_of = root_rank(op, root, ranks)
    between = rank_pairs(op, pairs, ranks)
    if algorithm == "best":
        from emulator.fabric.best import fastest  # which calls `collective`

        return fastest(op, nbytes, on, numbers, dtype, root, pairs, transport, launch)
    bound_s = bound_of(op, nbytes, on, numbers, root_of, between)
    if algorithm == in_network.NAME and op == "all_reduce":
        load: ScheduleLoad | in_network.Load = in_network.load(on, numbers, transport)
        name, reason, slot_bytes = in_network.NAME, "given by the caller", nbytes
    else:
        if algorithm is None:
            algorithm, rule_transport, reason = choose_with_transport(op, nbytes, numbers, on)
            transport = rule_transport if transport is None else transport
        else:
            if not callable(algorithm) and find(op, algorithm) is None:
                raise ValueError(
                    f'unknown algorithm {algorithm!r} for {op}; known: {known(op)}, or "best"'
                )
            reason = "given by the caller"
        try:
            schedule = build(op, algorithm, group_of(numbers, on), root=root_of, pairs=between)
        except ValueError as error:
            if callable(algorithm):
                first = ", ".join(map(str, numbers[:8])) + (", ..." if numbers[8:] else "")
                raise ValueError(f"{error} (ranks 0, 1, ... are devices {first})") from error
            raise
        name = schedule.algorithm
        slot_bytes = slot_bytes_of(schedule, nbytes, ITEM_BYTES[dtype], on.dies_per_device)
        loads = loads_of(schedule, on, numbers, transport)
        load = min(loads, key=lambda load: load.time_s(slot_bytes))
    time_s = not_below(load.time_s(slot_bytes), bound_s)
    if launch == "production":
        time_s = in_production(time_s, op, len(numbers) * on.dies_per_device, load.transport)
    crossed = {t: b * on.dies_per_device for t, b in load.link_bytes(slot_bytes).items()}
    return Collective(
        op=op,
        nbytes=nbytes,
        dtype=dtype,
        devices=numbers,
        algorithm=name,
        transport=load.transport.name,
        reason=reason,
        time_s=time_s,
        bound_s=bound_s,
        steps=load.num_steps,
        link_bytes=tuple(crossed.items()),
        assumptions=_assumptions(on, load, launch),
    )


def loads_of(
    schedule: Schedule, on: Machine, devices: tuple[int, ...], transport: str | None
) -> list[ScheduleLoad]:
    """For each transport that may be used, the load of one die's share of the schedule.

    The dies of a device run alike: their partners are as far away, and they share no port.
    """
    dies = dies_of(on, devices)[0]
    usable: Sequence[Transport] = transports_for(on, dies)
    if transport is None:
        usable = [t for t in usable if not t.on_request]
    else:
        wanted = on.fabric.transport(transport)
        if wanted not in usable:
            raise ValueError(
                f"transport {transport!r} reaches only within one {wanted.scope}; these devices "
                "need one of "
                f"{', '.join(t.name for t in usable)}"
            )
        usable = [wanted]
    return [load_schedule(schedule, on, dies, t) for t in usable]


def slot_bytes_of(schedule: Schedule, nbytes: int, item_bytes: int, dies: int) -> int:
    """Bytes of one slot of one die's schedule: whole elements, the payload (or each block) halved
    between the dies.
    """
    count = -(-nbytes // item_bytes)
    if schedule.op in ("all_reduce", "broadcast", "reduce"):
        share = -(-count // dies)
        return -(-share // schedule.pieces) * item_bytes
    block = -(-count // schedule.pieces)
    return -(-block // dies) * item_bytes


def _assumptions(on: Machine, load: ScheduleLoad | in_network.Load, launch: str) -> tuple[str, ...]:
    if not load.num_steps:
        return ()
    start = "a benchmark's start" + published(on) * " (production adds 1 to 15 us)"
    notes = [
        f"transport {load.transport.name}: start-up and rates fitted to published points "
        f"(cm384 validate shows them); {start if launch == 'benchmark' else launch + ' start'}",
        "no other traffic on the fabric; all ranks start together; flows spread over the "
        "switch planes by what each can carry",
    ]
    if on.fabric.levels:
        notes = [
            f"transport {load.transport.name}: links at their full rate, no start-up",
            "no other traffic on the fabric; all ranks start together; the shortest ways, in the "
            "order of the levels",
        ]
    if on.dies_per_device > 1:
        notes.append("each die of a package runs its own schedule on its share of the payload")
    return (*notes, *on.faults.describe())
