"""JAX's settings while this package evaluates: a caller's rules are for the caller's code.

The program has been traced under the caller's strict promotion of dtypes and ranks. NaNs are looked
for in its results alone: intermediate ones are the arithmetic's (a value looked at as bits, a lane
that is thrown away).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config


def own_rules() -> AbstractContextManager[None]:
    """Standard promotion, no search for NaNs and infinities."""
    promotion = config.numpy_dtype_promotion.value, config.numpy_rank_promotion.value
    searches = config.debug_nans.value or config.debug_infs.value
    return _own_rules() if searches or promotion != ("standard", "allow") else nullcontext()


@contextmanager
def _own_rules() -> Iterator[None]:
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


def check_results(arrays: Iterable[Any]) -> None:
    """What `jax_debug_nans` and `jax_debug_infs` ask, of results that are at hand.

    Raises:
        FloatingPointError: as JAX does.
    """
    asked = {"nan": config.debug_nans.value, "inf": config.debug_infs.value}
    if not (asked["nan"] or asked["inf"]):
        return
    for x in arrays:
        if isinstance(x, jax.core.Tracer) or not jnp.issubdtype(x.dtype, jnp.inexact):
            continue
        for name, test in (("nan", np.isnan), ("inf", np.isinf)):
            if asked[name] and test(np.asarray(x)).any():
                raise FloatingPointError(f"invalid value ({name}) in a result of the program")
