"""Arrays between the script, which has them on hundreds of devices, and the evaluation on one."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.array import ArrayImpl
from jax._src.core import Token
from jax._src.interpreters import partial_eval
from jax._src.mesh import get_concrete_mesh
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from emulator.mesh import entries
from emulator.program.costs import meshes
from emulator.program.graph import flatten
from emulator.program.layout import infer
from emulator.program.trace import Program, open_jaxpr
from emulator.script.jax_calls import EAGER_MAP


def folded(x: Any) -> Any:
    """The whole array on the host's first device; the host's memory is shared, not copied."""
    if not isinstance(x, jax.Array):
        return x
    if _is_key(x):
        return jax.random.wrap_key_data(folded(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return np.asarray(x)


def put(x: Any, sharding: Sharding | None, weak: bool = False) -> Any:
    """An array as the script's devices have it; a `weak` type is a Python number's."""
    if sharding is None or isinstance(x, Token):
        return _weak(x) if weak else x
    if _is_key(x):
        data = jax.random.key_data(x)
        return jax.random.wrap_key_data(put(data, sharding), impl=jax.random.key_impl(x))
    with jax.enable_x64(True):  # what is 64 bits wide stays so
        placed = jax.device_put(np.asarray(x), sharding)
    return _weak(placed) if weak else placed


def taken(
    args: Sequence[Any], donated: Sequence[bool], results: Sequence[Any]
) -> Sequence[jax.Array]:
    """The donated arguments whose memory a result takes: each result that of one argument with as
    many bytes on a device, and of its own shape and dtype if there is one. The script keeps others.
    """
    given = [x for x, gone in zip(args, donated, strict=True) if gone and isinstance(x, jax.Array)]
    found: list[jax.Array] = []
    free = [x for x in results if not isinstance(x, Token)]
    for alike in (lambda x: (x.shape, x.dtype, _local_bytes(x)), _local_bytes):
        for result in list(free):
            match = next((x for x in given if alike(x) == alike(result)), None)
            if match is not None:
                found.append(match)
                given = [x for x in given if x is not match]
                free = [r for r in free if r is not result]
    return found


def _local_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * int(x.dtype.itemsize)


def _weak(x: Any) -> Any:
    aval = x.aval.update(weak_type=True)
    return ArrayImpl(aval, x.sharding, x._arrays, committed=x.committed, _skip_checks=True)


def _is_key(x: Any) -> bool:
    return bool(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))


def result_shardings(
    program: Program, args: Sequence[Any], params: dict[str, Any]
) -> tuple[Sharding | None, ...]:
    """Where each result goes: as the jit says, as its type says, as the partitioner or a
    `shard_map` leaves it, or on all devices of the mesh; None without a mesh. A sharding is spelled
    as JAX spells it, so that a script may compare it.
    """
    known = list(_known_meshes(args, params))
    graph = flatten(program.jaxpr)
    layouts = infer(graph, {}, frozenset())
    over = [node.params["mesh"] for node in graph.nodes if node.name == "shard_map"]
    single = single_device(args)
    eager = _eager_specs(params)
    first = _first_named(args, params)
    found: list[Sharding | None] = []
    results = zip(graph.outs, _avals(params["jaxpr"]), params["out_shardings"], eager, strict=True)
    for value, aval, wish, eager_spec in results:
        if isinstance(wish, Sharding):
            found.append(wish)
            continue
        if not hasattr(aval, "shape"):  # a token
            found.append(None)
            continue
        if not known and not over:
            found.append(single)
            continue
        layout = layouts.get(value, ()) if value is not None else ()
        spec = trimmed(PartitionSpec(*(entry or None for entry in layout)))
        said = _said(aval, eager_spec)
        spec = spec if said is None else said
        words = _of_the_type(aval, known)
        mesh = _mesh_with({a for entry in entries(spec) for a in entry}, [*words, *known], over)
        if not _divides(mesh, spec, aval):
            spec = PartitionSpec()
        sharding = _in_the_scripts_words(NamedSharding(mesh, spec), words or known, aval.ndim)
        if said is None and first is not None and _same_division(first, sharding, aval):
            sharding = first[0]
        found.append(sharding)
    return tuple(found)


def _of_the_type(aval: Any, known: Sequence[Mesh]) -> list[Mesh]:
    """The mesh that a result's type speaks of, over the script's devices, where it is none of the
    script's: a program may go on over the same devices with other axes.
    """
    typed = getattr(getattr(aval, "sharding", None), "mesh", None)
    if typed is None or any(
        (m.axis_sizes, m.axis_names) == (typed.axis_sizes, typed.axis_names) for m in known
    ):
        return []
    devices = next((m.devices for m in known if m.size == typed.size), None)
    if devices is None:
        return []
    types = typed.axis_types
    return [Mesh(devices.reshape(typed.axis_sizes), typed.axis_names, axis_types=types)]


def _in_the_scripts_words(
    sharding: NamedSharding, known: Sequence[Mesh], ndim: int
) -> NamedSharding:
    """The sharding over the script's mesh, where it is one over parts of the mesh's axes that the
    partitioner has made.
    """
    mesh = next((m for m in known if m.size == sharding.mesh.size), None)
    if mesh is None or sharding.mesh in known:
        return sharding
    try:
        spec = parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(ndim), mesh)[0]
    except (ValueError, AssertionError):  # no whole axes say it
        return sharding
    words = NamedSharding(mesh, spec)
    return words if words.is_equivalent_to(sharding, ndim) else sharding


def _said(aval: Any, eager_spec: PartitionSpec | None) -> PartitionSpec | None:
    """The spec of a result where the program itself spells it: types do, unless they leave some
    axes to the compiler.
    """
    if eager_spec is not None:
        return eager_spec
    typed = getattr(aval, "sharding", None)
    types = getattr(getattr(typed, "mesh", None), "axis_types", ())
    if typed is not None and AxisType.Explicit in types and AxisType.Auto not in types:
        spec: PartitionSpec = typed.spec
        return spec
    return None


def _eager_specs(params: dict[str, Any]) -> list[PartitionSpec | None]:
    """How each result of a `shard_map` outside of any jit is divided, in its own words; over other
    axes than its own it leaves that to the compiler.
    """
    body = open_jaxpr(params["jaxpr"])
    words: dict[Any, PartitionSpec] = {}
    for eqn in body.eqns if params["name"] == EAGER_MAP else ():
        if eqn.primitive.name != "shard_map":
            continue
        if len(eqn.params["newly_manual_axes"]) == len(eqn.params["mesh"].axis_names):
            words.update(zip(eqn.outvars, eqn.params["out_specs"], strict=True))
    return [None if isinstance(v, core.Literal) else words.get(v) for v in body.outvars]


def _first_named(args: Sequence[Any], params: dict[str, Any]) -> tuple[NamedSharding, int] | None:
    """The first argument's sharding over several devices, and its dimensions."""
    for x, asked in zip(args, params["in_shardings"], strict=True):
        sharding = asked if isinstance(asked, Sharding) else getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding, np.ndim(x)
    return None


def _same_division(first: tuple[NamedSharding, int], found: NamedSharding, aval: Any) -> bool:
    """Whether JAX gives a result the words of the first argument's sharding: where its type speaks
    of the same mesh, and both are divided alike.
    """
    sharding, dimensions = first
    typed = getattr(aval, "sharding", None)
    return (
        typed is not None
        and typed.mesh == sharding.mesh.abstract_mesh
        and aval.ndim == dimensions
        and sharding.is_equivalent_to(found, dimensions)
    )


def trimmed(spec: PartitionSpec) -> PartitionSpec:
    """The same without what it says of the last dimensions that nothing divides."""
    entries = [*spec.partitions]
    while entries and entries[-1] in (None, ()):
        entries.pop()
    return PartitionSpec(*entries)


def weak_results(params: dict[str, Any]) -> tuple[bool, ...]:
    """Which results of a jit have a weak type."""
    return tuple(getattr(aval, "weak_type", False) for aval in _avals(params["jaxpr"]))


def _avals(jaxpr: Any) -> Sequence[Any]:
    return jaxpr.out_avals if hasattr(jaxpr, "out_avals") else [v.aval for v in jaxpr.outvars]


def _known_meshes(args: Sequence[Any], params: dict[str, Any]) -> Iterator[Mesh]:
    """Meshes of real devices that the call or its program names."""
    wishes = (*params["in_shardings"], *params["out_shardings"])
    named = [getattr(x, "sharding", None) for x in args] + list(wishes)
    candidates = [s.mesh for s in named if isinstance(s, NamedSharding)]
    candidates += [*meshes(params["jaxpr"]), get_concrete_mesh()]
    for mesh in candidates:
        if isinstance(mesh, Mesh) and not mesh.empty and mesh.size > 1:
            yield mesh


def _mesh_with(axes: set[str], known: Sequence[Mesh], over: Sequence[Any]) -> Mesh:
    """A mesh of real devices that has these axes: one of the script's, or one made over the same
    devices for the axes that the partitioner has divided.
    """
    for mesh in known:
        if axes <= set(mesh.axis_names):
            return mesh
    made = next(m for m in over if axes <= set(m.axis_names))
    devices = next((m.devices.flatten() for m in known if m.size == made.size), None)
    if devices is None:
        devices = np.array(jax.devices()[: made.size])
    return Mesh(devices.reshape(tuple(made.shape.values())), tuple(made.axis_names))


def _divides(mesh: Mesh, spec: PartitionSpec, aval: Any) -> bool:
    for size, entry in zip(aval.shape, spec.partitions, strict=False):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        if size % math.prod(mesh.shape[a] for a in axes):
            return False
    return True


def single_device(args: Sequence[Any]) -> Sharding | None:
    """The device to which an argument is bound, where that is not the first."""
    for x in args:
        if isinstance(x, jax.Array) and getattr(x, "committed", False):
            if len(x.devices()) == 1:
                return x.sharding
    return None


def on_one_set(args: tuple[Any, ...], params: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a jit, which are bound to the same devices: JAX leaves out those that the
    program does not read, so that these may lie elsewhere. Zeros stand for them.

    Raises:
        ValueError: arguments that are read are bound to different devices; JAX refuses that in
            words of its own.
    """
    body = open_jaxpr(params["jaxpr"])
    read = [True] * len(args)
    if not params["keep_unused"]:
        read = partial_eval.dce_jaxpr(body, [True] * len(body.outvars), instantiate=False)[1]
    homes = {_bound(x): i for i, (x, r) in enumerate(zip(args, read, strict=True)) if r}
    homes.pop(None, None)
    if len(homes) > 1:
        raise ValueError(
            f"arguments {sorted(homes.values())} of a step must be bound to the same devices; move "
            "them with jax.device_put"
        )
    return tuple(
        x if r or _bound(x) is None or _bound(x) in homes else _zeros(x)
        for x, r in zip(args, read, strict=True)
    )


def _bound(x: Any) -> frozenset[jax.Device] | None:
    """The devices to which an argument is bound."""
    committed = isinstance(x, jax.Array) and getattr(x, "committed", False)
    return _devices(x.sharding) if committed else None


@functools.lru_cache(maxsize=256)
def _devices(sharding: Sharding) -> frozenset[jax.Device]:
    return frozenset(sharding.device_set)


def _zeros(x: Any) -> Any:
    if _is_key(x):
        return jax.random.wrap_key_data(_zeros(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return np.zeros(x.shape, x.dtype)
