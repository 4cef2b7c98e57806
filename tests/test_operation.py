"""An emulated program in a trace is one operation: nothing is evaluated before it is compiled, and
whatever takes it has the values that an evaluation at once has.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.program.trace import EMULATED
from emulator.program.values import Evaluator
from tests.programs import normal

MACHINE = em.cloudmatrix384()
MESH = MACHINE.mesh(dp=4, tp=2)


def _program(x: Any, w: Any) -> Any:
    def local(x: Any, w: Any) -> Any:
        y = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        return jnp.tanh(lax.psum(y, "tp"))

    specs = P("dp", "tp"), P("tp")
    return jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P("dp"))(x, w)


X, W = normal(8, 64), normal(64, 16, seed=1)


def same_bits(left: Any, right: Any) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the equations evaluated so far."""
    seen: list[str] = []
    equation = Evaluator.equation

    def noted(self: Evaluator, eqn: Any, values: Any, path: str) -> Any:
        seen.append(path)
        return equation(self, eqn, values, path)

    monkeypatch.setattr(Evaluator, "equation", noted)
    return seen


def test_a_trace_evaluates_nothing(evaluations: list[str]) -> None:
    emulated = em.emulate(_program, MACHINE)
    at_once = emulated(X, W)
    assert evaluations
    again = em.emulate(lambda x, w: _program(x, w), MACHINE)
    evaluations.clear()
    traced = jax.jit(again).trace(X, W)
    assert [eqn.primitive.name for eqn in traced.jaxpr.eqns] == [EMULATED]
    assert jax.eval_shape(again, X, W) == jax.ShapeDtypeStruct((8, 16), jnp.float32)
    assert not evaluations
    compiled = traced.lower().compile()
    assert evaluations
    assert same_bits(compiled(X, W), at_once)


def test_maps_and_derivatives_of_traced_programs() -> None:
    emulated = em.emulate(_program, MACHINE)
    jitted = jax.jit(emulated)
    stacked = jnp.stack([X, -X, 2 * X])
    want = [emulated(x, W) for x in stacked]
    for mapped in (jax.vmap(jitted, (0, None)), jax.jit(jax.vmap(emulated, (0, None)))):
        assert all(map(same_bits, mapped(stacked, W), want))

    def gradient(fun: Any) -> Any:
        return jax.grad(lambda x, w: jnp.sum(fun(x, w) ** 2), (0, 1))

    inside = em.emulate(gradient(_program), MACHINE)(X, W)
    ways = gradient(jitted), jax.jit(gradient(emulated)), gradient(jax.checkpoint(jitted))
    for way in ways:
        assert all(map(same_bits, way(X, W), inside))
    mapped = jax.vmap(gradient(jitted), (0, None))(stacked, W)
    assert all(map(same_bits, (part[0] for part in mapped), inside))
    first = jax.grad(lambda x: jnp.sum(jitted(x, W)))(X)
    assert same_bits(first, em.emulate(jax.grad(lambda x: jnp.sum(_program(x, W))), MACHINE)(X))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(jitted, (X, W), (X, W))


def test_what_a_trace_must_see_is_spelled_out() -> None:
    def with_callback(x: Any) -> Any:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda v: np.asarray(v) * 2, shape, x) + 1

    def with_print(x: Any) -> Any:
        jax.debug.print("seen {}", x[0], ordered=True)
        return x * 2

    x = jnp.arange(4.0)
    assert same_bits(jax.jit(em.emulate(with_callback, MACHINE))(x), x * 2 + 1)
    traced = jax.jit(em.emulate(with_print, MACHINE)).trace(x)
    assert traced.jaxpr.effects
    assert same_bits(traced.lower().compile()(x), x * 2)


def test_what_is_computed_does_not_depend_on_where_it_is_lowered() -> None:
    def drawn(x: Any) -> Any:
        return x + jax.random.uniform(jax.random.key(3), x.shape)

    def wide(x: Any) -> Any:
        return x.astype(jnp.float64) * (1 + 2.0**-40)

    x = np.linspace(0, 1, 5, dtype=np.float32)
    settings = jax.threefry_partitionable(False), jax.enable_x64(True)
    for fun, setting in zip((drawn, wide), settings, strict=True):
        with setting:
            want = jax.jit(fun)(x)
            traced = jax.jit(em.emulate(fun, MACHINE)).trace(x)
        assert same_bits(traced.lower().compile()(x), want)
    with jax.numpy_dtype_promotion("strict"), jax.set_mesh(jax.make_mesh((1,), ("own",))):
        assert same_bits(jax.jit(em.emulate(lambda x: x @ x, MACHINE))(x), np.float32(1.875))


def test_a_refusal_names_the_primitive_when_it_is_compiled() -> None:
    unknown = core.Primitive("unheard_of")
    unknown.def_abstract_eval(lambda x: x)
    traced = jax.jit(em.emulate(lambda x: unknown.bind(x) + 1, MACHINE)).trace(jnp.ones(3))
    with pytest.raises(NotImplementedError, match="unheard_of"):
        traced.lower()


def test_a_callers_rules_and_meshes_are_not_the_programs() -> None:
    def plain(x: Any, w: Any) -> Any:
        return lax.reduce(jnp.tanh(x @ w), np.float32(0), lax.add, (1,))

    def gradient(fun: Any) -> Any:
        return jax.grad(lambda x: fun(x, W)[3])

    mesh = jax.make_mesh((1,), ("own",), axis_types=(AxisType.Explicit,))
    emulated = em.emulate(plain, MACHINE)
    stacked = np.stack([X, -X])
    want = emulated(X, W), [emulated(x, W) for x in stacked], gradient(emulated)(X)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.set_mesh(mesh),
    ):
        jitted = jax.jit(em.emulate(plain, MACHINE))
        got = jitted(X, W), [*jax.vmap(jitted, (0, None))(stacked, W)], gradient(jitted)(X)
    assert all(map(same_bits, jax.tree.leaves(got), jax.tree.leaves(want)))
    emulated = em.emulate(plain, MACHINE)
    auto = jax.make_mesh((1,), ("own",), axis_types=(AxisType.Auto,))
    around = jax.shard_map(emulated, mesh=auto, in_specs=(P("own"), P()), out_specs=P("own"))
    assert same_bits(jax.jit(around)(X, W), want[0])


def test_derivatives_of_maps_are_the_programs_own() -> None:
    """Rules for derivatives that a program has count, and sums over devices have derivatives."""

    @jax.custom_vjp
    def clipped(x: Any) -> Any:
        return x * 1.0

    clipped.defvjp(lambda x: (x * 1.0, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    emulated, x = em.emulate(clipped, MACHINE), jnp.ones((3, 2))

    def total(mapped: Any) -> Any:
        return jax.grad(lambda x: mapped(x).sum())(x)

    for mapped in (jax.vmap(emulated), jax.vmap(jax.vmap(emulated)), jax.jit(jax.vmap(emulated))):
        np.testing.assert_array_equal(total(mapped), np.full((3, 2), np.float32(0.1)))
    np.testing.assert_array_equal(total(lambda x: lax.map(emulated, x)), total(jax.vmap(emulated)))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(jax.vmap(emulated), (x,), (x,))

    xs = jnp.stack([X, 2 * X, -X])
    loss = em.emulate(lambda x, w: _program(x, w).sum(), MACHINE)
    each = em.emulate(jax.grad(lambda x, w: _program(x, w).sum()), MACHINE)
    found = jax.grad(lambda xs: jax.vmap(loss, (0, None))(xs, W).sum())(xs)
    assert same_bits(found, jnp.stack([each(x, W) for x in xs]))


def test_references_from_outside_are_refused() -> None:
    ref = jax.new_ref(jnp.zeros(3))

    def adds(x: Any) -> Any:
        ref[...] += x
        return x * 2

    with pytest.raises(NotImplementedError, match=r"from outside the program is a jax\.Ref"):
        em.emulate(adds, MACHINE)(jnp.ones(3))
    with pytest.raises(NotImplementedError, match=r"an argument is a jax\.Ref"):
        em.emulate(lambda ref: ref[...], MACHINE)(ref)

    def has_one_of_its_own(x: Any) -> Any:
        own = jax.new_ref(x)
        own[...] += ref[...]
        return own[...]

    with pytest.raises(NotImplementedError, match=r"from outside the program is a jax\.Ref"):
        em.emulate(has_one_of_its_own, MACHINE)(jnp.ones(3))


def test_an_error_while_tracing_names_the_function() -> None:
    def chooses(x: Any, flag: Any) -> Any:
        return x if flag else -x

    with pytest.raises(jax.errors.TracerBoolConversionError, match="tracing the function chooses"):
        em.emulate(chooses, MACHINE)(jnp.ones(3), True)
