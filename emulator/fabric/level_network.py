"""Routes on a user's own fabric: the shortest way in the order of the levels, the innermost first.

A transfer between blocks of a direct level (full mesh, ring, mesh, torus) first goes, inside its
own block, to the place of its destination there, and then along that level: the shortest way, in a
mesh or torus one dimension after the other, half each way round where both are as short. Between
blocks of a switch level it goes straight through the switch, spread over the planes by what the
path can carry in each. Slow direct links keep their traffic; a transfer whose way is cut takes the
fewest hops over what is left (`Detours`). Such a way may be less crowded than the ordinary one was,
but nothing is faster for a fault: the loads of the ordinary ways count too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.fabric.detours import Detours
from emulator.fabric.level_exchange import exchange_latency_s, exchange_work
from emulator.fabric.level_rotation import busiest_s, farthest_s
from emulator.fabric.network import Cut, Floats, Ints, Loads, blocks, over, parts_of, renamed
from emulator.machines import Machine
from emulator.machines.faults import NONE
from emulator.machines.level_wiring import LevelWires, Wires, level_wires

# Told which links carry which part of which transfers: (transfers, links, parts).
Visit = Callable[[Ints, Ints, Floats | float], None]

_NOTHING = 1e-9  # relative to the largest transfer, whose smallest part is a half


class LevelNetwork:
    """The network of a machine whose fabric has levels; one die is one device."""

    symmetric = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.wires = level_wires(machine)
        self.levels = self.wires.levels
        healthy = dataclasses.replace(machine, faults=NONE) if machine.faults else machine
        self.before = level_wires(healthy)
        self.faulty = machine.faults.in_fabric or bool(machine.faults.missing)
        self.dead = bool(((self.wires.capacity == 0) & (self.before.capacity > 0)).any())
        self.detours = Detours(machine, self.wires)
        self.limits = np.array([tier.bytes_per_s for tier in machine.fabric.tiers])
        self.whole = not self.faulty and not machine.fabric.overrides
        self.switched = self.levels[0].level.kind in ("full_mesh", "switch") and all(
            part.level.kind == "switch" for part in self.levels[1:]
        )
        self.spare = (
            not self.dead and self.switched and all(part.level.taper == 1 for part in self.levels)
        )

    def tier_between(self, a: Ints, b: Ints) -> Ints:
        tier = np.full(a.shape, -1)
        for k, part in enumerate(self.levels):
            tier = np.where(a // part.inner != b // part.inner, k, tier)
        return tier

    def latency_s(self, src: Ints, dst: Ints, tier: Ints, reads: bool) -> float:
        seconds = np.zeros(len(src))
        for part, which, a, b in self._segments(src, dst):
            seconds[which] += _hops(part, a, b) * part.level.latency_s
        farthest = float(seconds.max())
        for i in self._cut(src, dst):
            farthest = max(farthest, self.detours.way(int(src[i]), int(dst[i]))[1])
        return farthest

    def loads(self, src: Ints, dst: Ints, width: Floats, tier: Ints, rates: Floats) -> Loads:
        weight = width * (self.limits / rates)[tier]
        ordinary = self._work(self.before, src, dst, weight)
        if not self.faulty:
            return [(0, over(ordinary, self.wires.capacity))]
        cut = self._cut(src, dst)
        rest = np.ones(len(src), bool)
        rest[cut] = False
        work = self._work(self.wires, src[rest], dst[rest], weight[rest])
        for i in cut:
            way, _ = self.detours.way(int(src[i]), int(dst[i]))
            np.add.at(work, way, weight[i])
        count = len(work)
        return [
            (0, over(work, self.wires.capacity)),
            (count, over(ordinary, self.before.capacity)),
        ]

    def cuts(self, devices: tuple[int, ...]) -> list[Cut]:
        """Round each device, and round each block of each level below the outermost."""
        numbers = np.array(devices)
        found: list[Cut] = []
        sizes = dict.fromkeys([1, *(part.inner for part in self.levels)])
        for size in sizes:
            crossing = np.zeros(-(-self.machine.num_devices // size))
            for part in self.levels:
                if part.inner < size:
                    continue
                leaving = blocks(_leaving(part), size)
                if part.inner == size and part.uplinks.size:
                    leaving = np.minimum(leaving, part.uplinks.sum(axis=2).max(axis=0))
                crossing += leaving
            found.append(parts_of(numbers // size, crossing))
        return found

    def pattern(self, devices: Ints) -> bytes:
        """Groups that a symmetry of the levels turns into one another; with faults or links of
        their own rates, only equal ones.
        """
        if self.faulty or self.machine.fabric.overrides:
            return devices.tobytes()
        found = b""
        for part in self.levels:
            kind, digit = part.level.kind, devices // part.inner
            if kind in ("full_mesh", "switch"):
                # Where levels further out are direct, the way to another block begins with the way
                # to its destination's place in one's own: a place is the same in all blocks.
                found += renamed(digit if self.switched else digit % part.level.size)
            elif kind == "mesh":
                found += (digit % part.level.size).tobytes() + renamed(digit // part.level.size)
            else:
                stride = 1
                for size in part.level.sizes:
                    at = digit // stride % size
                    found += ((at - at[0]) % size).tobytes()
                    stride *= size
                found += renamed(digit // stride)
        return found

    def alike(self, src: Ints, dst: Ints) -> Ints | None:
        """By how far each digit moves."""
        if not self.whole:
            return None
        code = np.zeros(len(src), np.int64)
        for part in self.levels:
            kind, stride = part.level.kind, part.inner
            for size in part.level.sizes:
                moved = dst // stride % size - src // stride % size
                if kind in ("full_mesh", "switch"):
                    moved = (moved != 0).astype(np.int64)
                code = code * (2 * size) + (moved if kind == "mesh" else moved % size) + size
                stride *= size
        return code

    @property
    def enclosures(self) -> tuple[int, ...]:
        return tuple(part.inner * part.level.size for part in self.levels)

    def exchange(
        self, senders: Ints, receivers: Ints, give: Floats, take: Floats, rates: Floats
    ) -> Loads | None:
        if not np.array_equal(rates, self.limits):  # bytes would weigh differently by tier
            return None
        count = self.machine.num_devices
        work = exchange_work(self.wires, senders, receivers, give, take, count)
        return [(0, over(work, self.wires.capacity))]

    def exchange_latency_s(self, senders: Ints, receivers: Ints, tiers: Ints, reads: bool) -> float:
        if self.switched:
            return max(self.levels[i].level.latency_s for i in tiers)
        return exchange_latency_s(self.wires, senders, receivers, self.machine.num_devices)

    def lone_s(self, rates: Floats) -> Floats | None:
        return 1 / rates if self.switched else None

    def rotation_s(self, ranks: Ints, by: int, rates: Floats) -> tuple[float, float] | None:
        direct = all(part.level.kind != "switch" for part in self.levels)
        every = np.arange(self.machine.num_devices)
        if not direct or not np.array_equal(rates, self.limits):
            return None
        if not np.array_equal(ranks, every[None]):
            return None
        return busiest_s(self.wires, by), farthest_s(self.wires, by)

    def uplinks_s(self) -> list[tuple[int, int, float]]:
        return [
            (k, part.inner, 1 / float(part.uplinks[0, 0].sum()))
            for k, part in enumerate(self.levels)
            if part.uplinks.size
        ]

    def _work(self, wires: Wires, src: Ints, dst: Ints, weight: Floats) -> Floats:
        """Bytes (of a slot) over each link by the ordinary ways."""
        work = np.zeros(len(wires.capacity))

        def add(which: Ints, links: Ints, part: Floats | float) -> None:
            nonlocal work
            work += np.bincount(links, weights=weight[which] * part, minlength=len(work))

        for part, which, a, b in self._segments(src, dst):
            level = wires.levels[self.levels.index(part)]
            if part.level.kind in ("full_mesh", "switch"):
                _visit(level, which, a, b, add)
            else:
                _add_along(level, work, a, b, weight[which])
        return work

    def _cut(self, src: Ints, dst: Ints) -> Ints:
        """Transfers whose ordinary way is dead somewhere."""
        cut = np.zeros(len(src), bool)
        if not self.dead:
            return np.flatnonzero(cut)

        def look(which: Ints, links: Ints, part: Floats | float) -> None:
            cut[which[(self.wires.capacity[links] == 0) & (part > 0)]] = True

        for part, which, a, b in self._segments(src, dst):
            if part.level.kind == "switch":
                cut[which[_plane_paths(part, a, b).sum(axis=1) == 0]] = True
            elif part.level.kind == "full_mesh":
                _visit(part, which, a, b, look)
            else:
                cut[which[_dead_along(part, a, b)]] = True
        return np.flatnonzero(cut)

    def _segments(self, src: Ints, dst: Ints) -> Iterator[tuple[LevelWires, Ints, Ints, Ints]]:
        """(level, transfers, from, to): the stretch of each transfer on each level, the last
        first.
        """
        which, a, b = np.arange(len(src)), src, dst
        for part in reversed(self.levels):
            here = a // part.inner != b // part.inner
            if not here.any():
                continue
            if part.level.kind == "switch":
                yield part, which[here], a[here], b[here]
                which, a, b = which[~here], a[~here], b[~here]
                continue
            # The stretch begins in the block of `a`, at the place of `b`.
            enter = np.where(here, a - a % part.inner + b % part.inner, b)
            yield part, which[here], enter[here], b[here]
            b = enter


def _hops(part: LevelWires, a: Ints, b: Ints) -> Floats:
    """How many of a level's hops lie between a and b."""
    if part.level.kind in ("full_mesh", "switch"):
        return np.ones(len(a))
    hops = np.zeros(len(a))
    stride = part.inner
    for size in part.level.sizes:
        apart = np.abs(a // stride % size - b // stride % size)
        hops += apart if part.level.kind == "mesh" else np.minimum(apart, size - apart)
        stride *= size
    return hops


def _visit(part: LevelWires, which: Ints, a: Ints, b: Ints, visit: Visit) -> None:
    """Tells `visit` the links of a full mesh or a switch between a and b."""
    if part.level.kind == "switch":
        _through_switch(part, which, a, b, visit)
    else:
        slots = part.to.shape[1]
        visit(which, part.first + a * slots + b // part.inner % part.level.size, 1.0)


# Stretches of lines: (slot, stride and size of the dimension, transfers, the line's device at place
# 0, first place that sends, hops, part of the bytes). Backwards, the place sends to the one before.
Stretch = tuple[int, int, int, Ints, Ints, Ints, Ints, Floats]


def _stretches(part: LevelWires, a: Ints, b: Ints) -> Iterator[Stretch]:
    """The ways from a to b along the dimensions of a ring, mesh or torus, the first dimension
    first.
    """
    stride = part.inner
    for d, size in enumerate(part.level.sizes):
        i, j = a // stride % size, b // stride % size
        forward = (j - i) % size
        if part.level.kind == "mesh":
            shares = (j > i, j < i)
        else:
            both = (2 * forward == size) & (size > 2)
            ahead = 2 * forward <= size
            shares = (np.where(both, 0.5, ahead), np.where(both, 0.5, ~ahead))
        base = a - i * stride
        for way, (hops, share) in enumerate(zip((forward, (i - j) % size), shares, strict=True)):
            part_of = np.asarray(share, float) * (hops > 0)
            on = np.flatnonzero(part_of)
            if len(on):
                yield 2 * d + way, stride, size, on, base[on], i[on], hops[on], part_of[on]
        a = base + j * stride
        stride *= size


def _add_along(part: LevelWires, work: Floats, a: Ints, b: Ints, weight: Floats) -> None:
    """Adds each transfer's bytes to the links on its way: what begins and ends at each place of a
    line, summed along it.
    """
    table = work[part.first : part.first + part.to.size].reshape(part.to.shape)
    for slot, stride, size, on, base, at, hops, share in _stretches(part, a, b):
        line, bytes_ = _line(base, stride, size), weight[on] * share
        first = at if slot % 2 == 0 else size - 1 - at  # backwards, places count from the end
        end = first + hops
        wide, count = line * (size + 1), len(table) // size * (size + 1)
        change = np.bincount(wide + first, weights=bytes_, minlength=count)
        change -= np.bincount(wide + np.minimum(end, size), weights=bytes_, minlength=count)
        if (end > size).any():  # round the end
            round_ = end > size
            again, more = wide[round_], bytes_[round_]
            change += np.bincount(again, weights=more, minlength=count)
            change -= np.bincount(again + end[round_] - size, weights=more, minlength=count)
        carried = np.cumsum(change.reshape(-1, size + 1)[:, :-1], axis=1)
        # Sums that come back to nothing may leave the rounding of their parts.
        carried[carried < _NOTHING * bytes_.max()] = 0.0
        table[:, slot] += _by_device(carried[:, ::-1] if slot % 2 else carried, stride)


def _dead_along(part: LevelWires, a: Ints, b: Ints) -> NDArray[np.bool_]:
    """Whether a dead link lies on the way."""
    dead = np.zeros(len(a), bool)
    for slot, stride, size, on, base, at, hops, _ in _stretches(part, a, b):
        broken = _by_line(part.links[:, slot] == 0, stride, size)
        if slot % 2:
            broken, at = broken[:, ::-1], size - 1 - at
        upto = np.zeros((len(broken), 2 * size + 1), int)
        upto[:, 1:] = np.cumsum(np.concatenate([broken, broken], axis=1), axis=1)
        line = _line(base, stride, size)
        dead[on] |= upto[line, at + hops] > upto[line, at]
    return dead


def _line(base: Ints, stride: int, size: int) -> Ints:
    """The number of the line that begins at device `base`."""
    return base // (stride * size) * stride + base % stride


def _by_line(values: NDArray[Any], stride: int, size: int) -> NDArray[Any]:
    """Values of all devices as [line, place]."""
    return np.moveaxis(values.reshape(-1, size, stride), 1, 2).reshape(-1, size)


def _by_device(values: NDArray[Any], stride: int) -> NDArray[Any]:
    """`_by_line` turned back."""
    return np.moveaxis(values.reshape(-1, stride, values.shape[1]), 1, 2).reshape(-1)


def _plane_paths(part: LevelWires, a: Ints, b: Ints) -> Floats:
    """Bytes per second between a and b in each plane, with a fair part of the uplinks."""
    path = np.minimum(part.ports[0, a], part.ports[1, b])
    if part.uplinks.size:
        for way, end in enumerate((a, b)):
            path = np.minimum(path, part.uplinks[way, end // part.inner] / part.inner)
    return path


def _through_switch(part: LevelWires, which: Ints, a: Ints, b: Ints, visit: Visit) -> None:
    planes = part.level.planes
    shares: Sequence[Floats | float] = [1 / planes] * planes
    if any(np.ptp(table) for table in (part.ports, part.uplinks) if table.size):
        path = _plane_paths(part, a, b)
        total = path.sum(axis=1, keepdims=True)
        shares = np.divide(path, total, out=np.zeros_like(path), where=total > 0).T
    for plane in range(planes):
        first = part.first
        for table, ends in (
            (part.ports, (a, b)),
            (part.uplinks, (a // part.inner, b // part.inner)),
        ):
            for end in ends if table.size else ():
                visit(which, first + end * planes + plane, shares[plane])
                first += table[0].size


def _leaving(part: LevelWires) -> Floats:
    """Bytes per second of the level's links that leave (or enter, if more) each device."""
    if part.level.kind == "switch":
        return part.ports.sum(axis=2).max(axis=0)
    there = part.to >= 0
    entering = np.bincount(part.to[there], weights=part.links[there], minlength=len(part.to))
    return np.maximum((part.links * there).sum(axis=1), entering)
