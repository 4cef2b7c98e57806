"""Devices that take turns: those of a few indices of a mesh axis after those of others.

Along an axis over which nothing is communicated devices have nothing to do with one another. All
at once they would have the whole machine's values between two equations written to memory, in
pages that the process must get from the system each time; a few at a time use the same few again
and again, and mostly from the processor's caches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import kernels
from emulator.program import vector
from emulator.program.axes import largest_value
from emulator.program.calls import CALLS
from emulator.program.collective_rules import REDUCTIONS, RULES, collective_axes, groups_differ
from emulator.program.folded import Folded, FoldedMesh
from emulator.program.primitives import IDENTITIES
from emulator.program.trace import is_emulated, walk
from emulator.program.words import words_of
from kernels.apart import apart

#: Bytes of a program's largest value, on all devices that have a turn together.
LARGEST_BYTES = 1 << 23
#: A largest value of fewer times as much is left whole: the turns would take what they save.
_WORTH = 4

_MOVEMENT = frozenset(
    "broadcast_in_dim concatenate iota pad reshape rev slice split squeeze stack transpose".split()
)
_LOCAL_REDUCTIONS = frozenset(
    "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor".split()
)
#: What gives a device the same bits however many others are evaluated with it, and calls nobody.
_EACH_FOR_ITSELF = vector.ELEMENTWISE | IDENTITIES | _MOVEMENT | _LOCAL_REDUCTIONS | {*RULES}


def turns(settings: Any, mesh: FoldedMesh, body: Any, entered: Sequence[Folded]) -> int:
    """In how many turns the devices along the first manual axis evaluate the body of a `shard_map`
    of values `entered`: a divisor of the axis's size, 1 for all at once.
    """
    exact = settings.exact_vector and settings.arithmetic is not None
    if not exact or settings.counting or settings.devices is not None or not mesh.manual:
        return 1
    axis, equations = mesh.manual[0], [equation for _, equation in walk(body)]
    if not all(_is_alone(equation, axis) for equation in equations):
        return 1
    # What all turns need is got ready in each: it should not be more than what each has of its own.
    shared = sum(_nbytes(v) for v in entered if axis not in v.axes)
    limit = max(LARGEST_BYTES, shared)
    devices = math.prod(mesh.shape(mesh.manual))
    values = [v.aval for equation in equations for v in equation.outvars]
    if all(devices * getattr(v, "size", 0) * _itemsize(v) <= _WORTH * limit for v in values):
        return 1
    differ = functools.partial(groups_differ, settings)
    if any(e.primitive.name in REDUCTIONS and differ(mesh, e) for e in equations):
        return 1  # a part of the axis would not do for the others
    nbytes = largest_value(mesh, body, [v.axes for v in entered], differ, axis)
    if nbytes <= _WORTH * limit:
        return 1
    size = mesh.size(axis)
    fitting = [n for n in range(1, size + 1) if size % n == 0 and nbytes <= n * limit]
    return min(fitting, default=size)


def parts_of(array: Any, count: int) -> Callable[[Array], Array]:
    """The one at an index of `count` equal parts along the first axis, to the bit.

    As words: XLA:CPU would make FP32 of BF16 to take parts of it. And apart: it would move making
    words of all of it out of a loop.
    """
    to_words, back = words_of(jnp.result_type(array), array)
    size, *rest = array.shape
    # Where sizes of 1 are among the others, XLA may copy what it could leave.
    all_parts = array.reshape(count, size // count, *(n for n in rest if n != 1))

    def part(parts: Array, index: Array) -> Array:
        return back(lax.dynamic_index_in_dim(to_words(parts), index, keepdims=False))

    def part_at(index: Array) -> Array:
        return apart(jax.jit(part)(all_parts, index)).reshape(size // count, *rest)

    return part_at


def _is_alone(equation: Any, axis: str) -> bool:
    """Whether what an index of `axis` gets from an equation is its own alone, to the bit."""
    name = equation.primitive.name
    types = [v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")]
    if any(jnp.issubdtype(t, jnp.complexfloating) for t in types):
        return False
    if name == "dot_general":
        return all(t.name in kernels.floats.FLOAT_DTYPES for t in types)
    if name in CALLS:
        return not is_emulated(equation)
    return name in _EACH_FOR_ITSELF and axis not in collective_axes(equation)


def _nbytes(value: Folded) -> int:
    return int(jnp.size(value.array)) * _itemsize(value.array)


def _itemsize(x: Any) -> int:
    return int(getattr(getattr(x, "dtype", None), "itemsize", 0))
