"""The links of a user's own fabric, as one vector of capacities with a view for each level.

A direct link is called `ring1/3>4` (level, from device, to device; `ring1/3-4` is both ways), a
port into a switch `switch2/device5/plane0/up`, what a block's devices share `switch2/block1/up`.
`device5` is every link of a device, `switch2/device5` those of one level.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emulator.machines.levels import Level

if TYPE_CHECKING:
    from emulator.machines.machine import Machine

Array = NDArray[Any]
WAYS = ("up", "down")


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LevelWires:
    """One level's links. `inner` devices make one block of it; `first` is its first link number.

    Direct levels: `to` [device, slot] is the neighbour (-1: none) and `links` the capacities.
    Switches: `ports` [way, device, plane] and `uplinks` [way, block, plane] (no blocks without a
    taper). All arrays of capacities are views of the fabric's vector.
    """

    level: Level
    inner: int
    first: int
    to: Array
    links: Array
    ports: Array
    uplinks: Array


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Wires:
    """Bytes per second of every link, and the levels that they belong to."""

    capacity: Array
    levels: tuple[LevelWires, ...]


@functools.lru_cache(maxsize=64)
def level_wires(machine: Machine) -> Wires:
    """The links of `machine` with its overrides and faults."""
    count = machine.num_devices
    parts: list[tuple[Level, int, Array]] = []
    inner, total = 1, 0
    for level in machine.fabric.levels:
        parts.append((level, inner, _neighbours(level, inner, count)))
        total += _links_of(level, inner, count)
        inner *= level.size
    capacity = np.zeros(total)
    found, first = [], 0
    for level, inner, to in parts:
        size = _links_of(level, inner, count)
        found.append(_view(level, inner, first, to, capacity[first : first + size], count))
        first += size
    wires = Wires(capacity, tuple(found))
    for name, rate in machine.fabric.overrides:
        capacity[places(name, machine, wires)] = rate
    faults = machine.faults
    for name, factor in faults.links:
        capacity[places(name, machine, wires)] *= factor
    for plane, factor in faults.planes:
        for part in wires.levels:
            if part.level.kind == "switch" and plane < part.level.planes:
                part.ports[:, :, plane] *= factor
                part.uplinks[:, :, plane] *= factor
    for name, factor in faults.switches:
        _hit_switch(name, factor, machine, wires)
    for device in faults.missing:  # what is not there passes nothing on
        capacity[places(f"device{device}", machine, wires)] = 0.0
    capacity.flags.writeable = False
    return wires


def _links_of(level: Level, inner: int, count: int) -> int:
    if level.kind != "switch":
        return count * _slots(level)
    return 2 * level.planes * (count + (count // inner if level.taper > 1 else 0))


def _slots(level: Level) -> int:
    return level.size if level.kind == "full_mesh" else 2 * len(level.sizes)


def _neighbours(level: Level, inner: int, count: int) -> Array:
    """[device, slot]: where each direct link of the level leads, -1 where there is none.

    Slots: the digit at the other end in a full mesh; (forward, backward) along each dimension of a
    ring, mesh or torus.
    """
    device = np.arange(count)
    if level.kind == "switch":
        return np.zeros((count, 0), np.int64)
    digit = device // inner % level.size
    if level.kind == "full_mesh":
        other = np.arange(level.size)
        to = device[:, None] + (other - digit[:, None]) * inner
        return np.where(other == digit[:, None], -1, to)
    columns, stride = [], inner
    for size in level.sizes:
        at = device // stride % size
        for way in (1, -1):
            there = (at + way) % size if level.kind != "mesh" else at + way
            outside = (there < 0) | (there >= size) | (size == 1)
            if size == 2 and way == -1 and level.kind != "mesh":
                outside[:] = True  # two devices have one link, not two
            columns.append(np.where(outside, -1, device + (there - at) * stride))
        stride *= size
    return np.stack(columns, axis=1)


def _view(
    level: Level, inner: int, first: int, to: Array, capacity: Array, count: int
) -> LevelWires:
    none = np.zeros((2, 0, level.planes))
    if level.kind != "switch":
        links = capacity.reshape(to.shape)
        links[to >= 0] = level.bytes_per_s
        return LevelWires(
            level=level, inner=inner, first=first, to=to, links=links, ports=none, uplinks=none
        )
    size = 2 * level.planes * count
    ports = capacity[:size].reshape(2, count, level.planes)
    ports[:] = level.bytes_per_s / level.planes
    uplinks = capacity[size:].reshape(2, -1, level.planes)
    uplinks[:] = level.bytes_per_s / level.planes * inner / level.taper
    return LevelWires(
        level=level, inner=inner, first=first, to=to, links=to, ports=ports, uplinks=uplinks
    )


_DIRECT = re.compile(r"(\w+)/(\d+)([>-])(\d+)")
_PORT = re.compile(r"(?:(\w+)/)?(device|block)(\d+)(?:/plane(\d+))?(?:/(up|down))?")


def places(name: str, machine: Machine, wires: Wires) -> Array:
    """The numbers of the links called `name`.

    Raises:
        ValueError: the machine has no such link.
    """
    found: list[Array] = []
    if match := _DIRECT.fullmatch(name):
        level, a, way, b = match.groups()
        for part in _named(level, wires):
            for here, there in ((int(a), int(b)), (int(b), int(a)))[: 1 if way == ">" else 2]:
                if max(here, there) < len(part.to):
                    slots = np.flatnonzero(part.to[here] == there)
                    found.append(part.first + here * part.to.shape[1] + slots)
    elif match := _PORT.fullmatch(name):
        found = [_port_places(match, part) for part in _named(match[1], wires)]
    links = np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
    if not len(links):
        raise ValueError(
            f"{machine.name} has no link {name!r}; links are named {_forms(wires)}, and its levels "
            f"are {', '.join(machine.fabric.tier_names)} over devices 0..{machine.num_devices - 1}"
        )
    return links


def _named(name: str | None, wires: Wires) -> list[LevelWires]:
    return [part for part in wires.levels if name in (None, part.level.name)]


def _port_places(match: re.Match[str], part: LevelWires) -> Array:
    """Links of one device, or uplinks of one block, of one level."""
    _, kind, number, plane, way = match.groups()
    nothing = np.zeros(0, np.int64)
    if part.level.kind != "switch":
        if kind == "block" or plane or way or int(number) >= len(part.to):
            return nothing
        every = part.first + np.arange(part.to.size).reshape(part.to.shape)
        return np.concatenate([every[int(number)], every[part.to == int(number)]])
    table = part.ports if kind == "device" else part.uplinks
    start = part.first + (part.ports.size if kind == "block" else 0)
    numbers = start + np.arange(table.size).reshape(table.shape)
    if int(number) >= table.shape[1] or (plane and int(plane) >= table.shape[2]):
        return nothing
    ways = slice(None) if way is None else WAYS.index(way)
    chosen: Array = numbers[ways, int(number), slice(None) if plane is None else int(plane)]
    return chosen.reshape(-1)


def _forms(wires: Wires) -> str:
    forms = {f"{w.level.name}/0>1" for w in wires.levels if w.level.kind != "switch"}
    for part in wires.levels:
        if part.level.kind == "switch":
            forms.add(f"{part.level.name}/device0/plane0/up")
        if part.uplinks.size:
            forms.add(f"{part.level.name}/block0/up")
    return " or ".join(f"as in {form!r}" for form in sorted(forms))


def _hit_switch(name: str, factor: float, machine: Machine, wires: Wires) -> None:
    """Slows a switch: `switch2/0` is the first one of level "switch2" with all its planes,
    `switch2/0/plane3` one plane of it.
    """
    match = re.fullmatch(r"(\w+)/(\d+)(?:/plane(\d+))?", name)
    for part in wires.levels if match else ():
        assert match is not None
        level, number, plane = match.groups()
        width = part.inner * part.level.size
        planes = slice(None) if plane is None else slice(int(plane), int(plane) + 1)
        if level != part.level.name or part.level.kind != "switch":
            continue
        if int(number) * width < machine.num_devices and int(plane or 0) < part.level.planes:
            first = int(number) * width
            part.ports[:, first : first + width, planes] *= factor
            blocks = slice(first // part.inner, (first + width) // part.inner)
            part.uplinks[:, blocks, planes] *= factor
            return
    switches = [w.level.name for w in wires.levels if w.level.kind == "switch"]
    raise ValueError(
        f"{machine.name} has no switch {name!r}; "
        + (f"switches are named as in '{switches[0]}/0/plane0'" if switches else "it has none")
    )


def named_links(machine: Machine) -> Iterator[tuple[str, tuple[str, str], float, float]]:
    """(name, ends, bytes per second, latency) of every link, one direction each."""
    for part in level_wires(machine).levels:
        level = part.level
        for device, slot in np.argwhere(part.to >= 0) if level.kind != "switch" else ():
            there = part.to[device, slot]
            yield (
                f"{level.name}/{device}>{there}",
                (f"device{device}", f"device{there}"),
                float(part.links[device, slot]),
                level.latency_s,
            )
        for what, table, each in (
            ("device", part.ports, part.inner * level.size),
            ("block", part.uplinks, level.size),
        ):
            for way, number, plane in np.ndindex(table.shape):
                ends = (f"{what}{number}", f"{level.name}/{number // each}/plane{plane}")
                yield (
                    f"{level.name}/{what}{number}/plane{plane}/{WAYS[way]}",
                    ends if way == 0 else ends[::-1],
                    float(table[way, number, plane]),
                    level.latency_s / 2 if what == "device" else 0.0,
                )
