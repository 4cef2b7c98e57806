"""The twin for chains of fused multiply-adds onto C: `[batch, m, k] x [batch, k, n]`.

Each block of K takes one of the ways of `extents`. Where all take the same one and FP32 serves it,
a tile's accumulators stay as they are scaled from the first block to the last. NaNs are told apart
in the end: which operand's NaN wins depends on positions alone.
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
_INTERLEAVED = 8  # FP64 steps in one pass: more of them wait for each other


Steps = Callable[[Array, Array, Array], Array]
"""The accumulators after a block from those before it and the block's operands, all FP32."""


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
    bits = sum(_bits(x, arithmetic) for x in (a, b))
    narrow = bits <= 24
    extent = extents.extents(a, b, c, size, arithmetic)
    way, scale, a_scale = extents.ways(extent, arithmetic)
    firm, deep = extents.firm(extent, way, scale, arithmetic), extents.deep(extent)
    plan = way, scale, a_scale, firm, deep

    def advance(
        c: Array,
        x: Array,
        y: Array,
        way: Array,
        scale: Array,
        a_scale: Array,
        firm: Array,
        deep: Array,
    ) -> Array:
        x, y = (_in_order(v, axis, arithmetic) for v, axis in ((x, 2), (y, 1)))
        left = extents.scaled(x, a_scale)
        right = extents.scaled(y, scale - a_scale)
        c = singles.entering(c, arithmetic)
        way = jnp.minimum(way, extents.WIDE) if narrow else way
        return lax.switch(way, _branches(arithmetic, bits), c, x, y, left, right, scale, firm, deep)

    def finish(words: Array, place: blocks.Place) -> Array:
        magnitude = words & floats.MAGNITUDE
        if arithmetic.zero == "positive":
            words = jnp.where(magnitude == 0, jnp.uint32(0), words)
        nan = _nan_of(place, c, nans, arithmetic)
        return jnp.where(magnitude > floats.INF, nan, words)

    method = _method(way, extent, scale, firm, arithmetic)

    def solve(words: Array, walk: blocks.Walk) -> Array:
        def plainly() -> Array:
            return floats.bits32(walk(floats.from_bits32(words), partial(_unscaled, arithmetic)))

        def wholly(steps: Steps, start: Callable[..., Array] = singles.scale_up) -> Array:
            state = start(singles.entering(words, arithmetic), scale[0])
            state = walk(state, partial(_scaled, arithmetic, scale[0], steps), a_scale)
            return singles.scale_down(state, scale[0])

        def deeply() -> Array:
            middle = 1.5 * singles.scaled_least(scale[0])
            state = singles.scale_up(words, scale[0]) + middle
            last = jnp.arange(way.size) == way.size - 1
            state = walk(state, partial(_deep_block, arithmetic, scale[0], middle), a_scale, last)
            return singles.scale_down(state, scale[0])

        high = partial(_high, scale=scale[0], arithmetic=arithmetic)
        low = partial(_flushing, least=singles.scaled_least(scale[0]), arithmetic=arithmetic)
        flushes = arithmetic.subnormal_results == "flush"
        methods: list[Callable[[], Array]] = [lambda: words, plainly, partial(wholly, _plain)]
        methods += [partial(wholly, high), partial(wholly, low) if flushes else deeply]
        methods += [partial(wholly, partial(_firmly, scale=scale[0]), _firm_start)]
        found = lax.switch(method, methods)
        tries = method == _FIRM
        if not flushes:
            tries |= method == _LOW
        again = tries & jnp.any((found & floats.MAGNITUDE) > floats.INF)
        again |= method == _BLOCKWISE
        return lax.cond(again, lambda: walk(words, advance, *plan), lambda: found)

    return blocks.over_tiles(a, b, c, size, arithmetic, solve, finish)


_BLOCKWISE, _PLAIN, _SCALED, _HIGH, _LOW, _FIRM = range(6)


def _method(
    way: Array, extent: extents.Extent, scale: Array, firm: Array, arithmetic: Arithmetic
) -> Array:
    """How to compute a tile: block by block, or all blocks with the same FP32 operations."""
    low = jnp.full_like(way, _LOW)
    if arithmetic.subnormal_results == "keep":
        keeps = arithmetic.subnormal_inputs == "keep"
        low = jnp.where(extents.deep(extent) & keeps, _LOW, _BLOCKWISE)
    # Where sums are scaled down, the first ones are likely to be too small for `_firmly`.
    firmly = (way == extents.WIDE) & jnp.all(firm) & (scale >= 0)
    method = jnp.where(firmly, _FIRM, _BLOCKWISE)
    for key, choice in (
        (extents.PLAIN, _PLAIN),
        (extents.SCALED, _SCALED),
        (extents.HIGH, _HIGH),
        (extents.LOW, low),
    ):
        method = jnp.where(way == key, choice, method)
    return jnp.where(jnp.all(way == way[0]), method[0], _BLOCKWISE)


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


def _unscaled(arithmetic: Arithmetic, c: Array, x: Array, y: Array) -> Array:
    x, y = (_in_order(v, axis, arithmetic) for v, axis in ((x, 2), (y, 1)))
    x, y = lax.optimization_barrier((floats.from_bits32(x), floats.from_bits32(y)))
    return _plain(c, x, y)


def _scaled(
    arithmetic: Arithmetic, scale: Array, steps: Steps, c: Array, x: Array, y: Array, a_scale: Array
) -> Array:
    x, y = (_in_order(v, axis, arithmetic) for v, axis in ((x, 2), (y, 1)))
    return steps(c, *_lifted(x, y, scale, a_scale))


def _deep_block(
    arithmetic: Arithmetic,
    scale: Array,
    middle: Array,
    c: Array,
    x: Array,
    y: Array,
    a_scale: Array,
    last: Array,
) -> Array:
    """Accumulators times 2^scale plus `middle`, where no sum reaches 2^-127.

    Sums are multiples of 2^-149, as numbers from 2^-126 to 2^-125 are; so all is added onto
    `middle`, 1.5 * 2^-126. The last block takes it away, and finds the signs of zeros; NaN where
    only more steps could tell one.
    """
    x, y = (_in_order(v, axis, arithmetic) for v, axis in ((x, 2), (y, 1)))
    x, y = _lifted(x, y, scale, a_scale)

    def ending() -> Array:
        final = x.shape[-1] - 1
        lifted = _plain(c, x[..., :final], y)
        before, product = lifted - middle, blocks.outer(x, y, final)
        sign = singles.sign_of(before + product)  # no sum is lost: its last place is a product's
        total = (lifted + product) - middle
        total = jnp.where(total == 0, singles.with_sign(jnp.zeros_like(total), sign), total)
        doubt = (before == 0) & (product == 0) & (arithmetic.zero == "ieee")
        return jnp.where(doubt, jnp.float32(jnp.nan), total)

    return lax.cond(last, ending, lambda: _plain(c, x, y))


def _lifted(x: Array, y: Array, scale: Array, a_scale: Array) -> tuple[Array, Array]:
    """A block's operands as FP32 numbers whose products are 2^scale times as large."""
    left, right = extents.scaled(x, a_scale), extents.scaled(y, scale - a_scale)
    return lax.optimization_barrier((left, right))  # else formed again for each product


def _branches(arithmetic: Arithmetic, bits: int) -> list[Callable[..., Array]]:
    """What takes a block each way: words of C, x and y; x and y scaled; S; whether `_firm` or
    `_shallow` and `_deep` may be tried. `bits`: of the significands of x and y together.
    """
    narrow = bits <= 24
    flush = arithmetic.subnormal_inputs == arithmetic.subnormal_results == "flush"

    def plain(c, x, y, left, right, scale, firm, deep):  # type: ignore[no-untyped-def]
        return floats.bits32(_plain(floats.from_bits32(c), left, right))

    def scaled(c, x, y, left, right, scale, firm, deep):  # type: ignore[no-untyped-def]
        return singles.scale_down(_plain(singles.scale_up(c, scale), left, right), scale)

    def low(c, x, y, left, right, scale, firm, deep):  # type: ignore[no-untyped-def]
        def careful() -> Array:
            found = _low(singles.scale_up(c, scale, flush), left, right, scale, arithmetic)
            return singles.scale_down(found, scale, flush)

        def shallow() -> Array:
            if arithmetic.subnormal_results == "flush":  # as fast
                return careful()
            tried = lambda: _shallow(c, left, right, scale, min(bits, 22))  # noqa: E731
            return _unless_nan(firm, tried, c, careful)

        if arithmetic.subnormal_inputs != arithmetic.subnormal_results:
            return shallow()
        tried = lambda: _deep(c, left, right, scale, arithmetic)  # noqa: E731
        return _unless_nan(deep, tried, c, shallow)

    def high(c, x, y, left, right, scale, firm, deep):  # type: ignore[no-untyped-def]
        found = _high(singles.scale_up(c, scale), left, right, scale, arithmetic)
        return singles.scale_down(found, scale)

    def close(c, x, y, left, right, scale, firm, deep):  # type: ignore[no-untyped-def]
        return _close(c, x, y)

    def wide(c, x, y, left, right, scale, firm, deep):  # type: ignore[no-untyped-def]
        # Accumulators that are infinite or NaN only see which operands are.
        settled = jnp.all((c & floats.MAGNITUDE) >= floats.INF)
        settled &= arithmetic.product_overflow == "keep"
        return lax.cond(
            settled,
            lambda: floats.bits32(_plain(floats.from_bits32(c), *_kinds(x, y))),
            lambda: _unless_nan(
                firm,
                lambda: _firm(c, left, right, scale),
                c,
                lambda: _wide(c, x, y, arithmetic, narrow),
            ),
        )

    return [plain, scaled, low, high, wide, *([] if narrow else [close])]


def _unless_nan(
    possible: Array, tried: Callable[[], Array], c: Array, careful: Callable[[], Array]
) -> Array:
    """The words of `tried` where it is possible and gives no NaN, else those of `careful`."""
    found = lax.cond(possible, tried, lambda: jnp.full_like(c, floats.QUIET_NAN))
    again = jnp.any((found & floats.MAGNITUDE) > floats.INF)
    return lax.cond(again, careful, lambda: found)


def _firm(c: Array, x: Array, y: Array, scale: Array) -> Array:
    """A block as `_firmly` does it, from words to words; NaN where that does not serve."""
    start = _firm_start(c, scale)
    found = lax.cond(
        scale < 0,
        lambda: _firmly_large(start, x, y, scale=scale),
        lambda: _firmly(start, x, y, scale=scale),
    )
    return singles.scale_down(found, scale)


def _firm_start(words: Array, scale: Array) -> Array:
    """Accumulators times 2^scale; NaN where one is no normal number there (subnormals are, from
    2^24 on).
    """
    lowest = jnp.where(scale >= 24, 0, 1 + jnp.maximum(-scale, 0)).astype(jnp.uint32) << 23
    magnitude = words & floats.MAGNITUDE
    lost = (magnitude != 0) & (magnitude < lowest)
    return jnp.where(lost, jnp.float32(jnp.nan), singles.scale_up(words, scale))


def _firmly(c: Array, x: Array, y: Array, scale: Array) -> Array:
    """As `_plain` on data times 2^scale, where no accumulator comes below 2^-100 there nor below
    2^-125; else NaN.

    A product that FP32 loses, being below 2^-126, is then less than half a last place.
    """
    limit = _firm_limit(scale)
    for index in range(x.shape[-1]):
        c = _nan_below(limit, c + blocks.outer(x, y, index))  # RNE
    return c


def _firmly_large(c: Array, x: Array, y: Array, scale: Array) -> Array:
    """As `_firmly` where sums may overflow; `scale` is negative."""
    limit, up, down = _firm_limit(scale), singles.power32(-scale), singles.power32(scale)
    for index in range(x.shape[-1]):
        total = c + blocks.outer(x, y, index)  # RNE
        c = _nan_below(limit, (total * up) * down)  # from 2^128 on the first is infinite
    return c


def _firm_limit(scale: Array) -> Array:
    return jnp.maximum(2.0 * singles.scaled_least(scale), jnp.float32(2.0**-100))


def _nan_below(limit: Array, x: Array) -> Array:
    doubt = -(jnp.abs(x) < limit).astype(jnp.uint32)  # all ones, which are a NaN
    return floats.from_bits32(floats.bits32(x) | doubt)


def _shallow(c: Array, x: Array, y: Array, scale: Array, bits: int) -> Array:
    """As `_plain` on data times 2^scale, where no sum below 2^-126 has a product with bits below
    2^-149 in it; else NaN. `bits`: the most that a significand of a product has.
    """
    least = floats.bits32(singles.scaled_least(scale))
    fine = least - np.uint32((24 - bits) << 23)  # 2^(bits - 150): products from there on are coarse
    c = singles.scale_up(c, scale)
    for index in range(x.shape[-1]):
        product = blocks.outer(x, y, index)
        c = c + product  # RNE
        of_sum, of_product = (floats.bits32(v) & floats.MAGNITUDE for v in (c, product))
        doubt = (of_sum < least) & (of_product - 1 < fine - 1)
        c = jnp.where(doubt, jnp.float32(jnp.nan), c)
    return singles.scale_down(c, scale)


def _plain(c: Array, x: Array, y: Array) -> Array:
    for index in range(x.shape[-1]):
        c = c + blocks.outer(x, y, index)  # RNE; the product is exact
    return c


def _low(c: Array, x: Array, y: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Accumulators times 2^scale; results below 2^-126 are rounded to multiples of 2^-149 or
    flushed.
    """
    least = singles.scaled_least(scale)
    if arithmetic.subnormal_results == "flush":
        return _flushing(c, x, y, least, arithmetic)

    def body(c: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        c = singles.read(c, arithmetic, least)
        product = operands[0][:, :, None] * operands[1][:, None, :]
        total = c + product  # RNE to 24 bits, tininess seen after it
        sign = singles.sign_of(total)
        # A product of at most 22 bits with lower ones than 2^-149 is below 2^-127; if it is
        # larger, a `total` below 2^-126 is exact. If it is smaller, C is below 2^-125. From
        # 2^-126 to there the last place of FP32 is 2^-149, and there C plus or minus `grid`
        # lies (exactly, that is), and `total` plus or minus it.
        grid = jnp.where(jnp.abs(c) < least, least, -2 * least)
        grid = lax.bitcast_convert_type(singles.bits(grid) ^ sign, jnp.float32)
        tiny = ((c + grid) + product) - grid
        if arithmetic.zero == "ieee":
            tiny = singles.with_sign(tiny, sign)
        tiny = jnp.where(jnp.abs(product) < least, tiny, total)
        return jnp.where(jnp.abs(total) < least, tiny, total), None

    # One step in each pass: in one that has more of them they wait for each other.
    return lax.scan(body, c, (x.transpose(2, 0, 1), y.transpose(1, 0, 2)))[0]


def _flushing(c: Array, x: Array, y: Array, least: Array, arithmetic: Arithmetic) -> Array:
    """As `_low` where results below `least`, seen after rounding, become zeros."""
    c = singles.read(c, arithmetic, least)
    for index in range(x.shape[-1]):
        if arithmetic.subnormal_inputs == "plus_zero":
            c = singles.read(c, arithmetic, least)
        total = c + blocks.outer(x, y, index)  # RNE
        zero = lax.bitcast_convert_type(singles.sign_of(total), jnp.float32)
        c = jnp.where(jnp.abs(total) < least, zero, total)
    return c


def _deep(c: Array, x: Array, y: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Words of the results where no sum reaches 2^-127; NaN where a zero's sign is in doubt.

    Sums are multiples of 2^-149, as numbers from 2^-126 to 2^-125 are; so all is added onto
    1.5 * 2^-126. Where subnormal results are flushed nothing is left but the sign of a zero.
    """
    flush = arithmetic.subnormal_results == "flush"
    middle = 1.5 * singles.scaled_least(scale)
    final = x.shape[-1] - 1
    if flush:
        before = jnp.zeros(c.shape, jnp.float32)
    else:
        before = _plain(singles.scale_up(c, scale) + middle, x[..., :final], y) - middle
    product = blocks.outer(x, y, final)
    sign = singles.sign_of(before + product)  # no sum is lost: its last place is a product's
    total = jnp.zeros_like(before) if flush else ((before + middle) + product) - middle
    total = jnp.where(total == 0, singles.with_sign(jnp.zeros_like(total), sign), total)
    doubt = (before == 0) & (product == 0) & (arithmetic.zero == "ieee")
    return jnp.where(doubt, np.uint32(floats.QUIET_NAN), singles.scale_down(total, scale))


def _high(c: Array, x: Array, y: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Accumulators times 2^scale; results of 2^128 and above overflow."""
    for index in range(x.shape[-1]):
        c = singles.overflowed(c + blocks.outer(x, y, index), scale, arithmetic)
    return c


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
