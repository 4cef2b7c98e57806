"""Steps that write to a `jax.Ref` of the script: as programs of values, written back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jax._src import core as jax_core
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.state.discharge import discharge_state
from jax.extend import core
from jax.sharding import AxisType, NamedSharding

from emulator.program.trace import open_jaxpr


def references(args: Sequence[Any]) -> list[Any]:
    """The references among flat arguments."""
    return [x for x in args if isinstance(x, jax_core.Ref)]


def held(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, arrays in the place of references."""
    return tuple(x._refs._buf if isinstance(x, jax_core.Ref) else x for x in args)


def of_values(params: dict[str, Any], refs: Sequence[Any]) -> dict[str, Any]:
    """The jit with `params` as one that takes what `refs` hold and returns, after its results,
    what they hold in the end.
    """
    more = len(refs)
    return {
        **params,
        "jaxpr": _discharged(params["jaxpr"]),
        "out_shardings": (*params["out_shardings"], *(_kept(ref) for ref in refs)),
        "out_layouts": (*params["out_layouts"], *(None,) * more),
    }


def write(refs: Sequence[Any], arrays: Sequence[Any]) -> None:
    for ref, array in zip(refs, arrays, strict=True):
        ref._refs._buf = array


@functools.lru_cache(maxsize=256)
def _discharged(jaxpr: Any) -> Any:
    consts = getattr(jaxpr, "consts", ())
    return discharge_state(core.ClosedJaxpr(open_jaxpr(jaxpr), consts))


def _kept(ref: Any) -> Any:
    """What is written stays where the reference is, unless types say where."""
    sharding = ref.sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit not in sharding.mesh.axis_types:
        return sharding
    return UNSPECIFIED
