"""Programs that leave the division of their arrays to the compiler: `jax.jit` with shardings,
sharding constraints, meshes with explicit axes.

XLA's own partitioner divides them (`partitioner`); its result, translated (`stablehlo`), is a
`shard_map` over the program's mesh like any other, which both readings take from there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.interpreters import partial_eval
from jax._src.lax.lax import _convert_element_type
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from emulator.mesh import PodMesh, abstract_mesh, device_numbers
from emulator.program import partitioner
from emulator.program.graph import on_host
from emulator.program.one_map import is_one_map
from emulator.program.partition_mesh import PartitionMesh, refined
from emulator.program.real_devices import REAL
from emulator.program.stablehlo import Translator, module_functions
from emulator.program.trace import DIVIDED, Program, open_jaxpr, sub_jaxprs, trace_leaves, walk
from emulator.program.wide_types import as_wide_as


def trace_divided(
    fun: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Program:
    """`fun(*args, **kwargs)` traced as `trace` does; what it leaves to the compiler is divided
    among the devices of its mesh.

    Raises:
        NotImplementedError: the divided program has an operation that has no translation, by name.
        ValueError: the partitioner refuses the program, or its meshes differ in size.
        What `trace` raises.
    """
    return divided_leaves(fun, *jax.tree.flatten((tuple(args), dict(kwargs or {}))))


def divided_leaves(fun: Callable[..., Any], leaves: Sequence[Any], in_tree: Any) -> Program:
    """As `trace_divided`, of arguments and keyword arguments that are flattened already."""
    program = trace_leaves(fun, leaves, in_tree)
    divided = _divided_program(program, leaves)
    _, asked, _ = _around(program.jaxpr.jaxpr)
    if not asked:
        return divided
    wishes = [
        None if isinstance(v, core.Literal) else asked.get(v) for v in program.jaxpr.jaxpr.outvars
    ]
    return divided._replace(jaxpr=_with_results_on_host(divided.jaxpr, wishes))


def _with_results_on_host(jaxpr: core.ClosedJaxpr, wishes: Sequence[Any]) -> core.ClosedJaxpr:
    """The program, then copies of those results that `out_shardings` wants in the host's memory."""
    copies, outs = [], []
    for v, wish in zip(jaxpr.jaxpr.outvars, wishes, strict=True):
        kind = getattr(wish, "memory_kind", None)
        if kind in ("pinned_host", "unpinned_host") and not on_host(v.aval):
            like = jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
            (copy,) = jax.make_jaxpr(lambda x: jax.device_put(x, jax.memory.Space.Host))(like).eqns
            copies.append(copy.replace(invars=[v]))
            v = copy.outvars[0]
        outs.append(v)
    if not copies:
        return jaxpr
    body = jaxpr.jaxpr.replace(eqns=[*jaxpr.jaxpr.eqns, *copies], outvars=outs)
    return jaxpr.replace(jaxpr=body)


def _divided_program(program: Program, leaves: Sequence[Any]) -> Program:
    given = list(map(placed, itertools.compress(leaves, program.dynamic)))
    jaxpr = program.jaxpr
    inside = list(_asked(jaxpr.jaxpr))
    if not inside and not any(given):
        return program
    sizes = {s.mesh.size for s in inside} | _manual_sizes(jaxpr)
    given = [None if s is None or _on_the_host(s, sizes) else s for s in given]
    # What the program's own `jax.jit` asks for is how its argument comes, from wherever.
    asked_in, _, _ = _around(jaxpr.jaxpr)
    given = [s and asked_in.get(v, s) for s, v in zip(given, jaxpr.jaxpr.invars, strict=True)]
    named = [s for s in given if s is not None] + inside
    # Where nothing is divided, nothing is left to the compiler (gradients of a shard_map say so).
    asked = [s for s in named if any(s.spec.partitions) or s.spec.unreduced]
    if not asked or is_one_map(jaxpr, given):
        return program
    _refuse_partial_sums(jaxpr)
    with as_wide_as(jaxpr):
        return program._replace(jaxpr=_divided(jaxpr, given, asked))


def _refuse_partial_sums(jaxpr: core.ClosedJaxpr) -> None:
    """Results and arguments of which each device holds a part of a sum are no arrays."""
    sides = ("argument", jaxpr.in_avals), ("result", jaxpr.out_avals)
    for what, avals in sides:
        for i, aval in enumerate(avals):
            spec = getattr(getattr(aval, "sharding", None), "spec", None)
            if spec is not None and spec.unreduced:
                raise NotImplementedError(
                    f"{what} {i} of the program is unreduced over {sorted(spec.unreduced)}: each "
                    "device holds a part of a sum, which is no value of the whole array; reduce it "
                    "inside, as in jax.reshard(x, PartitionSpec())"
                )


def _manual_sizes(jaxpr: core.ClosedJaxpr) -> set[int]:
    """The devices of the program's `shard_map`s."""
    meshes = (eqn.params.get("mesh") for _, eqn in walk(jaxpr))
    return {mesh.size for mesh in meshes if mesh is not None}


def _on_the_host(sharding: NamedSharding, sizes: set[int]) -> bool:
    """Whether a sharding only says where this process keeps an array: over real devices, while the
    program speaks of another number of them.
    """
    return isinstance(sharding.mesh, Mesh) and bool(sizes) and sharding.mesh.size not in sizes


def placed(leaf: Any) -> NamedSharding | None:
    """The sharding over several devices that an argument carries."""
    if isinstance(leaf, jax.core.Tracer):  # says nothing, unless its type does
        return None
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.axis_names == (REAL,):
        return None
    return sharding if sharding.mesh.size > 1 else None


def _divided(
    jaxpr: core.ClosedJaxpr, given: Sequence[Any], asked: Sequence[NamedSharding]
) -> core.ClosedJaxpr:
    """The program as one `shard_map` of what XLA's partitioner makes of it."""
    body = jaxpr.jaxpr
    mesh = _mesh(asked)
    around_in, around_out, donated = _around(body)
    consts = [placed(c) for c in jaxpr.consts]
    ins = [*consts, *(s or around_in.get(v) for s, v in zip(given, body.invars, strict=True))]
    outs = [None if isinstance(v, core.Literal) else around_out.get(v) for v in body.outvars]
    with _in_use(mesh):
        shares = partitioner.partition(jaxpr, ins, outs, mesh.size)

    program = _with_global_arrays(jaxpr, shares, mesh)
    variables = [*body.constvars, *body.invars]
    program = jax.jit(program, donate_argnums=[i for i, v in enumerate(variables) if v in donated])
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        closed = jax.make_jaxpr(program)(*shapes)
    # Constants stay constants: they may be tracers of an outer transformation.
    n = len(body.constvars)
    new, _ = partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(body.outvars), instantiate=[True] * len(variables)
    )
    new = new.replace(
        constvars=[*new.constvars, *new.invars[:n]],
        invars=new.invars[n:],
        debug_info=new.debug_info._replace(arg_names=None),
    )
    return core.ClosedJaxpr(new, [*closed.consts, *jaxpr.consts])


def _in_use(mesh: Any) -> Any:
    """The mesh of types as the one in use, without which JAX would want to know its devices."""
    typed = AxisType.Explicit in mesh.axis_types and jax.sharding.get_abstract_mesh().empty
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if typed else nullcontext()


def _with_global_arrays(
    jaxpr: core.ClosedJaxpr, shares: partitioner.Partitioned, mesh: Any
) -> Callable[..., list[Any]]:
    """The divided program as a function of whole arrays."""
    axes, in_specs, out_specs = _axes(shares, mesh)
    translator = Translator(axes, module_functions(shares.module), shares.groups, shares.calls)
    devices = device_numbers(mesh)
    over = abstract_mesh(dict(zip(axes.names, axes.sizes, strict=True)), devices=devices)
    kinds = [v.aval for v in jaxpr.jaxpr.outvars]

    def divided(*flat: Any) -> list[Any]:
        arrays = [
            _padded(jax.random.key_data(x) if _is_key(x) else x, spec, over)
            for x, spec in zip(flat, in_specs, strict=True)
        ]
        results = jax.shard_map(
            lambda *local: translator.main(*local)[: len(kinds)],
            mesh=over,
            in_specs=tuple(in_specs),
            out_specs=list(out_specs),
            check_vma=False,
        )(*arrays)
        return [_as(x, kind) for x, kind in zip(results, kinds, strict=True)]

    divided.__name__ = divided.__qualname__ = DIVIDED
    return divided


def _axes(
    shares: partitioner.Partitioned, mesh: Any
) -> tuple[PartitionMesh, list[PartitionSpec], list[PartitionSpec]]:
    """The axes that can say how arguments and results are divided, and how they are: the mesh's
    own, or these in parts.
    """
    plain = PartitionMesh(names=tuple(mesh.axis_names), sizes=tuple(mesh.axis_sizes))
    for axes in (plain, refined(plain)):
        tiles = [*shares.ins, *shares.outs]
        specs = [() if t is None else axes.spec(t) for t in tiles]
        whole = all(axes.axes_of(g) is not None for g in shares.groups.values() if g.size)
        if all(s is not None for s in specs) and (whole or axes is not plain):
            entries = [PartitionSpec(*(e or None for e in s or ())) for s in specs]
            n = len(shares.ins)
            return axes, entries[:n], entries[n:]
    raise NotImplementedError(
        f"the partitioner divides an argument or a result in a way that no axes of the mesh "
        f"{dict(mesh.shape)} say; give it a NamedSharding"
    )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _padded(x: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """`x` with its divided dimensions filled up to what all devices hold together."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    tiles = [math.prod(mesh.shape[a] for a in axes) for axes in entries]
    more = [-size % n for size, n in zip(x.shape, tiles, strict=False)]
    if not any(more):
        return x
    widths = [(0, m, 0) for m in [*more, *[0] * (x.ndim - len(more))]]
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _as(x: Any, kind: Any) -> Any:
    """A result in the shape and the type that the program gives it."""
    if jnp.issubdtype(kind.dtype, jax.dtypes.prng_key):
        x = lax.slice(x, [0] * x.ndim, [*kind.shape, *x.shape[len(kind.shape) :]])
        return jax.random.wrap_key_data(x, impl=kind.dtype._impl.name)
    if kind.dtype == jax.dtypes.float0:  # the gradient of integers, which XLA holds as Booleans
        return np.zeros(kind.shape, jax.dtypes.float0)
    x = x if x.shape == kind.shape else lax.slice(x, [0] * x.ndim, kind.shape)
    return _convert_element_type(x, weak_type=True) if kind.weak_type else x


def _asked(jaxpr: core.Jaxpr) -> Iterator[NamedSharding]:
    """Shardings that equations outside of a full `shard_map` ask for."""
    for v in (*jaxpr.constvars, *jaxpr.invars):
        sharding = getattr(v.aval, "sharding", None)
        if sharding is not None and _explicit(sharding):
            yield sharding
    for eqn in jaxpr.eqns:
        params = eqn.params
        if eqn.primitive.name == "shard_map":
            # Constraints inside speak of the axes that it leaves to the compiler.
            if len(params["newly_manual_axes"]) < len(params["mesh"].axis_names):
                yield from _asked(params["jaxpr"])
            continue
        names = ("sharding", "dst_sharding", "out_sharding", "in_shardings", "out_shardings")
        # Elsewhere a sharding over axes that are left to the compiler is only what tracing noted.
        asks = eqn.primitive.name in ("jit", "pjit", "sharding_constraint", "reshard")
        for value in (params.get(name) for name in names):
            for sharding in value if isinstance(value, tuple | list) else (value,):
                named = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
                if named and (asks or _explicit(sharding)):
                    yield sharding
        for _, inner in sub_jaxprs(eqn):
            yield from _asked(open_jaxpr(inner))


def _explicit(sharding: Any) -> bool:
    mesh = sharding.mesh
    return mesh.size > 1 and AxisType.Explicit in getattr(mesh, "axis_types", ())


def _mesh(shardings: Sequence[NamedSharding]) -> Any:
    """The mesh of the program; where several are named, all have as many devices."""
    meshes = list(dict.fromkeys(s.mesh for s in shardings))
    if len({m.size for m in meshes}) > 1:
        listed = "; ".join(" x ".join(f"{n}={s}" for n, s in m.shape.items()) for m in meshes)
        raise ValueError(
            f"the program's shardings are over meshes of different sizes ({listed}); "
            "use one mesh, as jax.jit demands"
        )
    chosen = [m for m in meshes if isinstance(m, PodMesh)]
    return (chosen or meshes)[0]


def _around(body: core.Jaxpr) -> tuple[dict[Any, Any], dict[Any, Any], set[Any]]:
    """What the program's own `jax.jit` asks for: shardings of arguments and of results, and which
    arguments are donated.
    """
    ins: dict[Any, Any] = {}
    outs: dict[Any, Any] = {}
    donated = set()
    for eqn in body.eqns:
        if eqn.primitive.name not in ("jit", "pjit"):
            continue
        sides = ((ins, eqn.invars, "in_shardings"), (outs, eqn.outvars, "out_shardings"))
        for found, variables, key in sides:
            for v, s in zip(variables, eqn.params[key], strict=True):
                if isinstance(s, NamedSharding) and not isinstance(v, core.Literal):
                    found.setdefault(v, s)
        gone = zip(eqn.invars, eqn.params["donated_invars"], strict=True)
        donated |= {v for v, d in gone if d and not isinstance(v, core.Literal)}
    return ins, outs, donated
