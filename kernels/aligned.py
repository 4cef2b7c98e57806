"""The twin for units that cut the terms of a step to a common grid: integers all the way.

A term is a signed significand and an exponent. One pass finds the largest exponent of a step, a
second one shifts each term to the grid and adds; the sum is rounded to FP32. Every input takes this
path, specials included.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels import distill, floats, operands
from kernels.arithmetic import Arithmetic

_NO_EXPONENT = -(1 << 20)  # of a zero: never the largest


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`, operands as read."""
    lowest = operands.LOWEST_EXPONENT[a.dtype.name], operands.LOWEST_EXPONENT[b.dtype.name]
    shape = (a.shape[0], a.shape[1], b.shape[2])
    first = jnp.zeros(shape, jnp.uint32) if c is None else floats.bits32(c)
    words = _accumulate(floats.bits32(a), floats.bits32(b), first, lowest, arithmetic)
    return floats.from_bits32(words)


def _accumulate(
    a: Array, b: Array, c: Array, lowest: tuple[int, int], arithmetic: Arithmetic
) -> Array:
    """FP32 words `[batch, m, n]` of the accumulators after all steps.

    Args:
        a, b: FP32 words `[batch, m, k]` and `[batch, k, n]`, as the unit reads them.
        c: FP32 words `[batch, m, n]`.
        lowest: the exponents of the smallest normal numbers of the types of `a` and `b`; numbers
            below are not renormalised, and alignment can tell.
        arithmetic: one with `fraction_bits` set.
    """
    batch, m, k = a.shape
    n = b.shape[-1]
    products = arithmetic.products
    steps = -(-k // products)
    padding = steps * products - k
    a = jnp.pad(a, ((0, 0), (0, 0), (0, padding))).reshape(batch, m, steps, products)
    b = jnp.pad(b, ((0, 0), (0, padding), (0, 0))).reshape(batch, steps, products, n)

    def step(c: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = operands
        return _step(x, y, c, lowest, arithmetic), None

    with jax.enable_x64(True):
        c, _ = lax.scan(step, c, (a.transpose(2, 3, 0, 1), b.transpose(1, 2, 0, 3)))
    return c


def _decode(word: Array, lowest: int = -126) -> tuple[Array, Array, Array]:
    """Signed significand (24 bits), exponent of its leading place, and a float for the specials.

    The exponent is large and negative for zero; the float is +-1, 0, infinite or NaN where the
    word is finite, zero, infinite or NaN.
    """
    magnitude = word & floats.MAGNITUDE
    field = (magnitude >> 23).astype(jnp.int32)
    fraction = (magnitude & 0x7FFFFF).astype(jnp.int64)
    significand = jnp.where(field == 0, fraction, fraction | (1 << 23))
    exponent = jnp.maximum(field, 1) - 127
    if lowest > -126:  # an FP16 subnormal, which is a normal FP32 number
        significand = significand >> jnp.clip(lowest - exponent, 0, 24)
        exponent = jnp.maximum(exponent, lowest)
    exponent = jnp.where(magnitude == 0, _NO_EXPONENT, exponent)
    negative = word >= floats.SIGN
    signed = jnp.where(negative, -significand, significand)
    special = magnitude >= floats.INF
    kind = jnp.where(special, floats.from_bits32(word), jnp.sign(signed).astype(jnp.float32))
    kind = jnp.where((magnitude == 0) & negative, jnp.float32(-0.0), kind)
    return jnp.where(special, 0, signed), jnp.where(special, _NO_EXPONENT, exponent), kind


def _step(x: Array, y: Array, c: Array, lowest: tuple[int, int], arithmetic: Arithmetic) -> Array:
    """One step: `x[p, batch, m]`, `y[p, batch, n]`, `c[batch, m, n]`, all FP32 words."""
    cut, floor = arithmetic.fraction_bits, arithmetic.min_exponent
    assert cut is not None and floor is not None  # the record has checked
    addend = floats.flush_subnormals(c) if arithmetic.subnormal_inputs == "flush" else c
    xs, xe, xk = (part[:, :, :, None] for part in _decode(x, lowest[0]))
    ys, ye, yk = (part[:, :, None, :] for part in _decode(y, lowest[1]))
    cs, ce, ck = _decode(addend)
    fused = arithmetic.addend == "fused"
    count = x.shape[0]
    largest = jnp.full(c.shape, floor, jnp.int32)
    for p in range(count):
        largest = jnp.maximum(largest, xe[p] + ye[p])
    if fused:
        largest = jnp.maximum(largest, ce)
    total = jnp.zeros(c.shape, jnp.int64)
    kind = jnp.full(c.shape, -0.0, jnp.float32)
    for p in range(count):
        total += _align(xs[p] * ys[p], 46, largest - (xe[p] + ye[p]), cut, arithmetic.alignment)
        kind = kind + xk[p] * yk[p]
    if fused:
        total += _align(cs, 23, largest - ce, cut, arithmetic.alignment)
        kind = kind + ck
    word = _round(total, largest - cut, arithmetic)
    if arithmetic.subnormal_results == "flush":
        word = floats.flush_subnormals(word)
    minus = floats.bits32(kind) >= floats.SIGN
    if arithmetic.zero == "positive":
        word = jnp.where((word & floats.MAGNITUDE) == 0, jnp.uint32(0), word)
    else:
        minus_zero = floats.bits32(kind) == floats.SIGN
        word = jnp.where((total == 0) & minus_zero, floats.SIGN, word)
    infinity = jnp.where(minus, floats.SIGN | floats.INF, floats.INF)
    word = jnp.where(jnp.isinf(kind), infinity, word)
    word = jnp.where(jnp.isnan(kind), jnp.uint32(arithmetic.nan), word)
    return word if fused else distill.late(addend, word, arithmetic)


def _align(signed: Array, fraction_bits: int, distance: Array, cut: int, alignment: str) -> Array:
    """A term as a count of 2^(largest - cut); its own last place is 2^-fraction_bits of its
    exponent.
    """
    shift = distance + (fraction_bits - cut)
    left = signed << jnp.clip(-shift, 0, 62).astype(jnp.int64)
    right = jnp.clip(shift, 0, 62).astype(jnp.int64)
    if alignment == "floor":
        cut_off = signed >> right
    elif alignment == "truncate":
        cut_off = jnp.where(signed < 0, -(-signed >> right), signed >> right)
    else:
        kept = signed >> right
        half = jnp.int64(1) << jnp.maximum(right - 1, 0)
        cut_off = jnp.where(right == 0, kept, (signed + half - 1 + (kept & 1)) >> right)  # RNE
    return jnp.where(shift < 0, left, cut_off)


def _round(total: Array, unit: Array, arithmetic: Arithmetic) -> Array:
    """`total * 2^unit` as an FP32 word."""
    magnitude = jnp.abs(total)
    width = 64 - lax.clz(magnitude).astype(jnp.int32)
    shift = jnp.maximum(width - 24 + unit, -149) - unit
    right = jnp.clip(shift, 0, 62).astype(jnp.int64)
    kept = magnitude >> right
    if arithmetic.rounding == "nearest_even":
        half = jnp.int64(1) << jnp.maximum(right - 1, 0)
        kept = jnp.where(right == 0, kept, (magnitude + half - 1 + (kept & 1)) >> right)  # RNE
    kept = kept << jnp.clip(-shift, 0, 24).astype(jnp.int64)
    exponent = unit + shift  # of the last place
    word = kept + (jnp.maximum(exponent + 149, 0).astype(jnp.int64) << 23)
    word = jnp.where(kept < (1 << 23), kept, word)
    largest = floats.INF if arithmetic.overflow == "inf" else floats.INF - 1
    word = jnp.where(word >= floats.INF, largest, word)
    return word.astype(jnp.uint32) | ((total < 0).astype(jnp.uint32) << 31)
