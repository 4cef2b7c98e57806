"""A program that is one `shard_map` is left alone where nothing is left to the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emulator.machines import Machine
from emulator.mesh import abstract_mesh
from emulator.program.auto_sharded import trace_divided
from emulator.program.one_map import is_one_map
from emulator.program.trace import DIVIDED, walk
from emulator.script.same import same_program

MESH = abstract_mesh({"x": 2, "y": 4})
HALF = {"in_specs": P("x"), "out_specs": P("x"), "axis_names": {"x"}}  # "y" is the compiler's
SPECS = {"in_specs": (P(), P("x", "y")), "out_specs": P("x")}


def local(w: jax.Array, v: jax.Array) -> jax.Array:
    return jax.lax.psum(v @ w, "y")


def mapped(**options: Any) -> Callable[..., Any]:
    return jax.shard_map(local, mesh=MESH, **{**SPECS, **options})


def over(*spec: Any, mesh: Any = MESH) -> NamedSharding:
    return NamedSharding(mesh, P(*spec))


ELSEWHERE = abstract_mesh({"x": 2, "y": 4}, devices=(7, 6, 5, 4, 3, 2, 1, 0))
ALONE: list[tuple[bool, Callable[..., Any], Any, Any]] = [
    (True, mapped(), None, None),
    (True, mapped(), over(), over("x", "y")),
    (True, mapped(), over(None), over("x", ("y",))),
    (True, jax.jit(jax.jit(mapped())), None, over("x", "y")),
    (True, jax.jit(mapped(), in_shardings=(over(), over("x", "y"))), None, None),
    (True, jax.jit(mapped(), out_shardings=over("x")), None, over("x", "y")),
    (False, mapped(), over("x"), over("x", "y")),  # the first would have to be gathered
    (False, mapped(), None, over("y", "x")),
    (False, mapped(), None, over("x", "y", mesh=ELSEWHERE)),
    (False, jax.jit(mapped(), in_shardings=(over("x"), over("x", "y"))), None, None),
    (False, jax.jit(mapped(), out_shardings=over("y")), None, None),
    (False, lambda w, v: mapped()(w, v) + 1, None, over("x", "y")),
    (False, lambda w, v: (mapped()(w, v), w), over("x"), None),  # past the map
    (False, jax.shard_map(jnp.add, mesh=MESH, **HALF), None, None),
]


@pytest.mark.parametrize(("alone", "fun", "w", "v"), ALONE)
def test_one_map_with_arrays_as_it_wants_them(
    alone: bool, fun: Callable[..., Any], w: Any, v: Any
) -> None:
    shapes: Any = (
        jax.ShapeDtypeStruct((2, 3), jnp.float32),
        jax.ShapeDtypeStruct((4, 8), jnp.float32),
    )
    if "add" in str(fun):
        shapes = shapes[1], shapes[1]
    assert is_one_map(jax.make_jaxpr(fun)(*shapes), (w, v)) is alone


def test_what_a_jit_asks_for_is_how_its_arguments_come() -> None:
    """Results of one `jax.pmap`, over a mesh of its own, are arguments of another."""
    other = abstract_mesh({"a": 2, "b": 4})
    shapes = [
        jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=over(mesh=other)),
        jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=over("a", "b", mesh=other)),
    ]
    asks = jax.jit(mapped(), in_shardings=(over(), over("x", "y")))
    for fun, divided in ((asks, False), (jax.jit(mapped()), True)):
        program = trace_divided(fun, shapes)
        found = any(eqn.params.get("name") == DIVIDED for _, eqn in walk(program.jaxpr))
        assert found is divided


def test_equal_programs() -> None:
    x, y = np.ones(3, np.float32), np.ones((3, 1), np.float32)
    kept = jnp.zeros(1)

    def traced(scale: float, power: int, constant: Any = kept, x: Any = x) -> Any:
        @jax.jit
        def f(x: jax.Array) -> Any:
            def turn(c: jax.Array, _: None) -> Any:
                return jax.nn.relu(c) * scale + constant, c**power

            return jax.lax.scan(turn, x, None, length=2)

        return jax.make_jaxpr(f)(x)

    one = traced(0.1, 3)
    assert same_program(one, traced(0.1, 3))
    assert not same_program(one, traced(float(np.nextafter(np.float32(0.1), 1)), 3))
    assert not same_program(one, traced(0.1, 2))
    assert not same_program(one, traced(0.1, 3, jnp.ones(1)))
    assert not same_program(one, traced(0.1, 3, x=y))


def test_swapped_arguments_are_another_program() -> None:
    def of(f: Callable[..., Any]) -> Any:
        return jax.make_jaxpr(f)(1.0, 2.0)

    assert same_program(of(lambda a, b: a - b), of(lambda a, b: a - b))
    assert not same_program(of(lambda a, b: a - b), of(lambda a, b: b - a))
    assert not same_program(of(lambda a, b: (a, b)), of(lambda a, b: (b, a)))
    assert not same_program(of(lambda a, b: a), of(lambda a, b: (a, a)))


def test_a_pmap_is_differentiated_outside(cloud: Machine) -> None:
    """An auto-sharded program would have no rule for that."""
    import emulator as em

    fun = jax.jit(mapped(), in_shardings=(over(), over("x", "y")), out_shardings=over("x"))
    w, v = np.ones((2, 3), np.float32), np.ones((4, 8), np.float32)
    emulated = em.emulate(fun, on=cloud, arithmetic="native")
    found = jax.grad(lambda w: emulated(w, v).sum())(w)
    np.testing.assert_array_equal(found, np.full((2, 3), 16.0))
