"""An emulated program as one JAX operation, which is spelled out when it is compiled.

`jax.jit` and its like trace a function before anything else, some of them several times. Evaluating
a program equation by equation takes longer than tracing it did, and only the compiler needs to know
the outcome: so a trace holds one operation, whose lowering evaluates. Where nothing is traced, and
under `jax.vmap` and `jax.grad`, which ask what is inside, it is evaluated at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.core import trace_state_clean
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding

from emulator.program.contents import contents
from emulator.program.folded import Folded
from emulator.program.outside import NO_MESH, typed_over
from emulator.program.own_rules import own_rules
from emulator.program.real_devices import real_mesh
from emulator.program.trace import EMULATED
from emulator.program.values import Evaluator, Settings
from emulator.program.wide_types import as_wide_as

Values = Callable[..., tuple[list[Any], Any]]

_emulated = core.Primitive(EMULATED)
_emulated.multiple_results = True


@dataclasses.dataclass(eq=False, repr=False)
class Operation:
    """The values of a program under `settings`: a function of arrays, the constants of `jaxpr` and
    its inputs, that gives `jaxpr`'s results and what was counted.

    `with_derivative` makes a function of that kind, `compiled`, differentiable.
    """

    jaxpr: core.Jaxpr
    settings: Settings
    with_derivative: Callable[[Operation], Values]

    def __call__(self, *arrays: Any) -> tuple[list[Any], Any]:
        if self._is_plain():
            return self.stand(arrays), {}
        return self.differentiable(*arrays)

    def stand(self, arrays: Sequence[Any]) -> list[Any]:
        """The results as those of one operation, which is evaluated `alone` by the rules below."""
        results: list[Any] = _emulated.bind(*arrays, operation=self)
        return results

    def may_stand(self, arrays: Sequence[Any]) -> bool:
        """Whether a trace is under way that takes these arrays as they are, and has no mesh."""
        if trace_state_clean() or contents(self.jaxpr).wide or self.jaxpr.effects:
            return False
        return jax.sharding.get_abstract_mesh().empty and typed_over(arrays) is None

    def __repr__(self) -> str:
        return f"{len(self.jaxpr.eqns)} equations"

    def _is_plain(self) -> bool:
        """Whether results have types of their own alone, and nothing but them is asked for.

        Effects must be seen in a trace, and a `shard_map` around the call asks where values vary.
        """
        manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
        return not self.jaxpr.effects and not manual

    @functools.cached_property
    def compiled(self) -> Values:
        devices = self.settings.devices or ()
        whole = NamedSharding(real_mesh(devices), PartitionSpec()) if len(devices) > 1 else None

        def values(*flat: Any) -> tuple[list[Any], Any]:
            n_consts = len(self.jaxpr.constvars)
            evaluator = Evaluator(settings=self.settings)
            arrays = _on_each(flat, whole)
            closed = core.ClosedJaxpr(self.jaxpr, arrays[:n_consts])
            outs = evaluator.jaxpr(closed, [Folded(x) for x in arrays[n_consts:]], "")
            return _on_each([jnp.asarray(v.array) for v in outs], whole), evaluator.counts

        values.__name__ = values.__qualname__ = EMULATED
        return jax.jit(values)

    @functools.cached_property
    def differentiable(self) -> Values:
        return self.with_derivative(self)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The settings in which the program is evaluated, whenever it is."""
        no_mesh = jax.sharding.use_abstract_mesh(NO_MESH)
        with own_rules(), no_mesh, as_wide_as(self.jaxpr):
            yield


@_emulated.def_impl
def _at_once(*arrays: Any, operation: Operation) -> list[Any]:
    with operation.alone():
        return operation.compiled(*arrays)[0]


@_emulated.def_abstract_eval
def _types(*_: Any, operation: Operation) -> list[Any]:
    results: list[Any] = [v.aval for v in operation.jaxpr.outvars]
    return [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in results]


def _spelled_out(*arrays: Any, operation: Operation, whole: Sharding | None = None) -> list[Any]:
    with operation.alone():
        return _on_each(operation.compiled(*_on_each(arrays, whole))[0], whole)


def _on_each(arrays: Sequence[Any], whole: Sharding | None) -> list[Any]:
    """Arrays whole on each real device, if these are several: where XLA's partitioner divides them,
    sums along a divided dimension come out otherwise.
    """
    return [x if whole is None else lax.with_sharding_constraint(x, whole) for x in arrays]


def _lowered(context: Any, *operands: Any, operation: Operation) -> Any:
    count, whole = getattr(context.module_context.axis_context, "num_devices", 1), None
    if count > 1:
        whole = NamedSharding(AbstractMesh((count,), ("all",)), PartitionSpec())
    spelled_out = functools.partial(_spelled_out, whole=whole)
    return mlir.lower_fun(spelled_out, multiple_results=True)(
        context, *operands, operation=operation
    )


def _batched(arrays: Any, dims: Any, operation: Operation) -> Any:
    with operation.alone():
        found, _ = jax.vmap(operation.differentiable, in_axes=dims)(*arrays)
    return found, [0] * len(found)


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], operation: Operation) -> Any:
    perturbed = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_perturbed(*xs: Any) -> list[Any]:
        full = list(primals)
        for i, x in zip(perturbed, xs, strict=True):
            full[i] = x
        return operation.differentiable(*full)[0]

    with operation.alone():
        return jax.jvp(
            of_perturbed, [primals[i] for i in perturbed], [tangents[i] for i in perturbed]
        )


ad.primitive_jvps[_emulated] = _derivative
batching.primitive_batchers[_emulated] = _batched
mlir.register_lowering(_emulated, _lowered)
