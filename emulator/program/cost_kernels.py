"""Costs of kernels that stand alone: layout changes, scans, sorts, gathers, updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from emulator.program.graph import Node, nbytes
from emulator.program.walker import Frame, Walker
from emulator.program.weights import CUMULATIVE


def free(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    if node.name in ("debug_callback", "debug_print"):
        walker.assume(f"{node.name} costs the devices nothing")
    walker.emit(frame, None, node)


def move(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    walker.note_replicated(frame, node.outs)
    traffic = walker.read_bytes(frame, node) + walker.write_bytes(frame, node)
    walker.emit(frame, walker.kernel(node.name, "move", 0, traffic, node), node)


def cumulative(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    v = node.outs[0]
    ops = CUMULATIVE[node.name] * walker.size(frame, v) * walker.lanes(frame, v)
    traffic = 2 * walker.read_bytes(frame, node) + walker.write_bytes(frame, node)
    walker.emit(frame, walker.kernel(node.name, "vector", ops, traffic, node), node)


def sort(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Sorted runs of 8192 elements in the local buffer, then merges of four runs at a time."""
    v = node.ins[0]
    if v is None:
        return walker.emit(frame, None, node)
    shape = walker.shape(frame, v)
    axis = node.params.get("dimension", node.params.get("axis", len(shape) - 1))
    n = shape[axis] if shape else 1
    passes = 1 + max(0, math.ceil(math.log(max(n, 1) / 8192, 4))) if n > 8192 else 1
    depth = max(1, math.ceil(math.log2(max(n, 2))))
    ops = walker.size(frame, v) * depth * walker.lanes(frame, v)
    each = walker.read_bytes(frame, node)
    traffic = each + walker.write_bytes(frame, node) + 2 * (passes - 1) * each
    walker.assume("sorting is a merge sort of runs of 8192 elements")
    walker.emit(frame, walker.kernel(node.name, "sort", ops, traffic, node, launches=passes), node)


def window(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    dims = node.params.get("window_dimensions", ())
    v = node.outs[0] if node.name != "select_and_scatter_add" else node.ins[0]
    v = node.outs[0] if v is None else v
    ops = walker.size(frame, v) * max(1, math.prod(dims)) * walker.lanes(frame, v)
    traffic = walker.read_bytes(frame, node) + walker.write_bytes(frame, node)
    walker.emit(frame, walker.kernel(node.name, "vector", ops, traffic, node), node)


def gather(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """Rows are fetched in whole lines; the rest of a large operand is not touched."""
    walker.note_replicated(frame, node.outs)
    v, out = node.ins[0], node.outs[0]
    written = walker.bytes(frame, out)
    run = run_bytes(walker, frame, v, node.params["slice_sizes"]) if v is not None else 0
    lines = -(-run // walker.line_bytes) * walker.line_bytes if run else 0
    fetched = (written // run) * lines if run else 0
    indices = walker.bytes(frame, node.ins[1]) if node.ins[1] is not None else 0
    traffic = fetched + indices + written
    walker.emit(frame, walker.kernel("gather", "move", 0, traffic, node), node)


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
    step = walker.kernel("dynamic_update_slice", "move", 0, traffic, node)
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
    touched = 2 * (size // run) * lines if run else 0
    traffic = size + touched + copies(walker, frame, index, v)
    traffic += walker.bytes(frame, indices) if indices is not None else 0
    ops = count * walker.lanes(frame, node.outs[0])
    step = walker.kernel(node.name, "move", ops, traffic, node)
    walker.emit(frame, step, node, in_place=True)
