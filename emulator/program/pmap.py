"""`em.pmap`: `jax.pmap`'s meaning with more devices than the process has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import kernels
from emulator.machines import Machine
from emulator.program.emulate import emulated_with, make_settings


@dataclasses.dataclass(frozen=True, slots=True)
class _Static:
    """A Python value that is no array of the program, even where it is a number; another type is
    another value.
    """

    kind: type
    value: Any


def pmap(
    fun: Callable[..., Any],
    axis_name: Hashable = None,
    *,
    on: Machine,
    in_axes: Any = 0,
    out_axes: Any = 0,
    static_broadcasted_argnums: int | tuple[int, ...] = (),
    axis_size: int | None = None,
    donate_argnums: int | tuple[int, ...] = (),
    arithmetic: Any = None,
    algorithms: Mapping[str, Any] | None = None,
    vector: str = "exact",
    tiling: kernels.Tiling | str | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., Any]:
    """Runs `fun` on one device of `on` per index of the mapped axis, as `jax.pmap` would.

    Args:
        fun: the per-device function; collectives inside name `axis_name`.
        axis_name: the name of the mapped axis.
        on: the machine; the mapped axis takes its lowest-numbered devices.
        in_axes, out_axes: as in `jax.pmap`: an int, None, or a pytree prefix of them.
        static_broadcasted_argnums: positions of arguments that are Python values, to be hashed.
        axis_size: the number of devices when no argument is mapped.
        donate_argnums: positions of arguments whose memory results may take, as the memory of an
            estimate does; the arrays given stay as they are.
        arithmetic, algorithms, vector, tiling, devices: as in `em.emulate`.

    Raises:
        ValueError: mapped axes differ in size, or the machine has fewer devices; a static or a
            donated argument is not there, or one is both.
    """
    if not callable(fun):
        raise TypeError(f"pmap: fun must be callable, got {type(fun).__name__}")
    name = str(axis_name) if axis_name is not None else "<pmap axis>"
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(f"pmap: axis_name must be a string, got {axis_name!r}")
    numbers = {
        "static_broadcasted_argnums": static_broadcasted_argnums,
        "donate_argnums": donate_argnums,
    }
    named = {what: (n,) if isinstance(n, int) else tuple(n) for what, n in numbers.items()}

    def positions(args: tuple[Any, ...]) -> tuple[set[int], set[int]]:
        """Of static arguments and of donated ones."""
        for what, given in named.items():
            for i in given:
                if not -len(args) <= i < len(args):
                    raise ValueError(
                        f"pmap: {what} names argument {i}, but the call has {len(args)} positional "
                        "ones; name one of them"
                    )
        fixed, donated = ({i % len(args) for i in given} for given in named.values())
        if both := fixed & donated:
            raise ValueError(
                f"pmap: argument {min(both)} is in static_broadcasted_argnums and in "
                "donate_argnums; a static one has no memory to donate"
            )
        return fixed, donated

    def hold(args: tuple[Any, ...]) -> tuple[Any, ...]:
        fixed, _ = positions(args)
        return tuple(
            _Static(type(a), a) if i in fixed and not isinstance(a, _Static) else a
            for i, a in enumerate(args)
        )

    def program(*args: Any, **kwargs: Any) -> Any:
        fixed, donated = positions(args)
        args = tuple(a.value if isinstance(a, _Static) else a for a in args)
        moving = [i for i in range(len(args)) if i not in fixed]
        axes = in_axes if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
        if len(axes) != len(args):
            raise ValueError(f"pmap: in_axes has {len(axes)} entries for {len(args)} arguments")
        operands = [args[i] for i in moving], kwargs
        prefix = [axes[i] for i in moving], {key: 0 for key in kwargs}
        flat, tree = jax.tree.flatten(operands)
        flat_axes = _broadcast_prefix(prefix, operands, "in_axes")
        size = _axis_size(flat, flat_axes, axis_size)
        if size > on.num_devices:
            raise ValueError(
                f"pmap: the mapped axis has size {size} but {on.name} has {on.num_devices} "
                "devices; map fewer, or use vmap"
            )
        structure: list[Any] = []

        def per_device(*local: Any) -> list[Any]:
            squeezed = [
                x if a is None else jnp.squeeze(x, a) for x, a in zip(local, flat_axes, strict=True)
            ]
            call_args, call_kwargs = jax.tree.unflatten(tree, squeezed)
            full = list(args)
            for i, arg in zip(moving, call_args, strict=True):
                full[i] = arg
            result = fun(*full, **call_kwargs)
            structure[:] = [
                jax.tree.structure(result),
                _broadcast_prefix(out_axes, result, "out_axes"),
            ]
            return [jnp.expand_dims(x, 0) for x in jax.tree.leaves(result)]

        sharded = jax.shard_map(
            per_device,
            mesh=on.mesh(axis_types=None, devices=None, **{name: size}),
            in_specs=tuple(
                _spec(np.ndim(x), a, name) for x, a in zip(flat, flat_axes, strict=True)
            ),
            out_specs=PartitionSpec(name),
            check_vma=False,
        )
        if donated:
            whose = [i for i in moving for _ in jax.tree.leaves(args[i])]
            leaves = tuple(at for at, i in enumerate(whose) if i in donated)
            sharded = jax.jit(sharded, donate_argnums=leaves)
        outs = sharded(*flat)
        out_tree, leaf_axes = structure
        placed = [
            x[0] if a is None else jnp.moveaxis(x, 0, a)
            for x, a in zip(outs, leaf_axes, strict=True)
        ]
        return jax.tree.unflatten(out_tree, placed)

    functools.update_wrapper(program, fun)
    settings = make_settings(on, arithmetic, algorithms, vector, tiling=tiling, devices=devices)
    return emulated_with(settings, program, hold if named["static_broadcasted_argnums"] else None)


def _axis_size(flat: list[Any], axes: list[Any], given: int | None) -> int:
    for x, a in zip(flat, axes, strict=True):
        if a is not None and not -np.ndim(x) <= a < np.ndim(x):
            raise ValueError(
                f"pmap: in_axes maps axis {a} of an argument of shape {np.shape(x)}, which has "
                f"{np.ndim(x)} axes; give it an axis of devices, or replicate it: in_axes=None"
            )
    sizes = {int(np.shape(x)[a]) for x, a in zip(flat, axes, strict=True) if a is not None}
    if given is not None:
        sizes.add(given)
    if len(sizes) != 1:
        found = "no argument is mapped" if not sizes else f"mapped axes have sizes {sorted(sizes)}"
        raise ValueError(f"pmap: {found}; all mapped axes must have one size, or give axis_size")
    return sizes.pop()


def _broadcast_prefix(prefix: Any, tree: Any, what: str) -> list[Any]:
    """One entry of `prefix` per leaf of `tree`."""

    def is_axis(x: Any) -> bool:
        return x is None or isinstance(x, int)

    try:
        spread = jax.tree.map(
            lambda a, sub: [a] * len(jax.tree.leaves(sub)), prefix, tree, is_leaf=is_axis
        )
    except ValueError as error:
        raise ValueError(
            f"pmap: {what}={prefix!r} does not match the structure of the values: {error}"
        ) from None
    return [
        a
        for entry in jax.tree.leaves(
            spread, is_leaf=lambda x: isinstance(x, list) and all(map(is_axis, x))
        )
        for a in entry
    ]


def _spec(rank: int, axis: int | None, name: str) -> PartitionSpec:
    if axis is None:
        return PartitionSpec()
    axis %= rank
    return PartitionSpec(*[None] * axis, name)
