"""A step of very many transfers as the time reading sees it: who sends how many slots to whom.

Time does not ask which slots travel, and where everybody talks to everybody it need not list the
pairs either. Each form below says the same as its `listed` transfers, which are its definition.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
Transfers = tuple[Ints, Ints, Ints]

_PART = 2**20  # transfers that are listed at a time


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sends:
    """Transfer i takes width[i] slots from rank src[i] to rank dst[i]."""

    src: Ints
    dst: Ints
    width: Ints
    reduce: Ints

    def among(self, table: Ints) -> tuple[Sends, ...]:
        """The same among each row of `table` [group, rank]."""
        src, dst = (table[:, ends].reshape(-1) for ends in (self.src, self.dst))
        width, reduce = (np.tile(x, len(table)) for x in (self.width, self.reduce))
        return (Sends(src, dst, width, reduce),)

    def listed(self) -> list[Transfers]:
        """(source, destination, slots), in parts of bounded size."""
        return [(self.src, self.dst, self.width)]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Made:
    """Transfers (source, destination, slots) that are made each time they are asked for: many such
    steps together would not fit.
    """

    make: Callable[[], Transfers]
    reduce: bool

    def among(self, table: Ints) -> tuple[Made, ...]:
        """The same among each row of `table` [group, rank]."""

        def moved(row: Ints) -> Transfers:
            src, dst, width = self.make()
            return row[src], row[dst], width

        return tuple(Made(functools.partial(moved, row), self.reduce) for row in table)

    def listed(self) -> list[Transfers]:
        """(source, destination, slots), in parts of bounded size."""
        return [self.make()]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Every rank of `senders` sends every other one of `receivers` give x take slots."""

    senders: Ints
    receivers: Ints
    give: Ints
    take: Ints
    reduce: bool

    def among(self, table: Ints) -> tuple[Exchange, ...]:
        """The same among each row of `table` [group, rank]."""
        return tuple(
            dataclasses.replace(self, senders=row[self.senders], receivers=row[self.receivers])
            for row in table
        )

    def listed(self) -> list[Transfers]:
        """(source, destination, slots), in parts of bounded size."""
        parts = []
        each = max(1, _PART // max(1, len(self.receivers)))
        for first in range(0, len(self.senders), each):
            some = slice(first, first + each)
            src, dst = np.meshgrid(self.senders[some], self.receivers, indexing="ij")
            width = np.outer(self.give[some], self.take)
            away = (src != dst) & (width > 0)
            parts.append((src[away], dst[away], width[away]))
        return parts


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """In each row of `ranks` [group, position], every rank sends `width` slots to the one `by`
    positions further, modulo the row's length.
    """

    ranks: Ints
    by: int
    width: int
    reduce: bool

    def among(self, table: Ints) -> tuple[Shift, ...]:
        """The same among each row of `table` [group, rank]."""
        ranks = table[:, self.ranks].reshape(-1, self.ranks.shape[1])
        return (dataclasses.replace(self, ranks=ranks),)

    def listed(self) -> list[Transfers]:
        """(source, destination, slots), in parts of bounded size."""
        src, dst = self.ranks.reshape(-1), np.roll(self.ranks, -self.by, axis=1).reshape(-1)
        away = src != dst
        return [(src[away], dst[away], np.full(int(away.sum()), self.width))]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """ranks[i] sends a slot to ranks[i + 1], for i from `first` to `last`."""

    ranks: Ints
    first: int
    last: int
    reduce: bool

    def among(self, table: Ints) -> tuple[Chain, ...]:
        """The same among each row of `table` [group, rank]."""
        return tuple(dataclasses.replace(self, ranks=row[self.ranks]) for row in table)

    def listed(self) -> list[Transfers]:
        """(source, destination, slots), in parts of bounded size."""
        some = slice(self.first, self.last + 1)
        src, dst = self.ranks[:-1][some], self.ranks[1:][some]
        return [(src, dst, np.ones(len(src), np.int32))]


Traffic = Sends | Made | Exchange | Shift | Chain
