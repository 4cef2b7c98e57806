"""Where a script's calls of JAX are caught, below every interface that it may use.

`jax.jit`, `jax.pmap`, gradients of jitted functions and what libraries make of them all end in one
place with concrete arrays: the execution of a traced program. There a program of the script's
becomes a step. JAX's own functions (`jnp.dot` is jitted, too) and single operations are eager: they
stay on the host, and are counted.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import api_util, config, pjit, source_info_util
from jax._src import core as jax_core
from jax._src import shard_map as jax_shard_map
from jax._src.interpreters import partial_eval
from jax._src.mesh import get_concrete_mesh
from jax.experimental import shard_map as experimental
from jax.sharding import AbstractMesh

from emulator.program.trace import open_jaxpr
from emulator.script import compiled
from emulator.script.eager import Eager, line

_JAX = os.path.dirname(jax.__file__) + os.sep
_PMAP = os.path.join(_JAX, "_src", "pmap.py")
_HERE = os.path.dirname(os.path.abspath(__file__))

#: The name of what is jitted here for a script that calls `jax.shard_map` outside of any jit.
EAGER_MAP = "eager_shard_map"
#: The name of what is jitted here for a loop or a branch of the script's outside of any jit.
EAGER_WHOLE = "eager_loop_or_branch"
#: What JAX compiles as a whole outside of any jit, too: loops and branches.
_WHOLE = frozenset({"scan", "while", "cond"})

Step = Callable[[tuple[Any, ...], dict[str, Any], Callable[[], list[Any]]], list[Any]]


class _Caller(threading.local):
    """What this thread is in: a step or an eager operation, a function under `jax.pmap`, a loop
    outside of any jit.
    """

    inside = False
    mapped = ""
    looped = ""


_CALLER = _Caller()


@contextmanager
def caught(
    step: Step,
    eager: Eager,
    asked: Callable[[int], None],
    memory_stats: Callable[[jax.Device], dict[str, int]],
) -> Iterator[None]:
    """Inside, `step(flat arrays, parameters of the jit, the native way)` computes the script's
    jitted programs and `eager` counts everything else that computes; `asked` is told how many
    devices the script would have, and `memory_stats` answers for a device.
    """
    execute = pjit._pjit_call_impl_python
    one_operation = jax_core.EvalTrace.process_primitive
    eager_map = jax_core.EvalTrace.process_shard_map  # type: ignore[attr-defined]

    @contextmanager
    def within() -> Iterator[None]:
        before, _CALLER.inside = _CALLER.inside, True
        try:
            yield
        finally:
            _CALLER.inside = before

    def program(*args: Any, **params: Any) -> Any:
        if _CALLER.inside:
            return execute(*args, **params)
        with within():
            if params["name"] == EAGER_MAP or not _of_jax(_source(params["jaxpr"])):
                results = step(args, params, lambda: execute(*args, **params)[0])
                return results, None, None, []
            eager.note(params["name"], args)
            return execute(*args, **params)

    def operation(trace: Any, primitive: Any, args: Any, params: Any, /) -> Any:
        if _CALLER.inside or primitive.name in ("jit", "pjit"):
            return one_operation(trace, primitive, args, params)
        if primitive.name in _WHOLE and not config.disable_jit.value:
            with jax_core.set_current_trace(trace), _looping(f"{primitive.name} at {line()}"):
                return _whole(primitive, tuple(params.items()))(*args)
        with within():
            eager.note(primitive.name, args)
            return one_operation(trace, primitive, args, params)

    def mapped(trace: Any, primitive: Any, fun: Any, args: Any, /, **params: Any) -> Any:
        if _CALLER.inside:
            return eager_map(trace, primitive, fun, args, **params)
        with within():  # one that no name that is replaced below has made
            eager.note("shard_map", args)
            return eager_map(trace, primitive, fun, args, **params)

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old_shard_map = experimental.shard_map
    source_info_util.register_exclusion(_HERE + os.sep)
    replaced: list[tuple[Any, str, Any]] = [
        (pjit, "_pjit_call_impl_python", program),
        # Without it JAX would call a program that it has run before past all Python.
        (pjit, "_get_fastpath_data", lambda *_: None),
        (jax_core.EvalTrace, "process_primitive", operation),
        (jax_core.EvalTrace, "process_shard_map", mapped),
        *compiled.replacements(lambda *args, **params: program(*args, **params)[0]),
        (jax, "jit", _jit(jax.jit)),
        (jax, "pmap", _pmap(jax.pmap)),
        (jax, "shard_map", _shard_map(jax.shard_map)),
        (jax, "smap", _shard_map(jax.smap)),
        (jax_shard_map, "shard_map", _shard_map(jax_shard_map.shard_map)),
        (experimental, "shard_map", _shard_map(old_shard_map)),
        (jax, "device_put", _device_put(jax.device_put)),
        (jax.Device, "memory_stats", lambda device: memory_stats(device)),  # the host's has none
        # One process has all devices, and their number is the machine's.
        (jax.distributed, "initialize", lambda *_, **__: None),
        (jax.config, "update", _update(jax.config.update, asked)),
    ]
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, new in replaced:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


def _source(jaxpr: Any) -> str:
    """The function that was jitted and its place: "step at /home/me/train.py:12"."""
    own = open_jaxpr(jaxpr).debug_info.func_src_info or ""
    if own.startswith(EAGER_WHOLE):
        return _CALLER.looped
    return _CALLER.mapped if _PMAP in own and _CALLER.mapped else own


def _of_jax(source: str) -> bool:
    return _JAX in source


def name_and_place(params: dict[str, Any]) -> tuple[str, str]:
    """What a jitted function is called, and where it stands: "train.py:12"; where it is called, if
    it is an object's or a function of JAX's.
    """
    name, _, place = _source(params["jaxpr"]).partition(" at ")
    known = bool(place) and not place.startswith((_HERE, _JAX))
    lambda_of_pmap = name == "<lambda>" and _CALLER.mapped  # whose own jit has another name
    if not name or "<" in name and not lambda_of_pmap or place.startswith(_HERE):
        name = params["name"]  # a partial, say
    return name, os.path.basename(place) if known else line()


def _update(update: Any, asked: Callable[[int], None]) -> Any:
    @functools.wraps(update)
    def update_of_the_script(name: str, value: Any) -> None:
        if name == "jax_num_cpu_devices":
            asked(value)
        elif name not in ("jax_platforms", "jax_platform_name"):
            update(name, value)

    return update_of_the_script


def _pmap(pmap: Any) -> Any:
    """`jax.pmap` jits a function of its own, which does not say for whom."""

    @functools.wraps(pmap)
    def pmap_of_the_script(fun: Any, *more: Any, **options: Any) -> Any:
        mapped = pmap(fun, *more, **options)

        @functools.wraps(mapped)
        def call(*args: Any, **kwargs: Any) -> Any:
            before, _CALLER.mapped = _CALLER.mapped, api_util.fun_sourceinfo(fun)
            try:
                return mapped(*args, **kwargs)
            finally:
                _CALLER.mapped = before

        return call

    return pmap_of_the_script


def _jit(jit: Any) -> Any:
    @functools.wraps(jit)
    def jit_of_the_script(*fun: Any, **options: Any) -> Any:
        if not fun and "fun" not in options:
            return lambda function: jit_of_the_script(function, **options)
        function = options.pop("fun") if not fun else fun[0]
        return jit(_as_the_scripts(function), *fun[1:], **options)

    return jit_of_the_script


def _shard_map(shard_map: Any) -> Any:
    """`jax.shard_map` called outside of any jit would run operation by operation; here it is one
    step, as if it were jitted.
    """

    @functools.wraps(shard_map)
    def shard_map_of_the_script(*fun: Any, **options: Any) -> Any:
        if str(sys._getframe(1).f_globals.get("__name__")).startswith(("jax.", "emulator.")):
            return shard_map(*fun, **options)
        if not fun and "f" not in options:
            return lambda f: _one_step(shard_map(f, **options), options.get("mesh"))
        function = options.pop("f") if not fun else fun[0]
        return _one_step(shard_map(function, *fun[1:], **options), options.get("mesh"))

    return shard_map_of_the_script


def _one_step(mapped: Any, mesh: Any) -> Any:
    """`mapped` as if it were jitted; a `mesh` without devices gets its arguments'. What only runs
    operation by operation, because its Python asks for values or takes objects that are no arrays,
    is left to do so. What becomes part of a program stands there as the script wrote it.
    """

    @functools.wraps(mapped)
    def named(*args: Any, **kwargs: Any) -> Any:
        return mapped(*args, **kwargs)

    named.__name__ = EAGER_MAP
    jitted = jax.jit(named)

    @functools.wraps(mapped)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _staged():
            return mapped(*args, **kwargs)
        leaves = jax.tree.leaves((args, kwargs))
        if isinstance(mesh, AbstractMesh) and get_concrete_mesh().empty:
            if not any(isinstance(x, jax.core.Tracer) for x in leaves):
                jax_shard_map.get_mesh_from_args(leaves, mesh)  # or says what they lack
        try:
            return jitted(*args, **kwargs)
        except (TypeError, jax.errors.JAXIndexError):
            return mapped(*args, **kwargs)

    return call


@functools.lru_cache(maxsize=256)
def _whole(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Any:
    """A loop or branch as if it were jitted."""

    def named(*args: Any) -> Any:
        return primitive.bind(*args, **dict(params))

    named.__name__ = EAGER_WHOLE
    named.__qualname__ = EAGER_WHOLE
    return jax.jit(named)


@contextmanager
def _looping(source: str) -> Iterator[None]:
    before, _CALLER.looped = _CALLER.looped, source
    try:
        yield
    finally:
        _CALLER.looped = before


def _staged() -> bool:
    """Whether JAX is making a program now (for a jit or `jax.make_jaxpr`, under whatever
    transformations) rather than computing.
    """
    trace = jax_core.trace_ctx.trace
    while trace is not None and not isinstance(trace, partial_eval.DynamicJaxprTrace):
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def _as_the_scripts(function: Any) -> Any:
    """A function of JAX's that the script jits is the script's step, by its place in the source."""
    if not callable(function) or not _of_jax(api_util.fun_sourceinfo(function)):
        return function
    try:
        return _wrapped(function)
    except TypeError:  # not hashable
        return _wrapped.__wrapped__(function)


@functools.lru_cache(maxsize=256)
def _wrapped(function: Any) -> Any:
    def step(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    functools.update_wrapper(step, inner)
    del step.__wrapped__  # type: ignore[attr-defined]  # JAX would look through it
    return step


def _device_put(device_put: Any) -> Any:
    """An array that one device has is shared with the others instead of copied to each."""

    def shared(x: Any) -> Any:
        plain = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        if (
            plain
            and len(x.devices()) == 1
            and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
        ):
            return np.asarray(x)
        return x

    @functools.wraps(device_put)
    def device_put_of_the_script(x: Any, device: Any = None, **options: Any) -> Any:
        if device is not None:
            x = jax.tree.map(shared, x)
        return device_put(x, device, **options)

    return device_put_of_the_script
