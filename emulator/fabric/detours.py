"""Ways round what is dead on a user's own fabric: the fewest hops over the links that are left."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from emulator.machines import Machine
from emulator.machines.level_wiring import LevelWires, Wires

Edge = tuple[int, int, int, float]  # from, to, link, seconds


class Detours:
    """Shortest ways from device to device, found when first asked for."""

    def __init__(self, machine: Machine, wires: Wires) -> None:
        self.machine = machine
        self.wires = wires
        self._edges: dict[int, list[Edge]] = {}
        self._trees: dict[int, dict[int, Edge]] = {}

    def way(self, src: int, dst: int) -> tuple[NDArray[np.int64], float]:
        """(links, seconds of latency) from `src` to `dst`.

        Raises:
            ValueError: nothing that is left leads there.
        """
        if src not in self._trees:
            self._trees[src] = self._tree(src)
        tree = self._trees[src]
        if dst not in tree:
            raise ValueError(
                f"device {dst} is cut off from device {src} of this {self.machine.name}: no way is "
                f"left; {'; '.join(self.machine.faults.describe()[:4])}"
            )
        links, seconds, at = [], 0.0, dst
        while at != src:
            at, _, link, latency_s = tree[at]
            links.append(link)
            seconds += latency_s
        return np.array(links), seconds

    def _tree(self, src: int) -> dict[int, Edge]:
        """The edge by which a breadth-first search from `src` first came to each node."""
        if not self._edges:
            for part in self.wires.levels:
                for edge in _edges(part, self.wires.capacity):
                    self._edges.setdefault(edge[0], []).append(edge)
        found: dict[int, Edge] = {}
        waiting = collections.deque([src])
        while waiting:
            for edge in self._edges.get(waiting.popleft(), ()):
                if edge[1] not in found and edge[1] != src:
                    found[edge[1]] = edge
                    waiting.append(edge[1])
        return found


def _edges(part: LevelWires, capacity: NDArray[np.float64]) -> Iterator[Edge]:
    """Live links of a level. Devices have their numbers; switches and what stands before them have
    negative ones.
    """
    latency_s, planes = part.level.latency_s, part.level.planes
    if part.level.kind != "switch":
        for device, slot in np.argwhere((part.to >= 0) & (part.links > 0)).tolist():
            link = part.first + device * part.to.shape[1] + slot
            yield device, int(part.to[device, slot]), link, latency_s
        return
    blocks = part.uplinks.shape[1]
    _, devices, _ = part.ports.shape
    first = -2 * (part.first + 1)  # a range of negative numbers that no other level uses

    def node(kind: int, number: int, plane: int) -> int:
        return first - (2 * (number * planes + plane) + kind)

    for device, plane in np.ndindex(devices, planes):
        before = device // part.inner if blocks else device // (part.inner * part.level.size)
        near = node(1 if blocks else 0, before, plane)
        out = part.first + device * planes + plane
        into = out + devices * planes
        if capacity[out] > 0:
            yield device, near, out, latency_s
        if capacity[into] > 0:
            yield near, device, into, 0.0
    base = part.first + part.ports.size
    for block, plane in np.ndindex(blocks, planes):
        near, far = node(1, block, plane), node(0, block // part.level.size, plane)
        out = base + block * planes + plane
        into = out + blocks * planes
        if capacity[out] > 0:
            yield near, far, out, 0.0
        if capacity[into] > 0:
            yield far, near, into, 0.0
