"""The meaning of an `Arithmetic`, in Python integers: slow and obviously right.

Nothing is shared with the JAX twin but the record. A number is `(sign, significand, exponent)` with
value `(-1)^sign * significand * 2^exponent`; a sum is an integer count of some power of two.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.arithmetic import Arithmetic

# dtype name: (fraction bits, exponent bias, bits of the exponent field)
_FORMATS = {"bfloat16": (7, 127, 8), "float16": (10, 15, 5), "float32": (23, 127, 8)}
_INF = 0x7F800000
_MAX = 0x7F7FFFFF


@dataclass(frozen=True, slots=True)
class _Term:
    """A decoded operand or product; `kind` is finite, inf or nan. `top` is the exponent alignment
    sees.
    """

    kind: str
    sign: int
    significand: int = 0
    exponent: int = 0  # of the last bit of the significand
    top: int = 0  # of the bit just left of the binary point

    @property
    def signed(self) -> int:
        return -self.significand if self.sign else self.significand


def matmul(
    a: ArrayLike, b: ArrayLike, c: ArrayLike | None = None, *, arithmetic: Arithmetic
) -> NDArray[np.float32]:
    """`a[..., m, k] @ b[..., k, n] + c` in FP32, as the matrix unit of `arithmetic` computes it.

    NumPy arrays of BF16, FP16 or FP32 (FP32 mode if either is); batch dimensions broadcast. K
    ascends in steps of `arithmetic.products`, the last one filled up with +0 products; `c` (FP32,
    default +0) is the first accumulator.
    """
    a, b = np.asarray(a), np.asarray(b)
    if "float32" in (a.dtype.name, b.dtype.name):
        if "float32" not in arithmetic.dtypes:
            if arithmetic.fp32 is None:
                raise NotImplementedError(f"{arithmetic.name} has no FP32 mode")
            arithmetic = arithmetic.fp32
        a, b = _as_float32(a), _as_float32(b)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    a = np.broadcast_to(a, batch + (m, k))
    b = np.broadcast_to(b, batch + (k, n))
    start = np.zeros((), np.float32) if c is None else np.asarray(c, np.float32)
    words = np.broadcast_to(start, batch + (m, n)).copy().view(np.uint32)
    rows = {
        index: [_operand(x, arithmetic) for x in a[index]] for index in np.ndindex(a.shape[:-1])
    }
    columns = {
        index + (j,): [_operand(x, arithmetic) for x in b[index][:, j]]
        for index in np.ndindex(batch)
        for j in range(n)
    }
    for index in np.ndindex(words.shape):
        words[index] = dot(
            rows[index[:-1]], columns[index[:-2] + index[-1:]], int(words[index]), arithmetic
        )
    return words.view(np.float32)


def dot(row: list[_Term], column: list[_Term], c: int, arithmetic: Arithmetic) -> int:
    """One output element from decoded operands: FP32 words `c` in, result out."""
    for start in range(0, len(row), arithmetic.products):
        stop = start + arithmetic.products
        products = [
            _product(x, y) for x, y in zip(row[start:stop], column[start:stop], strict=True)
        ]
        padding = arithmetic.products - len(products)
        c = step(products + [_Term("finite", 0)] * padding, c, arithmetic)
    return c


def step(products: list[_Term], c: int, arithmetic: Arithmetic) -> int:
    """One step: the products and the FP32 word `c` give the next FP32 word."""
    addend = _flush_input(decode(c, "float32"), arithmetic)
    if arithmetic.addend == "fused":
        return _sum(products + [addend], arithmetic)
    late = _sum(products, arithmetic)
    plain = Arithmetic(
        name="FP32 addition",
        products=2,
        zero="ieee",
        nan=arithmetic.nan,
        overflow=arithmetic.overflow,
        subnormal_results=arithmetic.subnormal_results,
    )
    return _sum([addend, decode(late, "float32")], plain)


def decode(word: int, dtype: str) -> _Term:
    """The exact value of a bit pattern; subnormals have the smallest normal exponent and no leading
    one.
    """
    fraction_bits, bias, field_bits = _FORMATS[dtype]
    sign = word >> (fraction_bits + field_bits)
    field = (word >> fraction_bits) & ((1 << field_bits) - 1)
    fraction = word & ((1 << fraction_bits) - 1)
    if field == (1 << field_bits) - 1:
        return _Term("nan" if fraction else "inf", sign)
    significand = fraction if field == 0 else fraction | 1 << fraction_bits
    top = max(field, 1) - bias
    return _Term("finite", sign, significand, top - fraction_bits, top)


def encode(sign: int, count: int, unit: int, rounding: str, overflow: str) -> int:
    """`(-1)^sign * count * 2^unit` (count >= 0) rounded to an FP32 word, with gradual underflow."""
    if count == 0:
        return sign << 31
    exponent = max(count.bit_length() - 24 + unit, -149)  # of the last kept bit
    shift = exponent - unit
    if shift <= 0:
        kept, rest = count << -shift, 0
    else:
        kept, rest = count >> shift, count & ((1 << shift) - 1)
        half = 1 << (shift - 1)
        if rounding == "nearest_even" and (rest > half or (rest == half and kept & 1)):
            kept += 1  # RNE; RZ keeps what is left of the cut
    if kept == 1 << 24:
        kept, exponent = kept >> 1, exponent + 1
    if exponent > 104:
        return sign << 31 | (_INF if overflow == "inf" else _MAX)
    field = exponent + 150 if kept >> 23 else 0
    return sign << 31 | field << 23 | (kept & 0x7FFFFF)


def _operand(x: np.generic, arithmetic: Arithmetic) -> _Term:
    """A matrix element as the unit reads it."""
    word = int(x.view(np.uint32 if x.dtype.itemsize == 4 else np.uint16))
    cut = 23 - (arithmetic.operand_fraction_bits or 23)
    if x.dtype.name == "float32" and cut and (word & 0x7FFFFFFF) < _INF:
        rest, word = word & ((1 << cut) - 1), word >> cut
        half = 1 << (cut - 1)
        if arithmetic.operand_rounding == "nearest_even" and (
            rest > half or (rest == half and word & 1)
        ):
            word += 1
        word <<= cut
    return _flush_input(decode(word, x.dtype.name), arithmetic)


def _flush_input(term: _Term, arithmetic: Arithmetic) -> _Term:
    if arithmetic.subnormal_inputs == "flush" and term.kind == "finite":
        if 0 < term.significand and term.significand.bit_length() <= term.top - term.exponent:
            return _Term("finite", term.sign)
    return term


def _product(x: _Term, y: _Term) -> _Term:
    """The exact product; not renormalised, so its significand may reach 4."""
    sign = x.sign ^ y.sign
    kinds = {x.kind, y.kind}
    if "nan" in kinds:
        return _Term("nan", 0)
    if "inf" in kinds:
        zero = (x.kind == "finite" and x.significand == 0) or (
            y.kind == "finite" and y.significand == 0
        )
        return _Term("nan", 0) if zero else _Term("inf", sign)
    return _Term(
        "finite", sign, x.significand * y.significand, x.exponent + y.exponent, x.top + y.top
    )


def _sum(terms: list[_Term], arithmetic: Arithmetic) -> int:
    """Align, add, round: the FP32 word of the sum of the terms."""
    kinds = {term.kind for term in terms}
    infinities = {term.sign for term in terms if term.kind == "inf"}
    if "nan" in kinds or len(infinities) == 2:
        return arithmetic.nan
    if infinities:
        return infinities.pop() << 31 | _INF
    if arithmetic.fraction_bits is None:
        unit = min(term.exponent for term in terms)
        total = sum(term.signed << (term.exponent - unit) for term in terms)
    else:
        tops = [term.top for term in terms if term.significand]
        unit = max(tops + [arithmetic.min_exponent or 0]) - arithmetic.fraction_bits
        total = sum(_align(term, unit, arithmetic.alignment) for term in terms)
    word = encode(int(total < 0), abs(total), unit, arithmetic.rounding, arithmetic.overflow)
    magnitude = word & 0x7FFFFFFF
    if arithmetic.subnormal_results == "flush" and magnitude < 1 << 23:
        word, magnitude = word & 1 << 31, 0
    if magnitude == 0:
        if arithmetic.zero == "positive":
            return 0
        if total == 0:
            minus = all(term.sign and not term.significand for term in terms)
            return int(minus) << 31
    return word


def _align(term: _Term, unit: int, alignment: str) -> int:
    """`term` as a count of 2^unit."""
    shift = unit - term.exponent
    if shift <= 0:
        return term.signed << -shift
    if alignment == "floor":
        return term.signed >> shift
    if alignment == "truncate":
        return int(math.copysign(1, term.signed)) * (term.significand >> shift)
    kept, rest, half = term.signed >> shift, term.signed & ((1 << shift) - 1), 1 << (shift - 1)
    return kept + (rest > half or (rest == half and kept & 1))


def _as_float32(x: NDArray) -> NDArray[np.float32]:
    return x.astype(
        np.float32
    )  # exact: BF16 and FP16 are subsets of FP32, and NumPy keeps subnormals
