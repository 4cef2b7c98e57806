"""Collectives on data: a Schedule's additions in its order, each rounded once in the sent dtype.

The time half never imports this file; it is the one place where a Schedule meets JAX arrays. `run`
is the definition (NumPy, step by step, all ranks); `play` computes the same bits for any Schedule,
`all_reduce` and `reduce_scatter` for whole arrays, from a plan that forms every distinct sum once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from emulator.collectives.combine import (
    DEFINITION,
    KINDS,
    Arithmetic,
    Combine,
    How,
    arithmetic,
    from_words,
    to_words,
)
from emulator.collectives.plan import Plan, Run, plan, plan_state
from emulator.collectives.schedule import IntArray, Schedule
from emulator.collectives.symbolic import EMPTY, initial_slots
from kernels.apart import apart

_FEW = 2  # levels that are compiled one by one


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
    values = _movable(x).reshape(math.prod(outer), x.shape[axis], math.prod(batch), count)
    y = _by_parts(values, parts, lambda part: _all_reduce(part, schedule, op, x.dtype))
    return from_words(y, x.dtype).reshape(*outer, *batch, count)


@functools.partial(jax.jit, static_argnames=("schedule", "op", "parts"))
def reduce_scatter(x: Array, schedule: Schedule, *, op: str = "sum", parts: int = 1) -> Array:
    """What each rank ends with: x [ranks, destination, batch, count] -> [ranks, batch, count].

    Rules as for `all_reduce`; `parts` cut each destination's block.
    """
    _check("reduce_scatter", x, schedule, op, x.shape[:2] if x.ndim == 4 else (), parts)
    values = _movable(x)
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
        leaves = _Leaves(words[None, :, None], lambda numbers: (numbers, np.array(0)), size)
        sums = _execute(leaves, todo, arithmetic(op, x.dtype))
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
    """[outer, ranks, inner, count] -> [outer, inner, count], words or FP32 numbers."""
    outer, n, inner, count = x.shape
    if n == 1 or x.size == 0:
        return x[:, 0]
    out = apart(_results(x, schedule, op, dtype, schedule.slots))  # [slots, batch, size]
    return _side_by_side(jnp.moveaxis(out, 0, 1), count).reshape(outer, inner, count)


def _reduce_scatter(x: Array, schedule: Schedule, op: str, dtype: jnp.dtype) -> Array:
    """[ranks, destination, batch, count] -> [ranks, batch, count], words or FP32 numbers."""
    n, _, *shape = x.shape
    batch, count = shape
    if n == 1 or x.size == 0:
        return x[0]
    cuts = schedule.cuts
    if cuts == 1:
        batch, count = 1, batch * count  # blocks are not cut: one long row each
    values = x.reshape(1, n * n, batch, count)
    out = apart(_results(values, schedule, op, dtype, cuts))  # [n cuts, batch, size]
    y = _side_by_side(jnp.moveaxis(out.reshape(n, cuts, batch, -1), 1, 2), count)
    return y.reshape(n, *shape)


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
    leaves = _Leaves(values, lambda leaf: (leaf // cuts, start[leaf % cuts]), size)
    return _execute(leaves, plan(schedule), arithmetic(op, dtype))


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaves:
    """All contributions [outer, rows, inner, columns], and where a plan's leaves lie in them.

    They are words, but FP32 numbers stay as they are: XLA moves those unchanged, and to make words
    of all of them beforehand is a pass through memory, as it is to bring outer and rows into
    another order. `window` maps numbers to rows and first columns; a leaf is [outer, inner, size].
    """

    values: Array
    window: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    size: int

    @property
    def batch(self) -> int:
        return self.values.shape[0] * self.values.shape[2]

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """Rows and first columns [..., 2] of leaves."""
        return np.stack(np.broadcast_arrays(*self.window(numbers)), axis=-1).astype(np.int32)

    def take(self, at: Array) -> Array:
        """The leaves [width, batch, size] as words, from `at` [width, 2]."""
        outer, _, inner, _ = self.values.shape
        numbers_of = lax.GatherDimensionNumbers(
            offset_dims=(1, 2, 3), collapsed_slice_dims=(1,), start_index_map=(1, 3)
        )
        sizes = (outer, 1, inner, self.size)
        # Rows and columns are in range by construction, which spares XLA the checks.
        found = lax.gather(self.values, at, numbers_of, sizes, mode="promise_in_bounds")
        return to_words(found.reshape(len(at), self.batch, self.size))


def _movable(x: Array) -> Array:
    return x if x.dtype == jnp.float32 else to_words(x)


def _execute(leaves: _Leaves, todo: Plan, arith: Arithmetic) -> Array:
    """The plan's results [results, batch, size] as words, or as FP32 numbers."""
    if (
        todo.results >= 0
    ).any():  # one rank's untouched contribution: only a Schedule that does not sum has that
        raise ValueError("a reduction's result contains no addition; check() the Schedule")

    if arith.quick is None:
        return arith.exact.store(_evaluate(leaves, todo, arith.exact))
    registers = _evaluate(leaves, todo, arith.quick)
    if arith.right_for is not None:
        right = arith.right_for(to_words(leaves.values))
    else:
        assert arith.was_right is not None
        right = arith.was_right(registers)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        exact = arith.exact.store(_evaluate(leaves, todo, arith.exact, rarely=True))
        return jnp.bool_(False), exact

    # A loop that runs at most once: it keeps its state in place, where a conditional would copy it.
    state = ~right, arith.quick.store(registers)
    return lax.while_loop(lambda state: state[0], again, state)[1]


def _evaluate(leaves: _Leaves, todo: Plan, how: How, rarely: bool = False) -> Array:
    """The plan's results as registers [results, batch, size]; what is `rarely` done need not be
    quick but small.
    """

    def leaf(at: Array) -> Array:
        return how.load(leaves.take(at))

    def combine(a: Array, b: Array) -> Array:
        # Gathered first: XLA would compute the gathers again for each number, and move the reshape
        # that ends one through all of `combine`, one operation in each round of its passes.
        return how.combine(*lax.optimization_barrier((a, b)))

    if todo.start is None:
        shape = (todo.registers, leaves.batch, leaves.size)
        registers = jnp.zeros(shape, jax.eval_shape(leaf, jnp.zeros((1, 2), jnp.int32)).dtype)
    else:
        registers = leaf(jnp.asarray(leaves.at(todo.start)))
    if rarely and len(todo.runs) > 1:
        registers = _run_rows(registers, todo.runs, leaves, leaf, combine)
        return _read(registers, -1 - todo.results)
    found = _Registers((registers,), np.zeros(todo.registers, int), np.arange(todo.registers))
    runs = _short_ones_apart(todo.runs)
    for i, part in enumerate(runs):
        if len(part.left) == 1:
            found = _one_level(found, part, leaves, leaf, combine)
        else:
            found = found.in_one(_used(runs[i:], todo.results))
            part = _with_rows(part, found.row)
            made = _run_levels(found.arrays[0], part, leaves, leaf, combine)
            found = dataclasses.replace(found, arrays=(made,))
    return found.read(-1 - todo.results)


@dataclasses.dataclass(frozen=True, slots=True)
class _Registers:
    """Registers in several arrays [rows, batch, size]: the `array` that each is in, and the row."""

    arrays: tuple[Array, ...]
    array: IntArray
    row: IntArray

    def read(self, numbers: IntArray) -> Array:
        used, which = np.unique(self.array[numbers], return_inverse=True)
        if len(used) == 1:
            return _read(self.arrays[used[0]], self.row[numbers])
        first = np.cumsum([0, *(len(self.arrays[i]) for i in used[:-1])])
        joined = jnp.concatenate([self.arrays[i] for i in used])
        return _read(joined, first[which] + self.row[numbers])

    def and_then(self, numbers: IntArray, values: Array) -> _Registers:
        """With new `values` of some."""
        array, row = self.array.copy(), self.row.copy()
        array[numbers], row[numbers] = len(self.arrays), np.arange(len(numbers))
        return _Registers((*self.arrays, values), array, row)

    def in_one(self, numbers: IntArray) -> _Registers:
        """In one array, which has `numbers` at least; others may be lost."""
        if len(self.arrays) == 1:
            return self
        row = np.zeros_like(self.row)
        row[numbers] = np.arange(len(numbers))
        return _Registers((self.read(numbers),), np.zeros_like(row), row)


def _short_ones_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of a level each where there are few levels: a loop would be more to compile."""
    apart: list[Run] = []
    for part in runs:
        if len(part.left) > _FEW:
            apart.append(part)
            continue
        for left, right, out in zip(part.left, part.right, part.out, strict=True):
            level = dataclasses.replace(part, left=left[None], right=right[None], out=out[None])
            apart.append(level)
    return apart


def _used(runs: Sequence[Run], results: IntArray) -> IntArray:
    """The registers that `runs` read or write, or that are results in the end."""
    used = [-1 - results]
    for part in runs:
        used += [part.out, *([] if part.left_leaf else [part.left])]
        used += [] if part.right_leaf else [part.right]
    return np.unique(np.concatenate([registers.reshape(-1) for registers in used]))


def _with_rows(part: Run, rows: IntArray) -> Run:
    """The run with rows instead of registers."""
    unmoved = np.array_equal(rows, np.arange(len(rows)))
    return dataclasses.replace(
        part,
        left=part.left if part.left_leaf else rows[part.left],
        right=part.right if part.right_leaf else rows[part.right],
        out=rows[part.out],
        in_place=part.in_place and unmoved,
    )


def _read(registers: Array, rows: Array | IntArray) -> Array:
    """Some `registers`; as in `_Leaves.take`, XLA checks no row."""
    if isinstance(rows, np.ndarray):
        if np.array_equal(rows, np.arange(len(registers))):
            return registers
        rows = jnp.asarray(rows, jnp.int32)
    numbers_of = lax.GatherDimensionNumbers(
        offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    sizes = (1, *registers.shape[1:])
    return lax.gather(registers, rows[:, None], numbers_of, sizes, mode="promise_in_bounds")


def _write(registers: Array, rows: Array, values: Array) -> Array:
    numbers_of = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
    )
    return lax.scatter(
        registers,
        rows[:, None],
        values,
        numbers_of,
        unique_indices=True,
        mode="promise_in_bounds",
    )


def _one_level(
    registers: _Registers,
    part: Run,
    leaves: _Leaves,
    leaf: Callable[[Array], Array],
    combine: Combine,
) -> _Registers:
    """The sums of a run's only level, in an array of their own: nothing is scattered."""

    def operand(numbers: IntArray, are_leaves: bool) -> Array:
        return leaf(jnp.asarray(leaves.at(numbers))) if are_leaves else registers.read(numbers)

    left = operand(part.left[0], part.left_leaf)
    return registers.and_then(part.out[0], combine(left, operand(part.right[0], part.right_leaf)))


def _run_levels(
    registers: Array,
    part: Run,
    leaves: _Leaves,
    leaf: Callable[[Array], Array],
    combine: Combine,
) -> Array:
    def level(registers: Array, index: tuple[Array, Array, Array]) -> tuple[Array, None]:
        left, right, out = index
        a = leaf(left) if part.left_leaf else _read(registers, left)
        if part.in_place:
            return combine(a, registers), None
        b = leaf(right) if part.right_leaf else _read(registers, right)
        return _write(registers, out, combine(a, b)), None

    def places(operand: IntArray, are_leaves: bool) -> Array:
        return jnp.asarray(leaves.at(operand) if are_leaves else operand.astype(np.int32))

    left, right = places(part.left, part.left_leaf), places(part.right, part.right_leaf)
    out = jnp.asarray(part.out, jnp.int32)
    if len(part.left) == 1:
        return level(registers, (left[0], right[0], out[0]))[0]
    return lax.scan(level, registers, (left, right, out))[0]


def _run_rows(
    registers: Array,
    runs: Sequence[Run],
    leaves: _Leaves,
    leaf: Callable[[Array], Array],
    combine: Combine,
) -> Array:
    """All runs in one loop over rows of one width, whose additions are compiled once. (No addition
    of a level writes a register that another one of that level reads.)
    """
    width = math.gcd(*(part.out.shape[1] for part in runs))

    def operand(numbers: Sequence[IntArray], are_leaves: Sequence[bool]) -> tuple[Array, ...]:
        """For each row whether it reads leaves, where these are, and which registers else."""
        rows = [n.reshape(-1, width) for n in numbers]
        flags = np.concatenate([np.full(len(r), f) for r, f in zip(rows, are_leaves, strict=True)])
        every = np.concatenate(rows)
        places = leaves.at(np.where(flags[:, None], every, 0))
        others = np.where(flags[:, None], 0, every).astype(np.int32)
        return jnp.asarray(flags), jnp.asarray(places), jnp.asarray(others)

    def read(registers: Array, operand: tuple[Array, ...]) -> Array:
        from_leaves, places, numbers = operand
        return jnp.where(from_leaves, leaf(places), _read(registers, numbers))

    def row(registers: Array, index: Any) -> tuple[Array, None]:
        left, right, out = index
        return _write(registers, out, combine(read(registers, left), read(registers, right))), None

    left = operand([part.left for part in runs], [part.left_leaf for part in runs])
    right = operand([part.right for part in runs], [part.right_leaf for part in runs])
    out = np.concatenate([part.out.reshape(-1, width) for part in runs]).astype(np.int32)
    return lax.scan(row, registers, (left, right, jnp.asarray(out)))[0]
