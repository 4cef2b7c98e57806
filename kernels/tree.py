"""The twin for trees of rounded additions: `[batch, m, k] x [batch, k, n]`.

Products are rounded to FP32, neighbours are added until one number is left, then C is. Each block
of K takes one of the ways of `extents`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels import blocks, extents, floats, singles
from kernels.arithmetic import Arithmetic

_NARROW = 16  # columns below which the product is computed transposed

Rounding = Callable[[Array], Array]


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`."""
    if b.shape[-1] < _NARROW < a.shape[1]:  # long rows are what the loops below are good at
        turned = None if c is None else c.swapaxes(1, 2)
        return accumulate(b.swapaxes(1, 2), a.swapaxes(1, 2), turned, arithmetic).swapaxes(1, 2)
    with jax.enable_x64(True):
        size = blocks.size_of(a.shape[-1], arithmetic.products)
        a, b = blocks.pad(a, b, size, arithmetic)
        way, scale, a_scale = extents.ways(extents.extents(a, b, c, size, arithmetic), arithmetic)
        plan = jnp.minimum(way, extents.WIDE), scale, a_scale
        finish = partial(_finish, arithmetic)

        def advance(c: Array, x: Array, y: Array, index: Array) -> Array:
            return _advance(arithmetic, c, x, y, *(entry[index] for entry in plan))

        def solve(words: Array, walk: blocks.Walk) -> Array:
            return walk(words, advance)

        return blocks.over_tiles(a, b, c, size, arithmetic, solve, finish)


def _finish(arithmetic: Arithmetic, words: Array, place: blocks.Place) -> Array:
    magnitude = words & floats.MAGNITUDE
    words = jnp.where(magnitude > floats.INF, jnp.uint32(arithmetic.nan), words)
    if arithmetic.zero == "positive":
        words = jnp.where(magnitude == 0, jnp.uint32(0), words)
    return words


def _advance(
    arithmetic: Arithmetic, c: Array, x: Array, y: Array, way: Array, scale: Array, a_scale: Array
) -> Array:
    """The accumulators' words after a block, from words."""
    c = singles.entering(c, arithmetic)
    left, right = extents.scaled(x, a_scale), extents.scaled(y, scale - a_scale)
    steps = partial(_steps, products=arithmetic.products)

    def same(value: Array) -> Array:
        return value

    def plain() -> Array:
        return floats.bits32(steps(floats.from_bits32(c), left, right, same, same, same))

    def scaled() -> Array:
        found = steps(singles.scale_up(c, scale), left, right, same, same, same)
        return singles.scale_down(found, scale)

    def low() -> Array:
        reading = partial(singles.read, arithmetic=arithmetic, least=singles.scaled_least(scale))
        rounding = partial(_low, scale=scale, arithmetic=arithmetic)
        sums = rounding if arithmetic.subnormal_results == "flush" else same  # others are exact
        found = steps(singles.scale_up(c, scale), left, right, reading, rounding, sums)
        return singles.scale_down(found, scale)

    def high() -> Array:
        rounding = partial(singles.overflowed, scale=scale, arithmetic=arithmetic)
        found = steps(singles.scale_up(c, scale), left, right, same, rounding, rounding)
        return singles.scale_down(found, scale)

    def wide() -> Array:
        settled = jnp.all((c & floats.MAGNITUDE) > floats.INF)  # NaNs stay
        usual = arithmetic.rounding == "nearest_even" and arithmetic.overflow == "inf"
        usual = usual and arithmetic.subnormal_results == "flush" and arithmetic.specials == "ieee"
        way = _wide_flushing if usual else _wide
        return lax.cond(settled, lambda: c, lambda: way(c, x, y, arithmetic))

    return lax.switch(way, [plain, scaled, low, high, wide])


def _steps(
    c: Array,
    x: Array,
    y: Array,
    reading: Rounding,
    product_rounding: Rounding,
    sum_rounding: Rounding,
    products: int,
) -> Array:
    """The steps of a block, in FP32 or FP64, with what is to be done to C and to each result."""
    for first in range(0, x.shape[-1], products):
        terms = [
            product_rounding(blocks.outer(x, y, index)) for index in range(first, first + products)
        ]
        while len(terms) > 1:
            pairs = zip(terms[::2], terms[1::2], strict=True)
            terms = [sum_rounding(left + right) for left, right in pairs]  # RNE
        c = sum_rounding(reading(c) + terms[0])  # RNE
    return c


def _low(x: Array, scale: Array, arithmetic: Arithmetic) -> Array:
    """Products or sums times 2^scale, rounded to multiples of 2^-149 or flushed below 2^-126."""
    least, sign = singles.scaled_least(scale), singles.sign_of(x)
    if arithmetic.subnormal_results == "flush":
        tiny = singles.with_sign(jnp.zeros_like(x), sign)
    else:
        grid = singles.with_sign(jnp.full_like(x, least), sign)  # its last place is 2^-149
        tiny = (x + grid) - grid
        if arithmetic.zero == "ieee":
            tiny = singles.with_sign(tiny, sign)
    return jnp.where(jnp.abs(x) < least, tiny, x)


def _wide(c: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """The words after a block of words of any kind.

    FP64 holds products exactly, and a sum of two FP32 numbers that FP64 rounds may be rounded to
    nearest again (53 >= 2 * 24 + 2); toward zero it is rounded to odd first.
    """
    products = arithmetic.products

    def add(left: Array, right: Array) -> Array:
        total = left + right
        if arithmetic.rounding != "nearest_even":
            total = singles.to_odd(total, singles.lost(left, right, total))
        return singles.rounded(total, arithmetic)

    def body(c: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = operands
        terms = []
        for index in range(products):
            product = singles.product(blocks.outer(x, y, index), arithmetic)
            terms.append(singles.rounded(product, arithmetic))
        while len(terms) > 1:
            terms = [add(*pair) for pair in zip(terms[::2], terms[1::2], strict=True)]
        return add(singles.read(c, arithmetic), terms[0]), None

    found, _ = lax.scan(body, floats.to_float64(c), blocks.in_float64(x, y, products))
    return singles.to_words(found)


def _wide_flushing(c: Array, x: Array, y: Array, arithmetic: Arithmetic) -> Array:
    """As `_wide` where results that would be subnormal are zeros: FP32 adds, FP64 multiplies."""
    products = arithmetic.products

    def signed_zero(x: Array) -> Array:
        return singles.with_sign(jnp.zeros_like(x), singles.sign_of(x))

    def multiply(x: Array, y: Array, index: int) -> Array:
        product = singles.product(blocks.outer(x, y, index), arithmetic)
        tiny = jnp.abs(product) < singles.LEAST - 2.0**-151  # what is above becomes 2^-126
        return jnp.where(tiny, signed_zero(product), product).astype(jnp.float32)  # RNE

    def add(left: Array, right: Array) -> Array:
        total = left + right
        return jnp.where(jnp.abs(total) < singles.LEAST, signed_zero(total), total)

    def body(words: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        c = floats.from_bits32(words)
        for first in range(0, together, products):
            terms = [multiply(*operands, first + index) for index in range(products)]
            while len(terms) > 1:
                terms = [add(*pair) for pair in zip(terms[::2], terms[1::2], strict=True)]
            c = add(singles.read(c, arithmetic), terms[0])
        return floats.bits32(c), None

    if arithmetic.subnormal_inputs == "keep":  # XLA's FP32 operations would not
        return _wide(c, x, y, arithmetic)
    steps = x.shape[-1] // products
    together = products * (2 if steps % 2 == 0 else 1)
    found, _ = lax.scan(body, c, blocks.in_float64(x, y, together))
    return found
