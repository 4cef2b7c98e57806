"""Mutable arrays (`jax.new_ref`, and what reverse mode makes of loops) turned into values.

JAX's own discharge rewrites a jaxpr that reads and writes references into one that passes values
on; it is applied here to every body that creates references, innermost first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import config
from jax._src.shard_map import _as_manual_mesh, _extend_axis_env
from jax._src.state.discharge import discharge_state
from jax._src.state.types import AbstractRef
from jax.extend import core

from emulator.program.calls import is_jaxpr
from emulator.program.contents import REFS, bodies, contents
from emulator.program.wide_types import as_wide_as


def without_refs(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program without references.

    Raises:
        NotImplementedError: a reference enters the program from outside.
    """
    for what, variables in (
        ("an argument", closed.jaxpr.invars),
        ("a value from outside the program", closed.jaxpr.constvars),
    ):
        if AbstractRef in [type(v.aval) for v in variables]:
            raise NotImplementedError(
                f"{what} is a jax.Ref: create it inside the program with jax.new_ref"
            )
    if not contents(closed.jaxpr).refs:
        return closed
    with as_wide_as(closed):
        jaxpr = _inner(closed.jaxpr)
        closed = core.ClosedJaxpr(jaxpr, closed.consts)
        if any(eqn.primitive.name in REFS for eqn in jaxpr.eqns):
            closed = discharge_state(closed)
    return closed


def _inner(jaxpr: Any) -> Any:
    """`jaxpr` with every body inside its equations free of references of its own."""
    eqns = []
    for eqn in jaxpr.eqns:
        if any(contents(body).refs for body in bodies(eqn.params)):
            with _inside(eqn):
                eqn = eqn.replace(params={k: _of_param(v) for k, v in eqn.params.items()})
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)


@contextmanager
def _inside(eqn: Any) -> Iterator[None]:
    """The mesh axes that the bodies of an equation may name."""
    if eqn.primitive.name != "shard_map":
        yield
        return
    mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
    with (
        _extend_axis_env(mesh, manual),
        jax.sharding.use_abstract_mesh(_as_manual_mesh(mesh, manual)),
        config._check_vma(eqn.params["check_vma"]),
    ):
        yield


def _of_param(value: Any) -> Any:
    if isinstance(value, tuple | list) and any(map(is_jaxpr, value)):
        items = [_of_param(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, core.ClosedJaxpr) and contents(value.jaxpr).refs:
        inner = core.ClosedJaxpr(_inner(value.jaxpr), value.consts)
        takes_refs = AbstractRef in map(type, inner.in_avals)
        return inner if takes_refs else discharge_state(inner)
    if isinstance(value, core.Jaxpr) and contents(value).refs:
        inner = _inner(value)
        takes_refs = AbstractRef in map(type, inner.in_avals)
        return inner if takes_refs else discharge_state(core.ClosedJaxpr(inner, ())).jaxpr
    return value
