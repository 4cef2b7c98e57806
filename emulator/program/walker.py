"""The engine of the time reading: it walks a graph and knows no primitive; rules and weights do.

It keeps where values live (their numbers, buffers and layouts), collects fusible nodes, calls the
rule of every other node, and charges what moves between layouts outside `shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emulator.chip import PLAIN, Spread, lane_factor, vector_time
from emulator.machines import Machine
from emulator.memory import Buffer, Lifetimes, Moment
from emulator.program import layout as layouts_
from emulator.program.attention import Kernel, find
from emulator.program.graph import Graph, Node, nbytes, on_host
from emulator.program.groups import Groups
from emulator.program.layout import ELEMENTWISE, Layout, axes_of, from_spec, local_shape
from emulator.program.primitives import REFUSED
from emulator.program.weights import ALIASES, GENERATED, PER_ELEMENT, RANDOM, REDUCTIONS, SLICES
from emulator.program.where import at, where
from emulator.timeline import Needs, Op, Step

ATTENTION = "fused attention"  # the rule of what is no primitive
RESHARDS = frozenset({"sharding_constraint", "reshard"})
FUSIBLE = frozenset(PER_ELEMENT) | frozenset(REDUCTIONS) | frozenset(RANDOM) | GENERATED | SLICES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What the program does on each device: timed steps, buffers, and what had to be assumed."""

    steps: tuple[Step, ...]
    needs: tuple[Needs, ...]
    life: Lifetimes
    devices: tuple[int, ...]
    mesh_shapes: tuple[tuple[tuple[str, int], ...], ...]
    communicators: int
    arguments_bytes: int
    results_bytes: int
    assumptions: tuple[str, ...]


@dataclasses.dataclass(slots=True)
class Frame:
    """One body while it is walked: where its values live and where its steps go, with what they
    wait for. `kernels` are nodes that a kernel stands for, which is emitted at its last one.
    """

    graph: Graph
    plan: Plan
    layouts: Mapping[int, Layout]
    manual: frozenset[str]
    ids: dict[int, int | None]
    steps: list[Step]
    needs: list[Needs]
    moments: list[Moment]
    buffers: dict[int, Buffer]
    held: frozenset[int]
    kernels: Mapping[int, Kernel | None] = dataclasses.field(default_factory=dict)
    sizes: dict[int, tuple[tuple[int, ...], int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Per graph: the value each value is an alias of (None if it is generated), and who reads each
    value. `innermost`: of a value that a transpose gives another shape but no other place in
    memory, the dimension along which neighbours lie side by side.
    """

    roots: tuple[int | None, ...]
    uses: Mapping[int, tuple[int, ...]]
    skip: frozenset[int]
    innermost: Mapping[int, int]


def plan(graph: Graph, fused: bool) -> Plan:
    roots: list[int | None] = list(range(len(graph.avals)))
    skip = set()
    innermost: dict[int, int] = {}
    consumers = graph.consumers()
    makers = {v: i for i, node in enumerate(graph.nodes) for v in node.outs}
    for i, node in enumerate(graph.nodes):
        if node.name in ALIASES or node.name in RESHARDS:
            skip.add(i)
            for v, w in zip(node.ins, node.outs, strict=False):
                roots[w] = None if v is None else roots[v]
        elif node.name == "transpose" and fused:
            read = _read_by_matmuls(graph, node, consumers)
            if read or _written_by_matmul(graph, node, consumers, makers):
                skip.add(i)
                (v,), (w,) = node.ins, node.outs
                assert v is not None
                roots[w] = roots[v]
                if read:
                    permutation = node.params["permutation"]
                    innermost[w] = permutation.index(innermost.get(v, len(permutation) - 1))
    uses: dict[int, list[int]] = {}
    for v, readers in consumers.items():
        root = roots[v]
        if root is not None:
            uses.setdefault(root, []).extend(r for r in readers if r not in skip)
    read_by = {v: tuple(sorted(set(r))) for v, r in uses.items()}
    return Plan(tuple(roots), read_by, frozenset(skip), innermost)


def _read_by_matmuls(graph: Graph, node: Node, consumers: Mapping[int, list[int]]) -> bool:
    """Whether a transpose is but another way for matmuls to read data."""
    end = len(graph.nodes)
    readers = consumers.get(node.outs[0], [])
    return bool(readers) and all(r != end and graph.nodes[r].name == "dot_general" for r in readers)


def _written_by_matmul(
    graph: Graph, node: Node, consumers: Mapping[int, list[int]], makers: Mapping[int, int]
) -> bool:
    """Whether a transpose is but another way for a matmul to write data."""
    v = node.ins[0]
    while v is not None and v in makers and len(consumers[v]) == 1:
        maker = graph.nodes[makers[v]]
        if maker.name not in ALIASES and maker.name != "transpose":
            return maker.name == "dot_general"
        v = maker.ins[0]
    return False


class Walker:
    """Walks graphs and collects their steps and buffers."""

    def __init__(
        self,
        on: Machine,
        groups: Groups,
        sites: Mapping[str, str],
        counts: Mapping[str, Any],
        fused: bool,
        rules: Mapping[str, Rule],
        fuse: Fuse,
    ) -> None:
        self.on = on
        self.groups = groups
        self.sites = sites
        self.counts = counts
        self.fused = fused
        self.rules = rules
        self.has_matmuls = False
        self.fuse = fuse
        self.reached = True  # not inside a branch that is never taken
        self.line_bytes = on.chip.engines.line_bytes
        self.memory_rate = on.dies_per_device * on.chip.memory_bytes_per_s
        self.vector_rate = on.dies_per_device * on.chip.vector_flops_per_s("float32")
        self.lane_factors = functools.cache(lambda dtype: lane_factor(str(dtype), on))
        self.assumed: dict[str, int] = {}
        self.fresh = 0
        # Values that no step makes -> the values they come from; copies that the next moment uses.
        self.derived: dict[int, frozenset[int]] = {}
        self.moved: list[int] = []

    def program(self, graph: Graph, names: Sequence[str]) -> Costs:
        frame = self.frame(graph, {}, frozenset())
        for i, v in enumerate((*graph.ins, *graph.consts)):
            label = names[i] if i < len(names) else f"constant {i - len(graph.ins)}"
            self.own(frame, v, label)
        inputs = {frame.ids[v] for v in (*graph.ins, *graph.consts)} - {None}
        given = {frame.ids[v] for v in graph.donated if v in frame.ids} & inputs
        frame.held = frozenset(inputs - given)  # type: ignore[arg-type]
        self.walk(frame)
        results = {frame.ids[v] for v in graph.outs if v is not None} - {None}
        life = Lifetimes(
            buffers=frame.buffers,
            moments=tuple(frame.moments),
            held=frame.held,
            given=frozenset(given),  # type: ignore[arg-type]
            results=frozenset(results),  # type: ignore[arg-type]
        )
        size = {v: b.bytes for v, b in frame.buffers.items()}
        return Costs(
            steps=tuple(frame.steps),
            needs=tuple(frame.needs),
            life=life,
            devices=self.groups.devices,
            mesh_shapes=self.groups.mesh_shapes,
            communicators=self.groups.communicators,
            arguments_bytes=sum(size.get(v, 0) for v in inputs if v is not None),
            results_bytes=sum(size.get(v, 0) for v in results if v is not None),
            assumptions=tuple(self.notes()),
        )

    def notes(self) -> list[str]:
        how = (
            "element-wise work between matmuls, collectives and layout changes runs fused, one "
            "kernel per chain; transposes next to a matmul are part of it (fusion='chains')"
            if self.fused
            else "every operation is a kernel of its own, every intermediate goes through memory "
            "(fusion='eager')"
        )
        notes = [how, *self.groups.assumptions]
        if self.has_matmuls:
            notes.append(self.on.chip.engines.fit)
        return notes + [
            text if times == 1 else f"{text} ({times} times)"
            for text, times in self.assumed.items()
        ]

    def assume(self, text: str) -> None:
        self.assumed[text] = self.assumed.get(text, 0) + 1

    def frame(
        self, graph: Graph, seeds: Mapping[int, Layout], manual: frozenset[str], like: Any = None
    ) -> Frame:
        """A frame for `graph`; `like` lends its steps and buffers (a shard_map is part of its
        surroundings).
        """
        auto = set(self.groups.sizes) - manual
        layouts = layouts_.infer(graph, seeds, manual) if auto else {}
        frame = Frame(
            graph=graph,
            plan=plan(graph, self.fused),
            layouts=layouts,
            manual=manual,
            ids={},
            steps=like.steps if like else [],
            needs=like.needs if like else [],
            moments=like.moments if like else [],
            buffers=like.buffers if like else {},
            held=like.held if like else frozenset(),
        )
        if self.fused:
            frame.kernels = self.attention(frame)
        for v in (*graph.ins, *graph.consts):
            frame.ids[v] = self.number()
        return frame

    def attention(self, frame: Frame) -> dict[int, Kernel | None]:
        """Nodes that are part of attention, where one device has all that it needs."""
        kernels: dict[int, Kernel | None] = {}
        for pattern in find(frame.graph):
            if not any(self.divided(frame, i) for k in pattern.kernels for i in k.dots):
                kernels.update(dict.fromkeys(pattern.covered))
                kernels.update({k.at: k for k in pattern.kernels})
        return kernels

    def divided(self, frame: Frame, index: int) -> bool:
        """Whether more than the batch of a product is divided over devices."""
        node = frame.graph.nodes[index]
        for v, batch in zip(node.ins, node.params["dimension_numbers"][1], strict=True):
            layout = frame.layouts.get(v, ()) if v is not None else ()
            if any(axes for d, axes in enumerate(layout) if d not in batch):
                return True
        return False

    def number(self) -> int:
        self.fresh += 1
        return self.fresh

    def measured(self, frame: Frame, v: int) -> tuple[tuple[int, ...], int, int]:
        """Local shape, elements and bytes."""
        aval = frame.graph.avals[v]
        shape = tuple(getattr(aval, "shape", ()))
        shape = local_shape(shape, frame.layouts.get(v), self.groups.sizes)
        size = nbytes(shape, aval.dtype) if hasattr(aval, "dtype") else 0
        found = frame.sizes[v] = (shape, math.prod(shape), size)
        return found

    def shape(self, frame: Frame, v: int) -> tuple[int, ...]:
        """Local shape."""
        return (frame.sizes.get(v) or self.measured(frame, v))[0]

    def size(self, frame: Frame, v: int) -> int:
        return (frame.sizes.get(v) or self.measured(frame, v))[1]

    def dtype(self, frame: Frame, v: int) -> Any:
        return frame.graph.avals[v].dtype

    def bytes(self, frame: Frame, v: int) -> int:
        return (frame.sizes.get(v) or self.measured(frame, v))[2]

    def root(self, frame: Frame, v: int | None) -> int | None:
        """The number, in this frame, of the value that holds the bytes of `v`."""
        return None if v is None else frame.plan.roots[v]

    def own(self, frame: Frame, v: int, label: str) -> int:
        """Gives `v` a buffer."""
        number = frame.ids.get(v)
        if number is None:
            number = frame.ids[v] = self.number()
        aval = frame.graph.avals[v]
        frame.buffers[number] = Buffer(
            name=label,
            shape=self.shape(frame, v),
            dtype=str(getattr(aval, "dtype", "token")),
            bytes=0 if on_host(aval) else self.bytes(frame, v),
        )
        return number

    def moment(
        self,
        frame: Frame,
        label: str,
        reads: Sequence[int | None],
        writes: Sequence[int],
        *,
        results: Sequence[int] = (),
        in_place: bool = False,
        handed: Sequence[int | None] = (),
        inner: tuple[Lifetimes, ...] = (),
        scratch: tuple[Buffer, ...] = (),
    ) -> None:
        uses = frame.plan.uses
        moved, self.moved = tuple(self.moved), []
        frame.moments.append(
            Moment(
                name=label,
                reads=(*self.numbers(frame, reads), *moved),
                writes=tuple(self.own(frame, w, label) for w in writes if w in uses),
                results=tuple(self.own(frame, w, label) for w in results if w in uses),
                in_place=in_place,
                handed=self.numbers(frame, handed),
                inner=inner,
                scratch=scratch,
            )
        )

    def arrive(
        self, frame: Frame, label: str, reads: Sequence[int | None], copies: Sequence[int]
    ) -> None:
        """Buffers of their own for values that came from other devices."""
        ids = self.numbers(frame, reads)
        frame.moments.append(Moment(name=label, reads=ids, writes=tuple(copies)))

    def numbers(self, frame: Frame, values: Sequence[int | None]) -> tuple[int, ...]:
        """Numbers of the values that hold the bytes of `values`."""
        ids = (frame.ids.get(r) for r in (self.root(frame, v) for v in values) if r is not None)
        return tuple(i for i in ids if i is not None)

    def emit(
        self,
        frame: Frame,
        step: Step | None,
        node: Node,
        *,
        in_place: bool = False,
        scratch: tuple[Buffer, ...] = (),
    ) -> None:
        """One step that reads and writes all of `node`'s values."""
        if step is not None:
            frame.steps.append(step)
        label = at(step.name if step else node.name, node)
        self.moment(frame, label, node.ins, node.outs, in_place=in_place, scratch=scratch)

    def close(
        self,
        frame: Frame,
        first: int,
        reads: Sequence[int | None] = (),
        writes: Sequence[int | None] = (),
    ) -> int:
        """Says of the steps since the last call what they wait for: one another, `reads`, and what
        the moments from `first` on read. They make `writes` and what the moments write. Returns
        the number of the next moment.
        """
        waits, makes = set(self.numbers(frame, reads)), set(self.numbers(frame, writes))
        for moment in frame.moments[first:]:
            waits.update(moment.reads)
            makes.update(moment.writes, moment.results)
        sources: set[int] = set()
        for v in waits:
            sources |= self.derived.get(v, {v})
        count = len(frame.steps) - len(frame.needs)
        if not count:
            self.derived.update(dict.fromkeys(makes, frozenset(sources)))
        made, before = tuple(makes), tuple(sources)
        for _ in range(count):
            turn = self.number()
            frame.needs.append(Needs(reads=before, writes=(*made, turn)))
            before = (*sources, turn)
        return len(frame.moments)

    def walk(self, frame: Frame) -> None:
        segment: list[int] = []
        first = len(frame.moments)

        def flush() -> None:
            nonlocal first
            if segment:
                frame.steps.extend(self.fuse(self, frame, tuple(segment)))
                segment.clear()
                first = self.close(frame, first)

        for i, node in enumerate(frame.graph.nodes):
            name = node.name
            if i in frame.kernels:
                if frame.kernels[i] is not None:
                    flush()
                    self.rules[ATTENTION](self, frame, i, node)
                    first = self.close(frame, first)
                continue
            if i in frame.plan.skip:
                if moved := self.moves(frame, node):
                    flush()
                    frame.steps.extend(moved)
                    first = self.close(frame, first, node.outs, node.outs)
                continue
            moved = self.moves(frame, node)
            if name in FUSIBLE:
                if moved or not self.fused:
                    flush()
                    frame.steps.extend(moved)
                segment.append(i)
                if after := self.after(frame, node):
                    flush()
                    frame.steps.extend(after)
                    first = self.close(frame, first, node.outs, node.outs)
                continue
            flush()
            frame.steps.extend(moved)
            rule = self.rules.get(name)
            if rule is None:
                raise NotImplementedError(
                    f"no cost rule for primitive {name!r} at {where(node.eqn) or node.path}: "
                    f"{REFUSED.get(name, 'it cannot be estimated')}"
                )
            rule(self, frame, i, node)
            frame.steps.extend(self.after(frame, node))
            if node.name == "shard_map":  # its steps have been closed inside
                first = len(frame.moments)
            else:
                first = self.close(frame, first, node.ins, node.outs)
        flush()
        # Aliases share the number of what they are aliases of; one of a literal lies nowhere.
        for w, root in enumerate(frame.plan.roots):
            if root is None:
                frame.ids.setdefault(w, None)
            elif root != w and root in frame.ids:
                frame.ids[w] = frame.ids[root]

    def moves(self, frame: Frame, node: Node) -> list[Step]:
        """Collectives that bring the operands of `node` into the layout it needs; none inside a
        full shard_map.
        """
        if not frame.layouts or node.name in ("scan", "while", "cond", "shard_map"):
            return []
        if node.name in RESHARDS:
            spec = getattr(
                node.params.get("sharding", node.params.get("dst_sharding")), "spec", None
            )
            v = node.ins[0]
            if v is None or spec is None or not any(entry is not None for entry in spec):
                return []
            to = from_spec(spec, len(frame.graph.avals[v].shape))
            return self.move(frame, v, to, node)
        steps: list[Step] = []
        sharded = [v for v in node.ins if v is not None and any(frame.layouts.get(v, ()))]
        if not sharded or not node.outs:
            return []
        out_shape = tuple(getattr(frame.graph.avals[node.outs[0]], "shape", ()))
        if node.name in ELEMENTWISE:
            want = frame.layouts.get(node.outs[0]) or layouts_.replicated(len(out_shape))
            for v in sharded:
                if len(frame.layouts[v]) == len(want):
                    steps += self.move(frame, v, want, node)
            return steps
        if node.name == "dot_general":
            v = node.ins[1]
            if v in sharded:
                steps += self.dot_moves(frame, node)
            return steps
        source = node.ins[0]
        for v in sharded:
            if v == source:
                kept = layouts_.forward_layouts(frame.graph, node, frame.layouts)[0]
                lost = set(axes_of(frame.layouts[v])) - set(axes_of(kept or ()))
                if node.name.startswith("reduce_") or node.name in ("argmax", "argmin"):
                    continue  # its partial results are combined afterwards
                want = tuple(tuple(a for a in entry if a not in lost) for entry in frame.layouts[v])
            else:
                want = layouts_.replicated(len(frame.layouts[v]))
            steps += self.move(frame, v, want, node)
        return steps

    def dot_moves(self, frame: Frame, node: Node) -> list[Step]:
        """The right operand gives up free axes that the left one already uses."""
        left, right = node.ins[0], node.ins[1]
        assert right is not None
        (_, contract), (_, batch) = node.params["dimension_numbers"]
        used = set(axes_of(frame.layouts.get(left, ()) if left is not None else ()))
        want = tuple(
            entry if d in contract or d in batch else tuple(a for a in entry if a not in used)
            for d, entry in enumerate(frame.layouts[right])
        )
        return self.move(frame, right, want, node)

    def move(self, frame: Frame, v: int, to: Layout, node: Node) -> list[Step]:
        """As `reshard_steps`, with a copy of `v` in layout `to` that lives until it is used."""
        steps = self.reshard_steps(frame, v, to, node)
        if steps:
            aval, copy, label = frame.graph.avals[v], self.number(), at("resharded", node)
            shape = local_shape(tuple(aval.shape), to, self.groups.sizes)
            frame.buffers[copy] = Buffer(
                name=label, shape=shape, dtype=str(aval.dtype), bytes=nbytes(shape, aval.dtype)
            )
            self.arrive(frame, label, [v], [copy])
            self.moved.append(copy)
        return steps

    def after(self, frame: Frame, node: Node) -> list[Step]:
        """Sums over devices that a reduction or a product over a divided dimension still needs."""
        if not frame.layouts or not node.ins or node.ins[0] is None:
            return []
        axes: list[str] = []
        source = frame.layouts.get(node.ins[0], ())
        if node.name in REDUCTIONS and "axes" in node.params:
            axes = [a for d in node.params["axes"] for a in (source[d] if source else ())]
        elif node.name == "dot_general":
            axes = list(self.contracted(frame, node))
        if not axes:
            return []
        steps: list[Step] = []
        for v in node.outs:
            steps += self.groups.steps(
                "all_reduce",
                tuple(axes),
                self.bytes(frame, v),
                str(self.dtype(frame, v)),
                name=f"{node.name} over {self.groups.said(axes)}",
                where=where(node.eqn),
            )
        self.assume("a reduction over a divided dimension outside shard_map ends in an all_reduce")
        return steps

    def contracted(self, frame: Frame, node: Node) -> tuple[str, ...]:
        """Axes that divide the contracting dimensions of either operand."""
        dims = node.params["dimension_numbers"][0]
        axes: dict[str, None] = {}
        for v, contract in zip(node.ins, dims, strict=True):
            layout = frame.layouts.get(v) if v is not None else None
            if layout:
                axes.update(dict.fromkeys(a for d in contract for a in layout[d]))
        return tuple(axes)

    def reshard_steps(self, frame: Frame, v: int, to: Layout, node: Node) -> list[Step]:
        """Moves `v` to layout `to`: nothing if each device already holds its part, else the
        collective that moves it.
        """
        have = frame.layouts.get(v)
        if have is None or have == to or not any(have):
            return []
        moved: list[str] = []
        for mine, wanted in zip(have, to, strict=True):
            same = 0
            while same < min(len(mine), len(wanted)) and mine[same] == wanted[same]:
                same += 1
            moved += mine[same:]
        if not moved:
            return []
        shape = tuple(getattr(frame.graph.avals[v], "shape", ()))
        local = nbytes(local_shape(shape, have, self.groups.sizes), self.dtype(frame, v))
        op, total = "all_gather", local * self.groups.size_of(moved)
        if set(moved) <= set(axes_of(to)):
            op, total = "all_to_all", local
        self.assume(
            f"{self.dtype(frame, v)}{list(shape)} changes its sharding outside shard_map: "
            f"{op} over {self.groups.said(moved)}"
        )
        return self.groups.steps(
            op,
            tuple(moved),
            total,
            str(self.dtype(frame, v)),
            name=f"reshard {op}",
            where=where(node.eqn),
        )

    def note_replicated(self, frame: Frame, values: Sequence[int]) -> None:
        if frame.manual or len(self.groups.devices) == 1:
            return
        for v in values:
            if self.size(frame, v) > 1 and not any(frame.layouts.get(v, ())):
                self.assume(
                    "work outside shard_map on arrays that nothing shards is repeated everywhere"
                )
                return

    def kernel(
        self,
        name: str,
        kind: str,
        lane_ops: float,
        traffic: int,
        node: Node,
        *,
        launches: int = 1,
        detail: str = "",
        spread: Spread = PLAIN,
    ) -> Op:
        ops = int(lane_ops)
        time = vector_time(ops, traffic, self.on, launches, spread)
        return Op(
            name=name,
            kind=kind,
            time_s=time.time_s,
            bound_s=time.bound_s,
            limited_by=time.limited_by,
            flops=ops,
            bytes=time.bytes,
            vector_s=ops / self.vector_rate,
            memory_s=traffic / self.memory_rate,
            where=where(node.eqn),
            detail=detail,
        )

    def lanes(self, frame: Frame, v: int) -> float:
        return self.lane_factors(self.dtype(frame, v))

    def read_bytes(self, frame: Frame, node: Node) -> int:
        """Bytes of the distinct operands."""
        roots = {self.root(frame, v): v for v in node.ins if v is not None}
        return sum(self.bytes(frame, v) for r, v in roots.items() if r is not None)

    def write_bytes(self, frame: Frame, node: Node) -> int:
        return sum(self.bytes(frame, v) for v in node.outs)


Rule = Callable[[Walker, Frame, int, Node], None]
Fuse = Callable[[Walker, Frame, tuple[int, ...]], Sequence[Step]]
