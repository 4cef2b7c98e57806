"""A plan's additions by XLA's operations, which form every distinct sum once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from emulator.collectives.combine import Arithmetic, Combine, How, to_words
from emulator.collectives.plan import Plan, Run
from emulator.collectives.schedule import IntArray

_FEW = 2  # levels that are compiled one by one


@dataclasses.dataclass(frozen=True, slots=True)
class Leaves:
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


def execute(leaves: Leaves, todo: Plan, arith: Arithmetic) -> Array:
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


def _evaluate(leaves: Leaves, todo: Plan, how: How, rarely: bool = False) -> Array:
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
    """Some `registers`; as in `Leaves.take`, XLA checks no row."""
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
    leaves: Leaves,
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
    leaves: Leaves,
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
    leaves: Leaves,
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
