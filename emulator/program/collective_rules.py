"""Collectives on folded arrays: reductions in the order of their algorithm's `Schedule`, movement
as indexing.

A reduction runs the very Schedule that the time reading costs, on the data of every group at once.
Movement (gathers, exchanges, permutes) rounds nothing, so its result is written directly; the tests
execute those Schedules to prove that they deliver the same. Several mesh axes linearise with the
first slowest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from emulator.collectives import build, execute, group_of
from emulator.fabric import choose, collective
from emulator.program.folded import Folded, FoldedMesh, lead, spread, unlead
from emulator.program.partitioned_reductions import KINDS
from emulator.program.real_devices import together
from emulator.program.vector import reduce_tree
from emulator.program.words import on_words

REDUCTIONS = {
    "reduce_scatter": "sum",
    "unreduced_reduce_scatter": "sum",
    "psum": "sum",
    "psum_invariant": "sum",
    "unreduced_psum": "sum",
    "pmax": "max",
    "pmin": "min",
    "unreduced_pmax": "max",
    "unreduced_pmin": "min",
    **KINDS,
}
SCATTERING = ("reduce_scatter", "unreduced_reduce_scatter")


def collective_axes(eqn: Any) -> tuple[str, ...]:
    """The mesh axes that a collective equation communicates over (`axis_index` included); () for
    other equations.
    """
    name = eqn.primitive.name
    if name not in RULES and name not in ("axis_index", "ragged_all_to_all"):
        return ()
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    if name not in REDUCTIONS and not all(isinstance(a, str) for a in axes):
        raise NotImplementedError(
            f"{name} over positional axes {axes} is not modelled; name mesh axes"
        )
    return tuple(a for a in axes if isinstance(a, str))


def check_axes(mesh: FoldedMesh, eqn: Any) -> None:
    """Raises where a collective equation names an axis that is not the program's own."""
    for axis in collective_axes(eqn):
        if axis not in mesh.names:
            raise NotImplementedError(
                f"{eqn.primitive.name} over {axis!r}, an axis that a shard_map or vmap around "
                "em.emulate has, is not modelled: put em.emulate around that, too"
            )


def axis_index(mesh: FoldedMesh, eqn: Any) -> Folded:
    """Each device's coordinate."""
    axes = collective_axes(eqn)

    def rule(mesh: FoldedMesh) -> Folded:
        sizes = mesh.shape(axes)
        return unlead(jnp.arange(math.prod(sizes), dtype=jnp.int32).reshape(sizes), axes, mesh)

    return together(rule, axes, mesh, ())


def collective_values(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    """One operand of a collective equation on all devices; real devices first gather what its
    groups have.
    """
    name = eqn.primitive.name
    axes = collective_axes(eqn)
    if axes and name in REDUCTIONS and groups_differ(settings, mesh, eqn):
        axes = mesh.manual  # each group's order depends on where it is

    def rule(mesh: FoldedMesh, value: Folded) -> Folded:
        return RULES[name](settings, mesh, eqn, value)

    return together(rule, axes, mesh, [value])


def _groups_of(eqn: Any) -> np.ndarray | None:
    """Ranks [group, rank in it] of a collective over parts of its axes."""
    groups = eqn.params.get("axis_index_groups")
    if groups is not None and len({len(group) for group in groups}) > 1:
        raise NotImplementedError(
            f"{eqn.primitive.name} over axis_index_groups of different sizes, {groups}, is not "
            "modelled; make all groups as large"
        )
    return None if groups is None else np.asarray(groups, np.int32)


class Layout:
    """A value with the ranks of its collective in front: [groups, ranks in a group, batch, *local].

    `groups` are those of `axis_index_groups` (one without). `batch` runs over the value's other
    mesh axes.
    """

    def __init__(self, value: Folded, mesh: FoldedMesh, eqn: Any, everywhere: bool = False) -> None:
        self.mesh, self.axes = mesh, collective_axes(eqn)
        if everywhere:
            value = spread(
                value,
                mesh.ordered({*value.axes, *(a for a in mesh.manual if a not in self.axes)}),
                mesh,
            )
        self.rest = tuple(a for a in value.axes if a not in self.axes)
        self.n = math.prod(mesh.shape(self.axes))
        self.groups = _groups_of(eqn)
        self.local = value.local_shape
        self.batch = math.prod(mesh.shape(self.rest))
        array = lead(value, self.axes, mesh).reshape(self.n, self.batch, *self.local)
        self.array = array[None] if self.groups is None else array[self.groups]

    @property
    def ranks(self) -> int:
        return int(self.array.shape[1])

    def same_for_all(self, array: Array) -> Folded:
        """From [groups, batch, *local], what every rank of a group ends with."""
        if self.groups is None:
            shape = self.mesh.shape(self.rest) + array.shape[2:]
            return Folded(array.reshape(shape), self.rest)
        return self.one_each(
            jnp.broadcast_to(array[:, None], (array.shape[0], self.ranks, *array.shape[1:]))
        )

    def one_each(self, array: Array) -> Folded:
        """From [groups, ranks, batch, *local], what each rank ends with."""
        local = array.shape[3:]
        flat = array.reshape(self.n, self.batch, *local)
        if self.groups is not None:
            flat = flat[np.argsort(self.groups.reshape(-1))]
        shape = self.mesh.shape((*self.axes, *self.rest)) + local
        return unlead(flat.reshape(shape), (*self.axes, *self.rest), self.mesh)


def _devices(mesh: FoldedMesh, eqn: Any) -> np.ndarray:
    """Device numbers [groups, all indices of the other manual axes, ranks] of a collective.

    Axes that are not manual here hold one device's worth of program; index 0 stands for them.
    """
    axes, mesh = collective_axes(eqn), mesh.whole(mesh.names)
    others = [a for a in mesh.manual if a not in axes]
    automatic = [a for a in mesh.names if a not in axes and a not in others]
    order = [mesh.names.index(a) for a in (*automatic, *others, *axes)]
    numbers = np.asarray(mesh.devices).reshape(mesh.sizes).transpose(order)
    table = numbers.reshape(math.prod(mesh.shape(automatic)), -1, math.prod(mesh.shape(axes)))[0]
    groups = _groups_of(eqn)
    return table[None] if groups is None else table[:, groups].transpose(1, 0, 2)


def _schedules(settings: Any, mesh: FoldedMesh, eqn: Any, nbytes: int) -> tuple[Any, np.ndarray]:
    """The distinct schedules of a reduction's groups, and which one each of `_devices` uses."""
    op = "reduce_scatter" if eqn.primitive.name in SCATTERING else "all_reduce"
    pinned = dict(settings.algorithms).get(op)
    devices = _devices(mesh, eqn)
    distinct: list[Any] = []
    which = np.zeros(devices.shape[:2], dtype=np.int32)
    for index in np.ndindex(*devices.shape[:2]):
        members = tuple(int(d) for d in devices[index])
        if pinned == "best":
            algorithm = collective(
                op, nbytes, on=settings.machine, devices=members, algorithm=pinned
            ).algorithm
        else:
            algorithm = pinned or choose(op, nbytes, members, settings.machine)[0]
        schedule = build(op, algorithm, group_of(members, settings.machine))
        if schedule not in distinct:  # equal calls of `build` give the same object
            distinct.append(schedule)
        which[index] = distinct.index(schedule)
    return distinct, which


def _nbytes(value: Folded) -> int:
    """What each device sends of a value."""
    return math.prod(value.local_shape) * int(jnp.result_type(value.array).itemsize)


def groups_differ(settings: Any, mesh: FoldedMesh, eqn: Any) -> bool:
    """Whether the groups of a reduction add in different orders, for any of its operands."""
    return any(
        len(_schedules(settings, mesh, eqn, v.aval.size * v.aval.dtype.itemsize)[0]) > 1
        for v in eqn.invars
    )


def _run(
    settings: Any, value: Folded, mesh: FoldedMesh, eqn: Any, runner: Any
) -> tuple[Layout, Array]:
    """Runs `runner(array [ranks, batch, *local], schedule)`; its result has the batch likewise."""
    schedules, which = _schedules(settings, mesh, eqn, _nbytes(value))
    layout = Layout(value, mesh, eqn, everywhere=len(schedules) > 1)
    groups, ranks, batch = layout.array.shape[:3]
    array = jnp.moveaxis(layout.array, 0, 1).reshape(ranks, groups * batch, *layout.local)
    if len(schedules) == 1:
        return layout, runner(array, schedules[0])
    # Groups placed differently on the machine: each schedule runs on its own part of the batch.
    flat = which.reshape(-1)
    parts = [(np.flatnonzero(flat == i), s) for i, s in enumerate(schedules)]
    axis = 1 if eqn.primitive.name in SCATTERING else 0
    joined = jnp.concatenate([runner(array[:, at], schedule) for at, schedule in parts], axis=axis)
    back = np.argsort(np.concatenate([at for at, _ in parts]))
    return layout, jnp.take(joined, back, axis=axis)


def _all_reduce(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    kind = REDUCTIONS[eqn.primitive.name]
    if dims := [d for d in eqn.params["axes"] if not isinstance(d, str)]:  # of an enclosing vmap
        value = _reduce_dims(value, dims, kind)
    if not collective_axes(eqn):
        return value
    local = value.local_shape
    parts = settings.machine.dies_per_device
    if (in_place := _in_place(settings, mesh, eqn, value)) is not None:
        array, schedule, axis, rest = in_place
        out = execute.all_reduce(array, schedule, op=kind, parts=parts, axis=axis)
        return Folded(out.reshape(*mesh.shape(rest), *local), rest)

    def runner(array: Array, schedule: Any) -> Array:  # [ranks, batch, *local] -> [batch, *local]
        flat = array.reshape(*array.shape[:2], math.prod(local))
        return execute.all_reduce(flat, schedule, op=kind, parts=parts).reshape(
            array.shape[1], *local
        )

    layout, out = _run(settings, value, mesh, eqn, runner)
    return layout.same_for_all(out.reshape(layout.array.shape[0], layout.batch, *local))


def _in_place(
    settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded
) -> tuple[Array, Any, int, tuple[str, ...]] | None:
    """Of an all_reduce that needs no array put in another order, and one schedule only: the array
    with the ranks on one axis and the local shape on the last; its schedule; that axis; the mesh
    axes that stay. None for others.
    """
    axes = collective_axes(eqn)
    full = mesh.ordered((*value.axes, *axes))
    order = full
    if value.lies is not None and value.axes == full and _beside(mesh, value.lies, axes):
        order = value.lies
    elif not {*value.axes} & {*axes}:  # copies may lie in any order: so, as a matmul's results do
        order = (*axes, *value.axes)
    if eqn.params.get("axis_index_groups") is not None or not _beside(mesh, order, axes):
        return None
    schedules, _ = _schedules(settings, mesh, eqn, _nbytes(value))
    if len(schedules) > 1:
        return None
    at = order.index(axes[0])
    before, after = order[:at], order[at + len(axes) :]
    shape = (*mesh.shape(before), math.prod(mesh.shape(axes)), *mesh.shape(after))
    array = spread(value, full, mesh).array
    if order != full:
        local = range(len(full), array.ndim)
        array = lax.transpose(array, [*(full.index(a) for a in order), *local])
    return array.reshape(*shape, math.prod(value.local_shape)), schedules[0], at, before + after


def _beside(mesh: FoldedMesh, order: tuple[str, ...], axes: tuple[str, ...]) -> bool:
    """Whether `axes` follow one another in `order`, and the others are in mesh order."""
    at = order.index(axes[0])
    rest = order[:at] + order[at + len(axes) :]
    return order[at : at + len(axes)] == axes and mesh.ordered(rest) == rest


def _reduce_dims(value: Folded, dims: list[int], kind: str) -> Folded:
    """A reduction over local dims, in the order of every other local sum."""
    if kind == "sum" and jnp.issubdtype(jnp.result_type(value.array), jnp.floating):
        return reduce_tree(value, dims, "reduce_sum")
    reductions: dict[str, Callable[..., Array]] = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}
    at = tuple(len(value.axes) + d for d in dims)
    return Folded(reductions[kind](value.array, axis=at).astype(value.array.dtype), value.axes)


def _reduce_scatter(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    at, tiled = eqn.params["scatter_dimension"], eqn.params["tiled"]
    parts = settings.machine.dies_per_device
    n = eqn.params["axis_size"]
    block = value.local_shape[at] // n
    kept = (*value.local_shape[:at], *((block,) if tiled else ()), *value.local_shape[at + 1 :])

    def runner(
        array: Array, schedule: Any
    ) -> Array:  # [ranks, batch, *local] -> [ranks, batch, *kept]
        dim = 2 + at
        blocks = array.reshape(*array.shape[:dim], n, block, *array.shape[dim + 1 :])
        blocks = jnp.moveaxis(blocks, dim, 1).reshape(n, n, array.shape[1], math.prod(kept))
        return execute.reduce_scatter(blocks, schedule, op="sum", parts=parts).reshape(
            n, array.shape[1], *kept
        )

    layout, out = _run(settings, value, mesh, eqn, runner)
    out = jnp.moveaxis(out.reshape(n, layout.array.shape[0], layout.batch, *kept), 1, 0)
    return layout.one_each(out)


def _all_gather(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    layout = Layout(value, mesh, eqn)
    at = 2 + eqn.params["all_gather_dimension"]
    out = jnp.moveaxis(layout.array, 1, at)  # [groups, batch, ..., ranks, ...]
    if eqn.params["tiled"]:
        out = out.reshape(*out.shape[:at], out.shape[at] * out.shape[at + 1], *out.shape[at + 2 :])
    return layout.same_for_all(out)


def _all_to_all(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    layout = Layout(value, mesh, eqn)
    n, split, concat = layout.ranks, 3 + eqn.params["split_axis"], 3 + eqn.params["concat_axis"]
    array = layout.array  # [groups, source, batch, *local]
    array = array.reshape(
        *array.shape[:split], n, array.shape[split] // n, *array.shape[split + 1 :]
    )
    array = jnp.moveaxis(array, split, 1)  # [groups, destination, source, batch, *local]
    array = jnp.moveaxis(array, 2, concat)  # source stands just before the local dim it joins
    array = array.reshape(
        *array.shape[:concat], n * array.shape[concat + 1], *array.shape[concat + 2 :]
    )
    return layout.one_each(array)


def _ppermute(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    axes = collective_axes(eqn)
    if axes != mesh.ordered(
        axes
    ):  # JAX 0.10 numbers such devices in mesh order instead, JAX 0.11 refuses
        raise NotImplementedError(
            f"ppermute over axes {axes} is not modelled: name them in the mesh's order "
            f"{mesh.ordered(axes)}, in which JAX numbers devices"
        )
    layout = Layout(value, mesh, eqn)
    source = np.full(layout.n, -1)
    for src, dst in eqn.params["perm"]:
        source[dst] = src
    moved = layout.array[:, np.maximum(source, 0)]
    received = (source >= 0).reshape(1, -1, *[1] * (moved.ndim - 2))
    return layout.one_each(jnp.where(received, moved, jnp.zeros((), moved.dtype)))


def _pbroadcast(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
    layout = Layout(value, mesh, eqn)
    return layout.same_for_all(
        lax.index_in_dim(layout.array, eqn.params["source"], 1, keepdims=False)
    )


_Rule = Callable[[Any, FoldedMesh, Any, Folded], Folded]


def _moving(rule: _Rule) -> _Rule:
    def moved(settings: Any, mesh: FoldedMesh, eqn: Any, value: Folded) -> Folded:
        return on_words(functools.partial(rule, settings, mesh, eqn))(value)

    return moved


RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(REDUCTIONS, _all_reduce),
    **dict.fromkeys(SCATTERING, _reduce_scatter),
    **dict.fromkeys(
        ("all_gather", "all_gather_invariant", "all_gather_reduced"), _moving(_all_gather)
    ),
    "all_to_all": _moving(_all_to_all),
    "ppermute": _moving(_ppermute),
    "pbroadcast": _moving(_pbroadcast),
}
