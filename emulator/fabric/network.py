"""What a network is to the rest of the room: links, what transfers load them with, and cuts."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
Floats = NDArray[Any]

# Seconds of work per byte of a slot on consecutive links, from a first link number on.
Loads = list[tuple[int, Floats]]
Cut = tuple[list[int], Floats]


class Network(Protocol):
    """The links of one machine. Arrays run over transfers between dies.

    `symmetric`: the dies of a device are loaded alike, so those in the first place stand for all.
    `spare`: nothing but a die's own port limits it, whatever else runs.
    `whole`: nothing is broken and no link has a rate of its own; `enclosures` and what stands below
    it are meant for such networks only.
    """

    symmetric: bool
    spare: bool
    whole: bool

    def tier_between(self, a: Ints, b: Ints) -> Ints:
        """Index in `fabric.tiers` of what joins each pair; -1 for a die and itself."""
        ...

    def latency_s(self, src: Ints, dst: Ints, tier: Ints, reads: bool) -> float:
        """That of the farthest transfer."""
        ...

    def loads(self, src: Ints, dst: Ints, width: Floats, tier: Ints, rates: Floats) -> Loads:
        """How long each link works; `rates` [tier] is what a transport reaches of a die's port."""
        ...

    def cuts(self, devices: tuple[int, ...]) -> list[Cut]:
        """Ways to divide devices into parts: the part of each, and what each part can send or
        receive, in bytes per second.
        """
        ...

    def pattern(self, devices: Ints) -> bytes:
        """Equal for devices in rank order among which every collective takes equally long."""
        ...

    def alike(self, src: Ints, dst: Ints) -> Ints | None:
        """A number for each transfer, equal for those that alone take equally long; None where
        that cannot be told.
        """
        ...

    @property
    def enclosures(self) -> tuple[int, ...]:
        """How many dies share what encloses each tier, the innermost first."""
        ...

    def exchange(
        self, senders: Ints, receivers: Ints, give: Floats, take: Floats, rates: Floats
    ) -> Loads | None:
        """`loads` where each of `senders` sends give x take slots to every other of `receivers`,
        no die twice in either; None where only single transfers tell.
        """
        ...

    def exchange_latency_s(self, senders: Ints, receivers: Ints, tiers: Ints, reads: bool) -> float:
        """That of the farthest transfer of such an exchange, which crosses `tiers`."""
        ...

    def lone_s(self, rates: Floats) -> Floats | None:
        """Seconds per byte for which a transfer keeps its own links busy, by tier, where no two
        transfers with different ends share any but uplinks; None if they may.
        """
        ...

    def rotation_s(self, ranks: Ints, by: int, rates: Floats) -> tuple[float, float] | None:
        """(seconds per byte of the busiest link, latency) if each of `ranks` [group, position]
        sends to the one `by` positions further; None where only single transfers tell.
        """
        ...

    def uplinks_s(self) -> list[tuple[int, int, float]]:
        """(tier, dies, seconds per byte): transfers across the tier share the uplinks of so many
        neighbouring dies.
        """
        ...


def over(work: Floats, capacity: Floats) -> Floats:
    """work / capacity; 0 where there is no work, for dead links get none."""
    return np.divide(work, capacity, out=np.zeros_like(work), where=work > 0)


def blocks(values: Floats, size: int) -> Floats:
    """Sums of `size` neighbours each."""
    return np.add.reduceat(values, np.arange(0, len(values), size))


def parts_of(labels: Ints, capacity: Floats) -> Cut:
    return labels.tolist(), capacity[labels]


def renamed(labels: Ints) -> bytes:
    """Labels by order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[inverse].astype(np.int64).tobytes()


def present(tier: Ints) -> list[int]:
    """The tiers that occur (counted, which is much faster than sorting)."""
    return np.flatnonzero(np.bincount(tier)).tolist()


def sums_by_tier(sizes: tuple[int, ...], dies: Ints, weights: Floats, at: Ints) -> Floats:
    """[tier, die of `at`]: the sum of the `weights` of those of `dies` that the tier, and none
    further in, joins it to. `sizes` are a network's `enclosures`.
    """
    nested = []
    for size in (1, *sizes):
        here = at // size
        total = np.bincount(dies // size, weights=weights, minlength=int(here.max()) + 1)
        nested.append(total[here])
    return np.diff(np.stack(nested), axis=0)
