"""Costs of ragged operations, whose sizes only values tell: grouped matmuls, uneven exchanges.

Sizes come from `counts` (see `sites`): what the values reading counted, or what the caller says.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.chip import MatmulTime, matmul_time
from emulator.fabric import all_to_all_v
from emulator.program.cost_bodies import count
from emulator.program.cost_matmuls import matmul, note_copies, unit_dtype
from emulator.program.graph import Node
from emulator.program.ragged_rules import mode_of
from emulator.program.walker import Frame, Walker
from emulator.program.where import at, where
from emulator.timeline import CollectiveOp, Op


def ragged_dot(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """One kernel for all groups of a device; devices with more rows take longer."""
    walker.note_replicated(frame, node.outs)
    mode, _ = mode_of(node.params)
    lhs, rhs = (tuple(v.aval.shape) for v in node.eqn.invars[:2])
    (lhs_contract, _), (batch, _) = node.params[
        "ragged_dot_dimension_numbers"
    ].dot_dimension_numbers
    b = math.prod(lhs[d] for d in batch)
    k = math.prod(lhs[d] for d in lhs_contract)
    m = math.prod(size for d, size in enumerate(lhs) if d not in (*batch, *lhs_contract))
    groups = node.eqn.invars[2].aval.shape[-1]
    matrices = b * groups if mode == "rows" else b
    n = math.prod(rhs) // max(matrices * k, 1)
    types = [str(v.aval.dtype) for v in node.eqn.invars[:2]]
    if mode == "batch":
        return matmul(walker, frame, node, b, m, k, n, types)
    lengths = _sizes(
        walker, node, "lengths of the groups", (groups,), m * b if mode == "rows" else k * b
    )
    unit = unit_dtype(walker, types, node)
    if unit is None or lengths is None or not lengths.any() or not m * k * n:
        ops = 2 * m * k * n * b * walker.lanes(frame, node.outs[0]) if lengths is not None else 0
        traffic = walker.read_bytes(frame, node) + walker.write_bytes(frame, node)
        kernel = walker.kernel("ragged_dot", "matmul", ops, traffic, node)
        return walker.emit(frame, kernel if lengths is not None else None, node)
    out_type = str(walker.dtype(frame, node.outs[0]))
    rows, which = np.unique(lengths, axis=0, return_inverse=True)
    times = [_grouped(mode, row, b, m, k, n, walker, unit, out_type) for row in rows]
    longest = max(times, key=lambda time: time.time_s)
    walker.has_matmuls = True
    size = f"{m}x{k}x{n}" if mode == "rows" else f"{m}x({k})x{n}"
    kernels = [
        Op(
            name=f"ragged_dot {size}, {groups} groups",
            kind="matmul",
            time_s=time.time_s,
            bound_s=time.bound_s,
            limited_by=time.limited_by,
            flops=time.flops,
            bytes=time.moved_bytes,
            matmul_s=time.flops / time.peak_flops_per_s,
            memory_s=time.bytes / walker.memory_rate,
            where=where(node.eqn),
            detail=f"{unit}, {time.utilization:.0%} of the matrix peak",
        )
        for time in times
    ]
    step = kernels[times.index(longest)]
    if len(kernels) > 1 and len(which) == len(walker.groups.devices):
        step = _of_devices(step, tuple(kernels[i] for i in which.reshape(-1)))
    note_copies(walker, longest)
    walker.emit(frame, step, node)


def _of_devices(longest: Op, each: tuple[Op, ...]) -> Op:
    """One step of devices that do not do the same."""

    def mean(name: str) -> float:
        return sum(getattr(op, name) for op in each) / len(each)

    return dataclasses.replace(
        longest,
        flops=round(mean("flops")),
        bytes=round(mean("bytes")),
        matmul_s=mean("matmul_s"),
        memory_s=mean("memory_s"),
        each=each,
    )


def _grouped(
    mode: str,
    lengths: NDArray[np.int64],
    b: int,
    m: int,
    k: int,
    n: int,
    walker: Walker,
    unit: str,
    out_type: str,
) -> MatmulTime:
    """Groups of rows are one grouped matmul; groups of K count as equally long ones."""
    if mode == "rows":
        each = [-(-int(rows) // b) for rows in lengths] * b
        if not sum(each):
            each[0] = 1
        return matmul_time(sum(each), k, n, walker.on, unit, out_dtype=out_type, groups=each)
    used = max(1, int(np.count_nonzero(lengths)))
    mean = max(1, -(-int(lengths.sum()) // (used * b)))
    return matmul_time(m, mean, n, walker.on, unit, batch=used * b, out_dtype=out_type)


def ragged_all_to_all(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Each group of devices exchanges its own table of rows."""
    axes: Any = node.params["axis_name"]
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    (positions,) = walker.groups.positions(axes, node.params["axis_index_groups"])
    groups, ranks = positions.shape
    operand = node.eqn.invars[0].aval
    each = ranks * int(node.eqn.invars[0].aval.shape[0])
    tables = _sizes(walker, node, "rows from each rank to each rank", (ranks, ranks), each)
    name = f"ragged_all_to_all {walker.groups.said(axes)}"
    if tables is not None and tables.any() and ranks > 1:
        items = math.prod(operand.shape[1:])
        step = _exchange(walker, node, name, positions, tables * items, str(operand.dtype), axes)
        frame.steps.append(step)
    walker.moment(frame, at(name, node), node.ins, node.outs)


def _exchange(
    walker: Walker,
    node: Node,
    name: str,
    positions: NDArray[np.int64],
    tables: NDArray[np.int64],
    dtype: str,
    axes: tuple[str, ...],
) -> CollectiveOp:
    groups = len(positions)
    if len(tables) not in (1, groups):
        raise ValueError(
            f"counts[{walker.sites[node.path]!r}]: expected one table for all {groups} groups of "
            f"devices or one for each, got {len(tables)}"
        )
    pinned = walker.groups.algorithms.get("all_to_all")
    algorithm = pinned if pinned in ("full_mesh", "pairwise") else None
    results = []
    for i, row in enumerate(positions):
        table = tables[i if len(tables) > 1 else 0]
        devices = [walker.groups.devices[p] for p in row]
        results.append(
            all_to_all_v(tuple(map(tuple, table.tolist())), walker.on, devices, algorithm, dtype)
        )
    links: dict[str, int] = {}
    for result in results:
        for tier, moved in result.link_bytes:
            links[tier] = links.get(tier, 0) + int(moved)
        walker.groups.assumptions.update(dict.fromkeys(result.assumptions))
    first = results[0]
    return CollectiveOp(
        name=name,
        op="all_to_all",
        algorithm=str(first.algorithm),
        reason=str(first.reason),
        nbytes=max(r.nbytes for r in results),
        dtype=dtype,
        groups=((positions, np.array([r.time_s for r in results])),),
        bounds_s=(np.array([r.bound_s for r in results]),),
        link_bytes=tuple(sorted(links.items())),
        axes=axes,
        where=where(node.eqn),
        detail=f"{first.algorithm}, {groups} groups of {positions.shape[1]}, ragged",
    )


def _sizes(
    walker: Walker, node: Node, what: str, shape: tuple[int, ...], most: int
) -> NDArray[np.int64] | None:
    """The given sizes [devices or groups or 1, *shape] in whole numbers; None for a site that is
    never reached (said as 0).
    """
    given = count(walker, node, what)
    site = walker.sites[node.path]
    kind = " x ".join(map(str, shape))
    try:
        table = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.full(shape, math.nan)
    if table.ndim == 0 and table == 0:
        return None
    if table.shape == shape:
        table = table[None]
    if table.ndim != len(shape) + 1 or table.shape[1:] != shape or not (table >= 0).all():
        raise ValueError(
            f"counts[{site!r}]: expected {what}, {kind} numbers of at least 0 (or such a table for "
            f"each device or group of devices), got {given!r:.100}"
        )
    if (table.sum(-1) > most * (1 + 1e-9)).any():
        raise ValueError(
            f"counts[{site!r}]: {what} add up to {table.sum(-1).max():g}, but there are only {most}"
        )
    return np.ceil(table - 1e-9).astype(np.int64)
