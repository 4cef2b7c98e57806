"""What is anywhere in a program, its bodies included, found in one walk."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

_WIDE = frozenset(map(np.dtype, ("float64", "int64", "uint64", "complex128")))
REFS = frozenset(("new_ref", "empty_ref", "run_state"))


class Contents(NamedTuple):
    """`wide`: values of 64-bit types. `refs`: equations that create references."""

    wide: bool
    refs: bool


@functools.lru_cache(maxsize=256)
def contents(jaxpr: core.Jaxpr) -> Contents:
    """What an open jaxpr contains."""
    dtypes, primitives = set(), set()
    left = [jaxpr]
    while left:
        body = left.pop()
        for v in (*body.constvars, *body.invars):
            dtypes.add(getattr(v.aval, "dtype", None))
        for eqn in body.eqns:
            primitives.add(eqn.primitive.name)
            for v in eqn.outvars:
                dtypes.add(getattr(v.aval, "dtype", None))
            left += bodies(eqn.params)
    return Contents(wide=not _WIDE.isdisjoint(dtypes), refs=not REFS.isdisjoint(primitives))


def bodies(params: Mapping[str, Any]) -> list[core.Jaxpr]:
    """The open jaxprs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                found.append(item.jaxpr if isinstance(item, core.ClosedJaxpr) else item)
    return found
