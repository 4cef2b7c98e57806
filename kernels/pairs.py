"""Steps of two products, for any data: the sum of three terms in FP64 that leaves no doubt.

Each term (C or an exact product) has at most 24 bits; FP64 has 53, and range to spare. Two
additions, products first, keep what they lose (Knuth), which is added to their sum; what that last
addition loses becomes an odd last bit, after which rounding to FP32 sees no false tie (Boldo and
Melquiond 2008). The two losses are added to each other with a rounding of their own, and it does no
harm. It happens only if one of them is less than 2^-28 times the other, so that neither sum
cancels. It could make the last addition look exact only if the larger loss were a last place of the
sum or more. A loss is at most half a last place of what lost it: the products' sum would have lost
it, at or just above a power of two below which C takes it. But then C, being at least half a last
place itself and of 24 bits, loses at least 2^-25 of one, or nothing.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import blocks, floats, singles, split
from kernels.arithmetic import Arithmetic

GROUP = 8
"""Products of a block, if there are as many: longer chains of steps wait for themselves."""

_OVER = 2.0**128 - 2.0**103  # the least number that is rounded to 2^128
_EXPONENT = np.int64(0x7FF << 52)
_LEAST = np.int64((1023 - 126) << 52)  # 2^-126
_MAGIC = np.int64((52 - 23 << 52) | (1 << 51))  # added to a power of two: 1.5 * 2^29 times it


def steps(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words `[batch, m, n]` of the accumulators after the steps of one block.

    Args:
        words: the accumulators before.
        x, y: FP64 operands `[batch, m, k]` and `[batch, k, n]`, k even, of which no product has
            more than 24 bits.
        arithmetic: a fused one of two products with `fraction_bits=None`.
    """
    c = floats.to_float64(words)
    usual = split.is_usual(arithmetic)
    for first in range(0, x.shape[-1], 2):
        left, right = (
            singles.product(blocks.outer(x, y, index), arithmetic) for index in (first, first + 1)
        )
        if usual:
            c = nearest(*_sum(c, left, right))
        elif arithmetic.addend == "fused":
            c = _rounded(*_sum(singles.read(c, arithmetic), left, right), arithmetic)
        else:
            total = _rounded(*_added(left, right), arithmetic)
            c = _rounded(*_added(singles.read(c, arithmetic), total), arithmetic)
    return to_words(c, arithmetic)


def to_words(c: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words of accumulators that are FP32 numbers held in FP64, after a step."""
    found = singles.to_words(c)
    if arithmetic.zero == "positive":
        found = jnp.where((found & floats.MAGNITUDE) == 0, np.uint32(0), found)
    return jnp.where(c != c, np.uint32(arithmetic.nan), found)


def _sum(c: Array, left: Array, right: Array) -> tuple[Array, Array]:
    """The sum rounded to odd; and a plain one, which alone is right where a term is infinite or NaN
    and has the sign of an exact zero.
    """
    products = left + right
    plain = c + products
    lost = singles.loss(c, products, plain) + singles.loss(left, right, products)
    total = plain + lost
    return singles.to_odd(total, lost - (total - plain)), plain


def _added(x: Array, y: Array) -> tuple[Array, Array]:
    """As `_sum`, of two terms."""
    plain = x + y
    return singles.to_odd(plain, singles.loss(x, y, plain)), plain


def nearest(total: Array, plain: Array) -> Array:
    """FP32 numbers (held in FP64) as usual records round a sum that was rounded to odd; all zeros
    are +0. `plain` has its sign, and is infinite or NaN where it is not finite.
    """
    power = jnp.maximum(singles.bits(total) & _EXPONENT, _LEAST)
    magic = lax.bitcast_convert_type(power + _MAGIC, jnp.float64)
    rounded = (total + magic) - magic  # RNE, subnormals to multiples of 2^-149
    return jnp.where(jnp.abs(total) < _OVER, rounded, plain * jnp.inf)


def _rounded(total: Array, plain: Array, arithmetic: Arithmetic) -> Array:
    """FP32 numbers (held in FP64) as `arithmetic` rounds."""
    total = jnp.where((jnp.abs(plain) < jnp.inf) & (total != 0), total, plain)
    return singles.rounded(total, arithmetic)
