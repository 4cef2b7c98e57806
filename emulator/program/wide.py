"""The same program in FP64: what it would compute if (nearly) nothing were rounded.

Every floating value, matmul and collective is widened, bits drawn from random keys stay the same.
That is the yardstick for what a machine's roundings do to a program. It is the values reading once
more, with wider types put into each equation before it is evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emulator.machines import Machine
from emulator.program.folded import Folded
from emulator.program.primitives import HOST
from emulator.program.trace import Program, is_emulated
from emulator.program.values import Evaluator, Settings

#: Mean something for the program's own types only. The first two round nothing worth telling.
_OF_BITS = frozenset(("bitcast_convert_type", "nextafter"))
_IN_ITS_OWN_TYPE = HOST | {"random_gamma", "reduce", "reduce_window", "select_and_scatter"}
_SCATTERS = frozenset(("scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wide:
    """`leaves` are the flat outputs, floats in FP64; `narrow` names the primitives that had to be
    computed in the program's own types.
    """

    leaves: list[np.ndarray]
    narrow: tuple[str, ...]


def in_fp64(program: Program, args: Sequence[Any], on: Machine) -> Wide:
    """`program(*args)` with everything floating in FP64, over the meshes of `on`."""
    settings = Settings(machine=on, arithmetic=None, exact_vector=False)
    narrow: set[str] = set()

    def values(inputs: list[Any]) -> list[Any]:
        evaluator = _WideEvaluator(settings=settings, narrow=narrow)
        outs = evaluator.jaxpr(program.jaxpr, [Folded(x) for x in inputs], "")
        return [v.array for v in outs]

    leaves = jax.tree.leaves((tuple(args), {}))
    given = [x for x, dynamic in zip(leaves, program.dynamic, strict=True) if dynamic]
    with jax.enable_x64(True):
        inputs = [_input(x, aval) for x, aval in zip(given, program.jaxpr.in_avals, strict=True)]
        outs = jax.jit(values)(inputs)
        return Wide(leaves=[_host(x) for x in outs], narrow=tuple(sorted(narrow)))


@dataclasses.dataclass(kw_only=True, slots=True)
class _WideEvaluator(Evaluator):
    narrow: set[str] = dataclasses.field(default_factory=set)

    def jaxpr(self, jaxpr: Any, args: Sequence[Folded], path: str) -> list[Folded]:
        return [_widen(v) for v in Evaluator.jaxpr(self, jaxpr, args, path)]

    def equation(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        name = eqn.primitive.name
        if name in _OF_BITS or _in_its_own_type(eqn):
            if name not in _OF_BITS:
                self.narrow.add(name)
            values = [_as(v, atom.aval.dtype) for v, atom in zip(values, eqn.invars, strict=True)]
            return [_widen(v) for v in Evaluator.equation(self, eqn, values, path)]
        values = [_widen(v) for v in values]
        if name == "reduce_precision":
            return values
        wide = eqn.replace(params=_widened(eqn))
        return [_widen(v) for v in Evaluator.equation(self, wide, values, path)]


def _in_its_own_type(eqn: Any) -> bool:
    """Whether an equation carries a function of the program's types."""
    applies = eqn.primitive.name == "scatter" and eqn.params.get("update_jaxpr") is not None
    return applies or eqn.primitive.name in _IN_ITS_OWN_TYPE or is_emulated(eqn)


def _widened(eqn: Any) -> dict[str, Any]:
    """The parameters of an equation with FP64 wherever they name a narrower floating type."""
    params = {name: _wide_type(value) for name, value in eqn.params.items()}
    if "precision" in params:  # says how to round to less than FP64
        params["precision"] = None
    if eqn.primitive.name in _SCATTERS and eqn.params.get("update_jaxpr") is not None:
        params["update_jaxpr"], params["update_consts"] = _update(eqn.primitive.name), ()
    return params


def _update(scatter: str) -> Any:
    """How two FP64 numbers are combined by a scatter."""
    combine = {"add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply}
    combine |= {"min": jnp.minimum, "max": jnp.maximum}
    one = jax.ShapeDtypeStruct((), jnp.float64)
    return jax.make_jaxpr(combine[scatter.removeprefix("scatter-")])(one, one).jaxpr


def _wide_type(value: Any) -> Any:
    """FP64 for a floating type (complex128 for a complex one), anything else as it is."""
    if not isinstance(value, np.dtype | type):
        return value
    try:
        dtype = np.dtype(value)
    except TypeError:
        return value
    return _wider(dtype) or value


def _wider(dtype: Any) -> np.dtype | None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else None


def _widen(value: Folded) -> Folded:
    dtype = _wider(jnp.result_type(value.array))
    return value if dtype is None else _as(value, dtype)


def _as(value: Folded, dtype: Any) -> Folded:
    if jnp.issubdtype(dtype, jax.dtypes.extended) or jnp.result_type(value.array) == dtype:
        return value
    return Folded(jnp.asarray(value.array).astype(dtype), value.axes)


def _input(leaf: Any, aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return leaf
    array = np.asarray(leaf).astype(aval.dtype, copy=False)
    return array.astype(_wider(aval.dtype) or aval.dtype)


def _host(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
