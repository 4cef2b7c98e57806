"""Where transfers go: which links each crosses, and with which share of its bytes.

The planes of a machine are routed as follows (assumption: no vendor publishes its policy). Two dies
of a package use the link between them. Two dies of a node use, in each plane, the lane up and the
lane down; between nodes also an uplink of the first-level switch, a second-level switch and the way
down to the other node. Bytes spread over the planes in proportion to what a die's path through the
plane can carry (its own lane, its fair part of the uplinks, the other's lane), and within a plane
over the second-level switches in proportion to the path's capacity; dead ones get nothing.

While nothing is wrong this loads all lanes of a die alike, so `Bundles` counts a die's lanes as one
port and a node's uplinks as one, which is faster; `Planes` counts every link.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emulator.fabric.network import (
    Cut,
    Floats,
    Ints,
    Loads,
    blocks,
    over,
    parts_of,
    present,
    renamed,
    sums_by_tier,
)
from emulator.machines import Machine
from emulator.machines.wiring import wiring


class Bundles:
    """Switch planes of which nothing is broken: a die's lanes are one port, so are a node's
    uplinks.
    """

    symmetric = True
    whole = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.fabric = machine.fabric
        self.names = self.fabric.tier_names
        self.per_package = machine.num_dies // machine.packages
        self.per_node = machine.devices_per_node * machine.dies_per_device
        self.per_pod = machine.num_dies // machine.pods
        outer = [t.bytes_per_s for t in self.fabric.tiers if t.name in ("node", "pod")]
        self.spare = self.fabric.node_uplink_bytes_per_s >= self.per_node * max(outer)

    def index(self, name: str) -> int:
        """Index of the tier `name`; -2 if there is none."""
        return self.names.index(name) if name in self.names else -2

    def tier_between(self, a: Ints, b: Ints) -> Ints:
        inside, outside = self.index("node"), self.index("pod")
        tier = np.where(a // self.per_node == b // self.per_node, inside, outside)
        if "pods" in self.names:
            apart = a // self.per_pod != b // self.per_pod
            tier = np.where(apart, self.index("pods"), tier)
        if "package" in self.names:
            together = a // self.per_package == b // self.per_package
            tier = np.where(together, self.index("package"), tier)
        return np.where(a == b, -1, tier)

    def latency_s(self, src: Ints, dst: Ints, tier: Ints, reads: bool) -> float:
        tiers = [self.fabric.tiers[i] for i in present(tier)]
        return max(t.read_latency_s if reads else t.write_latency_s for t in tiers)

    def loads(self, src: Ints, dst: Ints, width: Floats, tier: Ints, rates: Floats) -> Loads:
        machine, fabric = self.machine, self.fabric
        seconds = width / rates[tier]
        found: Loads = []
        first = 0
        here = set(present(tier))
        for link in dict.fromkeys(t.link for t in fabric.tiers):
            carried = [i for i, t in enumerate(fabric.tiers) if t.link == link]
            if here & set(carried):
                on_link = slice(None) if here <= set(carried) else np.isin(tier, carried)
                for way, end in enumerate((src, dst)):
                    busy = np.bincount(end[on_link], weights=seconds[on_link])
                    found.append((first + way * machine.num_dies, busy))
            first += 2 * machine.num_dies
        between = tier == self.index("pod")
        if between.any():  # what leaves or enters a node shares its uplinks
            each = machine.dies_per_device / fabric.node_uplink_bytes_per_s
            for way, end in enumerate((src, dst)):
                slots = np.bincount(end[between] // self.per_node, weights=width[between])
                found.append((first + way * machine.num_nodes, slots * each))
        return found

    @property
    def enclosures(self) -> tuple[int, ...]:
        sizes = {"package": self.per_package, "node": self.per_node, "pod": self.per_pod}
        return (*(sizes[name] for name in self.names[:-1]), self.machine.num_dies)

    def exchange(
        self, senders: Ints, receivers: Ints, give: Floats, take: Floats, rates: Floats
    ) -> Loads | None:
        machine, fabric = self.machine, self.fabric
        ends = []
        for at, own, others, theirs in (
            (senders, give, receivers, take),
            (receivers, take, senders, give),
        ):
            ends.append((at, own * sums_by_tier(self.enclosures, others, theirs, at)))
        found: Loads = []
        first = 0
        for link in dict.fromkeys(t.link for t in fabric.tiers):
            carried = [i for i, t in enumerate(fabric.tiers) if t.link == link]
            for way, (at, slots) in enumerate(ends):
                seconds = sum(over(slots[i], np.full(len(at), rates[i])) for i in carried)
                found.append((first + way * machine.num_dies, np.bincount(at, weights=seconds)))
            first += 2 * machine.num_dies
        for tier, size, seconds_each in self.uplinks_s():
            for way, (at, slots) in enumerate(ends):
                leaving = np.bincount(at // size, weights=slots[tier])
                found.append((first + way * machine.num_nodes, leaving * seconds_each))
        return found

    def exchange_latency_s(self, senders: Ints, receivers: Ints, tiers: Ints, reads: bool) -> float:
        return self.latency_s(senders, receivers, tiers, reads)

    def lone_s(self, rates: Floats) -> Floats | None:
        return 1 / rates

    def rotation_s(self, ranks: Ints, by: int, rates: Floats) -> tuple[float, float] | None:
        return None

    def uplinks_s(self) -> list[tuple[int, int, float]]:
        if "pod" not in self.names:
            return []
        each = self.machine.dies_per_device / self.fabric.node_uplink_bytes_per_s
        return [(self.index("pod"), self.per_node, each)]

    def alike(self, src: Ints, dst: Ints) -> Ints | None:
        return self.tier_between(src, dst)

    def cuts(self, devices: tuple[int, ...]) -> list[Cut]:
        """Round each device, each package where it holds several, and each node."""
        machine = self.machine
        wires = wiring(machine)
        dies = machine.dies_per_device
        lanes = wires.lanes.sum(axis=2).max(axis=0)
        inside = np.repeat(wires.sio.max(axis=0), self.per_package)
        ports = lanes if dies > 1 else lanes + inside
        numbers = np.array(devices)
        rates = {tier.name: tier.bytes_per_s for tier in self.fabric.tiers}
        beside = rates.get("pods", 0.0)
        own = ports.reshape(-1, dies).sum(axis=1)[numbers] + dies * beside
        cuts: list[Cut] = [(list(range(len(devices))), own)]
        if dies < self.per_package:
            capacity = blocks(lanes + beside, self.per_package)
            cuts.append(parts_of(numbers * dies // self.per_package, capacity))
        if "pod" in self.names:
            uplinks = wires.uplinks.sum(axis=(2, 3)).max(axis=0)
            node_ports = blocks(lanes, self.per_node)
            capacity = np.minimum(uplinks, node_ports) + self.per_node * beside
            cuts.append(parts_of(numbers // machine.devices_per_node, capacity))
        if "pods" in self.names:
            capacity = np.full(machine.pods, self.per_pod * beside)
            cuts.append(parts_of(numbers * dies // self.per_pod, capacity))
        return cuts

    def pattern(self, devices: Ints) -> bytes:
        dies = devices * self.machine.dies_per_device
        sizes = (self.per_node, self.per_package, self.per_pod)
        return b"".join(renamed(dies // size) for size in sizes)


class Planes(Bundles):
    """Every lane and every uplink for itself."""

    symmetric = False
    whole = False

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.spare = False
        self.wires = wiring(machine)
        healthy = {t.name: t.bytes_per_s for t in self.fabric.tiers}
        self.port = max(healthy.get("node", 0.0), healthy.get("pod", 0.0))
        self.sio = healthy.get("package", 0.0)
        self.kind = self._kinds()

    def _kinds(self) -> Ints:
        """A label of each device, equal where its links and its node's are the same."""
        machine, wires = self.machine, self.wires
        devices = np.arange(machine.num_devices)
        dies = machine.dies_per_device
        tables = (
            wires.lanes.transpose(1, 0, 2).reshape(machine.num_devices, -1),
            wires.uplinks.transpose(1, 0, 2, 3).reshape(machine.num_nodes, -1)[
                devices // machine.devices_per_node
            ],
            wires.sio.T[devices * dies // self.per_package],
        )
        labels = [np.unique(t, axis=0, return_inverse=True)[1].reshape(-1) for t in tables]
        return np.stack(labels, axis=1)

    def tier_between(self, a: Ints, b: Ints) -> Ints:
        """As ever, but dies whose own link is dead meet in the node's switches."""
        tier = super().tier_between(a, b)
        package = self.index("package")
        if package < 0 or not (self.wires.sio == 0).any():
            return tier
        way = (a % self.per_package > b % self.per_package).astype(int)
        dead = self.wires.sio[way, a // self.per_package] == 0
        return np.where((tier == package) & dead, self.index("node"), tier)

    def loads(self, src: Ints, dst: Ints, width: Floats, tier: Ints, rates: Floats) -> Loads:
        lanes, sio = self.wires.lanes, self.wires.sio
        seconds = width / rates[tier]
        found: Loads = []
        package = self.index("package")
        if package >= 0:  # who has lost the link beside it is no faster for the way round
            round_ = (tier != package) & (src // self.per_package == dst // self.per_package)
            seconds = np.where(round_, np.maximum(seconds, width / rates[package]), seconds)
        beside = tier == package
        if beside.any():
            way = src[beside] > dst[beside]
            place = way * sio.shape[1] + src[beside] // self.per_package
            work = np.bincount(place, weights=seconds[beside], minlength=sio.size)
            found.append((0, over(work * self.sio, sio.reshape(-1))))
            away = ~beside
            src, dst, width, tier, seconds = (x[away] for x in (src, dst, width, tier, seconds))
        first = sio.size
        apart = tier == self.index("pods")
        if apart.any():  # through ports of their own, which no fault of the planes touches
            for end in (src, dst):
                work = np.bincount(end[apart], weights=seconds[apart], minlength=lanes.shape[1])
                found.append((first, work))
                first += lanes.shape[1]
            src, dst, width, tier, seconds = (x[~apart] for x in (src, dst, width, tier, seconds))
        if not len(src):
            return found
        first = sio.size + 2 * lanes.shape[1]
        between = tier == self.index("pod")
        share = self._plane_shares(src, dst, between)
        for way, end in enumerate((src, dst)):
            work = _per_column(end, seconds[:, None] * share, lanes.shape[1])
            found.append((first, over(work * self.port, lanes[way]).reshape(-1)))
            first += lanes[way].size
        if between.any():
            moved = width[between, None] * share[between]
            found += self._uplink_loads(src[between], dst[between], moved, first)
        return found

    def alike(self, src: Ints, dst: Ints) -> Ints | None:
        return None

    def pattern(self, devices: Ints) -> bytes:
        """Also which devices and nodes have the same things wrong."""
        return super().pattern(devices) + self.kind[devices].tobytes()

    def _plane_shares(self, src: Ints, dst: Ints, between: NDArray[np.bool_]) -> Floats:
        """Part of each transfer's bytes in each plane."""
        path = np.minimum(self.wires.lanes[0, src], self.wires.lanes[1, dst])
        if between.any():
            pair, which = self._node_pairs(src[between], dst[between])
            through = self._switch_paths(pair).sum(axis=2) / self.per_node
            path[between] = np.minimum(path[between], through[which])
        total = path.sum(axis=1)
        if (total == 0).any():
            i = int(np.argmin(total))
            a, b = (int(end[i]) // self.machine.dies_per_device for end in (src, dst))
            raise ValueError(
                f"device {b} is cut off from device {a} of this {self.machine.name}: no plane with "
                f"a live path is left (die {int(src[i])} to die {int(dst[i])}); "
                f"{'; '.join(self.machine.faults.describe()[:4])}"
            )
        return path / total[:, None]

    def _node_pairs(self, src: Ints, dst: Ints) -> tuple[Ints, Ints]:
        """The distinct (from, to) pairs of nodes [pair, 2], and the pair of each transfer."""
        nodes = self.machine.num_nodes
        code = src // self.per_node * nodes + dst // self.per_node
        codes, which = np.unique(code, return_inverse=True)
        return np.stack([codes // nodes, codes % nodes], axis=1), which.reshape(-1)

    def _switch_paths(self, pair: Ints) -> Floats:
        """Bytes per second through each second-level switch [pair, plane, switch]."""
        uplinks = self.wires.uplinks
        return np.minimum(uplinks[0, pair[:, 0]], uplinks[1, pair[:, 1]])

    def _uplink_loads(self, src: Ints, dst: Ints, moved: Floats, first: int) -> Loads:
        """`moved` [transfer, plane] over the second-level switches."""
        pair, which = self._node_pairs(src, dst)
        paths = self._switch_paths(pair)
        total = paths.sum(axis=2, keepdims=True)
        share = np.divide(paths, total, out=np.zeros_like(paths), where=total > 0)
        bytes_ = _per_column(which, moved, len(pair))[:, :, None] * share
        found: Loads = []
        uplinks = self.wires.uplinks
        for way in (0, 1):
            load = np.zeros(uplinks[way].shape)
            np.add.at(load, pair[:, way], bytes_)
            found.append((first, over(load, uplinks[way]).reshape(-1)))
            first += uplinks[way].size
        return found


def _per_column(place: Ints, values: Floats, count: int) -> Floats:
    """Sums of rows of `values` [row, column] by `place` [row]: [count, column]."""
    columns = [np.bincount(place, weights=column, minlength=count) for column in values.T]
    return np.stack(columns, axis=1)
