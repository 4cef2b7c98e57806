"""Costs of kernels that stand alone: layout changes, scans, sorts, gathers, updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from emulator.chip import Spread
from emulator.program.graph import Node, nbytes
from emulator.program.walker import Frame, Walker
from emulator.program.weights import CUMULATIVE
from emulator.program.where import where
from emulator.timeline import Op

SORTED_RUN = 8192


def free(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    if node.name in ("debug_callback", "debug_print"):
        walker.assume(f"{node.name} costs the devices nothing")
    walker.emit(frame, None, node)


def host_call(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """A call of Python: as long as `counts` says that one takes, on all devices at once."""
    if not walker.reached:
        walker.emit(frame, None, node)
        return
    site = walker.sites[node.path]
    if site not in walker.counts:
        raise ValueError(
            f"{node.name} ({where(node.eqn) or node.path}) takes as long as the host takes, which "
            f"is no part of the machine: give its seconds to em.run or em.estimate as "
            f"counts={{{site!r}: ...}}"
        )
    try:
        time_s = float(walker.counts[site])
    except (TypeError, ValueError):
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise ValueError(f"counts[{site!r}]: expected the seconds of a call, at least 0")
    walker.assume(f"{site} takes {time_s:g} s of the host, on all devices at the same time")
    op = Op(
        name=node.name,
        kind="host",
        time_s=time_s,
        bound_s=0.0,
        limited_by="host",
        flops=0,
        bytes=0,
        where=where(node.eqn),
    )
    walker.emit(frame, op, node)


def move(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    walker.note_replicated(frame, node.outs)
    written = walker.write_bytes(frame, node)
    ops, how = 0.0, Spread(written=written)
    if node.name == "transpose" and node.ins[0] is not None and written:
        shape = walker.shape(frame, node.ins[0])
        item = max(1, written // walker.size(frame, node.outs[0]))
        runs, turned = layout_runs(shape, node.params["permutation"], item, walker.line_bytes)
        how = Spread(written=written, rows=written // runs[0] + written // runs[1])
        # Elements turn in the buffer in two passes over whole instructions.
        ops = turned * 2 * written / 4
    traffic = walker.read_bytes(frame, node) + written
    walker.emit(frame, walker.kernel(node.name, "move", ops, traffic, node, spread=how), node)


def layout_runs(
    shape: Sequence[int], permutation: Sequence[int], item: int, line: int
) -> tuple[tuple[int, int], bool]:
    """Bytes that a tile of a transposition reads, and writes, in one piece; and whether elements
    turn, or only rows move.
    """
    dims = [d for d in permutation if shape[d] > 1]
    order = sorted(dims)
    tail = 1
    while dims and dims[-1] == order[-1]:
        tail *= shape[dims.pop()]
        order.pop()
    if not dims:
        return (tail * item, tail * item), False
    if tail > 1:
        return (tail * item, tail * item), False
    # A tile is a line long on both sides; where one side is shorter, its rows join.
    side = max(1, line // item)
    read, write = shape[order[-1]], shape[dims[-1]]
    wide, high = min(read, side), min(write, side)
    if read < side:
        high = min(write, side * side // read)
    elif write < side:
        wide = min(read, side * side // write)
    reads = wide * (high if wide == read and _next(order, -2) == dims[-1] else 1)
    writes = high * (wide if high == write and _next(dims, -2) == order[-1] else 1)
    return (reads * item, writes * item), True


def _next(dims: Sequence[int], at: int) -> int | None:
    return dims[at] if len(dims) >= -at else None


def cumulative(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Whole rows along the axis, or rows divided among cores that then wait for one another."""
    v = node.outs[0]
    size, written = walker.size(frame, v), walker.write_bytes(frame, node)
    length = walker.shape(frame, v)[node.params["axis"]]
    read = walker.read_bytes(frame, node)
    how = Spread(
        written=written,
        units=size // max(1, length),
        syncs=1,
        instructions=2,
        row_bytes=8 * length,
        again=read,
    )
    ops = CUMULATIVE[node.name] * size * walker.lanes(frame, v)
    step = walker.kernel(node.name, "vector", ops, read + written, node, spread=how)
    walker.emit(frame, step, node)


def sort(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Runs of 8192 elements are sorted in the buffer; then lists are merged, each merge by one
    core, until there is one.
    """
    v = node.ins[0]
    if v is None:
        return walker.emit(frame, None, node)
    vector = walker.on.chip.vector
    shape = walker.shape(frame, v)
    n = shape[node.params.get("dimension", node.params.get("axis", len(shape) - 1))] if shape else 1
    size, lists = walker.size(frame, v), vector.merge_lists
    rows = size // max(1, n)
    moved, written = walker.read_bytes(frame, node), walker.write_bytes(frame, node)
    levels = _levels(min(n, SORTED_RUN), vector.sorted_elements, lists)
    cycles = size * (levels + 1) / vector.merged_per_cycle
    runs = -(-n // SORTED_RUN)
    how = Spread(written=written, units=rows * runs, instruction_cycles=cycles)
    ops = size * walker.lanes(frame, v)
    steps = [walker.kernel(node.name, "sort", ops, moved + written, node, spread=how)]
    while runs > 1:
        runs = -(-runs // lists)
        how = Spread(
            again=2 * moved,
            units=rows * runs,
            instruction_cycles=size / vector.merged_per_cycle,
        )
        steps.append(walker.kernel(f"{node.name}, merge", "sort", 0, 0, node, spread=how))
    walker.assume(f"sorting is a merge sort of runs of {SORTED_RUN} elements, {lists} at a time")
    frame.steps.extend(steps[:-1])
    walker.emit(frame, steps[-1], node)


def _levels(n: int, start: int, lists: int) -> int:
    """Merges of `lists` lists that turn n elements, sorted in parts of `start`, into one list."""
    levels = 0
    while start < n:
        start, levels = start * lists, levels + 1
    return levels


def window(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    dims = node.params.get("window_dimensions", ())
    v = node.outs[0] if node.name != "select_and_scatter_add" else node.ins[0]
    v = node.outs[0] if v is None else v
    ops = walker.size(frame, v) * max(1, math.prod(dims)) * walker.lanes(frame, v)
    written = walker.write_bytes(frame, node)
    how = Spread(written=written, instructions=max(1, math.prod(dims)))
    traffic = walker.read_bytes(frame, node) + written
    walker.emit(frame, walker.kernel(node.name, "vector", ops, traffic, node, spread=how), node)


def gather(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Rows are fetched in whole lines, the rest of a large operand is not touched; or a table that
    fits the buffer is loaded there, and elements are picked from it.
    """
    walker.note_replicated(frame, node.outs)
    v, out = node.ins[0], node.outs[0]
    written = walker.bytes(frame, out)
    indices = walker.bytes(frame, node.ins[1]) if node.ins[1] is not None else 0
    run = run_bytes(walker, frame, v, node.params["slice_sizes"]) if v is not None else 0
    whole = walker.bytes(frame, v) if v is not None else 0
    rows = written // run if run else 0
    lines = -(-run // walker.line_bytes) * walker.line_bytes
    fetched = min(rows * lines, whole)  # no line twice
    far = Spread(written=written, again=rows * lines - fetched, indexed=rows)
    step = walker.kernel("gather", "move", 0, fetched + indices + written, node, spread=far)
    if table := _table(walker, frame, node):
        units, picks = table
        near = Spread(
            written=written,
            units=units if units > 1 else 0,
            shared=whole if units == 1 else 0,
            instruction_cycles=picks / walker.on.chip.vector.picks_per_cycle,
        )
        other = walker.kernel("gather", "move", 0, whole + indices + written, node, spread=near)
        step = min(step, other, key=lambda s: s.time_s)
    walker.emit(frame, step, node)


def _table(walker: Walker, frame: Frame, node: Node) -> tuple[int, int] | None:
    """Tables of a gather that each fit half a buffer, and the elements picked from them all."""
    v = node.ins[0]
    if v is None:
        return None
    shape = walker.shape(frame, v)
    numbers = node.params["dimension_numbers"]
    units = math.prod(shape[d] for d in getattr(numbers, "operand_batching_dims", ()))
    if not units or walker.bytes(frame, v) > units * walker.on.chip.vector.ub_bytes // 2:
        return None
    return units, walker.size(frame, node.outs[0])


def run_bytes(walker: Walker, frame: Frame, v: int, slices: Sequence[int]) -> int:
    """Bytes that lie next to each other in one gathered slice."""
    shape = walker.shape(frame, v)
    run = 1
    for size, full in zip(reversed(slices), reversed(shape), strict=True):
        run *= min(size, full)
        if size < full:
            break
    return nbytes((run,), walker.dtype(frame, v))


def copies(walker: Walker, frame: Frame, index: int, v: int | None) -> int:
    """Bytes of a copy that an update in place needs first, because its operand is read again
    later.
    """
    root = walker.root(frame, v)
    if v is None or root is None:
        return walker.bytes(frame, v) if v is not None else 0
    number = frame.ids.get(root)
    later = any(use > index for use in frame.plan.uses.get(root, ()))
    if later or number in frame.held:
        return 2 * walker.bytes(frame, v)
    return 0


def update(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    part = walker.bytes(frame, node.ins[1]) if node.ins[1] is not None else 0
    traffic = 2 * part + copies(walker, frame, index, node.ins[0])
    how = Spread(written=traffic // 2)
    step = walker.kernel("dynamic_update_slice", "move", 0, traffic, node, spread=how)
    walker.emit(frame, step, node, in_place=True)


def scatter(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Each row of updates is read, its lines in the operand are read, changed and written."""
    walker.note_replicated(frame, node.outs)
    v, indices, updates = node.ins[0], node.ins[1], node.ins[2]
    size = walker.bytes(frame, updates) if updates is not None else 0
    count = walker.size(frame, updates) if updates is not None else 0
    shape = walker.shape(frame, updates) if updates is not None else ()
    window = node.params["dimension_numbers"].update_window_dims
    run = nbytes(
        (math.prod(shape[d] for d in window if d < len(shape)),),
        walker.dtype(frame, node.outs[0]),
    )
    lines = -(-run // walker.line_bytes) * walker.line_bytes if run else 0
    rows = size // run if run else 0
    copied = copies(walker, frame, index, v)
    touched = min(rows * lines, walker.bytes(frame, node.outs[0]))  # no line twice
    traffic = size + 2 * touched + copied
    traffic += walker.bytes(frame, indices) if indices is not None else 0
    ops = count * walker.lanes(frame, node.outs[0])
    how = Spread(written=touched + copied // 2, again=2 * (rows * lines - touched), indexed=rows)
    step = walker.kernel(node.name, "move", ops, traffic, node, spread=how)
    walker.emit(frame, step, node, in_place=True)
