"""Every primitive of the installed JAX works, in and outside `shard_map`, or is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.program import primitive_table
from emulator.program.trace import trace, walk
from tests import collective_programs
from tests.primitive_programs import PROGRAMS, inputs

POD = em.cloudmatrix384()
DEVICES = 8


def bound_by(program: Any, *args: Any) -> set[str]:
    """Primitives of a program, references before they become values among them."""
    found = {eqn.primitive.name for _, eqn in walk(trace(program, args).jaxpr)}
    return found | {eqn.primitive.name for _, eqn in walk(jax.make_jaxpr(program)(*args))}


@pytest.mark.parametrize("name", PROGRAMS)
def test_works_inside_and_outside_shard_map(name: str) -> None:
    """XLA alone is the reference: shard for shard, and of the whole."""
    x, n = inputs(DEVICES)
    program = PROGRAMS[name]
    native = jax.jit(program)
    wanted = [
        native(*shard) for shard in zip(np.split(x, DEVICES), np.split(n, DEVICES), strict=True)
    ]
    sharded = jax.shard_map(
        lambda a, b: [v[None] for v in program(a, b)],
        mesh=POD.mesh(x=2, y=DEVICES // 2),
        in_specs=P(("x", "y")),
        out_specs=P(("x", "y")),
        check_vma=False,
    )
    got = em.emulate(sharded, POD, arithmetic="native")(x, n)
    outside = em.emulate(program, POD, arithmetic="native")(x[:4], n[:4])
    for i, (every, alone) in enumerate(zip(got, outside, strict=True)):
        for d in range(DEVICES):
            same(every[d], wanted[d][i], f"{name}[{i}] on device {d}")
        same(alone, wanted[0][i], f"{name}[{i}] outside")


def same(got: Any, wanted: Any, what: str) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
    if jnp.issubdtype(got.dtype, jnp.inexact):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5, err_msg=what)
    else:
        np.testing.assert_array_equal(got, wanted, err_msg=what)


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n != "host"])
def test_has_a_cost(name: str) -> None:
    x, n = inputs(DEVICES)
    spec = P(("x", "y"))
    options = {"in_specs": spec, "out_specs": spec, "check_vma": False}
    program = PROGRAMS[name]
    sharded = jax.shard_map(
        lambda a, b: [v[None] for v in program(a, b)], mesh=POD.mesh(x=2, y=4), **options
    )
    try:
        answer = em.estimate(sharded, x, n, on=POD)
        assert answer.time_s >= answer.bound_s > 0
        return
    except ValueError as error:
        assert "depend on values" in str(error)
    answer = em.run(sharded, x, n, on=POD, arithmetic="native")
    assert answer.time_s >= answer.bound_s > 0
    again = em.estimate(sharded, x, n, on=POD, counts=answer.counts)
    assert again.time_s == answer.time_s


#: Prints the names of all primitives in JAX's own modules.
WALK = """
import gc, importlib, pkgutil, jax.extend
skipped = "pallas", "mosaic", "jax.tools", "jax2tf", "jax._src.test", "jax.test", "triton"
for module in pkgutil.walk_packages(jax.__path__, "jax."):
    if not any(part in module.name for part in skipped):
        try:
            importlib.import_module(module.name)
        except Exception:
            continue  # needs another package or platform
print(*{p.name for p in gc.get_objects() if isinstance(p, jax.extend.core.Primitive)})
"""


# -- collectives and random programs, on 8 real host devices and emulated: the same bits


def native(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.collective_programs", str(path), *names]
    subprocess.run(command, env=env, cwd=Path(__file__).parents[1], check=True)
    with np.load(path) as file:
        return dict(file)


def compare(names: Sequence[str], path: Path) -> None:
    expected = native(path, names)
    mesh = POD.mesh(**collective_programs.SHAPE)
    for name in names:
        build = collective_programs.FIXED.get(name) or collective_programs.random_program(int(name))
        program = em.emulate(build(mesh), POD, arithmetic="native")
        outputs = jax.tree.leaves(program(collective_programs.VALUES))
        assert f"{name}/{len(outputs)}" not in expected
        for i, got in enumerate(outputs):
            want = expected[f"{name}/{i}"]
            assert got.dtype == want.dtype, f"{name}/{i}"
            np.testing.assert_array_equal(got, want, err_msg=f"program {name}, result {i}")


def test_collectives_of_every_kind(tmp_path: Path) -> None:
    compare(list(collective_programs.FIXED), tmp_path / "fixed.npz")


def test_random_programs(tmp_path: Path) -> None:
    compare([str(seed) for seed in range(12)], tmp_path / "random.npz")


@pytest.mark.slow
def test_many_random_programs(tmp_path: Path) -> None:
    compare([str(seed) for seed in range(12, 200)], tmp_path / "random.npz")


# -- the table


def test_every_primitive_is_in_the_table() -> None:
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WALK], capture_output=True, text=True, check=True
    ).stdout
    known = {row.name for row in primitive_table.rows()}
    assert len(printed.split()) > 300
    assert set(printed.split()) - known == set()


def test_what_the_table_calls_modelled_has_been_bound() -> None:
    """No row says that a primitive works which no program of the tests binds."""
    x, n = inputs(1)
    bound = set().union(*(bound_by(program, x, n) for program in PROGRAMS.values()))
    mesh = POD.mesh(**collective_programs.SHAPE)
    sharded = [build(mesh) for build in collective_programs.FIXED.values()]
    bound = bound.union(*(bound_by(program, collective_programs.VALUES) for program in sharded))
    claimed = {row.name for row in primitive_table.rows() if row.works}
    assert claimed - bound - ELSEWHERE == set()


#: Bound by tests of their own; by transformations or in lowering, never by a program; or under one
#: of JAX's versions only.
ELSEWHERE = frozenset(
    """ragged_all_to_all pmin pbroadcast stage reshard sharding_constraint
    accum_grad_in_ref addupdate call closed_call consume assert_consumed_value custom_jvp_call_jaxpr
    empty2 empty_ref eval_jaxpr free_ref iota_2x32_shape philox2x32 philox4x32 threefry2x32
    threefry4x32 run_state select_and_scatter to_edtype from_edtype zeros_like
    with_memory_space_constraint
    log2 one_minus_square polynomial relayout vary_unreduced_cast reduced_vary_cast
    vary_unreduced_cast_p reduced_vary_cast_p shard_alike unreduced_pmax unreduced_pmin""".split()
)


def test_the_printed_table_is_up_to_date() -> None:
    assert primitive_table.PATH.read_text() == primitive_table.text()


def test_what_nobody_knows_is_refused_by_name() -> None:
    strange = jax.extend.core.Primitive("test_strange")
    strange.def_abstract_eval(lambda x: x)
    for call in (em.emulate(strange.bind, POD), lambda x: em.estimate(strange.bind, x, on=POD)):
        with pytest.raises(NotImplementedError, match="test_strange"):
            call(np.ones(3, np.float32))
    with pytest.raises(NotImplementedError, match="pallas_call.*another chip"):
        from jax.experimental import pallas as pl

        kernel = pl.pallas_call(lambda a, o: None, jax.ShapeDtypeStruct((8,), jnp.float32))
        em.emulate(kernel, POD)(jnp.ones(8))
    with pytest.raises(NotImplementedError, match="pallas_call.*another chip"):
        em.estimate(kernel, jnp.ones(8), on=POD)
    with pytest.raises(NotImplementedError, match="psend"):
        mesh = POD.mesh(x=2)
        send = jax.shard_map(
            lambda v: (lax.psend(v, "x", [(0, 1)]), v)[1],
            mesh=mesh,
            in_specs=P("x"),
            out_specs=P("x"),
        )
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            em.emulate(send, POD)(jnp.ones(2))


def of_a_library(name: str, impl: Any) -> Any:
    primitive = jax.extend.core.Primitive(name)
    primitive.def_impl(impl)
    primitive.def_abstract_eval(lambda x, **_: x)
    return primitive


def test_a_librarys_own_primitive_is_what_it_is_in_operations_of_jax() -> None:
    def grown(x: Any, *, by: float) -> Any:
        return lax.while_loop(lambda v: jnp.any(v < 8), lambda v: v @ v.T[: v.shape[1]] + by, x)

    primitive = of_a_library("test_grown", grown)
    x = np.random.default_rng(0).uniform(0.5, 0.9, (DEVICES * 4, 4)).astype(np.float32)

    def sharded(fun: Any) -> Any:
        spec = P(("x", "y"))
        return jax.shard_map(
            fun, mesh=POD.mesh(x=2, y=4), in_specs=spec, out_specs=spec, check_vma=False
        )

    both = [lambda v: primitive.bind(v, by=0.5), lambda v: grown(v, by=0.5)]
    for pair, v in ((both, x[:4]), (list(map(sharded, both)), x)):
        found, wanted = (em.run(f, v, on=POD, arithmetic="native") for f in pair)
        np.testing.assert_array_equal(found.value, wanted.value)
        assert found.counts == wanted.counts and found.counts
        assert found.time_s == wanted.time_s > 0


def test_a_librarys_primitive_that_is_not_jax_inside_is_refused_by_name() -> None:
    primitive = of_a_library("test_numpy", lambda x: np.sort(np.asarray(x)))
    for call in (em.emulate(primitive.bind, POD), lambda x: em.estimate(primitive.bind, x, on=POD)):
        with pytest.raises(NotImplementedError, match="'test_numpy' is a library's own"):
            call(np.ones(3, np.float32))
