"""The twin for units whose step sums are exact: `[batch, m, k] x [batch, k, n]`.

FP64 adds the products of a step. Results are computed tile by tile, each along all of k, and for
every block of k one of three ways is taken:

- plain, where exponent ranges prove beforehand that no FP64 sum of products can round, so that the
  only rounding is the one to FP32 that the unit makes;
- checked, for FP32 operands, whose products are too long for such proofs: each element bounds its
  FP64 error and asks whether the rounding to FP32 could depend on it (Ziv's test);
- split (`kernels.split`) for everything else, and for a block that the test does not pass; once
  every accumulator of a tile is infinite or NaN, only what can still change that.

An element that even these sums leave in doubt is computed again alone (`kernels.repair`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import floats, ranges, repair, small, split
from kernels.arithmetic import Arithmetic

_NARROW = 16  # columns below which the product is computed transposed
_GROUP = 16  # products of a block, if a step has fewer
_TILE = 1 << 18  # elements of a tile
_WIDTH = 512  # columns of a tile of many rows: a block of b stays in the first-level cache

Block = tuple[Array, Array]
"""FP64 operands of a block: `[batch, m, size]` and `[batch, size, n]`."""


class _Tiling(NamedTuple):
    """How the result is cut: tiles along each axis and their sizes; the last ones may overlap."""

    counts: tuple[int, int, int]
    sizes: tuple[int, int, int]

    def corner(self, tile: Array) -> tuple[Array, Array, Array]:
        """First batch, row and column. A slice that would reach beyond the end starts earlier."""
        _, rows, columns = self.counts
        parts = tile // (rows * columns), tile // columns % rows, tile % columns
        batch, row, column = (x * size for x, size in zip(parts, self.sizes, strict=True))
        return batch, row, column


class _Proof(NamedTuple):
    """What is known of a tile before its sums, for each block of k."""

    plain: Array  # its sums are exact in FP64
    maybe_plain: Array  # they are if the accumulators are small enough at that time
    ordinary: Array  # nothing in any block is subnormal, infinite or NaN
    total: Array  # a bound on the sum of the products' magnitudes
    limit: Array  # below it FP64 sums are exact


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`, operands as read.

    Args:
        a, b: BF16, FP16 or FP32.
        c: FP32 `[batch, m, n]`, or `None` for +0.
        arithmetic: a fused one with `fraction_bits=None`.
    """
    if small.serves(a, b, arithmetic):
        return small.accumulate(a, b, c, arithmetic)
    if b.shape[2] < _NARROW < a.shape[1]:  # long rows are what the loops below are good at
        turned = None if c is None else c.swapaxes(1, 2)
        return accumulate(b.swapaxes(1, 2), a.swapaxes(1, 2), turned, arithmetic).swapaxes(1, 2)
    short = -a.shape[2] % arithmetic.products  # a short step is filled up with products +0
    if short:
        a = jnp.pad(a, ((0, 0), (0, 0), (0, short)))
        b = jnp.pad(b, ((0, 0), (0, short), (0, 0)))
    k = a.shape[2]
    if _block_size(k // arithmetic.products, arithmetic) == k:
        # A block that is all of k would not depend on the loops below, and XLA would compute every
        # way's sums before them.
        a = jnp.pad(a, ((0, 0), (0, 0), (0, k)))
        b = jnp.pad(b, ((0, 0), (0, k), (0, 0)))
    with jax.enable_x64(True):
        found, unknown = _tiles(a, b, c, k, arithmetic)

        def last_resort(state: tuple[Array, Array]) -> tuple[Array, Array]:
            mark = split.unknown_word(arithmetic)
            operands = a[:, :, :k], b[:, :k]
            return repair.repair(state[0], mark, *operands, c, arithmetic), jnp.bool_(False)

        # A loop and not a conditional: it leaves the results where they are.
        return lax.while_loop(lambda state: state[1], last_resort, (found, unknown))[0]


def _tiles(
    a: Array, b: Array, c: Array | None, k: int, arithmetic: Arithmetic
) -> tuple[Array, Array]:
    """Results of all tiles, and whether any holds an unknown element; `k` products count."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    tiling = _tiling(shape)
    tiles = int(np.prod(tiling.counts))
    ranges_a, ranges_b = _operand_ranges(a, b, k, tiling)
    mark = split.unknown_word(arithmetic)
    kept = arithmetic.operand_fraction_bits or 23
    wide = a.dtype == jnp.float32 and kept > 12  # products longer than FP16's

    def body(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        tile, careful, out, unknown = state
        corner = tiling.corner(tile)
        start = _start(c, corner, tiling.sizes, arithmetic)
        batch, row, column = (
            index // size for index, size in zip(corner, tiling.sizes, strict=True)
        )
        picked = (
            [x[batch * tiling.counts[1] + row] for x in ranges_a],
            [x[batch * tiling.counts[2] + column] for x in ranges_b],
        )
        proof = _prove(*picked, None if c is None else start, arithmetic)
        proof = proof._replace(
            plain=proof.plain & ~careful,
            maybe_plain=proof.maybe_plain & ~careful,
            ordinary=proof.ordinary & ~careful,
        )
        found = _all_blocks(
            start, _block_of(a, b, k, corner, tiling.sizes, arithmetic), wide, proof, arithmetic
        )
        # A plain sum that had to round is NaN: then all blocks of the tile are split.
        again = jnp.any(proof.maybe_plain) & _holds_nan(found)
        out = lax.dynamic_update_slice(out, floats.from_bits32(found), corner)
        unknown |= ~again & jnp.any(found == mark)
        return jnp.where(again, tile, tile + 1), again, out, unknown

    state = jnp.int32(0), jnp.bool_(False), jnp.zeros(shape, jnp.float32), jnp.bool_(False)
    _, _, out, unknown = lax.while_loop(lambda state: state[0] < tiles, body, state)
    return out, unknown


def _tiling(shape: tuple[int, int, int]) -> _Tiling:
    """Tiles of about `_TILE` elements, as even as they can be."""
    batch, m, n = shape
    columns = -(-n // max(_WIDTH, _TILE // (batch * m)))
    width = -(-n // columns)
    rows = -(-m // max(1, _TILE // width))
    height = -(-m // rows)
    batches = -(-batch // max(1, _TILE // (width * height)))
    return _Tiling((batches, rows, columns), (-(-batch // batches), height, width))


def _start(
    c: Array | None, corner: tuple[Array, ...], sizes: tuple[int, ...], arithmetic: Arithmetic
) -> Array:
    """Words of the first accumulators of a tile, as the first step reads them."""
    if c is None:
        return jnp.zeros(sizes, jnp.uint32)
    words = floats.bits32(lax.dynamic_slice(c, corner, sizes))
    magnitude = words & floats.MAGNITUDE
    words = jnp.where(magnitude > floats.INF, np.uint32(arithmetic.nan), words)
    if arithmetic.subnormal_inputs == "flush":
        words = floats.flush_subnormals(words)
    if arithmetic.subnormal_inputs == "plus_zero":
        words = jnp.where(magnitude < (1 << 23), np.uint32(0), words)
    if arithmetic.zero == "positive":
        words = jnp.where(magnitude == 0, np.uint32(0), words)
    return words


# Proofs.


def _operand_ranges(
    a: Array, b: Array, k: int, tiling: _Tiling
) -> tuple[ranges.Ranges, ranges.Ranges]:
    """Ranges of the rows and of the columns of each tile; the first axis counts them."""
    batches, rows, columns = tiling.counts
    depth, height, width = tiling.sizes

    def of_rows(index: Array) -> ranges.Ranges:
        corner = (index // rows * depth, index % rows * height, jnp.int32(0))
        return ranges.along_k(_slice(a, corner, (depth, height, k)), 2)

    def of_columns(index: Array) -> ranges.Ranges:
        corner = (index // columns * depth, jnp.int32(0), index % columns * width)
        return ranges.along_k(_slice(b, corner, (depth, k, width)), 1)

    return (
        lax.map(of_rows, jnp.arange(batches * rows, dtype=jnp.int32)),
        lax.map(of_columns, jnp.arange(batches * columns, dtype=jnp.int32)),
    )


def _prove(
    rows: list[Array], columns: list[Array], start: Array | None, arithmetic: Arithmetic
) -> _Proof:
    """What the ranges of a tile's rows, columns and first accumulators say about its blocks."""
    steps = rows[0].shape[0] // arithmetic.products
    blocks = (-1, _block_size(steps, arithmetic))
    top = jnp.where((rows[0] == 0) | (columns[0] == 0), 0.0, rows[0] * columns[0])
    total = jnp.sum(top.reshape(blocks), axis=1)
    last = jnp.min((rows[1] + columns[1]).reshape(blocks), axis=1)
    first_top, first_last = jnp.float64(0), jnp.int32(ranges.NO_LIMIT)
    if start is not None:
        first_top, first_last = ranges.places(start, (0, 1, 2))
    # Cauchy and Schwarz bound every partial sum; each accumulator's rounding adds a little.
    reach = (rows[2] * columns[2] + first_top) * np.exp(steps * 2.0**-21)
    # Rounding never makes a last place finer, so all accumulators are multiples of 2^lowest.
    lowest = jnp.minimum(jnp.min(last), first_last)
    ordinary = (lowest >= -126) & (reach < 2.0**127)
    if arithmetic.addend == "late" and arithmetic.rounding != "nearest_even":
        ordinary &= False  # two roundings, of which FP64 alone does not do the second
    limit = ranges.power(52 + last)
    # FP64 holds C and the sum together unless C is tiny, which only the first C is likely to be.
    limit = limit.at[0].min(ranges.power(52 + first_last))
    maybe = ordinary & (total <= limit)
    return _Proof(maybe & (reach <= limit), maybe, ordinary, total, limit)


def _at(flags: Array, index: Array) -> Array:
    return flags[jnp.minimum(index, flags.shape[0] - 1)]


def _fits(index: Array, words: Array, proof: _Proof) -> Array:
    """Whether the sums of block `index` on these accumulators are exact in FP64."""

    def look() -> Array:
        magnitude = lax.bitcast_convert_type(words & floats.MAGNITUDE, jnp.int32)
        largest = floats.to_float64(jnp.max(magnitude).astype(jnp.uint32))
        total, limit = _at(proof.total, index), _at(proof.limit, index)
        return (largest + total) * (1 + 2.0**-20) <= limit

    proved = _at(proof.plain, index)
    return lax.cond(_at(proof.maybe_plain, index) & ~proved, look, lambda: proved)


def _holds_nan(words: Array) -> Array:
    magnitude = lax.bitcast_convert_type(words & floats.MAGNITUDE, jnp.int32)
    return jnp.max(magnitude) > floats.INF.astype(np.int32)


def _slice(x: Array, corner: tuple[Array, ...], sizes: tuple[int, ...]) -> Array:
    """FP32 words of a part of an operand. It is cut as integers, because XLA:CPU would widen all
    of a BF16 array first.
    """
    raw = lax.bitcast_convert_type(x, jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16)
    part = lax.dynamic_slice(raw, corner, sizes)
    return floats.bits32(lax.bitcast_convert_type(part, x.dtype))


# Blocks of k.


def _block_size(steps: int, arithmetic: Arithmetic) -> int:
    """Products of a block: whole steps, and a number of them that divides all."""
    groups = max(1, _GROUP // arithmetic.products)
    return arithmetic.products * max(x for x in range(1, groups + 1) if steps % x == 0)


def _block_of(
    a: Array,
    b: Array,
    k: int,
    corner: tuple[Array, ...],
    sizes: tuple[int, ...],
    arithmetic: Arithmetic,
) -> Callable[[Array], Block]:
    """A function that gives the operands of block i in FP64."""
    batch, row, column = corner
    depth, height, width = sizes
    size = _block_size(k // arithmetic.products, arithmetic)

    def block(index: Array) -> Block:
        x = _slice(a, (batch, row, index * size), (depth, height, size))
        y = _slice(b, (batch, index * size, column), (depth, size, width))
        x, y = floats.to_float64(x), floats.to_float64(y)
        return lax.optimization_barrier((x, y))  # else converted again for each product

    return block


class _State(NamedTuple):
    """Of a tile, between two blocks."""

    position: Array  # the next block
    words: Array  # accumulators
    fits: Array  # whether the next block is plain
    settled: Array  # whether every accumulator is infinite or NaN
    retry: Array  # the first block that may be checked; the others are split at once
    pause: Array  # blocks to wait after the next failure


def _all_blocks(
    start: Array,
    block: Callable[[Array], Block],
    wide: bool,
    proof: _Proof,
    arithmetic: Arithmetic,
) -> Array:
    """Words of a tile's accumulators after all blocks."""
    count = proof.plain.shape[0]
    settles = arithmetic.overflow == "inf" and arithmetic.product_overflow == "keep"

    def unfinished(state: _State) -> Array:
        return state.position < count

    def is_plain(state: _State) -> Array:
        return unfinished(state) & state.fits

    def is_checked(state: _State) -> Array:
        may_be = proof.ordinary & (state.position >= state.retry)
        return unfinished(state) & ~state.fits & may_be

    def is_split(state: _State) -> Array:
        return unfinished(state) & ~is_plain(state) & ~is_checked(state) & ~state.settled

    def is_settled(state: _State) -> Array:
        return unfinished(state) & state.settled

    def advanced(state: _State, words: Array) -> _State:
        index = state.position + 1
        return state._replace(position=index, words=words, fits=_at(proof.plain, index))

    def looked_at(state: _State) -> _State:
        return state._replace(fits=_fits(state.position, state.words, proof))

    def plain(state: _State) -> _State:
        words = _plain(state.words, *block(state.position), arithmetic)
        return looked_at(advanced(state, words))

    def checked(state: _State) -> _State:
        words = _checked(state.words, *block(state.position), wide, arithmetic)
        # Within a conditional that is always taken, because XLA would compute the words twice.
        failed = lax.cond(state.position >= 0, lambda: _holds_nan(words), lambda: False)
        failure = state._replace(retry=state.position + state.pause, pause=state.pause * 2)
        success = state._replace(pause=jnp.int32(1))
        return lax.cond(failed, lambda: failure, lambda: advanced(success, words))

    def split_up(state: _State) -> _State:
        words = split.steps(state.words, *block(state.position), arithmetic)
        return advanced(state, words)._replace(settled=settles & _no_finite(state.words))

    def settled(state: _State) -> _State:
        return advanced(state, _settled(state.words, *block(state.position), arithmetic))

    def body(state: _State) -> _State:
        # Loops, because a loop keeps its accumulators in place and a conditional copies them.
        state = lax.while_loop(is_plain, plain, looked_at(state))
        state = lax.while_loop(is_checked, checked, state)
        state = lax.while_loop(is_split, split_up, state)
        return lax.while_loop(is_settled, settled, state)

    first = jnp.int32(0)
    state = _State(first, start, jnp.bool_(False), jnp.bool_(False), first, jnp.int32(1))
    return lax.while_loop(unfinished, body, state).words


def _outer(x: Array, y: Array) -> Array:
    return x[:, :, None] * y[:, None, :]


def _dots(x: Array, y: Array, products: int) -> list[Array]:
    """The sums of the products of each step."""
    totals = []
    for first in range(0, x.shape[-1], products):
        total = _outer(x[:, :, first], y[:, first, :])
        for index in range(first + 1, first + products):
            total = total + _outer(x[:, :, index], y[:, index, :])
        totals.append(total)
    return totals


def _plain(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """The steps of a block whose sums are exact; NaN where C is too small for FP64 to hold it
    beside the sum.
    """
    c = floats.from_bits32(words)
    for total in _dots(x, y, arithmetic.products):
        if arithmetic.addend == "late":
            c = c + _to_float32(total, arithmetic)
            continue
        new = _to_float32(c.astype(jnp.float64) + total, arithmetic)
        c = jnp.where(_kept(c, new), new, jnp.float32(jnp.nan))
    return floats.bits32(c)


def _to_float32(x: Array, arithmetic: Arithmetic) -> Array:
    """FP64 to FP32, for numbers that are normal or zero in both."""
    if arithmetic.rounding == "toward_zero":
        bits = lax.bitcast_convert_type(x, jnp.int64) & -(1 << 29)
        x = lax.bitcast_convert_type(bits, jnp.float64)  # RZ
    return x.astype(jnp.float32)  # RNE


def _checked(words: Array, x: Array, y: Array, wide: bool, arithmetic: Arithmetic) -> Array:
    """The steps of a block of ordinary numbers; NaN where a rounding is in doubt.

    `wide`: operands have so many bits that sums which FP64 holds exactly need no search.
    """
    c = floats.from_bits32(words)
    products = arithmetic.products
    row_sizes, column_sizes = lax.optimization_barrier((jnp.abs(x), jnp.abs(y)))
    sizes = _dots(row_sizes, column_sizes, products)
    limit = None
    if not wide:
        # Where all terms are multiples of q, FP64 keeps every partial sum up to 2^52 q.
        row_last = jnp.min(ranges.trailing(x), axis=2) * 2.0**26
        column_last = jnp.min(ranges.trailing(y), axis=1) * 2.0**26
        limit = _outer(row_last, column_last)
    for total, size in zip(_dots(x, y, products), sizes, strict=True):
        before = c.astype(jnp.float64)
        if arithmetic.addend == "fused":
            total = before + total
        # L products and C added in any order err by less than (L + 2) 2^-53 sum |p|, and a bit.
        error = size * ((products + 2) * 2.0**-53) + jnp.abs(total) * 2.0**-51
        if limit is not None:
            exact = jnp.maximum(size, jnp.abs(total)) <= limit
            if arithmetic.addend == "fused":
                exact &= _kept(before, total)
            error = jnp.where(exact, 0.0, error)
        low = _to_float32(total - error, arithmetic)
        high = _to_float32(total + error, arithmetic)
        found = low if arithmetic.addend == "fused" else c + low
        c = jnp.where(low == high, found, jnp.float32(jnp.nan))  # rounding is monotone
    return floats.bits32(c)


def _no_finite(words: Array) -> Array:
    magnitude = lax.bitcast_convert_type(words & floats.MAGNITUDE, jnp.int32)
    return jnp.min(magnitude) >= floats.INF.astype(np.int32)


def _settled(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """The steps of a block where every accumulator is infinite or NaN: these see only which
    operands are, and which are zero.
    """
    mark = split.unknown_word(arithmetic)
    kinds = (jnp.where(jnp.isfinite(v), jnp.sign(v), v).astype(jnp.float32) for v in (x, y))
    x, y = lax.optimization_barrier(tuple(kinds))
    c = floats.from_bits32(words)
    for total in _dots(x, y, arithmetic.products):
        c = c + total
    found = jnp.where(jnp.isnan(c), np.uint32(arithmetic.nan), floats.bits32(c))
    return jnp.where(words == mark, mark, found)


def _kept(before: Array, after: Array) -> Array:
    """Whether C's last place is not so far below the sum that FP64 would drop it."""
    return (jnp.abs(after) <= 2.0**28 * jnp.abs(before)) | (before == 0)
