"""Programs whose meshes stand in types and contexts: explicit axes, `use_abstract_mesh`, reduced
and unreduced values, references inside `shard_map`; and arguments on several real devices.

Sums are of small whole numbers, so every order of them gives the same bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.program.hlo_channels import with_own_channels

POD = em.cloudmatrix384()
X = np.arange(32, dtype=np.float32).reshape(8, 4)


def explicit(**axes: int) -> Any:
    return POD.mesh(axis_types=AxisType.Explicit, **axes)


def emulated(program: Any, mesh: Any, *args: Any) -> Any:
    """`program` under the context of an abstract mesh: it needs no mesh of its own."""
    with jax.sharding.use_abstract_mesh(mesh):
        answer = em.run(program, *args, on=POD, arithmetic="native")
        again = em.emulate(program, POD, arithmetic="native")(*args)
        assert jax.tree.all(jax.tree.map(np.array_equal, answer.value, again))
    assert answer.time_s >= answer.bound_s > 0
    return answer.value


def test_the_context_gives_shard_map_its_mesh() -> None:
    def program(x: Any) -> Any:
        x = jax.reshard(x, P("x", "y"))
        total = jax.shard_map(lambda a: lax.psum(a, "x"), out_specs=P(None, "y"))(x)
        return 2 * total, jnp.einsum("ij,kj->ik", x, x, out_sharding=P("x"))

    total, product = emulated(program, explicit(x=4, y=2), X)
    assert np.array_equal(total, 2 * X.reshape(4, 2, 4).sum(0))
    assert np.array_equal(product, X @ X.T)
    with jax.sharding.use_abstract_mesh(explicit(x=4, y=2)):
        mapped = jax.vmap(em.emulate(program, POD))(np.stack([X, X]))
    assert np.array_equal(mapped[0][1], total) and np.array_equal(mapped[1][1], product)


def test_a_program_may_enter_its_mesh_itself() -> None:
    """Whatever jits it then needs no context, which `jax.jit` takes of real devices only."""
    mesh = explicit(x=4, y=2)

    def program(x: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return 2 * jax.reshard(x, P("x", "y")).sum(0)

    for f in (em.emulate(program, POD), jax.jit(em.emulate(program, POD))):
        assert np.array_equal(f(X), 2 * X.sum(0))
    assert em.estimate(program, X, on=POD).devices == tuple(range(8))


def test_one_function_under_several_meshes_is_several_programs() -> None:
    def program(x: Any) -> Any:
        return jax.shard_map(lambda a: lax.psum(a, "x"), in_specs=P("x"), out_specs=P())(x)

    function = em.emulate(program, POD)
    for n in (2, 4, 2):
        with jax.sharding.use_abstract_mesh(POD.mesh(x=n)):
            assert np.array_equal(function(X), X.reshape(n, 8 // n, 4).sum(0))
            answer = em.run(program, X, on=POD)
            assert np.array_equal(answer.value, X.reshape(n, 8 // n, 4).sum(0))
            assert answer.time_s == em.estimate(program, X, on=POD).time_s
    with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank_promotion"):
        narrow = em.emulate(jnp.add, POD)
        with jax.numpy_rank_promotion("allow"):
            assert np.array_equal(narrow(X, X[0]), X + X[0])
        narrow(X, X[0])


def test_collectives_of_one_shard_map_keep_their_own_groups() -> None:
    """JAX numbers them all alike, and XLA's module names groups by number."""

    def both(a: Any) -> Any:
        rows = lax.all_gather(a, "y", axis=1, tiled=True)
        return lax.psum(rows, "x") + lax.axis_index("y")

    mesh = POD.mesh(x=4, y=2)
    sharded = jax.shard_map(both, mesh=mesh, in_specs=P("x", "y"), out_specs=P(None, "y"))
    program = jax.jit(sharded, in_shardings=NamedSharding(mesh, P("x", "y")))
    total = X.reshape(4, 2, 4).sum(0)
    expected = np.concatenate([total, total + 1], axis=1)
    assert np.array_equal(em.emulate(program, POD)(X), expected)


def test_channels_are_numbered_again() -> None:
    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3 & 0x7F | 0x80, number >> 4, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def module(*channels: int) -> bytes:
        plain = field(2, field(1, b"add"))
        sent = b"".join(field(2, field(1, b"psum") + field(26, c)) for c in channels)
        return field(1, b"main") + field(3, plain + sent) + field(3, plain)

    assert with_own_channels(module(1, 1, 7)) == module(1, 2, 3)


def test_scatters_of_a_batch_keep_their_operation() -> None:
    def program(x: Any, at: Any, y: Any) -> Any:
        x, at, y = (jax.reshard(v, P("x")) for v in (x, at, y))
        changed = [
            jax.vmap(lambda v, i, u: v.at[i].mul(u))(x, at, y),
            jax.vmap(lambda v, i, u: v.at[i].max(u))(x, at, y),
            jax.vmap(lambda v, i, u: v.at[i].set(u))(x, at, y),
        ]
        return changed, jax.grad(lambda v: jax.vmap(lambda r, i: r[i])(v, at).sum())(x)

    at, y = np.arange(4, dtype=np.int32), np.arange(4, dtype=np.float32) * 2
    x = X.reshape(4, 8)
    (product, largest, replaced), picked = emulated(program, explicit(x=2, y=2), x, at, y)
    rows = np.arange(4)
    for got, new in ((product, x[rows, at] * y), (largest, y.clip(x[rows, at])), (replaced, y)):
        expected = x.copy()
        expected[rows, at] = new
        assert np.array_equal(got, expected)
    assert np.array_equal(picked, np.eye(4, 8))


def test_reduced_weights_and_their_gradients() -> None:
    """Weights divided over one axis, gathered as reduced: gradients are summed on the way back."""

    def loss(x: Any, w: Any) -> Any:
        mark = jax.shard_map(
            lambda a: lax.pcast(a, "dp", to="reduced"), out_specs=P("tp", reduced={"dp"})
        )
        whole = jax.shard_map(
            lambda a: lax.all_gather(a, "tp", tiled=True, to="reduced"),
            out_specs=P(reduced={"dp", "tp"}),
        )
        return jnp.einsum("bi,io->bo", x, whole(mark(w)), out_sharding=P(("dp", "tp"))).sum()

    def program(x: Any, w: Any) -> Any:
        x, w = jax.reshard(x, P(("dp", "tp"))), jax.reshard(w, P("tp"))
        return jax.value_and_grad(loss, (0, 1))(x, w)

    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    value, (dx, dw) = emulated(program, explicit(dp=4, tp=2), X, w)
    assert value == (X @ w).sum()
    assert np.array_equal(dx, np.tile(w.sum(1), (8, 1)))
    assert np.array_equal(dw, np.tile(X.sum(0)[:, None], (1, 3)))


def test_parts_of_a_sum_are_no_result() -> None:
    def product(x: Any) -> Any:
        x = jax.reshard(x, P(None, "y"))
        return jnp.einsum("ij,kj->ik", x, x, out_sharding=P(unreduced={"y"}))

    mesh = explicit(x=4, y=2)
    whole = emulated(lambda x: jax.reshard(product(x), P("x")), mesh, X)
    assert np.array_equal(whole, X @ X.T)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(NotImplementedError, match=r"result 0 .* unreduced over \['y'\]"):
            em.emulate(product, POD)(X)


def test_references_inside_shard_map() -> None:
    def body(a: Any) -> Any:
        ref = jax.new_ref(jnp.zeros_like(a))
        ref[...] = a
        ref[0] += lax.axis_index("x").astype(a.dtype)
        lax.fori_loop(0, 2, lambda i, _: ref.__setitem__(i, ref[i] + lax.psum(a[i], "x")), None)
        return jax.freeze(ref)

    mesh = POD.mesh(x=4)
    program = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    expected = X.reshape(4, 2, 4) + X.reshape(4, 2, 4).sum(0)
    expected[:, 0] += np.arange(4)[:, None]
    assert np.array_equal(em.emulate(program, POD)(X), expected.reshape(8, 4))


def test_four_bit_numbers_have_values_but_no_time() -> None:
    program = jax.shard_map(
        lambda a: lax.ppermute(a, "x", [(0, 1), (1, 0)]),
        mesh=POD.mesh(x=2),
        in_specs=P("x"),
        out_specs=P("x"),
    )
    x = jnp.arange(4).astype(jnp.int4)
    assert em.emulate(program, POD)(x).tolist() == [2, 3, 0, 1]
    with pytest.raises(NotImplementedError, match="permute of int4"):
        em.estimate(program, x, on=POD)


#: Arguments that lie on several devices of the process, with axes of either type.
PLACED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import emulator as em

pod = em.cloudmatrix384()
table = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
rows = np.arange(32, dtype=np.int32).reshape(8, 4)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    here = NamedSharding(mesh, P("x", None, None))
    args = [jax.device_put(table, NamedSharding(mesh, P(None, "x")))]
    args.append(jax.device_put(rows, NamedSharding(mesh, P("x"))))
    args.append(jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh, P("x"))))

    def picked(table, rows, keys):
        noise = jax.vmap(lambda k: jax.random.bits(k, (4, 16)))(keys)
        if kind == AxisType.Explicit:
            return table.at[rows].get(out_sharding=here), noise
        return jax.lax.with_sharding_constraint(table[rows], here), noise

    for context in (None, mesh):
        with jax.set_mesh(context):
            native = jax.jit(picked)(*args)
            for f in (em.emulate(picked, pod), lambda *a: em.run(picked, *a, on=pod).value):
                for got, want in zip(f(*args), native, strict=True):
                    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    sharded = jax.shard_map(lambda a: jax.lax.psum(a, "x"), mesh=mesh, in_specs=P(None, "x"),
                            out_specs=P())
    native = np.asarray(jax.jit(sharded)(args[0]))
    for context in (None, mesh):
        with jax.set_mesh(context):
            jitted = jax.jit(em.emulate(sharded, pod))(args[0])
            np.testing.assert_array_equal(np.asarray(jitted), native)
    if kind == AxisType.Auto:
        both = jax.grad(lambda a: (em.emulate(sharded, pod)(a) ** 2).sum())(args[0])
        native = jax.grad(lambda a: (jax.jit(sharded)(a) ** 2).sum())(args[0])
        np.testing.assert_array_equal(np.asarray(both), np.asarray(native))

# What a jit closes over has a type, too; so has what an outer gradient is taken of.
typed = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(typed):
    whole, parts = (jnp.arange(8.0, out_sharding=P(axis)) for axis in (None, "x"))
    key = jax.device_put(jax.random.key(3), P())
    random = em.emulate(jax.jit(lambda: jax.random.bits(key, (4,))), pod)()
    assert np.array_equal(random, jax.random.bits(jax.random.key(3), (4,)))
    for kept in (whole, parts):
        scaled = jax.jit(lambda v: jax.lax.fori_loop(0, 2, lambda _, u: u * kept, v * kept))
        native = np.asarray(scaled(whole))
        for f in (em.emulate(scaled, pod), jax.jit(em.emulate(scaled, pod))):
            assert np.array_equal(f(whole), native)
    assert em.estimate(jax.jit(lambda: parts * 2), on=pod).devices == (0, 1, 2, 3)
    for f in (lambda v: (v * whole).sum(), jax.jit(lambda v: (v * whole).sum())):
        for v in (whole, np.ones(8, np.float32)):
            assert np.array_equal(jax.grad(em.emulate(f, pod))(v), np.arange(8.0))
"""


def test_arguments_on_several_real_devices() -> None:
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", PLACED], env=env, cwd=Path(__file__).parents[1], check=True
    )
