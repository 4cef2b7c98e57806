"""Products of FP32 numbers on their bits: XLA's multiplication takes subnormals for zero."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from kernels import floats

_HIDDEN = 1 << 23  # the leading one of a significand
_DEEPEST = 26  # shifts beyond this leave nothing but the sticky bit


def multiply_bits(x: Array, y: Array) -> Array:
    """FP32 bit patterns (uint32) of x times y, rounded once to nearest even, subnormals kept."""
    sign = (x ^ y) & floats.SIGN
    a, b = x & floats.MAGNITUDE, y & floats.MAGNITUDE
    (exponent_a, m), (exponent_b, n) = _split(a), _split(b)
    # Significands of 24 bits in halves of 12: 48 bits as `high` (24, or 23 with its top bit free)
    # and `low` (24).
    m1, m0, n1, n0 = m >> 12, m & 0xFFF, n >> 12, n & 0xFFF
    middle = m1 * n0 + m0 * n1
    low = m0 * n0 + ((middle & 0xFFF) << 12)
    high = m1 * n1 + (middle >> 12) + (low >> 24)
    low = low & 0xFFFFFF
    # 24 bits of the product and one to round by, what is below folded into a sticky last bit.
    large = high >= _HIDDEN
    kept = jnp.where(large, (high << 2) | (low >> 22), (high << 3) | (low >> 21))
    rest = jnp.where(large, low & 0x3FFFFF, low & 0x1FFFFF) != 0
    kept = kept | rest.astype(jnp.uint32)
    exponent = exponent_a + exponent_b - 127 + large.astype(jnp.int32)
    deep = jnp.clip(1 - exponent, 0, _DEEPEST).astype(jnp.uint32)  # too small to be normal
    lost = (kept & ((jnp.uint32(1) << deep) - 1)) != 0
    kept = (kept >> deep) | lost.astype(jnp.uint32)
    # Round to nearest even on the last two bits (half, sticky); a carry goes into the exponent.
    base = jnp.maximum(exponent - 1, 0).astype(jnp.uint32) << 23
    half, odd = (kept >> 1) & 1, ((kept & 1) | ((kept >> 2) & 1))
    finite = base + (kept >> 2) + (half & odd)
    value = jnp.where((exponent > 254) | (finite > floats.INF), floats.INF, finite)
    value = jnp.where((a == 0) | (b == 0), jnp.uint32(0), value)
    infinite = (a == floats.INF) | (b == floats.INF)
    value = jnp.where(infinite, floats.INF, value)
    nan = (a > floats.INF) | (b > floats.INF) | (infinite & ((a == 0) | (b == 0)))
    return jnp.where(nan, floats.QUIET_NAN, sign | value)


def _split(magnitude: Array) -> tuple[Array, Array]:
    """(biased exponent, significand with its leading one) of a finite number that is not zero."""
    subnormal = magnitude < _HIDDEN
    shift = lax.clz(magnitude).astype(jnp.int32) - 8
    exponent = jnp.where(subnormal, 1 - shift, (magnitude >> 23).astype(jnp.int32))
    shifted = magnitude << jnp.clip(shift, 0, 31).astype(jnp.uint32)
    significand = jnp.where(subnormal, shifted, (magnitude & (_HIDDEN - 1)) | _HIDDEN)
    return exponent, significand
