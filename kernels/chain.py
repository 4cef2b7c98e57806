"""The twin for chains of fused multiply-adds onto C: `[batch, m, k] x [batch, k, n]`.

One way of `extents` is chosen for all of K. Where FP32 serves, a tile's accumulators stay as they
are scaled from the first block to the last; FP64 takes the tiles that this leaves in doubt. NaNs
are told apart in the end: which operand's NaN wins depends on positions alone.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import blocks, extents, floats, operands, singles
from kernels.arithmetic import Arithmetic

_NARROW = 16  # columns below which the product is computed transposed
_TO_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN
_POWER = np.int32(-0x40800000)  # sign and exponent of a number below 2; finite if it is a NaN
_INTERLEAVED = 8  # FP64 steps in one pass: more of them wait for each other


Steps = Callable[[Array, Array, Array], Array]
"""The accumulators after a block from those before it and the block's operands, all FP32."""

_State = tuple[Array, Array]
"""Words of a tile's accumulators, and whether all of them are infinite or NaN."""


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`."""
    with jax.enable_x64(True):
        return _accumulate(a, b, c, arithmetic, _nan_words(a, b, arithmetic))


def _accumulate(
    a: Array, b: Array, c: Array | None, arithmetic: Arithmetic, nans: tuple[Array, ...]
) -> Array:
    if b.shape[-1] < _NARROW < a.shape[1]:  # long rows are what the loops below are good at
        turned = None if c is None else c.swapaxes(1, 2)
        nans = tuple(x.swapaxes(1, 2) for x in nans)
        args = b.swapaxes(1, 2), a.swapaxes(1, 2), turned
        return _accumulate(*args, arithmetic, nans).swapaxes(1, 2)
    size = blocks.size_of(a.shape[-1], arithmetic.products)
    a, b = blocks.pad(a, b, size, arithmetic)
    narrow = sum(_bits(x, arithmetic) for x in (a, b)) <= 24
    extent = extents.whole(extents.extents(a, b, c, size, arithmetic))
    way, scale, a_scale, limit = _plan(extent, a.shape[-1], narrow, arithmetic)
    count = a.shape[-1] // size
    special = lax.cond(way == _FIRM, lambda: _any_special(a) | _any_special(b), lambda: False)

    def finish(words: Array, place: blocks.Place) -> Array:
        magnitude = words & floats.MAGNITUDE
        if arithmetic.zero == "positive":
            words = jnp.where(magnitude == 0, jnp.uint32(0), words)
        nan = _nan_of(place, c, nans, arithmetic)
        return jnp.where(magnitude > floats.INF, nan, words)

    def ordered(x: Array, y: Array) -> tuple[Array, Array]:
        return _in_order(x, 2, arithmetic), _in_order(y, 1, arithmetic)

    def lifted(x: Array, y: Array) -> tuple[Array, Array]:
        """A block's operands as FP32 numbers whose products are 2^scale times as large."""
        x, y = ordered(x, y)
        left, right = extents.scaled(x, a_scale), extents.scaled(y, scale - a_scale)
        return lax.optimization_barrier((left, right))  # else formed again for each product

    def solve(words: Array, walk: blocks.Walk) -> Array:
        words = singles.entering(words, arithmetic)

        def plainly() -> Array:
            def block(c: Array, x: Array, y: Array, index: Array) -> Array:
                x, y = (floats.from_bits32(v) for v in ordered(x, y))
                return _plain(c, *lax.optimization_barrier((x, y)))

            return floats.bits32(walk(floats.from_bits32(words), block))

        def wholly(steps: Steps) -> Array:
            def block(c: Array, x: Array, y: Array, index: Array) -> Array:
                return steps(c, *lifted(x, y))

            start = singles.scale_up(words, scale)
            return singles.scale_down(walk(start, block), scale)

        def deeply() -> Array:
            middle = 1.5 * singles.scaled_least(scale)

            def block(c: Array, x: Array, y: Array, index: Array) -> Array:
                return _plain(c, *lifted(x, y))

            def ending(c: Array, x: Array, y: Array, index: Array) -> Array:
                return _deep_end(c, *lifted(x, y), middle, arithmetic)

            found = walk(singles.scale_up(words, scale) + middle, block, 0, count - 1)
            return singles.scale_down(walk(found, ending, count - 1, count), scale)

        def closely() -> Array:
            def block(c: Array, x: Array, y: Array, index: Array) -> Array:
                return _close(c, *ordered(x, y))

            return walk(words, block)

        def careful(firm: Array) -> tuple[Array, Array]:
            """FP64 in the first block, and also in the others unless `firm`; and whether that left
            a doubt.
            """

            def block(state: _State, x: Array, y: Array, index: Array) -> _State:
                return _settled_or_wide(*state, *ordered(x, y), arithmetic, narrow)

            def firm_block(
                steps: Callable[..., Array], c: Array, x: Array, y: Array, index: Array
            ) -> Array:
                return steps(c, *lifted(x, y), scale, limit)

            def kinds_block(c: Array, x: Array, y: Array, index: Array) -> Array:
                return _plain(c, *_kinds(*ordered(x, y)))

            start = words, jnp.bool_(False)
            found, _ = walk(start, block, 0, jnp.where(firm, 1, count))
            state = _firm_start(found, scale, limit)
            # Where most sums are settled by now FP64 is soon done with the others.
            settled = jnp.sum((found & floats.MAGNITUDE) >= floats.INF, dtype=jnp.int32)
            worth = firm & (2 * settled < found.size)
            for steps, here in ((_firmly, scale >= 0), (_firmly_large, scale < 0)):
                stop = jnp.where(worth & here, count, 1)
                state = walk(state, partial(firm_block, steps), 1, stop)
            state = jnp.where(state == 0, jnp.float32(jnp.nan), state)  # lost, perhaps
            # What infinite operands and NaNs make of an accumulator, whatever the others are.
            nothing = jnp.zeros_like(state)
            specials = walk(nothing, kinds_block, 0, jnp.where(worth & special, count, 0))
            known = jnp.isnan(specials) | ((found & floats.MAGNITUDE) > floats.INF)
            doubt = firm & (~worth | jnp.any(jnp.isnan(state) & ~known))
            state = singles.scale_down(state, scale)
            more = floats.bits32(floats.from_bits32(state) + specials)
            state = jnp.where(jnp.isfinite(specials), state, more)
            return jnp.where(firm, state, found), doubt

        high = partial(_high, scale=scale, arithmetic=arithmetic)
        low = partial(_low, least=singles.scaled_least(scale), arithmetic=arithmetic)
        ways: dict[int, Callable[[], Array]] = {
            extents.PLAIN: plainly,
            extents.SCALED: partial(wholly, _plain),
            extents.LOW: partial(wholly, low),
            extents.HIGH: partial(wholly, high),
        }
        if arithmetic.subnormal_results == "keep":
            ways[_DEEP] = deeply
            ways[_WHOLE] = partial(wholly, partial(_whole, arithmetic=arithmetic))
        if not narrow:
            ways[extents.CLOSE] = closely
        branches = [list(ways).index(w) if w in ways else len(ways) for w in range(_WAYS)]
        found = lax.switch(jnp.array(branches)[way], [*ways.values(), lambda: words])

        def attempt(state: tuple[Array, Array]) -> tuple[Array, Array]:
            number, _ = state
            found, doubt = careful(number == 1)
            return jnp.where(doubt, 2, 3), found

        # 1: `_firmly` is to be tried; 2: FP64 takes all blocks; 3: the tile is done.
        todo = jnp.where(way == _FIRM, 1, jnp.where(way == extents.WIDE, 2, 3))
        todo = jnp.where((way == _DEEP) & _any_nan(found), 2, todo)
        return lax.while_loop(lambda state: state[0] < 3, attempt, (todo, found))[1]

    return blocks.over_tiles(a, b, c, size, arithmetic, solve, finish)


_DEEP, _FIRM, _WHOLE, _WAYS = range(6, 10)
"""Ways besides those of `extents`: see `_deep_end`, `_firmly` and `_whole`."""


def _plan(
    extent: extents.Extent, k: int, narrow: bool, arithmetic: Arithmetic
) -> tuple[Array, Array, Array, Array]:
    """The way to take, S, the part of S that goes to `a`, and the limit of `_firmly`."""
    way, scale, a_scale = extents.ways(extent, arithmetic)
    way = jnp.minimum(way, extents.WIDE) if narrow else way
    if arithmetic.subnormal_results == "keep":
        finely = jnp.where(extent.width <= 22, extents.LOW, extents.WIDE)  # see `_low`
        finely = jnp.where(scale == 149, _WHOLE, finely)
        way = jnp.where(way == extents.LOW, finely, way)
    if arithmetic.subnormal_inputs == arithmetic.subnormal_results == "keep":
        way = jnp.where((way == _WHOLE) & extents.deep(extent), _DEEP, way)
    firm = extents.firm(extent, k, arithmetic)
    way = jnp.where((way == extents.WIDE) & firm.possible, _FIRM, way)
    scale = jnp.where(way == _FIRM, firm.scale, scale)
    return way, scale, jnp.where(way == _FIRM, firm.a_scale, a_scale), firm.limit


def _bits(x: Array, arithmetic: Arithmetic) -> int:
    """Bits of the significands of the type of `x`, as the unit reads them."""
    bits = operands.FRACTION_BITS[x.dtype.name]
    return 1 + min(bits, arithmetic.operand_fraction_bits or bits)


def _in_order(x: Array, axis: int, arithmetic: Arithmetic) -> Array:
    """The products of each step turned around: the last one is added first."""
    products = arithmetic.products if arithmetic.summation == "chain" else 1
    if products == 1:
        return x
    shape = x.shape
    steps = x.reshape(*shape[:axis], -1, products, *shape[axis + 1 :])
    return jnp.flip(steps, axis + 1).reshape(shape)


def _plain(c: Array, x: Array, y: Array) -> Array:
    for index in range(x.shape[-1]):
        c = c + blocks.outer(x, y, index)  # RNE; the product is exact
    return c


def _low(c: Array, x: Array, y: Array, least: Array, arithmetic: Arithmetic) -> Array:
    """Accumulators times 2^scale; results below `least`, which is 2^-126 times that, are rounded to
    multiples of 2^-149 or flushed.
    """
    flush = arithmetic.subnormal_results == "flush"
    c = singles.read(c, arithmetic, least)
    for index in range(x.shape[-1]):
        if not (flush and arithmetic.subnormal_inputs == "flush"):
            c = singles.read(c, arithmetic, least)
        product = blocks.outer(x, y, index)
        total = c + product  # RNE to 24 bits, tininess seen after it
        sign = singles.sign_of(total)
        if flush:
            zero = lax.bitcast_convert_type(sign, jnp.float32)
            c = jnp.where(jnp.abs(total) < least, zero, total)
            continue
        # A product of at most 22 bits with lower ones than 2^-149 is below 2^-127; if it is
        # larger, a `total` below 2^-126 is exact. If it is smaller, C is below 2^-125. From
        # 2^-126 to there the last place of FP32 is 2^-149, and there C plus or minus `grid`
        # lies (exactly, that is), and `total` plus or minus it.
        grid = jnp.where(jnp.abs(c) < least, least, -2 * least)
        grid = lax.bitcast_convert_type(singles.bits(grid) ^ sign, jnp.float32)
        tiny = (jnp.abs(total) < least) & (jnp.abs(product) < least)
        grid = jnp.where(tiny, grid, 0.0)
        c = ((c + grid) + product) - grid
        if arithmetic.zero == "ieee":
            c = lax.bitcast_convert_type(singles.bits(c) | sign, jnp.float32)
    return c


def _whole(c: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """As `_low` where subnormal results are kept and 2^scale is 2^149: multiples of 2^-149 are
    integers. Products may have 24 bits.
    """
    for index in range(x.shape[-1]):
        c = singles.read(c, arithmetic, 2.0**23)
        product = blocks.outer(x, y, index)
        # Of the product's distance to an integer only its sign matters and whether it is 1/2: a
        # power of two, 1/4 at most if it is not 1/2, will do. From 2^22 to 2^23, where places are
        # halves, RNE then makes an integer of all but a 1/2, which it keeps; above 2^23 it makes
        # the integer that is wanted, and below 2^22 nothing that matters is lost.
        integer = lax.round(product, _TO_EVEN)
        rest = lax.bitcast_convert_type(singles.bits(integer - product) & _POWER, jnp.float32)
        c = lax.round(c + (integer - rest), _TO_EVEN)  # RNE, twice
    return c


def _high(c: Array, x: Array, y: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Accumulators times 2^scale; results of 2^128 and above overflow."""
    for index in range(x.shape[-1]):
        c = singles.overflowed(c + blocks.outer(x, y, index), scale, arithmetic)
    return c


def _deep_end(c: Array, x: Array, y: Array, middle: Array, arithmetic: Arithmetic) -> Array:
    """The last block where no sum reaches 2^-127, times 2^scale; NaN where only more steps could
    tell a zero's sign.

    Sums are multiples of 2^-149, as numbers from 2^-126 to 2^-125 are; so all was added onto
    `middle`, 1.5 * 2^-126. Now it is taken away.
    """
    final = x.shape[-1] - 1
    lifted = _plain(c, x[..., :final], y)
    before, product = lifted - middle, blocks.outer(x, y, final)
    sign = singles.sign_of(before + product)  # no sum is lost: its last place is a product's
    total = (lifted + product) - middle
    total = jnp.where(total == 0, singles.with_sign(jnp.zeros_like(total), sign), total)
    doubt = (before == 0) & (product == 0) & (arithmetic.zero == "ieee")
    return jnp.where(doubt, jnp.float32(jnp.nan), total)


def _firm_start(words: Array, scale: Array, limit: Array) -> Array:
    """Accumulators times 2^scale; NaN where they are below `limit` there and not 0."""
    magnitude = words & floats.MAGNITUDE
    lowest = (1 + jnp.maximum(-scale, 0)).astype(jnp.uint32) << 23  # of what is normal there
    subnormal = (scale < 24) & (magnitude < lowest) & (magnitude != 0)
    start = singles.scale_up(words, scale)
    return _nan_where(subnormal | (_less_one(start) < _less_one(limit)), start)


def _firmly(c: Array, x: Array, y: Array, scale: Array, limit: Array) -> Array:
    """As `_plain` on data times 2^scale, where no accumulator comes below `limit`; else NaN.

    Operands and products that FP32 loses are then less than half a last place. An accumulator may
    be 0: the next product of `limit` or more does not notice what was lost meanwhile.
    """
    del scale
    least = jnp.asarray(floats.MAGNITUDE)
    for index in range(x.shape[-1]):
        c = c + blocks.outer(x, y, index)  # RNE
        least = jnp.minimum(least, _less_one(c))
    return _nan_where(least < _less_one(limit), c)


def _firmly_large(c: Array, x: Array, y: Array, scale: Array, limit: Array) -> Array:
    """As `_firmly` where sums may overflow; `scale` is negative.

    Sums go on as if nothing had overflowed, because checks between them would cost more time than
    they do; `kept` stays at the first one that has. A product of 2^129 or more overflows whatever C
    is, even if it does so here. Infinite operands and NaNs that come later are seen elsewhere.
    """
    up, down = singles.power32(-scale), singles.power32(scale)
    beyond = floats.bits32(singles.power32(scale + 128))
    kept, least = c, jnp.asarray(floats.MAGNITUDE)
    for index in range(x.shape[-1]):
        c = c + blocks.outer(x, y, index)  # RNE
        over = (floats.bits32(kept) & floats.MAGNITUDE) >= beyond
        kept = jnp.where(over, kept, c)
        least = jnp.minimum(least, _less_one(kept))
    kept = (kept * up) * down  # from 2^128 on the first is infinite
    return _nan_where(least < _less_one(limit), kept)


def _less_one(x: Array) -> Array:
    """The word of |x| less one, by which 0 is the largest."""
    return (floats.bits32(x) & floats.MAGNITUDE) - np.uint32(1)


def _nan_where(doubt: Array, x: Array) -> Array:
    return floats.from_bits32(floats.bits32(x) | -doubt.astype(jnp.uint32))  # all ones: a NaN


def _any_special(x: Array) -> Array:
    """Whether any operand is infinite or NaN; by its word, for which XLA:CPU converts nothing."""
    word = blocks.unsigned(x)
    infinity = np.array(np.inf, x.dtype).view(word)
    magnitude = lax.bitcast_convert_type(x, word) & word.type(np.iinfo(word).max >> 1)
    return jnp.any(magnitude >= infinity)


def _any_nan(words: Array) -> Array:
    return jnp.any((words & floats.MAGNITUDE) > floats.INF)


def _settled_or_wide(
    c: Array, settled: Array, x: Array, y: Array, arithmetic: Arithmetic, narrow: bool
) -> _State:
    """`_wide`, unless all accumulators are infinite or NaN (`settled`, which they then remain):
    those only see which operands are.
    """

    def plainly() -> _State:
        return floats.bits32(_plain(floats.from_bits32(c), *_kinds(x, y))), settled

    def widely() -> _State:
        found = _wide(c, x, y, arithmetic, narrow)
        return found, jnp.all((found & floats.MAGNITUDE) >= floats.INF)

    return lax.cond(settled, plainly, widely) if arithmetic.product_overflow == "keep" else widely()


def _parts(x: Array, y: Array) -> tuple[Array, Array]:
    size = x.shape[-1]
    part = max(s for s in range(1, _INTERLEAVED + 1) if size % s == 0)
    return blocks.in_float64(x, y, part)


def _close(c: Array, x: Array, y: Array) -> Array:
    """Words of the results: FP64 sums rounded to odd, then to nearest."""
    total = floats.from_bits32(c)
    x, y = lax.optimization_barrier((floats.to_float64(x), floats.to_float64(y)))
    for index in range(x.shape[-1]):
        addend, product = total.astype(jnp.float64), blocks.outer(x, y, index)  # exact: 48 bits
        found = addend + product
        found = singles.to_odd(found, singles.lost(addend, product, found))
        total = found.astype(jnp.float32)  # RNE
    return floats.bits32(total)


def _wide(c: Array, x: Array, y: Array, arithmetic: Arithmetic, narrow: bool) -> Array:
    """Words of the results, from words of any kind.

    A sum of C and a product of at most 24 bits that FP64 rounds is far from the middle of two FP32
    numbers, so rounding it again is harmless (to nearest, FP32 has 24 bits and 53 >= 2 * 24 + 2).
    Other sums are rounded to odd first.
    """
    twice = narrow and arithmetic.rounding == "nearest_even"
    parts = _parts(x, y)

    def body(c: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = operands
        for index in range(x.shape[-1]):
            product = singles.product(blocks.outer(x, y, index), arithmetic)  # exact: 48 bits
            addend = singles.read(c, arithmetic)
            total = addend + product
            if not twice:
                total = singles.to_odd(total, singles.lost(addend, product, total))
            c = singles.rounded(total, arithmetic)
        return c, None

    def careful() -> Array:
        found, _ = lax.scan(body, floats.to_float64(c), parts)
        return singles.to_words(found)

    if not twice or arithmetic.overflow != "inf" or arithmetic.specials == "saturate":
        return careful()
    if arithmetic.subnormal_results == "flush":
        if arithmetic.subnormal_inputs != "flush":
            return careful()
        return _quick(floats.flush_subnormals(c), parts, arithmetic)[0]
    found, least = _quick(c, parts, arithmetic)
    return lax.cond(jnp.any(least < (1 << 23)), careful, lambda: found)


def _quick(c: Array, parts: tuple[Array, Array], arithmetic: Arithmetic) -> tuple[Array, Array]:
    """As `_wide`, and the word of the smallest magnitude that each accumulator had. If that is
    subnormal or 0 the result is in doubt, unless the unit flushes such results.
    """
    flush = arithmetic.subnormal_results == "flush"

    def body(state: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = operands
        c = floats.from_bits32(state.astype(jnp.uint32))
        least = (state >> 32).astype(jnp.int32)
        for index in range(x.shape[-1]):
            product = singles.product(blocks.outer(x, y, index), arithmetic)
            total = c.astype(jnp.float64) + product
            if flush:
                zero = singles.with_sign(jnp.zeros_like(total), singles.sign_of(total))
                total = jnp.where(jnp.abs(total) < singles.LEAST - 2.0**-151, zero, total)
            c = total.astype(jnp.float32)  # RNE
            if not flush:
                magnitude = floats.bits32(c) & floats.MAGNITUDE
                least = jnp.minimum(least, magnitude.astype(jnp.int32))
        # One array, because XLA computes the sums once for each array that comes of them.
        return least.astype(jnp.uint64) << 32 | floats.bits32(c).astype(jnp.uint64), None

    magnitude = c & floats.MAGNITUDE
    least = jnp.where(magnitude == 0, floats.INF, magnitude).astype(jnp.uint64)
    state, _ = lax.scan(body, least << 32 | c.astype(jnp.uint64), parts)
    return state.astype(jnp.uint32), state >> 32


def _kinds(x: Array, y: Array) -> list[Array]:
    """+-1 for finite FP32 words but zeros; these, infinities and NaNs as they are."""
    kinds = []
    for words in (x, y):
        magnitude = words & floats.MAGNITUDE
        one = (words & floats.SIGN) | np.uint32(0x3F800000)
        finite = (magnitude > 0) & (magnitude < floats.INF)
        kinds.append(floats.from_bits32(jnp.where(finite, one, words)))
    return lax.optimization_barrier(kinds)  # else formed again for each product


# NaNs.


def _nan_words(a: Array, b: Array, arithmetic: Arithmetic) -> tuple[Array, ...]:
    """When each row's and each column's last NaN comes and its word: `[batch, m, 1]`, twice, and
    `[batch, 1, n]`, a row's time doubled so that it wins at equal times. Nothing if all NaNs are
    one.
    """
    if arithmetic.nan_rule == "word":
        return ()
    a_at, a_nan = _last_nan(a, 2, arithmetic)
    b_at, b_nan = _last_nan(b, 1, arithmetic)
    return 2 * a_at + 1, a_nan, 2 * b_at, b_nan


def _nan_of(
    place: blocks.Place, c: Array | None, nans: tuple[Array, ...], arithmetic: Arithmetic
) -> Array:
    """What a NaN in a tile is: the last operand that is one (a before b), else C, else `nan`."""
    corner, shape = place
    nan = jnp.full(shape, arithmetic.nan, jnp.uint32)
    if not nans:
        return nan

    def here(x: Array) -> Array:
        start = [at if size > 1 else jnp.int32(0) for at, size in zip(corner, x.shape, strict=True)]
        return lax.dynamic_slice(x, start, [min(s, t) for s, t in zip(shape, x.shape, strict=True)])

    left_at, left, right_at, right = (here(x) for x in nans)
    if c is not None:
        first = floats.bits32(here(c))
        is_nan = (first & floats.MAGNITUDE) > floats.INF
        nan = jnp.where(is_nan, first | floats.QUIET_NAN, nan)
    operand = jnp.where(left_at > right_at, left, right)
    return jnp.where(jnp.maximum(left_at, right_at) < 0, nan, operand)


def _last_nan(x: Array, axis: int, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """When in the chain the last NaN along `axis` comes (-1 without one), and its quiet word."""
    products = arithmetic.products if arithmetic.summation == "chain" else 1

    def turned(place: Array) -> Array:  # within its step; its own inverse
        return place - 2 * (place % products) + products - 1

    def last(x: Array) -> tuple[Array, Array]:
        words = floats.bits32(operands.read(x, arithmetic))
        is_nan = (words & floats.MAGNITUDE) > floats.INF
        place = lax.broadcasted_iota(jnp.int32, x.shape, axis)
        last = jnp.max(jnp.where(is_nan, turned(place), -1), axis=axis, keepdims=True)
        chosen = place == turned(last)
        word = jnp.max(jnp.where(chosen, words, jnp.uint32(0)), axis=axis, keepdims=True)
        return last, word | floats.QUIET_NAN

    at, word = blocks.in_pieces(last, x, 3 - axis)
    return at, word
