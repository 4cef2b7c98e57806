"""Lists of partitions, as XLA writes them, in terms of the axes of a mesh.

XLA's partitioner numbers devices 0, 1, 2, ... in the order of the mesh (the last axis fastest) and
names groups of them by number. Both readings think in mesh axes: a value that does not vary over an
axis is kept and computed once. So groups and tiles are led back to axes here. XLA may also divide
an axis; `refined` is the same mesh with axes of prime sizes, which can say that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Axes as a collective takes them, the first slowest.
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartitionMesh:
    """Names and sizes of axes; partition numbers are row-major over them."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def table(self, axes: Sequence[str] = ()) -> NDArray[np.int64]:
        """Partitions [group, rank] of the groups over `axes` (the first slowest), by first member
        where `axes` are in the mesh's order.
        """
        order = [i for i, name in enumerate(self.names) if name not in axes]
        order += [self.names.index(axis) for axis in axes]
        width = math.prod(self.sizes[self.names.index(axis)] for axis in axes)
        return np.arange(self.count).reshape(self.sizes).transpose(order).reshape(-1, width)

    def axes_of(self, groups: NDArray[np.int64]) -> Axes | None:
        """The axes over which `groups` [group, rank] run, the slowest first; None if they run over
        no set of whole axes.
        """
        first = np.array(np.unravel_index(groups[0], self.sizes))
        strides = {}
        for name, places in zip(self.names, first, strict=True):
            if (moved := np.flatnonzero(places != places[0])).size:
                strides[name] = moved[0]
        axes = tuple(sorted(strides, key=lambda name: -strides[name]))
        table = self.table(axes)
        same = table.shape == groups.shape and np.array_equal(_by_first(table), _by_first(groups))
        return axes if same else None

    def varying(self, values: NDArray[Any]) -> Axes:
        """The axes over which `values` [partition, ...] differ."""
        folded = values.reshape(*self.sizes, *values.shape[1:])
        return tuple(
            name
            for i, name in enumerate(self.names)
            if not np.array_equal(folded, np.broadcast_to(folded.take([0], i), folded.shape))
        )

    def spec(self, tiles: NDArray[np.int64]) -> tuple[Axes, ...] | None:
        """The axes that divide each dimension of an array, given the partitions [*tiles, copies] of
        its tiles; None if no whole axes do.
        """
        where = np.empty((self.count, tiles.ndim), np.int64)
        where[tiles.reshape(-1)] = np.indices(tiles.shape).reshape(tiles.ndim, -1).T
        found = []
        for d in range(tiles.ndim - 1):
            axes = self.varying(where[:, d])
            if math.prod(self.sizes[self.names.index(a)] for a in axes) != tiles.shape[d]:
                return None
            rows = self.table(axes)[0]
            order = rows[np.argsort(where[rows, d])]
            axes = self._sorted(axes, order)
            table = self.table(axes)
            if not np.array_equal(where[table, d], np.broadcast_to(range(len(order)), table.shape)):
                return None
            found.append(axes)
        return tuple(found)

    def _sorted(self, axes: Axes, order: NDArray[np.int64]) -> Axes:
        """`axes` by how soon their index moves along `order`, the fastest last."""
        places = dict(zip(self.names, np.unravel_index(order, self.sizes), strict=True))
        first_move = {a: int(np.flatnonzero(places[a] != places[a][0])[0]) for a in axes}
        return tuple(sorted(axes, key=lambda a: -first_move[a]))

    def permutation(
        self, pairs: Sequence[tuple[int, int]]
    ) -> tuple[Axes, tuple[tuple[int, int], ...]]:
        """The fewest axes over which (source, target) `pairs` do the same in every group, and the
        pairs as ranks in a group.
        """
        pairs_of = np.array(pairs, np.int64).reshape(-1, 2)
        at = np.stack(np.unravel_index(pairs_of, self.sizes))  # [axis, pair, 2]
        axes = tuple(
            name for name, p in zip(self.names, at, strict=True) if np.any(p[:, 0] != p[:, 1])
        )
        table = self.table(axes)
        rank = np.empty(self.count, np.int64)
        rank[table] = np.arange(table.shape[1])
        local = sorted({(int(rank[s]), int(rank[t])) for s, t in pairs_of})
        if len(local) * len(table) == len(pairs_of):
            return axes, tuple(local)
        return self.names, tuple((int(s), int(t)) for s, t in pairs_of)


def refined(mesh: PartitionMesh) -> PartitionMesh:
    """The mesh with every axis of composite size written as axes of prime sizes, the twos first."""
    names: list[str] = []
    sizes: list[int] = []
    for name, size in zip(mesh.names, mesh.sizes, strict=True):
        primes = _primes(size)
        names += [name] if len(primes) < 2 else [f"{name}/{i}" for i in range(len(primes))]
        sizes += primes or [1]
    return PartitionMesh(names=tuple(names), sizes=tuple(sizes))


def _primes(size: int) -> list[int]:
    found = []
    divisor = 2
    while size > 1:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return found


def _by_first(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    return groups[np.argsort(groups[:, 0])]
