"""Which part of the scores a mask leaves, where the mask is made of positions alone.

A causal mask or a window is a comparison of position numbers, so the program itself says, without
any value, which tiles of scores are wholly masked; a fused kernel leaves them out. The mask is
evaluated at every 16th position (the side of a matrix instruction's block), of long sequences at
about 512 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.program.graph import Graph, Node

_STRIDE, _SAMPLES = 16, 512
_MASKED = -1e9  # what a mask puts in place of a score, or adds to it, at most

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "max": np.maximum,
    "min": np.minimum,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "select_n": lambda which, *cases: np.where(which, cases[1], cases[0]),
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
}


def live_share(
    graph: Graph, nodes: Sequence[int], rows: Set[int], keys: Set[int], tile: int
) -> float:
    """Of tiles of `tile` x `tile` scores, the share that is not wholly masked.

    `nodes` are the operations of the kernel, `rows` and `keys` the lengths that dimensions of
    queries and keys have; dimensions over which a mask does not vary do not count.
    """
    stride = _STRIDE * -(-max(rows | keys) // (_STRIDE * _SAMPLES))
    samples = _Samples(graph, nodes, stride)
    for i in nodes:
        kept = samples.kept(graph.nodes[i])
        if kept is None:
            continue
        shape = graph.avals[graph.nodes[i].outs[0]].shape
        if share := _tiles(kept, shape, rows, keys, max(tile, stride) // stride):
            return share
    return 1.0


class _Samples:
    """Values that follow from positions alone, at every `stride`-th index of each dimension, and
    with dimensions of size 1 where they do not vary.
    """

    def __init__(self, graph: Graph, nodes: Sequence[int], stride: int) -> None:
        self.graph = graph
        self.stride = stride
        self.made = {v: graph.nodes[i] for i in nodes for v in graph.nodes[i].outs}
        self.constants = dict(graph.constants)
        self.known: dict[int, Any] = {}

    def kept(self, node: Node) -> NDArray[np.bool_] | None:
        """Where a node keeps scores; None if it is no mask of positions."""
        if node.name not in ("select_n", "add"):
            return None
        first, *cases = (self.operand(node, i) for i in range(len(node.ins)))
        if node.name == "add":
            cases.append(first)
        if len(cases) != 2 or (cases[0] is None) == (cases[1] is None):
            return None
        at = 0 if cases[1] is None else 1
        if node.name == "add":  # of a bias
            return np.asarray(cases[at] > _MASKED)
        if first is None or np.max(cases[at]) > _MASKED:
            return None
        return np.asarray(first == (1 - at))

    def operand(self, node: Node, operand: int) -> Any:
        """Samples of an operand; None if values decide it."""
        v = node.ins[operand]
        if v is None:
            value = node.literals[operand]
            ndim = len(node.eqn.invars[operand].aval.shape)
            return None if value is None else np.asarray(value).reshape((1,) * ndim)
        if v not in self.known:
            self.known[v] = self.value(v)
        return self.known[v]

    def value(self, v: int) -> Any:
        if v in self.constants:
            return self.array(self.constants[v])
        node = self.made.get(v)
        if node is None or len(node.outs) != 1:
            return None
        shape = self.graph.avals[v].shape
        if node.name == "iota":
            d = node.params["dimension"]
            ramp = np.arange(0, shape[d], self.stride)
            return ramp.reshape([-1 if e == d else 1 for e in range(len(shape))])
        inside = [self.operand(node, i) for i in range(len(node.ins))]
        if not inside or any(x is None for x in inside):
            return None
        return _apply(node, inside, shape)

    def array(self, array: Any) -> Any:
        """Of an array that the program holds; None if it is no mask and no positions."""
        if array.dtype.kind not in "biu" or array.ndim > 2:
            return None
        return np.asarray(array)[(slice(None, None, self.stride),) * array.ndim]


def _apply(node: Node, inside: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """A node's result from samples of its operands; None if it is no such operation."""
    x = inside[0]
    if node.name == "broadcast_in_dim":
        order = [1] * len(shape)
        for d, to in enumerate(node.params["broadcast_dimensions"]):
            order[to] = x.shape[d]
        return x.reshape(order)
    if node.name == "transpose":
        return x.transpose(node.params["permutation"])
    if node.name == "convert_element_type":
        to = np.dtype(node.params["new_dtype"])
        return x.astype(to) if to.kind in "biuf" else x
    if node.name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(x, node.eqn.invars[0].aval.shape, shape)
    function = _FUNCTIONS.get(node.name)
    if function is None:
        return None
    with np.errstate(all="ignore"):
        return function(*inside)


def _reshaped(x: Any, have: tuple[int, ...], to: tuple[int, ...]) -> Any:
    """`x` with dimensions of size 1 added or dropped; None if others change."""
    kept = [d for d, size in enumerate(have) if size != 1]
    places = [d for d, size in enumerate(to) if size != 1]
    if [have[d] for d in kept] != [to[d] for d in places]:
        return None
    order = [1] * len(to)
    for d, place in zip(kept, places, strict=True):
        order[place] = x.shape[d]
    return x.reshape(order)


def _tiles(
    kept: NDArray[np.bool_], shape: tuple[int, ...], rows: Set[int], keys: Set[int], step: int
) -> float | None:
    """Share of the tiles of `step` x `step` samples with anything kept, over the two dimensions
    that the mask varies in; None if it keeps nothing or varies otherwise.
    """
    varies = [d for d in range(kept.ndim) if kept.shape[d] > 1]
    if not 1 <= len(varies) <= 2 or not any(kept.flat):
        return None
    if shape[varies[-1]] not in keys or shape[varies[0]] not in rows | keys:
        return None
    live: Any = kept.reshape([kept.shape[d] for d in varies])
    area: Any = 1.0
    for axis, size in enumerate(live.shape):
        starts = np.arange(0, size, step)
        live = np.logical_or.reduceat(live, starts, axis=axis)
        ends = np.append(starts[1:], size)
        area = np.multiply.outer(area, (ends - starts) / size)
    return float((live * area).sum())
