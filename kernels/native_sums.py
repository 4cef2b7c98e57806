"""Sums over the rows of an array in stated orders on an x86's vectors, compiled by numba.

An order is a list of what to do on a stack of rows: 2 i puts row i on it, 2 i + 1 adds row i to
the one on top, -1 adds the one on top to the next. Every addition rounds to nearest even in the
numbers' own type and keeps subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit

from kernels.native_chain_steps import control, restore
from kernels.native_operands import FP32, address
from kernels.vectors import COMPILED, LANES, Emitter, Vector, inline, pointer

_CHUNK = 1024  # columns at once: some rows of them stay in a cache
_KEEPING = 0x1F80  # the processor's control word: to nearest, subnormal numbers are numbers
_ROUNDS_UP, _NAN = 0x7FFF, 0x7FC00000  # of BF16, as words of FP32


def _each(emit: Emitter, count: Any, function: Callable[[Emitter, Any], None]) -> None:
    """`function` of all columns: many at a time, and the last ones one by one."""
    wide, one = emit.floats(), emit.floats(1)
    whole = emit.builder.udiv(count, emit.integer(2 * LANES))
    with emit.loop(whole) as index:
        function(wide, emit.times(index, 2 * LANES))
    first = emit.times(whole, 2 * LANES)
    with emit.loop(emit.builder.sub(count, first)) as index:
        function(one, emit.builder.add(first, index))


def _load_short(singles: Emitter, source: ir.Value, at: Any) -> Vector:
    shorts = singles.builder.inttoptr(source, ir.IntType(16).as_pointer())
    return singles.load_short(singles.place(shorts, at)).numbers()


def _in_bf16(singles: Emitter, total: Vector) -> Vector:
    """FP32 numbers rounded to BF16."""
    word = total.words()
    odd = word.shifted_down(singles.word(16)) & singles.word(1)
    rounded = word.plus_words(singles.word(_ROUNDS_UP)).plus_words(odd)
    upper = (rounded & singles.word(0xFFFF0000)).numbers()
    return total.equals(total).where(upper, singles.word(_NAN).numbers())


@inline(result=False)
def _put(emit: Emitter, source: Any, row: Any, count: Any) -> None:
    def put(singles: Emitter, at: Any) -> None:
        number = singles.load(singles.place(singles.at(source), at))
        singles.store(number, singles.place(singles.at(row), at))

    _each(emit, count, put)


@inline(result=False)
def _put_bf16(emit: Emitter, source: Any, row: Any, count: Any) -> None:
    def put(singles: Emitter, at: Any) -> None:
        singles.store(_load_short(singles, source, at), singles.place(singles.at(row), at))

    _each(emit, count, put)


@inline(result=False)
def _add(emit: Emitter, source: Any, row: Any, count: Any) -> None:
    """`row += source`, both FP32."""

    def add(singles: Emitter, at: Any) -> None:
        place = singles.place(singles.at(row), at)
        number = singles.load(singles.place(singles.at(source), at))
        singles.store(singles.load(place) + number, place)

    _each(emit, count, add)


@inline(result=False)
def _add_bf16(emit: Emitter, source: Any, row: Any, count: Any) -> None:
    """As `_add`, of BF16."""

    def add(singles: Emitter, at: Any) -> None:
        place = singles.place(singles.at(row), at)
        total = singles.load(place) + _load_short(singles, source, at)
        singles.store(_in_bf16(singles, total), place)

    _each(emit, count, add)


@inline(result=False)
def _add_rows_of_bf16(emit: Emitter, source: Any, row: Any, count: Any) -> None:
    """As `_add`, of BF16 numbers that are in FP32."""

    def add(singles: Emitter, at: Any) -> None:
        place = singles.place(singles.at(row), at)
        total = singles.load(place) + singles.load(singles.place(singles.at(source), at))
        singles.store(_in_bf16(singles, total), place)

    _each(emit, count, add)


@inline(result=False)
def _write_bf16(emit: Emitter, row: Any, out: Any, count: Any) -> None:
    def write(singles: Emitter, at: Any) -> None:
        shorts = singles.builder.inttoptr(out, ir.IntType(16).as_pointer())
        word = singles.load(singles.place(singles.at(row), at)).words()
        singles.store_short(word, singles.place(shorts, at))

    _each(emit, count, write)


@njit(**COMPILED)
def chunks(count: int, cuts: int) -> int:
    """Of a piece of a row."""
    size = -(-count // cuts)
    return -(-size // _CHUNK)


@njit(**COMPILED)
def stack_for(depth: int) -> Any:
    """What a thread needs for orders that have so many rows on the stack at most."""
    return np.empty(depth * _CHUNK, np.float32)


@njit(**COMPILED)
def compute(
    values: int,
    shape: tuple[int, int, int, int],
    tokens: int,
    ends: int,
    results: int,
    out: int,
    kind: int,
    cuts: int,
    first: int,
    last: int,
    stack: Any,
) -> None:
    """Items `first` to `last` of `out[results / cuts, outer, inner, count]`.

    Args:
        values: the address of `[outer, rows, inner, count]`, FP32 or BF16, of this shape.
        tokens, ends: addresses of orders, 32-bit integers one after the other, and of where each
            of the results' orders ends.
        kind: of the numbers, see `kernels.native_operands`.
        cuts: into how many pieces, equal but for the last ones, the last axis is cut. Result i is
            the piece `i % cuts` of its row.
        first, last: of `outer inner results chunks(count, cuts)` items.
        stack: `stack_for` these orders.
    """
    outer, rows, inner, count = shape
    ends_at = carray(pointer(ends), (results,), np.int32)
    size, parts = -(-count // cuts), chunks(count, cuts)
    bytes_of = 4 if kind == FP32 else 2
    bottom, row_bytes = address(stack, 0), 4 * _CHUNK
    before = control(())
    restore((_KEEPING,))
    for item in range(first, last):
        rest, part = divmod(item, parts)
        rest, result = divmod(rest, results)
        o, i = divmod(rest, inner)
        start = result % cuts * size + part * _CHUNK
        length = min(_CHUNK, size - part * _CHUNK, count - start)
        if length <= 0:
            continue
        source = values + bytes_of * ((o * rows * inner + i) * count + start)
        begin = ends_at[result - 1] if result > 0 else 0
        order = carray(pointer(tokens + 4 * begin), (ends_at[result] - begin,), np.int32)
        top = bottom - row_bytes
        for token in order:
            row = source + bytes_of * (token >> 1) * inner * count
            if token < 0:
                if kind == FP32:
                    _add((top, top - row_bytes, length))
                else:
                    _add_rows_of_bf16((top, top - row_bytes, length))
                top -= row_bytes
            elif token & 1 == 0:
                top += row_bytes
                if kind == FP32:
                    _put((row, top, length))
                else:
                    _put_bf16((row, top, length))
            elif kind == FP32:
                _add((row, top, length))
            else:
                _add_bf16((row, top, length))
        target = out + bytes_of * (((result // cuts * outer + o) * inner + i) * count + start)
        if kind == FP32:
            _put((bottom, target, length))
        else:
            _write_bf16((bottom, target, length))
    restore((before,))
