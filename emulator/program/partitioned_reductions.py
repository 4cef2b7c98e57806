"""Reductions over devices that XLA's partitioner makes and `jax.lax` has no name for: a product or
a bitwise reduction over a divided dimension. They are primitives of our own, with `psum`'s
parameters, and stand in divided programs only.
"""

from __future__ import annotations

from typing import Any

from jax.extend import core

#: How XLA combines values -> the primitive that does so over mesh axes.
PRIMITIVES = {
    "multiply": core.Primitive("pprod"),
    "and": core.Primitive("pand"),
    "or": core.Primitive("por"),
    "xor": core.Primitive("pxor"),
}

#: The primitives' names -> the operations of `collectives.combine`.
KINDS = {"pprod": "prod", "pand": "and", "por": "or", "pxor": "xor"}

for _primitive in PRIMITIVES.values():
    _primitive.def_abstract_eval(lambda x, **_: x)


def reduced(how: str, x: Any, axes: tuple[str, ...], groups: list[list[int]] | None) -> Any:
    """`x` combined over the devices of each group as XLA's operation `how` does."""
    listed = None if groups is None else tuple(map(tuple, groups))
    return PRIMITIVES[how].bind(x, axes=axes, axis_index_groups=listed)
