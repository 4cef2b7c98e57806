"""Steps of a few FP16 products, for any data: all their sums lie on one grid.

An FP16 product is a multiple of 2^-48 below 2^32. Added to a large constant, whose last place is
the grid, products give the upper part of their sum exactly; what each loses is summed apart, which
is exact as well, because FP64 has room for multiples of 2^-48 below the grid. So two numbers hold a
step's sum, whatever the data. They and C are added with one rounding, to odd (Boldo and Melquiond
2008), after which rounding to FP32 sees no false tie.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels import blocks, floats, pairs, singles, split
from kernels.arithmetic import Arithmetic

_MOST = 4  # products of a step; with more, the general ways are quicker on usual data


def serve(arithmetic: Arithmetic) -> bool:
    """Whether `steps` is for this record (and FP16 operands)."""
    return split.is_usual(arithmetic) and arithmetic.products <= _MOST


def steps(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words `[batch, m, n]` of the accumulators after the steps of one block.

    Args:
        words: the accumulators before.
        x, y: FP64 operands `[batch, m, k]` and `[batch, k, n]` that are FP16 numbers, k a multiple
            of `products`.
        arithmetic: a usual record (`split.is_usual`) with `fraction_bits=None`.
    """
    c, minus_x = floats.to_float64(words), -x
    # The sum stays within a quarter of the grid's own power of two, 2^(34 + log2 products).
    grid = jnp.float64(1.5 * 2.0 ** (34 + math.ceil(math.log2(arithmetic.products))))
    # As if it changed: XLA takes a constant that is added and subtracted for nothing.
    grid, c = lax.optimization_barrier((grid, c))
    for first in range(0, x.shape[-1], arithmetic.products):
        total, lower = jnp.broadcast_to(grid, c.shape), jnp.zeros_like(c)
        for index in range(first, first + arithmetic.products):
            before, total = total, total + blocks.outer(x, y, index)
            # The product is subtracted as one that is added, so that both become FMAs.
            lower = lower - ((total - before) + blocks.outer(minus_x, y, index))
        plain = c + total  # infinite or NaN where the sum is
        c = pairs.nearest(_to_odd(c, total - grid, lower), plain)
    return pairs.to_words(c, arithmetic)


def _to_odd(c: Array, upper: Array, lower: Array) -> Array:
    """The sum of three numbers to 53 bits, the last of them set if anything is lost."""
    products = upper + lower
    lost = singles.loss(upper, lower, products)
    total = c + products
    also = singles.loss(c, products, total)
    rest = also + lost
    rest = singles.to_odd(rest, singles.loss(also, lost, rest))
    found = total + rest
    return singles.to_odd(found, singles.loss(total, rest, found))
