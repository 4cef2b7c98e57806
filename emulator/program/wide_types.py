"""Programs with 64-bit types in a process that does not use them: `jax.enable_x64` around a part of
a program makes such types, and whatever reads the program again must keep them.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.extend import core

_WIDE = frozenset(map(np.dtype, ("float64", "int64", "uint64", "complex128")))


def as_wide_as(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> AbstractContextManager[Any]:
    """JAX's 64-bit types, where the program has any."""
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return jax.enable_x64(True) if is_wide(opened) else nullcontext()


@functools.lru_cache(maxsize=256)
def is_wide(jaxpr: core.Jaxpr) -> bool:
    """Whether a jaxpr has values of 64-bit types, in its bodies among them."""
    made = (v for eqn in jaxpr.eqns for v in eqn.outvars)
    for v in (*jaxpr.constvars, *jaxpr.invars, *made):
        if getattr(v.aval, "dtype", None) in _WIDE:
            return True
    bodies = (body for eqn in jaxpr.eqns for body in core.jaxprs_in_params(eqn.params))
    return any(is_wide(body) for body in bodies)
