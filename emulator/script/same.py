"""Whether two traces of one function compute the same: then one evaluation, compiled once, serves
both. JAX traces again when arguments come from other devices than before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from emulator.program.calls import is_jaxpr
from emulator.program.trace import open_jaxpr

#: What says how to differentiate or where tracing stood, not what is computed.
_ASIDE = frozenset("jvp_jaxpr_fun jvp_jaxpr_thunk fwd_jaxpr_thunk bwd out_trees ctx_mesh".split())


def same_program(one: core.ClosedJaxpr, other: core.ClosedJaxpr) -> bool:
    """Whether equations, constants and shapes are equal, one by one."""
    consts = zip(one.consts, other.consts, strict=False)
    return (
        len(one.consts) == len(other.consts)
        and all(a is b for a, b in consts)
        and _same_jaxpr(one.jaxpr, other.jaxpr)
    )


def _same_jaxpr(one: core.Jaxpr, other: core.Jaxpr) -> bool:
    if len(one.eqns) != len(other.eqns):
        return False
    names: dict[Any, Any] = {}  # variables of `one` -> those of `other`
    if not _bind(names, [*one.constvars, *one.invars], [*other.constvars, *other.invars]):
        return False
    for a, b in zip(one.eqns, other.eqns, strict=True):
        fits = a.primitive is b.primitive and _used(names, a.invars, b.invars)
        if not (fits and _same_params(a.params, b.params) and _bind(names, a.outvars, b.outvars)):
            return False
    return _used(names, one.outvars, other.outvars)


def _bind(names: dict[Any, Any], ones: list[Any], others: list[Any]) -> bool:
    names.update(zip(ones, others, strict=False))
    return len(ones) == len(others) and all(
        _kind(a) == _kind(b) for a, b in zip(ones, others, strict=True)
    )


def _kind(variable: Any) -> Any:
    aval = variable.aval
    return (type(aval), *(getattr(aval, n, None) for n in ("shape", "dtype", "weak_type")))


def _used(names: dict[Any, Any], ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(
        _same(a.val, b.val) and _kind(a) == _kind(b)
        if isinstance(a, core.Literal) and isinstance(b, core.Literal)
        else not isinstance(a, core.Literal) and names[a] is b
        for a, b in zip(ones, others, strict=True)
    )


def _same_params(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        _same(one[name], other[name]) for name in one.keys() - _ASIDE
    )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if is_jaxpr(one):
        consts = getattr(one, "consts", ()), getattr(other, "consts", ())
        return (
            len(consts[0]) == len(consts[1])
            and all(a is b for a, b in zip(*consts, strict=True))
            and _same_jaxpr(open_jaxpr(one), open_jaxpr(other))
        )
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray | np.generic | jax.Array | float):
        a, b = np.asarray(one), np.asarray(other)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    try:
        return bool(one == other)
    except (TypeError, ValueError):
        return False
