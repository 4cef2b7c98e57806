"""Exact sums for any input: the way of the elements that no faster one could vouch for.

The terms of a step are FP64 numbers (a product of two FP32 numbers is one, without rounding).
Error-free additions are repeated until nothing moves: then the last term is the rounded sum, and
the one before it tells on which side of it the true sum lies. That is enough to round to FP32 once.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, operands
from kernels.arithmetic import Arithmetic

_MINUS_ZERO = np.int64(-(2**63))


def steps(c: Array, products: Array, arithmetic: Arithmetic) -> Array:
    """FP32 words `[n]` of accumulators after some steps.

    Args:
        c: the words before, `[n]`.
        products: exact, FP64 `[steps, arithmetic.products, n]`.
        arithmetic: a fused one with `fraction_bits=None`.
    """
    if len(products) == 1:
        return _step(products[0], c, arithmetic)
    return lax.scan(lambda c, terms: (_step(terms, c, arithmetic), None), c, products)[0]


def _step(products: Array, c: Array, arithmetic: Arithmetic) -> Array:
    addend = floats.flush_subnormals(c) if arithmetic.subnormal_inputs == "flush" else c
    if arithmetic.subnormal_inputs == "plus_zero":
        addend = jnp.where((c & floats.MAGNITUDE) < (1 << 23), np.uint32(0), c)
    if arithmetic.specials == "saturate":
        addend = floats.bits32(operands.saturate(floats.from_bits32(addend)))
    if arithmetic.product_overflow == "inf":
        infinite = jnp.where(products < 0, -jnp.inf, jnp.inf)
        products = jnp.where(jnp.abs(products) >= 2.0**128, infinite, products)
    if arithmetic.addend == "fused":
        return finish(jnp.concatenate([products, floats.to_float64(addend)[None]]), arithmetic)
    total = finish(products, arithmetic)
    return finish(jnp.stack([floats.to_float64(addend), floats.to_float64(total)]), arithmetic)


def finish(terms: Array, arithmetic: Arithmetic) -> Array:
    """The FP32 words of the exact sums of `terms[t, n]` (FP64), specials included."""
    # FP64 has range to spare: a plain sum is infinite or NaN only because of the operands.
    plain = lax.reduce(terms, np.float64(-0.0), lax.add, (0,))
    special = ~jnp.isfinite(plain)
    terms = jnp.where(special, 0.0, terms)
    total, rest = _distil(terms)
    word = round_to_float32(_round_to_odd(total, rest), arithmetic.rounding, arithmetic.overflow)
    if arithmetic.subnormal_results == "flush":  # tiny: as if exponents had no limit
        scaled = round_to_float32(
            _round_to_odd(total, rest) * 2.0**100, arithmetic.rounding, "saturate"
        )
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


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """`x + y` rounded, and what the rounding lost (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _distil(terms: Array) -> tuple[Array, Array]:
    """The sum of FP64 `terms[t, n]` rounded to FP64, and the leading part of what that lost.

    At most t - 1 passes are needed (Bohlender 1977). When a pass changes nothing, each term is at
    most half an ulp of the one after it and zeros come first, so the sign of all that was lost is
    the sign of the second last term.
    """

    if len(terms) == 1:
        return terms[0], jnp.zeros_like(terms[0])

    def sweep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        terms, _, passes = state
        top, rest = lax.scan(lambda s, t: _two_sum(s, t), terms[0], terms[1:])
        swept = jnp.concatenate([rest, top[None]])
        return swept, jnp.any(swept != terms), passes + 1

    def moving(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] < len(terms))

    swept, _, _ = lax.while_loop(moving, sweep, (terms, jnp.bool_(True), jnp.int32(0)))
    return swept[-1], swept[-2]


def _round_to_odd(total: Array, rest: Array) -> Array:
    """`total + rest` to 53 bits, the last of them set if anything was lost: a later rounding sees
    no false tie.
    """
    bits = lax.bitcast_convert_type(total, jnp.int64)
    toward_zero = (bits < 0) != (rest < 0)
    even = (bits & 1) == 0
    moved = jnp.where(toward_zero, bits - 1, bits + 1)
    return lax.bitcast_convert_type(jnp.where((rest != 0) & even, moved, bits), jnp.float64)


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
