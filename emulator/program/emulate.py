"""`em.emulate`: a function with the same signature that returns the machine's values."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.config import trace_context
from jax._src.lax.lax import _convert_element_type
from jax.extend import core
from jax.interpreters import ad
from jax.sharding import AxisType

import kernels
from emulator.collectives import check_algorithms
from emulator.machines import Machine
from emulator.program.auto_sharded import divided_leaves, placed
from emulator.program.contents import contents
from emulator.program.folded import FoldedMesh
from emulator.program.operation import Operation
from emulator.program.outside import outside_meshes
from emulator.program.own_rules import check_results, own_rules
from emulator.program.real_devices import check_devices, everywhere
from emulator.program.sites import said, sites
from emulator.program.trace import (
    DIVIDED,
    Made,
    Program,
    dynamic_sites,
    is_array_like,
    made,
    program_of,
    trace,
    walk,
)
from emulator.program.values import Settings
from emulator.program.wide_types import as_wide_as


def emulate(
    fun: Callable[..., Any],
    on: Machine,
    arithmetic: kernels.Arithmetic | str | os.PathLike[str] | None = None,
    algorithms: Mapping[str, Any] | None = None,
    vector: str = "exact",
    tiling: kernels.Tiling | str | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., Any]:
    """`fun` as the machine computes it: matmuls on its matrix unit, collectives in their
    algorithm's order.

    `fun` is ordinary JAX over `on.mesh(...)`; the result takes and returns the same pytrees and can
    be jitted, vmapped and differentiated in reverse mode. The gradient is the emulated gradient:
    `jax.grad(em.emulate(f))` has the bits of `em.emulate(jax.grad(f))`. Forward mode
    (`jax.jvp`) raises. A program that leaves the division of its arrays to the compiler (shardings
    of `jax.jit`, of arguments, of constraints) is divided by XLA's partitioner; its derivative must
    be taken inside.

    Args:
        fun: the program.
        on: the machine, such as `em.cloudmatrix384()`.
        arithmetic: how matmuls sum: a record, the name of a preset or candidate
            ("ASCEND_910C/late_addend"), or a file that `cm384 probe` wrote. None is the machine's
            own; `"native"` leaves matmuls to XLA.
        algorithms: operation -> algorithm name (or a function group -> Schedule). Only those of
            `all_reduce` and `reduce_scatter` change bits. Others are the machine's choice.
        vector: "exact" gives element-wise work and floating sums bits that do not depend on
            batching or fusion; "native" leaves them to XLA.
        tiling: the order in which matmuls sum K. None ascends. "library" is what Ascend's library
            chooses for each device's (or die's) own m, k and n, so that the bits of a row may
            depend on where it is; a `kernels.Tiling` is used for every matmul. A package's two dies
            divide a matmul as in the time model. Outside `shard_map` a matmul counts as one
            device's; convolutions and ragged dots ascend.
        devices: the real devices that compute, such as `jax.devices()`: the mesh inside `shard_map`
            is divided over them, as many as divide it, and the bits are those of one. Arguments
            and results are whole on each. None is JAX's default device, or `jax.devices()` where
            `jax.distributed` has several processes, all of which make the same calls.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the message names it.
        NotImplementedError: "library" on another machine than Ascend's; or (when called) the
            program contains a primitive without a meaning here.
    """
    settings = make_settings(on, arithmetic, algorithms, vector, tiling=tiling, devices=devices)
    plain = program_of(fun)
    if not callable(plain):
        raise TypeError(f"emulate: fun must be callable, got {type(fun).__name__}")
    of = made(fun)
    return emulated_with(settings, plain, None if of is None else of.hold)


def emulated_with(
    settings: Settings,
    program: Callable[..., Any],
    hold: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """As `emulate`; `hold` is that of `trace.Made`."""
    programs = _Programs(program)

    @functools.wraps(program)
    def emulated(*args: Any, **kwargs: Any) -> Any:
        traced, inputs = programs.of(args if hold is None else hold(args), kwargs)
        outs = evaluate(traced.jaxpr, inputs, settings)[0]
        return jax.tree.unflatten(traced.out_tree, _as_weak(traced.jaxpr, outs))

    Made(by=emulated, program=program, hold=hold).note()
    return emulated


class _Programs:
    """One function's programs, traced once for equal shapes under equal settings of JAX: its mesh
    in use, its kind of random keys, its precision of matmuls and all else that tracing asks for.
    """

    def __init__(self, fun: Callable[..., Any]) -> None:
        self.fun = fun
        self.known: dict[Any, Program] = {}

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, list[Any]]:
        """The program for a call, and the call's arrays."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        key = tree, tuple(map(_leaf_key, leaves)), trace_context()
        program = self.known.get(key)
        if program is None:
            program = divided_leaves(self.fun, leaves, tree)
            # Tracers of an outer transformation belong to this call alone.
            if not any(isinstance(c, jax.core.Tracer) for c in program.jaxpr.consts):
                self.known[key] = program
        return program, list(itertools.compress(leaves, program.dynamic))


@functools.lru_cache(maxsize=32)
def _programs_of(fun: Callable[..., Any]) -> _Programs:
    return _Programs(fun)


def trace_once(fun: Callable[..., Any], args: Sequence[Any]) -> Program:
    """`fun(*args)` traced, or what was traced before for this function and equal shapes, which as
    under `jax.jit` is what is compiled already.
    """
    plain = program_of(fun)
    known = isinstance(plain, Hashable) and callable(plain)
    return (_programs_of(plain) if known else _Programs(plain)).of(tuple(args), {})[0]


def make_settings(
    on: Machine,
    arithmetic: Any = None,
    algorithms: Mapping[str, Any] | None = None,
    vector: str = "exact",
    counting: bool = False,
    tiling: Any = None,
    devices: Any = None,
) -> Settings:
    """Checked settings from the arguments of `emulate`."""
    if not isinstance(on, Machine):
        raise TypeError(
            f"on must be a Machine, such as em.cloudmatrix384(), got {type(on).__name__}: {on!r}"
        )
    if arithmetic is None:
        chosen: kernels.Arithmetic | None = getattr(kernels, on.arithmetic)
    elif isinstance(arithmetic, kernels.Arithmetic):
        chosen = arithmetic
    elif isinstance(arithmetic, str) and arithmetic == "native":
        chosen = None
    elif isinstance(arithmetic, str | os.PathLike):
        chosen = kernels.arithmetic_file.named(arithmetic)
    else:
        raise TypeError(
            'arithmetic must be None, "native", a kernels.Arithmetic like kernels.ASCEND_910C, its '
            f"name, or an arithmetic file, got {arithmetic!r}"
        )
    if vector not in ("exact", "native"):
        raise ValueError(f'vector must be "exact" or "native", got {vector!r}')
    _check_tiling(tiling, chosen, on)
    pairs = tuple(sorted(check_algorithms(algorithms).items()))
    return Settings(
        machine=on,
        arithmetic=chosen,
        tiling=tiling,
        algorithms=pairs,
        exact_vector=vector == "exact",
        counting=counting,
        devices=check_devices(devices),
    )


def _check_tiling(tiling: Any, arithmetic: kernels.Arithmetic | None, on: Machine) -> None:
    kernels.tiling.check(tiling)
    if tiling is not None and arithmetic is None:
        raise ValueError(
            f'tiling={tiling!r} is for matmuls that are emulated, got arithmetic="native", which '
            "leaves them to XLA; leave one of the two out"
        )
    if tiling == "library" and not on.arithmetic.startswith("ASCEND"):
        raise NotImplementedError(
            f'tiling="library": how the library of {on.name} cuts matmuls is not modelled; pass a '
            "kernels.Tiling or None"
        )


def evaluate(
    jaxpr: core.ClosedJaxpr, inputs: Sequence[Any], settings: Settings
) -> tuple[list[Any], dict[str, Any]]:
    """The flat outputs of a closed jaxpr under `settings`, and what was counted (by path; empty
    unless counting).

    Constants of the jaxpr (arrays the function closed over, tracers of an outer transformation
    among them) become inputs, so that derivatives with respect to them are right.
    """
    run = _evaluator(jaxpr.jaxpr, settings)
    flat = [*jaxpr.consts, *inputs]
    if isinstance(run, Operation) and run.may_stand(flat):
        return run.stand(flat), {}
    with own_rules(), as_wide_as(jaxpr):
        if contents(jaxpr.jaxpr).wide:
            variables = (*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars)
            flat = [_typed(x, v.aval) for x, v in zip(flat, variables, strict=True)]
        arrays = everywhere(flat, settings.devices)
        outs, counts = outside_meshes(run, arrays)
    check_results(outs)
    return outs, counts


def _typed(x: Any, aval: Any) -> Any:
    """A number or an array of NumPy's in the type that the program takes it in."""
    of_the_host = isinstance(x, bool | int | float | complex | np.ndarray | np.generic)
    return np.asarray(x, aval.dtype) if of_the_host else x


@functools.lru_cache(maxsize=256)
def _evaluator(jaxpr: core.Jaxpr, settings: Settings) -> Callable[..., Any]:
    """A function (*consts, *inputs) -> (outputs, counts) whose derivative is the emulated
    derivative.
    """
    operation = Operation(jaxpr, settings, _differentiable)
    if settings.counting:
        return operation.compiled  # em.run: not differentiated
    # Over several real devices there is a `shard_map` inside, which a trace must see.
    return operation if settings.devices is None else operation.differentiable


def _differentiable(operation: Operation) -> Callable[..., Any]:
    """The values of a program on a machine, with the values of its derivative there."""
    jaxpr, settings, values = operation.jaxpr, operation.settings, operation.compiled
    n_consts, n_inputs = len(jaxpr.constvars), len(jaxpr.constvars) + len(jaxpr.invars)
    traced: dict[Any, Program] = {}

    def plain(*flat: Any) -> list[Any]:
        closed = core.ClosedJaxpr(jaxpr, list(flat[:n_consts]))
        return core.jaxpr_as_fun(closed)(*flat[n_consts:])

    @jax.custom_vjp
    def differentiable(*flat: Any) -> Any:
        return values(*flat)

    def forward(*primals: Any) -> Any:
        if any(eqn.params.get("name") == DIVIDED for _, eqn in walk(jaxpr)):
            raise NotImplementedError(
                "the derivative of an emulated auto-sharded program has no rule here: put the "
                "derivative inside, as in em.emulate(jax.grad(fun), on=machine)"
            )
        flat = [p.value for p in primals]
        perturbed = tuple(i for i, p in enumerate(primals) if p.perturbed)

        def linearised(*arrays: Any) -> Any:
            def of_perturbed(*xs: Any) -> list[Any]:
                full = list(arrays)
                for i, x in zip(perturbed, xs, strict=True):
                    full[i] = x
                return plain(*full)

            return jax.vjp(of_perturbed, *(arrays[i] for i in perturbed))

        with as_wide_as(jaxpr):
            program = _trace_once(traced, ("forward", perturbed), linearised, flat)
            outs = evaluate(program.jaxpr, flat, settings)[0]
        primal_out, pullback = jax.tree.unflatten(program.out_tree, outs)
        return (primal_out, {}), (pullback, dict.fromkeys(perturbed))  # None: no leaves, only keys

    def backward(residuals: Any, cotangents: Any) -> Any:
        pullback, perturbed = residuals
        given = cotangents[0]
        zeros = [_zero(ct) for ct in given]
        there = tuple(i for i, zero in enumerate(zeros) if zero is None)

        def transposed(pull: Any, cts: list[Any]) -> Any:
            full = list(zeros)
            for i, ct in zip(there, cts, strict=True):
                full[i] = ct
            return pull(full)

        args = pullback, [given[i] for i in there]
        with as_wide_as(jaxpr):
            program = _trace_once(traced, ("backward", there), transposed, args)
            outs = evaluate(program.jaxpr, jax.tree.leaves(args), settings)[0]
        linear = _depends(program.jaxpr, len(there))
        # What depends on no cotangent is zero; said so, it is added to nothing, not even to -0.
        outs = [out if depends else None for out, depends in zip(outs, linear, strict=True)]
        return tuple(dict(zip(perturbed, outs, strict=True)).get(i) for i in range(n_inputs))

    differentiable.defvjp(forward, backward, symbolic_zeros=True)
    return differentiable


def _trace_once(
    known: dict[Any, Program], what: Any, fun: Callable[..., Any], args: Any
) -> Program:
    """`fun` of array arguments traced, or what was traced for equal shapes before."""
    leaves, tree = jax.tree.flatten(tuple(args))
    key = what, tree, tuple(_leaf_key(leaf) for leaf in leaves)
    if key not in known:
        known[key] = trace(fun, jax.tree.map(_of_no_mesh, args))
    return known[key]


def _of_no_mesh(x: Any) -> Any:
    """An array as the equations of any program take it: those of a mesh with explicit axes keep
    that mesh as their context, and no array typed over another would do.
    """
    axis_types = getattr(jax.typeof(x).sharding.mesh, "axis_types", ())
    if not axis_types or AxisType.Manual in axis_types:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type)


def _zero(cotangent: Any) -> ad.Zero | None:
    """A cotangent that is zero whatever the values are, in the form that `jax.vjp` takes."""
    symbolic = isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
    if symbolic or cotangent.dtype == jax.dtypes.float0:
        return ad.Zero(jax.typeof(cotangent) if not symbolic else cotangent.aval)
    return None


def _depends(jaxpr: core.ClosedJaxpr, count: int) -> list[bool]:
    """Which results depend on any of the last `count` inputs."""
    body = jaxpr.jaxpr
    touched: set[Any] = set(body.invars[len(body.invars) - count :])
    for eqn in body.eqns:
        if any(not isinstance(v, core.Literal) and v in touched for v in eqn.invars):
            touched.update(eqn.outvars)
    return [not isinstance(v, core.Literal) and v in touched for v in body.outvars]


def evaluate_with_counts(
    program: Program,
    args: Sequence[Any],
    on: Machine,
    arithmetic: Any = None,
    algorithms: Mapping[str, Any] | None = None,
    vector: str = "exact",
    tiling: Any = None,
    devices: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """The values of a program for `args`, and what only values can tell, by site name (see
    `trace.dynamic_sites`).

    What is counted, and how it is said, is in `sites`. Sites that were never reached are absent.
    """
    settings = make_settings(
        on, arithmetic, algorithms, vector, counting=True, tiling=tiling, devices=devices
    )
    leaves = jax.tree.leaves((tuple(args), {}))
    inputs = [_not_a_shape(x) for x, d in zip(leaves, program.dynamic, strict=True) if d]
    outs, counted = evaluate(program.jaxpr, inputs, settings)
    value = jax.tree.unflatten(program.out_tree, _as_weak(program.jaxpr, outs))
    names = dynamic_sites(program.jaxpr)
    counts: dict[str, Any] = {}
    for path, eqn, mesh in sites(program.jaxpr, "", FoldedMesh()):
        if path in counted and (known := said(eqn, mesh, counted[path])) is not None:
            counts[names[path]] = known
    return value, counts


def _as_weak(jaxpr: core.ClosedJaxpr, outs: Sequence[Any]) -> list[Any]:
    """`outs` with the weak types that the program's results have."""
    weak = [getattr(v.aval, "weak_type", False) for v in jaxpr.jaxpr.outvars]
    if not any(weak):
        return list(outs)
    with as_wide_as(jaxpr):
        return [
            _convert_element_type(x, weak_type=True) if is_weak else x
            for x, is_weak in zip(outs, weak, strict=True)
        ]


def _not_a_shape(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"an argument holds {leaf}, a shape without values; give an array, or ask em.estimate, "
            "which needs shapes alone"
        )
    return leaf


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return jax.typeof(leaf), None
    if is_array_like(leaf):
        return jax.typeof(_not_a_shape(leaf)), placed(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"an argument holds {leaf!r}, which is no array, number or pytree of them and cannot "
            "be hashed to be taken as a constant; bind it with functools.partial"
        ) from None
    return "static", leaf
