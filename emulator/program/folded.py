"""Arrays of many devices in one: leading axes for the mesh axes over which a value varies.

A value inside `shard_map` has a local shape on every device. `Folded` keeps the devices' copies in
one array whose leading axes are those mesh axes over which the copies may differ, in mesh order;
over the others there is one copy. So work on replicated values is done once, and nothing is ever
stored 384 times that is the same 384 times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kernels.apart import materialised


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FoldedMesh:
    """The mesh axes that are manual at this point of the program, and the devices under the whole
    mesh.

    `names` and `sizes` describe the whole mesh; `devices` lists device numbers, the last axis
    fastest; `manual` are the axes that the enclosing `shard_map`s divide. `parts` says into how
    many parts each axis is cut, a part on each real device; arrays there hold one part's indices.
    """

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    manual: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()

    def size(self, axis: str) -> int:
        """How many indices of an axis arrays hold."""
        at = self.names.index(axis)
        return self.sizes[at] // (self.parts[at] if self.parts else 1)

    def cut(self, parts: tuple[int, ...]) -> FoldedMesh:
        return dataclasses.replace(self, parts=parts)

    def cut_axes(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Those of `axes` that have more than one part, in mesh order."""
        wanted = set(axes)
        cut = zip(self.names, self.parts, strict=True) if self.parts else ()
        return tuple(name for name, parts in cut if parts > 1 and name in wanted)

    def whole(self, axes: Iterable[str]) -> FoldedMesh:
        """The same mesh with `axes` in one part."""
        undivided = self.cut_axes(axes)
        if not undivided:
            return self
        parts = zip(self.names, self.parts, strict=True)
        return self.cut(tuple(1 if name in undivided else n for name, n in parts))

    def first_part(self, axis: str, count: int) -> FoldedMesh:
        """The mesh of the first of `count` parts of an axis."""
        at = self.names.index(axis)
        size = self.sizes[at] // count
        devices = np.asarray(self.devices).reshape(self.sizes).take(range(size), at)
        sizes = (*self.sizes[:at], size, *self.sizes[at + 1 :])
        return dataclasses.replace(self, sizes=sizes, devices=tuple(devices.reshape(-1).tolist()))

    def shape(self, axes: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.size(axis) for axis in axes)

    def ordered(self, axes: Iterable[str]) -> tuple[str, ...]:
        """`axes` without repetition, in mesh order."""
        wanted = set(axes)
        return tuple(name for name in self.names if name in wanted)


@dataclasses.dataclass(frozen=True, slots=True)
class Folded:
    """One value on all devices: `array` is [*sizes of axes, *local shape]; `axes` are in mesh
    order. `lies` is the order in which its maker has them, where that is another: to transpose
    the array to it costs nothing. `known`: nothing that the program is given has a part in it, so
    that XLA may compute it, and what follows from it, beforehand.
    """

    array: Any
    axes: tuple[str, ...] = ()
    lies: tuple[str, ...] | None = None
    known: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(jnp.shape(self.array)[len(self.axes) :])


def union_axes(mesh: FoldedMesh, values: Iterable[Folded]) -> tuple[str, ...]:
    return mesh.ordered(axis for value in values for axis in value.axes)


def spread(value: Folded, axes: Sequence[str], mesh: FoldedMesh) -> Folded:
    """The same value with a copy for each index of `axes` (its own and more, in mesh order)."""
    if value.axes == tuple(axes):
        return value
    local = value.local_shape
    offset = len(axes)
    kept = [i for i, axis in enumerate(axes) if axis in value.axes]
    dims = kept + [offset + i for i in range(len(local))]
    array = lax.broadcast_in_dim(jnp.asarray(value.array), mesh.shape(axes) + local, dims)
    return Folded(array, tuple(axes))


def lead(value: Folded, axes: Sequence[str], mesh: FoldedMesh) -> Array:
    """[*axes in the given order, *the value's other axes in mesh order, *local]: spread over `axes`
    first.
    """
    full = spread(value, mesh.ordered((*value.axes, *axes)), mesh)
    positions = {axis: i for i, axis in enumerate(full.axes)}
    rest = [i for i, axis in enumerate(full.axes) if axis not in axes]
    local = range(len(full.axes), len(full.axes) + len(value.local_shape))
    return lax.transpose(full.array, [*(positions[axis] for axis in axes), *rest, *local])


def unlead(array: Array, axes: Sequence[str], mesh: FoldedMesh) -> Folded:
    """A `Folded` from [*axes in the given order, *local]: the axes are put back into mesh order."""
    ordered = mesh.ordered(axes)
    local = range(len(axes), array.ndim)
    return Folded(lax.transpose(array, [*(list(axes).index(a) for a in ordered), *local]), ordered)


def split_dims(value: Folded, spec: Sequence[Sequence[str]], mesh: FoldedMesh) -> Folded:
    """Enters a `shard_map`: each local dim d is divided over the mesh axes `spec[d]`, the first
    slowest.
    """
    if not any(spec):
        return value
    shape: list[int] = list(mesh.shape(value.axes))
    new_positions: dict[str, int] = {}
    local_positions: list[int] = []
    for size, names in zip(value.local_shape, spec, strict=True):
        for name in names:
            new_positions[name] = len(shape)
            shape.append(mesh.size(name))
        local_positions.append(len(shape))
        shape.append(size // math.prod(mesh.shape(names)))
    axes = mesh.ordered((*value.axes, *new_positions))
    old_positions = {axis: i for i, axis in enumerate(value.axes)}
    order = [new_positions[a] if a in new_positions else old_positions[a] for a in axes]
    array, cut = jnp.asarray(value.array), [size for size in shape if size > 1]
    if cut != [size for size in array.shape if size > 1]:
        # XLA would move a reshape past what BF16 is converted to next, and convert back and forth.
        # (Of dimensions of one it would make copies, to lay them out as a call has them.)
        array = materialised(array.reshape(cut))
    array = array.reshape(shape)
    return Folded(lax.transpose(array, [*order, *local_positions]), axes)


def merge_dims(
    value: Folded, spec: Sequence[Sequence[str]], dropped: Sequence[str], mesh: FoldedMesh
) -> Folded:
    """Leaves a `shard_map`: mesh axes `spec[d]` become part of local dim d; index 0 is taken of
    `dropped` axes.
    """
    wanted = [name for names in spec for name in names]
    gone = [axis for axis in dropped if axis in value.axes and axis not in wanted]
    first = tuple(0 if axis in gone else slice(None) for axis in value.axes)
    value = Folded(value.array[first], tuple(a for a in value.axes if a not in gone))
    if not wanted:
        return value
    value = spread(value, mesh.ordered((*value.axes, *wanted)), mesh)
    stay = tuple(a for a in value.axes if a not in wanted)
    positions = {axis: i for i, axis in enumerate(value.axes)}
    order = [positions[a] for a in stay]
    shape = list(mesh.shape(stay))
    for d, (size, names) in enumerate(zip(value.local_shape, spec, strict=True)):
        order += [positions[a] for a in names]
        order.append(len(value.axes) + d)
        shape.append(size * math.prod(mesh.shape(names)))
    return Folded(lax.transpose(value.array, order).reshape(shape), stay)
