"""Fused kernels: chains of element-wise operations, reductions and slices become one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from emulator.program import spread
from emulator.program.graph import Node
from emulator.program.walker import Frame, Walker
from emulator.program.weights import GENERATED, PER_ELEMENT, RANDOM, REDUCTIONS, SLICES
from emulator.program.where import at
from emulator.timeline import Op
from emulator.units import several


def fuse(walker: Walker, frame: Frame, indices: tuple[int, ...]) -> list[Op]:
    """The kernels of a run of fusible nodes."""
    return _Segment(walker, frame, indices).kernels()


class _Segment:
    """Fusible nodes between two that are not: their connected parts become kernels."""

    def __init__(self, walker: Walker, frame: Frame, indices: tuple[int, ...]) -> None:
        self.walker = walker
        self.frame = frame
        self.indices = indices
        self.nodes = frame.graph.nodes
        self.makers = {v: i for i in indices for v in self.nodes[i].outs}

    def kernels(self) -> list[Op]:
        made = [kernel for part in self.parts() if (kernel := self.kernel(part)) is not None]
        # Arithmetic on single numbers rides along with a kernel that has a launch anyway.
        arrays = [kernel for kernel in made if kernel.detail]
        return arrays or made[:1]

    def parts(self) -> list[list[int]]:
        """Nodes joined by the arrays that one makes and another reads; numbers do not join."""
        leader = {i: i for i in self.indices}

        def find(i: int) -> int:
            while leader[i] != i:
                leader[i] = leader[leader[i]]
                i = leader[i]
            return i

        for i in self.indices:
            for v in self.nodes[i].ins:
                root = self.walker.root(self.frame, v)
                maker = self.makers.get(root) if root is not None else None
                if root is None or maker is None:
                    continue
                if self.walker.size(self.frame, root) > 1:
                    leader[find(i)] = find(maker)
        parts: dict[int, list[int]] = {}
        for i in self.indices:
            parts.setdefault(find(i), []).append(i)
        return list(parts.values())

    def kernel(self, part: list[int]) -> Op | None:
        """One kernel for `part`: its memory traffic and lane operations."""
        walker, frame = self.walker, self.frame
        members = set(part)
        reads: dict[int, int] = {}
        ops: dict[int, float] = {}
        largest = 1
        for i in part:
            node = self.nodes[i]
            ops[i] = lane_ops(walker, frame, node)
            largest = max(largest, *(walker.size(frame, w) for w in node.outs))
            for v in node.ins:
                root = walker.root(frame, v)
                if v is None or root is None or self.makers.get(root) in members:
                    continue
                whole = walker.bytes(frame, v)
                if node.name in SLICES:  # reads only the part that it takes
                    whole = min(whole, reads.get(root, 0) + walker.write_bytes(frame, node))
                reads[root] = max(reads.get(root, 0), whole)
                if node.name not in SLICES:
                    largest = max(largest, walker.size(frame, v))
        writes = [
            w
            for i in part
            for w in self.nodes[i].outs
            if any(use not in members for use in frame.plan.uses.get(w, ()))
        ]
        label = label_of([self.nodes[i] for i in part])
        last = self.nodes[part[-1]]
        walker.moment(frame, at(label, last), list(reads), writes, in_place=True)
        if not writes:
            return None
        walker.note_replicated(frame, writes)
        written = sum(walker.bytes(frame, w) for w in writes)
        total = sum(ops.values())
        if not total and not reads and largest <= 1:
            return None  # a constant
        detail = several(len(part), "operation") if largest > 1 else ""
        how = spread.of_chain(walker, frame, part, ops, reads, written)
        traffic = sum(reads.values()) + written
        return walker.kernel(label, "vector", total, traffic, last, detail=detail, spread=how)


def lane_ops(walker: Walker, frame: Frame, node: Node) -> float:
    """FP32 lane operations of a fusible node."""
    name = node.name
    if name in GENERATED or name in SLICES:
        return 0.0
    if name in REDUCTIONS:
        v = node.ins[0] if node.ins[0] is not None else node.outs[0]
        return REDUCTIONS[name] * walker.size(frame, v) * walker.lanes(frame, v)
    v = node.outs[0]
    if name in RANDOM:
        words = max(walker.bytes(frame, w) for w in node.outs) // 4 + 1
        return RANDOM[name] * words
    weight = PER_ELEMENT[name]
    if name == "integer_pow":
        y = abs(node.params["y"])
        weight = max(1, y.bit_length() - 1 + y.bit_count() - 1) + 4 * (node.params["y"] < 0)
    # A comparison of floats works on its operands' type, a conversion on the wider of the two.
    types = [walker.lanes(frame, v)] + [
        walker.lanes(frame, u) for u in node.ins if u is not None and walker.size(frame, u) > 1
    ]
    return weight * walker.size(frame, v) * max(types)


def label_of(nodes: Sequence[Node]) -> str:
    """A kernel's name: its most telling operations."""
    names: dict[str, int] = {}
    for node in nodes:
        if node.name not in GENERATED and node.name != "convert_element_type":
            names[node.name] = names.get(node.name, 0) + 1
    if not names:
        return nodes[-1].name
    telling = sorted(names, key=lambda n: (-PER_ELEMENT.get(n, 2 if n in REDUCTIONS else 1), n))[:3]
    return "+".join(telling) + ("+..." if len(names) > 3 else "")
