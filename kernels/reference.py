"""The meaning of an `Arithmetic`, in Python integers: slow and obviously right.

Nothing is shared with the JAX twin but the record. A number is `(sign, significand, exponent)` with
value `(-1)^sign * significand * 2^exponent`; a sum is an integer count of some power of two.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import arguments
from kernels.arithmetic import FP32_FMA_CHAIN, INTEGERS, Arithmetic
from kernels.tiling import Chain, Tiling, check, k_order, resolve

# dtype name: (fraction bits, exponent bias, bits of the exponent field)
_FORMATS = {"bfloat16": (7, 127, 8), "float16": (10, 15, 5), "float32": (23, 127, 8)}
_INF = 0x7F800000
_MAX = 0x7F7FFFFF


class _Term(NamedTuple):
    """A decoded operand or product; `kind` is finite, inf or nan. `top` is the exponent alignment
    sees.
    """

    kind: str
    sign: int
    significand: int = 0
    exponent: int = 0  # of the last bit of the significand
    top: int = 0  # of the bit just left of the binary point
    quiet: int = 0  # of a NaN: the FP32 word it becomes

    @property
    def signed(self) -> int:
        return -self.significand if self.sign else self.significand


def matmul(
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike | None = None,
    *,
    arithmetic: Arithmetic,
    tiling: Tiling | str | None = None,
) -> NDArray[np.float32] | NDArray[np.int32]:
    """`a[..., m, k] @ b[..., k, n] + c` in FP32, as the matrix unit of `arithmetic` computes it.

    NumPy arrays of BF16, FP16 or FP32 (FP32 mode if either is); batch dimensions broadcast. K
    ascends in steps of `arithmetic.products`, the last one filled up with +0 products; `c` (FP32,
    default +0) is the first accumulator. INT8 and INT4 give INT32 (and take such a `c`), modulo
    2^32. A `tiling` (or "library", for Ascend's choice) sums K in its own order.
    """
    check(tiling)
    a, b = np.asarray(a), np.asarray(b)
    if c is not None and not hasattr(c, "dtype"):  # Python's numbers have no dtype to be wrong
        c = np.asarray(c, np.int32 if a.dtype.name in INTEGERS else np.float32)
    arithmetic, batch = arguments.checked(a, b, c, arithmetic)
    if a.dtype.name in INTEGERS:
        return _integers(a, b, c)
    if "float32" in (a.dtype.name, b.dtype.name):
        a, b = _as_float32(a), _as_float32(b)
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    plan = resolve(tiling, m, k, n, a.dtype.name)
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
        row, column = rows[index[:-1]], columns[index[:-2] + index[-1:]]
        if plan is None:
            words[index] = dot(row, column, int(words[index]), arithmetic)
        else:
            tile = index[-2] // plan.base_m, index[-1] // plan.base_n
            order = k_order(plan, m, k, n, *tile)
            words[index] = dot_in_order(row, column, int(words[index]), order, arithmetic)
    return words.view(np.float32)


def dot_in_order(
    row: list[_Term],
    column: list[_Term],
    c: int,
    order: tuple[tuple[Chain, ...], ...],
    arithmetic: Arithmetic,
) -> int:
    """As `dot`, K in an order of `kernels.tiling`: sums of parts, each of chains of pieces.

    Every piece is filled up to whole steps by itself. C starts the first chain, +0 the others.
    Sums are added by FP32 additions to nearest even, whatever the unit does.
    """
    total = None
    for part in order:
        subtotal = None
        for chain in part:
            for start, stop in chain:
                c = dot(row[start:stop], column[start:stop], c, arithmetic)
            subtotal, c = c if subtotal is None else _add_words(subtotal, c), 0
        assert subtotal is not None
        total = subtotal if total is None else _add_words(total, subtotal)
    return c if total is None else total


def _add_words(x: int, y: int) -> int:
    """An FP32 addition outside the unit: to nearest even, IEEE."""
    return _add(decode(x, "float32"), y, FP32_FMA_CHAIN)


def dot(row: list[_Term], column: list[_Term], c: int, arithmetic: Arithmetic) -> int:
    """One output element from decoded operands: FP32 words `c` in, result out."""
    zero = _Term("finite", 0, top=arithmetic.min_exponent or -400)
    padding = [(zero, zero)] * (-len(row) % arithmetic.products)
    pairs = [*zip(row, column, strict=True), *padding]
    for start in range(0, len(pairs), arithmetic.products):
        c = step(pairs[start : start + arithmetic.products], c, arithmetic)
    return c


def step(pairs: list[tuple[_Term, _Term]], c: int, arithmetic: Arithmetic) -> int:
    """One step: pairs of operands and the FP32 word `c` give the next FP32 word."""
    if arithmetic.summation == "chain":
        for x, y in reversed(pairs):
            c = _fused_multiply_add(x, y, c, arithmetic)
        return c
    addend = _read(decode(c, "float32"), "float32", arithmetic)
    products = [_product(x, y, arithmetic) for x, y in pairs]
    if arithmetic.summation == "tree":
        words = [_sum([product], arithmetic) for product in products]
        while len(words) > 1:
            words = [
                _add(decode(x, "float32"), y, arithmetic)
                for x, y in zip(words[::2], words[1::2], strict=True)
            ]
        return _add(addend, words[0], arithmetic)
    if arithmetic.addend == "late":
        return _add(addend, _sum(products, arithmetic), arithmetic)
    if arithmetic.addend == "joined":
        return _joined(products, addend, arithmetic)
    return _sum([*products, addend], arithmetic)


def _fused_multiply_add(x: _Term, y: _Term, c: int, arithmetic: Arithmetic) -> int:
    """`x * y + c`, rounded once."""
    addend = _read(decode(c, "float32"), "float32", arithmetic)
    if arithmetic.nan_rule == "propagate":
        for term in (x, y, addend):
            if term.kind == "nan":
                return term.quiet
    return _sum([_product(x, y, arithmetic), addend], arithmetic)


def _add(x: _Term, y: int, arithmetic: Arithmetic) -> int:
    """An FP32 addition. Its operands are read as they are: flushing is for inputs of a step."""
    return _sum([x, decode(y, "float32")], arithmetic, exact=True)


def _joined(products: list[_Term], addend: _Term, arithmetic: Arithmetic) -> int:
    """Products are aligned and added first; then that sum and C are cut to a common scale."""
    special = _special([*products, addend], arithmetic)
    if special is not None:
        return special
    top, unit, total = _aligned(products, arithmetic)
    common = max(top, addend.top)  # a zero C counts with exponent -126
    sum_bits, addend_bits = arithmetic.sum_fraction_bits, arithmetic.addend_fraction_bits
    kept_bits = arithmetic.result_fraction_bits
    assert sum_bits is not None and addend_bits is not None and kept_bits is not None
    finest = common - max(sum_bits, addend_bits)
    exact = _Term("finite", int(total < 0), abs(total), unit)
    both = 0
    for term, bits in ((exact, sum_bits), (addend, addend_bits)):
        both += _align(term, common - bits, "floor") << (common - bits - finest)
    leading = max(abs(both).bit_length() - 1, -126 - finest)  # a subnormal sum is not normalised
    cut = max(leading - kept_bits, 0)
    minus_zero = both == 0 and all(
        term.sign and not term.significand for term in [*products, addend]
    )
    return _finish(both >> cut, finest + cut, minus_zero, arithmetic)


def decode(word: int, dtype: str) -> _Term:
    """The exact value of a bit pattern; subnormals have the smallest normal exponent and no leading
    one.
    """
    fraction_bits, bias, field_bits = _FORMATS[dtype]
    sign = word >> (fraction_bits + field_bits)
    field = (word >> fraction_bits) & ((1 << field_bits) - 1)
    fraction = word & ((1 << fraction_bits) - 1)
    if field == (1 << field_bits) - 1:
        quiet = sign << 31 | 0x7FC00000 | fraction << (23 - fraction_bits)
        return _Term("nan" if fraction else "inf", sign, quiet=quiet)
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
    nearest = arithmetic.operand_rounding == "nearest_even"
    special = (word & 0x7FFFFFFF) >= _INF
    if x.dtype.name == "float32" and cut and not (nearest and special):
        rest, word = word & ((1 << cut) - 1), word >> cut
        half = 1 << (cut - 1)
        if nearest and (rest > half or (rest == half and word & 1)):
            word += 1
        word <<= cut
    cut = cut if x.dtype.name == "float32" else 0
    return _read(decode(word, x.dtype.name), x.dtype.name, arithmetic, cut)


def _read(term: _Term, dtype: str, arithmetic: Arithmetic, cut: int = 0) -> _Term:
    """An operand (of which `cut` bits are not read) or C, decoded from `dtype`, as the unit takes
    it.
    """
    if arithmetic.specials == "saturate" and term.kind != "finite":
        if term.kind == "nan":
            return decode(0, dtype)
        fraction_bits, _, field_bits = _FORMATS[dtype]
        largest = (((1 << field_bits) - 1) << fraction_bits) - (1 << cut)
        return decode(term.sign << (fraction_bits + field_bits) | largest, dtype)
    if term.kind == "finite" and arithmetic.subnormal_inputs != "keep":
        normal = term.significand.bit_length() > term.top - term.exponent
        if not normal:  # a zero or subnormal
            sign = term.sign if arithmetic.subnormal_inputs == "flush" else 0
            return term._replace(sign=sign, significand=0)
    return term


def _product(x: _Term, y: _Term, arithmetic: Arithmetic) -> _Term:
    """The exact product; not renormalised, so its significand may reach 4."""
    sign = x.sign ^ y.sign
    if not x.kind == y.kind == "finite":
        zero = any(term.kind == "finite" and not term.significand for term in (x, y))
        if zero or "nan" in (x.kind, y.kind):
            return _Term("nan", 0)
        return _Term("inf", sign)
    significand, exponent = x.significand * y.significand, x.exponent + y.exponent
    if arithmetic.product_overflow == "inf" and significand.bit_length() + exponent > 128:
        return _Term("inf", sign)
    return _Term("finite", sign, significand, exponent, x.top + y.top)


def _sum(terms: list[_Term], arithmetic: Arithmetic, *, exact: bool = False) -> int:
    """Align (unless `exact`), add, round: the FP32 word of the sum of the terms."""
    special = _special(terms, arithmetic)
    if special is not None:
        return special
    if exact or arithmetic.fraction_bits is None:
        unit = min([term.exponent for term in terms])
        total = sum([term.signed << (term.exponent - unit) for term in terms])
    else:
        _, unit, total = _aligned(terms, arithmetic)
    minus_zero = total == 0 and all(term.sign and not term.significand for term in terms)
    return _finish(total, unit, minus_zero, arithmetic)


def _special(terms: list[_Term], arithmetic: Arithmetic) -> int | None:
    """The word of a sum that is NaN or infinite because of its terms."""
    kinds = [term.kind for term in terms]
    if kinds.count("finite") == len(kinds):
        return None
    infinities = {term.sign for term in terms if term.kind == "inf"}
    if "nan" in kinds or len(infinities) == 2:
        return arithmetic.nan
    return infinities.pop() << 31 | _INF


def _aligned(terms: list[_Term], arithmetic: Arithmetic) -> tuple[int, int, int]:
    """The largest exponent, the unit to which terms are cut, and their sum as a count of it."""
    assert arithmetic.fraction_bits is not None and arithmetic.min_exponent is not None
    top = max([term.top for term in terms if term.significand] + [arithmetic.min_exponent])
    unit = top - arithmetic.fraction_bits
    return top, unit, sum([_align(term, unit, arithmetic.alignment) for term in terms])


def _finish(total: int, unit: int, minus_zero: bool, arithmetic: Arithmetic) -> int:
    """The FP32 word of `total * 2^unit`; `minus_zero`: nothing but -0 was added."""
    sign, count = int(total < 0), abs(total)
    word = encode(sign, count, unit, arithmetic.rounding, arithmetic.overflow)
    if arithmetic.subnormal_results == "flush" and _is_tiny(count, unit, arithmetic.rounding):
        word = sign << 31
    if word & 0x7FFFFFFF == 0:
        if arithmetic.zero == "positive":
            return 0
        if total == 0:
            return int(minus_zero) << 31
    return word


def _is_tiny(count: int, unit: int, rounding: str) -> bool:
    """Whether `count * 2^unit`, rounded as if exponents had no limit, is below 2^-126."""
    far = 200  # the same rounding where exponents are in range: 2^200 times as large
    return encode(0, count, unit + far, rounding, "saturate") < (far - 126 + 127) << 23


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


def _integers(a: NDArray, b: NDArray, c: ArrayLike | None) -> NDArray[np.int32]:
    """Products in Python integers; INT32 wraps around."""
    total = np.matmul(a.astype(np.int8).astype(object), b.astype(np.int8).astype(object))
    total = total + (0 if c is None else np.asarray(c, np.int32).astype(object))
    return np.asarray((total + 2**31) % 2**32 - 2**31).astype(np.int32)


def _as_float32(x: NDArray) -> NDArray[np.float32]:
    return x.astype(
        np.float32
    )  # exact: BF16 and FP16 are subsets of FP32, and NumPy keeps subnormals
