"""How a reduction combines two values in the dtype that is sent, on bit patterns.

`DEFINITION` says it in NumPy (ml_dtypes for BF16 and FP8), `arithmetic` in JAX with the same bits.
XLA takes subnormals for zero and may move BF16 through FP32, so floats stand as words, unsigned
integers of their width, wherever nothing is added.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from emulator.collectives.multiply import multiply_bits
from kernels import floats

DEFINITION: Mapping[str, Callable[..., np.ndarray]] = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
KINDS = tuple(DEFINITION)

Combine = Callable[[Array, Array], Array]

_OF_XLA: Mapping[str, Combine] = {
    "sum": jnp.add,
    "prod": jnp.multiply,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
    "xor": jnp.bitwise_xor,
}
_XLA_ADDS = ("float64", "complex64", "complex128")
_FEW = 32  # XLA:CPU makes several passes of the minimum of more
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, slots=True)
class How:
    """One way to combine: words are loaded into registers, combined there, and stored as words
    again, or as FP32 numbers.
    """

    load: Callable[[Array], Array]
    combine: Combine
    store: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Arithmetic:
    """What is right for every input, and perhaps a quick way for ordinary ones.

    Whether the quick way is right is known beforehand from the words (`right_for`), or afterwards
    from the registers it leaves (`was_right`).
    """

    exact: How
    quick: How | None = None
    right_for: Callable[[Array], Array] | None = None
    was_right: Callable[[Array], Array] | None = None


def to_words(x: Array) -> Array:
    """Floats as unsigned integers; all else as it is."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}"))
    return x


def to_words_but_fp32(x: Array) -> Array:
    """As words, but for FP32, which XLA moves unchanged."""
    return x if x.dtype == jnp.float32 else to_words(x)


def from_words(words: Array, dtype: jnp.dtype) -> Array:
    return words if words.dtype == dtype else lax.bitcast_convert_type(words, dtype)


def arithmetic(op: str, dtype: jnp.dtype) -> Arithmetic:
    """How `op` combines two values of `dtype`, on words.

    Raises:
        NotImplementedError: a dtype without rules for `op`.
    """
    whole = jnp.issubdtype(dtype, jnp.integer)
    if whole or (dtype == jnp.bool_ and op not in ("sum", "prod")):
        return Arithmetic(How(_same, _OF_XLA[op], _same))
    if dtype.name in _XLA_ADDS and op in ("sum", "prod"):
        to = functools.partial(from_words, dtype=dtype)
        return Arithmetic(How(to, _OF_XLA[op], to_words))
    if dtype.name in (*floats.FLOAT_DTYPES, "float64", *_FLOAT8) and op in ("max", "min"):
        select = functools.partial(_select, dtype=dtype, largest=op == "max")
        return Arithmetic(How(_same, select, _same))
    if dtype.name in floats.FLOAT_DTYPES and op == "sum":
        return _sums(dtype)
    if dtype.name in floats.FLOAT_DTYPES and op == "prod":
        return Arithmetic(How(_same, functools.partial(_product, dtype=dtype), _same))
    if dtype.name in _FLOAT8 and op in ("sum", "prod"):
        narrow = functools.partial(_through_fp32, dtype=dtype, combine=_OF_XLA[op])
        return Arithmetic(How(_same, narrow, _same))
    raise NotImplementedError(f"{op} of {dtype.name} in a collective is not modelled")


def _same(x: Array) -> Array:
    return x


def _sums(dtype: jnp.dtype) -> Arithmetic:
    to_float = functools.partial(from_words, dtype=dtype)
    if dtype == jnp.float32:  # its registers are floats: nothing is done to them but additions
        exact = How(to_float, floats.add, _same)
        return Arithmetic(exact, How(to_float, jnp.add, _same), right_for=_no_subnormals)
    exact = How(_same, lambda a, b: to_words(floats.add(to_float(a), to_float(b))), _same)
    if dtype == jnp.float16:  # its subnormals are normal FP32 numbers: no slow case to avoid
        return Arithmetic(exact)
    return Arithmetic(exact, How(_pack, _add_packed, _unpack), was_right=_packed_was_right)


def _product(a: Array, b: Array, *, dtype: jnp.dtype) -> Array:
    """Rounded to FP32 and from there to `dtype`, as NumPy and ml_dtypes do."""
    x, y = (floats.bits32(from_words(words, dtype)) for words in (a, b))
    return to_words(floats.round_bits(multiply_bits(x, y), dtype))


def _through_fp32(a: Array, b: Array, *, dtype: jnp.dtype, combine: Combine) -> Array:
    """FP8: its subnormals are normal FP32 numbers, and with 24 >= 2p + 2 bits rounding twice is
    rounding once.
    """
    wide = (from_words(words, dtype).astype(jnp.float32) for words in (a, b))
    return to_words(combine(*wide).astype(dtype))


# Every partial sum is a multiple of the smallest input's last bit, so it is zero or at least that
# bit. Hence no sum is subnormal if every nonzero input is at least 2^-126 times 2^(significant bits
# - 1). Magnitudes are compared as integers, because XLA takes subnormals for zero; less one, so
# that zero wraps round to the largest number.
_SMALLEST_FP32 = ((127 - 126 + 23) << 23) - 1
_SMALLEST_BF16 = ((127 - 126 + 7) << 7) - 1


def _no_subnormals(words: Array) -> Array:
    """Whether no partial sum of these FP32 words, nor any of them, is subnormal."""
    magnitude = words & jnp.uint32(floats.MAGNITUDE)
    return _least(magnitude - jnp.uint32(1)) >= jnp.uint32(_SMALLEST_FP32)


def _least(words: Array) -> Array:
    """The smallest of `words`, unsigned integers, read once.

    XLA:CPU first writes down what it is to find the minimum of, but not if a maximum is asked for
    beside it.
    """

    def both(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

    limits = jnp.iinfo(words.dtype)
    first = np.array(limits.max, words.dtype), np.array(limits.min, words.dtype)
    few = [d for d, size in enumerate(words.shape) if size <= _FEW]
    if few:  # the minimum of so few is no pass of its own, but part of what is done with it
        kept = max(few, key=lambda d: words.shape[d])
        others = tuple(d for d in range(words.ndim) if d != kept)
        least, most = lax.reduce((words, words), first, both, others)
        return lax.reduce(jnp.minimum(least, most), first[0], jnp.minimum, (0,))
    rows = lax.reduce((words, words), first, both, (words.ndim - 1,))
    least, most = lax.reduce(rows, first, both, tuple(range(words.ndim - 1)))
    return jnp.minimum(least, most)


def _pack(words: Array) -> Array:
    """BF16 words as registers: the value in the upper half, its magnitude less one in the lower."""
    wide = words.astype(jnp.uint32)
    return (wide << 16) | (((wide & 0x7FFF) - 1) & 0xFFFF)


def _add_packed(a: Array, b: Array) -> Array:
    """Adds the BF16 values and keeps the smallest magnitude that went in.

    The FP32 sum is rounded to BF16, nearest even, on its bits: XLA may drop a round trip through
    BF16.
    """
    upper = jnp.uint32(0xFFFF0000)
    total = lax.bitcast_convert_type(a & upper, jnp.float32) + lax.bitcast_convert_type(
        b & upper, jnp.float32
    )
    bits = lax.bitcast_convert_type(total, jnp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & upper
    rounded = jnp.where(
        (bits & floats.MAGNITUDE) > floats.INF, jnp.uint32(floats.QUIET_NAN), rounded
    )
    return rounded | jnp.minimum(a & 0xFFFF, b & 0xFFFF)


def _unpack(registers: Array) -> Array:
    return (registers >> 16).astype(jnp.uint16)


def _packed_was_right(registers: Array) -> Array:
    """Whether no subnormal can have occurred on the way to these registers."""
    return _least(registers & 0xFFFF) >= _SMALLEST_BF16


def _select(a: Array, b: Array, *, dtype: jnp.dtype, largest: bool) -> Array:
    """max or min of float words as integers, so that subnormals count and -0 < +0; the NaN if
    either is one.
    """
    bits = 8 * dtype.itemsize
    signed = jnp.dtype(f"int{bits}")
    top = np.array(np.inf, dtype)  # beyond it are only NaNs; where there is no infinity, a NaN
    top = np.array(jnp.finfo(dtype).max, dtype) if np.isnan(top) else top
    infinity = int(top.view(f"uint{bits}"))
    low = jnp.array(jnp.iinfo(signed).max, signed)

    def key(words: Array) -> Array:
        word = lax.bitcast_convert_type(words, signed)
        return jnp.where(word < 0, word ^ low, word)

    def is_nan(words: Array) -> Array:
        return (lax.bitcast_convert_type(words, signed) & low) > infinity

    first = key(a) >= key(b) if largest else key(a) <= key(b)
    return jnp.where(is_nan(a) | (first & ~is_nan(b)), a, b)
