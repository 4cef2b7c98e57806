"""Programs with 64-bit types in a process that does not use them: `jax.enable_x64` around a part of
a program makes such types, and whatever reads the program again must keep them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.extend import core

_WIDE = frozenset(("float64", "int64", "uint64", "complex128"))


def as_wide_as(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> AbstractContextManager[Any]:
    """JAX's 64-bit types, where the program has any."""
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return jax.enable_x64(True) if is_wide(opened) else nullcontext()


@functools.lru_cache(maxsize=256)
def is_wide(jaxpr: core.Jaxpr) -> bool:
    """Whether a jaxpr has values of 64-bit types, in its bodies among them."""
    return any(str(getattr(aval, "dtype", "")) in _WIDE for aval in _types(jaxpr))


def _types(jaxpr: Any) -> Iterator[Any]:
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    yield from (v.aval for v in (*opened.constvars, *opened.invars))
    for eqn in opened.eqns:
        yield from (v.aval for v in eqn.outvars)
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _types(inner)
