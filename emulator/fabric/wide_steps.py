"""Steps of very many transfers on the links of a machine, without listing the transfers.

`load_listed` is the definition: every transfer of a step, in parts of bounded size. Everything else
here comes to the same numbers more quickly: an exchange between all pairs from sums over who shares
a package, a node, a pod; rotations of the same ranks together; the steps of a chain from the few
that differ. Where a network has faults or links of their own rates the definition is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from emulator.collectives.schedule import Wide
from emulator.collectives.traffic import Chain, Exchange, Ints, Shift, Traffic
from emulator.fabric.network import Floats, Loads, sums_by_tier
from emulator.fabric.routes import network_of
from emulator.fabric.steps import (
    StepLoad,
    check_reach,
    link_loads,
    message_costs,
    reached,
    starts_of,
    steady,
)
from emulator.machines import Machine
from emulator.machines.fabric import Transport

_AT_A_TIME = 2**18  # transfers that are listed together


class StepSum:
    """What the parts of one step load, all together."""

    def __init__(self, machine: Machine, transport: Transport) -> None:
        self.machine = machine
        self.transport = transport
        self.network = network_of(machine)
        self.copies = 1 if self.network.symmetric else machine.dies_per_device
        self.loads: dict[int, Floats] = {}
        self.added = np.zeros(machine.num_dies)
        self.starts = np.zeros(machine.num_dies)
        self.pairs: list[Ints] = []  # source << 32 | destination of what was listed
        self.slots = np.zeros(len(machine.fabric.tiers))
        self.latency_s = 0.0
        self.empty = True

    def transfers(self, src: Ints, dst: Ints, width: Floats, reduce: bool | Ints) -> None:
        """Adds transfers between dies."""
        tier = self.network.tier_between(src, dst)
        away = tier >= 0
        if not away.any():
            return
        src, dst, width, tier = src[away], dst[away], width[away].astype(float), tier[away]
        adding = np.broadcast_to(reduce, away.shape)[away]
        self._loads(link_loads(self.machine, (src, dst, tier, width, adding), self.transport))
        count = self.machine.num_dies
        if adding.any():
            self.added += np.bincount(dst[adding], weights=width[adding], minlength=count)
        if self.transport.message_s:
            self.pairs.append(np.unique(src.astype(np.int64) << 32 | dst))
        slots = np.bincount(tier, weights=width, minlength=len(self.slots))
        latency_s = self.network.latency_s(src, dst, tier, self.transport.reads)
        self._crossed(slots / self.copies, latency_s)

    def exchange(self, item: Exchange, dies: Ints) -> bool:
        """Adds an exchange at once, if the network can tell; rank i is die `dies[i]`."""
        if not self.network.whole:
            return False
        senders, receivers = dies[item.senders], dies[item.receivers]
        sizes, costs = self.network.enclosures, message_costs(self.transport, self.machine)
        give, take = item.give.astype(float), item.take.astype(float)
        slots = sums_by_tier(sizes, receivers, take, senders) @ give
        tiers = np.flatnonzero(slots)
        if not len(tiers):
            return True
        check_reach(self.machine, self.transport, tiers)
        rates = reached(self.machine, self.transport)
        loads = self.network.exchange(senders, receivers, give, take, rates)
        if loads is None:
            return False
        self._loads(loads)
        if item.reduce:
            given = sums_by_tier(sizes, senders, give, receivers)
            np.add.at(self.added, receivers, take * given.sum(axis=0))
        some, others = senders[give > 0], receivers[take > 0]
        if costs.any():
            ends = (others, some) if self.transport.reads else (some, others)
            many = sums_by_tier(sizes, ends[1], np.ones(len(ends[1])), ends[0])
            np.add.at(self.starts, ends[0], costs @ many)
        reads = self.transport.reads
        self._crossed(slots, self.network.exchange_latency_s(some, others, tiers, reads))
        return True

    def step(self) -> StepLoad | None:
        """The step; None if nothing leaves a die."""
        if self.empty:
            return None
        if self.pairs:
            pairs = np.unique(np.concatenate(self.pairs))
            src, dst = pairs >> 32, pairs & 0xFFFFFFFF
            tier = self.network.tier_between(src, dst)
            starts = starts_of(src, dst, tier, self.transport, self.machine)
            self.starts[: len(starts)] += starts
            self.pairs = []
        names = self.machine.fabric.tier_names
        slots = np.rint(self.slots).astype(int)
        return StepLoad(
            repeat=1,
            port_s=steady(max(float(busy.max()) for busy in self.loads.values())),
            added=int(self.added.max()),
            latency_s=self.latency_s,
            message_s=steady(float(self.starts.max())),
            tier_slots=tuple((names[i], int(slots[i])) for i in np.flatnonzero(slots)),
        )

    def _loads(self, loads: Loads) -> None:
        for first, busy in loads:
            known = self.loads.get(first)
            if known is None:
                self.loads[first] = busy.astype(float)
            elif len(known) >= len(busy):
                known[: len(busy)] += busy
            else:
                longer = busy.astype(float)
                longer[: len(known)] += known
                self.loads[first] = longer

    def _crossed(self, slots: Floats, latency_s: float) -> None:
        self.slots += slots
        self.latency_s = max(self.latency_s, latency_s)
        self.empty = False


def load_listed(
    traffic: Iterable[Traffic], machine: Machine, dies: Ints, transport: Transport
) -> StepLoad | None:
    """A step of `traffic`, transfer by transfer. Rank i is die `dies[i]`, and on a network that is
    not symmetric also the other dies of that device.
    """
    total = StepSum(machine, transport)
    _list(traffic, total, dies)
    return total.step()


def _list(traffic: Iterable[Traffic], total: StepSum, dies: Ints) -> None:
    """Adds the transfers of all of `traffic`, many at a time."""
    waiting: list[tuple[Ints, ...]] = []

    def add() -> None:
        src, dst, width, reduce = (np.concatenate(x) for x in zip(*waiting, strict=True))
        for place in range(total.copies):
            total.transfers(dies[src] + place, dies[dst] + place, width, reduce)
        waiting.clear()

    for item in traffic:
        for src, dst, width in item.listed():
            waiting.append((src, dst, width, np.broadcast_to(item.reduce, src.shape)))
            if sum(len(part[0]) for part in waiting) > _AT_A_TIME:
                add()
    if waiting:
        add()


class WideSteps:
    """The wide steps of one Schedule; what several have in common is found once."""

    def __init__(self, machine: Machine, dies: Ints, transport: Transport) -> None:
        self.machine = machine
        self.dies = dies
        self.transport = transport
        # Of the ranks that rotated last, and of each chain by the identity of its ranks, which it
        # therefore keeps.
        self._shifts: Shifts | None = None
        self._chains: dict[int, Chains] = {}

    def load(self, part: Wide) -> StepLoad | None:
        """What the step loads; None if nothing leaves a die."""
        shifts = [item for item in part.traffic if isinstance(item, Shift)]
        kinds = {(item.by, item.width, item.reduce, item.ranks.shape[1]) for item in shifts}
        if len(kinds) == 1 and len(shifts) == len(part.traffic):
            parts = [item.ranks for item in shifts]
            ranks = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if self._shifts is None or not self._shifts.are_of(ranks):
                self._shifts = Shifts(self.machine, self.dies, self.transport, ranks)
            return self._shifts.load(shifts[0].by, shifts[0].width, shifts[0].reduce)
        if len(part.traffic) == 1 and isinstance(chain := part.traffic[0], Chain):
            known = self._chains.get(id(chain.ranks))
            if known is None:
                known = Chains(self.machine, self.dies, self.transport, chain)
                self._chains[id(chain.ranks)] = known
            return known.load(chain)
        traffic = _merged(part.traffic)
        total = StepSum(self.machine, self.transport)
        if not self.transport.message_s or _apart(traffic):
            traffic = [
                item
                for item in traffic
                if not (isinstance(item, Exchange) and total.exchange(item, self.dies))
            ]
        _list(traffic, total, self.dies)
        return total.step()


def _merged(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Exchanges in which the same ranks give as much to the same others as one: what goes from one
    rank to another in a step is one message.
    """
    known: dict[tuple[Any, ...], Exchange] = {}
    merged: list[Traffic] = []
    for item in traffic:
        if not isinstance(item, Exchange):
            merged.append(item)
            continue
        arrays = item.senders, item.receivers, item.give
        key = (item.reduce, *(array.tobytes() for array in arrays))
        before = known.get(key)
        take = item.take if before is None else before.take + item.take
        known[key] = dataclasses.replace(item, take=take)
    return [*known.values(), *merged]


def _apart(traffic: Sequence[Traffic]) -> bool:
    """Whether no two exchanges (nor one and what is listed) go from one rank to the same other."""
    exchanges = [item for item in traffic if isinstance(item, Exchange)]
    if not exchanges:
        return True
    senders = [np.unique(item.senders[item.give > 0]) for item in exchanges]
    receivers = [np.unique(item.receivers[item.take > 0]) for item in exchanges]
    if not any(_all_different(ends) for ends in (senders, receivers)):
        return False
    for item in traffic:
        for src, dst, _ in () if isinstance(item, Exchange) else item.listed():
            if np.isin(src, np.concatenate(senders))[np.isin(dst, np.concatenate(receivers))].any():
                return False
    return True


def _all_different(groups: Sequence[Ints]) -> bool:
    """Whether no rank is in two of `groups`."""
    every = np.concatenate(groups)
    return len(np.unique(every)) == len(every)


class Shifts:
    """Rotations of the same ranks [group, position] by any number of positions."""

    def __init__(self, machine: Machine, dies: Ints, transport: Transport, ranks: Ints) -> None:
        self.machine = machine
        self.dies = dies
        self.transport = transport
        self.ranks = ranks
        self._units: dict[tuple[int, bool], StepLoad | None] = {}
        network = network_of(machine)
        self.network = network
        self.rates = reached(machine, transport)
        self.places = dies[ranks]
        ports_s = network.lone_s(self.rates) if network.whole else None
        if len(np.unique(ranks)) < ranks.size:  # a rank in two groups shares its port
            ports_s = None
        self.ports_s = None if ports_s is None else ports_s.tolist()
        self.names = machine.fabric.tier_names
        self.costs = message_costs(transport, machine).tolist()
        self.latencies = [
            t.read_latency_s if transport.reads else t.write_latency_s for t in machine.fabric.tiers
        ]
        # Who shares what encloses a tier, twice in a row so that a rotation is a window.
        self.labels: list[Ints] = []
        self.uplinks: list[tuple[int, float, Ints]] = []
        if network.whole:
            self.labels = [_twice(self.places // size) for size in network.enclosures[:-1]]
            self.uplinks = [
                (tier, seconds, _twice(self.places // size))
                for tier, size, seconds in network.uplinks_s()
            ]

    def are_of(self, ranks: Ints) -> bool:
        """Whether these are rotations of `ranks`."""
        return ranks is self.ranks or np.array_equal(ranks, self.ranks)

    def load(self, by: int, width: int, reduce: bool) -> StepLoad | None:
        """The step in which each rank sends `width` slots to the one `by` positions further."""
        key = (by % self.ranks.shape[1], reduce)
        if key not in self._units:
            self._units[key] = self._unit(*key)
        unit = self._units[key]
        if unit is None or width == 1:
            return unit
        return dataclasses.replace(
            unit,
            port_s=steady(unit.port_s * width),
            added=unit.added * width,
            tier_slots=tuple((name, slots * width) for name, slots in unit.tier_slots),
        )

    def _unit(self, by: int, reduce: bool) -> StepLoad | None:
        if by == 0:
            return None
        known = None
        if self.network.whole and self.ports_s is None:
            known = self.network.rotation_s(self.places, by, self.rates)
        if self.ports_s is None and known is None:
            step = Shift(self.ranks, by, 1, reduce)
            return load_listed((step,), self.machine, self.dies, self.transport)
        m = self.ranks.shape[1]
        inside = [labels[:, :m] == labels[:, by : by + m] for labels in self.labels]
        together = [*(int(np.count_nonzero(same)) for same in inside), self.ranks.size]
        slots = [now - before for before, now in zip([0, *together], together, strict=False)]
        tiers = [i for i, count in enumerate(slots) if count]
        check_reach(self.machine, self.transport, tiers)
        port_s, latency_s = known or self._ends_s(by, inside, slots, tiers)
        return StepLoad(
            repeat=1,
            port_s=steady(port_s),
            added=int(reduce),
            latency_s=latency_s,
            message_s=steady(max(self.costs[i] for i in tiers)),
            tier_slots=tuple((self.names[i], slots[i]) for i in tiers),
        )

    def _ends_s(
        self, by: int, inside: list[Ints], slots: list[int], tiers: list[int]
    ) -> tuple[float, float]:
        """(seconds per byte of the busiest link, latency) where transfers share only uplinks."""
        assert self.ports_s is not None  # asked for by `_unit` only then
        m = self.ranks.shape[1]
        port_s = max(self.ports_s[i] for i in tiers)
        for tier, seconds, labels in self.uplinks:
            if slots[tier]:
                away = ~inside[tier - 1] if tier else np.ones(self.ranks.shape, bool)
                if tier < len(inside):
                    away &= inside[tier]
                for ends in (labels[:, :m], labels[:, by : by + m]):
                    port_s = max(port_s, float(np.bincount(ends[away]).max()) * seconds)
        return port_s, max(self.latencies[i] for i in tiers)


def _twice(table: Ints) -> Ints:
    """The columns, and once more."""
    return np.concatenate([table, table], axis=1).astype(np.int32)


class Chains:
    """The steps of a chain: stretches of its hops.

    All that a step costs grows with the stretch, so of two stretches that begin (or end) alike and
    cost the same, those between them cost the same too: few have to be looked at.
    """

    def __init__(self, machine: Machine, dies: Ints, transport: Transport, chain: Chain) -> None:
        self.machine = machine
        self.dies = dies
        self.transport = transport
        self.chain = chain
        self.hops = len(chain.ranks) - 1
        self._lone: dict[int, StepLoad | None] = {}
        self._ends: dict[bool, list[StepLoad | None]] = {}
        network = network_of(machine)
        src, dst = dies[chain.ranks[:-1]], dies[chain.ranks[1:]]
        self.kinds = network.alike(src, dst)
        copies = 1 if network.symmetric else machine.dies_per_device
        tier = np.stack([network.tier_between(src + i, dst + i) for i in range(copies)])
        names = machine.fabric.tier_names
        self.before = [
            np.concatenate([[0], np.cumsum((tier == i).sum(axis=0))]) // copies
            for i in range(len(names))
        ]

    def load(self, step: Chain) -> StepLoad | None:
        """The hops from `step.first` to `step.last`."""
        first, last = step.first, step.last
        if first == last:
            found = self._one(first)
        elif first == 0 or last == self.hops - 1:
            found = self._from_an_end(first == 0)[last if first == 0 else first]
        else:
            found = self._listed(first, last)
        if found is None:
            return None
        crossed = (
            (name, int(before[last + 1] - before[first]))
            for name, before in zip(self.machine.fabric.tier_names, self.before, strict=True)
        )
        return dataclasses.replace(found, tier_slots=tuple(x for x in crossed if x[1]))

    def _listed(self, first: int, last: int) -> StepLoad | None:
        step = dataclasses.replace(self.chain, first=first, last=last)
        found = load_listed((step,), self.machine, self.dies, self.transport)
        return None if found is None else dataclasses.replace(found, tier_slots=())

    def _one(self, hop: int) -> StepLoad | None:
        kind = hop if self.kinds is None else int(self.kinds[hop])
        if kind not in self._lone:
            self._lone[kind] = self._listed(hop, hop)
        return self._lone[kind]

    def _from_an_end(self, first: bool) -> list[StepLoad | None]:
        """The stretches from the first hop to each, or from each to the last."""
        if first in self._ends:
            return self._ends[first]
        found: list[StepLoad | None] = [None] * self.hops
        last = self.hops - 1

        def look(hop: int) -> StepLoad | None:
            found[hop] = self._listed(0, hop) if first else self._listed(hop, last)
            return found[hop]

        between = [(0, last, look(0), look(last))]
        while between:
            low, high, at_low, at_high = between.pop()
            if at_low == at_high:
                found[low : high + 1] = [at_low] * (high + 1 - low)
            elif high - low > 1:
                middle = (low + high) // 2
                at_middle = look(middle)
                between += [(low, middle, at_low, at_middle), (middle, high, at_middle, at_high)]
        self._ends[first] = found
        return found
