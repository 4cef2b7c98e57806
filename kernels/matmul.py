"""Matrix multiplication with a chosen unit's arithmetic: the JAX twin of `kernels.reference`."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from kernels import aligned, arguments, fixpipe, floats, operands, product, tiled, tree
from kernels.arithmetic import ASCEND_910C, INTEGERS, Arithmetic
from kernels.tiling import Tiling, check, resolve


def matmul(
    a: Float[ArrayLike, "... m k"],
    b: Float[ArrayLike, "... k n"],
    c: Float[ArrayLike, "... m n"] | None = None,
    *,
    arithmetic: Arithmetic = ASCEND_910C,
    tiling: Tiling | str | None = None,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "... m n"]:
    """`a @ b + c` bit for bit as the matrix unit of `arithmetic` computes it.

    BF16 and FP16 pairs run as they are; if either operand is FP32 both are taken as FP32 and run in
    the unit's FP32 mode. K ascends in steps of `arithmetic.products`; the accumulator is FP32,
    starts at `c` (default +0) and is rounded once to nearest even if `out_dtype` (default FP32) is
    narrower. Subnormals, infinities and NaNs follow the record. Pairs of INT8 or of INT4 give INT32
    and take such a `c`; their sum is exact modulo 2^32. `c` is broadcast to the result. Without
    products (k = 0) no step runs and `c` is the result as it is. Python's numbers and lists are
    FP32 (`c` of integer pairs: INT32).

    A `tiling` sums K in another order, in which the bits of a row may depend on where it is (see
    `kernels.tiling`); "library" is the choice of Ascend's library for m, k and n. Every matrix of a
    batch is tiled by itself.

    The result does not depend on jit, vmap or batching. Derivatives are those of a matrix product,
    computed with the same arithmetic and tiling ("library" chooses anew for their shapes): forward
    in the mode of the operands, backward in the FP32 mode.

    Raises:
        TypeError: a dtype that the unit does not take, `c` not of the accumulator's, or a `tiling`
            of another kind.
        ValueError: shapes that do not fit.
        NotImplementedError: FP32 operands on a unit without an FP32 mode.
    """
    check(tiling)
    a, b = _array(a, "a"), _array(b, "b")
    accumulator = np.int32 if a.dtype.name in INTEGERS else np.float32
    c = None if c is None else _array(c, "c", accumulator)
    unit, batch = arguments.checked(a, b, c, arithmetic)
    arguments.check_out_dtype(out_dtype, a.dtype.name)
    size = math.prod(batch)
    out_shape = (*batch, a.shape[-2], b.shape[-1])
    if c is not None:
        c = jnp.broadcast_to(c, out_shape).reshape(size, *out_shape[-2:])
    a = jnp.broadcast_to(a, batch + a.shape[-2:]).reshape(size, *a.shape[-2:])
    b = jnp.broadcast_to(b, batch + b.shape[-2:]).reshape(size, *b.shape[-2:])
    total = multiply(a, b, c, unit, tiling)
    if a.dtype.name not in INTEGERS and out_dtype is not None:
        total = fixpipe.round_to(total, out_dtype, arithmetic.overflow)
    return total.reshape(out_shape)


def _array(x: ArrayLike, name: str, of_python: DTypeLike = np.float32) -> Array:
    """`x` as a JAX array, numbers of Python's in `of_python`; 64 bits are not cut to 32 behind the
    caller's back.
    """
    dtype = getattr(x, "dtype", None)
    if dtype in (np.float64, np.int64):
        wanted = "FP32 (of integers: INT32)" if name == "c" else "BF16, FP16, FP32, INT8 or INT4"
        raise TypeError(f"matmul: expected {name} in {wanted}, got {dtype}; cast it first")
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"matmul: expected {name} to be an array, got {type(x).__name__}"
        ) from error
    if dtype is None and array.dtype.name in ("int32", "int64", "float64"):
        return array.astype(of_python)
    return array


def multiply(
    a: Array,
    b: Array,
    c: Array | None,
    arithmetic: Arithmetic,
    tiling: Tiling | str | None = None,
) -> Array:
    """The core: `[batch, m, k] x [batch, k, n] + [batch, m, n]` to FP32, or integers to INT32."""
    check(tiling)
    a, b, *rest = _varying_alike([a, b] if c is None else [a, b, c])
    c = rest[0] if rest else None
    if a.dtype.name in INTEGERS:
        a, b = a.astype(jnp.int8), b.astype(jnp.int8)  # XLA:CPU does not sum products of INT4
        tiling = None
    return _bind(arithmetic, tiling, a, b, c)


def _varying_alike(operands: list[Array]) -> list[Array]:
    """Within a `shard_map` that checks it: all varying over the axes over which any varies."""
    axes = [jax.typeof(x).mat.varying for x in operands]
    every = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(every - own), to="varying") if every - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


# One operation for JAX, whatever it is made of: `vmap` adds to its batch dimension, so that
# branches on data stay branches, and a `shard_map` need not know over which of its axes the loops
# inside vary.
_primitive = Primitive("unit_matmul")


def _bind(
    arithmetic: Arithmetic, tiling: Tiling | str | None, a: Array, b: Array, c: Array | None
) -> Array:
    operands = (a, b) if c is None else (a, b, c)
    found: Array = _primitive.bind(*operands, arithmetic=arithmetic, tiling=tiling)
    return found


def _lowered(
    a: Array, b: Array, *c: Array, arithmetic: Arithmetic, tiling: Tiling | str | None
) -> Array:
    return _compute(a, b, c[0] if c else None, arithmetic, tiling)


@_primitive.def_impl
def _eager(*operands: Array, **options: Any) -> Array:
    with jax.disable_jit(False):
        return _lowered(*operands, **options)


@_primitive.def_abstract_eval
def _shape(a: Any, b: Any, *c: Any, arithmetic: Arithmetic, tiling: Tiling | str | None) -> Any:
    dtype = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return a.update(shape=(a.shape[0], a.shape[1], b.shape[2]), dtype=jnp.dtype(dtype))


def _batched(operands: Any, dims: Any, **options: Any) -> Any:
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    batch = size * stacked[0].shape[1]
    found = _primitive.bind(*(x.reshape(batch, *x.shape[2:]) for x in stacked), **options)
    return found.reshape(size, stacked[0].shape[1], *found.shape[1:]), 0


def _derivative(
    primals: Any, tangents: Any, *, arithmetic: Arithmetic, tiling: Tiling | str | None
) -> tuple[Array, Any]:
    """The sum of a product for each operand, computed as the product itself, in FP32."""
    (a, b, *c), (da, db, *dc) = primals, tangents
    found = _bind(arithmetic, tiling, a, b, *c, *[None] * (1 - len(c)))
    terms = [x for x in dc if type(x) is not ad.Zero]
    for left, right, tangent in ((da, b, da), (a, db, db)):
        if type(tangent) is not ad.Zero:
            terms.append(_bind(arithmetic, tiling, left, right, None))
    return found, sum(terms[1:], terms[0])  # JAX asks only if there is one


def _transposed(
    cotangent: Any, *operands: Any, arithmetic: Arithmetic, tiling: Tiling | str | None
) -> list[Array | None]:
    """Of a product in one of its operands: one with the FP32 cotangent, hence in FP32 mode, rounded
    once to the operand's type.
    """
    a, b = operands  # the derivative of C is added apart
    if type(cotangent) is ad.Zero:
        return [None, None]
    mode = arithmetic.mode("float32", "float32")
    if ad.is_undefined_primal(a):
        left = multiply(cotangent, floats.to_float32(b).swapaxes(1, 2), None, mode, tiling)
        return [fixpipe.round_to(left, a.aval.dtype, arithmetic.overflow), None]
    right = multiply(floats.to_float32(a).swapaxes(1, 2), cotangent, None, mode, tiling)
    return [None, fixpipe.round_to(right, b.aval.dtype, arithmetic.overflow)]


def _lower(context: Any, *operands: Any, **options: Any) -> Any:
    """As if nothing varied over the axes of a mesh."""
    plain = context.replace(
        avals_in=[type(x)(x.shape, x.dtype) for x in context.avals_in],
        avals_out=[type(x)(x.shape, x.dtype) for x in context.avals_out],
    )
    return mlir.lower_fun(_lowered, multiple_results=False)(plain, *operands, **options)


ad.primitive_jvps[_primitive] = _derivative
ad.primitive_transposes[_primitive] = _transposed
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _lower)


@partial(jax.jit, static_argnums=(3, 4))
def _compute(
    a: Array, b: Array, c: Array | None, arithmetic: Arithmetic, tiling: Tiling | str | None
) -> Array:
    if a.dtype == jnp.int8:
        total = lax.dot_general(
            a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.int32
        )
        return total if c is None else total + c
    shape = (a.shape[0], a.shape[1], b.shape[2])
    if 0 in shape or a.shape[2] == 0:
        return jnp.zeros(shape, jnp.float32) if c is None else c
    dtype = "float32" if "float32" in (a.dtype.name, b.dtype.name) else a.dtype.name
    plan = resolve(tiling, shape[1], a.shape[2], shape[2], dtype)
    if plan is None:
        return _ascending(a, b, c, arithmetic)
    return tiled.accumulate(
        a, b, c, plan, arithmetic.products, partial(_ascending, arithmetic=arithmetic)
    )


def _ascending(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """Floating-point operands, K in ascending order; no size is 0."""
    if a.dtype != b.dtype:  # FP32 mode: both are FP32 numbers before the unit reads them
        a, b = floats.to_float32(a), floats.to_float32(b)
    if c is not None and arithmetic.specials == "saturate":
        c = operands.saturate(c)
    if arithmetic.summation == "tree":
        return tree.accumulate(a, b, c, arithmetic)
    if arithmetic.fraction_bits is not None:
        return aligned.accumulate(a, b, c, arithmetic)
    return product.accumulate(a, b, c, arithmetic)
