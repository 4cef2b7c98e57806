"""Flax (nnx), Equinox and Optax as their users write them: trained data-parallel over a mesh.

Two steps are computed on the virtual machine and by plain JAX, the devices mapped by `jax.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.machines import Machine

DEVICES, ROWS, WIDTH, STEPS = 4, 2, 8, 2

Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of all devices."""
    random = np.random.default_rng(3)
    x, y = random.standard_normal((2, DEVICES * ROWS, WIDTH)).astype(np.float32)
    return x, y


def squared(predicted: jax.Array, wanted: jax.Array) -> jax.Array:
    return optax.losses.squared_error(predicted, wanted).mean()


class FlaxBlock(nnx.Module):
    """A pre-norm attention and MLP block, parameters in FP32, products in BF16."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        types = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32, "rngs": rngs}
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, **types)
        self.up, self.down = (
            nnx.Linear(WIDTH, 2 * WIDTH, **types),
            nnx.Linear(2 * WIDTH, WIDTH, **types),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x)[None])[0]
        return x + self.down(nnx.gelu(self.up(x)))


def flax_loss() -> tuple[Any, Loss]:
    graph, params = nnx.split(FlaxBlock(nnx.Rngs(0)), nnx.Param)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return squared(nnx.merge(graph, params)(x).astype(jnp.float32), y)

    return params, loss


def equinox_loss() -> tuple[Any, Loss]:
    model = eqx.nn.MLP(WIDTH, WIDTH, 16, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        predicted = jax.vmap(eqx.combine(half, static))(x.astype(jnp.bfloat16))
        return squared(predicted.astype(jnp.float32), y)

    return params, loss


MODELS = {"flax": flax_loss, "equinox": equinox_loss}


def training(loss: Loss, optimizer: Any) -> Callable[..., Any]:
    """What one device does in a step, under the axis "dp"."""

    def local(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        found, gradient = jax.value_and_grad(loss)(params, x, y)
        gradient = jax.tree.map(lambda g: lax.psum(g, "dp") / DEVICES, gradient)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, lax.pmean(found, "dp")

    return local


@pytest.mark.parametrize("name", MODELS)
def test_a_users_model_trains_alike(name: str, cloud: Machine) -> None:
    params, loss = MODELS[name]()
    optimizer = optax.adamw(1e-2)
    local = training(loss, optimizer)
    x, y = data()
    specs = {"in_specs": (P(), P(), P("dp"), P("dp")), "out_specs": P(), "check_vma": False}
    sharded = jax.shard_map(local, mesh=cloud.mesh(dp=DEVICES), **specs)
    native = em.emulate(sharded, on=cloud, arithmetic="native", vector="native")
    each = jax.jit(jax.vmap(local, axis_name="dp", in_axes=(None, None, 0, 0)))

    def plain(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        rows = (a.reshape(DEVICES, ROWS, WIDTH) for a in (x, y))
        return jax.tree.map(lambda leaf: leaf[0], each(params, state, *rows))

    cube = em.emulate(sharded, on=cloud, vector="native")  # quicker to compile
    answer = em.estimate(sharded, params, optimizer.init(params), x, y, on=cloud)
    assert answer.time_s >= answer.bound_s > 0
    assert {c.op for c in answer.collectives} == {"all_reduce"}

    # BF16 products round at 2**-9 of values near 1; Adam's first steps are about 1e-2 each and have
    # the gradient's sign, which roundings may turn where it is nearly 0.
    expected = trained(plain, params, optimizer.init(params), x, y)
    assert expected[1][1] < expected[1][0]
    for way, tolerance in ((native, 1e-5), (cube, 4e-2)):
        found = trained(way, params, optimizer.init(params), x, y)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance)


def trained(step: Callable[..., Any], params: Any, state: Any, *batch: Any) -> tuple[Any, Any]:
    """Parameters after two steps, and the losses."""
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    return params, losses


@pytest.mark.parametrize("kind", ["lax", "bounded", "checkpointed"])
def test_equinox_loops_are_entered(kind: str, cloud: Machine) -> None:
    """What solvers built on Equinox (Diffrax, Optimistix) run in."""
    steps = {} if kind == "lax" else {"max_steps": 16}

    def grown(x: jax.Array) -> jax.Array:
        loop = eqx.internal.while_loop(
            lambda c: jnp.max(c[1]) < 40,
            lambda c: (c[0] + 1, c[1] * 1.5),
            (0, x),
            kind=kind,
            **steps,
        )
        return loop[1]

    x = jnp.arange(1.0, 5.0)
    programs = [grown] if kind == "lax" else [grown, jax.grad(lambda v: grown(v).sum())]
    for program in programs:
        answer = em.run(program, x, on=cloud)
        np.testing.assert_array_equal(answer.value, program(x))
        assert answer.counts and answer.time_s >= answer.bound_s > 0
