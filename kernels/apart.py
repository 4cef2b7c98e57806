"""Calls that XLA:CPU leaves calls: what they do is compiled apart from what is around it."""

from __future__ import annotations

import jax
from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata


def calls_stay() -> bool:
    """Whether the XLA of this process knows calls that it does not inline."""
    return jax.default_backend() == "cpu"


def apart(result: Array) -> Array:
    """The `result` of a jitted function, whose call XLA:CPU does not inline.

    So nothing around it is fused into the function, where each of its loops might compute it again,
    and nothing of it into what is around; and calls of equal shapes share their kernels, which are
    otherwise compiled for each.
    """
    if not calls_stay():
        return result
    apart_from_all: Array = set_xla_metadata(result, inlineable="false")
    return apart_from_all


def materialised(x: Array) -> Array:
    """`x` as one array, not computed again where it is used."""
    return apart(_same(x))


@jax.jit
def _same(x: Array) -> Array:
    return x
