"""Equations that stand for the body they carry, and where that body finds its operands.

`jit`, `checkpoint`, custom derivatives and their like run a body once where they stand; both
readings enter it. A few others are entered although their body is not simply applied to all
operands: a `custom_linear_solve` runs its solver, a `platform_dependent` choice one branch, and
products written with a primitive of their own are spelled out as the `dot_general` they are. A
primitive that another library defines in Python by operations of JAX (Equinox's loops do) stands
for those operations.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
from jax._src.interpreters import partial_eval
from jax.extend import core

#: Primitive -> parameter that holds the body, which takes all operands (that of a composite is
#: called otherwise in JAX 0.11).
CALLS = {
    "jit": "jaxpr",
    "call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "remat_opt": "fwd_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_jvp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "custom_partitioning": "call",
    "linear_call": "callee",
    "composite": "jaxpr",
    "xla_metadata_call": "jaxpr",
    "eval_jaxpr": "jaxpr",
}

Call = tuple[Any, tuple[int, ...]]


def call_body(eqn: Any) -> Call | None:
    """The body that stands for `eqn` and which operands it takes; None for any other equation."""
    if not is_call(eqn):
        return None
    name, params = eqn.primitive.name, eqn.params
    everything = tuple(range(len(eqn.invars)))
    if name in CALLS:
        key = CALLS[name]
        return params[key if key in params else "call_jaxpr"], everything
    if name == "custom_linear_solve":
        return _solver(eqn)
    if name == "cond":
        return params["branches"][platform_branch(params["branches_platforms"])], everything[1:]
    if name in _SPELLED_OUT:
        return _traced(_SPELLED_OUT[name](params), eqn), everything
    if name in SPARSE:
        return _traced(partial(_dense(name), **params), eqn), everything
    try:
        return _traced(partial(eqn.primitive.impl, **params), eqn), everything
    except Exception as error:
        raise NotImplementedError(
            f"primitive {name!r} is a library's own, and what it is in operations of JAX cannot be "
            f"traced: {error}"
        ) from error


def _traced(fun: Callable[..., Any], eqn: Any) -> core.ClosedJaxpr:
    """`fun` of the operands of `eqn`, as a program."""
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return spelled_out(jax.make_jaxpr(fun)(*avals))


def spelled_out(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """A program whose operations that JAX defines by others (in JAX 0.12 `custom_linear_solve` is
    one; a user's own types are) are replaced by their definitions, as JAX does before it compiles.
    """
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return partial_eval.lower_jaxpr2(jaxpr) if opened.is_high else jaxpr


def is_call(eqn: Any) -> bool:
    """Whether `call_body` has an answer, without making it."""
    name = eqn.primitive.name
    if name == "cond":
        return eqn.params.get("branches_platforms") is not None
    return name in ENTERED or _of_a_library(eqn.primitive)


def _of_a_library(primitive: Any) -> bool:
    """Whether somebody other than JAX and this package has said in Python what `primitive` is.

    What JAX runs through the compiler, `dispatch.apply_primitive`, or leaves undefined says nothing
    here.
    """
    impl = primitive.impl
    while isinstance(impl, partial):
        impl = impl.func
    of = (getattr(impl, "__module__", None) or "jax").split(".")[0]
    return of not in ("jax", "jaxlib", "kernels", "emulator")


def platform_branch(platforms: Any) -> int:
    """The branch of a `platform_dependent` that the machine takes, which is none of JAX's
    platforms: the default, or without one that of this process.
    """
    for i, names in enumerate(platforms):
        if names is None:
            return i
    here = jax.default_backend()
    here = {"gpu": "cuda"}.get(here, here)
    for i, names in enumerate(platforms):
        if here in names:
            return i
    raise NotImplementedError(
        f"lax.platform_dependent has neither a default nor a branch for {here!r}: {platforms}"
    )


def _solver(eqn: Any) -> Call:
    """The solver of a `custom_linear_solve`, with its own constants and the right-hand sides."""
    lengths = eqn.params["const_lengths"]
    ends = dict(zip(lengths._fields, itertools.accumulate(lengths), strict=True))
    constants = range(ends["solve"] - lengths.solve, ends["solve"])
    return eqn.params["jaxprs"].solve, (*constants, *range(sum(lengths), len(eqn.invars)))


def _dense(name: str) -> Callable[..., Any]:
    """JAX's definition of an operation on sparse matrices ("bcoo_todense") in dense ones."""
    module = importlib.import_module(f"jax.experimental.sparse.{name.split('_')[0]}")
    return getattr(module, f"_{name}_impl")


def _symmetric_product(params: Mapping[str, Any]) -> Callable[..., Any]:
    def product(a: Any, c: Any) -> Any:
        transposed = lax.transpose(a, (*range(a.ndim - 2), a.ndim - 1, a.ndim - 2))
        product = lax.batch_matmul(a, transposed, precision=lax.Precision.HIGHEST)
        return params["alpha"] * product + params["beta"] * c

    return product


def _polynomial(params: Mapping[str, Any]) -> Callable[..., Any]:
    def horner(x: Any, *coefficients: Any) -> Any:
        *others, total = coefficients
        for coefficient in reversed(others):
            total = total * x + coefficient
        return total

    return horner


_SPELLED_OUT: Mapping[str, Callable[[Mapping[str, Any]], Callable[..., Any]]] = {
    "symmetric_product": _symmetric_product,
    "polynomial": _polynomial,
}

#: Sparse matrices: JAX's own definition in dense operations.
SPARSE = frozenset(
    """bcoo_dot_general bcoo_dot_general_sampled bcoo_extract bcoo_fromdense bcoo_sort_indices
    bcoo_spdot_general bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general
    bcsr_extract bcsr_fromdense bcsr_todense coo_fromdense coo_matmat coo_matvec coo_todense
    csr_fromdense csr_matmat csr_matvec csr_todense""".split()
)

#: Every primitive that `call_body` can enter.
ENTERED = frozenset({*CALLS, *_SPELLED_OUT, *SPARSE, "custom_linear_solve"})


def is_jaxpr(value: Any) -> bool:
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))
