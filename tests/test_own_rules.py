"""The caller's strict settings are for the caller's code, not for the evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import emulator as em
from emulator.machines import Machine


def step(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def test_strict_promotion_reaches_the_program_alone(cloud: Machine) -> None:
    a = jnp.asarray(np.arange(-8.0, 8.0).reshape(2, 8), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = em.emulate(step, on=cloud)(a, a.T)
        with pytest.raises(ValueError, match="promotion"):
            em.emulate(lambda a, b: a + b, on=cloud)(a, a.astype(jnp.float32))
    np.testing.assert_array_equal(found, np.float32([[204, -84], [-84, 140]]))


def test_nans_are_looked_for_in_results(cloud: Machine) -> None:
    a = jnp.asarray([[1e-38, -0.0], [3.0, np.inf]], jnp.bfloat16)
    emulated = em.emulate(step, on=cloud)
    with jax.debug_nans(True):
        assert np.isinf(emulated(a, jnp.ones((2, 1), jnp.bfloat16))).any()
        with pytest.raises(FloatingPointError, match=r"\(nan\) in a result"):
            emulated(a, jnp.asarray([[1.0], [0.0]], jnp.bfloat16))
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match=r"\(inf\) in a result"):
        emulated(a, jnp.ones((2, 1), jnp.bfloat16))


@pytest.mark.parametrize("around", [False, True])
def test_random_numbers_are_drawn_as_where_the_program_was_traced(
    cloud: Machine, around: bool
) -> None:
    def draws(key: jax.Array) -> tuple[jax.Array, ...]:
        plain = jax.random.bits(key, (3,)), jax.random.key_data(jax.random.split(key))
        with jax.threefry_partitionable(not around):
            return *plain, jax.random.bits(key, (3,)), jax.random.key_data(jax.random.split(key))

    key = jax.random.key(72)
    with jax.threefry_partitionable(around):
        native = jax.jit(draws)(key)
        emulated = em.emulate(draws, on=cloud)(key)
    assert not np.array_equal(native[0], native[2]) and not np.array_equal(native[1], native[3])
    for got, want in zip(emulated, native, strict=True):
        np.testing.assert_array_equal(got, want)


def test_64_bit_types_are_kept_where_the_program_alone_has_them(cloud: Machine) -> None:
    mesh = cloud.mesh(x=4)

    def ninth_digits(x: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            wide = x.astype(jnp.float64) * 1e-9 + 1
            wide = jax.lax.fori_loop(0, 2, lambda _, v: v + x * 1e-9, wide)
            high = jnp.arange(4).astype(jnp.int64) * 2**33 >> 33
            return ((wide - 1) * 1e9 + high[: wide.shape[0]]).astype(jnp.float32)

    def total(x: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            return jax.lax.psum(x.astype(jnp.float64) * 1e-9 + 1, "x")

    def gradient(of: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.jit(jax.grad(lambda x: of(x).sum()))(x)

    x = jnp.arange(4, dtype=jnp.float32)
    emulated = em.emulate(ninth_digits, on=cloud, arithmetic="native")
    native = jax.jit(ninth_digits)
    assert np.allclose(native(x), 4 * np.arange(4), atol=1e-5)
    np.testing.assert_array_equal(emulated(x), native(x))
    np.testing.assert_array_equal(emulated(np.arange(4.0)), native(x))
    np.testing.assert_array_equal(jax.jit(jax.vmap(emulated))(x[None]), native(x)[None])
    np.testing.assert_array_equal(gradient(emulated), gradient(native))
    divided = jax.jit(ninth_digits, in_shardings=NamedSharding(mesh, PartitionSpec("x")))
    answer = em.run(divided, x, on=cloud, arithmetic="native")
    np.testing.assert_array_equal(answer.value, native(x))
    mapped = jax.shard_map(total, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec())
    summed = np.asarray(em.run(mapped, x, on=cloud, arithmetic="native").value)
    assert summed.dtype == np.float64 and abs(summed[0] - 4 - 6e-9) < 1e-14


@pytest.mark.parametrize("setting", [jax.disable_jit, lambda: jax.enable_checks(True)])
def test_what_helps_to_find_faults_changes_nothing(
    setting: Callable[[], contextlib.AbstractContextManager[None]], cloud: Machine
) -> None:
    def summed(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.psum(step(a, b), "x")

    specs = PartitionSpec("x"), PartitionSpec()
    program = jax.shard_map(summed, mesh=cloud.mesh(x=4), in_specs=specs, out_specs=PartitionSpec())
    a = jnp.asarray(np.random.default_rng(3).normal(size=(8, 16)), jnp.bfloat16)
    expected = np.asarray(em.emulate(program, on=cloud)(a, a.T))
    with setting():
        found = em.emulate(lambda a, b: program(a, b), on=cloud)(a, a.T)
        time_s = em.estimate(lambda a, b: program(a, b), a, a.T, on=cloud).time_s
    assert np.asarray(found).tobytes() == expected.tobytes()
    assert time_s > 0
