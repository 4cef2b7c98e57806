"""Costs of attention that `emulator.program.attention` found, as fused kernels."""

from __future__ import annotations

import math

from emulator.chip import Attention, attention_time
from emulator.program.attention import Kernel
from emulator.program.cost_matmuls import unit_dtype
from emulator.program.fused import lane_ops
from emulator.program.graph import Node, nbytes
from emulator.program.masks import live_share
from emulator.program.walker import Frame, Walker
from emulator.program.weights import ALIASES, REDUCTIONS
from emulator.program.where import at, where
from emulator.timeline import Op

_STATISTICS_BYTES = 8  # of a row, kept for the backward pass: maximum and sum, FP32


def attention(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """The step of the fused kernel that ends at node `index`, and its place in the life of
    buffers.
    """
    kernel = frame.kernels[index]
    assert kernel is not None
    work, unit = attention_work(walker, frame, kernel)
    time = attention_time(work, walker.on)
    walker.has_matmuls = True
    walker.assume(
        "attention (scores, softmax, product with the values) is one fused kernel, its scores "
        "never in memory (FlashAttention; fitted to no measurement); fusion='eager' takes it apart"
    )
    if work.share < 1:
        walker.assume("fused attention leaves out tiles that a mask made of positions hides")
    peak = walker.on.dies_per_device * walker.on.chip.matmul_flops_per_s(unit)
    tiles = f", {work.share:.0%} of the tiles" if work.share < 1 else ""
    step = Op(
        name=label(work),
        kind="attention",
        time_s=time.time_s,
        bound_s=time.bound_s,
        limited_by=time.limited_by,
        flops=work.flops,
        bytes=work.nbytes,
        l2_bytes=time.l2_bytes,
        matmul_s=work.flops / peak,
        vector_s=work.lane_ops / walker.vector_rate,
        memory_s=work.nbytes / walker.memory_rate,
        where=where(node.eqn),
        detail=f"{unit}, {time.utilization:.0%} of the matrix peak{tiles}",
    )
    frame.steps.append(step)
    reads, writes = _traffic(walker, frame, kernel)
    walker.moment(frame, at(step.name, node), reads, writes)


def attention_work(walker: Walker, frame: Frame, kernel: Kernel) -> tuple[Attention, str]:
    """What a fused kernel computes on one device, and the matrix unit's mode for it."""
    scores = frame.graph.nodes[kernel.scores]
    types = [str(v.aval.dtype) for v in scores.eqn.invars]
    unit = unit_dtype(walker, types, scores)
    assert unit is not None  # only floating-point products are taken as attention
    out = scores.outs[0]
    shape = walker.shape(frame, out)
    count = walker.size(frame, out)
    heads = math.prod(shape[: len(scores.params["dimension_numbers"][1][0])])
    keys = math.prod(shape[d] for d in kernel.keys)
    rows = count // (heads * keys)
    share = live_share(
        frame.graph,
        kernel.nodes,
        {size for d, size in enumerate(shape) if d not in kernel.keys},
        {shape[d] for d in kernel.keys},
        walker.on.chip.base_m,
    )
    reads, writes = _traffic(walker, frame, kernel)
    moved = sum(walker.bytes(frame, v) for v in (*reads, *writes))
    if kernel.backward:
        moved += heads * rows * _STATISTICS_BYTES
    work = Attention(
        batch=heads,
        rows=rows,
        keys=keys,
        depth=kernel.depth,
        width=kernel.width,
        item=max(nbytes((2,), v.aval.dtype) // 2 for v in scores.eqn.invars),
        dtype=unit,
        products=kernel.roles,
        share=share,
        lane_ops=int(_lane_ops(walker, frame, kernel, count, share, heads * rows)),
        nbytes=moved,
        backward=kernel.backward,
    )
    return work, unit


def _lane_ops(
    walker: Walker, frame: Frame, kernel: Kernel, count: int, share: float, rows: int
) -> float:
    """Lane operations on scores in tiles that are computed, and on rows. Dividing by the sum of a
    row is left to the end, for each column of the result; a maximum and a sum are not taken again
    backward.
    """
    total = 4.0 * rows * kernel.width
    for i in kernel.nodes:
        node = frame.graph.nodes[i]
        if node.name in ALIASES or node.name == "transpose":
            continue
        sizes = [walker.size(frame, v) for v in (*node.ins, *node.outs) if v is not None]
        if max(sizes) < count:
            total += lane_ops(walker, frame, node)
            continue
        by = node.ins[1] if node.name == "div" else None
        if by is not None and walker.size(frame, by) < count:
            continue
        if kernel.backward and node.name in REDUCTIONS and i not in kernel.late:
            continue
        total += share * lane_ops(walker, frame, node)
    return total


def _traffic(walker: Walker, frame: Frame, kernel: Kernel) -> tuple[list[int], list[int]]:
    """Values that a kernel reads from memory, each once, and those that it writes there."""
    nodes, roots, uses = frame.graph.nodes, frame.plan.roots, frame.plan.uses
    mine = (*kernel.nodes, *kernel.dots)
    made = {v for i in mine for v in nodes[i].outs}
    reads = {roots[v]: v for i in mine for v in nodes[i].ins if v is not None and v not in made}
    writes = [
        v
        for i in sorted(mine)
        for v in nodes[i].outs
        if roots[v] == v
        and v not in frame.ids
        and any(use not in frame.kernels for use in uses.get(v, ()))
    ]
    return [v for root, v in reads.items() if root is not None], writes


def label(work: Attention) -> str:
    way = " backward" if work.backward else ""
    return f"fused attention{way} {work.rows}x{work.depth}x{work.keys}" + (
        f" x{work.batch}" if work.batch > 1 else ""
    )
