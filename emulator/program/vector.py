"""Element-wise primitives and reductions with bits that do not depend on batching, fusion or jit.

XLA:CPU may contract `a * b + c` into a fused multiply-add, may turn a division by a broadcast value
into a product with its reciprocal, evaluates exp, log, tanh and their like differently in
vectorised and in scalar code and with every level of instructions, may keep a BF16 intermediate in
FP32, and sums in an order that changes with the shape of the batch. Here

- the basic operations round once to their own type;
- exponentials, logarithms and their like (`emulator.program.functions`) give the FP32 number
  nearest to the true value, on every host;
- other transcendental functions, and those of FP64, are XLA's, evaluated apart from all else over
  the flat array (at least 64 elements), so that they give the bits of that function called alone on
  a large array;
- a floating sum or product has an order of its own: the reduced elements, flattened, are cut into
  eight equal contiguous blocks (the last padded with the neutral element), which are combined
  element by element as ((0+1)+(2+3))+((4+5)+(6+7)); this repeats until one element is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import kernels
from emulator.program import functions
from emulator.program.folded import Folded, FoldedMesh, union_axes
from emulator.program.functions import no_contraction
from kernels.apart import apart, calls_stay

_BLOCKS = 8
_ALONE = 64  # shorter arrays may be evaluated by scalar code

#: Element-wise primitives whose result is exact or chosen from the operands: no rounding, nothing
#: to protect.
EXACT = frozenset(
    "abs neg sign floor ceil round max min select_n clamp copy eq ne lt le gt ge "
    "is_finite nextafter real imag not and or xor population_count clz shift_left "
    "shift_right_logical shift_right_arithmetic mulhi stop_gradient eq_to lt_to le_to".split()
)
#: Basic operations: the next floating-point rounding is theirs, and nothing can be contracted into
#: them.
_SUMS = frozenset(("add", "sub", "add_any"))
_PRODUCTS = frozenset(("mul", "square", "integer_pow"))
_OTHER_BASIC = frozenset(("div", "sqrt", "rem", "reduce_precision", "complex", "conj"))
#: Functions that XLA expands into many operations.
TRANSCENDENTAL = frozenset(
    "pow rsqrt cbrt exp exp2 expm1 log log2 log1p one_minus_square tanh sinh cosh sin cos tan "
    "asin acos atan asinh acosh atanh atan2 logistic erf erfc erf_inv lgamma digamma polygamma "
    "igamma igammac igamma_grad_a bessel_i0e bessel_i1e "
    "regularized_incomplete_beta zeta".split()
)
ELEMENTWISE = EXACT | _SUMS | _PRODUCTS | _OTHER_BASIC | TRANSCENDENTAL | {"convert_element_type"}


def elementwise(
    bind: Callable[..., Any], eqn: Any, values: Sequence[Folded], mesh: FoldedMesh, exact: bool
) -> Folded:
    """One element-wise equation on stacked arrays; `exact` keeps the promise of this module's first
    paragraph.
    """
    axes = union_axes(mesh, values)
    out_dtype = eqn.outvars[0].aval.dtype
    shape = mesh.shape(axes) + tuple(eqn.outvars[0].aval.shape)
    arrays = [_stretch(value, axes, shape) for value in values]
    name = eqn.primitive.name
    if not exact or not jnp.issubdtype(out_dtype, jnp.floating):
        return Folded(bind(*arrays), axes)
    if name == "convert_element_type":
        return Folded(_convert(arrays[0], out_dtype), axes)
    if name in EXACT:
        return Folded(bind(*arrays), axes)
    if name in _SUMS and any(v.known for v in values):
        name = "mul"  # as a product: XLA would add constants that follow one another first
    if name == "div" and _is_power_of_two(values[1].array):
        name = "mul"  # by a reciprocal that is exact: all the same to the bits
    if jnp.dtype(out_dtype).itemsize >= 4:
        return Folded(_rounded_once(bind, name, arrays), axes)
    wide = [a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
    return Folded(_convert(_rounded_once(bind, name, wide), out_dtype), axes)


def _is_power_of_two(x: Any) -> bool:
    """Whether all elements are known now, and powers of two with normal reciprocals."""
    if isinstance(x, jax.core.Tracer):
        return False
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return bool(np.all((np.abs(fraction) == 0.5) & (np.abs(exponent - 1) <= 126)))


def _rounded_once(bind: Callable[..., Array], name: str, arrays: Sequence[Array]) -> Array:
    if name in _PRODUCTS:
        return no_contraction(bind(*arrays))
    if name == "div":  # a divisor that depends on the dividend cannot become a reciprocal
        dividend, divisor = arrays
        divisor = lax.select(dividend != dividend, lax.full_like(divisor, math.nan), divisor)
        return no_contraction(bind(dividend, divisor))
    if name in functions.OWN and arrays[0].dtype == jnp.float32:
        return _alone(functions.OWN[name], arrays)
    if name in TRANSCENDENTAL:
        return _alone(bind, arrays)
    return bind(*arrays)


def _alone(fun: Callable[..., Array], arrays: Sequence[Array]) -> Array:
    """`fun` of the flat arrays, not fused with its surroundings."""
    shape, size = arrays[0].shape, arrays[0].size
    if size == 0:
        return fun(*arrays)
    flat = tuple(lax.reshape(a, (size,)) for a in arrays)
    if size < _ALONE:
        flat = tuple(lax.pad(a, lax.full((), 1, a.dtype), [(0, _ALONE - size, 0)]) for a in flat)
    result = apart(jax.jit(fun)(*flat)) if calls_stay() else _in_a_loop(fun, flat)
    return lax.reshape(result[:size], shape)


def _in_a_loop(fun: Callable[..., Array], flat: Sequence[Array]) -> Array:
    """`fun` in a loop that runs once, which XLA cannot know and so cannot fuse with what is around
    it.
    """
    first = lax.bitcast_convert_type(flat[0][0].astype(jnp.float32), jnp.int32)
    zero = lax.shift_right_logical(
        lax.population_count(first), jnp.int32(6)
    )  # at most 32 bits are set
    _, result, *_ = lax.while_loop(
        lambda carry: carry[0] < 1,
        lambda carry: (carry[0] + 1, fun(*carry[1:]), *carry[2:]),
        (zero, *flat),
    )
    return result


def _stretch(value: Folded, axes: tuple[str, ...], shape: tuple[int, ...]) -> Array:
    """The array broadcast to the stacked `shape`; a size-1 mesh axis is inserted where it does not
    vary.
    """
    array = jnp.asarray(value.array)
    if array.shape == shape and value.axes == axes:
        return array
    dims = [i for i, axis in enumerate(axes) if axis in value.axes]
    if value.local_shape:
        dims += range(len(axes), len(shape))
    return lax.broadcast_in_dim(array, shape, dims)


def _convert(array: Array, dtype: Any) -> Array:
    """array -> dtype with one rounding to nearest even that XLA cannot elide."""
    if array.dtype == jnp.bool_:  # XLA takes a product with a converted one for a choice
        return lax.select(array, lax.full_like(array, 1, dtype), lax.full_like(array, 0, dtype))
    if jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and _is_wider_than_fp32(array.dtype):
        array = _in_fp32(array)
    if array.dtype != jnp.dtype(dtype) and jnp.issubdtype(array.dtype, jnp.floating):
        if jnp.dtype(dtype) == jnp.bfloat16:
            if array.dtype == jnp.float32:
                array = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        elif jnp.dtype(dtype) == jnp.float16 and array.dtype == jnp.float32:
            return kernels.fixpipe.round_to(array, jnp.float16)
    return lax.convert_element_type(array, dtype)


def _is_wider_than_fp32(dtype: Any) -> bool:
    return dtype.itemsize >= 4 and (dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.integer))


def _in_fp32(array: Array) -> Array:
    """FP64 numbers or integers of 32 and 64 bits in FP32, cut so that to round them further is to
    round once.
    """
    if jnp.issubdtype(array.dtype, jnp.integer):
        bits = 8 * array.dtype.itemsize
        digits, floating = (24, jnp.float32) if bits == 32 else (53, jnp.float64)
        exact = jnp.abs(array) < 1 << digits
        array = jnp.where(exact, array, _to_odd(array, bits - digits)).astype(floating)
    if array.dtype == jnp.float64:
        words = _to_odd(lax.bitcast_convert_type(array, jnp.uint64), 29)
        array = lax.bitcast_convert_type(words, jnp.float64)
    return array.astype(jnp.float32)


def _to_odd(words: Array, count: int) -> Array:
    """`words` without the last `count` bits; if any was set, the last one left is set: whatever is
    rounded from there sees no false tie.
    """
    lost = (words & ((1 << count) - 1)) != 0
    return ((words >> count) | lost.astype(words.dtype)) << count


def reduce_tree(value: Folded, dims: Sequence[int], kind: str) -> Folded:
    """Sum or product ("reduce_sum", "reduce_prod") over local `dims` in this module's order."""
    array, skip = jnp.asarray(value.array), len(value.axes)
    dims = sorted(skip + d for d in dims)
    if not dims:
        return value
    kept = [d for d in range(array.ndim) if d not in dims]
    if dims[-1] - dims[0] != len(dims) - 1:  # not adjacent: bring them to the end
        array = lax.transpose(array, [*kept, *dims])
        dims = list(range(len(kept), array.ndim))
    at, count = dims[0], math.prod(array.shape[d] for d in dims)
    rest = array.shape[dims[-1] + 1 :]
    array = array.reshape(*array.shape[:at], count, *rest)
    neutral, combine = _monoid(kind, array.dtype)
    if count == 0:
        filled = lax.full(array.shape[:at] + rest, 0 if kind == "reduce_sum" else 1, array.dtype)
        return Folded(filled, value.axes)
    while array.shape[at] > 1:
        array = _combine_blocks(array, at, neutral, combine)
    return Folded(lax.squeeze(array, (at,)), value.axes)


def _combine_blocks(
    array: Array, at: int, neutral: Array, combine: Callable[[Array, Array], Array]
) -> Array:
    count = array.shape[at]
    block = -(-count // _BLOCKS)
    n = -(-count // block)  # fewer than eight when the count is small: the missing ones are neutral
    if n * block != count:
        padding = [(0, 0, 0)] * array.ndim
        padding[at] = (0, n * block - count, 0)
        array = lax.pad(array, neutral, padding)
    parts = [lax.slice_in_dim(array, i * block, (i + 1) * block, axis=at) for i in range(n)]
    while len(parts) > 1:
        pairs = [combine(parts[i], parts[i + 1]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _monoid(kind: str, dtype: Any) -> tuple[Array, Callable[[Array, Array], Array]]:
    narrow = jnp.dtype(dtype).itemsize < 4

    def add(x: Array, y: Array) -> Array:
        return _convert(x.astype(jnp.float32) + y.astype(jnp.float32), dtype) if narrow else x + y

    def mul(x: Array, y: Array) -> Array:
        if narrow:
            return _convert(x.astype(jnp.float32) * y.astype(jnp.float32), dtype)
        return no_contraction(x * y)

    return (
        (jnp.asarray(-0.0, dtype), add) if kind == "reduce_sum" else (jnp.asarray(1.0, dtype), mul)
    )


def vmapped(
    fun: Callable[..., Any], values: Sequence[Folded], mesh: FoldedMesh
) -> tuple[Any, tuple[str, ...]]:
    """`fun` of one device's local arrays, for all devices: one `vmap` per mesh axis that any
    operand varies over.
    """
    axes = union_axes(mesh, values)
    if not axes:
        return fun(*(v.array for v in values)), axes
    if all(v.axes in ((), axes) for v in values):  # one vmap over all axes at once traces faster
        size = math.prod(mesh.shape(axes))
        flat = [v.array.reshape(size, *v.local_shape) if v.axes else v.array for v in values]
        result = jax.vmap(fun, in_axes=[0 if v.axes else None for v in values])(*flat)
        return jax.tree.map(lambda r: r.reshape(*mesh.shape(axes), *r.shape[1:]), result), axes
    for axis in reversed(axes):
        fun = jax.vmap(fun, in_axes=[0 if axis in v.axes else None for v in values])
    return fun(*(v.array for v in values)), axes
