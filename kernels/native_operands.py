"""Operands of a CPU's own matmuls as they lie in memory: BF16, FP16 or FP32, read as words of FP32
or as doubles, whatever the processor makes of subnormal numbers.

A `form` is their kind, how many bits of a word of FP32 are cut, and whether to nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit

from kernels.native_steps import EXPONENT
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

BF16, FP16, FP32 = range(3)

GROUP = 2 * LANES  # doubles that stay together
WORDS = 4 * LANES  # words that do

_SIGN = 1 << 31
_INFINITY = 255 << 23
_NORMAL = 1 << 23  # the word of 2^-126
_HALF_INFINITY = 31 << 26  # words of FP16, as upper halves
_HALF_NORMAL = 1 << 26


@njit(**COMPILED)
def bytes_of(form: Any) -> int:
    return 4 if form[0] == FP32 else 2


@njit(**COMPILED)
def address(array: Any, index: int) -> int:
    """Of an element. In a loop, arrays of arrays cost more than arithmetic: numba counts who holds
    them, by atomic operations.
    """
    return int(array.ctypes.data) + array.itemsize * index


# One by one.


@njit(**COMPILED)
def decoded(word: Any) -> float:
    """The double of a word of FP32, by integer operations where it is subnormal."""
    word = np.int64(word)
    magnitude = word & np.int64(0x7FFFFFFF)
    bits = np.int64(magnitude << 29) + np.int64((1023 - 127) << 52)
    if magnitude < _NORMAL:
        bits = np.float64(float(magnitude) * 2.0**-149).view(np.int64)
    if magnitude >= _INFINITY:
        bits = np.int64(EXPONENT) if magnitude == _INFINITY else np.int64(EXPONENT | 1 << 51)
    return np.int64(bits | word >> 31 << 63).view(np.float64)


@njit(**COMPILED)
def word_at(address: int, form: Any) -> int:
    """The word of FP32 of the number at an address."""
    kind, cut, nearest = form
    if kind == FP32:
        bits = np.int64(carray(pointer(address), (1,), np.uint32)[0])
        rounded = bits
        if cut > 0:
            rounded += (((np.int64(1) << cut) >> 1) - 1 + (bits >> cut & 1)) * nearest
        finite = bits & 0x7FFFFFFF < _INFINITY
        return int(rounded >> cut << cut if finite or nearest == 0 else bits)
    short = np.int64(carray(pointer(address), (1,), np.uint16)[0])
    if kind == BF16:
        return int(short << 16)
    magnitude = short & 0x7FFF
    word = np.int64(magnitude << 13) + np.int64((127 - 15) << 23)
    if magnitude < 1 << 10:
        word = np.int64(np.float32(float(magnitude) * 2.0**-24).view(np.uint32))
    if magnitude >= 31 << 10:
        word = np.int64(magnitude << 13) | np.int64(_INFINITY)
    return int(word | short >> 15 << 31)


# Many at once.


def _of_fp16(singles: Emitter, half: Vector) -> Vector:
    """Words of FP32 of numbers whose words are upper halves."""
    sign, size = half & singles.word(_SIGN), half & singles.word(_SIGN - 1)
    moved = size.shifted_down(singles.word(3))
    usual = moved.plus_words(singles.word((127 - 15) << 23))
    subnormal = (size.counted() * singles.number(2.0**-40)).words()
    infinite = moved | singles.word(_INFINITY)
    found = size.less_word(singles.word(_HALF_NORMAL)).where(subnormal, usual)
    return size.less_word(singles.word(_HALF_INFINITY)).where(found, infinite) | sign


def _of_fp32(singles: Emitter, word: Vector, cut: Any, nearest: Any) -> Vector:
    """Words without their last `cut` bits, as `kernels.operands` has it."""
    builder = singles.builder

    def all_equal(value: ir.Value) -> Vector:
        return singles.all_words_equal(builder.trunc(value, ir.IntType(32)))

    one, zero = singles.integer(1), singles.integer(0)
    rounds = builder.and_(nearest, builder.zext(builder.icmp_unsigned("!=", cut, zero), zero.type))
    half = builder.sub(builder.lshr(builder.shl(one, cut), one), one)
    by = all_equal(cut)
    odd = word.shifted_down(by) & all_equal(rounds)
    rounded = word.plus_words(all_equal(builder.mul(half, rounds))).plus_words(odd)
    limit = builder.select(builder.trunc(rounds, ir.IntType(1)), singles.integer(_INFINITY), zero)
    finite = (word & singles.word(_SIGN - 1)).less_word(
        all_equal(builder.sub(limit, builder.sub(one, rounds)))
    )
    return finite.where(rounded.shifted_down(by).shifted_up(by), word)


def _doubles_of(emit: Emitter, singles: Emitter, word: Vector) -> Vector:
    size, sign = word & singles.word(_SIGN - 1), word & singles.word(_SIGN)
    tiny = size.less_word(singles.word(_NORMAL))
    counted = size.counted().words() | sign
    found = tiny.where(counted, word).numbers().doubles()
    return found * tiny.where(emit.number(2.0**-149), emit.number(1.0))


def _read(
    emit: Emitter,
    kind: int,
    as_doubles: bool,
    source: Any,
    target: Any,
    count: Any,
    apart: Any,
    cut: Any,
    nearest: Any,
) -> None:
    group, lanes = (GROUP, LANES) if as_doubles else (WORDS, 2 * LANES)
    singles = emit.floats(lanes)
    written = emit if as_doubles else singles
    source, target = singles.at(source), written.at(target)
    of_word = 1 if kind == FP32 else 2  # numbers to 32 bits
    with emit.loop(count) as index:
        for j in range(0, group, lanes):
            here = singles.place(source, emit.times(index, group // of_word), j // of_word)
            if kind == FP32:
                word = _of_fp32(singles, singles.load(here).words(), cut, nearest)
            elif kind == FP16:
                word = _of_fp16(singles, singles.load_short(here))
            else:
                word = singles.load_short(here)
            found = _doubles_of(emit, singles, word) if as_doubles else word.numbers()
            written.store(found, written.place(target, emit.times(index, apart), j))


@inline(result=True)
def _usual_bf16_doubles(
    emit: Emitter, source: Any, target: Any, count: Any, apart: Any, *_: Any
) -> Any:
    """As `_bf16_doubles`, which has to do it again if the result is not 0: there are subnormal
    numbers.
    """
    singles, builder = emit.floats(GROUP), emit.builder
    source, target = singles.at(source), emit.at(target)
    unusual = emit.integer_variable(0)
    with emit.loop(count) as index:
        word = singles.load_short(singles.place(source, emit.times(index, GROUP // 2)))
        below = (word & singles.word(_SIGN - 1)).plus_words(singles.word(0xFFFFFFFF))
        tiny = below.less_word(singles.word(_NORMAL - 1)).bits()
        builder.store(builder.or_(builder.load(unusual), tiny), unusual)
        for half, part in enumerate(word.numbers().to_doubles()):
            emit.store(part, emit.place(target, emit.times(index, apart), half * LANES))
    return builder.load(unusual)


@inline(result=False)
def _bf16_doubles(emit: Emitter, *operands: Any) -> None:
    _read(emit, BF16, True, *operands)


@inline(result=False)
def _fp16_doubles(emit: Emitter, *operands: Any) -> None:
    _read(emit, FP16, True, *operands)


@inline(result=False)
def _fp32_doubles(emit: Emitter, *operands: Any) -> None:
    _read(emit, FP32, True, *operands)


@inline(result=False)
def _bf16_words(emit: Emitter, *operands: Any) -> None:
    _read(emit, BF16, False, *operands)


@inline(result=False)
def _fp16_words(emit: Emitter, *operands: Any) -> None:
    _read(emit, FP16, False, *operands)


@inline(result=False)
def _fp32_words(emit: Emitter, *operands: Any) -> None:
    _read(emit, FP32, False, *operands)


@njit(**COMPILED)
def read_doubles(source: int, form: Any, count: int, target: int, apart: int) -> None:
    """`count` numbers at an address as doubles to another one, where every GROUP of them begin so
    many doubles `apart`.
    """
    kind, cut, nearest = form
    groups = count // GROUP
    operands = source, target, groups, apart, cut, nearest
    if kind == BF16:
        if _usual_bf16_doubles(operands) != 0:
            _bf16_doubles(operands)
    elif kind == FP16:
        _fp16_doubles(operands)
    else:
        _fp32_doubles(operands)
    first = groups * GROUP
    rest = carray(pointer(target + 8 * groups * apart), (count - first,), np.float64)
    for i in range(first, count):
        rest[i - first] = decoded(word_at(source + i * bytes_of(form), form))


@njit(**COMPILED)
def read_words(source: int, form: Any, count: int, target: int, apart: int) -> None:
    """As `read_doubles`, WORDS words of FP32 at a time."""
    kind, cut, nearest = form
    groups = count // WORDS
    operands = source, target, groups, apart, cut, nearest
    if kind == BF16:
        _bf16_words(operands)
    elif kind == FP16:
        _fp16_words(operands)
    else:
        _fp32_words(operands)
    first = groups * WORDS
    rest = carray(pointer(target + 4 * groups * apart), (count - first,), np.uint32)
    for i in range(first, count):
        rest[i - first] = np.uint32(word_at(source + i * bytes_of(form), form))
