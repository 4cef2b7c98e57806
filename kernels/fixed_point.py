"""Exact sums for any input: the way of the elements that no faster one could vouch for.

The terms of a step are FP64 numbers (a product of two FP32 numbers is one, without rounding). They
are added up as integers, in a fixed-point number wide enough for all of them (Kulisch's long
accumulator): digits of 32 bits, each in 64, so that carries can wait for the end.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, operands
from kernels.arithmetic import Arithmetic

_MINUS_ZERO = np.int64(-(2**63))
_DIGIT = 32  # bits of a digit
_MASK = np.int64((1 << _DIGIT) - 1)
_PART = 24  # bits of a significand that are added at once: shifted by 31, 256 of them fit 64 bits
_LOWEST = -352  # exponent of the first digit's first bit; at most 1 - 2 * 149 - 2 * _PART
_DIGITS = 20  # up to 2^288: a product is below 2^256


def steps(c: Array, products: Array, wide: bool, arithmetic: Arithmetic) -> Array:
    """FP32 words `[n]` of accumulators after some steps.

    Args:
        c: the words before, `[n]`.
        products: exact, FP64 `[steps, arithmetic.products, n]`.
        wide: whether products may have more than 24 significant bits (never more than 48).
        arithmetic: a fused one with `fraction_bits=None`.
    """
    if len(products) == 1:
        return _step(products[0], c, wide, arithmetic)
    return lax.scan(lambda c, terms: (_step(terms, c, wide, arithmetic), None), c, products)[0]


def _step(products: Array, c: Array, wide: bool, arithmetic: Arithmetic) -> Array:
    addend = floats.flush_subnormals(c) if arithmetic.subnormal_inputs == "flush" else c
    if arithmetic.subnormal_inputs == "plus_zero":
        addend = jnp.where((c & floats.MAGNITUDE) < (1 << 23), np.uint32(0), c)
    if arithmetic.specials == "saturate":
        addend = floats.bits32(operands.saturate(floats.from_bits32(addend)))
    if arithmetic.product_overflow == "inf":
        infinite = jnp.where(products < 0, -jnp.inf, jnp.inf)
        products = jnp.where(jnp.abs(products) >= 2.0**128, infinite, products)
    if arithmetic.addend == "fused":
        terms = jnp.concatenate([products, floats.to_float64(addend)[None]])
        return _finish(terms, wide, arithmetic)
    total = floats.to_float64(_finish(products, wide, arithmetic))
    return _finish(jnp.stack([floats.to_float64(addend), total]), False, arithmetic)


def _finish(terms: Array, wide: bool, arithmetic: Arithmetic) -> Array:
    """The FP32 words of the exact sums of `terms[t, n]` (FP64), specials included."""
    # FP64 has range to spare: a plain sum is infinite or NaN only because of the operands.
    plain = lax.reduce(terms, np.float64(-0.0), lax.add, (0,))
    special = ~jnp.isfinite(plain)
    total = _to_odd(_digits(jnp.where(special, 0.0, terms), wide))
    word = round_to_float32(total, arithmetic.rounding, arithmetic.overflow)
    if arithmetic.subnormal_results == "flush":  # tiny: as if exponents had no limit
        scaled = round_to_float32(total * 2.0**100, arithmetic.rounding, "saturate")
        tiny = (scaled & floats.MAGNITUDE) < ((100 + 1) << 23)
        word = jnp.where(tiny, word & floats.SIGN, word)
    minus = lax.bitcast_convert_type(plain, jnp.int64) < 0
    if arithmetic.zero == "positive":
        word = jnp.where((word & floats.MAGNITUDE) == 0, jnp.uint32(0), word)
    else:
        # As integers: XLA does not keep the sign of zero in every sum.
        minus_zero = jnp.all(lax.bitcast_convert_type(terms, jnp.int64) == _MINUS_ZERO, axis=0)
        exact_zero = jnp.where(minus_zero, floats.SIGN, jnp.uint32(0))
        word = jnp.where(total == 0, exact_zero, word)
    infinity = jnp.where(minus, floats.SIGN | floats.INF, floats.INF)
    word = jnp.where(special, infinity, word)
    return jnp.where(jnp.isnan(plain), jnp.uint32(arithmetic.nan), word)


def _digits(terms: Array, wide: bool) -> Array:
    """The sums of `terms[t, n]` as digits `[_DIGITS, n]`, the lowest first; they may be negative or
    beyond 32 bits.
    """
    bits = lax.bitcast_convert_type(terms, jnp.int64)
    fraction = (bits & ((1 << 52) - 1)) | (1 << 52)
    width = 2 * _PART if wide else _PART
    significand = jnp.where(terms == 0, 0, fraction >> (53 - width))
    parts = jnp.where(bits < 0, -significand, significand)
    places = ((bits >> 52) & 0x7FF) - (1023 + width - 1 + _LOWEST)
    if wide:
        parts = jnp.concatenate([parts & ((1 << _PART) - 1), parts >> _PART])
        places = jnp.concatenate([places, places + _PART])
    which = jnp.arange(_DIGITS, dtype=jnp.int64)[:, None]
    # Else XLA would form all of them again for every digit.
    indices, shifted = lax.optimization_barrier((places >> 5, parts << (places & 31)))
    digits = jnp.zeros((_DIGITS, terms.shape[1]), jnp.int64)
    for index, part in zip(indices, shifted, strict=True):
        digits = digits + jnp.where(which == index, part, 0)
    return digits


def _to_odd(digits: Array) -> Array:
    """FP64 numbers of at least 31 bits of the sums; if anything is lost the last bit is set, so
    that a later rounding sees no false tie.
    """
    # One row each and not a vector, because XLA would move the reshapes between them through all
    # additions, one at a time, and run its other passes again after each.
    rows = [digits[index : index + 1] for index in range(_DIGITS)]
    zero = jnp.zeros_like(rows[0])
    carry = zero
    for digit in rows:
        carry = (digit + carry) >> _DIGIT
    minus, carry = carry < 0, zero
    below = found = place = zero  # a digit and 30 bits of what is below it; the highest such
    for index, digit in enumerate(rows):
        value = jnp.where(minus, -digit, digit) + carry
        value, carry = value & _MASK, value >> _DIGIT
        below = (value << 30) | (below >> _DIGIT) | ((below & _MASK) != 0)
        found = jnp.where(value != 0, below, found)
        place = jnp.where(value != 0, index, place)
    shift = jnp.where(found < (1 << 53), 0, 9)
    odd = (found >> shift) | ((found & ((1 << shift) - 1)) != 0)
    exponent = place * _DIGIT + shift + (_LOWEST - 30)
    power = lax.bitcast_convert_type((exponent + 1023) << 52, jnp.float64)
    total = (jnp.where(minus, -odd, odd).astype(jnp.float64) * power)[0]
    return lax.optimization_barrier(total)  # the same for this reshape


def round_to_float32(x: Array, rounding: str, overflow: str) -> Array:
    """FP64 to FP32 words with gradual underflow; a zero keeps its sign."""
    bits = lax.bitcast_convert_type(x, jnp.int64)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    exponent = (magnitude >> 52) - 1023
    significand = (magnitude & ((1 << 52) - 1)) | (1 << 52)
    shift = jnp.clip(29 - 126 - exponent, 29, 60)
    kept = significand >> shift
    if rounding == "nearest_even":
        kept = (significand + (jnp.int64(1) << (shift - 1)) - 1 + (kept & 1)) >> shift  # RNE
    word = kept + (jnp.maximum(exponent + 126, 0) << 23)
    largest = floats.INF if overflow == "inf" else floats.INF - 1
    word = jnp.where(word >= floats.INF, largest, word)
    word = jnp.where(magnitude == 0, 0, word)
    return (word.astype(jnp.uint32)) | ((bits < 0).astype(jnp.uint32) << 31)
