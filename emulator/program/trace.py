"""A program as plain data: the jaxpr that both readings walk.

A *path* names an equation wherever it is nested, so that the values reading can report what it
measured (trip counts, branches taken) and the time reading can find it again. It is a string: "/3"
is equation 3 of the outermost jaxpr, "/3/0" equation 0 inside the body of equation 3. Equations
with several bodies add a label: a `while` at "/5" has "/5.cond" and "/5.body", a `cond` at "/6" has
"/6.0", "/6.1", ... so its first branch's first equation is "/6.0/0".
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

#: The name of the jitted function in which `em.emulate` computes: not a program of the machine's.
EMULATED = "cm384_emulated"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A traced function: `jaxpr` over flat array inputs and outputs, and the trees to rebuild them.

    `dynamic` says which leaves of the arguments are inputs of the jaxpr; the others (strings, None-
    like objects, ...) were taken as constants.
    """

    jaxpr: core.ClosedJaxpr
    in_tree: Any
    out_tree: Any
    dynamic: tuple[bool, ...]


def trace(
    fun: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Program:
    """Traces `fun(*args, **kwargs)`; leaves may be arrays, Python numbers or
    `jax.ShapeDtypeStruct`.

    A function made by `em.emulate` or `em.pmap` is traced as the program it was made from.

    Raises:
        TypeError: `fun` is not callable. ValueError: JAX rejects the program (a dimension that the
        mesh does not divide, an unknown axis, ...).
    """
    if not callable(fun):
        raise TypeError(f"fun must be a function to trace, got {type(fun).__name__}: {fun!r}")
    fun = getattr(fun, "program", fun)
    leaves, in_tree = jax.tree.flatten((tuple(args), dict(kwargs or {})))
    dynamic = tuple(is_array_like(leaf) for leaf in leaves)
    out_tree: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        arrays_left = iter(arrays)
        filled = [next(arrays_left) if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
        call_args, call_kwargs = jax.tree.unflatten(in_tree, filled)
        outs, tree = jax.tree.flatten(fun(*call_args, **call_kwargs))
        out_tree[:] = [tree]
        return outs

    arrays = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
    try:
        jaxpr = jax.make_jaxpr(flat)(*arrays)
    except ValueError as error:
        if "Non-hashable static arguments" not in str(error):
            raise
        raise TypeError(
            "numbers are traced as arrays here, and the function is a jax.jit that wants one "
            "static; bind it first, as in functools.partial(fun, number)"
        ) from error
    except (NameError, AssertionError) as error:
        if str(error) and "axis name" not in str(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]  # JAX asserts that the axis is there
        raise ValueError(
            "a collective names an axis that no enclosing shard_map or pmap has: "
            f"{at.line or error} ({at.filename}:{at.lineno}); name an axis of the mesh"
        ) from error
    return Program(jaxpr=jaxpr, in_tree=in_tree, out_tree=out_tree[0], dynamic=dynamic)


def is_array_like(leaf: Any) -> bool:
    """Whether `jax.jit` would take this leaf of an argument as an array."""
    return isinstance(leaf, (bool, int, float, complex)) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def sub_jaxprs(eqn: Any) -> list[tuple[str, Any]]:
    """The bodies of one equation as (label, open or closed jaxpr): label "" for a single body.

    custom_jvp/vjp calls give the primal body only; `while` gives cond and body, `cond` its
    branches.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        return [(".cond", params["cond_jaxpr"]), (".body", params["body_jaxpr"])]
    if name == "cond":
        return [(f".{i}", branch) for i, branch in enumerate(params["branches"])]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params and is_jaxpr(params[key]):
            return [("", params[key])]
    return []


def is_jaxpr(value: Any) -> bool:
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


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


def dynamic_sites(jaxpr: Any) -> dict[str, str]:
    """Equations whose time only values can tell: path -> name ("while_0", "cond_1", ...), numbered
    in program order.
    """
    sites: dict[str, str] = {}
    numbers = {"while": 0, "cond": 0}
    for path, eqn in walk(jaxpr):
        kind = eqn.primitive.name
        if kind in numbers:
            sites[path] = f"{kind}_{numbers[kind]}"
            numbers[kind] += 1
    return sites
