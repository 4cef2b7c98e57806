"""`collective`: how long one collective takes, by which algorithm, and how near to what physics
allows.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

from emulator.collectives import OPS, Schedule, build, find, group_of, known
from emulator.fabric.bound import bound_s as bound_of
from emulator.fabric.choose import choose_with_transport
from emulator.fabric.cost import ScheduleLoad, dies_of, load_schedule, transports_for
from emulator.machines import Machine
from emulator.machines.fabric import Transport

_LARGEST_BYTES = 2**60
_ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

# Bus bandwidth over algorithm bandwidth, as nccl-tests defines it.
_BUS_FACTOR: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    **dict.fromkeys(
        ("reduce_scatter", "all_gather", "all_to_all", "scatter", "gather"), lambda n: (n - 1) / n
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
) -> Collective:
    """The time of one collective on `on`.

    Args:
        op: one of `emulator.collectives.OPS`.
        nbytes: per device, as in nccl-tests: the buffer of an all_reduce, the full result of an
            all_gather, the full input of a reduce_scatter, all that one rank sends in an
            all_to_all, the message of a broadcast or permute.
        on: the machine.
        devices: device numbers in rank order (default: all).
        algorithm: a name, a function group -> Schedule, or None for the machine's own rule.
        dtype: what is sent; sizes are rounded up to whole elements.
        root: device number of the root, for broadcast, reduce, scatter, gather (default: the first
            device).
        pairs: (source, destination) device numbers, for permute.
        transport: the machine's transport to use. By default its rule for `algorithm=None`; for a
            given algorithm whichever is fastest, so that time never falls as bytes grow.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    for what, value in (("op", op), ("transport", transport)):
        if not (isinstance(value, str) or (what == "transport" and value is None)):
            raise TypeError(f"{what} must be a name; got {value!r}")
    if not (algorithm is None or isinstance(algorithm, str) or callable(algorithm)):
        raise TypeError(
            f"algorithm must be a name, a function group -> Schedule, or None; got {algorithm!r}"
        )
    nbytes = _whole("nbytes", nbytes)
    if nbytes > _LARGEST_BYTES:
        raise ValueError(f"nbytes must be at most 2^60; got {nbytes}")
    root = None if root is None else _whole("root", root)
    key = _device_key(devices)
    pair_key = _pair_key(pairs)
    name = (
        dtype
        if isinstance(dtype, str)
        else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    )
    return _collective(op, nbytes, on, key, algorithm, name, root, pair_key, transport)


def _whole(what: str, value: object) -> int:
    """An integer argument as a plain int. Checked before the cache, in which 1 == 1.0 == True."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{what} must be a whole number; got {value!r}") from error


def _device_key(devices: Sequence[int] | None) -> Sequence[int] | None:
    if devices is None or isinstance(devices, range):
        return devices
    try:
        listed = tuple(devices)
    except TypeError as error:
        raise TypeError(f"devices must be a sequence of device numbers; got {devices!r}") from error
    return tuple(_whole("every device", device) for device in listed)


def _pair_key(pairs: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...] | None:
    if pairs is None:
        return None
    try:
        listed = [(source, destination) for source, destination in pairs]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"pairs must be (source, destination) pairs of device numbers; got {pairs!r}"
        ) from error
    return tuple((_whole("every source", s), _whole("every destination", d)) for s, d in listed)


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
) -> Collective:
    if op not in OPS:
        raise ValueError(f"unknown collective operation {op!r}; known: {', '.join(OPS)}")
    if not isinstance(on, Machine):
        raise TypeError(f"on must be a Machine, e.g. cloudmatrix384(); got {type(on).__name__}")
    if nbytes < 0:
        raise ValueError(f"nbytes must be at least 0; got {nbytes}")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(_ITEM_BYTES)}")
    numbers = on.check_devices(range(on.num_devices) if devices is None else devices)
    ranks = {device: rank for rank, device in enumerate(numbers)}
    root_rank = _root_rank(op, root, ranks)
    rank_pairs = _rank_pairs(op, pairs, ranks)
    if algorithm is None:
        algorithm, rule_transport, reason = choose_with_transport(op, nbytes, numbers, on)
        transport = transport or rule_transport
    else:
        if not callable(algorithm) and find(op, algorithm) is None:
            raise ValueError(f"unknown algorithm {algorithm!r} for {op}; known: {known(op)}")
        reason = "given by the caller"
    schedule = build(op, algorithm, group_of(numbers, on), root=root_rank, pairs=rank_pairs)
    slot_bytes = _slot_bytes(schedule, nbytes, _ITEM_BYTES[dtype], on.dies_per_device)
    loads = _loads(schedule, on, numbers, transport)
    load = min(loads, key=lambda load: load.time_s(slot_bytes))
    crossed = {t: b * on.dies_per_device for t, b in load.link_bytes(slot_bytes).items()}
    return Collective(
        op=op,
        nbytes=nbytes,
        dtype=dtype,
        devices=numbers,
        algorithm=schedule.algorithm,
        transport=load.transport.name,
        reason=reason,
        time_s=load.time_s(slot_bytes),
        bound_s=bound_of(op, nbytes, on, numbers, root_rank, rank_pairs),
        steps=load.num_steps,
        link_bytes=tuple(crossed.items()),
        assumptions=_assumptions(on, load),
    )


def _loads(
    schedule: Schedule, on: Machine, devices: tuple[int, ...], transport: str | None
) -> list[ScheduleLoad]:
    """For each transport that may be used, the load of one die's share of the schedule.

    The dies of a device run alike: their partners are as far away, and they share no port.
    """
    dies = dies_of(on, devices)[0]
    usable: Sequence[Transport] = transports_for(on, dies)
    if transport is not None:
        wanted = on.fabric.transport(transport)
        if wanted not in usable:
            raise ValueError(
                f"transport {transport!r} reaches only within one {wanted.scope}; these devices "
                "need one of "
                f"{', '.join(t.name for t in usable)}"
            )
        usable = [wanted]
    return [load_schedule(schedule, on, dies, t) for t in usable]


def _slot_bytes(schedule: Schedule, nbytes: int, item_bytes: int, dies: int) -> int:
    """Bytes of one slot of one die's schedule: whole elements, the payload (or each block) halved
    between the dies.
    """
    count = -(-nbytes // item_bytes)
    if schedule.op in ("all_reduce", "broadcast", "reduce"):
        share = -(-count // dies)
        return -(-share // schedule.pieces) * item_bytes
    block = -(-count // schedule.pieces)
    return -(-block // dies) * item_bytes


def _root_rank(op: str, root: int | None, ranks: dict[int, int]) -> int:
    if root is None or op not in ("broadcast", "reduce", "scatter", "gather"):
        return 0
    if root not in ranks:
        raise ValueError(
            f"{op}: root {root} is not among devices; give root= one of the devices that take part"
        )
    return ranks[root]


def _rank_pairs(
    op: str, pairs: tuple[tuple[int, int], ...] | None, ranks: dict[int, int]
) -> tuple[tuple[int, int], ...]:
    if op != "permute":
        if pairs is not None:
            raise ValueError(f"pairs= belongs to permute; got it with {op}")
        return ()
    if pairs is None:
        raise ValueError("permute needs pairs=, a sequence of (source, destination) device numbers")
    for pair in pairs:
        for device in pair:
            if device not in ranks:
                raise ValueError(f"permute: device {device} of pair {pair} is not among devices")
    return tuple((ranks[s], ranks[d]) for s, d in pairs)


def _assumptions(on: Machine, load: ScheduleLoad) -> tuple[str, ...]:
    if not load.steps:
        return ()
    notes = [
        f"transport {load.transport.name}: start-up and rates fitted to published points "
        "(see the machine's facts); production runs add 1 to 15 us",
        "no other traffic on the fabric; all ranks start together; flows spread evenly over the "
        "switch planes",
    ]
    if on.dies_per_device > 1:
        notes.append("each die of a package runs its own schedule on its share of the payload")
    return tuple(notes)
