"""The time reading of programs: what each equation costs, where data lie, what lives, how long."""

from __future__ import annotations

import gc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emulator.chip import matmul_time
from emulator.fabric import collective
from emulator.machines import cloudmatrix384, gb200_nvl72
from emulator.memory import Buffer, Lifetimes, Moment, peak
from emulator.report import Estimate, estimate, run
from emulator.timeline import CollectiveOp, Loop, Op, each, play

POD = cloudmatrix384()
MESH = POD.mesh(dp=48, tp=8)
ALL = P(("dp", "tp"))
S = jax.ShapeDtypeStruct
F32, BF16 = jnp.float32, jnp.bfloat16
X = S((384, 64), F32)


def sharded(fun: Any, in_specs: Any, out_specs: Any, **options: Any) -> Any:
    return jax.shard_map(fun, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


def ops(e: Estimate, kind: str) -> list[Any]:
    return [step for step, _ in each(e.steps) if step.kind == kind]


# -- matmuls and collectives inside shard_map


def mlp(w1: Any, w2: Any, x: Any) -> Any:
    h = jax.nn.gelu(x @ w1)
    return lax.psum(h @ w2, "tp")


MLP_SPECS = (P(None, "tp"), P("tp", None), P("dp", None))
MLP_ARGS = (S((8192, 28672), BF16), S((28672, 8192), BF16), S((48 * 4096, 8192), BF16))


@pytest.mark.parametrize("check_vma", [True, False])
def test_tensor_parallel_mlp(check_vma: bool) -> None:
    e = estimate(sharded(mlp, MLP_SPECS, P("dp", None), check_vma=check_vma), *MLP_ARGS, on=POD)
    first, second = ops(e, "matmul")
    assert first.time_s == matmul_time(4096, 8192, 3584, POD).time_s
    assert second.time_s == matmul_time(4096, 3584, 8192, POD).time_s
    assert e.flops == pytest.approx(4.81e11, rel=1e-3)
    (reduce,) = e.collectives
    assert reduce.op == "all_reduce" and reduce.nbytes == 4096 * 8192 * 2
    ((positions, _),) = reduce.groups
    assert positions.shape == (48, 8) and positions[1].tolist() == list(range(8, 16))
    alone = collective("all_reduce", reduce.nbytes, on=POD, devices=range(8))
    assert reduce.time_s == alone.time_s
    total = sum(step.time_s * n for step, n in each(e.steps))
    assert e.time_s == pytest.approx(total, abs=1e-12 * len(e.timeline.spans))
    assert e.time_s >= e.bound_s > 0


def test_gradient_has_three_times_the_matmul_work() -> None:
    def loss(w1: Any, w2: Any, x: Any) -> Any:
        return lax.pmean(jnp.sum(mlp(w1, w2, x).astype(F32)), "dp")

    f = sharded(loss, MLP_SPECS, P())
    forward = estimate(f, *MLP_ARGS, on=POD)
    both = estimate(jax.value_and_grad(f, argnums=(0, 1, 2)), *MLP_ARGS, on=POD)
    assert both.flops == pytest.approx(3 * forward.flops)
    over_dp = [c for c in both.collectives if c.axes == ("dp",) and c.nbytes > 4]
    assert [c.nbytes for c in over_dp] == [8192 * 3584 * 2] * 2


CASES = {
    "all_gather": (lambda x: lax.all_gather(x, "tp", tiled=True), "all_gather", 8 * 64 * 4),
    "psum_scatter": (
        lambda x: lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True),
        "reduce_scatter",
        64 * 4,
    ),
    "all_to_all": (lambda x: lax.all_to_all(x, "tp", 1, 0, tiled=True), "all_to_all", 64 * 4),
    "ppermute": (
        lambda x: lax.ppermute(x, "tp", [(i, (i + 1) % 8) for i in range(8)]),
        "permute",
        64 * 4,
    ),
    "pmax": (lambda x: lax.pmax(x, "tp"), "all_reduce", 64 * 4),
    "pmin": (lambda x: lax.pmin(x, ("dp", "tp")), "all_reduce", 64 * 4),
    "pmean": (lambda x: lax.pmean(x, ("dp", "tp")), "all_reduce", 64 * 4),
}


@pytest.mark.parametrize("name", CASES)
def test_collective_bytes_follow_nccl_tests(name: str) -> None:
    fun, op, nbytes = CASES[name]
    e = estimate(sharded(lambda x: fun(x) * 1.0, ALL, ALL, check_vma=False), X, on=POD)
    (c,) = e.collectives
    assert (c.op, c.nbytes) == (op, nbytes)
    assert sum(p.size for p, _ in c.groups) == 384


def test_psum_over_two_axes_is_one_collective_of_all_devices() -> None:
    e = estimate(sharded(lambda x: lax.psum(x, ("dp", "tp")), ALL, P()), X, on=POD)
    (c,) = e.collectives
    assert c.ranks == 384


def test_axis_order_is_the_rank_order() -> None:
    e = estimate(sharded(lambda x: lax.psum(x, ("tp", "dp")), ALL, P(), check_vma=False), X, on=POD)
    ((positions, _),) = e.collectives[0].groups
    assert positions[0, :3].tolist() == [0, 8, 16]  # the first axis is the slowest


def test_each_operand_of_a_psum_is_its_own_collective() -> None:
    e = estimate(
        sharded(lambda x: lax.psum((x, x * 2), "tp"), ALL, ALL, check_vma=False), X, on=POD
    )
    assert len(e.collectives) == 2


def test_axis_index_groups_are_honoured() -> None:
    groups = [[0, 1, 2], [3, 4, 5, 6, 7]]
    f = sharded(lambda x: lax.psum(x, "tp", axis_index_groups=groups), ALL, ALL, check_vma=False)
    (c,) = estimate(f, X, on=POD).collectives
    assert sorted(p.shape for p, _ in c.groups) == [(48, 3), (48, 5)]


def test_one_participant_costs_nothing() -> None:
    mesh = POD.mesh(a=1, b=8)
    f = jax.shard_map(lambda x: lax.psum(x, "a"), mesh=mesh, in_specs=P("b"), out_specs=P("b"))
    e = estimate(f, S((8, 64), F32), on=POD)
    assert e.collectives == () and e.time_s == 0


def test_chosen_devices_are_the_groups() -> None:
    """Two neighbours share a node; two devices of different nodes do not."""

    def time(devices: tuple[int, int]) -> float:
        mesh = POD.mesh(a=2, devices=devices)
        f = jax.shard_map(lambda x: lax.psum(x, "a"), mesh=mesh, in_specs=P("a"), out_specs=P())
        e = estimate(f, S((2, 2**20), F32), on=POD)
        assert e.devices == devices
        return e.time_s

    near = collective("all_reduce", 2**22, on=POD, devices=(0, 1), dtype="float32")
    far = collective("all_reduce", 2**22, on=POD, devices=(3, 200), dtype="float32")
    assert time((0, 1)) == pytest.approx(near.time_s, abs=2e-12)
    assert time((3, 200)) == pytest.approx(far.time_s, abs=2e-12)


def test_algorithm_is_pinned() -> None:
    f = sharded(lambda x: lax.psum(x, "tp"), ALL, P("dp"))
    for algorithm in ("ring", "full_mesh"):
        e = estimate(f, X, on=POD, algorithms={"all_reduce": algorithm})
        assert e.collectives[0].algorithm == algorithm


def test_two_shard_maps_and_what_lies_between_all_count() -> None:
    def f(x: Any) -> Any:
        y = sharded(lambda x: lax.psum(x, "tp"), ALL, P("dp"))(x)
        z = jnp.sin(y)
        return sharded(lambda z: lax.psum(z, "dp"), P("dp"), P())(z)

    e = estimate(f, X, on=POD)
    assert [c.axes for c in e.collectives] == [("tp",), ("dp",)]
    assert len(ops(e, "vector")) == 1


# -- loops and branches


def test_scan_multiplies_by_its_length() -> None:
    def f(x: Any, n: int) -> Any:
        return lax.scan(lambda c, _: (c @ c, None), x, None, length=n)[0]

    once = estimate(lambda x: f(x, 1), S((256, 256), BF16), on=POD)
    often = estimate(lambda x: f(x, 1000), S((256, 256), BF16), on=POD)
    assert often.time_s == pytest.approx(1000 * once.time_s)
    assert often.flops == 1000 * once.flops
    assert often.bound_s == pytest.approx(1000 * once.bound_s)


def test_while_needs_its_trips() -> None:
    def f(x: Any) -> Any:
        return lax.while_loop(lambda c: c.sum() < 10, lambda c: c @ c, x)

    x = S((256, 256), F32)
    with pytest.raises(ValueError, match="while_0.*values"):
        estimate(f, x, on=POD)
    times = [estimate(f, x, on=POD, counts={"while_0": n}).time_s for n in (0, 1, 2, 2.5)]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0])
    assert times[3] - times[2] == pytest.approx((times[1] - times[0]) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="at least 0"):
        estimate(f, x, on=POD, counts={"while_0": -1})


def test_cond_needs_its_shares() -> None:
    def f(x: Any) -> Any:
        return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    x = S((512, 512), BF16)
    with pytest.raises(ValueError, match="cond_0.*values"):
        estimate(f, x, on=POD)
    flops = {
        s: estimate(f, x, on=POD, counts={"cond_0": s}).flops for s in ((1, 0), (0, 1), (0.5, 0.5))
    }
    assert flops[0, 1] + flops[1, 0] == 2 * flops[0.5, 0.5]
    with pytest.raises(ValueError, match="2 shares"):
        estimate(f, x, on=POD, counts={"cond_0": (0.5, 0.2)})
    for row in ((1.0, 0.5), (0.5, 0.2)):  # for each device
        with pytest.raises(ValueError, match="row for each device"):
            estimate(f, x, on=POD, counts={"cond_0": (row, row)})


@pytest.mark.parametrize("overlap", [False, True])
def test_a_branch_that_one_device_takes_takes_its_time_there(overlap: bool) -> None:
    def body(x: Any) -> Any:
        x = lax.cond(lax.axis_index("dp") == 47, lambda x: x @ x, lambda x: x, x)
        return lax.psum(x, "dp")

    f = sharded(body, P("dp"), P(), check_vma=False)
    x = np.zeros((48 * 256, 256), np.float32)
    answer = run(f, x, on=POD, arithmetic="native", overlap=overlap)
    shares = np.array(answer.counts["cond_0"]).reshape(48, 8, 2)
    assert np.array_equal(shares[..., 1], np.arange(48)[:, None] == np.full(8, 47))
    told = estimate(f, x, on=POD, counts=answer.counts, overlap=overlap)
    always = estimate(f, x, on=POD, counts={"cond_0": (0, 1)}, overlap=overlap)
    assert answer.time_s == told.time_s == always.time_s
    assert answer.flops == always.flops / 48  # the mean of the devices
    never = estimate(f, x, on=POD, counts={"cond_0": (1, 0)}, overlap=overlap)
    (product,) = ops(always, "matmul")
    assert always.time_s - never.time_s == pytest.approx(product.time_s, rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"while_0": math.inf}, "at least 0; got inf"),
        ({"while_0": math.nan}, "at least 0; got nan"),
        ({"while_0": 1e13}, "clocks in picoseconds end at 9.22e"),
    ],
)
def test_trips_that_no_clock_can_hold(counts: dict[str, float], words: str) -> None:
    f = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)  # noqa: E731
    with pytest.raises(ValueError, match=words):
        estimate(f, S((8,), F32), on=POD, counts=counts)


def test_trips_of_one_device_that_no_clock_can_hold() -> None:
    """In the mean of all devices a clock would hold them."""

    def loop(x: Any) -> Any:
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)

    def body(x: Any) -> Any:
        return lax.cond(lax.axis_index("dp") == 47, loop, lambda x: x, x)

    f = sharded(body, P("dp"), P("dp"), check_vma=False)
    one = np.zeros((384, 2))
    one[:, 0], one[-1] = 1, (0, 1)
    with pytest.raises(ValueError, match="clocks in picoseconds end at"):
        estimate(f, S((48, 8), F32), on=POD, counts={"cond_0": one, "while_0": 1e13})


def test_shares_are_numbers() -> None:
    f = lambda x: lax.cond(x[0] < 9, lambda c: c + 1, lambda c: c, x)  # noqa: E731
    with pytest.raises(ValueError, match="2 shares that add up to 1.*got .nan, 1"):
        estimate(f, S((8,), F32), on=POD, counts={"cond_0": (math.nan, 1)})


def test_counts_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="while_7"):
        estimate(lambda x: x, X, on=POD, counts={"while_7": 1})


# -- what is known, and what is not


def test_unknown_primitive_raises_by_name() -> None:
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        f8 = S((32, 32), jnp.float8_e4m3fn)
        estimate(lambda a, b: lax.dot(a, b, preferred_element_type=F32), f8, f8, on=POD)


def test_ordinary_primitives_have_a_cost() -> None:
    """A tour of what programs contain; each must have a rule, and take time."""

    def tour(x: Any, i: Any, key: Any) -> Any:
        yield jnp.cumsum(x), jnp.cumprod(x), lax.cummax(x), lax.cumlogsumexp(x)
        yield jnp.argmax(x), jnp.argmin(x, axis=1), jnp.sort(x), jnp.argsort(x), lax.top_k(x, 3)
        yield (
            x[i],
            x.at[i].add(1.0),
            x.at[i].set(2.0),
            x.at[i].max(2.0),
            jnp.take_along_axis(x, i[:, None], 1),
        )
        yield lax.dynamic_slice(x, (i[0], 0), (2, 2)), lax.dynamic_update_slice(x, x[:2], (i[0], 0))
        yield (
            jnp.concatenate([x, x]),
            jnp.pad(x, 1),
            x.T + 1,
            x.reshape(-1) * 2,
            x[::-1],
            jnp.tile(x, 2),
        )
        yield (
            jnp.where(x > 0, x, 0.0),
            x.astype(jnp.int8),
            jnp.clip(x, 0, 1),
            jnp.var(x),
            jnp.all(x > 0),
        )
        yield (
            jax.nn.softmax(x),
            jax.nn.gelu(x),
            jax.nn.logsumexp(x),
            jax.nn.silu(x),
            lax.rsqrt(x),
            x**3,
            x**0.5,
        )
        yield (
            jax.random.normal(key, (8,)),
            jax.random.bernoulli(key, 0.5, (8,)),
            jax.random.split(key),
        )
        yield (
            jax.random.categorical(key, x),
            jax.random.permutation(key, 8),
            jax.random.fold_in(key, 3),
        )
        yield lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID")
        yield jax.vmap(lambda r: lax.scan(lambda c, a: (c + a, c), 0.0, r))(x)
        yield (
            lax.associative_scan(jnp.add, x),
            jnp.einsum("ij,kj->ik", x, x),
            lax.bitcast_convert_type(x, jnp.int32),
        )
        yield (
            lax.optimization_barrier(x),
            lax.stop_gradient(x),
            jax.checkpoint(jnp.sin)(x),
            x == x,
            ~(x > 0),
        )

    args = (S((16, 16), F32), S((16,), jnp.int32), jax.random.key(0))
    groups = len(list(jax.eval_shape(lambda *a: list(tour(*a)), *args)))
    for g in range(groups):
        e = estimate(lambda *a, g=g: list(tour(*a))[g], *args, on=POD)
        assert e.time_s >= e.bound_s
        assert g == groups - 1 or e.time_s > 0


def test_zeros_between_inputs_are_no_work_for_a_convolution() -> None:
    """A transposed convolution of stride 2 multiplies each weight with a quarter of its inputs."""
    x, w = S((2, 16, 16, 32), jnp.bfloat16), S((4, 4, 32, 64), jnp.bfloat16)
    f = lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME")  # noqa: E731
    (step,) = ops(estimate(f, x, w, on=POD), "matmul")
    assert step.flops == 2 * (2 * 32 * 32) * 64 * (4 * 4 * 32 // 4)


def test_convolution_is_a_matmul() -> None:
    f = lambda x, w: lax.conv_general_dilated(x, w, (2, 2), "SAME")  # noqa: E731
    e = estimate(f, S((8, 16, 32, 32), BF16), S((32, 16, 3, 3), BF16), on=POD)
    (step,) = ops(e, "matmul")
    assert step.time_s == matmul_time(8 * 16 * 16, 3 * 3 * 16, 32, POD).time_s


def test_fp32_matmul_uses_the_fp32_mode() -> None:
    x = S((1024, 1024), F32)
    (step,) = ops(estimate(lambda a: a @ a, x, on=POD), "matmul")
    assert step.time_s == matmul_time(1024, 1024, 1024, POD, "float32").time_s
    (mixed,) = ops(estimate(lambda a, b: lax.dot(a, b), x, S((1024, 1024), BF16), on=POD), "matmul")
    assert mixed.time_s == step.time_s
    (nvidia,) = ops(estimate(lambda a: a @ a, x, on=gb200_nvl72()), "matmul")
    assert nvidia.time_s == matmul_time(1024, 1024, 1024, gb200_nvl72(), "tf32").time_s


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int4, jnp.uint4])
@pytest.mark.parametrize("out", [None, jnp.int16, jnp.uint32, F32])
def test_results_of_integer_matmuls_have_any_type(dtype: Any, out: Any) -> None:
    x = S((64, 64), dtype)
    (one,) = ops(
        estimate(lambda x: jnp.matmul(x, x, preferred_element_type=out), x, on=POD), "matmul"
    )
    assert one.detail.startswith(dtype.dtype.name.lstrip("u"))


@pytest.mark.parametrize("dtype", [jnp.bool, jnp.int16, jnp.int32])
def test_operations_of_matmuls_on_the_vector_units(dtype: Any) -> None:
    answer = estimate(lambda x: x @ x, S((64, 64), dtype), on=POD)
    assert answer.flops == 2 * 64**3


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4])
def test_int4_matmuls_have_a_matrix_unit_on_ascend_only(dtype: Any) -> None:
    def product(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, preferred_element_type=jnp.int32), a @ b

    shapes = S((512, 1024), dtype), S((1024, 256), dtype)
    ascend, blackwell = (estimate(product, *shapes, on=m) for m in (POD, gb200_nvl72()))
    wide, narrow = ops(ascend, "matmul")
    times = [matmul_time(512, 1024, 256, POD, "int4", out_dtype=d) for d in ("int32", "int4")]
    assert [wide.time_s, narrow.time_s] == [time.time_s for time in times]
    assert any("no times of INT4 kernels" in note for note in ascend.assumptions)
    assert any("run on the vector units" in note for note in blackwell.assumptions)


@pytest.mark.parametrize(
    ("a", "b", "mode"),
    [
        (jnp.float8_e4m3fn, jnp.float8_e4m3fn, "float8"),
        (jnp.float8_e4m3fn, jnp.float8_e5m2, "float8"),
        (jnp.float4_e2m1fn, jnp.float4_e2m1fn, "float4"),
    ],
)
def test_matmuls_of_eight_and_four_bits_on_blackwell_only(a: Any, b: Any, mode: str) -> None:
    def product(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, preferred_element_type=BF16)

    blackwell, shapes = gb200_nvl72(), (S((4096, 4096), a), S((4096, 4096), b))
    e = estimate(product, *shapes, on=blackwell)
    (one,) = ops(e, "matmul")
    known = matmul_time(4096, 4096, 4096, blackwell, mode)
    assert one.time_s == known.time_s and one.bytes == known.moved_bytes
    assert known.time_s < matmul_time(4096, 4096, 4096, blackwell, "bfloat16").time_s
    assert any(f"{mode} matmuls" in note for note in e.assumptions)
    with pytest.raises(NotImplementedError, match=f"{a.dtype.name}.*no such mode"):
        estimate(product, *shapes, on=POD)


def test_batched_matmul_sizes() -> None:
    e = estimate(
        lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b),
        S((2, 3, 64, 16), BF16),
        S((2, 3, 32, 16), BF16),
        on=POD,
    )
    (step,) = ops(e, "matmul")
    assert step.time_s == matmul_time(64, 16, 32, POD, batch=6, b_layout="nd_t").time_s


def test_matmuls_read_operands_as_they_lie() -> None:
    """Rows along K or across it; a transpose between is but another way to read them."""
    x, w, y = S((512, 1001), BF16), S((2000, 1001), BF16), S((512, 300), BF16)

    def timed(f: Any, *args: Any) -> float:
        (step,) = ops(estimate(f, *args, on=POD), "matmul")
        return step.time_s

    along = matmul_time(512, 1001, 2000, POD, b_layout="nd_t").time_s
    assert along != matmul_time(512, 1001, 2000, POD).time_s
    assert timed(lambda x, w: x @ w.T, x, w) == along
    assert timed(lambda x, w: jnp.einsum("mk,nk->mn", x, w), x, w) == along
    written = matmul_time(2000, 1001, 512, POD, b_layout="nd_t").time_s
    assert timed(lambda x, w: (w @ x.T).T, x, w) == written
    across = matmul_time(1001, 512, 300, POD, a_layout="nd_t").time_s
    assert across != matmul_time(1001, 512, 300, POD).time_s
    assert timed(lambda x, y: x.T @ y, x, y) == across
    assert timed(lambda x, y: jnp.einsum("tk,tn->kn", x, y), x, y) == across


# -- fusion


def test_fused_chain_reads_and_writes_once() -> None:
    x = S((1024, 1024), F32)
    f = lambda x: jnp.tanh(x * 2 + 1) * x  # noqa: E731
    (step,) = ops(estimate(f, x, on=POD), "vector")
    assert step.bytes == 2 * 4 * 1024**2
    eager = ops(estimate(f, x, on=POD, fusion="eager"), "vector")
    assert len(eager) == 4
    assert sum(s.bytes for s in eager) > 3 * step.bytes
    assert estimate(f, x, on=POD).time_s < estimate(f, x, on=POD, fusion="eager").time_s
    with pytest.raises(ValueError, match="fusion='half'"):
        estimate(f, x, on=POD, fusion="half")


def test_fusion_goes_through_jit() -> None:
    f = lambda x: jax.nn.relu(jnp.where(x > 0, x, 0.0) + jax.jit(jnp.sin)(x))  # noqa: E731
    assert len(ops(estimate(f, X, on=POD), "vector")) == 1


def test_dead_code_is_free() -> None:
    def f(x: Any) -> Any:
        jnp.linalg.cholesky(x @ x.T)
        return x + 1

    assert not ops(estimate(f, X, on=POD), "matmul")


# -- layouts outside shard_map


def adam_like(w: Any, m: Any, g: Any) -> tuple[Any, Any]:
    m = 0.9 * m + 0.1 * g
    return w - 1e-3 * m, m


@pytest.mark.parametrize("moved", [lax.optimization_barrier, lax.stop_gradient])
def test_a_number_that_is_passed_on_lies_nowhere(moved: Any) -> None:
    e = estimate(lambda x: (x + 1, moved(2.0)), X, on=POD)
    assert e.memory.results_bytes == 4 * 384 * 64


def test_optimizer_outside_shard_map_is_divided() -> None:
    loss = sharded(
        lambda w, x: lax.pmean((x @ w).sum(), ("dp", "tp")), (P(None, "tp"), P("dp")), P()
    )

    def step(w: Any, m: Any, x: Any) -> Any:
        g = jax.grad(loss)(w, x)
        return adam_like(w, m, g)

    w = S((64, 8192), F32)
    e = estimate(step, w, w, S((48 * 8, 64), F32), on=POD)
    update = max(ops(e, "vector"), key=lambda s: s.bytes)
    assert update.bytes == 5 * 64 * 8192 * 4 // 8  # reads w, m, g; writes w, m: an eighth each
    assert not any("repeated" in a for a in e.assumptions)
    assert e.memory.arguments_bytes == 2 * 64 * 1024 * 4 + 8 * 64 * 4


def test_reduction_over_a_divided_dimension_adds_its_collective() -> None:
    def f(x: Any) -> Any:
        y = sharded(lambda x: x * 2, ALL, ALL)(x)
        return jnp.sqrt(jnp.sum(y**2))

    e = estimate(f, X, on=POD)
    (c,) = e.collectives
    assert (c.op, c.axes, c.nbytes) == ("all_reduce", ("dp", "tp"), 4)


def test_resharding_between_shard_maps_costs_its_movement() -> None:
    def f(x: Any) -> Any:
        y = sharded(lambda x: x * 2, P("dp", None), P("dp", None))(x)
        return sharded(lambda y: y + 1, P(None, "dp"), P(None, "dp"))(y)

    e = estimate(f, S((48, 96), F32), on=POD)
    (c,) = e.collectives
    assert (c.op, c.axes, c.nbytes) == ("all_to_all", ("dp",), 96 * 4)
    assert any("changes its sharding" in a for a in e.assumptions)

    def g(x: Any) -> Any:
        y = sharded(lambda x: x * 2, P("dp", None), P("dp", None))(x)
        return sharded(lambda y: y + 1, P(), P())(y)

    (c,) = estimate(g, S((48, 96), F32), on=POD).collectives
    assert (c.op, c.nbytes) == ("all_gather", 48 * 96 * 4)


def test_residuals_pass_between_shard_maps_for_free() -> None:
    loss = sharded(lambda x: lax.pmean(jnp.sin(jnp.sin(x)).sum(), ("dp", "tp")), ALL, P())
    e = estimate(jax.value_and_grad(loss), X, on=POD)
    assert not any("changes its sharding" in a for a in e.assumptions)


def test_replicated_work_is_listed() -> None:
    f = lambda x, y: (sharded(lambda x: x * 2, ALL, ALL)(x), y @ y)  # noqa: E731
    e = estimate(f, X, S((64, 64), F32), on=POD)
    assert any("repeated" in a for a in e.assumptions)


def test_training_loop_outside_keeps_the_carry_sharded() -> None:
    loss = sharded(
        lambda w, x: lax.pmean((x @ lax.all_gather(w, "tp", tiled=True)).sum(), ("dp", "tp")),
        (P("tp"), P("dp")),
        P(),
    )

    def train(w: Any, xs: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            w, m = carry
            return adam_like(w, m, jax.grad(loss)(w, x)), None

        return lax.scan(body, (w, jnp.zeros_like(w)), xs)[0]

    e = estimate(train, S((64, 64), F32), S((10, 48, 64), F32), on=POD)
    assert not any("repeated" in a or "changes its" in a for a in e.assumptions)
    assert any(isinstance(s, Loop) and s.trips == 10 for s in e.steps)
    assert e.memory.arguments_bytes == 8 * 64 * 4 + 10 * 64 * 4


def test_jit_shardings_divide_the_work() -> None:
    def f(x: Any, w: Any) -> Any:
        return x @ w

    place = (NamedSharding(MESH, P("dp", None)), NamedSharding(MESH, P(None, "tp")))
    e = estimate(jax.jit(f, in_shardings=place), S((480, 64), BF16), S((64, 800), BF16), on=POD)
    (step,) = ops(e, "matmul")
    assert step.time_s == matmul_time(10, 64, 100, POD).time_s


def test_partial_manual_shard_map() -> None:
    f = jax.shard_map(
        lambda x: lax.psum(x * 2, "dp"),
        mesh=MESH,
        in_specs=P("dp"),
        out_specs=P(),
        axis_names={"dp"},
    )
    (c,) = estimate(f, S((48, 8), F32), on=POD).collectives
    assert c.axes == ("dp",)


# -- clocks


def collective_op(positions: list[list[int]], seconds: float) -> CollectiveOp:
    table = np.array(positions)
    return CollectiveOp(
        name="c",
        op="all_reduce",
        algorithm="ring",
        reason="",
        nbytes=1,
        dtype="float32",
        groups=((table, np.full(len(table), seconds)),),
        bounds_s=(np.zeros(len(table)),),
        link_bytes=(),
    )


def kernel(seconds: float) -> Op:
    return Op(name="k", kind="vector", time_s=seconds, bound_s=0.0, limited_by="", flops=0, bytes=0)


def test_collective_waits_for_the_last_of_its_group() -> None:
    steps = [collective_op([[0, 1]], 1e-6), collective_op([[1, 2]], 2e-6)]
    line = play(steps, range(4))
    assert line.clocks_ps.tolist() == [10**6, 3 * 10**6, 3 * 10**6, 0]
    assert line.time_ps == 3 * 10**6
    assert sorted(map(len, line.lanes())) == [1, 1, 1, 1]


def test_bound_is_that_of_one_device_whatever_its_groups() -> None:
    """Two collectives in turn, of different devices: nobody takes part in both."""
    halves = [[*range(8)], [*range(8, 16)]]

    def f(x: Any) -> Any:
        for joined, apart in (halves, halves[::-1]):
            x = lax.psum(x, "x", axis_index_groups=[joined, *([d] for d in apart)])
        return x

    g = jax.shard_map(f, mesh=POD.mesh(x=16), in_specs=P("x"), out_specs=P("x"), check_vma=False)
    answer = estimate(g, S((16, 2**26), F32), on=POD)
    first, second = answer.collectives
    assert answer.time_s == pytest.approx(first.time_s) == pytest.approx(second.time_s)
    assert answer.bound.links_s == first.bound_s == second.bound_s <= answer.time_s
    assert answer.by_kind()["collective"] == pytest.approx(answer.time_s)


def test_slow_devices_work_longer_and_do_not_wait() -> None:
    """Half the rate on every device is twice the work, none of it waiting."""
    x = S((4, 2**20), F32)
    f = jax.shard_map(lambda x: x + 1, mesh=POD.mesh(x=4), in_specs=P("x"), out_specs=P("x"))
    slow = estimate(f, x, on=POD.degrade(devices=dict.fromkeys(range(4), 0.5)))
    assert slow.by_kind()["vector"] == pytest.approx(slow.time_s)
    healthy = estimate(f, x, on=POD)
    assert slow.time_s == pytest.approx(2 * healthy.time_s)

    def control_j(answer: Estimate) -> float:
        return next(p.high_j for p in answer.energy.parts if p.name == "clocks and control")

    assert control_j(slow) == pytest.approx(2 * control_j(healthy))


def test_loop_equals_its_unrolled_body() -> None:
    body = (kernel(1e-6), collective_op([[0, 1]], 1e-6), collective_op([[1, 2]], 3e-6))
    before = (collective_op([[0, 3]], 7e-6),)
    loop = play([*before, Loop(name="l", trips=50, body=body)], range(4))
    flat = play([*before, *(body * 50)], range(4))
    assert loop.clocks_ps.tolist() == flat.clocks_ps.tolist()


def test_long_loop_is_quick_even_when_groups_drift() -> None:
    """Two groups that never meet advance at their own rates; their trips are multiplied."""
    body = (collective_op([[0, 1]], 1e-6), collective_op([[2, 3]], 3e-6))
    line = play([Loop(name="l", trips=10**9, body=body)], range(4))
    assert line.clocks_ps.tolist() == [10**15] * 2 + [3 * 10**15] * 2
    assert len(line.spans) == 3


def test_identical_devices_share_a_lane() -> None:
    e = estimate(sharded(mlp, MLP_SPECS, P("dp", None)), *MLP_ARGS, on=POD)
    assert [len(lane) for lane in e.timeline.lanes()] == [384]


# -- memory


def buffers(**sizes: int) -> dict[int, Buffer]:
    return {
        i: Buffer(name=name, shape=(size,), dtype="uint8", bytes=size)
        for i, (name, size) in enumerate(sizes.items())
    }


def test_liveness_by_hand() -> None:
    """a -> b -> c, with a not donated: at the second step a, b and c live."""
    life = Lifetimes(
        buffers=buffers(a=100, b=10, c=1),
        moments=(
            Moment(name="first", reads=(0,), writes=(1,)),
            Moment(name="second", reads=(1,), writes=(2,)),
        ),
        held=frozenset({0}),
        results=frozenset({2}),
    )
    assert (peak(life).bytes, peak(life).at) == (111, "second")
    assert [b.name for b in peak(life).alive] == ["a", "b", "c"]


def test_in_place_takes_over_a_dying_operand() -> None:
    def life(in_place: bool) -> Lifetimes:
        return Lifetimes(
            buffers=buffers(a=100, b=100),
            moments=(Moment(name="step", reads=(0,), writes=(1,), in_place=in_place),),
            given=frozenset({0}),
            results=frozenset({1}),
        )

    assert peak(life(True)).bytes == 100
    assert peak(life(False)).bytes == 200


def test_donation_frees_the_argument() -> None:
    x = S((1024, 1024), F32)
    size = 4 * 1024**2
    f = lambda x: x * 2 + 1  # noqa: E731
    assert estimate(jax.jit(f), x, on=POD).memory.peak_bytes == 2 * size
    assert estimate(jax.jit(f, donate_argnums=0), x, on=POD).memory.peak_bytes == size


def test_scan_keeps_its_residuals_and_remat_does_not() -> None:
    def layers(body: Any) -> Any:
        return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=100)[0].sum()

    def body(c: Any) -> Any:
        return jnp.sin(jnp.cos(jnp.sin(c) @ jnp.ones((256, 256), c.dtype)))

    x = S((256, 256), F32)
    size = 4 * 256**2
    plain = estimate(jax.grad(layers(body)), x, on=POD).memory.peak_bytes
    remat = estimate(jax.grad(layers(jax.checkpoint(body))), x, on=POD).memory.peak_bytes
    assert plain > 300 * size
    assert 100 * size < remat < 120 * size


def test_collective_buffers_are_counted() -> None:
    one = estimate(sharded(lambda x: lax.psum(x, "tp"), ALL, P("dp")), X, on=POD)
    assert one.memory.communication_bytes == 2 * 200 * 10**6 * 2  # two buffers, two dies
    both = estimate(sharded(lambda x: lax.psum(lax.psum(x, "tp"), "dp"), ALL, P()), X, on=POD)
    assert both.memory.communication_bytes == 2 * one.memory.communication_bytes


def test_out_of_memory_is_said() -> None:
    e = estimate(lambda x: x @ x, S((300_000, 300_000), BF16), on=POD, allow_oom=True)
    assert not e.memory.fits
    assert e.memory.message.startswith("RESOURCE_EXHAUSTED: Out of memory")
    assert "Out of memory" in str(e)
    assert e.memory.alive[0].bytes == 2 * 300_000**2


# -- calls


def test_arguments_may_be_arrays_or_shapes() -> None:
    f = lambda p: p["a"] @ p["b"]  # noqa: E731
    arrays = {"a": np.ones((64, 32), np.float32), "b": jnp.ones((32, 16))}
    shapes = jax.tree.map(lambda a: S(a.shape, a.dtype), arrays)
    assert estimate(f, arrays, on=POD).time_s == estimate(f, shapes, on=POD).time_s


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: estimate(lambda x: x, X, on="pod"), TypeError, "Machine"),
        (lambda: estimate(3, X, on=POD), TypeError, "function"),
        (lambda: estimate(lambda x: jnp.sin(x), "text", on=POD), TypeError, "text"),
        (
            lambda: estimate(sharded(lambda x: x, ALL, ALL), X, on=gb200_nvl72()),
            ValueError,
            "384 devices.*72",
        ),
        (
            lambda: estimate(lambda x: {"x": x, "name": "loss"}, X, on=POD),
            TypeError,
            r"<lambda> returns str 'loss' at result\['name'\]",
        ),
    ],
)
def test_bad_calls_are_explained(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_run_counts_what_only_values_tell() -> None:
    """A loop of as many trips as the data say, inside a branch; times are those of an estimate with
    these counts.
    """

    def body(x: Any) -> Any:
        double = lambda c: c + lax.psum(c, "tp")  # noqa: E731
        y = lax.while_loop(lambda c: lax.pmax(c.max(), ("dp", "tp")) < 100, double, x)
        return lax.cond(lax.psum(y.sum(), ("dp", "tp")) > 0, lambda y: y @ y.T, lambda y: y, y)

    f = sharded(body, P(("dp", "tp")), P(("dp", "tp")), check_vma=False)
    x = np.ones((384 * 4, 4), np.float32)
    answer = run(f, x, on=POD, algorithms={"all_reduce": "ring"})
    assert answer.counts == {"while_0": 3.0, "cond_0": (0.0, 1.0)}  # 1, 9, 81, 729
    assert np.array_equal(answer.value, np.full((384 * 4, 4), 4 * 729.0**2, np.float32))
    told = estimate(f, x, on=POD, algorithms={"all_reduce": "ring"}, counts=answer.counts)
    assert answer.time_s == told.time_s
    # Not the memory that was looked at beforehand, of loops that nothing comes to.
    assert answer.memory == told.memory and "while_0 x0" not in answer.memory.at


def test_run_counts_loops_that_nobody_reaches() -> None:
    def f(n: Any, x: Any) -> Any:
        rounds = lambda x: lax.fori_loop(0, n, lambda i, x: x @ x, x)  # noqa: E731
        return lax.cond(n < 0, rounds, lambda x: x, x)

    x = np.eye(64, dtype=np.float32)
    answer = run(f, np.int32(3), x, on=POD)
    assert answer.counts == {"cond_0": (1.0, 0.0), "while_0": 0.0}
    assert estimate(f, np.int32(3), x, on=POD, counts=answer.counts).time_s == answer.time_s


def test_a_call_to_the_host_takes_the_seconds_that_are_given() -> None:
    def f(x: Any) -> Any:
        return jax.pure_callback(lambda y: y + 1, x, x) * 2

    x = np.ones((8, 8), np.float32)
    free = estimate(f, x, on=POD, counts={"pure_callback_0": 0})
    slow = estimate(f, x, on=POD, counts={"pure_callback_0": 0.25})
    assert slow.time_s == pytest.approx(free.time_s + 0.25, rel=1e-9)
    assert slow.bound_s == free.bound_s < free.time_s
    assert any("pure_callback_0 takes 0.25 s" in said for said in slow.assumptions)
    answer = run(f, x, on=POD, counts={"pure_callback_0": 0.25})
    assert np.array_equal(answer.value, x * 4)
    assert answer.time_s == slow.time_s and answer.counts == {"pure_callback_0": 0.25}
    for wrong in (-1, "long", float("inf")):
        with pytest.raises(ValueError, match="seconds of a call"):
            estimate(f, x, on=POD, counts={"pure_callback_0": wrong})
    with pytest.raises(ValueError, match="while_0"):
        run(f, x, on=POD, counts={"while_0": 3})


def test_run_refuses_before_it_computes() -> None:
    called: list[Any] = []
    with pytest.raises(ValueError, match="counts={'pure_callback_0'"):
        run(lambda x: jax.pure_callback(called.append, x, x), np.ones((8, 8), np.float32), on=POD)
    assert not called


@pytest.mark.parametrize("branch", [0, 1])
def test_a_call_to_the_host_needs_no_seconds_in_a_branch_that_is_never_taken(branch: int) -> None:
    """Libraries check values so: the branch for wrong ones raises in a callback."""

    def f(i: Any, x: Any) -> Any:
        ask = lambda: jax.pure_callback(lambda y: y + 1, x, x)  # noqa: E731
        rest = lambda: x * 2  # noqa: E731
        return lax.cond(i == 1, *((ask, rest) if branch else (rest, ask)))

    x = np.ones(4, np.float32)
    answer = run(f, 1 - branch, x, on=POD)
    assert answer.counts.keys() == {"cond_0"}
    assert not any("host" in said for said in answer.assumptions)
    assert estimate(f, 1, x, on=POD, counts=answer.counts).time_s == answer.time_s
    with pytest.raises(ValueError, match="counts={'pure_callback_0'"):
        run(f, branch, x, on=POD)
    assert run(f, branch, x, on=POD, counts={"pure_callback_0": 0.5}).time_s > 0.5


def test_other_machine_is_one_argument_away() -> None:
    mesh = gb200_nvl72().mesh(a=8)
    f = jax.shard_map(lambda x: lax.psum(x @ x.T, "a"), mesh=mesh, in_specs=P("a"), out_specs=P())
    x = S((8 * 1024, 4096), BF16)
    assert estimate(f, x, on=gb200_nvl72()).time_s < estimate(f, x, on=POD).time_s


def test_energy_grows_with_devices_and_is_ordered() -> None:
    e = estimate(sharded(mlp, MLP_SPECS, P("dp", None)), *MLP_ARGS, on=POD)
    assert 0 < e.energy.low_j < e.energy.high_j
    low, high = e.energy.power_w
    idle = 384 * POD.power.idle_device_w[0]
    assert idle < low < high <= POD.power.system_w[1] * 1.0001


@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(on: bool) -> None:
    was = gc.isenabled()
    seen = []

    def fun(x: Any) -> Any:
        seen.append(gc.isenabled())
        return x + 1

    (gc.enable if on else gc.disable)()
    try:
        estimate(fun, X, on=POD)
        assert gc.isenabled() is on
        with pytest.raises(ZeroDivisionError):
            estimate(lambda x: x / (1 // 0), X, on=POD)
        assert gc.isenabled() is on
    finally:
        (gc.enable if was else gc.disable)()
    assert seen == [False]


@pytest.mark.parametrize(("kind", "each"), [("fft", 5.0), ("rfft", 2.5)])
def test_operations_of_a_fourier_transform(kind: str, each: float) -> None:
    x = S((3, 1024), jnp.complex64 if kind == "fft" else F32)
    (step,) = ops(estimate(getattr(jnp.fft, kind), x, on=POD), "vector")
    assert step.flops == each * 3 * 1024 * 10


def test_operands_that_are_divided_otherwise_move_before_they_are_added() -> None:
    """On 8 devices, each sends 7 of 8 parts of what it has of one of them."""
    mesh = POD.mesh(x=8)
    specs = [P("x"), P(None, "x")]
    keep = jax.shard_map(
        lambda *args: [jnp.sin(x) for x in args], mesh=mesh, in_specs=tuple(specs), out_specs=specs
    )

    def moved(fun: Any) -> list[CollectiveOp]:
        answer = estimate(fun, S((1024, 1024), F32), S((1024, 1024), F32), on=POD)
        return [step for step in answer.steps if isinstance(step, CollectiveOp)]

    (step,) = moved(lambda a, b: (lambda y: y[0] + y[1])(keep(a, b)))
    assert step.op == "all_to_all" and step.nbytes == 1024 * 1024 * 4 // 8
    assert not moved(lambda a, b: (lambda y: (y[0] + 1, y[1] + 1))(keep(a, b)))


def test_products_of_integers_that_the_matrix_unit_does_not_have() -> None:
    """A multiplication and an addition each, on 64 lanes of 32 bits or 128 of 16."""
    found = []
    for dtype in (jnp.int16, jnp.int32):
        a, b = S((3, 64, 128), dtype), S((3, 128, 32), dtype)
        (step,) = ops(estimate(jnp.matmul, a, b, on=POD), "matmul")
        assert step.flops == 2 * 3 * 64 * 128 * 32
        assert step.matmul_s == 0 < step.vector_s
        found.append(step.vector_s)
    assert found[1] == 2 * found[0]


@pytest.mark.parametrize(
    ("power", "each"),
    [(2, 1), (3, 2), (4, 2), (7, 4), (8, 3), (-2, 1 + 4), (-3, 2 + 4)],
)
def test_operations_of_whole_powers(power: int, each: int) -> None:
    """Squares and products of them, and a division."""
    (step,) = ops(estimate(lambda x: lax.integer_pow(x, power), S((3, 100), F32), on=POD), "vector")
    assert step.flops == each * 300


def test_what_is_read_after_a_shard_map_is_copied_before_an_update_in_it() -> None:
    mesh = POD.mesh(a=4)

    def body(v: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(v, jnp.zeros((1, 512)), (0, 0))

    update = jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"))

    def updated(fun: Any) -> Op:
        found = estimate(fun, S((4 * 1000, 512), F32), on=POD).steps
        return next(s for s in found if s.name == "dynamic_update_slice")

    in_place = updated(lambda x: update(jnp.sin(x)))
    assert in_place.bytes == 2 * 512 * 4
    copied = updated(lambda x: [update(y := jnp.sin(x)), y.sum()])
    assert copied.bytes == 2 * 512 * 4 + 2 * 1000 * 512 * 4


@pytest.mark.parametrize(
    ("name", "make", "m", "each"),
    [
        ("cholesky", lambda x: lax.linalg.cholesky(x, symmetrize_input=False), 64, 64**3 / 3),
        ("lu", lax.linalg.lu, 64, 2 * 64**3 / 3),
        ("eigh", lax.linalg.eigh, 64, 9 * 64**3),
        ("svd", lax.linalg.svd, 96, 22 * 96 * 64**2),
        ("qr", lambda x: lax.linalg.qr(x, full_matrices=False), 96, 4 * 96 * 64**2),
        ("tridiagonal", lambda x: lax.linalg.tridiagonal(x)[0], 64, 4 * 64**3 / 3),
        ("triangular_solve", lambda x: lax.linalg.triangular_solve(x, x), 64, 64**3),
    ],
)
def test_operations_of_factorisations(name: str, make: Any, m: int, each: float) -> None:
    """Those of Golub and Van Loan for one matrix, times the matrices."""
    found = ops(estimate(make, S((5, m, 64), F32), on=POD), "vector")
    (step,) = (op for op in found if op.name.startswith(name))
    assert step.flops == int(5 * each)


def test_a_program_that_does_nothing_is_limited_by_nothing() -> None:
    answer = estimate(lambda x: x.reshape(-1), S((4, 4), jnp.float32), on=POD)
    assert answer.bound_s == 0 and answer.bound.limited_by == "nothing"
