"""Collectives on data: a Schedule's additions in its order, each rounded once in the sent dtype.

The time half never imports this file; here a Schedule meets JAX arrays. `run` is the definition
(NumPy, step by step, all ranks); `play` computes the same bits for any Schedule, `all_reduce` and
`reduce_scatter` for whole arrays, from a plan that forms every distinct sum once, or by the
processor's own sums.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from emulator.collectives.combine import (
    DEFINITION,
    KINDS,
    arithmetic,
    from_words,
    to_words,
    to_words_but_fp32,
)
from emulator.collectives.evaluate import Leaves, execute
from emulator.collectives.plan import orders, plan, plan_state
from emulator.collectives.schedule import Schedule
from emulator.collectives.symbolic import EMPTY, initial_slots
from kernels.apart import apart
from kernels.compiled import SUMS, compiled


@functools.partial(jax.jit, static_argnames=("schedule", "op", "parts", "axis"))
def all_reduce(
    x: Array, schedule: Schedule, *, op: str = "sum", parts: int = 1, axis: int = 0
) -> Array:
    """What all ranks end with: x [ranks, batch, count] -> [batch, count].

    The ranks may lie along any `axis` but the last, between any others; the result lacks it.
    `parts` contiguous parts of ceil(count / parts) elements each run as a schedule of their own
    (the dies of a package). `op` is sum, prod, max, min, and, or, xor. Sums and products are
    rounded to nearest even every time in x's dtype, subnormals kept; integers wrap; those of
    float64 and complex numbers are XLA's. max and min order -0 below +0 and let a NaN through.

    Raises:
        ValueError: a shape, dtype, `op` or Schedule that does not fit.
        NotImplementedError: a dtype for which `op` means nothing, such as a sum of bool.
    """
    if not 0 <= axis < x.ndim - 1:
        raise ValueError(f"all_reduce: axis must be 0 to {x.ndim - 2} for {x.shape}, got {axis}")
    _check("all_reduce", x, schedule, op, x.shape[axis : axis + 1], parts)
    outer, batch, count = x.shape[:axis], x.shape[axis + 1 : -1], x.shape[-1]
    values = _movable(x, parts).reshape(math.prod(outer), x.shape[axis], math.prod(batch), count)
    y = _by_parts(values, parts, lambda part: _all_reduce(part, schedule, op, x.dtype))
    return from_words(y, x.dtype).reshape(*outer, *batch, count)


@functools.partial(jax.jit, static_argnames=("schedule", "op", "parts"))
def reduce_scatter(x: Array, schedule: Schedule, *, op: str = "sum", parts: int = 1) -> Array:
    """What each rank ends with: x [ranks, destination, batch, count] -> [ranks, batch, count].

    Rules as for `all_reduce`; `parts` cut each destination's block.
    """
    _check("reduce_scatter", x, schedule, op, x.shape[:2] if x.ndim == 4 else (), parts)
    values = _movable(x, parts)
    y = _by_parts(values, parts, lambda part: _reduce_scatter(part, schedule, op, x.dtype))
    return from_words(y, x.dtype)


@functools.partial(jax.jit, static_argnames=("schedule", "op"))
def play(schedule: Schedule, x: Array, op: str = "sum") -> Array:
    """The state [ranks, slots, ...] after all steps, from x [ranks, slots, ...]: `run` in JAX, for
    any Schedule and dtype.

    Every distinct sum is formed once; what only moves is one gather. Rules as for `all_reduce`. It
    works on bits, so it has no derivative.

    Raises:
        ValueError: a shape or `op` that does not fit, or a Schedule that sends what is not there.
        NotImplementedError: a dtype for which `op` means nothing, where something is added.
    """
    places = (schedule.ranks, schedule.slots)
    if x.shape[:2] != places:
        raise ValueError(f"play expects x[ranks, slots, ...] of {places}; got shape {x.shape}")
    _check_kind("play", op)
    todo, source = plan_state(schedule)
    rows, size = math.prod(places), math.prod(x.shape[2:])
    words = to_words(x).reshape(rows, size)
    if todo is not None and size:
        leaves = Leaves(words[None, :, None], lambda numbers: (numbers, np.array(0)), size)
        sums = execute(leaves, todo, arithmetic(op, x.dtype))
        words = jnp.concatenate([words, to_words(sums).reshape(-1, size)])
    return from_words(words[jnp.asarray(source, jnp.int32)], x.dtype).reshape(x.shape)


def run(schedule: Schedule, x: np.ndarray, op: str = "sum") -> np.ndarray:
    """The state [ranks, slots, ...] after every step, from x [ranks, slots, ...] (NumPy).

    The definition: every transfer of every rank happens. Slots that hold nothing at first (by the
    operation's meaning) are ignored in `x`; reading one raises. Additions and all else that `op`
    may be are NumPy's (ml_dtypes' for bfloat16 and float8).
    """
    _check_kind("run", op)
    combine = DEFINITION[op]
    state = np.array(x)
    filled = initial_slots(schedule) != EMPTY
    for step in schedule.steps():
        before, was_filled = state.copy(), filled.copy()
        for src, dst, src_slot, dst_slot, width, reduce in zip(
            step.src, step.dst, step.src_slot, step.dst_slot, step.width, step.reduce, strict=True
        ):
            for k in range(0, width * step.stride, step.stride):
                if not was_filled[src, src_slot + k]:
                    raise ValueError(f"rank {src} sends slot {src_slot + k}, which holds nothing")
                incoming, at = before[src, src_slot + k], (dst, dst_slot + k)
                with np.errstate(all="ignore"):  # overflow and NaN are results here
                    state[at] = combine(state[at], incoming) if reduce else incoming
                filled[at] = True
    return state


def _check(
    name: str, x: Array, schedule: Schedule, op: str, ranks: tuple[int, ...], parts: int
) -> None:
    """`ranks`: the sizes of the axes of `x` that should have one entry for each rank."""
    if schedule.op != name:
        raise ValueError(
            f"{name} expects a Schedule of {name}, got one of {schedule.op}; build it for this "
            "operation"
        )
    n = schedule.ranks
    if not ranks or set(ranks) != {n}:
        layout = "ranks, batch" if name == "all_reduce" else "ranks, destination, batch"
        raise ValueError(f"{name} expects x[{layout}, count] with {n} ranks, got shape {x.shape}")
    if name == "reduce_scatter" and schedule.slots != n * schedule.cuts:
        raise ValueError(
            f"{name} expects a Schedule without scratch slots, {n * schedule.cuts} of them; got "
            f"{schedule.slots}"
        )
    _check_kind(name, op)
    if parts < 1:
        raise ValueError(f"{name}: parts must be at least 1, got {parts}")


def _check_kind(name: str, op: str) -> None:
    if op not in KINDS:
        raise ValueError(f"{name}: op must be one of {', '.join(KINDS)}; got {op!r}")


def _movable(x: Array, parts: int) -> Array:
    """As words, where numbers may be cut and joined; all else as it is."""
    return x if x.shape[-1] % parts == 0 else to_words_but_fp32(x)


def _by_parts(x: Array, parts: int, run_part: Callable[[Array], Array]) -> Array:
    """Runs contiguous parts of the last axis on their own; equal ones fold into the batch."""
    count = x.shape[-1]
    if parts == 1 or count == 0:
        return run_part(x)
    if count % parts == 0:
        batch = x.shape[-2]
        y = run_part(x.reshape(*x.shape[:-2], batch * parts, count // parts))
        return y.reshape(*y.shape[:-2], batch, count)
    size = -(-count // parts)
    cuts = [x[..., at : at + size] for at in range(0, count, size)]
    return jnp.concatenate([run_part(cut) for cut in cuts], axis=-1)


def _all_reduce(x: Array, schedule: Schedule, op: str, dtype: jnp.dtype) -> Array:
    """[outer, ranks, inner, count] -> [outer, inner, count], numbers or words."""
    if x.shape[1] == 1 or x.size == 0:
        return to_words_but_fp32(x)[:, 0]
    return _reduced(x, schedule, op, dtype, schedule.slots)[0]


def _reduce_scatter(x: Array, schedule: Schedule, op: str, dtype: jnp.dtype) -> Array:
    """[ranks, destination, batch, count] -> [ranks, batch, count], numbers or words."""
    n, _, batch, count = x.shape
    if n == 1 or x.size == 0:
        return to_words_but_fp32(x)[0]
    return _reduced(x.reshape(1, n * n, batch, count), schedule, op, dtype, schedule.cuts)[:, 0]


def _reduced(x: Array, schedule: Schedule, op: str, dtype: jnp.dtype, cuts: int) -> Array:
    """[outer, rows, inner, count] -> [results / cuts, outer, inner, count]: a reduction of rows
    that are cut into so many leaves of one size.
    """
    outer, rows, inner, count = x.shape
    if cuts == 1:  # rows are not cut: all inner ones are one long row
        x = x.reshape(outer, rows, 1, inner * count)
    if _has_orders(schedule, op, dtype, cuts):
        y = _ordered_sums.bind(from_words(x, dtype), schedule=schedule, cuts=cuts)
        y = y if x.dtype == dtype else to_words(y)
    else:
        y = _by_xla(to_words_but_fp32(x), schedule, op, dtype, cuts)
    return y.reshape(-1, outer, inner, count)


def _by_xla(x: Array, schedule: Schedule, op: str, dtype: jnp.dtype, cuts: int) -> Array:
    outer, _, inner, count = x.shape
    out = apart(_results(x, schedule, op, dtype, cuts))  # [results, batch, size]
    pieces = out.reshape(-1, cuts, *out.shape[1:])
    return _side_by_side(jnp.moveaxis(pieces, 1, 2), count).reshape(-1, outer, inner, count)


@functools.partial(jax.jit, static_argnames=("schedule", "op", "dtype", "cuts"))
def _results(values: Array, schedule: Schedule, op: str, dtype: jnp.dtype, cuts: int) -> Array:
    """The results [results, batch, size] of a reduction of `values` [outer, rows, inner, count],
    whose rows are cut into so many leaves of one size.
    """
    count = values.shape[-1]
    size = -(-count // cuts)
    # A short or empty last piece is read as the last `size` elements; what precedes it there is not
    # used.
    start = np.minimum(np.arange(cuts) * size, count - size)
    leaves = Leaves(values, lambda leaf: (leaf // cuts, start[leaf % cuts]), size)
    return execute(leaves, plan(schedule), arithmetic(op, dtype))


def _side_by_side(pieces: Array, count: int) -> Array:
    """[..., pieces, size] -> [..., count]; the first piece that is not whole has the last `size`
    elements of all.
    """
    *batch, _, size = pieces.shape
    whole = count // size
    needed = -(-count // size)
    y = pieces[..., :needed, :].reshape(*batch, needed * size)
    if count == whole * size:
        return y
    # One pass, where to join a part of the last piece to the others would be three.
    of_the_last = np.arange(count) >= whole * size
    return jnp.where(of_the_last, y[..., needed * size - count :], y[..., :count])


# Sums of FP32 and BF16 as one JAX operation: on an x86 compiled for it (`kernels.native_sums`), by
# XLA's operations elsewhere. The bits are the same.

_ordered_sums = Primitive("ordered_sums")


def _has_orders(schedule: Schedule, op: str, dtype: jnp.dtype, cuts: int) -> bool:
    return (
        op == "sum"
        and dtype.name in ("float32", "bfloat16")
        and platform.machine().lower() in ("x86_64", "amd64")
        and orders(schedule, cuts) is not None
    )


def _elsewhere(x: Array, *, schedule: Schedule, cuts: int) -> Array:
    y = _by_xla(to_words_but_fp32(x), schedule, "sum", x.dtype, cuts)
    return from_words(y, x.dtype)


def _on_cpu(x: Array, *, schedule: Schedule, cuts: int) -> Array:
    todo = orders(schedule, cuts)
    if todo is None or (native := compiled(SUMS)) is None:
        return _elsewhere(x, schedule=schedule, cuts=cuts)
    tokens, ends = jnp.asarray(todo.tokens), jnp.asarray(todo.ends)
    found: Array = native.ordered_sums(x, tokens, ends, cuts, todo.depth)
    return found


@_ordered_sums.def_impl
def _eager(x: Array, **how: Any) -> Array:
    with jax.disable_jit(False):
        found: Array = jax.jit(functools.partial(_ordered_sums.bind, **how))(x)
    return found


@_ordered_sums.def_abstract_eval
def _shape(x: Any, *, schedule: Schedule, cuts: int) -> Any:
    todo = orders(schedule, cuts)
    assert todo is not None
    outer, _, inner, count = x.shape
    return x.update(shape=(len(todo.ends) // cuts, outer, inner, count))


def _batched(args: Any, dims: Any, **how: Any) -> Any:
    x = jnp.moveaxis(args[0], dims[0], 0)
    y = _ordered_sums.bind(x.reshape(-1, *x.shape[2:]), **how)
    return y.reshape(y.shape[0], *x.shape[:2], *y.shape[2:]), 1


batching.primitive_batchers[_ordered_sums] = _batched
mlir.register_lowering(_ordered_sums, mlir.lower_fun(_elsewhere, multiple_results=False))
mlir.register_lowering(
    _ordered_sums, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu"
)
