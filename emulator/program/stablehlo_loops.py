"""Loops of a StableHLO program whose trips are constants, read as the scans they came from.

A `scan` reaches the partitioner as a `while` that counts, slices what it scans over and writes rows
into buffers. Read back, its trips are known to an estimate, and its rows move as they did in the
program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.program.stablehlo_constants import (
    PerPartition,
    constant,
    direction,
    dtype_of,
    fold,
    shape_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A counted loop. Its arguments, by position: `counter`; `constants`, which it never changes;
    `read`, constants of which it reads one row a trip (with the values that hold the row);
    `written`, of which it writes one row a trip (with the operation that writes); and `carried`.

    The counter begins at `first` and ends at `last`, `step` by `step`. If `reverse`, the trips
    take the rows from the last to the first.
    """

    body: Any
    trips: int
    counter: int
    first: NDArray[Any]
    step: int
    last: NDArray[Any]
    reverse: bool
    constants: tuple[int, ...]
    read: dict[int, list[Any]]
    written: dict[int, Any]
    carried: tuple[int, ...]


def counted(op: Any, operands: Sequence[Any]) -> Loop | None:
    """The loop of a `while` that counts from a constant to a constant, or None."""
    (test,), (body,) = (region.blocks for region in op.regions)
    returned = list(body.operations[len(body.operations) - 1].operation.operands)
    arguments = list(body.arguments)
    same = [r == a for r, a in zip(returned, arguments, strict=True)]
    found = _count(test, operands, same, body, returned)
    if found is None:
        return None
    counter, start, step, trips = found
    dtype = dtype_of(arguments[counter].type)
    sequence = (start + step * np.arange(trips)).astype(dtype)
    known: dict[Any, Any] = {
        a: x
        for a, x, kept in zip(arguments, operands, same, strict=True)
        if kept and isinstance(x, np.ndarray)
    }
    known[arguments[counter]] = PerPartition(sequence)
    for each in body.operations:  # the partitions are the trips here
        inner = each.operation
        if inner.name == "stablehlo.constant":
            known[inner.results[0]] = constant(inner)
        elif inner.operands and all(v in known for v in inner.operands):
            value = fold(inner, [known[v] for v in inner.operands])
            if value is not None:
                known[inner.results[0]] = value

    rows = _Rows(body, known, trips)
    read = {j: r for j, a in enumerate(arguments) if same[j] and (r := rows.read(a))}
    written = {
        j: w
        for j, (a, r) in enumerate(zip(arguments, returned, strict=True))
        if (w := rows.written(a, r))
    }
    ways = {j: w for j, (w, _) in {**read, **written}.items()}
    reverse = list(ways.values()).count(True) > len(ways) / 2
    read_now = {j: found for j, (way, found) in read.items() if way == reverse or trips == 1}
    written_now = {j: found for j, (way, found) in written.items() if way == reverse or trips == 1}
    constants = tuple(j for j, kept in enumerate(same) if kept and j not in read_now)
    apart = {counter, *constants, *read_now, *written_now}
    return Loop(
        body=body,
        trips=trips,
        counter=counter,
        first=np.array(start, dtype),
        step=step,
        last=np.array(start + step * trips, dtype),
        reverse=reverse,
        constants=constants,
        read=read_now,
        written=written_now,
        carried=tuple(j for j in range(len(arguments)) if j not in apart),
    )


def _count(
    test: Any, operands: Sequence[Any], same: list[bool], body: Any, returned: list[Any]
) -> tuple[int, int, int, int] | None:
    """Which argument counts, its start, step and the number of trips."""
    end = test.operations[len(test.operations) - 1].operation.operands[0]
    compare = _maker(end)
    if compare is None or compare.name != "stablehlo.compare":
        return None
    left, right = compare.operands
    places = {a: j for j, a in enumerate(test.arguments)}
    way = direction(compare)
    if left not in places or (same[places[left]] and right in places):
        left, right = right, left
        way = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(way, way)
    if left not in places or same[places[left]]:
        return None
    counter = places[left]
    limit = _known(right, operands, same, places)
    start = operands[counter]
    step = _step(returned[counter], body.arguments[counter])
    if limit is None or step is None or not isinstance(start, np.ndarray):
        return None
    if way not in ("LT", "LE") or step <= 0:
        if way not in ("GT", "GE") or step >= 0:
            return None
    distance = (int(limit) - int(start)) * (1 if step > 0 else -1) + (way in ("LE", "GE"))
    return counter, int(start), step, max(0, math.ceil(distance / abs(step)))


def _known(
    value: Any, operands: Sequence[Any], same: list[bool], places: dict[Any, int]
) -> NDArray[Any] | None:
    if value in places:
        j = places[value]
        given = operands[j]
        return given if same[j] and isinstance(given, np.ndarray) and given.ndim == 0 else None
    maker = _maker(value)
    if maker is None or maker.name != "stablehlo.constant":
        return None
    return constant(maker)


def _step(value: Any, counter: Any) -> int | None:
    """The constant that an iteration adds to the counter."""
    maker = _maker(value)
    if maker is None or maker.name not in ("stablehlo.add", "stablehlo.subtract"):
        return None
    left, right = maker.operands
    if maker.name == "stablehlo.add" and right == counter:
        left, right = right, left
    other = _maker(right)
    if left != counter or other is None or other.name != "stablehlo.constant":
        return None
    sign = 1 if maker.name == "stablehlo.add" else -1
    return sign * int(constant(other))


def _maker(value: Any) -> Any:
    """The operation that makes a value, or None for a block's argument."""
    owner = value.owner
    return None if hasattr(owner, "arguments") else getattr(owner, "operation", owner)


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """Finds arguments of a body that it reads or writes by whole rows, one a trip."""

    body: Any
    known: dict[Any, Any]
    trips: int

    def read(self, argument: Any) -> tuple[bool, list[Any]] | None:
        """Whether the rows come in reverse, and the values that hold them."""
        ways, values = set(), []
        for use in argument.uses:
            op = use.owner.operation
            if op.name == "stablehlo.return" and op.block == self.body:
                continue  # as it came
            if op.name != "stablehlo.dynamic_slice" or op.operands[0] != argument:
                return None
            if op.block != self.body or not self._one_row(op.results[0], argument):
                return None
            ways.add(self._way(list(op.operands)[1:]))
            values.append(op.results[0])
        if len(ways) != 1 or None in ways:
            return None
        return bool(ways.pop()), values

    def written(self, argument: Any, returned: Any) -> tuple[bool, Any] | None:
        """Whether the rows are written in reverse, and the operation that writes."""
        op = _maker(returned)
        if op is None or op.name != "stablehlo.dynamic_update_slice":
            return None
        if op.operands[0] != argument or not self._one_row(op.operands[1], argument):
            return None
        if len(list(argument.uses)) != 1 or len(list(op.results[0].uses)) != 1:
            return None
        way = self._way(list(op.operands)[2:])
        return None if way is None else (way, op)

    def _one_row(self, row: Any, whole: Any) -> bool:
        part, full = shape_of(row.type), shape_of(whole.type)
        return full[:1] == (self.trips,) and part == (1, *full[1:])

    def _way(self, starts: list[Any]) -> bool | None:
        """Whether the starts name all rows in reverse order; None if they do not name them once
        each in either order.
        """
        first, *rest = (self.known.get(v) for v in starts)
        if not isinstance(first, PerPartition):
            return None
        for other in rest:
            values = other.values if isinstance(other, PerPartition) else other
            if values is None or np.any(values):
                return None
        rows = np.arange(self.trips)
        if np.array_equal(first.values, rows):
            return False
        return True if np.array_equal(first.values, rows[::-1]) else None
