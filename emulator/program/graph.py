"""A jaxpr flattened for costing: calls inlined, dead equations dropped, every value a number.

`jnp` functions arrive wrapped in `jit` (`_where`, `softmax`, ...). A compiler fuses across them,
and a sharding flows through them, so the time reading sees one list of nodes per body. Loops,
branches and `shard_map` keep bodies of their own. Paths are those of `emulator.program.trace`, so
that counts found by the values reading can be looked up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from emulator.program.calls import call_body
from emulator.program.trace import open_jaxpr, scan_counts


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One equation. `ins` are value numbers (None for a literal), `bodies` the graphs of its sub-
    programs by label, `literals` the values of literals by operand, if it has any.
    """

    path: str
    name: str
    eqn: Any
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    bodies: tuple[tuple[str, Graph], ...]
    literals: tuple[Any, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in program order over values numbered from 0; `pins` are shardings that a `jit` asked
    for, `constants` the arrays that a whole program holds.
    """

    nodes: tuple[Node, ...]
    avals: tuple[Any, ...]
    consts: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int | None, ...]
    pins: tuple[tuple[int, Any], ...]
    donated: frozenset[int]
    constants: tuple[tuple[int, Any], ...] = ()

    def consumers(self) -> dict[int, list[int]]:
        """Value -> indices of the nodes that read it; the graph's own outputs count as index
        len(nodes).
        """
        table: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for v in set(node.ins):
                if v is not None:
                    table.setdefault(v, []).append(i)
        for v in set(self.outs):
            if v is not None:
                table.setdefault(v, []).append(len(self.nodes))
        return table


class _Flattener:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.avals: list[Any] = []
        self.consts: list[int] = []
        self.pins: list[tuple[int, Any]] = []
        self.donated: set[int] = set()

    def fresh(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def body(
        self,
        jaxpr: Any,
        ins: list[int | None],
        path: str,
        top: bool,
        given: Sequence[Any] = (),
    ) -> list[int | None]:
        """Inlines `jaxpr` applied to `ins`, with the values `given` where they are literals;
        returns the numbers of its outputs.
        """
        jaxpr = open_jaxpr(jaxpr)
        env: dict[Any, int | None] = dict(zip(jaxpr.invars, ins, strict=True))
        for var in jaxpr.constvars:
            env[var] = self.fresh(var.aval)
            self.consts.append(env[var])  # type: ignore[arg-type]

        constants = {var: value for var, value in zip(jaxpr.invars, given, strict=False)}

        def read(atom: Any) -> int | None:
            return None if isinstance(atom, core.Literal) else env[atom]

        def literal(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else constants.get(atom)

        for i, eqn in enumerate(jaxpr.eqns):
            here = f"{path}/{i}"
            name = eqn.primitive.name
            eqn_ins = [read(atom) for atom in eqn.invars]
            values = [literal(atom) for atom in eqn.invars] if None in eqn_ins else []
            if (call := call_body(eqn)) is not None:
                if name in ("jit", "pjit"):
                    self.pin(eqn, eqn_ins, top)
                body, operands = call
                passed = [values[i] for i in operands] if values else []
                outs = self.body(body, [eqn_ins[i] for i in operands], here, top, passed)
                env.update(zip(eqn.outvars, outs, strict=True))
                if name in ("jit", "pjit"):
                    self.pins.extend(
                        (v, s)
                        for v, s in zip(outs, eqn.params.get("out_shardings", ()), strict=False)
                        if v is not None and hasattr(s, "spec")
                    )
                continue
            outs_new = tuple(self.fresh(var.aval) for var in eqn.outvars)
            env.update(zip(eqn.outvars, outs_new, strict=True))
            bodies = tuple((label, flatten(sub, here + label)) for label, sub in bodies_of(eqn))
            node = Node(here, name, eqn, tuple(eqn_ins), outs_new, bodies, tuple(values))
            self.nodes.append(node)
        return [read(atom) for atom in jaxpr.outvars]

    def pin(self, eqn: Any, ins: list[int | None], top: bool) -> None:
        for v, sharding in zip(ins, eqn.params.get("in_shardings", ()), strict=False):
            if v is not None and hasattr(sharding, "spec"):
                self.pins.append((v, sharding))
        if top:
            for v, given in zip(ins, eqn.params.get("donated_invars", ()), strict=False):
                if v is not None and given:
                    self.donated.add(v)


def bodies_of(eqn: Any) -> list[tuple[str, Any]]:
    """Bodies that stay bodies, labelled as paths are."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        return [(".cond", params["cond_jaxpr"]), (".body", params["body_jaxpr"])]
    if name == "cond":
        return [(f".{i}", branch) for i, branch in enumerate(params["branches"])]
    if name in ("scan", "shard_map"):
        return [("", params["jaxpr"])]
    return []


def flatten(jaxpr: Any, path: str = "") -> Graph:
    """The graph of a jaxpr, open or closed."""
    f = _Flattener()
    opened = open_jaxpr(jaxpr)
    ins = [f.fresh(var.aval) for var in opened.invars]
    outs = f.body(opened, list(ins), path, top=path == "")
    nodes = _live(f.nodes, outs)
    return Graph(
        nodes=nodes,
        avals=tuple(f.avals),
        consts=tuple(f.consts),
        ins=tuple(ins),
        outs=tuple(outs),
        pins=tuple(f.pins),
        donated=frozenset(f.donated),
        constants=tuple(zip(f.consts, getattr(jaxpr, "consts", ()), strict=False)),
    )


def _live(nodes: list[Node], outs: list[int | None]) -> tuple[Node, ...]:
    """Drops equations whose results nobody reads, as a compiler does; those with effects stay."""
    needed = {v for v in outs if v is not None}
    kept = []
    for node in reversed(nodes):
        if _effects(node.eqn) or not needed.isdisjoint(node.outs):
            kept.append(_trimmed(node, needed))
            needed.update(v for v in node.ins if v is not None)
    return tuple(reversed(kept))


def _trimmed(node: Node, needed: set[int]) -> Node:
    """The node without the parts of its body that only make results nobody reads."""
    if node.name not in ("shard_map", "scan") or needed.issuperset(node.outs):
        return node
    # A carry feeds the next trip.
    first = scan_counts(node.params)[1] if node.name == "scan" else 0
    body = node.bodies[0][1]
    outs = tuple(
        v if i < first or node.outs[i] in needed else None for i, v in enumerate(body.outs)
    )
    body = dataclasses.replace(body, nodes=_live(list(body.nodes), list(outs)), outs=outs)
    return dataclasses.replace(node, bodies=(("", body),))


def _effects(eqn: Any) -> bool:
    """Whether an equation does more than make its results; naming a mesh axis is no effect."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


@functools.lru_cache(maxsize=4096)
def _item_bytes(dtype: Any) -> float:
    name = str(dtype)
    if name.startswith("key<"):  # a typed random key is two (threefry) or four 32-bit words
        return 16 if "rbg" in name else 8
    if name in ("int4", "uint4", "float4_e2m1fn"):
        return 0.5
    if name in ("int2", "uint2"):
        return 0.25
    return float(dtype.itemsize)


def on_host(aval: Any) -> bool:
    """Whether a value lies in the memory of the host."""
    return getattr(aval, "memory_space", None) is jax.memory.Space.Host


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array; sub-byte types are packed."""
    count = 1
    for size in shape:
        count *= size
    return -int(-count * _item_bytes(dtype) // 1)
