"""`concurrent`: collectives that start together and share the machine's links."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from emulator.collectives import Schedule, build, group_of
from emulator.collectives.schedule import Wide
from emulator.fabric.arguments import ITEM_BYTES, pair_key
from emulator.fabric.collective import Collective, collective, slot_bytes_of
from emulator.fabric.cost import dies_of, load_schedule
from emulator.fabric.flows import Phase, finish_s
from emulator.fabric.in_network import NAME as IN_NETWORK
from emulator.fabric.network import Loads
from emulator.fabric.routes import network_of
from emulator.fabric.steps import link_loads, load_round, transfers_of
from emulator.machines import Machine
from emulator.machines.fabric import Transport


def concurrent(requests: Sequence[Mapping[str, Any]], on: Machine) -> tuple[Collective, ...]:
    """The collectives of `requests` when all of them start together on `on`.

    A request holds what `collective` takes, without `on`:
    `concurrent([{"op": "all_reduce", "nbytes": 2**20, "devices": range(8)}, ...], on=machine)`.
    Each keeps its own start-up, steps and latencies. Links (and a die's port, by what a transport
    reaches of it) are shared max-min fairly by the slots that are under way, as in
    `emulator.fabric.flows`; collectives that share none are not slowed.

    Raises:
        TypeError, ValueError: a request that does not fit; the message says which.
    """
    if not isinstance(requests, Iterable):
        raise TypeError(f"concurrent: requests must be a sequence of mappings; got {requests!r}")
    listed = [_lasting(request) for request in requests]
    answers = [_answer(i, request, on) for i, request in enumerate(listed)]
    ends = _finish(listed, answers, on)
    return tuple(
        dataclasses.replace(answer, time_s=end, assumptions=answer.assumptions + _note(answer, end))
        for answer, end in zip(answers, ends, strict=True)
    )


def together_s(requests: Sequence[Mapping[str, Any]], on: Machine) -> list[float]:
    """Seconds of each of `requests` when all start together."""
    return _finish(requests, [collective(on=on, **request) for request in requests], on)


def _lasting(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request, its pairs as a tuple: they are read twice."""
    if not isinstance(request, Mapping) or request.get("pairs") is None:
        return request
    return {**request, "pairs": pair_key(request["pairs"])}


def _answer(i: int, request: Mapping[str, Any], on: Machine) -> Collective:
    if not isinstance(request, Mapping):
        raise TypeError(
            "concurrent: every request must map the arguments of collective to values, as in "
            f'{{"op": "all_reduce", "nbytes": 1024}}; request {i} is {request!r}'
        )
    if "on" in request:
        raise ValueError(f"concurrent: request {i} names a machine; give on= once, for all")
    try:
        return collective(on=on, **request)
    except (TypeError, ValueError) as error:
        raise type(error)(f"concurrent: request {i}: {error}") from error


def _finish(
    requests: Sequence[Mapping[str, Any]], answers: Sequence[Collective], on: Machine
) -> list[float]:
    jobs = [_phases(request, answer, on) for request, answer in zip(requests, answers, strict=True)]
    ends = finish_s(jobs)
    # Where nothing is shared the seconds are those alone, to the last bit.
    return [
        max(end, answer.time_s) if end > sum(phase.alone_s for phase in job) else answer.time_s
        for end, job, answer in zip(ends, jobs, answers, strict=True)
    ]


def _note(answer: Collective, end: float) -> tuple[str, ...]:
    if end <= answer.time_s:
        return ("started together with others, which share no full link with it",)
    return (
        f"started together with others: {end / answer.time_s:.2f} x its time alone; links shared "
        "max-min fairly",
    )


def _phases(request: Mapping[str, Any], answer: Collective, on: Machine) -> tuple[Phase, ...]:
    """What the answered collective does, as phases of waiting and work on links."""
    if answer.time_s == 0:
        return ()
    dies = dies_of(on, answer.devices)[0]
    if answer.algorithm == IN_NETWORK:
        return _ports(answer, on, dies)
    given = request.get("algorithm")
    ranks = {device: rank for rank, device in enumerate(answer.devices)}
    schedule = build(
        answer.op,
        given if callable(given) else answer.algorithm,
        group_of(answer.devices, on),
        root=ranks.get(request.get("root", -1), 0),
        pairs=tuple((ranks[a], ranks[b]) for a, b in request.get("pairs") or ()),
    )
    transport = on.fabric.transport(answer.transport)
    slot = slot_bytes_of(schedule, answer.nbytes, ITEM_BYTES[answer.dtype], on.dies_per_device)
    steps = _step_phases(schedule, on, dies, transport, slot)
    start_s = answer.time_s - sum(phase.alone_s for phase in steps)
    return (_wait(start_s), *steps)


def _wait(seconds: float) -> Phase:
    return Phase(
        repeat=1,
        fixed_s=max(0.0, seconds),
        wire_s=0.0,
        links=np.zeros(0, np.int64),
        busy=np.zeros(0),
        bytes_per_s=1.0,
    )


@functools.lru_cache(maxsize=1024)
def _step_phases(
    schedule: Schedule, on: Machine, dies: tuple[int, ...], transport: Transport, slot_bytes: int
) -> tuple[Phase, ...]:
    load = load_schedule(schedule, on, dies, transport)
    places = np.asarray(dies)
    phases = []
    for part in schedule.rounds:
        if isinstance(part, Wide):
            if not part.traffic:
                continue
            part = part.listed()
        transfers = transfers_of(part, on, places)
        step = load_round(part, on, places, transport)
        if transfers is None or step is None:
            continue
        fixed_s, wire_s = load.step_s(step, slot_bytes)
        links, busy = _busy(link_loads(on, transfers, transport), step.port_s)
        phases.append(
            Phase(
                repeat=step.repeat,
                fixed_s=fixed_s,
                wire_s=wire_s,
                links=links,
                busy=busy,
                bytes_per_s=1 / step.port_s,
            )
        )
    return tuple(phases)


def _busy(loads: Loads, most_s: float) -> tuple[np.ndarray, np.ndarray]:
    """The links of `loads` that work, and for which part of `most_s`."""
    links, busy = [], []
    for first, seconds in loads:
        used = np.flatnonzero(seconds)
        links.append(first + used)
        busy.append(seconds[used] / most_s)
    return np.concatenate(links), np.concatenate(busy)


def _ports(answer: Collective, on: Machine, dies: tuple[int, ...]) -> tuple[Phase, ...]:
    """A collective in the switches, as work of its devices' ports, in and out, for all of its time
    (assumption; it has no steps between devices that could be told apart).
    """
    src = np.asarray(dies)
    dst = np.roll(src, 1)  # each sends and receives once
    ones, tier = np.ones(len(src)), network_of(on).tier_between(src, dst)
    transfers = (src, dst, tier, ones, ones > 1)
    loads = link_loads(on, transfers, on.fabric.transport(answer.transport))
    links, busy = _busy(loads, max(float(seconds.max()) for _, seconds in loads))
    return (
        Phase(
            repeat=1,
            fixed_s=0.0,
            wire_s=answer.time_s,
            links=links,
            busy=busy,
            bytes_per_s=max(answer.nbytes, 1) / answer.time_s,
        ),
    )
