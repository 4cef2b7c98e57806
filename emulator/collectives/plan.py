"""From a Schedule to the additions that its results need, arranged in rows for vectorised
execution.

Only distinct results are kept: a ring over n ranks adds the payload n - 1 times in total, not once
on every rank.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from emulator.collectives.schedule import IntArray, Schedule
from emulator.collectives.symbolic import EMPTY, Expressions, trace


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Run:
    """`levels` successive rows of additions of one kind: register out <- left + right, [levels,
    width] each.

    An operand array holds leaf numbers (rank * slots + slot) where `*_leaf`, register numbers
    otherwise. `in_place`: right and out are all registers 0, 1, 2, ... in order, in every level.
    """

    left: IntArray
    right: IntArray
    out: IntArray
    left_leaf: bool
    right_leaf: bool
    in_place: bool


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The runs, how many registers they use, and where each result is (leaf number, or -1 -
    register).

    `start`: leaves that the registers hold at first, if every register begins as a sum of two
    leaves; then the first level adds in place like those after it, and one loop does them all.
    """

    runs: tuple[Run, ...]
    registers: int
    start: IntArray | None
    results: IntArray


@functools.lru_cache(maxsize=256)
def plan(schedule: Schedule) -> Plan:
    """The plan of an all_reduce (results: one per slot) or reduce_scatter (one per piece of a
    block).

    Raises:
        ValueError: the ranks of an all_reduce end with different expressions, so no single value
        describes them.
        NotImplementedError: another operation.
    """
    if schedule.op not in ("all_reduce", "reduce_scatter"):
        raise NotImplementedError(
            f"plan is for all_reduce and reduce_scatter; plan_state has a {schedule.op}"
        )
    expressions = trace(schedule)
    return _plan(expressions, _results(schedule, expressions))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """The additions of each result by themselves, for a stack: 2 i puts contribution i on it, 2 i +
    1 adds contribution i to what is on top, -1 adds what is on top to what is below.

    `ends`: of each result's tokens. `depth`: how much is on the stack at most.
    """

    tokens: IntArray
    ends: IntArray
    depth: int


@functools.lru_cache(maxsize=256)
def orders(schedule: Schedule, cuts: int) -> Orders | None:
    """The orders of the additions of an all_reduce or reduce_scatter whose contributions' rows are
    cut into so many leaves; contributions are numbered by rows.

    None if a result is no sum, or of leaves that are not all the piece of a row that it is itself,
    or if results share so many additions that by themselves they would be twice as many.
    """
    expressions = trace(schedule)
    results, leaves = _results(schedule, expressions), expressions.leaves
    left, right = _operands(expressions)
    swap = (left < leaves) & (right >= leaves)
    left, right = np.where(swap, right, left), np.where(swap, left, right)
    alone = right < leaves  # a contribution that is added needs no place of its own
    length = np.ones(expressions.count, np.int64)
    depth, piece = length.copy(), np.arange(expressions.count) % cuts
    for batch in expressions.batches:
        made = np.arange(batch.first, batch.first + len(batch.left))
        a, b, one = left[made], right[made], alone[made]
        length[made] = length[a] + np.where(one, 1, length[b] + 1)
        depth[made] = np.maximum(depth[a], np.where(one, 1, depth[b] + 1))
        piece[made] = np.where(piece[a] == piece[b], piece[a], -1)
    needed = len(_needed(expressions, results))
    total = int(length[results].sum())
    fits = np.array_equal(piece[results], np.arange(len(results)) % cuts)
    if not fits or (results < leaves).any() or total > 2 * (needed + len(results)):
        return None
    tokens, ends = np.empty(total, np.int32), np.cumsum(length[results])
    nodes, first = results, ends - length[results]
    while len(nodes):
        is_leaf = nodes < leaves
        tokens[first[is_leaf]] = 2 * (nodes[is_leaf] // cuts)
        nodes, first = nodes[~is_leaf], first[~is_leaf]
        a, b, one = left[nodes], right[nodes], alone[nodes]
        last = first + length[nodes] - 1
        tokens[last] = np.where(one, 2 * (b // cuts) + 1, -1)
        nodes = np.concatenate([a, b[~one]])
        first = np.concatenate([first, (first + length[a])[~one]])
    return Orders(tokens, ends.astype(np.int32), int(depth[results].max()))


@functools.lru_cache(maxsize=256)
def plan_state(schedule: Schedule) -> tuple[Plan | None, IntArray]:
    """The plan of every distinct sum that is anywhere at the end (None if nothing is added), and
    where each slot [ranks, slots] takes its value: a leaf number, or the leaves' count + the sum's.

    A slot that never held anything keeps what is there.
    """
    expressions = trace(schedule)
    final, leaves = expressions.final, expressions.leaves
    own = np.arange(leaves).reshape(final.shape)
    sums = np.unique(final[final >= leaves])
    source = np.where(final >= leaves, leaves + np.searchsorted(sums, final), final)
    source = np.where(final == EMPTY, own, source)
    return (_plan(expressions, sums) if len(sums) else None), source


def _plan(expressions: Expressions, results: IntArray) -> Plan:
    """The additions that `results` (expression numbers) need, in rows."""
    left, right = _operands(expressions)
    leaves = expressions.leaves
    needed = _needed(expressions, results)
    level = _levels(expressions, needed)
    uses = np.bincount(left[needed], minlength=expressions.count)
    uses += np.bincount(right[needed], minlength=expressions.count)
    np.add.at(uses, results, 2)  # a result keeps its register

    register = np.full(expressions.count, -1)
    registers = 0
    rows: list[tuple[IntArray, IntArray, IntArray, bool, bool]] = []
    for depth in range(1, int(level.max(initial=0)) + 1):
        for nodes in _alike(np.flatnonzero(level == depth), left, right, leaves):
            registers = _assign(nodes, left, right, uses, register, registers)
            nodes = nodes[np.argsort(register[nodes])]
            a, b = left[nodes], right[nodes]
            if a[0] >= leaves > b[0]:  # addition commutes; leaves on the left make more rows alike
                a, b = b, a
            a_leaf, b_leaf = bool(a[0] < leaves), bool(b[0] < leaves)
            rows.append(
                (
                    a if a_leaf else register[a],
                    b if b_leaf else register[b],
                    register[nodes],
                    a_leaf,
                    b_leaf,
                )
            )
    places = np.where(results < leaves, results, -1 - register[results])
    start = None
    if rows and rows[0][3] and rows[0][4] and np.array_equal(rows[0][2], np.arange(registers)):
        start = rows[0][1]
        rows[0] = (rows[0][0], rows[0][2], rows[0][2], True, False)
    return Plan(tuple(_runs(rows, registers)), registers, start, places)


def _results(schedule: Schedule, expressions: Expressions) -> IntArray:
    final = expressions.final
    if schedule.op == "reduce_scatter":
        block = np.arange(schedule.ranks * schedule.cuts)
        results = final[block // schedule.cuts, block]
    else:
        results = final[0]
        differs = np.argwhere(final != results)
        if len(differs):
            rank, slot = differs[0]
            raise ValueError(
                f"all_reduce by {schedule.algorithm!r} leaves rank {rank} with another order of "
                "additions in chunk "
                f"{slot} than rank 0; the ranks would end with different bits, which is not "
                "modelled"
            )
    if (results == EMPTY).any():
        raise ValueError(f"{schedule.op} by {schedule.algorithm!r} leaves a result empty")
    return results


def _operands(expressions: Expressions) -> tuple[IntArray, IntArray]:
    """Left and right operand of every expression number; leaves have themselves."""
    left = np.arange(expressions.count)
    right = left.copy()
    for batch in expressions.batches:
        made = slice(batch.first, batch.first + len(batch.left))
        left[made], right[made] = batch.left, batch.right
    return left, right


def _needed(expressions: Expressions, results: IntArray) -> IntArray:
    """The additions that the results depend on, ascending."""
    marked = np.zeros(expressions.count, dtype=bool)
    marked[results] = True
    for batch in reversed(expressions.batches):
        here = marked[batch.first : batch.first + len(batch.left)]
        marked[batch.left[here]] = True
        marked[batch.right[here]] = True
    marked[: expressions.leaves] = False
    return np.flatnonzero(marked)


def _levels(expressions: Expressions, needed: IntArray) -> IntArray:
    """The longest chain of additions below each needed expression; 0 for leaves and what is not
    needed.
    """
    level = np.zeros(expressions.count, dtype=np.int32)
    keep = np.zeros(expressions.count, dtype=bool)
    keep[needed] = True
    for batch in expressions.batches:
        here = np.flatnonzero(keep[batch.first : batch.first + len(batch.left)])
        level[batch.first + here] = 1 + np.maximum(
            level[batch.left[here]], level[batch.right[here]]
        )
    return level


def _alike(nodes: IntArray, left: IntArray, right: IntArray, leaves: int) -> list[IntArray]:
    """The additions of one level split by whether each operand is a leaf."""
    kind = 2 * (left[nodes] < leaves) + (right[nodes] < leaves)
    return [nodes[kind == k] for k in range(4) if (kind == k).any()]


def _assign(
    nodes: IntArray,
    left: IntArray,
    right: IntArray,
    uses: IntArray,
    register: IntArray,
    registers: int,
) -> int:
    """Gives each addition a register: that of an operand which nothing else needs, or a new one."""
    for operand in (right[nodes], left[nodes]):
        free = (register[nodes] < 0) & (register[operand] >= 0) & (uses[operand] == 1)
        register[nodes[free]] = register[operand[free]]
    new = nodes[register[nodes] < 0]
    register[new] = registers + np.arange(len(new))
    return registers + len(new)


def _runs(rows: list[tuple[IntArray, IntArray, IntArray, bool, bool]], registers: int) -> list[Run]:
    """Joins successive rows of the same width and kind."""
    everything = np.arange(registers)
    runs: list[Run] = []
    key: tuple[object, ...] | None = None
    group: list[tuple[IntArray, IntArray, IntArray, bool, bool]] = []

    def close() -> None:
        if group:
            a, b, out = (np.stack([row[i] for row in group]) for i in range(3))
            runs.append(Run(a, b, out, group[0][3], group[0][4], bool(key and key[-1])))

    for row in rows:
        a, b, out, a_leaf, b_leaf = row
        in_place = not b_leaf and np.array_equal(out, everything) and np.array_equal(b, everything)
        if (row_key := (len(a), a_leaf, b_leaf, in_place)) != key:
            close()
            key, group = row_key, []
        group.append(row)
    close()
    return runs
