"""Costs of equations with bodies: shard_map, scan, while, cond."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.memory import Lifetimes
from emulator.program import layout as layouts_
from emulator.program.graph import Graph, Node
from emulator.program.layout import Layout, axes_of, from_spec
from emulator.program.trace import scan_counts
from emulator.program.walker import Frame, Walker
from emulator.program.where import at, where
from emulator.timeline import Loop


def shard_map(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    body = node.bodies[0][1]
    params = node.params
    manual = frame.manual | frozenset(
        params.get("newly_manual_axes", params.get("manual_axes", walker.groups.sizes))
    )
    if not manual & frame.manual and params["mesh"].size < len(walker.groups.devices):
        walker.assume(
            f"kernels over a mesh of {params['mesh'].size} devices count on all "
            f"{len(walker.groups.devices)} of the program's, in time, operations and energy"
        )
    seeds: dict[int, Layout] = {}
    moved: set[int] = set()
    for v, inner, spec in zip(node.ins, body.ins, params["in_specs"], strict=True):
        if v is None:
            continue
        ndim = len(frame.graph.avals[v].shape)
        have = frame.layouts.get(v, layouts_.replicated(ndim))
        own = set(params["mesh"].axis_names) - manual
        rest = tuple(tuple(a for a in e if a in own) for e in have)
        to = tuple(e + r for e, r in zip(from_spec(spec, ndim), rest, strict=True))
        if steps := walker.reshard_steps(frame, v, to, node):
            frame.steps.extend(steps)
            moved.add(inner)
        if axes_of(rest):
            seeds[inner] = rest
    inside = walker.frame(body, seeds, manual, like=frame)
    for outer, inner in zip(node.ins, body.ins, strict=True):
        root = walker.root(frame, outer)
        if inner not in moved:
            inside.ids[inner] = frame.ids.get(root) if root is not None else None
    if moved:
        label = at("resharded", node)
        copies = [walker.own(inside, inner, label) for inner in body.ins if inner in moved]
        walker.arrive(frame, label, node.ins, copies)
        walker.close(frame, len(frame.moments) - 1)
    inside.held = frame.held | needed_later(walker, frame, index, node)
    walker.walk(inside)
    for w, result in zip(node.outs, body.outs, strict=True):
        root = walker.root(inside, result)
        number = inside.ids.get(root) if root is not None else None
        if number is None:
            walker.moment(frame, node.name, (), (w,))
        else:
            frame.ids[w] = number


def needed_later(walker: Walker, frame: Frame, index: int, node: Node) -> frozenset[int]:
    """Operands that the enclosing body still reads after this node: nothing inside may
    overwrite them.
    """
    held = set()
    for v in node.ins:
        root = walker.root(frame, v)
        number = frame.ids.get(root) if root is not None else None
        if root is None or number is None:
            continue
        if any(use > index for use in frame.plan.uses.get(root, ())):
            held.add(number)
    return frozenset(held)


def inner(
    walker: Walker,
    frame: Frame,
    node: Node,
    body: Graph,
    links: list[tuple[int, int, int]],
    carried: frozenset[int],
    reached: bool = True,
) -> Frame:
    """Walks a loop's or branch's body in a frame of its own."""
    around = walker.reached
    seeds = {}
    for outer, inside, drop in links:
        if outer in frame.layouts:
            seeds[inside] = frame.layouts[outer][drop:]
    sub = walker.frame(body, seeds, frame.manual)
    sub.held = frozenset(
        i for v in (*body.ins, *body.consts) if v not in carried and (i := sub.ids[v]) is not None
    )
    for v in carried:
        walker.own(sub, v, at(f"carry of {node.name}", node))
    walker.reached = around and reached
    walker.walk(sub)
    walker.reached = around
    return sub


def life(walker: Walker, sub: Frame, carried: frozenset[int]) -> Lifetimes:
    results = {sub.ids.get(r) for v in sub.graph.outs if (r := walker.root(sub, v)) is not None}
    return Lifetimes(
        buffers=sub.buffers,
        moments=tuple(sub.moments),
        given=frozenset(i for v in carried if (i := sub.ids[v]) is not None),
        results=frozenset(results - {None}),  # type: ignore[arg-type]
    )


def scan(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    params = node.params
    [(body, ins, _)] = layouts_.body_links(node)
    first, carry = scan_counts(params)
    carried = frozenset(body.ins[first : first + carry])
    sub = inner(walker, frame, node, body, ins, carried)
    label = f"scan x{params['length']}"
    frame.steps.append(
        Loop(name=label, trips=params["length"], body=tuple(sub.steps), needs=tuple(sub.needs))
    )
    walker.moment(
        frame,
        at(label, node),
        node.ins,
        node.outs[carry:],
        results=node.outs[:carry],
        handed=node.ins[first : first + carry],
        inner=(life(walker, sub, carried),),
    )
    for w, v in zip(node.outs[carry:], body.outs[carry:], strict=True):
        name_stacked(walker, frame, w, sub, v, label)


def name_stacked(
    walker: Walker, frame: Frame, w: int, sub: Frame, v: int | None, label: str
) -> None:
    """Names what a loop stacks up after the line that makes one slice of it."""
    number, root = frame.ids.get(w), walker.root(sub, v)
    made = sub.buffers.get(sub.ids.get(root) or 0) if root is not None else None
    if made is not None and number in frame.buffers:
        name = f"{made.name}, stacked by {label}"
        frame.buffers[number] = dataclasses.replace(frame.buffers[number], name=name)


def while_(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    trips = count(walker, node, "trips of the loop")
    try:
        trips = float(trips)
    except (TypeError, ValueError):
        trips = math.nan
    if not 0 <= trips < math.inf:
        raise ValueError(
            f"counts[{walker.sites[node.path]!r}]: expected the trips of the loop, a number "
            f"of at least 0; got {walker.counts[walker.sites[node.path]]!r}"
        )
    (body, ins, _), (cond, cond_ins, _) = layouts_.body_links(node)
    nc = node.params["body_nconsts"]
    carried = frozenset(body.ins[nc:])
    sub = inner(walker, frame, node, body, ins, carried)
    test = inner(walker, frame, node, cond, cond_ins, frozenset())
    site = walker.sites[node.path]
    label = f"{site} x{trips:g}"
    frame.steps.extend(test.steps)
    frame.steps.append(
        Loop(
            name=label,
            trips=trips,
            body=(*sub.steps, *test.steps),
            needs=(*sub.needs, *test.needs),
        )
    )
    walker.moment(
        frame,
        at(label, node),
        node.ins,
        (),
        results=node.outs,
        handed=node.ins[node.params["cond_nconsts"] + nc :],
        inner=(life(walker, sub, carried), life(walker, test, frozenset())),
    )


def cond(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    shares = count(walker, node, "shares of the branches")
    site = walker.sites[node.path]
    links = layouts_.body_links(node)
    table = _shares(shares, len(links))
    if table is None:
        raise ValueError(
            f"counts[{site!r}]: expected {len(links)} shares that add up to 1, one per branch (or "
            f"such a row for each device); got {walker.counts[site]!r}"
        )
    if ((table > 0) & (table < 1)).any():
        walker.assume(
            "a branch that is taken at times counts in the mean: where devices take it in turn, "
            "the others do not wait"
        )
    # Devices that come here more seldom than others have rows that add up to less.
    differ = len(table) == len(walker.groups.devices) > 1
    lives = []
    for i, ((branch, ins, _), column) in enumerate(zip(links, table.T, strict=True)):
        share = float(column.mean())
        sub = inner(walker, frame, node, branch, ins, frozenset(), share > 0)
        lives.append(life(walker, sub, frozenset()))
        if share and sub.steps:
            name = f"{site} branch {i} ({share:.0%})"
            frame.steps.append(
                Loop(
                    name=name,
                    trips=share,
                    device_trips=tuple(column.tolist()) if differ else (),
                    body=tuple(sub.steps),
                    needs=tuple(sub.needs),
                )
            )
    walker.moment(frame, at(site, node), node.ins, (), results=node.outs, inner=tuple(lives))


def _shares(given: Any, branches: int) -> NDArray[np.float64] | None:
    """The shares of the branches, [devices or 1, branches]; None if they are none."""
    try:
        table = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        return None
    rows = table[None] if table.ndim == 1 else table
    if rows.ndim != 2 or rows.shape[1] != branches or not (rows >= 0).all():
        return None
    total = rows.sum(1)
    return rows if total.size and abs(total.max() - 1) <= 1e-6 else None


def count(walker: Walker, node: Node, what: str) -> Any:
    site = walker.sites.get(node.path, node.path)
    if site not in walker.counts:
        missing = [name for name in walker.sites.values() if name not in walker.counts]
        needed = ", ".join(f"{name!r}: ..." for name in dict.fromkeys([site, *missing]))
        raise ValueError(
            f"the {what} {site!r} ({where(node.eqn) or node.path}) depend on values, which an "
            f"estimate does not compute: give counts={{{needed}}}, or use em.run"
        )
    return walker.counts[site]
