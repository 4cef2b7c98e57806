"""Finds attention in a graph: a product of queries and keys, a softmax, a product with the values.

`jax.nn.dot_product_attention` leaves nothing in a jaxpr but these operations, so they are found by
their structure, in whatever order and layout a program writes them. From a product on, everything
as large as its result (the scores) is followed. It is attention if

- an exponential of the scores and its sum over one side's dimensions (the keys) are taken;
- only element-wise operations, reductions, layout changes and matmuls see an array of that size, so
  that no score is needed afterwards;
- one product contracts the keys of what the softmax made (forward); or a second product of that
  size joins in (the gradient of the weights), and products contract either side (backward). Of a
  forward and a backward pass in one graph two kernels are made.

What only feeds these operations, such as a mask made of positions, is part of the kernel.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

from emulator.program.graph import Graph, Node
from emulator.program.layout import ELEMENTWISE, Layout, forward_layouts
from emulator.program.weights import ALIASES, GENERATED, PER_ELEMENT, RANDOM, REDUCTIONS

LARGEST_HEAD = 512  # documented for cann-ops FlashAttentionScore

_TYPES = frozenset(("bfloat16", "float16", "float32"))
_EXPONENTIALS = frozenset(("exp", "exp2"))
_SIDE = frozenset(PER_ELEMENT) | frozenset(RANDOM) | GENERATED | ALIASES | {"transpose"}
_INSIDE = _SIDE | frozenset(REDUCTIONS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One fused kernel: `scores` is the node of the product of queries and keys, `dots` all its
    products and `roles` what they are in the letters of `emulator.chip.Attention`, `nodes` its
    other operations, `late` those of them that the backward pass adds. `at` is its last node, where
    its results exist. `keys` are the dimensions of the
    scores that the softmax sums over; a score sums over `depth`, values have `width` columns.
    """

    at: int
    scores: int
    dots: tuple[int, ...]
    roles: tuple[str, ...]
    nodes: tuple[int, ...]
    late: frozenset[int]
    keys: frozenset[int]
    depth: int
    width: int
    backward: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """Attention in a graph: its kernels, and every node that they stand for."""

    kernels: tuple[Kernel, ...]
    covered: frozenset[int]


def find(graph: Graph) -> tuple[Pattern, ...]:
    """All attention of a graph, in order."""
    nodes = graph.nodes
    if not any(node.name in _EXPONENTIALS for node in nodes):
        return ()
    dots = [i for i, node in enumerate(nodes) if node.name == "dot_general"]
    if len(dots) < 2:
        return ()
    makers = {v: i for i, node in enumerate(nodes) for v in node.outs}
    consumers = graph.consumers()
    found: list[Pattern] = []
    taken: set[int] = set()
    for i in dots:
        if i in taken:
            continue
        pattern = _Region(graph, consumers, makers, i).pattern()
        if pattern is not None and taken.isdisjoint(pattern.covered):
            found.append(pattern)
            taken |= pattern.covered
    return tuple(found)


class _NotAttention(Exception):
    """The region around a product is something else."""


class _Region:
    """Everything that sees an array of the size of one product's result."""

    def __init__(
        self,
        graph: Graph,
        consumers: Mapping[int, Sequence[int]],
        makers: Mapping[int, int],
        scores: int,
    ) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.consumers = consumers
        self.makers = makers
        self.scores = scores
        out = self.nodes[scores].outs[0]
        self.count = math.prod(self.shape(out))
        self.members: dict[int, None] = {}  # operations that see scores, in order of discovery
        self.entries: dict[int, None] = {scores: None}  # products that make arrays of this size
        self.exits: dict[int, int] = {}  # product -> its operand of this size
        self.values: set[int] = set()  # the arrays of this size

    def shape(self, v: int) -> tuple[int, ...]:
        return tuple(getattr(self.graph.avals[v], "shape", ()))

    def full(self, v: int | None) -> bool:
        return v is not None and math.prod(self.shape(v)) == self.count

    def pattern(self) -> Pattern | None:
        try:
            return self._pattern()
        except _NotAttention:
            return None

    def _pattern(self) -> Pattern:
        left, right, depth = _dims(self.nodes[self.scores])
        types = {str(v.aval.dtype) for v in self.nodes[self.scores].eqn.invars}
        if depth > LARGEST_HEAD or left * right <= 1 or not self.count or not types <= _TYPES:
            raise _NotAttention
        first = self._follow(self.scores)
        if not any(self.nodes[i].name in _EXPONENTIALS for i in first):
            raise _NotAttention
        self._join()
        # What follows from another product than that of queries and keys belongs to the backward
        # pass.
        late = {i for entry in self.entries if entry != self.scores for i in self._follow(entry)}
        others = [i for i in self.entries if i != self.scores]
        self._rows(late)
        self._sides()
        keys, ahead = self._softmax(late)
        forward = [i for i in self.exits if i not in late and ahead.get(i)]
        behind = [i for i in self.exits if i not in forward]
        if len(others) != (1 if behind else 0) or len(forward) > 1 or not self.exits:
            raise _NotAttention
        if behind and not any(i in late for i in behind):
            raise _NotAttention
        kernels = []
        if forward:
            roles = {self.scores: "rdk", forward[0]: "rkw"}
            kernels.append(self._kernel(roles, keys, frozenset()))
        if behind:
            roles = {self.scores: "rdk", others[0]: "rwk"}
            kinds = iter(("rkd", "krd"))
            for i in behind:
                role = next(kinds, "") if i in late else "krw"
                if not role or role in roles.values():
                    raise _NotAttention
                roles[i] = role
            kernels.append(self._kernel(roles, keys, frozenset(late)))
        # Work that no product needs is on rows, and its results are wanted elsewhere.
        rest = sorted(set(self.members) - {i for k in kernels for i in k.nodes})
        last = kernels[-1] if late.intersection(rest) else kernels[0]
        kernels[kernels.index(last)] = dataclasses.replace(
            last, nodes=tuple(sorted((*last.nodes, *rest)))
        )
        covered = frozenset((*self.members, *self.entries, *self.exits))
        return Pattern(tuple(kernels), covered)

    def _follow(self, entry: int) -> set[int]:
        """Operations after a product as far as arrays have its size; products that take one."""
        seen: set[int] = set()
        values = [self.nodes[entry].outs[0]]
        while values:
            v = values.pop()
            self.values.add(v)
            for i in self.consumers.get(v, ()):
                if i in seen:
                    continue
                if i == len(self.nodes):
                    raise _NotAttention  # the scores are a result
                node = self.nodes[i]
                if node.name == "dot_general":
                    if self.exits.setdefault(i, node.ins.index(v)) != node.ins.index(v):
                        raise _NotAttention  # of scores with scores
                elif node.name not in _INSIDE or len(node.outs) != 1:
                    raise _NotAttention
                else:
                    self.members[i] = None
                    if self.full(node.outs[0]):
                        values.append(node.outs[0])
                    elif math.prod(self.shape(node.outs[0])) > self.count:
                        raise _NotAttention  # repeated
                seen.add(i)
        return seen

    def _join(self) -> None:
        """Products elsewhere whose results, after element-wise work, meet the scores."""
        asked: set[int] = set()
        while True:
            wanted = [
                v
                for i in (*self.members,)
                for v in self.nodes[i].ins
                if v is not None and v not in self.values and v not in asked and self.full(v)
            ]
            if not wanted:
                return
            for v in wanted:
                asked.add(v)
                entry = self._source(v)
                if entry is not None and entry not in self.entries:
                    self.entries[entry] = None
                    self._follow(entry)

    def _source(self, v: int) -> int | None:
        """The product that an array of the scores' size was made from, if from one."""
        values, seen = [v], set()
        while values:
            i = self.makers.get(values.pop())
            if i is None or i in seen:
                continue
            seen.add(i)
            node = self.nodes[i]
            if node.name == "dot_general":
                return i
            if node.name in _SIDE:
                values += [w for w in node.ins if w is not None and self.full(w)]
        return None

    def _rows(self, late: set[int]) -> None:
        """Work on what reductions left (a maximum, a sum) that needs nothing else."""
        made = {v for i in self.members for v in self.nodes[i].outs}
        after = {v for i in late for v in self.nodes[i].outs}
        last = max(self.members)
        # In program order, without a look at what has nothing to do with the region.
        waiting = sorted({i for v in made for i in self.consumers.get(v, ())})
        before = -1
        while waiting:
            i = heapq.heappop(waiting)
            if i == before or i > last or i in self.members:
                continue
            before, node = i, self.nodes[i]
            ins = [v for v in node.ins if v is not None]
            if node.name not in _INSIDE or len(node.outs) != 1 or not ins:
                continue
            if all(v in made for v in ins):
                self.members[i] = None
                made.update(node.outs)
                for reader in self.consumers.get(node.outs[0], ()):
                    heapq.heappush(waiting, reader)
                if not after.isdisjoint(ins):
                    late.add(i)
                    after.update(node.outs)

    def _sides(self) -> None:
        """What feeds only the element-wise work: masks made of positions, random bits."""
        # Backwards, so that all readers of an operation are known when it is looked at.
        waiting = [-i for member in self.members for i in self._makers_of(member)]
        heapq.heapify(waiting)
        before = len(self.nodes)
        while waiting:
            i = -heapq.heappop(waiting)
            node = self.nodes[i]
            if i == before or i in self.members or node.name not in _SIDE:
                continue
            before = i
            readers = {r for v in node.outs for r in self.consumers.get(v, ())}
            if readers and all(r in self.members for r in readers):
                self.members[i] = None
                for maker in self._makers_of(i):
                    heapq.heappush(waiting, -maker)

    def _makers_of(self, i: int) -> list[int]:
        return [self.makers[v] for v in self.nodes[i].ins if v is not None and v in self.makers]

    def _softmax(self, late: set[int]) -> tuple[frozenset[int], dict[int, bool]]:
        """The key dimensions of the scores, and for each product of what the softmax made whether
        it contracts the keys.
        """
        sides = self._marks(late)
        summed: set[str] = set()
        exponentials = {
            v
            for i in self.members
            if i not in late and self.nodes[i].name in _EXPONENTIALS
            for v in self.nodes[i].outs
        }
        for i in self.members:
            node = self.nodes[i]
            v = node.ins[0] if node.ins else None
            if node.name != "reduce_sum" or i in late or not self.full(v) or v not in sides:
                continue
            if self._from(v, exponentials):
                summed.add(_sides_of(sides[v], node.params["axes"]))
        if summed not in ({"left"}, {"right"}):
            raise _NotAttention
        (key,) = summed
        ahead = {}
        for i, operand in self.exits.items():
            node = self.nodes[i]
            v = node.ins[operand]
            if i in late or v not in sides or not self._from(v, exponentials):
                continue
            contract = node.params["dimension_numbers"][0][operand]
            ahead[i] = _sides_of(sides[v], contract) == key
        layout = sides[self.nodes[self.scores].outs[0]]
        return frozenset(d for d, entry in enumerate(layout) if entry == (key,)), ahead

    def _from(self, v: int | None, sources: set[int]) -> bool:
        """Whether an array of the scores' size follows from one of `sources`."""
        values, seen = [v], set()
        while values:
            w = values.pop()
            if w in sources:
                return True
            i = self.makers.get(w) if w is not None else None
            if i is None or i in seen or i not in self.members:
                continue
            seen.add(i)
            values += [u for u in self.nodes[i].ins if u is not None and self.full(u)]
        return False

    def _marks(self, late: set[int]) -> dict[int, Layout]:
        """Of each array that follows from the scores, which dimensions are the left operand's and
        which the right one's.
        """
        node = self.nodes[self.scores]
        batch, left = _free(node)
        ndim = len(self.shape(node.outs[0]))
        sides: dict[int, Layout] = {
            node.outs[0]: tuple(
                () if d < batch else ("left",) if d < batch + left else ("right",)
                for d in range(ndim)
            )
        }
        for i in sorted(i for i in self.members if i not in late):
            node = self.nodes[i]
            out = node.outs[0]
            known = [v for v in node.ins if v is not None and v in sides]
            if not known or node.name in REDUCTIONS and "axes" not in node.params:
                continue
            if node.name in ELEMENTWISE:
                sides[out] = tuple(
                    next((e for v in known if len(sides[v]) > d and (e := sides[v][d])), ())
                    for d in range(len(self.shape(out)))
                )
            elif node.ins[0] in sides:
                layout = forward_layouts(self.graph, node, sides)[0]
                if layout is not None:
                    sides[out] = layout
        return sides

    def _kernel(
        self, roles: Mapping[int, str], keys: frozenset[int], late: frozenset[int]
    ) -> Kernel:
        """The kernel of these products: of the region what the last ones follow from."""
        exits = [i for i in roles if i in self.exits]
        needed: dict[int, None] = {}
        values = [v for i in exits if (v := self.nodes[i].ins[self.exits[i]]) is not None]
        while values:
            i = self.makers.get(values.pop())
            if i is None or i in needed or i not in self.members:
                continue
            needed[i] = None
            values += [v for v in self.nodes[i].ins if v is not None]
        size = {"d": 1, "w": 1}
        for i, role in roles.items():
            left, right, depth = _dims(self.nodes[i])
            axis = "d" if "d" in role else "w"
            other = depth if i not in self.exits else right if self.exits[i] == 0 else left
            size[axis] = max(size[axis], other)
        if max(size.values()) > LARGEST_HEAD:
            raise _NotAttention
        return Kernel(
            at=max(exits),
            scores=self.scores,
            dots=tuple(roles),
            roles=tuple(roles.values()),
            nodes=tuple(sorted(needed)),
            late=late.intersection(needed),
            keys=keys,
            depth=size["d"],
            width=size["w"],
            backward=bool(late),
        )


def _free(node: Node) -> tuple[int, int]:
    """Batch dimensions of a product's result, and free ones of its left operand."""
    (contract, _), (batch, _) = node.params["dimension_numbers"]
    return len(batch), len(node.eqn.invars[0].aval.shape) - len(contract) - len(batch)


def _dims(node: Node) -> tuple[int, int, int]:
    """Sizes of a product: the left operand's free ones, the right one's, the contracted ones."""
    (contract, _), (batch, _) = node.params["dimension_numbers"]
    shape = node.eqn.invars[0].aval.shape
    out = node.eqn.outvars[0].aval.shape
    skip, left = _free(node)
    return (
        math.prod(out[skip : skip + left]),
        math.prod(out[skip + left :]),
        math.prod(shape[d] for d in contract),
    )


def _sides_of(layout: Layout, dims: Sequence[int]) -> str:
    """Which side some dimensions are: "left" or "right", "" if neither or not all of one."""
    for side in ("left", "right"):
        mine = {d for d, entry in enumerate(layout) if entry == (side,)}
        marked = {d for d in dims if layout[d]}
        if mine and mine == marked:
            return side
    return ""
