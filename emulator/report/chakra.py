"""An estimate as Chakra execution traces, one file per device, which other simulators replay.

`<folder>/<name>.<rank>.et` holds a GlobalMetadata message and then the steps of one device in
program order, each depending on what stands before it: COMP_NODE with its duration, floating-point
operations and memory traffic, COMM_COLL_NODE with its kind, bytes and group, COMM_SEND_NODE and
COMM_RECV_NODE for a permute. `<folder>/comm_groups.json` lists the ranks of each group (`pg_name`).
Ranks are positions in the mesh.

`comm_size` is what each rank gives: its shard for an all_gather, its whole buffer otherwise.
Durations are whole microseconds, as the format has them, cut so that their sums stay right;
`duration_ps` is exact. Loops are unrolled.

Source: mlcommons/chakra schema/protobuf/et_def.proto, version 0.0.4 (documented).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emulator.report.protobuf import delimited, integer, message, packed, text
from emulator.report.result import Estimate
from emulator.timeline import PS_PER_S, CollectiveOp, Loop, Op, Step

VERSION = "0.0.4"
COMP_NODE, COMM_SEND_NODE, COMM_RECV_NODE, COMM_COLL_NODE = 4, 5, 6, 7
COMM_TYPES = {
    "all_reduce": 0,
    "reduce": 1,
    "all_gather": 2,
    "gather": 3,
    "scatter": 4,
    "broadcast": 5,
    "all_to_all": 6,
    "reduce_scatter": 7,
}
LARGEST_NODES = 10**6

# Field numbers of et_def.proto.
_NAME, _INT64, _UINT64, _BOOL, _STRING = 1, 9, 13, 27, 29  # AttributeProto
_META_VERSION, _META_ATTR = 1, 2
_ID, _NODE_NAME, _TYPE, _DATA_DEPS, _DURATION, _NODE_ATTR = 1, 2, 3, 5, 7, 10

Executed = Op | CollectiveOp


def write(estimate: Estimate, folder: Path) -> Path:
    """Writes all files, or none; returns the folder.

    Raises:
        ValueError: the folder holds something already, its parent does not exist, or the unrolled
            program is too long.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; name another folder")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.absolute().parent}")
    steps = list(unrolled(estimate.steps))
    slowness = estimate.machine.slowness(estimate.devices)
    ranks = len(estimate.devices)
    groups, member = _groups(steps)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        encoded: dict[Any, bytes] = {}
        for rank in range(ranks):
            with (beside / f"{estimate.name}.{rank}.et").open("wb") as file:
                file.write(delimited(_metadata(estimate, rank)))
                for node in _nodes(steps, rank, slowness[rank], member, encoded):
                    file.write(node)
        listed = {str(number): list(ranks) for ranks, number in groups.items()}
        (beside / "comm_groups.json").write_text(json.dumps(listed))
        beside.chmod(0o755)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def unrolled(steps: tuple[Step, ...]) -> Iterator[Executed]:
    """Every execution in order. A fractional trip count (a mean over executions) runs as often as
    it amounts to so far: half a trip runs every second time.
    """
    count = 0
    credit: dict[int, float] = {}

    def run(part: tuple[Step, ...]) -> Iterator[Executed]:
        nonlocal count
        for step in part:
            if isinstance(step, Loop):
                credit[id(step)] = credit.get(id(step), 0.0) + step.trips
                trips = int(credit[id(step)] + 1e-9)
                credit[id(step)] -= trips
                for _ in range(trips):
                    yield from run(step.body)
                continue
            count += 1
            if count > LARGEST_NODES:
                raise ValueError(
                    f"to_chakra: more than {LARGEST_NODES:,} steps once loops are unrolled; "
                    "export a program with fewer trips"
                )
            yield step

    return run(steps)


def _groups(
    steps: list[Executed],
) -> tuple[dict[tuple[int, ...], int], dict[int, dict[int, tuple[int, int]]]]:
    """Numbers of all groups of ranks, from 1 on; and for each collective (by id) rank -> (group,
    place in it).
    """
    groups: dict[tuple[int, ...], int] = {}
    member: dict[int, dict[int, tuple[int, int]]] = {}
    for step in steps:
        if isinstance(step, CollectiveOp) and id(step) not in member:
            places: dict[int, tuple[int, int]] = {}
            for positions, _ in step.groups:
                for row in positions.tolist():
                    number = groups.setdefault(tuple(row), len(groups) + 1)
                    places |= {rank: (number, place) for place, rank in enumerate(row)}
            member[id(step)] = places
    return groups, member


def _nodes(
    steps: list[Executed],
    rank: int,
    slowness: float,
    member: dict[int, dict[int, tuple[int, int]]],
    encoded: dict[Any, bytes],
) -> Iterator[bytes]:
    """The nodes of one device. Alike devices have alike nodes, so `encoded` keeps them."""
    previous: tuple[int, ...] = ()
    clock_ps = 0
    for index, step in enumerate(steps):
        if isinstance(step, Op):
            step = step.on(rank)
            time_s = step.time_s * slowness
            variants: list[tuple[Any, ...]] = [(COMP_NODE, step.flops, step.bytes)]
        else:
            time_s = step.group_s(rank)
            variants = _variants(step, rank, member[id(step)])
        if not variants:
            continue
        duration_ps = round(time_s * PS_PER_S)
        before_us, clock_ps = clock_ps // 10**6, clock_ps + duration_ps
        micros = clock_ps // 10**6 - before_us
        numbers = tuple(2 * index + 1 + place for place in range(len(variants)))
        for number, variant in zip(numbers, variants, strict=True):
            key = (number, previous, micros, duration_ps, variant)
            if key not in encoded:
                node = _node(number, previous, micros, duration_ps, step, variant)
                encoded[key] = delimited(node)
            yield encoded[key]
        previous = numbers


def _variants(
    step: CollectiveOp, rank: int, places: dict[int, tuple[int, int]]
) -> list[tuple[Any, ...]]:
    """What a collective is on one device: (node type, group), or (type, source, destination)."""
    if rank not in places:
        return []
    group, place = places[rank]
    if step.op != "permute":
        return [(COMM_COLL_NODE, group)]
    row = next(r for positions, _ in step.groups for r in positions.tolist() if rank in r)
    sends = [(COMM_SEND_NODE, rank, row[d]) for s, d in step.pairs if s == place]
    receives = [(COMM_RECV_NODE, row[s], rank) for s, d in step.pairs if d == place]
    return [v for v in (*sends, *receives) if v[1] != v[2]]


def _node(
    number: int,
    previous: tuple[int, ...],
    micros: int,
    duration_ps: int,
    step: Executed,
    variant: tuple[Any, ...],
) -> bytes:
    kind = variant[0]
    parts = [
        integer(_ID, number),
        text(_NODE_NAME, f"{step.name} {step.where}".strip()),
        integer(_TYPE, kind),
        packed(_DATA_DEPS, previous),
        integer(_DURATION, micros),
        _attribute("is_cpu_op", _BOOL, False),
        _attribute("duration_ps", _UINT64, duration_ps),
    ]
    if isinstance(step, Op):
        parts += [
            _attribute("num_ops", _INT64, step.flops),
            _attribute("tensor_size", _UINT64, step.bytes),
        ]
    elif kind == COMM_COLL_NODE:
        given = step.nbytes // step.ranks if step.op == "all_gather" else step.nbytes
        parts += [
            _attribute("comm_type", _INT64, COMM_TYPES[step.op]),
            _attribute("comm_size", _INT64, given),
            _attribute("pg_name", _STRING, str(variant[1])),
            _attribute("algorithm", _STRING, step.algorithm),
        ]
    else:
        parts += [
            _attribute("comm_src", _INT64, variant[1]),
            _attribute("comm_dst", _INT64, variant[2]),
            _attribute("comm_size", _INT64, step.nbytes),
            _attribute("comm_tag", _INT64, (number - 1) // 2),
        ]
    return b"".join(parts)


def _attribute(name: str, field: int, value: Any, at: int = _NODE_ATTR) -> bytes:
    encoded = text(field, value) if field == _STRING else integer(field, value)
    return message(at, text(_NAME, name) + encoded)


def _metadata(estimate: Estimate, rank: int) -> bytes:
    facts = {
        "program": estimate.name,
        "machine": estimate.machine.name,
        "device": str(estimate.devices[rank]),
        "written_by": "cm384",
    }
    attributes = [_attribute(name, _STRING, value, _META_ATTR) for name, value in facts.items()]
    return text(_META_VERSION, VERSION) + b"".join(attributes)
