"""The twin for units whose step sums are exact: `[batch, m, k] x [batch, k, n]`.

FP64 adds the products of a step. Results are computed tile by tile, each along all of k, and every
block of k goes one of three ways:

- plain, where the operands' exponents prove beforehand that no FP64 sum of products can round, so
  that the only rounding is the one to FP32 that the unit makes;
- checked otherwise: each element bounds its FP64 error and asks whether the rounding to FP32 could
  depend on it (Ziv's test);
- split (`kernels.split`) for a block with an element that the test does not pass. Elements that
  even these sums leave in doubt are added up exactly (`kernels.fixed_point`).

Steps of two products (`kernels.pairs`) and of a few FP16 ones (`kernels.halves`) that are not plain
have one way instead, without doubts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import extents, fixed_point, floats, halves, pairs, split
from kernels import operands as reading
from kernels.arithmetic import Arithmetic
from kernels.blocks import outer, paired

NARROW = 16  # columns below which the product is computed transposed
_GROUP = 16  # products of a block, if a step has fewer
_TILE = 1 << 17  # elements of a tile
_WIDTH = 512  # columns of a tile of many rows: a block of b stays in the first-level cache
_LEAST = 2.0**-126  # of the normal numbers
_COLUMNS = 16  # added up exactly at once in each of two rows

_PLAIN, _CHECKED, _SPLIT, _SURE, _DONE = range(5)
"""Ways of a block, and that it has gone one."""


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


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`.

    Args:
        a, b: BF16, FP16 or FP32; read (`operands.read`) block by block.
        c: FP32 `[batch, m, n]`, or `None` for +0.
        arithmetic: a fused one with `fraction_bits=None`.
    """
    if b.shape[2] < NARROW < a.shape[1]:  # long rows are what the loops below are good at
        turned = None if c is None else c.swapaxes(1, 2)
        return accumulate(b.swapaxes(1, 2), a.swapaxes(1, 2), turned, arithmetic).swapaxes(1, 2)
    short = -a.shape[2] % arithmetic.products  # a short step is filled up with products +0
    if short:
        a = jnp.pad(a, ((0, 0), (0, 0), (0, short)))
        b = jnp.pad(b, ((0, 0), (0, short), (0, 0)))
    shape = (a.shape[0], a.shape[1], b.shape[2])
    tiling = _tiling(shape)
    tiles = int(np.prod(tiling.counts))

    State = tuple[Array, Array, Array, Array]

    def body(state: State) -> State:
        tile, careful, pause, out = state
        corner = tiling.corner(tile)
        start = _start(c, corner, tiling.sizes, arithmetic)
        block = _block_of(a, b, corner, tiling.sizes, arithmetic)
        found, sound, pause = _all_blocks(start, c is None, block, careful, pause, arithmetic)
        out = lax.dynamic_update_slice(out, floats.from_bits32(found), corner)
        return jnp.where(sound, tile + 1, tile), ~sound, pause, out

    with jax.enable_x64(True):
        state = jnp.int32(0), jnp.bool_(False), jnp.int32(1), jnp.zeros(shape, jnp.float32)
        # A tile that must be careful is one that remains. The condition is on two values, because
        # on one, XLA looks for a trip count and copies all that is inside, at every loop and pass.
        return lax.while_loop(lambda state: (state[0] < tiles) | state[1], body, state)[3]


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
        words = jnp.where(words & floats.MAGNITUDE == 0, np.uint32(0), words)
    return words


# Blocks of k.


class _Blocks(NamedTuple):
    """The blocks of a tile."""

    number: int
    operands: Callable[[Array], tuple[Array, Array]]
    """FP64 operands of block i: `[batch, m, size]` and `[batch, size, n]`."""
    extents: Callable[[], tuple[Array, Array]]
    """See `_extents`."""
    wide: bool
    """Products have more than 24 bits, and FP64 holds no sum exactly but by chance."""
    sure: "_Sure | None"
    """What serves all data, where there is such a way."""


_Sure = Callable[[Array, Array, Array, Arithmetic], Array]
"""Words after the steps of a block from those before it and its operands."""


def _sure_way(dtype: np.dtype, wide: bool, arithmetic: Arithmetic) -> _Sure | None:
    if arithmetic.products == 2 and not wide:
        return pairs.steps
    if dtype == jnp.float16 and halves.serve(arithmetic):
        return halves.steps
    return None


def _block_of(
    a: Array,
    b: Array,
    corner: tuple[Array, ...],
    sizes: tuple[int, ...],
    arithmetic: Arithmetic,
) -> _Blocks:
    batch, row, column = corner
    depth, height, width = sizes
    steps = a.shape[2] // arithmetic.products
    kept = arithmetic.operand_fraction_bits or 23
    wide = a.dtype == jnp.float32 and kept > 11
    sure = _sure_way(a.dtype, wide, arithmetic)
    group = _GROUP if sure is None else pairs.GROUP
    groups = max(1, group // arithmetic.products)
    size = arithmetic.products * max(x for x in range(1, groups + 1) if steps % x == 0)

    def operands(index: Array) -> tuple[Array, Array]:
        x = _slice(a, (batch, row, index * size), (depth, height, size))
        y = _slice(b, (batch, index * size, column), (depth, size, width))
        x, y = (floats.bits32(reading.read(v, arithmetic)) for v in (x, y))
        return floats.to_float64(x), floats.to_float64(y)

    def extents_here() -> tuple[Array, Array]:
        x = _slice(a, (batch, row, jnp.int32(0)), (depth, height, a.shape[2]))
        y = _slice(b, (batch, jnp.int32(0), column), (depth, b.shape[1], width))
        return _extents(x, y, size, arithmetic)

    return _Blocks(a.shape[2] // size, operands, extents_here, wide, sure)


def _slice(x: Array, corner: tuple[Array, ...], sizes: tuple[int, ...]) -> Array:
    """A part of an operand. BF16 and FP16 are cut as integers, because XLA:CPU would widen all of
    the array first; and as if they changed, because it would copy all of it instead.
    """
    if x.dtype == jnp.float32:
        return lax.dynamic_slice(x, corner, sizes)
    x_here, corner = lax.optimization_barrier((x, corner))
    part = lax.dynamic_slice(lax.bitcast_convert_type(x_here, jnp.uint16), corner, sizes)
    return lax.bitcast_convert_type(part, x.dtype)


class _State(NamedTuple):
    """Of a tile, between two blocks."""

    position: Array  # the next block
    words: Array  # accumulators
    bound: Array  # a matrix's are at most this (FP64 `[batch]`), if nothing has gone wrong
    lowest: Array  # they are multiples of this power of two (FP64 `[batch]`)
    sound: Array  # no plain sum has lost anything, as far as is known
    retry: Array  # the first block that may be checked; the others are split at once
    pause: Array  # blocks to wait after the next failure


def _all_blocks(
    start: Array,
    from_zero: bool,
    blocks: _Blocks,
    careful: Array,
    pause: Array,
    arithmetic: Arithmetic,
) -> tuple[Array, Array, Array]:
    """Words of a tile's accumulators after all blocks; whether they are right: a plain sum may
    have had to round, and then the tile must be computed again with `careful`; and the `pause` that
    the next tile, whose data are like these, starts with.
    """
    sure = blocks.sure is not None
    extent = lax.optimization_barrier(blocks.extents())

    def body(state: _State) -> _State:
        x, y = lax.optimization_barrier(blocks.operands(state.position))
        total, last = (lax.dynamic_index_in_dim(v, state.position, 0, False) for v in extent)
        lowest = jnp.minimum(state.lowest, last)
        # FP64 holds C and the sum together unless C is tiny, which only the first C is likely to
        # be.
        limit = jnp.where(state.position == 0, lowest, last) * 2.0**53
        maybe = ~careful & jnp.all((lowest >= _LEAST) & (total <= limit))
        if arithmetic.addend == "late" and arithmetic.rounding != "nearest_even":
            maybe &= False  # two roundings, of which FP64 alone does not do the second
        reach = _reach(state.bound, total)
        # Where only plain sums need a bound, an unknown one stays so until they want it; but what
        # is not sound must be found while there still is one.
        asked = jnp.isfinite(state.bound) | (not (sure or _takes_all(arithmetic)))
        stale = jnp.any(jnp.where(maybe, reach > limit, jnp.isinf(reach) & asked))
        bound = lax.cond(stale, _largest, lambda words: state.bound, state.words)
        sound = careful | jnp.all(jnp.isfinite(bound) | jnp.isinf(state.bound))
        reach = _reach(bound, total)
        plain = maybe & jnp.all(reach <= limit)
        check = (state.position >= state.retry) & _may_be_checked(reach, arithmetic)
        way = jnp.where(plain, _PLAIN, _SURE if sure else jnp.where(check, _CHECKED, _SPLIT))
        state = state._replace(bound=reach, lowest=lowest, sound=sound)
        state = _go(way.astype(jnp.int32), state, x, y, blocks, arithmetic)
        return state._replace(position=state.position + 1)

    unknown, retry = jnp.full(start.shape[0], jnp.inf), pause - 1
    state = _State(jnp.int32(0), start, unknown, unknown, jnp.bool_(True), retry, pause)
    if from_zero:
        state = state._replace(bound=jnp.zeros_like(unknown))
    else:
        last = split.trailing(floats.to_float64(start))
        state = state._replace(lowest=jnp.min(last, axis=(1, 2)))
    state = lax.while_loop(lambda s: (s.position < blocks.number) & s.sound, body, state)
    if from_zero and blocks.number == 1:  # no C that could be too small
        return state.words, jnp.bool_(True), state.pause
    final = jnp.any(jnp.isfinite(state.bound) & ~jnp.isfinite(_largest(state.words)))
    return state.words, careful | (state.sound & ~final), state.pause


def _reach(bound: Array, total: Array) -> Array:
    """A bound on accumulators after a block; infinite if they may overflow."""
    reach = (bound + total) * (1 + 2.0**-20) + 2.0**-149  # its roundings add a little
    return jnp.where(reach < 2.0**127, reach, jnp.inf)


def _extents(x: Array, y: Array, size: int, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """Of each block and each matrix of a tile, FP64 `[blocks, batch]`: a bound on the sum of the
    magnitudes of an element's products, infinite for specials; and a power of two that these
    products are multiples of.
    """
    (x_top, x_last), (y_top, y_last) = (
        extents.top_and_last(v, axis, arithmetic) for v, axis in ((x, 1), (y, 2))
    )
    product = x_top * y_top
    product = jnp.where(jnp.isfinite(product), product, jnp.inf)
    shape = x.shape[0], -1, size
    total = jnp.sum(product.reshape(shape), axis=2)
    last = extents.power(jnp.min((x_last + y_last).reshape(shape), axis=2))
    return total.T, last.T


_LIMITS = np.int32(np.iinfo(np.int32).max), np.int32(-1)


def _least_and_most(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    return lax.min(x[0], y[0]), lax.max(x[1], y[1])


def _largest(words: Array) -> Array:
    """A little more than each matrix's largest magnitude (FP64 `[batch]`), infinite if any is
    infinite or NaN.
    """
    upper = ((words & floats.MAGNITUDE) >> 16).astype(jnp.int32)
    # Beside a minimum, because XLA:CPU would write down what it takes a maximum alone of.
    rows = lax.reduce((upper, upper), _LIMITS, _least_and_most, (2,))
    upper = jnp.max(jnp.maximum(*rows), axis=1).astype(jnp.uint32)
    largest = floats.to_float64((upper << 16) | np.uint32(0xFFFF))
    return jnp.where(jnp.isnan(largest), jnp.inf, largest)


def _go(
    way: Array, state: _State, x: Array, y: Array, blocks: _Blocks, arithmetic: Arithmetic
) -> _State:
    """A block gone its way. Loops that run at most once, because a loop keeps its accumulators in
    place and a conditional copies them.
    """
    Going = tuple[Array, _State]

    def here(way: Array) -> tuple[Array, Array]:
        """The operands, as if they changed: else XLA would compute every way's sums beforehand."""
        x_here, y_here, _ = lax.optimization_barrier((x, y, way))
        return x_here, y_here

    def plain(going: Going) -> Going:
        way, state = going
        words = _plain(state.words, *here(way), arithmetic)
        return jnp.full_like(way, _DONE), state._replace(words=words)

    def checked(going: Going) -> Going:
        way, state = going
        words = _checked(state.words, *here(way), blocks.wide, arithmetic)
        mark = split.unknown_word(arithmetic)
        # Within a conditional that is always taken, because XLA would compute the words twice.
        failed = lax.cond(way == _CHECKED, lambda: jnp.any(_marked(words, mark)), lambda: False)
        retry, pause = state.position + state.pause, state.pause * 2
        failure = jnp.full_like(way, _SPLIT), state._replace(retry=retry, pause=pause)
        success = jnp.full_like(way, _DONE), state._replace(words=words, pause=jnp.int32(1))
        return lax.cond(failed, lambda: failure, lambda: success)

    def split_up(going: Going) -> Going:
        way, state = going
        words = _split(state.words, *here(way), blocks.wide, arithmetic)
        return jnp.full_like(way, _DONE), state._replace(words=words)

    ways = [(_PLAIN, plain), (_CHECKED, checked), (_SPLIT, split_up)]
    if (steps := blocks.sure) is not None:

        def surely(going: Going) -> Going:
            way, state = going
            words = steps(state.words, *here(way), arithmetic)
            return jnp.full_like(way, _DONE), state._replace(words=words)

        ways = [(_PLAIN, plain), (_SURE, surely)]
    going = way, state
    for number, function in ways:

        def goes_here(going: Going, number: int = number) -> Array:
            here = going[0] == number
            # On two values, see `accumulate`. Of the others XLA sees that they run but once, and
            # therefore leaves in them what it might compute beforehand.
            return here & (going[1].position >= 0) if number == _CHECKED else here

        going = lax.while_loop(goes_here, function, going)
    return going[1]


def _dots(x: Array, y: Array, products: int, chains: int = 1) -> list[Array]:
    """The sums of the products of each step, each added up in so many chains."""
    totals = []
    for first in range(0, x.shape[-1], products):
        sums: list[Array] = []
        for index in range(products):
            product = outer(x, y, first + index)
            if index < chains:
                sums.append(product)
            else:
                sums[index % chains] = sums[index % chains] + product
        totals.append(paired(sums))
    return totals


# Plain.


def _plain(words: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """The steps of a block whose sums are exact; NaN where C is too small for FP64 to hold it
    beside the sum.
    """
    c = floats.from_bits32(words)
    # Two chains, because one would wait for the last addition most of the time.
    for total in _dots(x, y, arithmetic.products, chains=2):
        if arithmetic.addend == "late":
            c = c + _to_float32(total, arithmetic)
            continue
        before = c.astype(jnp.float64)
        exact = before + total
        # C is smaller than the sum wherever FP64 could drop a place of it, and then this
        # difference is exact (Dekker).
        kept = exact - total == before
        c = jnp.where(kept, _to_float32(exact, arithmetic), jnp.float32(jnp.nan))
    return floats.bits32(c)


def _to_float32(x: Array, arithmetic: Arithmetic) -> Array:
    """FP64 to FP32, for numbers that are normal or zero in both."""
    if arithmetic.rounding == "toward_zero":
        bits = lax.bitcast_convert_type(x, jnp.int64) & -(1 << 29)
        x = lax.bitcast_convert_type(bits, jnp.float64)  # RZ
    return x.astype(jnp.float32)  # RNE


def _kept(before: Array, after: Array) -> Array:
    """Whether C's last place is not so far below the sum that FP64 would drop it."""
    return (jnp.abs(after) <= 2.0**28 * jnp.abs(before)) | (before == 0)


# Checked.


def _takes_all(arithmetic: Arithmetic) -> bool:
    """Whether `_checked` knows all results: usual units do the same as FP32 with infinities, NaNs
    and overflow.
    """
    return split.is_usual(arithmetic) and arithmetic.product_overflow == "keep"


def _may_be_checked(reach: Array, arithmetic: Arithmetic) -> Array:
    """Whether `_checked` knows all results of a block whose accumulators stay within `reach`."""
    if arithmetic.addend == "late" and arithmetic.rounding != "nearest_even":
        return jnp.bool_(False)
    return jnp.bool_(True) if _takes_all(arithmetic) else jnp.all(jnp.isfinite(reach))


def _checked(words: Array, x: Array, y: Array, wide: bool, arithmetic: Arithmetic) -> Array:
    """The steps of a block; `unknown_word` where a rounding is in doubt or a number subnormal."""
    c = floats.from_bits32(words)
    magnitude = words & floats.MAGNITUDE
    doubt = (magnitude < (1 << 23)) & (magnitude != 0)
    products = arithmetic.products
    chains = 1 if wide else 4
    row_sizes, column_sizes = lax.optimization_barrier((jnp.abs(x), jnp.abs(y)))
    sizes = _dots(row_sizes, column_sizes, products, chains=2)
    limit = None
    if not wide:
        # Where all terms are multiples of q, FP64 keeps every partial sum up to 2^52 q.
        row_last = jnp.min(split.trailing(x), axis=2) * 2.0**26
        column_last = jnp.min(split.trailing(y), axis=1) * 2.0**26
        limit = row_last[:, :, None] * column_last[:, None, :]
    # As many additions of products as the longest way through the sum has, and one of C; a little
    # for the roundings of this bound.
    additions = -(-products // chains) - 1 + (min(chains, products) - 1).bit_length()
    for total, size in zip(_dots(x, y, products, chains), sizes, strict=True):
        before = c.astype(jnp.float64)
        if arithmetic.addend == "fused":
            total = before + total
        error = size * ((additions + 0.5) * 2.0**-53) + jnp.abs(total) * (1.5 * 2.0**-53)
        if limit is not None:
            exact = jnp.maximum(size, jnp.abs(total)) <= limit
            if arithmetic.addend == "fused":
                exact &= _kept(before, total)
            error = jnp.where(exact, 0.0, error)
        error = jnp.where(jnp.abs(total) < jnp.inf, error, 0.0)  # as infinite as the operands
        low = _to_float32(total - error, arithmetic)
        high = _to_float32(total + error, arithmetic)
        # The conversion loses subnormals.
        certain = (low == high) & ((low != 0) | (jnp.abs(total) + error == 0))
        doubt |= ~(certain | (total != total))
        if arithmetic.addend == "late":
            low, addend = c + low, low
            doubt |= (low == 0) & (c != -addend)
        c = low
    found = jnp.where(c != c, np.uint32(arithmetic.nan), floats.bits32(c))
    return jnp.where(doubt, split.unknown_word(arithmetic), found)


# Split.


def _split(words: Array, x: Array, y: Array, wide: bool, arithmetic: Arithmetic) -> Array:
    """The steps of a block, whatever it holds."""
    found = split.steps(words, x, y, arithmetic)
    mark = split.unknown_word(arithmetic)
    batch, height, width = words.shape
    number, size, columns = batch * height, x.shape[2], min(_COLUMNS, width)

    # Within a conditional that is always taken, because XLA would compute the words twice.
    doubtful = lax.cond(
        (words[0, 0, 0] | np.uint32(1)) != 0,
        lambda found: _marked(found, mark).reshape(-1),
        lambda found: jnp.zeros(number, jnp.bool_),
        found,
    )

    def next_row(start: Array) -> Array:
        """The first doubtful row from `start` on; `number` without one."""
        later = doubtful & (jnp.arange(number, dtype=jnp.int32) >= start)
        row = lax.argmax(later, 0, jnp.int32)
        return jnp.where(later[row], row, number)

    def resolved(state: tuple[Array, Array]) -> tuple[Array, Array]:
        """In two rows, the columns about the first doubtful one."""
        first, found = state
        second = next_row(first + 1)
        at = [
            (row // height, row % height)
            for row in (first, jnp.where(second < number, second, first))
        ]
        here = jnp.stack([found[place] for place in at])
        column, last = _first_and_last(here == mark)
        column = jnp.minimum(column, width - columns)
        # Slices one by one, because XLA:CPU makes a kernel of each gather.
        c, terms, zero = [], [], jnp.int32(0)
        for (depth, row), start in zip(at, column, strict=True):
            corner = depth, row, start
            c.append(lax.dynamic_slice(words, corner, (1, 1, columns)).reshape(columns))
            left = lax.dynamic_slice(x, (depth, row, zero), (1, 1, size)).reshape(size, 1)
            right = lax.dynamic_slice(y, (depth, zero, start), (1, size, columns))
            terms.append(left * right.reshape(size, columns))
        products = jnp.concatenate(terms, 1).reshape(-1, arithmetic.products, 2 * columns)
        exact = fixed_point.steps(jnp.concatenate(c), products, wide, arithmetic)
        more = jnp.any(last >= column + columns)
        exact, following = lax.optimization_barrier(
            (exact, jnp.where(more, first, next_row(second + 1)))
        )
        # One scatter, because XLA:CPU would compute the sums for each of two slices updated.
        corners = jnp.stack(
            [jnp.stack([*place, start]) for place, start in zip(at, column, strict=True)]
        )
        found = lax.scatter(
            found,
            corners,
            exact.reshape(2, 1, 1, columns),
            lax.ScatterDimensionNumbers((1, 2, 3), (), (0, 1, 2)),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )
        return following, found

    def unresolved(state: tuple[Array, Array]) -> Array:  # on two values, see `accumulate`
        return (state[0] < number) | ((state[0] < 0) & (state[1][0, 0, 0] == mark))

    return lax.while_loop(unresolved, resolved, (next_row(jnp.int32(0)), found))[1]


def _marked(words: Array, mark: np.uint32) -> Array:
    """Which rows hold `mark`."""
    # Two results of one reduction, because XLA:CPU takes a single one in two passes.
    first, last = _first_and_last(words == mark)
    return first <= last


def _first_and_last(marks: Array) -> tuple[Array, Array]:
    """Where in the last axis the first and the last mark are; its size and -1 without any."""
    width = marks.shape[-1]
    places = lax.broadcasted_iota(jnp.int32, marks.shape, marks.ndim - 1)

    of_marks = jnp.where(marks, places, width), jnp.where(marks, places, -1)
    first, last = lax.reduce(  # in one pass
        of_marks, (np.int32(width), np.int32(-1)), _least_and_most, (marks.ndim - 1,)
    )
    return first, last
