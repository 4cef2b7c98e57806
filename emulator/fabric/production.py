"""What a collective takes longer in production than in a benchmark's loop.

Published are a few offsets (operation, ranks) for small messages and pairs of times for large ones.
Offsets of other rank counts lie on straight lines between those, from none for one rank; operations
without an offset take the mean of the others.
"""

from __future__ import annotations

from emulator.machines import Machine
from emulator.machines.fabric import Transport

LAUNCHES = ("benchmark", "production")


def published(on: Machine) -> bool:
    """Whether anything is known of this machine's collectives in production."""
    return any(t.production_offsets_s or t.production_factor for t in on.fabric.transports)


def in_production(time_s: float, op: str, ranks: int, transport: Transport) -> float:
    """`time_s` of a benchmark among so many HCCL ranks (dies), as production would see it."""
    if not time_s:
        return 0.0
    return time_s * (transport.production_factor or 1.0) + _offset_s(op, ranks, transport)


def _offset_s(op: str, ranks: int, transport: Transport) -> float:
    tables = {name: dict(table) for name, table in transport.production_offsets_s}
    points = [(1, 0.0)]
    for count in sorted({count for table in tables.values() for count in table}):
        known = [table[count] for table in tables.values() if count in table]
        points.append((count, tables.get(op, {}).get(count, sum(known) / len(known))))
    for (low, low_s), (high, high_s) in zip(points, points[1:], strict=False):
        if ranks <= high:
            return low_s + (high_s - low_s) * (ranks - low) / (high - low)
    return points[-1][1]
