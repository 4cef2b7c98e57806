"""A program as plain data: the jaxpr that both readings walk.

A *path* names an equation wherever it is nested, so that the values reading can report what it
measured (trip counts, branches taken) and the time reading can find it again. It is a string: "/3"
is equation 3 of the outermost jaxpr, "/3/0" equation 0 inside the body of equation 3. Equations
with several bodies add a label: a `while` at "/5" has "/5.cond" and "/5.body", a `cond` at "/6" has
"/6.0", "/6.1", ... so its first branch's first equation is "/6.0/0".
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src.api_util import fun_sourceinfo
from jax.api_util import debug_info, shaped_abstractify
from jax.extend import core
from jax.extend.linear_util import wrap_init
from jax.interpreters.partial_eval import trace_to_jaxpr_dynamic

from emulator.program.calls import call_body, is_call, spelled_out
from emulator.program.refs import without_refs
from emulator.program.wide_types import as_wide_as

_JAX = str(Path(jax.__file__).parent)

#: The name of the operation that `em.emulate` makes of a program, and of the jitted function in
#: which it computes: not a program of the machine's.
EMULATED = "cm384_emulated"
#: The name of the jitted function in which a program runs that XLA's partitioner has divided.
DIVIDED = "cm384_divided"
#: What JAX notes of a function that it traces: without the names of arguments, which take long.
_DEBUG_INFO = debug_info("cm384", lambda: None, (), {})._replace(arg_names=None)


class Program(NamedTuple):
    """A traced function: `jaxpr` over flat array inputs and outputs, and the trees to rebuild them.

    `dynamic` says which leaves of the arguments are inputs of the jaxpr; the others (strings, None-
    like objects, ...) were taken as constants.
    """

    jaxpr: core.ClosedJaxpr
    in_tree: Any
    out_tree: Any
    dynamic: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Made:
    """What `em.emulate` or `em.pmap` made the function `by` from: the program, and what its
    arguments are to be before they are flattened, if anything else.

    It stands in an attribute of the function. Whoever wraps that (`jax.grad`, `functools.wraps`)
    copies the attribute to a function that is another.
    """

    by: Callable[..., Any]
    program: Callable[..., Any]
    hold: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None

    def note(self) -> None:
        self.by.__dict__["cm384_made"] = self


def made(fun: Any) -> Made | None:
    """What `em.emulate` or `em.pmap` made `fun` from; None if it is of neither."""
    found = getattr(fun, "cm384_made", None)
    return found if isinstance(found, Made) and found.by is fun else None


def program_of(fun: Any) -> Any:
    """The program that `fun` was made from, or `fun`."""
    of = made(fun)
    return fun if of is None else of.program


def held(fun: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` of a call of `fun`, static ones as what is no array of the program."""
    of = made(fun)
    return args if of is None or of.hold is None else of.hold(args)


def trace(
    fun: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Program:
    """Traces `fun(*args, **kwargs)`; leaves may be arrays, Python numbers or
    `jax.ShapeDtypeStruct`.

    A function made by `em.emulate` or `em.pmap` is traced as the program it was made from.

    Raises:
        TypeError: `fun` is not callable, or a result of it is no array. ValueError: JAX rejects the
        program (a dimension that the mesh does not divide, an unknown axis, ...).
        NotImplementedError: JAX has no rule for a part of it.
    """
    return trace_leaves(fun, *jax.tree.flatten((tuple(args), dict(kwargs or {}))))


def trace_leaves(fun: Callable[..., Any], leaves: Sequence[Any], in_tree: Any) -> Program:
    """As `trace`, of arguments and keyword arguments that are flattened already."""
    if not callable(fun):
        raise TypeError(f"fun must be a function to trace, got {type(fun).__name__}: {fun!r}")
    fun = program_of(fun)
    dynamic = tuple(map(is_array_like, leaves))
    out_tree: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        arrays_left = iter(arrays)
        filled = [next(arrays_left) if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
        call_args, call_kwargs = jax.tree.unflatten(in_tree, filled)
        result = fun(*call_args, **call_kwargs)
        _check_result(fun, result)
        outs, tree = jax.tree.flatten(result)
        out_tree[:] = [tree]
        return outs

    try:
        jaxpr = _jaxpr(flat, list(itertools.compress(leaves, dynamic)), fun)
    except ValueError as error:
        if _is_of_pmap(error):
            raise ValueError(
                f"jax.pmap has the {jax.device_count()} devices of this process, one for each row "
                "of its arguments; with more rows take em.pmap(fun, axis_name=..., on=machine)"
            ) from error
        if "Non-hashable static arguments" not in str(error):
            raise
        raise TypeError(
            "numbers are traced as arrays here, and the function is a jax.jit that wants one "
            "static; bind it first, as in functools.partial(fun, number)"
        ) from error
    except (NameError, AssertionError) as error:
        if str(error) and "axis name" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        # JAX asserts that the axis is there; it may have left its own frames out.
        at = next(frame for frame in reversed(frames) if not frame.filename.startswith(_JAX))
        asserted = isinstance(error, AssertionError)
        if asserted and at == frames[-1] and re.search(r"\b(assert|raise)\b", _statement(at)):
            raise
        if asserted and "ragged_all_to_all" in _statement(at):
            raise NotImplementedError(
                "JAX has no rule for ragged_all_to_all under a vmap of some of its operands "
                f"({at.filename}:{at.lineno}); batch all six, as in jnp.broadcast_to"
            ) from error
        raise ValueError(
            "a collective names an axis that no enclosing shard_map or pmap has: "
            f"{at.line or error} ({at.filename}:{at.lineno}); name an axis of the mesh, or, if it "
            "is that of a jax.vmap inside shard_map, pass check_vma=False to shard_map"
        ) from error
    if jaxpr.jaxpr.is_high:
        with as_wide_as(jaxpr):
            jaxpr = spelled_out(jaxpr)
    return Program(
        jaxpr=without_refs(jaxpr), in_tree=in_tree, out_tree=out_tree[0], dynamic=dynamic
    )


def _jaxpr(
    flat: Callable[..., list[Any]], arrays: Sequence[Any], fun: Callable[..., Any]
) -> core.ClosedJaxpr:
    """As `jax.make_jaxpr(flat)(*arrays)`, but without the `jax.jit` that this makes first, which
    takes longer than tracing a small program does. JAX's messages speak of `fun`.
    """
    named = _DEBUG_INFO._replace(func_src_info=fun_sourceinfo(fun))
    traced = wrap_init(flat, debug_info=named)
    jaxpr, _, consts = trace_to_jaxpr_dynamic(traced, list(map(shaped_abstractify, arrays)))
    return core.ClosedJaxpr(jaxpr, consts)


def _check_result(fun: Any, result: Any) -> None:
    """Raises TypeError where a leaf of the result is no array."""
    if isinstance(result, jax.Array):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
        try:
            jax.typeof(leaf)
        except TypeError as error:
            name = getattr(fun, "__name__", type(fun).__name__)
            raise TypeError(
                f"the result of a program must be arrays, but {name} returns "
                f"{type(leaf).__name__} {leaf!r:.60} at result{jax.tree_util.keystr(path)}; "
                "return it from elsewhere"
            ) from error


def _is_of_pmap(error: ValueError) -> bool:
    """Whether `jax.pmap` found arguments with more rows than there are devices."""
    if not re.search("squeeze out|evenly divisible", str(error)):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    known = [f for f in files if f.endswith("pmap.py") or not f.startswith(_JAX)]
    return known[-1].startswith(_JAX)


def _statement(at: traceback.FrameSummary) -> str:
    """The source of what a frame was executing."""
    lines = linecache.getlines(at.filename)
    return "".join(lines[(at.lineno or 1) - 1 : at.end_lineno])


def is_array_like(leaf: Any) -> bool:
    """Whether `jax.jit` would take this leaf of an argument as an array."""
    if isinstance(leaf, (jax.core.Tracer, bool, int, float, complex)):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def sub_jaxprs(eqn: Any) -> list[tuple[str, Any]]:
    """The bodies of one equation as (label, open or closed jaxpr): label "" for a single body.

    custom_jvp/vjp calls give the primal body only; `while` gives cond and body, `cond` its
    branches.
    """
    name, params = eqn.primitive.name, eqn.params
    if (call := call_body(eqn)) is not None:
        return [("", call[0])]
    if name == "while":
        return [(".cond", params["cond_jaxpr"]), (".body", params["body_jaxpr"])]
    if name == "cond":
        return [(f".{i}", branch) for i, branch in enumerate(params["branches"])]
    return [("", params["jaxpr"])] if name in ("scan", "shard_map") else []


def open_jaxpr(jaxpr: Any) -> core.Jaxpr:
    """The open jaxpr of either kind."""
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are constants and how many are carried; JAX 0.11 keeps them in
    a tree.
    """
    if "ft_in" in params:
        consts, carry, _ = (len(part) for part in params["ft_in"].unpack())
        return consts, carry
    return params["num_consts"], params["num_carry"]


def walk(jaxpr: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every equation with its path, outer before inner, in program order."""
    for i, eqn in enumerate(open_jaxpr(jaxpr).eqns):
        here = f"{path}/{i}"
        yield here, eqn
        for label, body in sub_jaxprs(eqn):
            yield from walk(body, here + label)


def is_emulated(eqn: Any) -> bool:
    """Whether an equation is what `em.emulate` or `em.pmap` made of another program."""
    return EMULATED in (eqn.primitive.name, eqn.params.get("name"))


#: Primitives whose time only values can tell.
DYNAMIC = ("while", "cond", "ragged_dot_general", "ragged_all_to_all")


def is_dynamic(eqn: Any) -> bool:
    """Whether only values can tell the time of an equation."""
    name = eqn.primitive.name
    if name == "ragged_dot_general":  # groups of whole matmuls cost what the matmuls cost
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        _, (batch, _) = numbers.dot_dimension_numbers
        return numbers.lhs_ragged_dimensions[0] not in batch
    return name in DYNAMIC and not is_call(eqn)


#: Primitives whose time is the host's: what its Python takes, no reading can tell.
OF_THE_HOST = ("pure_callback", "io_callback")


def host_sites(jaxpr: Any) -> dict[str, str]:
    """Calls whose time is the host's: path -> name ("pure_callback_0", "io_callback_0"), numbered
    in program order.
    """
    sites: dict[str, str] = {}
    numbers = dict.fromkeys(OF_THE_HOST, 0)
    for path, eqn in walk(jaxpr):
        kind = eqn.primitive.name
        if kind in numbers:
            sites[path] = f"{kind}_{numbers[kind]}"
            numbers[kind] += 1
    return sites


def dynamic_sites(jaxpr: Any) -> dict[str, str]:
    """Equations whose time only values can tell: path -> name ("while_0", "cond_1",
    "ragged_dot_0", "ragged_all_to_all_0"), numbered in program order.
    """
    sites: dict[str, str] = {}
    numbers = dict.fromkeys(DYNAMIC, 0)
    for path, eqn in walk(jaxpr):
        if is_dynamic(eqn):
            kind = eqn.primitive.name
            sites[path] = f"{kind.removesuffix('_general')}_{numbers[kind]}"
            numbers[kind] += 1
    return sites
