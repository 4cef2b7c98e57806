"""Collectives: correctness is executed, on symbols and on data; the bits are those of the plain
loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emulator.collectives import (
    ALGORITHMS,
    OPS,
    Group,
    Round,
    Schedule,
    build,
    check,
    execute,
    group_of,
    hierarchical,
    make_round,
    ragged_all_to_all,
)
from emulator.collectives.flat import LEVELS
from emulator.collectives.plan import orders
from emulator.collectives.symbolic import EMPTY, initial_slots
from emulator.machines import cloudmatrix384

BF16 = np.dtype(ml_dtypes.bfloat16)
ROOTED = ("broadcast", "reduce", "scatter", "gather")
CASES = [(op, name) for op in OPS for name in ALGORITHMS[op]]
EXECUTED = [*ALGORITHMS["reduce_scatter"], "double_ring/nhr"]

groups = st.lists(st.integers(0, 4), min_size=1, max_size=17).map(lambda nodes: Group(tuple(nodes)))


def nodes_of(n: int, per_node: int) -> Group:
    return Group(tuple(r // per_node for r in range(n)))


def words(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{8 * dtype.itemsize}")


def same_bits(a: object, b: object) -> bool:
    """Equal bit patterns, any NaN equal to any NaN."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "iub":
        return bool((a == b).all())
    with np.errstate(invalid="ignore"):  # signalling NaNs
        nan = np.isnan(a) & np.isnan(b)
    return bool((nan | (a.view(words(a.dtype)) == b.view(words(b.dtype)))).all())


def floats(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, kind: str
) -> np.ndarray:
    """Ordinary values, any bit patterns (NaN, Inf), or subnormals and their neighbours."""
    if kind == "ordinary":
        values = rng.standard_normal(shape) * rng.choice([1.0, 0.0, 1e-3, 100.0], shape)
        return values.astype(dtype)
    size = 8 * dtype.itemsize
    bits = rng.integers(0, 2**size, shape, dtype=np.uint64)
    if kind == "tiny":
        kept = {"bfloat16": 0x83FF, "float16": 0x8FFF, "float32": 0x83FFFFFF}[dtype.name]
        bits &= np.uint64(kept)
    return bits.astype(words(dtype)).view(dtype)


def positive_zeros(x: np.ndarray) -> np.ndarray:
    bits = x.view(words(x.dtype))
    return np.where((bits << 1) == 0, np.zeros_like(bits), bits).view(x.dtype)


def ring_loop(x: np.ndarray, add: Callable = np.add) -> np.ndarray:
    """The definition of ring all_reduce in plain NumPy: x [n, count] -> [count]."""
    n, count = x.shape
    size = -(-count // n)
    y = np.empty(count, x.dtype)
    for c in range(n):
        part = slice(c * size, (c + 1) * size)
        total = x[c, part]
        for k in range(1, n):
            with np.errstate(all="ignore"):
                total = add(total, x[(c + k) % n, part])
        y[part] = total
    return y


# --- correctness on symbols ---------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), CASES)
@given(group=groups, data=st.data())
@settings(max_examples=15)
def test_schedules_deliver_everything_once(
    op: str, name: str, group: Group, data: st.DataObject
) -> None:
    root = data.draw(st.integers(0, group.n - 1)) if op in ROOTED else 0
    pairs: tuple[tuple[int, int], ...] = ()
    if op == "permute":
        targets = data.draw(st.permutations(range(group.n)))
        keep = data.draw(st.lists(st.booleans(), min_size=group.n, max_size=group.n))
        pairs = tuple((s, d) for s, d in enumerate(targets) if keep[s])
    check(build(op, name, group, root=root, pairs=pairs))


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("inner", LEVELS)
@pytest.mark.parametrize("outer", LEVELS)
@given(group=groups)
@settings(max_examples=2)
def test_any_two_levels_compose(op: str, inner: str, outer: str, group: Group) -> None:
    check(build(op, f"{inner}/{outer}", group))


@pytest.mark.parametrize("n", [47, 48, 97])
@pytest.mark.parametrize(("op", "name"), [c for c in CASES if c[0] not in (*ROOTED, "permute")])
def test_schedules_at_size(op: str, name: str, n: int) -> None:
    check(build(op, name, nodes_of(n, 8)))


@pytest.mark.parametrize("n", [384, 768])
def test_ring_at_pod_size(n: int) -> None:
    schedule = build("all_reduce", "ring", nodes_of(n, 8))
    assert schedule.num_steps == 2 * (n - 1)
    assert (
        sum(part.src.nbytes for part in schedule.rounds) < 10_000
    )  # repeated steps are not stored
    check(schedule)


def steps(op: str, name: str, group: Group) -> int:
    return build(op, name, group).num_steps


@pytest.mark.parametrize("n", [8, 24])
def test_step_counts(n: int) -> None:
    """The published counts."""
    group, nodes, log = nodes_of(n, 8), n // 8, math.ceil(math.log2(n))
    for op, twice in (("all_gather", 1), ("all_reduce", 2)):
        assert steps(op, "ring", group) == twice * (n - 1)
        assert steps(op, "double_ring", group) == twice * (n - 1)
        assert steps(op, "pairwise", group) == twice * (n - 1)
        assert steps(op, "full_mesh", group) == twice
        assert steps(op, "nhr", group) == steps(op, "nb", group) == twice * log
        assert steps(op, "hierarchical", group) == twice * (1 + nodes - 1)
        assert steps(op, "pipeline", group) == twice * nodes
        assert steps(op, "full_mesh/nhr", group) == twice * (1 + math.ceil(math.log2(nodes)))
    fold = 0 if n == 8 else 2  # to a power of two and back
    assert steps("all_reduce", "rhd", group) == 2 * math.floor(math.log2(n)) + fold
    assert steps("all_reduce", "star", group) == 2
    assert steps("reduce_scatter", "ring", group) == n  # n - 1 additions' hops and the delivery
    assert steps("reduce_scatter", "nhr", group) == log
    assert steps("all_to_all", "full_mesh", group) == 1
    assert steps("all_to_all", "hierarchical", group) == (1 if nodes == 1 else 2)
    assert steps("all_to_all", "pairwise", group) == n  # one of them local
    assert steps("all_to_all", "bruck", group) == log + 2  # two of them local
    assert steps("broadcast", "ring", group) == n - 1
    assert steps("broadcast", "pipeline", group) == 2 * (n - 1)
    assert steps("scatter", "binary_tree", group) == steps("gather", "binary_tree", group) == log


def sent(op: str, name: str, group: Group) -> float:
    """Payloads that the busiest rank sends in all."""
    schedule = build(op, name, group)
    total = np.zeros(group.n)
    for step in schedule.steps():
        away = step.src != step.dst
        np.add.at(total, step.src[away], step.width[away])
    return total.max() / schedule.pieces


@pytest.mark.parametrize("n", [8, 24])
def test_bytes_sent(n: int) -> None:
    """The published multiples of the payload."""
    group = nodes_of(n, 8)
    for name in ("ring", "double_ring", "full_mesh", "nhr", "nb", "pairwise"):
        assert sent("all_reduce", name, group) == pytest.approx(2 * (n - 1) / n), name
        assert sent("all_gather", name, group) == pytest.approx((n - 1) / n), name
    if n == 8:
        assert sent("all_reduce", "rhd", group) == pytest.approx(2 * 7 / 8)
    # Inside a tree a rank sends each piece up once and down twice; in two trees it is a leaf once.
    assert sent("all_reduce", "binary_tree", group) == 3
    assert sent("all_reduce", "double_binary_tree", group) <= 2.5
    assert sent("all_to_all", "pairwise", group) == pytest.approx((n - 1) / n)


def test_double_binary_trees_share_the_work() -> None:
    """Each rank has children in at most one of the two trees, but for at most one rank."""
    for n in range(2, 70):
        inside = []
        for tree_number in (0, 1):
            moves = [r for r in build("all_reduce", "double_binary_tree", nodes_of(n, n)).rounds]
            down = [
                src
                for part in moves
                for src, slot, add in zip(part.src, part.src_slot, part.reduce, strict=True)
                if not add and slot % 2 == tree_number
            ]
            inside.append(set(down))
        assert len(inside[0] & inside[1]) <= 1, n


# --- wrong schedules are caught -----------------------------------------------------------------


def changed(schedule: Schedule, step: int, change: Callable[[Round], Round]) -> Schedule:
    """The schedule with one of its (unrolled) steps changed."""
    steps = list(schedule.steps())
    steps[step] = change(steps[step])
    return dataclasses.replace(schedule, rounds=tuple(steps))


def without(step: Round, at: int) -> Round:
    kept = np.arange(len(step.src)) != at
    return Round(
        *(getattr(step, f)[kept] for f in ("src", "dst", "src_slot", "dst_slot", "width", "reduce"))
    )


@pytest.mark.parametrize(("op", "name"), [c for c in CASES if c[0] != "permute"])
def test_a_dropped_transfer_is_caught(op: str, name: str) -> None:
    schedule = build(op, name, nodes_of(5, 3))
    for number, step in enumerate(schedule.steps()):
        for at in range(len(step.src)):
            with pytest.raises(ValueError, match=f"{op} by '{name}'"):
                check(changed(schedule, number, lambda s, at=at: without(s, at)))


@pytest.mark.parametrize("name", ["ring", "full_mesh", "hierarchical"])
def test_a_wrong_slot_reduction_or_order_is_caught(name: str) -> None:
    schedule = build("all_reduce", name, nodes_of(6, 3))
    slots = schedule.slots

    def wrong_slot(step: Round) -> Round:
        return dataclasses.replace(step, src_slot=(step.src_slot + 1) % slots)

    def flipped(step: Round) -> Round:
        return dataclasses.replace(step, reduce=~step.reduce)

    for change in (wrong_slot, flipped):
        with pytest.raises(ValueError):
            check(changed(schedule, 0, change))
    steps = list(schedule.steps())
    steps[0], steps[-1] = steps[-1], steps[0]
    with pytest.raises(ValueError):
        check(dataclasses.replace(schedule, rounds=tuple(steps)))


def test_errors_name_rank_and_step() -> None:
    gather = build("all_gather", "ring", nodes_of(4, 4))
    with pytest.raises(ValueError, match=r"step 1: rank \d sends from a slot that holds nothing"):
        check(changed(gather, 0, lambda s: without(s, 2)))
    reduce = build("all_reduce", "full_mesh", nodes_of(4, 4))
    with pytest.raises(ValueError, match=r"rank 0 should end with the sum of chunk 0, but .*\[1\]"):
        check(changed(reduce, 0, lambda s: without(s, int(np.argmax((s.src == 1) & (s.dst == 0))))))
    twice = dataclasses.replace(reduce, rounds=(reduce.rounds[0], *reduce.rounds))
    with pytest.raises(
        ValueError, match="step 1: rank 0 adds a contribution to chunk 0 a second time"
    ):
        check(twice)
    clash = make_round([1, 2], [0, 0], 0, 0, reduce=False)
    with pytest.raises(ValueError, match="step 0: a slot of rank 0 is written twice"):
        check(dataclasses.replace(reduce, rounds=(clash,)))
    with pytest.raises(ValueError, match="dst must be a rank 0..3; got 4..4"):
        dataclasses.replace(reduce, rounds=(make_round([1], [4], 0, 0, reduce=False),))
    with pytest.raises(ValueError, match=r"src_slot must stay within 0..3; got 4..4"):
        dataclasses.replace(reduce, rounds=(make_round([1], [0], 4, 0, reduce=False),))


def test_what_is_no_schedule_is_named() -> None:
    good = build("all_reduce", "full_mesh", nodes_of(4, 4))
    move = good.rounds[0]
    for changes, error, message in (
        ({"rounds": (None,)}, TypeError, "rounds must be a sequence of Rounds"),
        ({"rounds": 5}, TypeError, "rounds must be a sequence of Rounds; got 5"),
        ({"ranks": "4"}, TypeError, "ranks must be a whole number; got '4'"),
        ({"slots": 1.5}, TypeError, "slots must be a whole number; got 1.5"),
        ({"root": True}, TypeError, "root must be a whole number; got True"),
        (
            {"rounds": (dataclasses.replace(move, repeat=1.0),)},
            ValueError,
            "repeat must be a whole",
        ),
        ({"rounds": (dataclasses.replace(move, stride=0),)}, ValueError, "stride must be at least"),
        ({"slots": 2**40}, ValueError, "too many to check"),
    ):
        with pytest.raises(error, match=message):
            check(dataclasses.replace(good, **changes))
    for arrays, error, message in (
        (([0.5], [1], 0, 0), TypeError, r"src must be whole numbers; got \[0.5\]"),
        (([0], [float("nan")], 0, 0), TypeError, "dst must be whole numbers"),
        (([2**40], [1], 0, 0), ValueError, "src must be below 2"),
        (([0, 1], [1, 0], [0, 0, 0], 0), ValueError, "src_slot must be one number or as many"),
    ):
        with pytest.raises(error, match=message):
            make_round(*arrays, reduce=True)
    with pytest.raises(TypeError, match="Round.src must be a NumPy array"):
        dataclasses.replace(move, src=[0])


def test_strides_reach_as_far_as_they_should() -> None:
    """Three slots, two apart, end at slot 4 of 0..4; one more does not fit."""
    step = make_round([0], [1], 0, 0, width=3, stride=2, reduce=False)
    even = Schedule(op="broadcast", algorithm="even", ranks=2, slots=5, rounds=(step,))
    state = execute.run(even, np.arange(10).reshape(2, 5))
    assert state[1].tolist() == [0, 6, 2, 8, 4]
    with pytest.raises(ValueError, match="slot 0 of rank 0 in its slot 1|holds nothing"):
        check(even)
    with pytest.raises(ValueError, match=r"src_slot must stay within 0..4; got 0..6"):
        dataclasses.replace(even, rounds=(dataclasses.replace(step, width=step.width + 1),))


@pytest.mark.parametrize("n", [7, 31, 48, 97, 211])
def test_a_grid_sends_few_messages(n: int) -> None:
    schedule = build("all_to_all", "grid", Group((0,) * n))
    check(schedule)
    for part in schedule.rounds:
        messages = np.unique(np.stack([part.src, part.dst])[:, part.src != part.dst], axis=1)
        assert np.bincount(messages[0]).max() <= 2.5 * n**0.5
    sent = sum(int(part.width.sum()) for part in schedule.rounds)
    assert sent == 2 * n * n


# --- names, groups, users' algorithms -----------------------------------------------------------


def test_groups_are_numbered_by_first_appearance() -> None:
    machine = cloudmatrix384()
    assert group_of([80, 81, 3], machine) == group_of([0, 7, 9], machine) == Group((0, 0, 1))
    assert group_of([0], machine).n == 1
    a = build("all_reduce", "ring", group_of(range(8), machine))
    assert a is build("all_reduce", "ring", group_of(range(16, 24), machine))


def binary_tree(group: Group) -> Schedule:
    """A user's all_reduce: pairs, pairs of pairs, ... and back."""
    up, distance = [], 1
    while distance < group.n:
        low = np.arange(0, group.n - distance, 2 * distance)
        up.append(make_round(low + distance, low, 0, 0, reduce=True))
        distance *= 2
    down = [make_round(r.dst, r.src, 0, 0, reduce=False) for r in reversed(up)]
    return Schedule(
        op="all_reduce", algorithm="tree", ranks=group.n, slots=1, rounds=tuple(up + down)
    )


def lossy_tree(group: Group) -> Schedule:
    tree = binary_tree(group)
    return dataclasses.replace(tree, rounds=tree.rounds[1:])


def test_users_algorithms_are_checked_and_executed() -> None:
    group = nodes_of(11, 4)
    schedule = build("all_reduce", binary_tree, group)
    x = floats(np.random.default_rng(0), (11, 2, 7), BF16, "ordinary")
    expected = execute.run(schedule, x[:, None])[:, 0]
    assert all(same_bits(expected[0], row) for row in expected)
    assert same_bits(execute.all_reduce(jnp.asarray(x), schedule), expected[0])
    with pytest.raises(ValueError, match="all_reduce by 'tree'"):
        build("all_reduce", lossy_tree, group)
    with pytest.raises(ValueError, match="algorithm binary_tree returned"):
        build("reduce_scatter", binary_tree, group)
    with pytest.raises(TypeError, match="must return a Schedule; got int"):
        build("all_reduce", lambda g: 3, group)


def test_unknown_names_are_listed() -> None:
    group = nodes_of(4, 4)
    with pytest.raises(
        ValueError, match="unknown collective operation 'allreduce'; known: all_reduce"
    ):
        build("allreduce", "ring", group)
    with pytest.raises(ValueError, match="unknown algorithm 'tree' for all_reduce; known: ring"):
        build("all_reduce", "tree", group)
    with pytest.raises(ValueError, match="root 4 is outside the group's ranks 0..3"):
        build("broadcast", "direct", group, root=4)
    with pytest.raises(ValueError, match="a destination occurs more than once"):
        build("permute", "direct", group, pairs=((0, 1), (2, 1)))
    with pytest.raises(ValueError, match="source 7 is outside"):
        build("permute", "direct", group, pairs=((7, 1),))
    with pytest.raises(ValueError, match="inner must be one of ring, .*; got 'bruck'"):
        hierarchical.all_reduce(group, inner="bruck")
    with pytest.raises(ValueError, match="unknown algorithm 'ring/bruck' for all_reduce; known"):
        build("all_reduce", "ring/bruck", group)


@pytest.mark.parametrize("n", [2, 3, 8, 13])
def test_rings_in_both_directions_are_one_repeated_step(n: int) -> None:
    """However many ranks: a step for each hop would take minutes among thousands."""
    for op, phases in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)):
        schedule = build(op, "double_ring", nodes_of(n, n))
        check(schedule)
        assert [part.repeat for part in schedule.rounds] == [n - 1] * phases


@pytest.mark.parametrize("name", ["rhd", "nhr", "nb", "star"])
def test_what_goes_together_is_stored_as_runs(name: str) -> None:
    """A few runs for each rank and step, not a transfer for each slot."""
    n = 300
    for op in ("all_reduce", "reduce_scatter", "all_gather"):
        schedule = build(op, name, nodes_of(n, n))
        assert all(len(part.src) <= 3 * n for part in schedule.rounds)
    if name != "star":
        whole = build("broadcast", name, nodes_of(n, n), root=7)
        assert sum(len(part.src) for part in whole.rounds) < n * n / 4


def test_two_levels_are_stored_as_runs() -> None:
    for name in ("double_ring/nhr", "ring/ring", "hierarchical", "pipeline"):
        schedule = build("all_reduce", name, nodes_of(384, 8))
        assert sum(len(part.src) for part in schedule.rounds) < 384 * 60, name


def test_a_turn_moves_runs_as_wholes() -> None:
    """Two ranks add runs of two slots to and fro; a turn that tears a run apart is refused."""
    turn = np.array([2, 3, 0, 1])
    step = make_round([0, 1], [1, 0], [0, 2], [0, 2], width=2, reduce=True, repeat=2, turn=turn)
    passed = Schedule(op="all_reduce", algorithm="turns", ranks=2, slots=4, rounds=(step,))
    state = execute.run(passed, np.arange(8).reshape(2, 4))
    assert state.tolist() == [[4, 7, 8, 10], [4, 6, 14, 17]]
    for torn in ([2, 1, 0, 3], [1, 0, 3, 2], [1, 2, 3, 0]):
        with pytest.raises(ValueError, match="step 0 of 'turns': a turn must move each run"):
            wrong = dataclasses.replace(step, turn=np.array(torn))
            dataclasses.replace(passed, rounds=(wrong,))


# --- bits ---------------------------------------------------------------------------------------


def by_xla(reduction: Callable, *args: object, **how: object) -> jax.Array:
    """A reduction by what serves where sums are not compiled for the processor."""
    with mock.patch.object(execute, "_has_orders", lambda *_: False):
        return reduction.__wrapped__(*args, **how)


@pytest.mark.parametrize("kind", ["ordinary", "bits", "tiny"])
@pytest.mark.parametrize("dtype", [BF16, np.dtype("float32"), np.dtype("float16")], ids=str)
@pytest.mark.parametrize(("n", "count"), [(2, 1), (7, 61), (48, 100)])
def test_ring_equals_the_plain_loop(dtype: np.dtype, kind: str, n: int, count: int) -> None:
    x = floats(np.random.default_rng(n), (n, count), dtype, kind)
    schedule = build("all_reduce", "ring", nodes_of(n, 8))
    y = execute.all_reduce(jnp.asarray(x)[:, None], schedule)
    assert same_bits(np.asarray(y)[0], ring_loop(x))


def test_the_bit_tests_can_tell_orders_apart() -> None:
    """Ring, full mesh and the reversed ring differ on ordinary data, so equality above means
    something.
    """
    x = floats(np.random.default_rng(3), (7, 210), BF16, "ordinary")
    ring = ring_loop(x)
    assert not same_bits(ring, ring_loop(x[::-1]))
    mesh = execute.all_reduce(
        jnp.asarray(x)[:, None], build("all_reduce", "full_mesh", nodes_of(7, 8))
    )
    assert not same_bits(ring, np.asarray(mesh)[0])
    once = x.astype(np.float32).sum(0).astype(BF16)
    assert not same_bits(ring, once)


def test_full_mesh_adds_in_rank_order_from_the_owner() -> None:
    n, x = 5, floats(np.random.default_rng(4), (5, 1, 5), BF16, "ordinary")
    y = execute.all_reduce(jnp.asarray(x), build("all_reduce", "full_mesh", nodes_of(n, n)))
    for c in range(n):
        total = x[c, 0, c]
        for r in range(n):
            total = total if r == c else total + x[r, 0, c]
        assert same_bits(np.asarray(y)[0, c], total)


def test_replicated_values_are_added_not_multiplied() -> None:
    x = jnp.full((48, 1, 48), 1.0078125, jnp.bfloat16)
    y = execute.all_reduce(x, build("all_reduce", "ring", nodes_of(48, 8)))
    assert float(y[0, 0]) == 48.25  # 48 x would be 48.375, which rounds to 48.5


@pytest.mark.parametrize(
    ("op", "name"),
    [("sum", name) for name in EXECUTED] + [("max", "ring"), ("min", "full_mesh")],
)
@given(
    n=st.integers(1, 13),
    per_node=st.integers(1, 5),
    batch=st.integers(1, 3),
    count=st.integers(1, 30),
    parts=st.integers(1, 3),
    dtype=st.sampled_from([BF16, np.dtype("float32"), np.dtype("float16"), np.dtype("int32")]),
    kind=st.sampled_from(["ordinary", "bits", "tiny"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(n=12, per_node=4, batch=2, count=25, parts=2, dtype=BF16, kind="tiny", seed=0)
@example(n=7, per_node=7, batch=1, count=3, parts=2, dtype=np.dtype("float32"), kind="bits", seed=1)
@settings(max_examples=3)
def test_plan_equals_the_step_by_step_run(
    op: str,
    name: str,
    n: int,
    per_node: int,
    batch: int,
    count: int,
    parts: int,
    dtype: np.dtype,
    kind: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    group = nodes_of(n, per_node)
    if dtype.kind == "i":
        x, blocks = (
            rng.integers(-(2**31), 2**31, s).astype(dtype)
            for s in ((n, batch, count), (n, n, batch, count))
        )
    else:
        x, blocks = (floats(rng, s, dtype, kind) for s in ((n, batch, count), (n, n, batch, count)))
    if op != "sum" and dtype.kind != "i":  # np.maximum leaves the sign of a zero open
        x, blocks = (positive_zeros(v) for v in (x, blocks))

    schedule = build("all_reduce", name, group)
    y = execute.all_reduce(jnp.asarray(x), schedule, op=op, parts=parts)
    is_compiled = op == "sum" and dtype in (BF16, np.dtype("float32"))
    if is_compiled:
        assert same_bits(y, by_xla(execute.all_reduce, jnp.asarray(x), schedule, parts=parts))
    size = -(-count // parts)
    for at in range(0, count, size):
        piece = x[..., at : at + size]
        width = -(-piece.shape[-1] // schedule.slots)
        padded = np.zeros((n, batch, schedule.slots * width), dtype)
        padded[..., : piece.shape[-1]] = piece
        state = execute.run(
            schedule, np.moveaxis(padded.reshape(n, batch, schedule.slots, width), 2, 1), op
        )
        assert all(same_bits(state[0], state[r]) for r in range(n))
        expected = np.moveaxis(state[0], 0, 1).reshape(batch, -1)[:, : piece.shape[-1]]
        assert same_bits(np.asarray(y)[:, at : at + size], expected)

    schedule = build("reduce_scatter", name, group)
    y = execute.reduce_scatter(jnp.asarray(blocks), schedule, op=op, parts=parts)
    if is_compiled:
        other = by_xla(execute.reduce_scatter, jnp.asarray(blocks), schedule, parts=parts)
        assert same_bits(y, other)
    y, cuts = np.asarray(y), schedule.cuts
    for at in range(0, count, size):
        piece = blocks[..., at : at + size]
        width = -(-piece.shape[-1] // cuts)
        padded = np.zeros((n, n, batch, cuts * width), dtype)
        padded[..., : piece.shape[-1]] = piece
        cut = np.moveaxis(padded.reshape(n, n, batch, cuts, width), 3, 2)
        state = execute.run(schedule, cut.reshape(n, n * cuts, batch, width), op)
        state = state.reshape(n, n, cuts, batch, width)[np.arange(n), np.arange(n)]
        expected = np.moveaxis(state, 1, 2).reshape(n, batch, -1)[..., : piece.shape[-1]]
        assert same_bits(y[..., at : at + size], expected)


@pytest.mark.parametrize("dtype", [BF16, np.dtype("float32")], ids=str)
@pytest.mark.parametrize("name", ["ring", "full_mesh", "rhd", "hierarchical", "nhr"])
@pytest.mark.parametrize(("n", "count"), [(16, 70_001), (3, 3_100), (12, 8)])
def test_long_rows_on_several_threads(name: str, dtype: np.dtype, n: int, count: int) -> None:
    """Pieces that are computed in parts, and last ones that are short or empty."""
    x = jnp.asarray(floats(np.random.default_rng(5), (n, 3, count), dtype, "bits"))
    schedule = build("all_reduce", name, nodes_of(n, 4))
    assert orders(schedule, schedule.slots) is not None
    y = execute.all_reduce(x, schedule)
    assert same_bits(y, by_xla(execute.all_reduce, x, schedule))


def test_orders_say_what_the_plan_does() -> None:
    """On a stack, with the additions as text."""
    for name in EXECUTED:
        schedule = build("all_reduce", name, nodes_of(12, 4))
        todo = orders(schedule, schedule.slots)
        x = np.array([[f"{r}" for _ in range(schedule.slots)] for r in range(12)], object)
        state = symbolic_run(schedule, x)
        for slot, (first, last) in enumerate(itertools.pairwise([0, *todo.ends])):
            stack: list[str] = []
            for token in todo.tokens[first:last]:
                if token < 0:
                    stack[-2:] = [both(stack[-2], stack[-1])]
                elif token % 2:
                    stack[-1] = both(stack[-1], f"{token // 2}")
                else:
                    stack.append(f"{token // 2}")
                assert len(stack) <= todo.depth
            assert stack == [state[0][slot]], name


def both(a: str, b: str) -> str:
    """An addition, whichever operand comes first."""
    return f"({'+'.join(sorted((a, b)))})"


def symbolic_run(schedule: Schedule, x: np.ndarray) -> np.ndarray:
    with mock.patch.dict(execute.DEFINITION, {"sum": np.frompyfunc(both, 2, 1)}):
        return execute.run(schedule, x)


def test_shared_sums_are_formed_once() -> None:
    """Two ranks that add each other's sums, again and again: by itself the last has hundreds."""
    there, back = (make_round([r], [1 - r], 0, 0, reduce=True) for r in (0, 1))
    last = make_round([0], [1], 0, 0, reduce=False)
    rounds = (*[there, back] * 6, last)
    schedule = Schedule(op="all_reduce", algorithm="again", ranks=2, slots=1, rounds=rounds)
    assert orders(schedule, 1) is None
    x = floats(np.random.default_rng(7), (2, 1, 5), BF16, "ordinary")
    y = execute.all_reduce(jnp.asarray(x), schedule)
    assert same_bits(y, execute.run(schedule, x)[0])


@pytest.mark.parametrize("dtype", [BF16, np.dtype("float16"), np.dtype("float32")])
@pytest.mark.parametrize("kind", ["ordinary", "bits", "tiny"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_ranks_may_lie_along_any_axis(dtype: np.dtype, kind: str, parts: int) -> None:
    schedule = build("all_reduce", "hierarchical", nodes_of(6, 3))
    x = floats(np.random.default_rng(2), (6, 2, 3, 4, 10), dtype, kind)
    front = execute.all_reduce(jnp.asarray(x), schedule, parts=parts)
    assert front.shape == (2, 3, 4, 10)
    plain = execute.all_reduce(jnp.asarray(x.reshape(6, 24, 10)), schedule, parts=parts)
    assert same_bits(np.asarray(front).reshape(24, 10), np.asarray(plain))
    for axis in (1, 2, 3):
        moved = jnp.asarray(np.moveaxis(x, 0, axis))
        y = execute.all_reduce(moved, schedule, parts=parts, axis=axis)
        assert same_bits(np.asarray(y), np.asarray(front)), axis


@pytest.mark.parametrize("name", EXECUTED)
def test_all_reduce_is_reduce_scatter_then_all_gather(name: str) -> None:
    n, per, count = 12, 4, 6
    x = floats(np.random.default_rng(5), (n, n * count), BF16, "ordinary")
    group = nodes_of(n, per)
    whole = execute.all_reduce(jnp.asarray(x)[:, None], build("all_reduce", name, group))
    parts = execute.reduce_scatter(
        jnp.asarray(x).reshape(n, n, 1, count), build("reduce_scatter", name, group)
    )
    assert same_bits(np.asarray(whole)[0], np.asarray(parts).reshape(-1))


@pytest.mark.parametrize(
    ("op", "name"), [c for c in CASES if c[0] not in ("all_reduce", "reduce_scatter", "reduce")]
)
def test_movement_runs_on_data(op: str, name: str) -> None:
    """Gathers and exchanges deliver what their operation means, on data as on symbols."""
    n = 6
    pairs = ((0, 3), (3, 0), (5, 1)) if op == "permute" else ()
    schedule = build(op, name, nodes_of(n, 4), root=2 if op in ROOTED else 0, pairs=pairs)
    x = np.arange(n * schedule.slots).reshape(n, schedule.slots)
    filled = initial_slots(schedule) != EMPTY
    state = execute.run(schedule, np.where(filled, x, -1))
    rank = np.arange(n)
    if op == "all_gather":
        block = np.arange(n * schedule.cuts)
        assert (state[:, block] == x[block // schedule.cuts, block]).all()
    elif op == "all_to_all":
        assert (state[:, n : 2 * n] == x[:, :n].T).all()
    elif op == "broadcast":
        assert (state == x[2]).all()
    elif op == "scatter":
        assert (state[rank, rank] == x[2, :n]).all()
    elif op == "gather":
        assert (state[2, :n] == x[rank, rank]).all()
    else:
        assert [int(state[d, 1]) for _, d in pairs] == [int(x[s, 0]) for s, _ in pairs]


# What may be sent and added, in every form that `play` must reproduce.
ADDED = [
    *((op, d) for op in ("sum", "prod", "max", "min") for d in (BF16, "float16", "float32")),
    *((op, d) for op in ("sum", "max") for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)),
    *((op, d) for op in ("sum", "prod", "max", "and", "or", "xor") for d in ("int8", "uint32")),
    ("or", "bool"),
    ("sum", "complex64"),
]
MOVED = ["bool", "int8", "uint16", "int32", "float16", "float32", "complex64", BF16]
MOVED += [ml_dtypes.float8_e4m3fn, ml_dtypes.int4]


def anything(rng: np.random.Generator, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """Any bit patterns; of a complex number small integers, whose sums are exact."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b" or dtype == np.dtype(ml_dtypes.int4):
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.integers(-9, 9, shape) + 1j * rng.integers(-9, 9, shape)).astype(dtype)
    x = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=np.uint64)
    return x.astype(words(dtype)).view(dtype)


def plays_like_run(schedule: Schedule, x: np.ndarray, op: str) -> bool:
    y = np.asarray(execute.play(schedule, jnp.asarray(x), op))
    z = execute.run(schedule, x, op)
    if op in ("max", "min") and x.dtype.kind in "fV":  # of two NaNs and zeros NumPy takes either
        y, z = positive_zeros(y), positive_zeros(z)
    if x.dtype.kind == "c" or x.dtype == np.dtype(ml_dtypes.int4):
        return y.dtype == z.dtype and bool((y == z).all())
    return same_bits(y, z)


@pytest.mark.parametrize(("op", "name"), CASES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=2)
def test_the_jax_executor_plays_every_schedule(
    op: str, name: str, data: st.DataObject, seed: int
) -> None:
    """Bit for bit what the definition leaves in every slot of every rank, whatever is sent."""
    n, rng = data.draw(st.integers(1, 9)), np.random.default_rng(seed)
    group = nodes_of(n, data.draw(st.integers(1, 4)))
    root = data.draw(st.integers(0, n - 1)) if op in ROOTED else 0
    pairs = tuple(enumerate(data.draw(st.permutations(range(n))))) if op == "permute" else ()
    schedule = build(op, name, group, root=root, pairs=pairs)
    adds = op in ("all_reduce", "reduce_scatter", "reduce")
    kind, dtype = data.draw(st.sampled_from(ADDED if adds else [("sum", d) for d in MOVED]))
    assert plays_like_run(schedule, anything(rng, (n, schedule.slots, 2), dtype), kind)


def test_playing_ragged_exchanges_and_users_schedules() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, (5, 5)).tolist()
    ragged = ragged_all_to_all(counts, "pairwise")
    assert plays_like_run(ragged, anything(rng, (5, ragged.slots), BF16), "sum")
    swap = make_round([0, 1], [1, 0], 0, 0, reduce=True)
    both = Schedule(op="all_reduce", algorithm="both", ranks=2, slots=1, rounds=(swap,))
    x = np.array([[[0.0]], [[-0.0]]], np.float32)  # each rank adds in its own order
    assert plays_like_run(both, x, "sum")
    assert execute.play(both, jnp.zeros((2, 1, 0))).shape == (2, 1, 0)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("op", ["sum", "prod"])
def test_all_pairs_of_float8(op: str, dtype: type) -> None:
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    x = np.stack([np.repeat(codes, 256), np.tile(codes, 256)])[:, None]
    assert plays_like_run(build("all_reduce", "full_mesh", nodes_of(2, 2)), x.repeat(2, 1), op)


@pytest.mark.parametrize("dtype", [BF16, np.dtype("float16"), np.dtype("float32")], ids=str)
def test_products(dtype: np.dtype) -> None:
    """Also those that end among the subnormals, or begin there."""
    rng = np.random.default_rng(7)
    x = anything(rng, (2, 2, 30000), dtype)
    schedule = build("all_reduce", "full_mesh", nodes_of(2, 2))
    for other in (x, np.where(rng.random(x.shape) < 0.5, x, dtype.type(2.0**-14))):
        assert plays_like_run(schedule, other, "prod")
    partner = x.copy()  # exponents that add up to about the smallest
    exponent = {"bfloat16": 7, "float16": 10, "float32": 23}[dtype.name]
    lowest = {"float16": 15}.get(dtype.name, 127)
    bits = x.view(words(dtype)).astype(np.int64)
    field = (bits[0] >> exponent) & (2 * lowest + 1)
    sought = np.clip(lowest - field + rng.integers(-2, exponent + 3, field.shape), 0, 2 * lowest)
    low = bits[1] & ((1 << exponent) - 1)
    partner[1] = ((sought << exponent) | low).astype(words(dtype)).view(dtype)
    assert plays_like_run(schedule, partner, "prod")


def test_signed_zeros_nan_and_infinity() -> None:
    n = 3
    x = np.array([[-0.0, 0.0, np.inf, np.nan], [-0.0, -0.0, -np.inf, 1.0], [-0.0, -0.0, 1.0, 2.0]])
    for dtype in (BF16, np.dtype("float32"), np.dtype("float16")):
        data = jnp.asarray(x.astype(dtype))[:, None]
        schedule = build("all_reduce", "full_mesh", nodes_of(n, n))
        total = np.asarray(execute.all_reduce(data, schedule)[0]).astype(np.float32)
        assert np.signbit(total[0]) and not np.signbit(total[1])
        assert np.isnan(total[2:]).all()
        top = np.asarray(execute.all_reduce(data, schedule, op="max")[0]).astype(np.float32)
        low = np.asarray(execute.all_reduce(data, schedule, op="min")[0]).astype(np.float32)
        assert not np.signbit(top[1]) and np.signbit(low[1])
        assert top[2] == np.inf and low[2] == -np.inf and np.isnan(top[3]) and np.isnan(low[3])


def test_one_rank_and_nothing_to_do() -> None:
    x = jnp.ones((1, 2, 3), jnp.bfloat16)
    assert (execute.all_reduce(x, build("all_reduce", "ring", Group((0,)))) == x[0]).all()
    empty = execute.all_reduce(jnp.ones((4, 2, 0)), build("all_reduce", "ring", Group((0,) * 4)))
    assert empty.shape == (2, 0)


def test_under_jit_and_vmap() -> None:
    x = floats(np.random.default_rng(6), (2, 5, 1, 13), BF16, "tiny")
    schedule = build("all_reduce", "ring", nodes_of(5, 5))

    def reduce(v: jax.Array) -> jax.Array:
        return execute.all_reduce(v, schedule)

    for result in (jax.jit(jax.vmap(reduce))(x), jax.vmap(reduce)(jnp.asarray(x))):
        for i in range(2):
            assert same_bits(np.asarray(result)[i, 0], ring_loop(x[i, :, 0]))


def test_executor_errors() -> None:
    ring = build("all_reduce", "ring", nodes_of(4, 4))
    with pytest.raises(
        ValueError, match=r"expects x\[ranks, batch, count\] with 4 ranks, got shape"
    ):
        execute.all_reduce(jnp.ones((3, 1, 2)), ring)
    with pytest.raises(ValueError, match=r"axis must be 0 to 1 for \(4, 1, 2\), got 2"):
        execute.all_reduce(jnp.ones((4, 1, 2)), ring, axis=2)
    with pytest.raises(
        ValueError, match="expects a Schedule of reduce_scatter, got one of all_reduce"
    ):
        execute.reduce_scatter(jnp.ones((4, 4, 1, 2)), ring)
    with pytest.raises(ValueError, match="op must be one of sum, prod, max, .*; got 'mean'"):
        execute.all_reduce(jnp.ones((4, 1, 2)), ring, op="mean")
    with pytest.raises(NotImplementedError, match="sum of bool"):
        execute.all_reduce(jnp.ones((4, 1, 2), jnp.bool_), ring)
    with pytest.raises(NotImplementedError, match="xor of bfloat16"):
        execute.all_reduce(jnp.ones((4, 1, 2), jnp.bfloat16), ring, op="xor")
    with pytest.raises(ValueError, match=r"play expects x\[ranks, slots, ...\] of \(4, 4\)"):
        execute.play(ring, jnp.ones((4, 1, 2)))
    swap = make_round([0, 1], [1, 0], 0, 0, reduce=True)
    both = Schedule(op="all_reduce", algorithm="both", ranks=2, slots=1, rounds=(swap,))
    check(both)  # right sums, but each rank adds in its own order
    with pytest.raises(
        ValueError, match="leaves rank 1 with another order of additions in chunk 0"
    ):
        execute.all_reduce(jnp.ones((2, 1, 2)), both)
