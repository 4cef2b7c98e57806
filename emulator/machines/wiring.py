"""The links of a machine whose dies are joined by switch planes, as arrays of capacities.

Every die has one lane into each plane. A node has one first-level switch per plane; where there is
more than one node, that switch has one uplink to each second-level switch of its plane. Two dies of
one package may have a link of their own. `Wiring` holds what each of these links can carry after
the machine's faults, in bytes per second and one direction (0: out, away from the die; 1: in).

A link is named by where it is: `die5/plane3/up`, `node2/plane3/switch7/down`, `package4/sio/up`
(from its first die to the second). Leaving parts out means all of them: `die5`, `device5`,
`node2/plane3` (the uplinks of one first-level switch), `plane3/switch7` (in every pod),
`node2/plane3/switch7`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator.machines.level_wiring import level_wires, named_links

if TYPE_CHECKING:
    from emulator.machines.machine import Machine

Rates = NDArray[np.float64]
DIRECTIONS = ("up", "down")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One link in one direction: what it joins and what it can carry.

    `medium` is "electrical" or "optical" ("any" on a user's own fabric); `latency_s` what crossing
    it (and the switch it leads to) adds to a transfer, where it is known.
    """

    name: str
    ends: tuple[str, str]
    bytes_per_s: float
    latency_s: float
    medium: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """Bytes per second: `lanes` [direction, die, plane], `uplinks` [direction, node, plane, switch]
    (no switches where one node is all), `sio` [direction, package] (0 where dies have no link).
    """

    lanes: Rates
    uplinks: Rates
    sio: Rates


@functools.lru_cache(maxsize=64)
def wiring(machine: Machine) -> Wiring:
    """The capacities of `machine`'s links after its faults."""
    fabric = machine.fabric
    rates = {tier.name: tier.bytes_per_s for tier in fabric.tiers}
    nodes = machine.num_nodes
    port = max(rates.get("node", 0.0), rates.get("pod", 0.0))
    switches = fabric.switches_per_plane if "pod" in rates else 0
    uplink = fabric.node_uplink_bytes_per_s / (fabric.planes * fabric.switches_per_plane)
    wires = Wiring(
        np.full((2, machine.num_dies, fabric.planes), port / fabric.planes),
        np.full((2, nodes, fabric.planes, switches), uplink),
        np.full((2, machine.packages), float(rates.get("package", 0.0))),
    )
    faults = machine.faults
    for name, factor in faults.links:
        for array, index in places(name, machine, wires):
            array[index] *= factor
    for plane, factor in faults.planes:
        wires.lanes[:, :, plane] *= factor
        wires.uplinks[:, :, plane] *= factor
    for name, factor in faults.switches:
        for array, index in _switch(name, machine, wires):
            array[index] *= factor
    for array in (wires.lanes, wires.uplinks, wires.sio):
        array.flags.writeable = False
    return wires


Place = tuple[Rates, tuple[slice | int, ...]]
_PARTS = re.compile(r"(?:(device|die|package|node|plane|switch)(\d+)|(sio|up|down))")


def places(name: str, machine: Machine, wires: Wiring) -> list[Place]:
    """Where the links called `name` are in the arrays of `wires`.

    Raises:
        ValueError: the machine has no such link.
    """
    parts = _parse(name, machine)
    all_ = slice(None)
    way: slice | int = all_
    if "up" in parts or "down" in parts:
        way = DIRECTIONS.index("up" if "up" in parts else "down")
    plane = parts.get("plane", all_)
    kinds = set(parts) - {"up", "down", "plane"}
    dies, per_package = machine.dies_per_device, machine.num_dies // machine.packages
    if kinds == {"package", "sio"} and wires.sio.any():
        return [(wires.sio, (way, parts["package"]))]
    if kinds == {"die"}:
        return [(wires.lanes, (way, parts["die"], plane))]
    if kinds == {"device"}:
        first = parts["device"] * dies
        return [(wires.lanes, (way, slice(first, first + dies), plane))]
    if kinds == {"package"}:
        first = parts["package"] * per_package
        return [(wires.lanes, (way, slice(first, first + per_package), plane))]
    if wires.uplinks.size and kinds and kinds <= {"node", "switch"}:
        return [(wires.uplinks, (way, parts.get("node", all_), plane, parts.get("switch", all_)))]
    raise ValueError(f"{machine.name} has no link {name!r}; {_forms(wires)}")


def check_names(machine: Machine) -> None:
    """Raises ValueError if the machine's faults name what it does not have."""
    for plane, _ in machine.faults.planes:
        if not 0 <= plane < machine.fabric.planes:
            raise ValueError(
                f"degrade: {machine.name} has no plane {plane}; it has planes "
                f"0..{machine.fabric.planes - 1}"
            )
    if machine.fabric.levels:
        level_wires(machine)
    else:
        wiring(machine)


def _switch(name: str, machine: Machine, wires: Wiring) -> list[Place]:
    """The links that end in a switch: `node2/plane3` (first level) or `plane3/switch7` (second)."""
    parts = _parse(name, machine)
    all_ = slice(None)
    if set(parts) == {"plane", "switch"} and wires.uplinks.size:
        return [(wires.uplinks, (all_, all_, parts["plane"], parts["switch"]))]
    if set(parts) == {"node", "plane"}:
        per_node = machine.devices_per_node * machine.dies_per_device
        dies = slice(parts["node"] * per_node, (parts["node"] + 1) * per_node)
        return [
            (wires.lanes, (all_, dies, parts["plane"])),
            (wires.uplinks, (all_, parts["node"], parts["plane"])),
        ]
    second = ", 'plane3/switch0' (second level)" if wires.uplinks.size else ""
    raise ValueError(
        f"{machine.name} has no switch {name!r}; switches are named as in 'node0/plane3' (first "
        f"level){second}"
    )


def _parse(name: str, machine: Machine) -> dict[str, int]:
    """`die5/plane3/up` as {"die": 5, "plane": 3, "up": 0}, its numbers checked."""
    fabric = machine.fabric
    limits = {
        "device": machine.num_devices,
        "die": machine.num_dies,
        "package": machine.packages,
        "node": machine.num_nodes,
        "plane": fabric.planes,
        "switch": fabric.switches_per_plane,
    }
    parts: dict[str, int] = {}
    if ports := {port.name for port in fabric.ports} & {*name.split("/")}:
        raise NotImplementedError(
            f"{machine.name}: a fault of {name!r} is not modelled: {', '.join(ports)} links keep "
            f"their rate; {_FORMS}"
        )
    for part in name.split("/"):
        match = _PARTS.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{machine.name}: {part!r} in {name!r} names no part of a link; {_FORMS}"
            )
        kind, number, word = match.groups()
        if (kind or word) in parts:
            raise ValueError(f"{machine.name}: {name!r} names a {kind or word} twice")
        parts[kind or word] = int(number or 0)
        if kind and int(number) >= limits[kind]:
            raise ValueError(
                f"{machine.name} has no {part} (in {name!r}); it has {kind}s 0..{limits[kind] - 1}"
            )
    if "up" in parts and "down" in parts:
        raise ValueError(f"{machine.name}: {name!r} is both up and down; leave both out for both")
    return parts


_FORMS = "links are named as in 'die5/plane3/up', 'device5' (all its lanes)"


def _forms(wires: Wiring) -> str:
    more = ", 'node2/plane3/switch7/down'" if wires.uplinks.size else ""
    return _FORMS + more + (", 'package4/sio/up'" if wires.sio.any() else "")


def links(machine: Machine) -> Iterator[Link]:
    """Every link of `machine` that its collectives may use, one direction each."""
    if machine.fabric.levels:
        for name, ends, rate, latency_s in named_links(machine):
            yield Link(name=name, ends=ends, bytes_per_s=rate, latency_s=latency_s, medium="any")
        return
    wires = wiring(machine)
    fabric = machine.fabric
    inside = next(t for t in fabric.tiers if t.name != "package")
    outside = fabric.tier("pod") if wires.uplinks.size else inside
    across = (outside.write_latency_s - inside.write_latency_s) / 4
    per_node = machine.devices_per_node * machine.dies_per_device
    for die, plane in np.ndindex(wires.lanes.shape[1:]):
        ends = (f"die{die}", f"node{die // per_node}/plane{plane}")
        yield from _both(
            f"die{die}/plane{plane}",
            ends,
            wires.lanes[:, die, plane],
            inside.write_latency_s / 2,
            "electrical",
        )
    for node, plane, switch in np.ndindex(wires.uplinks.shape[1:]):
        pod = f"pod{node // (machine.num_nodes // machine.pods)}/" if machine.pods > 1 else ""
        ends = (f"node{node}/plane{plane}", f"{pod}plane{plane}/switch{switch}")
        yield from _both(
            f"node{node}/plane{plane}/switch{switch}",
            ends,
            wires.uplinks[:, node, plane, switch],
            across,
            fabric.uplink_medium,
        )
    if wires.sio.any():
        per_package = machine.num_dies // machine.packages
        for package in range(machine.packages):
            ends = (f"die{package * per_package}", f"die{package * per_package + 1}")
            yield from _both(
                f"package{package}/sio",
                ends,
                wires.sio[:, package],
                fabric.tier("package").write_latency_s,
                "electrical",
            )
    for port in fabric.ports:
        for i in range(machine.num_nodes * port.per_node):
            where = (
                f"die{i}"
                if port.per_node == per_node
                else (f"node{i // port.per_node}/cpu{i % port.per_node}")
            )
            yield from _both(
                f"{where}/{port.name}",
                (where, port.to),
                np.full(2, port.bytes_per_s),
                port.latency_s,
                port.medium,
            )


def _both(
    name: str, ends: tuple[str, str], rates: Rates, latency_s: float, medium: str
) -> Iterator[Link]:
    for way, direction in enumerate(DIRECTIONS):
        yield Link(
            name=f"{name}/{direction}",
            ends=ends if way == 0 else ends[::-1],
            bytes_per_s=float(rates[way]),
            latency_s=latency_s,
            medium=medium,
        )
