"""Calls to the host in auto-sharded programs, which XLA's partitioner moves and does not enter.

Outside `shard_map` JAX makes such a call once, on the first device, with whole arrays: so XLA's
partitioner gathers the operands, makes the call where the partition's number is 0, and sends the
results to all. Here the call has a name of its own, and becomes the primitive again in the
partitioned program, as a call that every device makes and that is passed on for the first.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jax._src import callback as callbacks
from jax._src import debugging, dispatch
from jax._src.interpreters import mlir
from jax._src.sharding_impls import SPMDAxisContext

from emulator.program.linalg_calls import Calls

#: The only target that keeps its sharding without results; the call's own name is its
#: configuration.
TARGET = "xla_ffi_python_cpu_callback"

_FIRST = "first"

HOST = (
    callbacks.pure_callback_p,
    callbacks.io_callback_p,
    debugging.debug_callback_p,
    debugging.debug_print_p,
)


def lowerings(calls: Calls) -> list[tuple[Any, Callable[..., Any]]]:
    """Lowering rules that write every call to the host as one call, noted in `calls`."""

    def rule(primitive: Any) -> Callable[..., Any]:
        def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
            axes = ctx.module_context.axis_context
            partly = isinstance(axes, SPMDAxisContext) and axes.manual_axes != frozenset(
                axes.mesh.axis_names
            )
            if partly:
                raise NotImplementedError(
                    f"primitive {primitive.name!r} in a shard_map over some axes of a mesh has "
                    "no rule here; make the shard_map over all of them"
                )
            if params.get("ordered"):
                raise NotImplementedError(
                    f"primitive {primitive.name!r} in order, in an auto-sharded program, has no "
                    "rule here; leave ordered=True out"
                )
            manual = isinstance(axes, SPMDAxisContext)
            name = f"{'each' if manual else _FIRST}_{primitive.name}_{len(calls)}"
            calls[name] = primitive, params
            call = mlir.custom_call(
                TARGET,
                result_types=[mlir.aval_to_ir_type(ctx.module_context, a) for a in ctx.avals_out],
                operands=operands,
                backend_config=name,
                has_side_effect=primitive is not callbacks.pure_callback_p,
            )
            where = callbacks._callback_op_sharding(axes, params.get("sharding"), ctx.avals_out)
            if where is not None:
                mlir.set_sharding(ctx.module_context, call, where)
            return call.results

        return lower

    return [(primitive, rule(primitive)) for primitive in HOST]


_LOWERING = threading.RLock()


@contextmanager
def without_devices() -> Iterator[None]:
    """Inside, these calls are lowered without any devices, which JAX's own rules need and those
    here do not. What JAX demands is one set for all threads, so one thread at a time is inside.
    """
    demanding = dispatch.prim_requires_devices_during_lowering
    with _LOWERING:
        ours = demanding & set(HOST)
        demanding -= ours
        try:
            yield
        finally:
            demanding |= ours


def is_call(op: Any) -> bool:
    """Whether an operation of a partitioned module is a call to the host."""
    return op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == TARGET


def is_of_the_first(op: Any) -> bool:
    """Whether it is a call that only the first partition makes."""
    return is_call(op) and op.attributes["backend_config"].value.startswith(_FIRST)


def call(t: Any, op: Any, arrays: Sequence[Any]) -> Sequence[Any]:
    """The results of a call to the host, on every device."""
    primitive, params = t.calls[op.attributes["backend_config"].value]
    if not is_of_the_first(op):
        return primitive.bind(*arrays, **params)
    return _of_the_first(primitive, params, t.partition, arrays)


def _of_the_first(
    primitive: Any, params: dict[str, Any], partition: Any, arrays: Sequence[Any]
) -> Sequence[Any]:
    """The call on every device, passed on for the one whose `partition` is 0. Others have zeros."""
    if primitive is callbacks.pure_callback_p:  # made once for devices that have the same arrays
        return primitive.bind(*arrays, **{**params, "sharding": None})
    if primitive is callbacks.io_callback_p:
        made, bound, bind = params["callback"], {**params, "sharding": None}, primitive.bind
    elif primitive is debugging.debug_callback_p:
        made, bound, bind = params["callback"], {**params}, primitive.bind
    else:
        made = functools.partial(primitive.impl, **params)
        bound = {"effect": debugging.debug_effect, "partitioned": False}
        bind = debugging.debug_callback_p.bind
    shapes = [(a.shape, a.dtype) for a in bound.get("result_avals", ())]

    def first(number: Any, *values: Any) -> Any:
        if int(number) == 0:
            return made(*values)
        return [np.zeros(shape, dtype) for shape, dtype in shapes]

    return bind(partition, *arrays, **{**bound, "callback": first})
