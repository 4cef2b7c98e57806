"""All devices of direct levels, each sending to the one so many numbers further.

Digit by digit such a rotation moves every device by the same distance, or by one more where the
digits before have a carry. On every line of a dimension, then, all places send equally far, and the
busiest link follows from the distance alone.
"""

from __future__ import annotations

from emulator.machines.level_wiring import Wires


def busiest_s(wires: Wires, by: int) -> float:
    """Seconds per byte for which the busiest link works."""
    worst = 0.0
    for part in wires.levels:
        stride = part.inner
        for size in part.level.sizes:
            digit = by // stride % size
            for moved in {digit, digit + (by % stride > 0)}:
                carried = _carried(part.level.kind, size, moved % size)
                worst = max(worst, carried / part.level.bytes_per_s)
            stride *= size
    return worst


def _carried(kind: str, size: int, moved: int) -> float:
    """Transfers on the busiest link of a line whose places all send `moved` further, round the
    end.
    """
    near = min(moved, size - moved)
    if kind == "full_mesh":
        return float(near > 0)
    if kind != "mesh" and 2 * moved == size > 2:
        return near / 2  # half each way
    return float(near)


def farthest_s(wires: Wires, by: int) -> float:
    """The latency of the longest way."""
    longest = {0: 0.0}  # by the carry into the next digit
    for part in wires.levels:
        kind, stride = part.level.kind, part.inner
        for size in part.level.sizes:
            following: dict[int, float] = {}
            for carry, so_far in longest.items():
                moved = by // stride % size + carry
                near = min(moved % size, size - moved % size)
                ways = [(0, moved)] if moved < size else []
                ways += [(1, size - moved)] if moved else []
                for after, straight in ways:
                    hops = straight if kind == "mesh" else near
                    seconds = so_far + part.level.latency_s * (
                        min(hops, 1) if kind == "full_mesh" else hops
                    )
                    following[after] = max(following.get(after, 0.0), seconds)
            longest = following
            stride *= size
    return max(longest.values())
