"""Devices that take turns compute the bits that they compute all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.program import turns, values
from tests.test_values import same_bits

MACHINE = em.cloudmatrix384()


def attention(q: Any, k: Any, w: Any) -> Any:
    scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
    heads = jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores / 8).astype(jnp.bfloat16), k)
    out = jnp.einsum("bqd,do->bqo", heads, w, preferred_element_type=jnp.float32)
    return lax.psum(out, "tp"), w * 3, heads.T


def rows_and_columns(q: Any, k: Any, w: Any) -> Any:
    whole = lax.all_gather(q, "tp", axis=2, tiled=True)
    moved = lax.ppermute(k, "tp", [(0, 1), (1, 0)])
    return lax.pmax(whole, "tp"), w + 1, jnp.sum(moved.astype(jnp.float32), 1).T


def over_dp(q: Any, k: Any, w: Any) -> Any:
    return lax.psum(q, "tp") + lax.psum(k, "dp"), w, q.T


def a_loop(q: Any, k: Any, w: Any) -> Any:
    return lax.psum(lax.fori_loop(0, 3, lambda _, x: x + k, q), "tp"), w, q.T


def an_index(q: Any, k: Any, w: Any) -> Any:
    return lax.psum(q * lax.axis_index("dp").astype(q.dtype), "tp"), w, k.T


def a_call(q: Any, k: Any, w: Any) -> Any:
    there = jax.pure_callback(lambda x: np.asarray(x), k, k)
    return lax.psum(q + there, "tp"), w, k.T


def arguments() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((12, 16, 32), (12, 16, 32), (32, 64))
    numbers = [rng.normal(size=shape) * 2.0 ** rng.integers(-9, 9, shape) for shape in shapes]
    numbers[0].flat[:6] = np.inf, np.nan, -0.0, 1e-39, -1e-40, 3e38
    return [jnp.asarray(x, jnp.bfloat16) for x in numbers]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The turns that programs are evaluated in, as they are traced."""
    counts: list[int] = []

    def noted(*args: Any) -> int:
        counts.append(turns.turns(*args))
        return counts[-1]

    monkeypatch.setattr(values, "turns", noted)
    return counts


def evaluated(local: Callable[..., Any], dp: int, tp: int, **options: Any) -> Any:
    specs = P("dp", None, "tp"), P("dp", None, "tp"), P("tp")
    if local is attention:
        specs = P(("dp", "tp")), P(("dp", "tp")), P()
    outs = (
        P("dp"),
        specs[2],
        P(None, None, "dp") if local is not rows_and_columns else P(None, "dp"),
    )
    sharded = jax.shard_map(
        lambda *x: local(*x),
        mesh=MACHINE.mesh(dp=dp, tp=tp),
        in_specs=specs,
        out_specs=outs,
        check_vma=False,
    )
    return jax.jit(em.emulate(sharded, on=MACHINE, **options))(*arguments())


@pytest.mark.parametrize("local", [attention, rows_and_columns])
def test_the_bits_are_those_of_all_at_once(
    local: Callable[..., Any], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluated(local, 6, 2)
    monkeypatch.setattr(turns, "LARGEST_BYTES", 1 << 12)
    assert same_bits(evaluated(local, 6, 2), expected)
    assert taken[0] == 1 < taken[1]


def test_turns_are_as_few_as_fit(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 12 * 16 * 64 * 4  # heads of all devices times w
    for limit in (largest // 4, largest // 4 - 1, largest // 6, largest // 6 - 1):
        monkeypatch.setattr(turns, "LARGEST_BYTES", limit)
        evaluated(attention, 12, 1)
    assert taken == [1, 6, 6, 12]


@pytest.mark.parametrize(("n", "expected"), [(1, 3), (64, 1)])
def test_turns_are_worth_what_all_need(
    n: int, expected: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LARGEST_BYTES", 1)
    sharded = jax.shard_map(
        lambda x, w: lax.psum(x * w[0, 0], "tp"),
        mesh=MACHINE.mesh(dp=3, tp=8),
        in_specs=(P(("dp", "tp")), P()),
        out_specs=P("dp"),
    )
    jax.jit(em.emulate(sharded, on=MACHINE))(jnp.ones((24, 128)), jnp.ones((n, n)))
    assert taken == [expected]


def test_only_values_that_differ_count(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What has one copy for all of an axis is as large as one."""
    monkeypatch.setattr(turns, "LARGEST_BYTES", 24 * 128)
    for axes, rows in ((("dp", "tp"), 96), (("dp",), 12)):  # four for each device
        sharded = jax.shard_map(
            lambda x: x + 1,
            mesh=MACHINE.mesh(dp=3, tp=8),
            in_specs=P(axes),
            out_specs=P(axes),
        )
        jax.jit(em.emulate(sharded, on=MACHINE))(jnp.ones((rows, 128)))
    assert taken == [3, 1]


@pytest.mark.parametrize("local", [over_dp, a_loop, an_index, a_call])
def test_all_at_once(
    local: Callable[..., Any], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LARGEST_BYTES", 1)
    evaluated(local, 6, 2)
    assert taken == [1]


@pytest.mark.parametrize(("tp", "expected"), [(8, 3), (6, 1)])
def test_groups_that_add_in_different_orders_have_no_turns(
    tp: int, expected: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of the eight in a server, or some of two servers."""
    monkeypatch.setattr(turns, "LARGEST_BYTES", 1)
    sharded = jax.shard_map(
        lambda x: lax.psum(x, "tp"),
        mesh=MACHINE.mesh(dp=24 // tp, tp=tp),
        in_specs=P(("dp", "tp")),
        out_specs=P("dp"),
    )
    jax.jit(em.emulate(sharded, on=MACHINE))(jnp.ones((24, 128)))
    assert taken == [expected]


def test_loose_arithmetic_has_no_turns(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LARGEST_BYTES", 1)
    evaluated(attention, 6, 2, arithmetic="native")
    evaluated(attention, 6, 2, vector="native")
    assert taken == [1, 1]
