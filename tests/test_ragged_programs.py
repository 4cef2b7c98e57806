"""Programs whose sizes only values tell: experts' rows, exchanges of unequal parts, host calls."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import emulator as em
import kernels
from tests.test_chakra import traces

POD = em.cloudmatrix384()
BF16 = jnp.bfloat16
K_GROUPS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
BATCH_GROUPS = lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ())


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), BF16)


def same_bits(got: Any, want: Any) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


# -- grouped matmuls


def by_definition(
    a: Any, b: Any, arithmetic: kernels.Arithmetic = kernels.ASCEND_910C
) -> np.ndarray:
    out = kernels.reference.matmul(np.asarray(a), np.asarray(b), arithmetic=kernels.ASCEND_910C)
    return out.astype(BF16)


def test_groups_of_rows_are_matmuls_of_their_own() -> None:
    a, b = normal(41, 40), normal(3, 40, 6, seed=1)
    run = em.emulate(lax.ragged_dot, POD)
    for sizes in ([10, 0, 30], [5, 33, 3], [0, 0, 0], [40, 1, 0]):
        want = np.zeros((41, 6), BF16)
        for g, stop in enumerate(np.cumsum(sizes)):
            at = slice(stop - sizes[g], stop)
            want[at] = by_definition(a[at], b[g])
        same_bits(run(a, b, jnp.asarray(sizes)), want)


@pytest.mark.parametrize("products", [16, 24])
def test_groups_of_k_start_their_own_sum(products: int) -> None:
    """The unit adds so many products a step: a group's first step begins at its first element."""
    unit = dataclasses.replace(kernels.ASCEND_910C, products=products)
    a, b = normal(101, 5), normal(101, 6, seed=1)
    run = em.emulate(lambda *args: lax.ragged_dot_general(*args, K_GROUPS), POD, unit)
    for sizes in ([30, 0, 70], [5, 90, 3], [0, 0, 0]):
        got = run(a, b, jnp.asarray(sizes))
        for g, stop in enumerate(np.cumsum(sizes)):
            at = slice(stop - sizes[g], stop)
            same_bits(got[g], by_definition(a[at].T, b[at], unit))


@pytest.mark.parametrize("arithmetic", [None, "native"])
@pytest.mark.parametrize(("rows", "k", "groups"), [(0, 8, 2), (4, 0, 2), (4, 8, 0)])
def test_nothing_in_groups(arithmetic: str | None, rows: int, k: int, groups: int) -> None:
    def local(a: Any, b: Any, sizes: Any) -> Any:
        return lax.ragged_dot(a[0], b, sizes)[None]

    run = jax.shard_map(
        local, mesh=POD.mesh(x=3), in_specs=(P("x"), P(), P()), out_specs=P("x"), check_vma=False
    )
    sizes = jnp.full(groups, rows // 2, jnp.int32)
    answer = em.run(
        run, normal(3, rows, k), normal(groups, k, 5), sizes, on=POD, arithmetic=arithmetic
    )
    same_bits(answer.value, np.zeros((3, rows, 5), BF16))
    assert answer.time_s >= answer.bound_s >= 0


def test_groups_of_matmuls_change_nothing() -> None:
    a, b = normal(3, 5, 20), normal(3, 20, 7, seed=1)
    run = em.emulate(lambda *args: lax.ragged_dot_general(*args, BATCH_GROUPS), POD)
    want = np.stack([by_definition(*pair) for pair in zip(a, b, strict=True)])
    same_bits(run(a, b, jnp.asarray([1, 1])), want)


def test_gradients_of_experts_are_grouped_too() -> None:
    a, b, weights = normal(50, 16), normal(3, 16, 8, seed=1), normal(50, 8, seed=2)

    def loss(a: Any, b: Any) -> Any:
        return (lax.ragged_dot(a, b, jnp.asarray([20, 0, 25])) * weights).astype(jnp.float32).sum()

    to_a, to_b = em.emulate(jax.grad(loss, (0, 1)), POD)(a, b)
    for g, at in ((0, slice(0, 20)), (2, slice(20, 45))):
        same_bits(to_a[at], by_definition(weights[at], b[g].T))
        same_bits(to_b[g], by_definition(a[at].T, weights[at]))
    assert not to_a[45:].any() and not to_b[1].any()


def test_each_device_has_its_own_groups() -> None:
    a, b = normal(8 * 20, 16), normal(3, 16, 8, seed=1)
    sizes = np.random.default_rng(0).multinomial(18, [0.2, 0.5, 0.3], 8)
    run = jax.shard_map(
        lambda a, b, s: lax.ragged_dot(a, b, s[0]),
        mesh=POD.mesh(x=2, y=4),
        in_specs=(P(("x", "y")), P(), P(("x", "y"))),
        out_specs=P(("x", "y")),
    )
    got = em.emulate(run, POD)(a, b, sizes).reshape(8, 20, 8)
    for d, mine in enumerate(sizes):
        want = np.zeros((20, 8), BF16)
        for g, stop in enumerate(np.cumsum(mine)):
            at = slice(stop - mine[g], stop)
            want[at] = by_definition(a[20 * d : 20 * (d + 1)][at], b[g])
        same_bits(got[d], want)


def test_gradients_on_several_devices_can_be_left_to_xla() -> None:
    """Whole numbers: every order of addition gives the same sums."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((8 * 6, 4), (3, 4, 5)))
    sizes, rows = np.array([1, 3, 2], np.int32), P(("x", "y"))

    def loss(a: Any, b: Any) -> Any:
        mapped = jax.shard_map(
            lax.ragged_dot,
            mesh=POD.mesh(x=4, y=2),
            in_specs=(rows, P(), P()),
            out_specs=rows,
        )
        return mapped(a, b, sizes).sum()

    to_a, to_b = em.emulate(jax.grad(loss, (0, 1)), POD, arithmetic="native")(a, b)
    group = np.repeat(np.arange(3), sizes)
    assert np.array_equal(to_a, np.tile(b.sum(2)[group], (8, 1)))
    sums = [a.reshape(8, 6, 4)[:, group == g].sum((0, 1)) for g in range(3)]
    assert np.array_equal(to_b, np.repeat(np.stack(sums)[:, :, None], 5, 2))


# -- exchanges of unequal parts


def exchange_program(groups: Any = None) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """(program, its arguments, rows [dp, source, destination], what must come out)."""
    n = 2 if groups else 4
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 4, (2 * 4 // n, n, n))
    x = rng.standard_normal((2 * 4 * 12, 3)).astype(np.float32)
    starts, places = np.cumsum(rows, 2) - rows, np.cumsum(rows, 1) - rows
    want = np.full((2, 4, 12, 3), -1, np.float32)
    old = x.reshape(2, 4, 12, 3)
    for q, table in enumerate(rows):
        members = [(q % 2, r) for r in groups[q // 2]] if groups else [(q, r) for r in range(4)]
        for s, d in np.ndindex(n, n):
            begin, count, place = starts[q, s, d], table[s, d], places[q, s, d]
            want[members[d]][place : place + count] = old[members[s]][begin : begin + count]

    def placed(table: np.ndarray) -> np.ndarray:  # [dp, x, slices]
        if not groups:
            return table
        out = np.zeros((2, 4, n), table.dtype)
        for q, each in enumerate(table):
            out[q % 2, groups[q // 2]] = each
        return out

    def body(x: Any, *numbers: Any) -> Any:
        offsets = [v.reshape(-1) for v in numbers]
        empty = jnp.full_like(x, -1)
        return lax.ragged_all_to_all(x, empty, *offsets, axis_name="x", axis_index_groups=groups)

    both = P(("dp", "x"))
    run = jax.shard_map(
        body, mesh=POD.mesh(dp=2, x=4), in_specs=(both, *[P("dp", "x")] * 4), out_specs=both
    )
    tables = [placed(t) for t in (starts, rows, places, rows.transpose(0, 2, 1))]
    return run, (x, *tables), rows, want.reshape(-1, 3)


@pytest.mark.parametrize("groups", [None, [[0, 2], [3, 1]]])
def test_ragged_exchange_has_values_and_time(groups: Any) -> None:
    run, args, rows, want = exchange_program(groups)
    answer = em.run(run, *args, on=POD)
    np.testing.assert_array_equal(answer.value, want)
    assert answer.counts == {
        "ragged_all_to_all_0": tuple(tuple(map(tuple, t)) for t in rows.astype(float).tolist())
    }
    assert em.estimate(run, *args, on=POD, counts=answer.counts).time_s == answer.time_s
    (step,) = [s for s in answer.steps if s.kind == "collective"]
    members = groups[0] if groups else range(4)
    table = (rows[0] * 3).tolist()
    first = em.all_to_all_v(table, on=POD, devices=list(members), dtype="float32")
    assert step.groups[0][1][0] == first.time_s


@pytest.mark.parametrize("groups", [None, [[0, 2], [3, 1]]])
def test_a_ragged_exchange_in_a_program_that_the_compiler_divides(groups: Any) -> None:
    run, args, rows, want = exchange_program(groups)
    part = NamedSharding(POD.mesh(dp=2, x=4), P(("dp", "x")))

    def divided(x: Any, *tables: Any) -> Any:
        return run(lax.with_sharding_constraint(x, part), *tables) * 2

    whole = em.run(run, *args, on=POD)
    answer = em.run(divided, *args, on=POD)
    np.testing.assert_array_equal(answer.value, want * 2)
    tables = np.array(answer.counts["ragged_all_to_all_0"])  # the groups in another order
    np.testing.assert_array_equal(tables.sum(0), rows.sum(0))
    ours, theirs = ([s for s in a.steps if s.kind == "collective"] for a in (answer, whole))
    assert [s.time_s for s in ours] == [s.time_s for s in theirs]


def test_a_ragged_exchange_of_each_device_with_itself() -> None:
    part = NamedSharding(POD.mesh(dp=8, x=1), P(("dp", "x")))

    def program(x: Any, rows: Any) -> Any:
        def body(x: Any, rows: Any) -> Any:
            start = jnp.zeros_like(rows)
            return lax.ragged_all_to_all(x, x * 0, start, rows, start + 1, rows, axis_name="x")

        x = lax.with_sharding_constraint(x, part)
        return jax.shard_map(body, mesh=part.mesh, in_specs=part.spec, out_specs=part.spec)(x, rows)

    x, rows = np.arange(1.0, 33.0, dtype=np.float32), np.arange(8, dtype=np.int32) % 3
    found = em.run(program, x, rows, on=POD).value.reshape(8, 4)
    for mine, theirs, count in zip(found, x.reshape(8, 4), rows, strict=True):
        np.testing.assert_array_equal(mine, [0, *theirs[:count], *[0] * (3 - count)])


def test_a_ragged_exchange_of_which_some_operands_are_batched_is_refused_by_name() -> None:
    run, (x, *tables), _, want = exchange_program()
    with pytest.raises(NotImplementedError, match="ragged_all_to_all under a vmap"):
        em.run(jax.vmap(lambda x: run(x, *tables)), np.stack([x, x]), on=POD)
    both = [np.stack([v, v]) for v in (x, *tables)]
    np.testing.assert_array_equal(em.run(jax.vmap(run), *both, on=POD).value, [want, want])


# -- what only values tell


def test_skewed_experts_take_longer_on_their_device() -> None:
    a, b = jnp.ones((8 * 4096, 512), BF16), jnp.ones((4, 512, 1024), BF16)
    run = jax.shard_map(
        lambda a, b, s: lax.ragged_dot(a, b, s[0]),
        mesh=POD.mesh(x=8),
        in_specs=(P("x"), P(), P("x")),
        out_specs=P("x"),
    )
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (a, b)]
    shapes.append(jax.ShapeDtypeStruct((8, 4), jnp.int32))
    even = em.estimate(run, *shapes, on=POD, counts={"ragged_dot_0": [1024] * 4})
    alone = em.matmul_time(4096, 512, 1024, POD, groups=[1024] * 4).time_s
    assert even.time_s == pytest.approx(alone, rel=1e-6)
    less = [[1024] * 4] * 7 + [[100, 0, 0, 0]]
    clocks = em.estimate(run, *shapes, on=POD, counts={"ragged_dot_0": less}).timeline.clocks_ps
    assert (clocks[:7] == clocks[0]).all() and clocks[7] < clocks[0]


def test_devices_are_counted_each_with_its_own_work(tmp_path: Path) -> None:
    """One device has all rows of the first product, another all of the second."""

    def experts(a: Any, b: Any, first: Any, second: Any) -> Any:
        return lax.ragged_dot(a, b, first[0]), lax.ragged_dot(a, b, second[0])

    run = jax.shard_map(
        experts, mesh=POD.mesh(x=4), in_specs=(P("x"), P(), P("x"), P("x")), out_specs=P("x")
    )
    sizes = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    shapes = [jax.ShapeDtypeStruct(s, BF16) for s in ((4 * 4096, 4096), (1, 4096, 4096))]
    counts = {"ragged_dot_0": [[4096], [8], [8], [8]], "ragged_dot_1": [[8], [4096], [8], [8]]}
    answer = em.estimate(run, *shapes, sizes, sizes, on=POD, counts=counts)
    large, small = (em.matmul_time(rows, 4096, 4096, POD, groups=[rows]) for rows in (4096, 8))
    done = 2 * 4096**2 * (2 * (4096 + 3 * 8))
    assert answer.energy.flops == done
    assert answer.bound.matmul_s == pytest.approx(
        (large.flops + small.flops) / large.peak_flops_per_s, rel=1e-12
    )
    assert answer.bound_s <= answer.time_s
    mean_s = 2 * (large.time_s + 3 * small.time_s) / 4
    assert answer.by_kind()["matmul"] == pytest.approx(mean_s)
    assert answer.utilization == pytest.approx(done / 4 / answer.time_s / large.peak_flops_per_s)
    folder = answer.to_chakra(tmp_path / "et")
    devices = traces(folder, "experts", 4)
    assert [[n["num_ops"] for n in nodes] for nodes in devices] == [
        [large.flops, small.flops], [small.flops, large.flops], *[[small.flops] * 2] * 2
    ]  # fmt: skip
    ends_ps = [sum(n["duration_ps"] for n in nodes) for nodes in devices]
    assert ends_ps == pytest.approx(answer.timeline.clocks_ps.tolist(), abs=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "give counts={'ragged_dot_0'"),
        ([1, 2, 3], "expected lengths of the groups, 4 numbers"),
        ([1, 2, -1, 3], "at least 0"),
        ([50, 50, 50, 50], "add up to 200, but there are only 100"),
    ],
)
def test_an_estimate_says_what_it_must_be_told(given: Any, words: str) -> None:
    args = normal(100, 16), normal(4, 16, 8), jnp.zeros(4, jnp.int32)
    counts = {} if given is None else {"ragged_dot_0": given}
    with pytest.raises(ValueError, match=words):
        em.estimate(lax.ragged_dot, *args, on=POD, counts=counts)


def test_all_missing_counts_are_named_at_once() -> None:
    def program(x: Any, w: Any) -> Any:
        x = lax.while_loop(lambda c: c.sum() < 10, lambda c: c * 2, x)
        return lax.cond(x[0, 0] > 1, lambda: lax.ragged_dot(x, w, jnp.asarray([1, 2])), lambda: x)

    with pytest.raises(ValueError, match="while_0.*cond_0.*ragged_dot_0"):
        em.estimate(program, normal(8, 8), normal(2, 8, 8), on=POD)


def test_sizes_are_means_over_a_loop() -> None:
    def program(x: Any, w: Any) -> Any:
        def body(i: Any, x: Any) -> Any:
            return lax.cond(i < 2, lambda: lax.ragged_dot(x, w, jnp.stack([i, 4 - i])), lambda: x)

        return lax.fori_loop(0, lax.abs(x[0, 0]).astype(jnp.int32) * 0 + 3, body, x)

    counts = em.run(program, normal(8, 8), normal(2, 8, 8), on=POD, arithmetic="native").counts
    assert counts["while_0"] == 3 and counts["ragged_dot_0"] == (0.5, 3.5)


# -- calls to the host


def test_host_calls_go_from_device_to_device(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []

    def host(i: Any, v: Any) -> Any:
        seen.append(float(i))
        return np.float32(v * 2)

    def body(a: Any) -> Any:
        i = lax.axis_index(("x", "y"))
        jax.debug.print("device {}", i)
        return a + io_callback(host, jax.ShapeDtypeStruct((), jnp.float32), i, a[0])

    run = jax.shard_map(
        body,
        mesh=POD.mesh(x=2, y=3),
        in_specs=P(("x", "y")),
        out_specs=P(("x", "y")),
        check_vma=False,
    )
    out = em.emulate(run, POD)(jnp.arange(6.0))
    np.testing.assert_array_equal(out, 3 * np.arange(6.0))
    assert seen == list(range(6))
    jax.effects_barrier()
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("device")] == [
        f"device {i}" for i in range(6)
    ]


def test_weak_types_of_results_are_kept() -> None:
    def program(x: Any) -> Any:
        return x * 2, 3.0, jnp.asarray(x, BF16)

    wanted = [jax.typeof(v).weak_type for v in jax.tree.leaves(jax.jit(program)(1.0))]
    for run in (em.emulate(program, POD), jax.jit(em.emulate(program, POD))):
        assert [jax.typeof(v).weak_type for v in run(1.0)] == wanted
    assert jax.grad(lambda x: em.emulate(program, POD)(x)[0])(2.0) == 2.0
