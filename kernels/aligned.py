"""The twin for units that cut the terms of a step to a common grid. On an x86 those of NVIDIA's
kind (`is_native`) have `kernels.native_aligned`; this is what all others run, and GPUs: integers
all the way.

K is walked in blocks of some 16 products. A block of both operands is decoded into significands,
exponents and signs; the arithmetic of its steps (`aligned_step`) then runs over all output elements
at once, tiled so that a block of `b` stays in the nearest cache.

All finite inputs take one path. Where there are infinities or NaNs, the same steps also carry along
what becomes of those. The bits are the same everywhere.
"""

import platform
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from kernels import aligned_step, floats, operands
from kernels.aligned_step import Grid, Operands
from kernels.arithmetic import Arithmetic
from kernels.compiled import ALIGNED, compiled

_BLOCK = 16  # products between two passes over the accumulators, if a step has fewer
_NARROW = 16  # columns below which the product is computed transposed
_TILE = 128  # columns of a tile, at most

_product = Primitive("aligned_product")


@dataclass(frozen=True, slots=True)
class _Layout:
    """How K is divided into blocks of `per_block` steps, and N into tiles of `width` columns."""

    steps: int
    products: int
    per_block: int
    tiles: int
    width: int

    @property
    def block(self) -> int:
        return self.per_block * self.products

    @property
    def blocks(self) -> int:
        return -(-self.steps // self.per_block)


def _layout(k: int, n: int, products: int) -> _Layout:
    steps, tiles = -(-k // products), -(-n // _TILE)
    return _Layout(
        steps=steps,
        products=products,
        per_block=min(max(1, _BLOCK // products), steps),
        tiles=tiles,
        width=n if tiles == 1 else -(-n // (8 * tiles)) * 8,
    )


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`, both of one type."""
    if not is_native(arithmetic, a.dtype.name):
        return _by_xla(a, b, c, arithmetic)
    found: Array = _product.bind(a, b, *([] if c is None else [c]), arithmetic=arithmetic)
    return found


def _by_xla(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """As `accumulate`, by XLA's operations. Operands are read (`operands.read`) block by block, so
    that no second copy of them is kept.
    """
    m, n = a.shape[1], b.shape[2]
    if n < _NARROW < m:  # long rows are what the loops below are good at
        turned = None if c is None else c.swapaxes(1, 2)
        return _by_xla(b.swapaxes(1, 2), a.swapaxes(1, 2), turned, arithmetic).swapaxes(1, 2)
    with jax.enable_x64(True):
        if arithmetic.zero == "ieee":
            return _in_steps(a, b, c, arithmetic, specials=True)
        if arithmetic.specials == "saturate" and arithmetic.product_overflow == "keep":
            return _in_steps(a, b, c, arithmetic, specials=False)
        left, right = (operands.read(v, arithmetic) for v in (a, b))
        special = _has_specials(left, right, c, arithmetic)
        found: Array = lax.cond(
            special,
            lambda: _in_steps(a, b, c, arithmetic, specials=True),
            lambda: _in_steps(a, b, c, arithmetic, specials=False),
        )
    return found


def is_native(arithmetic: Arithmetic, dtype: str) -> bool:
    """Whether an x86 has a way of its own for the unit and operands of a type."""
    grid = _grid(arithmetic, dtype)
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and arithmetic.addend == "fused"
        and arithmetic.alignment == "truncate"
        and arithmetic.rounding == "toward_zero"
        and arithmetic.zero == "positive"
        and arithmetic.subnormal_inputs == arithmetic.subnormal_results == "keep"
        and arithmetic.specials == "ieee"
        and arithmetic.product_overflow == "keep"
        and arithmetic.overflow == "inf"
        and grid.precision <= 12  # products are exact in FP32
        and grid.lane == jnp.int32
        and grid.group >= arithmetic.products
    )


def _grid(arithmetic: Arithmetic, dtype: str) -> Grid:
    kept = operands.FRACTION_BITS[dtype]
    if dtype == "float32":
        kept = arithmetic.operand_fraction_bits or kept
    return Grid(arithmetic, kept + 1, operands.LOWEST_EXPONENT[dtype])


def _elsewhere(a: Array, b: Array, *c: Array, arithmetic: Arithmetic) -> Array:
    return _by_xla(a, b, c[0] if c else None, arithmetic)


def _on_cpu(a: Array, b: Array, *c: Array, arithmetic: Arithmetic) -> Array:
    if (native := compiled(ALIGNED)) is None:
        return _elsewhere(a, b, *c, arithmetic=arithmetic)
    addend = c[0] if c else None
    if b.shape[2] < _NARROW < a.shape[1]:
        turned = (None if x is None else x.swapaxes(1, 2) for x in (b, a, addend))
        return native.accumulate(*turned, arithmetic).swapaxes(1, 2)
    found: Array = native.accumulate(a, b, addend, arithmetic)
    return found


@_product.def_abstract_eval
def _shape(a: Any, b: Any, *c: Any, arithmetic: Arithmetic) -> Any:
    return a.update(shape=(a.shape[0], a.shape[1], b.shape[2]), dtype=jnp.dtype(jnp.float32))


mlir.register_lowering(_product, mlir.lower_fun(_elsewhere, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")


def _in_steps(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic, specials: bool) -> Array:
    """As `accumulate`; `specials` as for `aligned_step.step`."""
    k, n = b.shape[1:]
    layout = _layout(k, n, arithmetic.products)
    x = _blocks(a, layout)
    y = _padded(b, layout.blocks * layout.block - k, layout.tiles * layout.width - n)
    start = None if c is None else _tiled(floats.bits32(c), layout)
    words = _accumulate(x, y, start, _grid(arithmetic, a.dtype.name), layout, specials)
    return floats.from_bits32(_untiled(words, n))


# Layouts. Operands are moved as integers, because XLA may widen BF16 arrays.


def _integers(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _padded(x: Array, rows: int, columns: int) -> Array:
    if not rows and not columns:
        return x
    padded = jnp.pad(_integers(x), ((0, 0), (0, rows), (0, columns)))
    return lax.bitcast_convert_type(padded, x.dtype)


def _blocks(a: Array, layout: _Layout) -> Array:
    """`[batch, m, k]` to `[blocks, batch, block * m]`."""
    batch, m, k = a.shape
    a = _padded(a, 0, layout.blocks * layout.block - k)
    x = _integers(a).reshape(batch, m, layout.blocks, layout.block).transpose(2, 0, 3, 1)
    # One axis for two, so that XLA does not put off the transposition.
    return x.reshape(layout.blocks, batch, layout.block * m)


def _tiled(c: Array, layout: _Layout) -> Array:
    """`[batch, m, n]` to `[batch, tiles, m, width]`."""
    batch, m, n = c.shape
    c = jnp.pad(c, ((0, 0), (0, 0), (0, layout.tiles * layout.width - n)))
    return c.reshape(batch, m, layout.tiles, layout.width).swapaxes(1, 2)


def _untiled(c: Array, n: int) -> Array:
    batch, tiles, m, width = c.shape
    return c.swapaxes(1, 2).reshape(batch, m, tiles * width)[:, :, :n]


# The two paths.


def _has_specials(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """Whether a term may be infinite or NaN."""
    left, right = _largest_exponent(a), _largest_exponent(b)
    special = jnp.maximum(left, right) > 127
    if c is not None:
        special |= _largest_exponent(c) > 127
    if arithmetic.product_overflow == "inf":  # a product is below 2^(sum of exponents + 2)
        special |= left + right > 125
    return special


def _largest_exponent(x: Array) -> Array:
    """The exponent of the largest magnitude in `x`; 128 if there is an infinity or a NaN."""
    magnitude = (floats.bits32(x) & floats.MAGNITUDE).astype(jnp.int32)
    # In two goes, along the long axes, because XLA vectorises that.
    return (jnp.max(jnp.max(magnitude, axis=1)) >> 23) - 127


def _accumulate(
    a: Array, b: Array, c: Array | None, grid: Grid, layout: _Layout, specials: bool
) -> Array:
    """FP32 words of the accumulators `[batch, tiles, m, width]` after all steps.

    Args:
        a: integers `[blocks, batch, block * m]`, the bits of operands of `b`'s type.
        b: `[batch, blocks * block, tiles * width]`.
        c: the first accumulators in FP32 words, in the shape of the result; `None`: zeros.
        grid, layout: as their classes say.
        specials: whether a term may be infinite or NaN, or the sign of a zero matters.
    """
    tiles, width, products, block = layout.tiles, layout.width, layout.products, layout.block
    batch, m, dtype = b.shape[0], a.shape[-1] // block, b.dtype
    b = _integers(b)

    def body(c: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        x, index = part
        y = lax.dynamic_slice_in_dim(b, index * block, block, 1)
        y = y.reshape(batch, block, tiles, width).swapaxes(1, 2)
        y = y.reshape(batch, tiles, block * width)  # the rows of a tile lie together
        x, y = (
            floats.bits32(operands.read(lax.bitcast_convert_type(z, dtype), grid.arithmetic))
            for z in (x, y)
        )
        left = aligned_step.decode(x, grid, grid.up, specials)
        right = aligned_step.decode(y, grid, 0, specials)
        x_signs = left.sign.reshape(batch, 1, layout.per_block, products, m)
        y_signs = right.sign.reshape(batch, tiles, layout.per_block, products, width)
        x_signs, y_signs = (aligned_step.packed_signs(sign) for sign in (x_signs, y_signs))
        # All this is done once for a whole row or column, not once for each output element.
        left, right, x_signs, y_signs = lax.optimization_barrier((left, right, x_signs, y_signs))
        for place in range(layout.per_block):
            chosen = range(place * products, (place + 1) * products)
            rows = [_row(left, p, m) for p in chosen]
            columns = [_column(right, p, width) for p in chosen]
            signs = x_signs[:, :, place, :, None] ^ y_signs[:, :, place, None, :]
            after = aligned_step.step(rows, columns, signs, c, grid, specials)
            if layout.steps % layout.per_block:  # the last block has steps too many
                after = jnp.where(index * layout.per_block + place < layout.steps, after, c)
            c = after
        return c, None

    start = jnp.zeros((batch, tiles, m, width), jnp.uint32) if c is None else c
    found, _ = lax.scan(body, start, (a, jnp.arange(layout.blocks, dtype=jnp.int32)))
    return found


def _row(parts: Operands, p: int, m: int) -> Operands:
    """Product p of a block, `[batch, block * m]` to `[batch, 1, m, 1]`."""
    return jax.tree.map(lambda x: x[:, None, p * m : (p + 1) * m, None], parts)


def _column(parts: Operands, p: int, width: int) -> Operands:
    """Product p of a block, `[batch, tiles, block * width]` to `[batch, tiles, 1, width]`."""
    return jax.tree.map(lambda x: x[:, :, None, p * width : (p + 1) * width], parts)
