"""Costs of the collectives that a program names: psum, all_gather, ppermute, ..."""

from __future__ import annotations

from typing import Any

from emulator.fabric.arguments import ITEM_BYTES
from emulator.program.graph import Node, nbytes
from emulator.program.partitioned_reductions import KINDS
from emulator.program.walker import Frame, Walker
from emulator.program.where import at, where

ALL_REDUCE = frozenset({"psum", "pmax", "pmin", *KINDS})


def collective(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    # "invariant", "reduced" and "unreduced" say something of types, not of what is sent.
    name = node.name.removesuffix("_invariant").removesuffix("_reduced").removeprefix("unreduced_")
    params = node.params
    axes: Any = params.get("axes", params.get("axis_name"))
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    positional = [a for a in axes if not isinstance(a, str)]
    if positional and name not in ALL_REDUCE:
        raise NotImplementedError(f"{name} over positional axes {axes}: only mesh axes are costed")
    axes = tuple(a for a in axes if isinstance(a, str))
    parts = params.get("axis_index_groups")
    for v, w in zip(node.ins, node.outs, strict=True):
        size = frame.graph.avals[w]
        here = walker.bytes(frame, v) if v is not None else nbytes(size.shape, size.dtype)
        if positional:  # the axis of an enclosing vmap: every device reduces its own part first
            ops = float(walker.size(frame, w if v is None else v)) * walker.lanes(frame, w)
            traffic = here + walker.bytes(frame, w)
            frame.steps.append(walker.kernel(f"{name} over vmap", "vector", ops, traffic, node))
            if not axes:
                continue
        if name in ALL_REDUCE:
            op, total = "all_reduce", walker.bytes(frame, w)
        elif name == "all_gather":
            op, total = "all_gather", walker.bytes(frame, w)
        elif name in ("ppermute", "pbroadcast"):
            op, total = {"ppermute": "permute", "pbroadcast": "broadcast"}[name], here
        else:
            op, total = name, here
        if str(size.dtype) not in ITEM_BYTES:
            raise NotImplementedError(
                f"{op} of {size.dtype} has no time: how such elements are packed is not known"
            )
        steps = walker.groups.steps(
            op,
            axes,
            total,
            str(size.dtype),
            parts=parts,
            perm=params.get("perm"),
            source=params.get("source"),
            name=f"{name} {walker.groups.said(axes)}",
            where=where(node.eqn),
        )
        frame.steps.extend(steps)
    label = at(f"{name} over {walker.groups.said(axes)}", node)
    walker.moment(frame, label, node.ins, node.outs, in_place=name in ALL_REDUCE)
