"""Abstract meshes over device numbers of a machine: no devices are needed to trace over them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

_FIELDS = ("axis_sizes", "axis_names", "axis_types", "abstract_device", "size")


class PodMesh(AbstractMesh):
    """An abstract mesh whose devices are chosen numbers instead of 0, 1, 2, ...

    JAX keeps abstract meshes by their shape and hands out one object for equal shapes, and it may
    copy attributes about; so an instance is made without its constructor, once for each (shape,
    device numbers).
    """

    device_numbers: tuple[int, ...]

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, PodMesh)
            and self.device_numbers == other.device_numbers
            and AbstractMesh.__eq__(self, other)
        )

    def __hash__(self) -> int:
        return hash((AbstractMesh.__hash__(self), self.device_numbers))


def abstract_mesh(
    axis_sizes: Mapping[str, int], axis_types: Any = None, devices: tuple[int, ...] | None = None
) -> AbstractMesh:
    """The mesh with these axes (the last varies fastest) over `devices`, or over 0 .. size-1.

    `axis_types` is one `jax.sharding.AxisType` for all axes or one for each; default `Auto`.
    """
    names, sizes = tuple(axis_sizes), tuple(axis_sizes.values())
    if axis_types is None:
        types: tuple[AxisType, ...] = (AxisType.Auto,) * len(names)
    elif isinstance(axis_types, AxisType):
        types = (axis_types,) * len(names)
    else:
        types = tuple(axis_types) if isinstance(axis_types, Iterable) else ()
    if len(types) != len(names) or not all(isinstance(t, AxisType) for t in types):
        raise ValueError(
            f"axis_types must be one jax.sharding.AxisType or one for each of the {len(names)} "
            f"axes; got {axis_types!r}"
        )
    plain = AbstractMesh(sizes, names, axis_types=types)
    if devices is None or devices == tuple(range(plain.size)):
        return plain
    return _pod_mesh(plain, devices)


def device_numbers(mesh: AbstractMesh | jax.sharding.Mesh) -> tuple[int, ...]:
    """The machine's device numbers of a mesh, in row-major order of its axes.

    Real devices stand for the numbers of their places in `jax.devices()`.
    """
    if isinstance(mesh, PodMesh):
        return mesh.device_numbers
    if isinstance(mesh, jax.sharding.Mesh) and mesh.size:
        return _places(mesh)
    return tuple(range(mesh.size))


def entries(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dim that a spec speaks of; what it says of reductions is left out."""
    found = spec.partitions
    return tuple((e,) if isinstance(e, str) else e if isinstance(e, tuple) else () for e in found)


@functools.lru_cache(maxsize=64)
def _places(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    flat = mesh.devices.flatten()
    place = {device: i for i, device in enumerate(flat[0].client.devices())}
    return tuple(place[device] for device in flat)


@functools.cache
def _pod_mesh(plain: AbstractMesh, devices: tuple[int, ...]) -> PodMesh:
    mesh = object.__new__(PodMesh)
    for name in _FIELDS:
        object.__setattr__(mesh, name, getattr(plain, name))
    object.__setattr__(mesh, "device_numbers", devices)
    return mesh
