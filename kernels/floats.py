"""Bits of floating-point numbers in JAX: views, rounding and an addition that keep subnormals.

XLA's float operations flush subnormals and its comparisons read them as zero, so everything here
that could meet one is integer arithmetic on the bit pattern, or float arithmetic on a scaled copy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

# FP32 words; NumPy scalars, because a Python integer above 2^31 is not taken without x64.
SIGN = np.uint32(0x80000000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
INF = np.uint32(0x7F800000)
QUIET_NAN = np.uint32(0x7FC00000)
FLOAT_DTYPES = ("bfloat16", "float16", "float32")

_SCALE = 100  # exponents added where a sum could be subnormal; 2^-100 * 2^100 is far from overflow
_SMALL = (127 - _SCALE) << 23  # bits of 2^-100


def bits32(x: Array) -> Array:
    """FP32 bit patterns (uint32) of a BF16, FP16 or FP32 array; exact, subnormals and NaNs
    included.
    """
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.uint32)
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    if x.dtype == jnp.float16:
        return _widen_half(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32))
    raise TypeError(
        f"bits32: expected dtype in {FLOAT_DTYPES}, got {x.dtype}; cast the array first"
    )


def from_bits32(bits: Array) -> Array:
    """The FP32 array with these bit patterns."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


@jax.custom_jvp
def to_float32(x: Array) -> Array:
    """`x` as FP32, exactly (a conversion by XLA may flush subnormals)."""
    return x if x.dtype == jnp.float32 else from_bits32(bits32(x))


# Bit patterns have no derivative; without these rules a gradient would silently be zero.
@to_float32.defjvp
def _to_float32_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return to_float32(*primals), tangents[0].astype(jnp.float32)


def round_bits(bits: Array, dtype: DTypeLike) -> Array:
    """FP32 bit patterns rounded to nearest even in `dtype`: the result as an array of that dtype.

    Subnormals are kept on both sides, overflow gives infinity, a NaN stays a quiet NaN with its
    sign.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return from_bits32(bits)
    nan = (bits & MAGNITUDE) > INF
    if dtype == jnp.bfloat16:
        rounded = (
            bits + 0x7FFF + ((bits >> 16) & 1)
        ) >> 16  # RNE: half an ulp less one, plus the kept last bit
        word = jnp.where(nan, (bits >> 16) | 0x40, rounded)
    elif dtype == jnp.float16:
        word = jnp.where(nan, 0x7E00, _narrow_half(bits & MAGNITUDE)) | ((bits >> 16) & 0x8000)
    else:
        raise TypeError(
            f"round_bits: expected dtype in {FLOAT_DTYPES}, got {dtype}; no other "
            "rounding is modelled"
        )
    return lax.bitcast_convert_type(word.astype(jnp.uint16), dtype)


@jax.custom_jvp
def add(x: Array, y: Array) -> Array:
    """`x + y` in their common dtype (BF16, FP16 or FP32), rounded once to nearest even.

    Subnormals are kept; NaN or Inf - Inf gives a quiet NaN; a sum of zero is +0 unless both are -0.
    The bits are those of NumPy (and ml_dtypes for BF16). Narrow sums are formed in FP32: with 24 >=
    2p + 2 bits the second rounding is harmless.

    Raises:
        TypeError: the dtypes differ or are not BF16, FP16, FP32.
    """
    if x.dtype != y.dtype:
        raise TypeError(
            f"add: expected two equal dtypes, got {x.dtype} and {y.dtype}; cast one of them first"
        )
    if x.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"add: expected dtype in {FLOAT_DTYPES}, got {x.dtype}; XLA's own addition "
            "serves others"
        )
    total = add_bits(bits32(x), bits32(y))
    return round_bits(total, x.dtype)


@add.defjvp
def _add_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return add(*primals), tangents[0] + tangents[1]


def add_bits(x: Array, y: Array) -> Array:
    """FP32 addition on bit patterns, subnormals kept."""
    # With one operand at 2^-100 or above no sum is subnormal, and a subnormal partner cannot move
    # the rounded sum.
    ordinary = bits32(from_bits32(x) + from_bits32(y))
    tiny = ((x & MAGNITUDE) < _SMALL) & ((y & MAGNITUDE) < _SMALL)
    scaled = bits32(_scale_up(x) + _scale_up(y))
    quiet = jnp.where((ordinary & MAGNITUDE) > INF, QUIET_NAN, ordinary)
    return jnp.where(tiny, _scale_down(scaled), quiet)


def _scale_up(bits: Array) -> Array:
    """A float of magnitude below 2^-100, times 2^100, exactly; no operation sees a subnormal."""
    magnitude = bits & MAGNITUDE
    normal = magnitude + (_SCALE << 23)
    subnormal = bits32(
        magnitude.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0 ** (_SCALE - 149))
    )
    return from_bits32(jnp.where(magnitude < (1 << 23), subnormal, normal) | (bits & SIGN))


def _scale_down(bits: Array) -> Array:
    """Undo `_scale_up` on a sum: exact, because a sum that becomes subnormal is a multiple of
    2^-149.
    """
    magnitude = bits & MAGNITUDE
    normal = magnitude - (_SCALE << 23)
    count = from_bits32(magnitude) * jnp.float32(2.0 ** (149 - _SCALE))
    subnormal = jnp.minimum(count, 2.0**23).astype(jnp.int32).astype(jnp.uint32)
    return jnp.where(magnitude < ((_SCALE + 1) << 23), subnormal, normal) | (bits & SIGN)


def _widen_half(word: Array) -> Array:
    """FP16 words to FP32 bit patterns."""
    magnitude = word & 0x7FFF
    normal = (magnitude << 13) + ((127 - 15) << 23)
    subnormal = bits32(magnitude.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24))
    special = (magnitude << 13) | INF
    value = jnp.where(magnitude < 0x400, subnormal, jnp.where(magnitude >= 0x7C00, special, normal))
    return value | ((word & 0x8000) << 16)


def _narrow_half(magnitude: Array) -> Array:
    """FP32 magnitudes (no NaN) to FP16 magnitudes, nearest even, gradual underflow, overflow to
    infinity.
    """
    exponent = (magnitude >> 23).astype(jnp.int32) - 112  # FP16 exponent field if it were normal
    rebiased = magnitude - (112 << 23)
    normal = (rebiased + 0xFFF + ((rebiased >> 13) & 1)) >> 13
    significand = (magnitude & 0x7FFFFF) | 0x800000
    shift = jnp.clip(14 - exponent, 14, 31).astype(jnp.uint32)  # at 26 and more nothing is left
    kept = significand >> shift
    half = jnp.uint32(1) << (shift - 1)
    rest = significand & ((jnp.uint32(1) << shift) - 1)
    subnormal = kept + ((rest > half) | ((rest == half) & ((kept & 1) == 1))).astype(jnp.uint32)
    finite = jnp.where(exponent < 1, subnormal, normal)
    return jnp.where(exponent >= 31, 0x7C00, jnp.minimum(finite, 0x7C00))


def flush_subnormals(bits: Array) -> Array:
    """FP32 bit patterns with subnormals replaced by zeros of the same sign."""
    return jnp.where((bits & MAGNITUDE) < (1 << 23), bits & SIGN, bits)


def to_float64(bits: Array) -> Array:
    """FP32 bit patterns as FP64 values, exactly; call inside `jax.enable_x64(True)`."""
    magnitude = bits & MAGNITUDE
    subnormal = (magnitude & 0x7FFFFF).astype(jnp.int32).astype(jnp.float64) * 2.0**-149
    value = jnp.where(
        magnitude < (1 << 23), subnormal, jnp.abs(from_bits32(bits)).astype(jnp.float64)
    )
    return jnp.where(bits >= SIGN, -value, value)
