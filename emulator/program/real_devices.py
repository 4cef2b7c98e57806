"""The virtual devices divided over the real ones that a process, or several, have.

A mesh axis is cut into as many parts as it has real devices: each holds a contiguous part of the
axis's indices, so a `Folded` array's leading axis is that much shorter there. Inside the program's
`shard_map` every real device evaluates its own part under an outer `shard_map` in which nothing
communicates but the functions here, and these only gather bit patterns: no rounding happens between
real devices, so the bits are those of one. What lies outside the program's `shard_map` is whole on
every real device.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.core import trace_state_clean
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emulator.program.folded import Folded, FoldedMesh
from emulator.program.words import on_words

#: The one axis of the mesh of real devices. Their order is that of the parts: the parts of the last
#: mesh axis follow one another fastest but for devices to spare, which repeat what others do.
REAL = "real devices"


def check_devices(devices: Any) -> tuple[jax.Device, ...] | None:
    """The argument `devices`: None, or different devices, at least one from each process.

    Raises:
        TypeError: not a sequence of devices.
        ValueError: none, one of them twice, or none of some process.
    """
    if devices is None:
        return tuple(jax.devices()) if jax.process_count() > 1 else None
    listed = tuple(devices) if isinstance(devices, Sequence | np.ndarray) else (devices,)
    if isinstance(devices, str) or not all(isinstance(d, jax.Device) for d in listed):
        raise TypeError(f"devices must be a list of devices like jax.devices(), got {devices!r}")
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"devices must be different and at least one, got {devices!r}")
    idle = set(range(jax.process_count())) - {d.process_index for d in listed}
    if idle:
        raise ValueError(
            f"devices must include some of every process, got none of processes {sorted(idle)}; "
            "pass jax.devices()"
        )
    return listed


@functools.lru_cache(maxsize=64)
def real_mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.array(devices), (REAL,), axis_types=(AxisType.Auto,))


def parts_of(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """How many parts each mesh axis is cut into: as many in all as divide both the axes and
    `count`, the leading axis most.
    """
    divisors = [[d for d in range(1, n + 1) if n % d == 0 and count % d == 0] for n in sizes]
    fitting = (parts for parts in itertools.product(*divisors) if count % math.prod(parts) == 0)
    return max(fitting, key=lambda parts: (math.prod(parts), parts))


def over(
    devices: tuple[jax.Device, ...],
    mesh: FoldedMesh,
    part: Callable[..., Any],
    arrays: Sequence[Any],
) -> tuple[Any, ...]:
    """`part(mesh, *arrays)` on every real device, with the mesh cut and the arrays whole; so are
    the results.
    """
    parts = parts_of(mesh.sizes, len(devices))
    used = math.prod(parts)
    if used < len(devices):
        virtual = " x ".join(f"{n}={s}" for n, s in zip(mesh.names, mesh.sizes, strict=True))
        warnings.warn(
            f"the virtual mesh {virtual} is divided over {used} of the {len(devices)} real devices "
            "given, the others repeat their work: give a number of devices that divides the mesh",
            stacklevel=2,
        )
    spec = PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(part, mesh.cut(parts)),
        mesh=real_mesh(devices),
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    return mapped(*arrays)


def everywhere(arrays: Sequence[Any], devices: Sequence[jax.Device] | None) -> list[Any]:
    """Arguments at hand as they are given to the real devices: whole on each of them. While a
    program is traced they are constants of it.

    Raises:
        AssertionError: JAX's, if processes give different values.
    """
    if devices is None or not trace_state_clean():
        return list(arrays)
    placed = NamedSharding(real_mesh(tuple(devices)), PartitionSpec())

    def place(words: Folded) -> Folded:  # JAX compares the processes' values, so no NaNs
        return Folded(jax.device_put(np.asarray(words.array), placed))

    def given(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer):
            return x
        if isinstance(x, jax.Array) and x.sharding.device_set == placed.device_set:
            return jax.device_put(x, placed)  # which is at most a copy between them
        return on_words(place)(Folded(x)).array

    return [given(x) for x in arrays]


def together(
    rule: Callable[..., Folded], axes: Sequence[str], mesh: FoldedMesh, values: Sequence[Folded]
) -> Folded:
    """`rule(mesh, *values)` of what all real devices have along `axes`, cut again to each one's
    own.
    """
    axes = mesh.cut_axes(axes)
    if not axes:
        return rule(mesh, *values)
    gathered = [gather(value, axes, mesh) for value in values]
    return own_part(rule(mesh.whole(axes), *gathered), axes, mesh)


def gather(value: Folded, axes: Sequence[str], mesh: FoldedMesh) -> Folded:
    """The value with all indices of `axes`, as under `mesh.whole(axes)`."""
    axes = [a for a in mesh.cut_axes(axes) if a in value.axes]

    def gathered(words: Folded) -> Folded:
        array = words.array
        for axis in axes:
            at = words.axes.index(axis)
            ranks = np.moveaxis(_ranks(mesh), mesh.names.index(axis), -1)
            groups = ranks.reshape(-1, ranks.shape[-1]).tolist()
            array = lax.all_gather(array, REAL, axis=at, axis_index_groups=groups, tiled=True)
        return Folded(array, words.axes)

    return on_words(gathered)(value) if axes else value


def own_part(value: Folded, axes: Sequence[str], mesh: FoldedMesh) -> Folded:
    """The inverse of `gather`: of all indices of `axes`, those that lie on this real device."""
    axes = [a for a in mesh.cut_axes(axes) if a in value.axes]

    def cut(words: Folded) -> Folded:
        array = words.array
        for axis in axes:
            size = mesh.size(axis)
            start = _coordinate(mesh, axis) * size
            array = lax.dynamic_slice_in_dim(array, start, size, words.axes.index(axis))
        return Folded(array, words.axes)

    return on_words(cut)(value) if axes else value


def any_of(mesh: FoldedMesh, predicates: Array) -> Array:
    """Whether any of the predicates holds on any real device."""
    here = jnp.any(predicates)
    return lax.pmax(here.astype(jnp.int32), REAL) > 0 if mesh.parts else here


def first_of_copies(mesh: FoldedMesh, axes: Sequence[str]) -> Array:
    """Whether this real device is the first of those that hold the same indices of `axes`."""
    kept = tuple(slice(None) if name in axes else 0 for name in mesh.names)
    return jnp.isin(lax.axis_index(REAL), _ranks(mesh)[*kept, 0])


def _ranks(mesh: FoldedMesh) -> np.ndarray:
    """Numbers of the real devices, by part of each mesh axis and last by which to spare."""
    return np.arange(lax.axis_size(REAL)).reshape(*mesh.parts, -1)


def _coordinate(mesh: FoldedMesh, axis: str) -> Array:
    """Which part of a mesh axis this real device holds."""
    at = mesh.names.index(axis)
    return lax.axis_index(REAL) // math.prod(_ranks(mesh).shape[at + 1 :]) % mesh.parts[at]
