"""How the work of a fused kernel divides over vector cores: whole rows where a reduction needs
them, lines of memory otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from emulator.chip import Spread
from emulator.program.graph import Node
from emulator.program.walker import Frame, Walker
from emulator.program.weights import GENERATED, REDUCTIONS, SLICES

# A reduction of short rows works on blocks of several, an element-wise chain on rows laid out anew.
_MOST_PADDING_OF_SUMS, _MOST_PADDING = 8.0, 2.0


def of_chain(
    walker: Walker,
    frame: Frame,
    part: Sequence[int],
    ops: Mapping[int, float],
    reads: Mapping[int, int],
    written: int,
) -> Spread:
    """The spread of the nodes `part`: `ops` are each one's lane operations, `reads` the bytes of
    each operand.
    """
    nodes = frame.graph.nodes
    sums = [i for i in part if nodes[i].name in REDUCTIONS and nodes[i].ins[0] is not None]
    shared = _shared(walker, frame, part, reads)
    busy = sum(1 for i in part if ops[i])
    if not sums:
        return Spread(written=written, shared=shared, instructions=busy)
    inner, length, units = max(
        (_rows(walker, frame, nodes[i]) for i in sums), key=lambda rows: (rows[1], -rows[2])
    )
    full = max(walker.size(frame, v) for i in sums if (v := nodes[i].ins[0]) is not None)
    levels, rereads = _passes(walker, frame, part, full)
    vector = walker.on.chip.vector
    most = max(reads.values(), default=0)
    large = [size for size in reads.values() if 2 * size > most]
    return Spread(
        written=written,
        shared=shared,
        row_bytes=4 * length * (1 + len(large)),
        again=rereads * sum(large),
        units=units,
        syncs=levels,
        instructions=busy,
        padding=_padding(nodes, ops, inner, vector.lane_bytes // 4, vector.block_bytes // 4),
    )


def _rows(walker: Walker, frame: Frame, node: Node) -> tuple[int, int, int]:
    """Of a reduction: elements that lie next to each other, elements of a row, and rows (if other
    dimensions than the last are reduced, whole instructions of neighbouring results).
    """
    assert node.ins[0] is not None
    shape = walker.shape(frame, node.ins[0])
    axes = node.params.get("axes", node.params.get("dimensions", ()))
    length = math.prod(shape[d] for d in axes)
    kept = walker.size(frame, node.ins[0]) // max(1, length)
    inner = 1
    for d in range(len(shape) - 1, -1, -1):
        if d not in axes:
            break
        inner *= shape[d]
    if inner > 1 or length <= 1:
        return inner, length, max(1, kept)
    return 1, length, max(1, -(-kept // (walker.on.chip.vector.lane_bytes // 4)))


def _padding(
    nodes: Sequence[Node], ops: Mapping[int, float], inner: int, lanes: int, block: int
) -> float:
    """Lanes used over lanes needed, for rows of `inner` elements."""
    total = sum(ops.values())
    if not total or inner <= 1:
        return 1.0
    sums = min(_MOST_PADDING_OF_SUMS, -(-inner // lanes) * lanes / inner)
    rest = min(_MOST_PADDING, -(-inner // block) * block / inner)
    used = sum(n * (sums if nodes[i].name in REDUCTIONS else rest) for i, n in ops.items())
    return used / total


def _shared(walker: Walker, frame: Frame, part: Sequence[int], reads: Mapping[int, int]) -> int:
    """Bytes of operands that are repeated along the leading dimension: every core reads them."""
    if len(reads) < 2:
        return 0
    nodes = frame.graph.nodes
    outs = [v for i in part for v in nodes[i].outs if nodes[i].name not in SLICES]
    largest = max((*reads, *outs), key=lambda v: walker.size(frame, v))
    shape = walker.shape(frame, largest)
    most = walker.size(frame, largest)
    return sum(
        size
        for v, size in reads.items()
        if 1 < walker.size(frame, v) < most and walker.shape(frame, v)[0] != shape[0]
    )


def _passes(walker: Walker, frame: Frame, part: Sequence[int], full: int) -> tuple[int, int]:
    """Reductions that follow from one another, and how often whole rows (of `full` elements all
    together) are needed again after one.
    """
    depth: dict[int | None, int] = {}
    levels, rereads = 1, 0
    for i in part:
        node = frame.graph.nodes[i]
        at = max((depth.get(walker.root(frame, v), 0) for v in node.ins), default=0)
        if node.name not in GENERATED and any(
            walker.size(frame, v) >= full for v in (*node.ins, *node.outs) if v is not None
        ):
            rereads = max(rereads, at)
        if node.name in REDUCTIONS:
            at += 1
            levels = max(levels, at)
        depth.update(dict.fromkeys(node.outs, at))
    return levels, rereads
