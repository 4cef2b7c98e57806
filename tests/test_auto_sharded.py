"""Programs that leave the division of their arrays to the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src import dispatch
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.program import callback_calls
from emulator.timeline import CollectiveOp, each
from tests import random_auto_programs
from tests.auto_programs import AXES, DEVICES, PROGRAMS, integers, plain

POD = em.cloudmatrix384()
MESH = POD.mesh(**AXES)


def natively(module: str, path: Path, *words: str) -> dict[str, np.ndarray]:
    """What JAX itself computes on eight host devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    here = Path(__file__).resolve()
    subprocess.run(
        [sys.executable, here.with_name(module), path, *words],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    return dict(np.load(path))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return natively("auto_programs.py", tmp_path_factory.mktemp("native") / "results.npz")


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_those_of_a_real_mesh(name: str, native: dict[str, np.ndarray]) -> None:
    build, args, exact = PROGRAMS[name]
    if exact:
        result = em.run(build(MESH), *args, on=POD, arithmetic="native")
        value = result.value
        assert result.time_s > result.bound_s > 0
    else:  # the estimate is that of `run`; XLA's own element-wise work compiles faster
        value = em.emulate(build(MESH), on=POD, arithmetic="native", vector="native")(*args)
        assert em.estimate(build(MESH), *args, on=POD).time_s > 0
    leaves = [plain(leaf) for leaf in jax.tree.leaves(value)]
    for i, leaf in enumerate(leaves):
        wanted = native[f"{name}/{i}"]
        assert leaf.shape == wanted.shape and leaf.dtype == wanted.dtype
        if exact:
            np.testing.assert_array_equal(leaf, wanted, err_msg=f"output {i}")
        else:
            np.testing.assert_allclose(leaf, wanted, rtol=2e-4, atol=2e-5, err_msg=f"output {i}")
    assert len(leaves) == sum(key.startswith(f"{name}/") for key in native)


def collectives(estimate: Any) -> list[tuple[str, tuple[str, ...], int, float]]:
    """Operation, axes, bytes and how often."""
    return [
        (s.op, s.axes, s.nbytes, n) for s, n in each(estimate.steps) if isinstance(s, CollectiveOp)
    ]


def test_a_layer_divided_as_megatron_does_has_two_all_reduces() -> None:
    mesh = POD.mesh(dp=48, tp=8)
    layers, width, tokens = 61, 1024, 96

    def forward(weights: Any, h: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            qkv, out, up, down = w
            h = h + jnp.tanh(h @ qkv) @ out
            return h + jax.nn.gelu(h @ up) @ down, None

        return lax.scan(layer, h, weights)[0]

    def shape(*sizes: int, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    columns, rows = P(None, None, "tp"), P(None, "tp")
    weights = (
        shape(layers, width, width, spec=columns),
        shape(layers, width, width, spec=rows),
        shape(layers, width, 4 * width, spec=columns),
        shape(layers, 4 * width, width, spec=rows),
    )
    answer = em.estimate(forward, weights, shape(tokens, width, spec=P("dp")), on=POD)
    local = tokens // 48 * width * 2  # BF16, as the program has it
    assert collectives(answer) == [("all_reduce", ("tp",), local, layers)] * 2
    matmuls = [row for row in answer.rows() if row.kind == "matmul"]
    assert sum(row.count for row in matmuls) == 4 * layers
    assert all("test_auto_sharded.py:" in row.where and "(" in row.where for row in matmuls)
    flops = 2 * tokens // 48 * layers * width * (2 * width + 8 * width) // 8
    assert sum(row.flops for row in matmuls) == flops
    assert any("partitioner" in note for note in answer.assumptions)
    assert answer.memory.arguments_bytes == layers * width * width * 10 // 8 * 2 + local


def test_the_matmuls_are_the_machines() -> None:
    a = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.bfloat16)
    b = jnp.asarray(np.random.default_rng(1).standard_normal((64, 16)), jnp.bfloat16)

    def product(a: Any, b: Any) -> Any:
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    place = NamedSharding(MESH, P("dp")), NamedSharding(MESH, P(None, "tp"))
    divided = jax.jit(product, in_shardings=place)
    here = em.emulate(divided, on=POD)(a, b)
    whole = em.emulate(product, on=POD)(a, b)
    other = em.emulate(divided, on=POD, arithmetic="native")(a, b)
    assert np.array_equal(np.asarray(here).view(np.uint32), np.asarray(whole).view(np.uint32))
    assert not np.array_equal(np.asarray(here), np.asarray(other))


def test_shardings_in_types() -> None:
    mesh = POD.mesh(**AXES, axis_types=AxisType.Explicit)

    def shape(*sizes: int, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    def program(a: Any, b: Any) -> Any:
        return jnp.dot(a, b, out_sharding=NamedSharding(mesh, P("dp"))).sum()

    answer = em.estimate(
        program, shape(8, 6, spec=P("dp", "tp")), shape(6, 4, spec=P("tp")), on=POD
    )
    assert collectives(answer) == [
        ("all_reduce", ("tp",), 2 * 4 * 4, 1),
        ("all_reduce", ("dp",), 4, 1),
    ]


def test_devices_are_those_of_the_mesh() -> None:
    far = POD.mesh(x=2, devices=[0, 200])
    near = POD.mesh(x=2, devices=[0, 1])

    def time(mesh: Any) -> float:
        place = NamedSharding(mesh, P("x"))
        total = jax.jit(lambda x: x.sum(0), in_shardings=place)
        answer = em.estimate(total, jax.ShapeDtypeStruct((2, 1 << 20), jnp.float32), on=POD)
        assert answer.devices == ((0, 200) if mesh is far else (0, 1))
        return answer.time_s

    assert time(far) > time(near)


def test_a_dimension_divided_over_part_of_an_axis() -> None:
    def program(a: Any) -> Any:  # (8, 3) over 8 devices as (2, 4, 3): the axis is cut in two
        return a.reshape(2, 4, 3).sum(1) + a.sum()

    mesh = POD.mesh(x=8)
    whole = jax.jit(program, in_shardings=NamedSharding(mesh, P("x")))
    a = integers(8, 3)
    answer = em.run(whole, a, on=POD)
    np.testing.assert_array_equal(answer.value, program(a))
    assert answer.mesh == "x=8"
    names = {row.name for row in answer.rows() if row.kind == "collective"}
    assert "psum x" in names and len(names) > 1, names


def test_a_derivative_from_outside_is_refused() -> None:
    total = jax.jit(lambda x: (x**2).sum(), in_shardings=NamedSharding(MESH, P("dp")))
    x = jnp.arange(8.0)
    with pytest.raises(NotImplementedError, match="derivative inside"):
        jax.grad(em.emulate(total, on=POD))(x)
    inside = em.emulate(jax.grad(total), on=POD)(x)
    np.testing.assert_array_equal(inside, 2 * x)


def compare_random(seeds: range, path: Path) -> None:
    wanted = natively("random_auto_programs.py", path, *map(str, seeds))
    mesh = POD.mesh(**random_auto_programs.AXES)
    for seed in seeds:
        program = em.emulate(random_auto_programs.build(seed, mesh), POD, arithmetic="native")
        for i, got in enumerate(program(*random_auto_programs.ARGUMENTS)):
            want = wanted[f"{seed}/{i}"]
            np.testing.assert_array_equal(got, want, err_msg=f"program {seed}, result {i}")


def test_random_programs(tmp_path: Path) -> None:
    compare_random(range(2), tmp_path / "random.npz")


@pytest.mark.slow
def test_many_random_programs(tmp_path: Path) -> None:
    compare_random(range(2, 60), tmp_path / "random.npz")


@pytest.mark.parametrize("parameters", [P(("dp", "tp")), P(("tp", "dp"))])
def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter(parameters: P) -> None:
    """Fully sharded parameters: their gradients are summed and divided at once."""
    w, x = integers(16, 8).astype(np.float32), integers(32, 16, seed=1).astype(np.float32)
    over = NamedSharding(MESH, parameters), NamedSharding(MESH, P(("dp", "tp")))

    def gradient(w: Any, x: Any) -> Any:
        return jax.grad(lambda w: (x @ w).sum())(w)

    def mean_too(w: Any, x: Any) -> Any:
        g = gradient(w, x)
        return lax.with_sharding_constraint(g, over[0]), g.sum(), jnp.sort(g, axis=None)[0]

    scattered = jax.jit(gradient, in_shardings=over, out_shardings=over[0])
    answer = em.run(scattered, w, x, on=POD, arithmetic="native")
    np.testing.assert_array_equal(answer.value, np.repeat(x.sum(0)[:, None], 8, 1))
    ops = [step.op for step, _ in each(answer.steps) if isinstance(step, CollectiveOp)]
    assert ops == ["reduce_scatter"]
    # The whole sum is wanted, too.
    both = em.run(jax.jit(mean_too, in_shardings=over), w, x, on=POD, arithmetic="native")
    np.testing.assert_array_equal(both.value[0], answer.value)
    assert both.value[1] == 8 * x.sum() and both.value[2] == x.sum(0).min()


def test_random_numbers_that_are_divided_take_no_loop() -> None:
    def noise(spec: P) -> Any:
        where = NamedSharding(MESH, spec)
        return jax.jit(lambda key: jax.random.normal(key, (64, 64)), out_shardings=where)

    key = jax.random.key(3)
    divided, plain = noise(P("dp", "tp")), jax.jit(lambda key: jax.random.normal(key, (64, 64)))
    times_s = [em.estimate(f, key, on=POD).time_s for f in (divided, plain)]
    assert times_s[0] < 10 * times_s[1]  # not the launches of five rounds in a loop
    value = em.emulate(divided, on=POD, arithmetic="native")(key)
    bits = [np.asarray(x).view(np.uint32) for x in (value, plain(key))]
    assert (bits[0] == bits[1]).mean() > 0.9  # the rest: log1p's last bit


def test_products_and_bitwise_reductions_over_devices() -> None:
    words = np.random.default_rng(3).integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    powers = np.exp2(words % 5 - 2).astype(np.float32)  # whose products are exact in any order

    def program(words: Any, powers: Any) -> Any:
        bits = [f(words, (0,)) for f in (lax.reduce_and, lax.reduce_or, lax.reduce_xor)]
        holds = jnp.any(powers > 3, 0), jnp.all(words > -(2**30), 0)
        return *bits, *holds, jnp.prod(words, 0), jnp.prod(powers, 0)

    divided = jax.jit(program, in_shardings=NamedSharding(POD.mesh(x=4), P("x")))
    answer = em.run(divided, words, powers, on=POD, arithmetic="native")
    for got, want in zip(answer.value, program(words, powers), strict=True):
        np.testing.assert_array_equal(got, want)
    sent = collectives(answer)
    assert [(op, axes, n) for op, axes, _, n in sent] == [("all_reduce", ("x",), 1.0)] * 7
    assert sorted(nbytes for _, _, nbytes, _ in sent) == [8, 8, 32, 32, 32, 32, 32]
    both = jax.vmap(em.emulate(divided, on=POD))(np.stack([words, -words]), np.ones((2, 16, 8)))
    np.testing.assert_array_equal(both[2][1], lax.reduce_xor(-words, (0,)))


def test_trips_of_loops_of_arrays_with_shardings_in_their_types() -> None:
    machine = em.cloudmatrix384()
    mesh = machine.mesh(x=8, axis_types=(AxisType.Explicit,))
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("x")))

    def program(length: int) -> Any:
        return lambda a: lax.scan(lambda c, _: (c * 2, None), a, None, length=length)[0]

    with jax.sharding.use_abstract_mesh(mesh):
        short, long = (em.estimate(program(n), shape, on=machine).time_s for n in (3, 30))
    assert 9 < long / short < 11


def test_weak_types_stay_weak() -> None:
    mesh = em.cloudmatrix384().mesh(x=8)

    def program(x: Any, factor: Any) -> Any:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P("x"))), factor * 2

    x, factor = em.emulate(program, em.cloudmatrix384())(jnp.ones(8, jnp.bfloat16), 2.0)
    assert factor.weak_type
    assert (x * factor).dtype == jnp.bfloat16


def test_what_has_no_translation_is_named() -> None:
    def program(x: Any) -> Any:
        jax.debug.print("{}", x, ordered=True)
        return x

    place = NamedSharding(MESH, P("dp"))
    with pytest.raises(ValueError, match="ordered effects are not supported"):
        em.estimate(jax.jit(program, in_shardings=place), jnp.ones((4, 4)), on=POD)

    def in_order(x: Any) -> Any:
        return io_callback(lambda v: v, x, x, ordered=True)

    with pytest.raises(NotImplementedError, match="'io_callback' in order"):
        em.emulate(jax.jit(in_order, in_shardings=place), on=POD)(jnp.ones((4, 4)))


def test_meshes_of_different_sizes_are_refused() -> None:
    other = NamedSharding(POD.mesh(z=3), P("z"))

    def program(x: Any) -> Any:
        return lax.with_sharding_constraint(x, other)

    with pytest.raises(ValueError, match="different sizes"):
        em.estimate(
            jax.jit(program, in_shardings=NamedSharding(MESH, P("dp"))), jnp.ones((12,)), on=POD
        )


@pytest.mark.parametrize("placed", [False, True])
def test_calls_to_the_host_are_made_once_with_whole_arrays(placed: bool) -> None:
    """As JAX makes them outside of `shard_map`; inside, on every device."""
    x = integers(16, 8).astype(np.float32)
    over = NamedSharding(MESH, P("dp", "tp"))
    names = "debug io effect inside never row".split()
    seen: dict[str, list[Any]] = {name: [] for name in names}

    def noted(name: str, like: Any = None) -> Any:
        def call(*values: Any) -> Any:
            seen[name].append([np.array(v) for v in values])
            return None if like is None else np.float32(2) * values[0]

        return call

    def program(x: Any) -> Any:
        x = lax.with_sharding_constraint(x + 1, over)
        jax.debug.callback(noted("debug"), x, x.sum())
        lax.cond(x.sum() > 1e9, lambda: jax.debug.callback(noted("never"), x), lambda: None)
        doubled = io_callback(noted("io", x), x, x)

        def body(total: Any, row: Any) -> Any:
            io_callback(noted("effect"), None, row)
            cube = jax.pure_callback(lambda v: v * v * v, jax.typeof(row), row)
            return total + cube, cube

        total, cubes = lax.scan(body, x[0], x)
        spec = P("dp", "tp")

        def local(v: Any) -> Any:
            jax.debug.callback(noted("inside"), v)
            first = lax.axis_index("dp") == 0
            lax.cond(first, lambda: jax.debug.callback(noted("row"), v), lambda: None)
            return v

        inside = jax.shard_map(local, mesh=MESH, in_specs=spec, out_specs=spec)(x)
        return doubled, total, cubes, inside

    asked = jax.jit(program, in_shardings=NamedSharding(MESH, P("tp")))
    doubled, total, cubes, inside = em.emulate(asked if placed else program, on=POD)(x)
    jax.effects_barrier()
    y = x + 1
    np.testing.assert_array_equal(doubled, 2 * y)
    np.testing.assert_array_equal(cubes, y**3)
    np.testing.assert_array_equal(total, y[0] + (y**3).sum(0))
    np.testing.assert_array_equal(inside, y)
    ((whole, summed),) = seen["debug"]
    assert np.array_equal(whole, y) and summed == y.sum()
    assert len(seen["io"]) == 1 and np.array_equal(seen["io"][0][0], y)
    assert np.array_equal(np.sort([v for (v,) in seen["effect"]], 0), np.sort(y, 0))
    assert not seen["never"] and len(seen["row"]) == AXES["tp"]
    assert len(seen["inside"]) == DEVICES and sum(v.sum() for (v,) in seen["inside"]) == y.sum()


def test_two_threads_lower_calls_to_the_host() -> None:
    """What JAX demands of such calls is one set: a thread that leaves first does not put it back
    while another is inside.
    """
    started, left = threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        started.set()
        with callback_calls.without_devices():
            seen.append(len(dispatch.prim_requires_devices_during_lowering & hosts))
            left.wait(0.2)
            seen.append(len(dispatch.prim_requires_devices_during_lowering & hosts))

    hosts = set(callback_calls.HOST)
    whole = dispatch.prim_requires_devices_during_lowering & hosts
    thread = threading.Thread(target=other)
    with callback_calls.without_devices():
        thread.start()
        started.wait(5)
        thread.join(0.1)
    left.set()
    thread.join(5)
    assert seen == [0, 0]
    assert dispatch.prim_requires_devices_during_lowering & hosts == whole
