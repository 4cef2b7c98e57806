"""Which mesh axes divide which dimension of an array outside `shard_map`.

Inside `shard_map` shapes are local and there is nothing to find out. Outside, a compiler lets
arrays keep the sharding they have: what a `shard_map` returns is sharded by its `out_specs`, what
it consumes by its `in_specs`, and work in between follows. `infer` finds these layouts;
`emulator.program.costs` then charges what does not match.

A layout has one entry per dimension: the axes that divide it, outermost first. A value nothing is
known about is replicated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emulator.mesh import entries
from emulator.program.graph import Graph, Node
from emulator.program.trace import scan_counts

Layout = tuple[tuple[str, ...], ...]

# One result element from one element of each operand at the same index (operands of other shapes
# are scalars).
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma
    div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
    igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to
    max min mul mulhi name ne neg nextafter not one_minus_square optimization_barrier or
    polygamma population_count pow pvary real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh xor zeta""".split()
)


def replicated(ndim: int) -> Layout:
    return ((),) * ndim


def from_spec(spec: Any, ndim: int) -> Layout:
    """The layout that a PartitionSpec describes."""
    known = entries(spec)[:ndim]
    return known + ((),) * (ndim - len(known))


def axes_of(layout: Layout) -> tuple[str, ...]:
    return tuple(axis for entry in layout for axis in entry)


def local_shape(
    shape: Sequence[int], layout: Layout | None, sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """What one device holds; a dimension that does not divide rounds up."""
    if layout is None or not any(layout):
        return tuple(shape)
    return tuple(
        -(-size // math.prod(sizes[a] for a in axes)) if axes else size
        for size, axes in zip(shape, layout, strict=True)
    )


def infer(graph: Graph, seeds: Mapping[int, Layout], manual: frozenset[str]) -> dict[int, Layout]:
    """Layouts of the values of `graph` over the axes that are not `manual`, as far as anything
    determines them.
    """
    known = dict(seeds)

    def learn(value: int | None, layout: Layout | None) -> bool:
        if value is None or layout is None or value in known:
            return False
        if len(layout) != len(_shape(graph, value)):
            return False
        layout = tuple(tuple(a for a in entry if a not in manual) for entry in layout)
        known[value] = layout
        return True

    for value, sharding in graph.pins:
        learn(value, from_spec(sharding.spec, len(_shape(graph, value))))
    # What shard_maps return is certain; what they consume may yet come from elsewhere, so it is
    # learned after a sweep.
    for node in graph.nodes:
        if node.name == "shard_map":
            for value, spec in zip(node.outs, node.params["out_specs"], strict=True):
                learn(value, from_spec(spec, len(_shape(graph, value))))
    changed = True
    asked = False
    unsettled = list(graph.nodes)
    while changed or not asked:
        asked = asked or not changed
        changed = False
        unsettled = [node for node in unsettled if not _settled(node, known)]
        for node in unsettled:
            changed |= _relate(graph, node, known, learn, asked, manual)
        unsettled = [node for node in unsettled if not _settled(node, known)]
        for node in reversed(unsettled):
            changed |= _relate(graph, node, known, learn, asked, manual)
    return known


def _settled(node: Node, known: Mapping[int, Layout]) -> bool:
    """Whether nothing is left to learn at a node."""
    return all(v in known for v in node.outs) and all(v is None or v in known for v in node.ins)


def _shape(graph: Graph, value: int) -> tuple[int, ...]:
    return tuple(getattr(graph.avals[value], "shape", ()))


def _relate(
    graph: Graph,
    node: Node,
    known: dict[int, Layout],
    learn: Any,
    asked: bool,
    manual: frozenset[str],
) -> bool:
    """Lets what is known at one node spread to its other values."""
    name = node.name
    changed = False
    if name == "shard_map":
        if asked:
            for value, spec in zip(node.ins, node.params["in_specs"], strict=True):
                if value is not None:
                    changed |= learn(value, from_spec(spec, len(_shape(graph, value))))
        return changed
    if name in ("scan", "while", "cond"):
        return _through_body(graph, node, known, learn, asked, manual)
    if name in ("sharding_constraint", "reshard"):
        spec = getattr(node.params.get("sharding", node.params.get("dst_sharding")), "spec", None)
        if spec is not None and any(entries(spec)):
            changed |= learn(node.outs[0], from_spec(spec, len(_shape(graph, node.outs[0]))))
        else:
            changed |= learn(
                node.outs[0], known.get(node.ins[0]) if node.ins[0] is not None else None
            )
        return changed
    out = node.outs[0] if node.outs else None
    if out is None:
        return False
    if name in ELEMENTWISE:
        shape = _shape(graph, out)
        peers = [out, *(v for v in node.ins if v is not None and _shape(graph, v) == shape)]
        if name in ("optimization_barrier", "pvary", "name", "copy") and len(node.outs) > 1:
            for v, w in zip(node.ins, node.outs, strict=True):
                if v is not None:
                    changed |= learn(w, known.get(v)) | learn(v, known.get(w))
            return changed
        layout = next((known[v] for v in peers if v in known and any(known[v])), None)
        if layout is not None:
            for v in peers:
                changed |= learn(v, layout)
        return changed
    source = node.ins[0] if node.ins else None
    if source is None:
        return False
    forward = known.get(source)
    if forward is not None:
        for value, layout in zip(node.outs, forward_layouts(graph, node, known), strict=False):
            if layout is not None and any(layout):
                changed |= learn(value, layout)
    backward = known.get(out)
    if backward is not None and any(backward):
        changed |= learn(source, _backward(graph, node, backward))
    return changed


def forward_layouts(
    graph: Graph, node: Node, known: Mapping[int, Layout]
) -> tuple[Layout | None, ...]:
    """Layouts of the results of a node that is not element-wise, given those of its operands; None
    if unknown.
    """
    name, params = node.name, node.params
    source = node.ins[0]
    assert source is not None
    layout = known[source]
    shape = _shape(graph, source)
    out_shape = _shape(graph, node.outs[0])
    if name == "transpose":
        return (tuple(layout[d] for d in params["permutation"]),)
    if name == "squeeze":
        return (tuple(e for d, e in enumerate(layout) if d not in params["dimensions"]),)
    if name == "broadcast_in_dim":
        entries: list[tuple[str, ...]] = [()] * len(out_shape)
        for d, to in enumerate(params["broadcast_dimensions"]):
            if shape[d] == out_shape[to]:
                entries[to] = layout[d]
        return (tuple(entries),)
    if name == "reshape":
        return (reshape_layout(shape, out_shape, layout),)
    if name in ("random_wrap", "random_unwrap"):  # the words of a key are a last dimension
        return ((*layout, *replicated(len(out_shape)))[: len(out_shape)],)
    if name.startswith("reduce_") and "axes" in params or name in ("argmax", "argmin"):
        kept = tuple(e for d, e in enumerate(layout) if d not in params["axes"])
        return (kept,) * len(node.outs)
    if name == "dot_general":
        right = known.get(node.ins[1]) if node.ins[1] is not None else None
        return (dot_layout(params["dimension_numbers"], layout, right, _ndim(graph, node.ins[1])),)
    if len(shape) == len(out_shape):  # untouched dimensions keep their axes
        kept = tuple(
            e if shape[d] == out_shape[d] and d not in touched(node) else ()
            for d, e in enumerate(layout)
        )
        return (kept,) * len(node.outs)
    return (None,) * len(node.outs)


def _ndim(graph: Graph, value: int | None) -> int:
    return 0 if value is None else len(_shape(graph, value))


def touched(node: Node) -> tuple[int, ...]:
    """Dimensions of the first operand along which a node moves data, though their size may stay."""
    params = node.params
    if node.name in ("sort", "concatenate"):
        return (params["dimension"],)
    if node.name.startswith("cum"):
        return (params["axis"],)
    if node.name == "rev":
        return tuple(params["dimensions"])
    if node.name in ("gather", "top_k", "scatter") or node.name.startswith("scatter"):
        return tuple(range(64))
    return ()


def _backward(graph: Graph, node: Node, layout: Layout) -> Layout | None:
    """The operand's layout that gives the result this one, if the node only renames dimensions."""
    name, params = node.name, node.params
    shape = _shape(graph, node.ins[0])  # type: ignore[arg-type]
    if name == "transpose":
        entries: list[tuple[str, ...]] = [()] * len(shape)
        for to, d in enumerate(params["permutation"]):
            entries[d] = layout[to]
        return tuple(entries)
    if name == "reshape":
        return reshape_layout(_shape(graph, node.outs[0]), shape, layout)
    if name == "squeeze":
        kept = iter(layout)
        return tuple(() if d in params["dimensions"] else next(kept) for d in range(len(shape)))
    if name in ("random_wrap", "random_unwrap"):
        return (*layout, *replicated(len(shape)))[: len(shape)]
    if name == "broadcast_in_dim" and all(
        shape[d] == _shape(graph, node.outs[0])[to]
        for d, to in enumerate(params["broadcast_dimensions"])
    ):
        return tuple(layout[to] for to in params["broadcast_dimensions"])
    return None


def reshape_layout(shape: Sequence[int], out_shape: Sequence[int], layout: Layout) -> Layout | None:
    """Carries a layout through a reshape: a group of dimensions that merge or split keeps the axes
    of its first one.
    """
    if not math.prod(shape):
        return None
    result: list[tuple[str, ...]] = [()] * len(out_shape)
    i = j = 0
    while j < len(out_shape):  # then only ones are left of `shape`
        start_i, start_j = i, j
        left, right, j = 1, out_shape[j], j + 1
        if i < len(shape):
            left, i = shape[i], i + 1
        while left != right:
            if left < right:
                left, i = left * shape[i], i + 1
            else:
                right, j = right * out_shape[j], j + 1
        group = [d for d in range(start_i, i) if shape[d] != 1]
        outs = [d for d in range(start_j, j) if out_shape[d] != 1]
        if not group or not outs:
            continue
        if any(layout[d] for d in group[1:]):
            return None
        result[outs[0]] = layout[group[0]]
    return tuple(result)


def dot_layout(
    dimension_numbers: Any, left: Layout, right: Layout | None, right_ndim: int
) -> Layout:
    """Layout of a product: batch dimensions, then free ones of the left, then of the right; no axis
    twice.
    """
    (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
    right = right if right is not None else replicated(right_ndim)
    entries = [left[a] or right[b] for a, b in zip(batch_l, batch_r, strict=True)]
    used = {a for e in entries for a in e} | {a for d in contract_l for a in left[d]}
    for d in range(len(left)):
        if d not in contract_l and d not in batch_l:
            entries.append(left[d])
            used.update(left[d])
    for d in range(right_ndim):
        if d not in contract_r and d not in batch_r:
            entries.append(tuple(a for a in right[d] if a not in used))
    return tuple(entries)


def body_links(
    node: Node,
) -> list[tuple[Graph, list[tuple[int, int, int]], list[tuple[int, int, int]]]]:
    """How values of the enclosing graph meet those of each body of a loop or branch.

    For each body: the body, pairs (outer operand, body input, leading dimensions dropped), and
    pairs (outer result, body output, leading dimensions dropped).
    """
    params = node.params
    bodies = dict(node.bodies)
    if node.name == "scan":
        body = bodies[""]
        consts, carry = scan_counts(params)
        fixed = consts + carry
        ins = [(v, body.ins[i], int(i >= fixed)) for i, v in enumerate(node.ins) if v is not None]
        outs = [(w, body.outs[i], int(i >= carry)) for i, w in enumerate(node.outs)]
        return [(body, ins, [(w, b, d) for w, b, d in outs if b is not None])]
    if node.name == "while":
        nc, nb = params["cond_nconsts"], params["body_nconsts"]
        body = bodies[".body"]
        outer = node.ins[nc:]
        ins = [(v, body.ins[i], 0) for i, v in enumerate(outer) if v is not None]
        pairs = [(w, b, 0) for w, b in zip(node.outs, body.outs, strict=True) if b is not None]
        cond = bodies[".cond"]
        cond_outer = (*node.ins[:nc], *node.ins[nc + nb :])
        cond_ins = [(v, cond.ins[i], 0) for i, v in enumerate(cond_outer) if v is not None]
        return [(body, ins, pairs), (cond, cond_ins, [])]
    links = []
    for _, branch in node.bodies:
        ins = [(v, branch.ins[i], 0) for i, v in enumerate(node.ins[1:]) if v is not None]
        pairs = [(w, b, 0) for w, b in zip(node.outs, branch.outs, strict=True) if b is not None]
        links.append((branch, ins, pairs))
    return links


def _through_body(
    graph: Graph,
    node: Node,
    known: dict[int, Layout],
    learn: Any,
    asked: bool,
    manual: frozenset[str],
) -> bool:
    """Spreads layouts into a body and back out; a loop's carry keeps one layout."""
    if not asked:
        return False
    changed = False
    for body, ins, outs in body_links(node):
        seeds: dict[int, Layout] = {}
        for outer, inner, drop in [*ins, *outs]:
            if outer in known and inner not in seeds:
                seeds[inner] = known[outer][drop:]
        found = infer(body, seeds, manual)
        for outer, inner, drop in [*ins, *outs]:
            if inner in found and axes_of(found[inner]):
                changed |= learn(outer, ((),) * drop + found[inner])
    if node.name == "scan":
        first, count = scan_counts(node.params)
        carries = list(zip(node.ins[first : first + count], node.outs[:count], strict=True))
    elif node.name == "while":
        first = node.params["cond_nconsts"] + node.params["body_nconsts"]
        carries = list(zip(node.ins[first:], node.outs, strict=True))
    else:
        carries = []
    for v, w in carries:
        if v is not None:
            changed |= learn(w, known.get(v)) | learn(v, known.get(w))
    return changed
