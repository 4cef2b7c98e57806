"""What a matrix unit is asked: a fixed set of small matrix products whose bits give its arithmetic
away.

A tile is one product `a[m, k] @ b[k, n]`; each of its outputs is a probe of its own, because rows
of A and columns of B share a pattern of positions and scale its terms independently. Nothing here
depends on an answer, so the tiles can be computed on one machine and judged on another.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

M = N = 16
"""Rows and columns of a tile: libraries treat single rows and very small outputs differently."""

K = 72
"""Not a multiple of 16, and more than a step of 64."""

ORDER_K = 128

GROUPS = {
    "order": "a large pair that cancels among units: which terms meet first",
    "sums": "cancelling pairs with a residue: widths, cuts and rounding",
    "bottom": "sums near 2^-149 and 2^-126, subnormal operands",
    "top": "products and sums near 2^128",
    "zeros": "signs of zeros and of vanishing sums",
    "specials": "infinities, NaNs and raw bit patterns",
    "dense": "every term set: normal, wide and cancelling data",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """One product to be computed: `a[m, k] @ b[k, n] (+ c[m, n])`, the operands BF16 or FP16.

    `thorough`: every output is about another place of a bit, so all of them are compared.
    """

    name: str
    group: str
    a: NDArray
    b: NDArray
    c: NDArray[np.float32] | None = None
    thorough: bool = False


def tiles(dtype: str, with_c: bool) -> list[Tile]:
    """All tiles for operands of `dtype`, the ones that start at a C only if `with_c`."""
    rng = np.random.default_rng(20240614)
    plain = [
        _order(dtype),
        *_sums(rng, dtype),
        *_ties(rng, dtype),
        *_tails(dtype),
        _tail_first(dtype),
        *_bottom(rng, dtype),
        *_top(rng, dtype),
        *_zeros(dtype),
        *_specials(rng, dtype),
        *_dense(rng, dtype),
    ]
    if not with_c:
        return plain
    scales = {"sums": 8, "bottom": 0, "top": 0, "zeros": 0, "specials": 0, "dense": 8}
    started = [
        replace(tile, name=f"{tile.name}, C", c=_accumulator(rng, tile))
        for tile in plain
        if tile.group in scales
    ]
    return [*plain, *started, _tail_of_c(rng, dtype)]


def _cast(x: NDArray, dtype: str) -> NDArray:
    with np.errstate(all="ignore"):
        return x.astype(np.float32).astype(DTYPES[dtype])


def _normal(x: NDArray, dtype: str) -> NDArray:
    """As `_cast`, zeros for what would be subnormal: ordinary sums must not depend on flushing."""
    tiny = float(ml_dtypes.finfo(DTYPES[dtype]).tiny)
    return _cast(np.where(np.abs(x) < tiny, 0.0, x), dtype)


def _order(dtype: str) -> Tile:
    """p_i = X, p_j = -X, all other products one unit, for 16 rows i and every column j."""
    rows = [0, 1, 2, 3, 4, 7, 8, 12, 16, 23, 32, 40, 64, 65, 96, 127]
    large, unit = (2.0**60, 1.0) if dtype == "bfloat16" else (2.0**15, 2.0**-14)
    a = np.full((M, ORDER_K), unit)
    a[np.arange(M), rows] = large
    b = np.full((ORDER_K, ORDER_K), unit)
    np.fill_diagonal(b, -large)
    return Tile(name="order", group="order", a=_cast(a, dtype), b=_cast(b, dtype))


def _mantissas(rng: Generator, shape: tuple[int, ...], dtype: str) -> NDArray:
    """Significands in [1, 2): half of them exactly 1."""
    bits = 7 if dtype == "bfloat16" else 10
    full = 1 + rng.integers(0, 1 << bits, shape) * 2.0**-bits
    return np.where(rng.random(shape) < 0.5, 1.0, full)


def _signs(rng: Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([-1.0, 1.0], shape)


# (positions of a pair that cancels, or of one term alone; positions of small terms)
_PATTERNS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((0, 1), (2, 3)),
    ((0, 3), (1, 2)),
    ((1, 0), (5,)),
    ((0, 8), (4, 12, 13)),
    ((2, 15), (1, 3, 7, 9, 14)),
    ((17, 30), (0, 18, 25, 31)),
    ((0, 16), (8, 20, 33)),
    ((3, 66), (2, 50, 67)),
    ((64, 65), (0, 66, 71)),
    ((32, 33), (1, 2)),
    ((0, 1), (64, 70)),
    ((40, 47), tuple(range(36, 60, 2))),
    ((0,), (1, 2, 3)),
    ((9,), (0, 4, 11)),
    ((20,), (1, 37, 50, 70)),
)


def _sums(rng: Generator, dtype: str) -> Iterator[Tile]:
    """Terms of every relative size down to 2^-52 (FP16: 2^-44) beside a pair that cancels."""
    reach = 26 if dtype == "bfloat16" else 22
    top = 8 if dtype == "bfloat16" else 14
    for number, (large, small) in enumerate(_PATTERNS):
        a, b = np.zeros((M, K)), np.zeros((K, N))
        x, y = 2.0 ** rng.integers(top - 5, top, (2, M))
        left, right = x * _mantissas(rng, (M,), dtype), y * _mantissas(rng, (N,), dtype)
        for turn, position in enumerate(large):
            a[:, position], b[position] = left * (-1) ** turn, right
        near, far = (0, reach) if len(large) == 2 else (8, 16)
        for position in small:
            for into, scale in ((a[:, position], x), (b[position], y)):
                down = 2.0 ** -rng.integers(near, far + 1, M)
                into[:] = scale * down * _mantissas(rng, (M,), dtype) * _signs(rng, (M,))
        yield Tile(
            name=f"sums {number}",
            group="sums",
            a=_cast(a, dtype),
            b=_cast(b, dtype),
        )


def _ties(rng: Generator, dtype: str) -> Iterator[Tile]:
    """A large sum first; in a later step a pair that cancels, half a unit of it and a last bit."""
    top = 0 if dtype == "bfloat16" else 12
    for number, first in enumerate((0, 63)):
        a, b = np.zeros((M, K)), np.zeros((K, N))
        a[:, first] = rng.choice([1, 1.5, -1, 1.0078125], M) * 2.0**top
        b[first] = rng.choice([1, 1.25, 1.5], N) * 2.0**top
        down, right = 2.0 ** -rng.integers(0, 9, M), 2.0 ** -rng.integers(0, 9, N)
        for turn, position in enumerate((64, 65)):
            a[:, position], b[position] = down * 2.0**top * (-1) ** turn, right * 2.0**top
        for position, low in ((66, 12), (67, 14), (71, 16)):
            a[:, position] = 2.0 ** (top - rng.integers(low, low + 5, M)) * _signs(rng, (M,))
            b[position] = 2.0 ** (top - rng.integers(low - 1, low + 5, N))
        a[:, 66], b[66] = 2.0 ** (top - 12), 2.0 ** (top - 12)
        yield Tile(name=f"ties {number}", group="sums", a=_cast(a, dtype), b=_cast(b, dtype))


def _tail(dtype: str) -> tuple[NDArray, NDArray, NDArray, float]:
    """Factors of +-2^-t for every t from 1 to 48 (FP16: 32), rows and columns; and of 2^24."""
    base, spans = (-26.0, 3) if dtype == "bfloat16" else (2.0, 2)
    columns = np.arange(N)
    left, right = 2.0 ** (1.0 - np.arange(M)), 2.0 ** (base - 16.0 * (columns % spans))
    kind = columns // spans % 4
    return left, right * np.choose(kind, [1, -1, 1, -1]), np.where(kind < 2, 1, -1), base


def _tails(dtype: str) -> Iterator[Tile]:
    """1 + 2^-23, half of its last bit, and 2^-(24 + t): in one step, in two, and far apart. And 1
    before 2^-25 - 2^-9, so that what joins it has its last place above that of the sum.
    """
    odd, below = (1, 2.0**-23, 2.0**-24), (1, -(2.0**-9), 2.0**-25)
    for places, terms in (
        ((0, 1, 2, 3), odd),
        ((0, 1, 64, 65), odd),
        ((0, 1, 20, 66), odd),
        ((0, 64, 65, 66), below),
    ):
        left, right, sign, base = _tail(dtype)
        a, b = np.zeros((M, K)), np.zeros((K, N))
        for place, term in zip(places, terms, strict=False):
            a[:, place] = 2.0 ** ((26 + base) // 2)
            b[place] = sign * term * 2.0 ** ((27 + base) // 2)
        a[:, places[3]], b[places[3]] = left, right
        name = f"tail of a tie, at {places}"
        a, b = _cast(a, dtype), _cast(b, dtype)
        yield Tile(name=name, group="sums", a=a, b=b, thorough=True)


def _tail_first(dtype: str) -> Tile:
    """2^-(24 + t), then half of the last bit of 1, then 1: C is small and has all its bits."""
    left, right, sign, base = _tail(dtype)
    a, b = np.zeros((M, K)), np.zeros((K, N))
    a[:, 0], b[0] = left, right
    for place, down in ((1, 24), (64, 0)):
        a[:, place], b[place] = 2.0 ** ((26 + base) // 2), sign * 2.0 ** (-down + (27 + base) // 2)
    a, b = _cast(a, dtype), _cast(b, dtype)
    return Tile(name="tail before a tie", group="sums", a=a, b=b, thorough=True)


def _tail_of_c(rng: Generator, dtype: str) -> Tile:
    """The same with a C that has the number and its odd last bit."""
    left, right, sign, base = _tail(dtype)
    a, b = np.zeros((M, K)), np.zeros((K, N))
    a[:, 0], b[0] = 2.0 ** ((2 + base) // 2), sign * 2.0 ** ((3 + base) // 2)
    a[:, 1], b[1] = left, right
    c = (1 + (2 * rng.integers(0, 1 << 20, (M, N)) + 1) * 2.0**-23) * 2.0 ** (26 + base)
    c = (c * _signs(rng, (M, N))).astype(np.float32)
    a, b = _cast(a, dtype), _cast(b, dtype)
    return Tile(name="tail of C", group="sums", a=a, b=b, c=c, thorough=True)


def _scattered(
    rng: Generator, dtype: str, exponents: Sequence[int], density: float, k: int = K
) -> tuple[NDArray, NDArray]:
    """Normal operands whose products have exponents around some of `exponents`."""
    total = rng.choice(exponents, (k,))
    half = total // 2
    a = 2.0 ** (half + rng.integers(-2, 3, (M, k))) * _mantissas(rng, (M, k), dtype)
    b = 2.0 ** ((total - half)[:, None] + rng.integers(-2, 3, (k, N))) * _mantissas(
        rng, (k, N), dtype
    )
    a *= _signs(rng, (M, k)) * (rng.random(k) < density)
    return _cast(a, dtype), _cast(b * _signs(rng, (k, N)), dtype)


def _bottom(rng: Generator, dtype: str) -> Iterator[Tile]:
    """Sums that are tiny or subnormal, and subnormal operands. (FP16 products are never that
    small.)
    """
    if dtype == "bfloat16":
        for name, exponents, density in (
            ("around 2^-126", (-126, -127, -133, -150), 0.15),
            ("around 2^-131", (-130, -132), 0.9),
            ("around 2^-138", (-135, -138, -141, -150, -160), 0.2),
            ("around 2^-146", (-144, -147, -149, -153, -158), 0.3),
            ("around 2^-151", (-149, -150, -152, -154), 0.9),
        ):
            a, b = _scattered(rng, dtype, exponents, density)
            yield Tile(name=f"bottom: {name}", group="bottom", a=a, b=b)
        for place in (150, 149, 127):
            a, b = _beside_a_tie(rng, place)
            yield Tile(name=f"bottom: ties at 2^-{place}", group="bottom", a=a, b=b)
        for k in (K, 3):
            a, b = _about_the_last_place(rng, k)
            yield Tile(name=f"bottom: {k} about 2^-149", group="bottom", a=a, b=b, thorough=True)
        a, b = _single_products()
        yield Tile(name="bottom: single products", group="bottom", a=a, b=b, thorough=True)
        for name, places in _SCANS.items():
            a, b = _scan(places)
            yield Tile(name=f"bottom: {name}", group="bottom", a=a, b=b, thorough=True)
        for half in (3, 2):
            a, b = _of_small_products(half)
            name = f"bottom: {half} halves of 2^-149 in parts"
            yield Tile(name=name, group="bottom", a=a, b=b, thorough=True)
        a, b = _just_below_normal()
        yield Tile(name="bottom: just below 2^-126", group="bottom", a=a, b=b, thorough=True)
    bits = 7 if dtype == "bfloat16" else 10
    span = 20 if dtype == "bfloat16" else 6
    tiny = rng.integers(0, 1 << bits, (M, K)) * float(ml_dtypes.finfo(DTYPES[dtype]).tiny) / 2**bits
    other = 2.0 ** rng.integers(-span, span + 1, (K, N)) * _mantissas(rng, (K, N), dtype)
    a = _cast(tiny * _signs(rng, (M, K)) * (rng.random((M, K)) < 0.2), dtype)
    b = _cast(other * _signs(rng, (K, N)), dtype)
    yield Tile(name="bottom: subnormal A", group="bottom", a=a, b=b)
    mixed = np.where(rng.random((M, 1)) < 0.5, other.T[:, ::-1], a.astype(np.float64))
    yield Tile(
        name="bottom: subnormal B", group="bottom", a=_cast(mixed, dtype), b=_cast(tiny.T, dtype)
    )


def _about_the_last_place(rng: Generator, k: int) -> tuple[NDArray, NDArray]:
    """Normal numbers whose products lie around 2^-149; half of the rows are half zeros."""
    a, b = (
        rng.normal(size=shape) * 2.0 ** -rng.integers(72, 77, shape) for shape in ((M, k), (k, N))
    )
    a *= (rng.random((M, k)) < 0.5) | (rng.random((M, 1)) < 0.5)
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _beside_a_tie(rng: Generator, place: int) -> tuple[NDArray, NDArray]:
    """BF16: one term an odd or even count of 2^-place, and smaller ones down to 2^-(place + 50)."""
    a, b = np.zeros((M, K)), np.zeros((K, N))
    low = place // 2
    a[:, 0] = rng.choice([1, 3, 5, 65], M) * 2.0**-low
    b[0] = rng.choice([1, 3, 7], N) * 2.0 ** -(place - low)
    for position in (1, 17, 69):
        a[:, position] = 2.0 ** -(low + rng.integers(0, 26, M)) * _signs(rng, (M,))
        b[position] = 2.0 ** -(place - low + rng.integers(0, 26, N)) * _signs(rng, (N,))
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _single_products() -> tuple[NDArray, NDArray]:
    """BF16: one product per output, beside the middle between two counts of 2^-149 and one bit away
    from it, at every distance that such a bit can have.
    """
    a, b = np.zeros((M, K)), np.zeros((K, N))
    pairs = _beside_middles()
    left = {kind for kinds in pairs.values() for kind in kinds}
    for block in range(4 * M):  # a factor, and four outputs of a row that have it
        row, columns = block // 4, range(block % 4 * 4, block % 4 * 4 + 4)
        x = max(pairs, key=lambda x: sum(kind[0] for kind in pairs[x].keys() & left))
        kinds = sorted(pairs[x], key=lambda kind: (kind in left, kind[0]), reverse=True)
        a[row, block] = x * 2.0**-74
        for column, kind in zip(columns, kinds, strict=False):
            left.discard(kind)
            b[block, column] = (-1) ** (row + column) * pairs[x][kind] * 2.0 ** -(75 + kind[1])
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _beside_middles() -> dict[int, dict[tuple[int, int, bool], int]]:
    """For significands x of 8 bits: y with x * y = (count + 1/2) * 2^s, +- 2^(s - 1 - distance) and
    less, by (distance, s, whether it is above); the count is even if it is, and odd if not.
    """
    found: dict[int, dict[tuple[int, int, bool], int]] = {}
    for x in range(128, 256):
        for y, s in itertools.product(range(128, 256), range(2, 17)):
            count, rest = divmod(x * y, 1 << s)
            rest -= 1 << s - 1
            if rest and (rest > 0) == (count % 2 == 0):
                kind = (s - abs(rest).bit_length(), s, rest > 0)
                found.setdefault(x, {}).setdefault(kind, y)
    return found


# what is added to a multiple of 2^-150: (position, times 2^-j)
_SCANS: dict[str, tuple[tuple[int, float], ...]] = {
    "one bit beside 2^-148": ((1, -1.0),),
    "bits that cancel beside 2^-148": ((1, -1.0), (2, 0.5), (3, 0.5)),
    "one bit in the next step": ((64, -1.0),),
    "bits that cancel in the next step": ((64, -1.0), (65, 0.5), (66, 0.5)),
}


def _scan(places: tuple[tuple[int, float], ...]) -> tuple[NDArray, NDArray]:
    """BF16: 2^-148 or a tie, 3.5 * 2^-149, and smaller bits at 2^-j for all j from 136 to 215."""
    a, b = np.zeros((M, K)), np.zeros((K, N))
    rows, columns = np.arange(M), np.arange(N)
    # Columns: 5 spans of 16 places, beside the number, the tie and minus the tie.
    span, kind = columns % 5, np.minimum(columns // 5, 2)
    a[:, 0], b[0] = 2.0**-73, np.choose(kind, [2.0, 3.5, -3.5]) * 2.0**-76
    for position, times in places:
        a[:, position] = times * 2.0 ** -(100.0 + rows)
        b[position] = np.choose(kind, [1, 1, -1]) * 2.0 ** -(36.0 + 16 * span)
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _of_small_products(halves: int) -> tuple[NDArray, NDArray]:
    """BF16: so many halves of 2^-149 (a tie, or none), as so many products of 2^-150, twice as many
    of 2^-151 or four times as many of 2^-152; less 2^-j in the same step, for all j from 154 to
    233. Terms are cut in relation to a largest exponent below all of FP32.
    """
    a, b = np.zeros((M, K)), np.zeros((K, N))
    b[0], b[1 : 4 * halves + 1] = -(2.0 ** -(50.0 + np.arange(N))), 2.0**-75
    for row in range(M - 1):
        down, span = row % 3, row // 3
        a[row, 0] = 2.0 ** -(104.0 + 16 * span)
        a[row, 1 : (halves << down) + 1] = 2.0 ** -(75.0 + down)
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _just_below_normal() -> tuple[NDArray, NDArray]:
    """BF16: +-2^-126 less a term from 2^-148 to 2^-165, in one step or in the next. What is flushed
    depends on what is compared with 2^-126: the exact sum, the sum rounded to 24 bits (2^-126 from
    2^-126 - 2^-151 upwards), or to counts of 2^-149 (from 2^-126 - 2^-150 upwards).
    """
    a, b = np.zeros((M, K)), np.zeros((K, N))
    less = [2.0**-x for x in (148, 149, 150, 151, 152, 153, 155, 160, 165)]
    less += [2.0**-150 * x for x in (127 / 128, 0.75)]
    less += [2.0**-151 * x for x in (129 / 128, 127 / 128, 1.25, 1.75, -1)]
    places = ((0, 1), (5, 4), (0, 2), (0, 64))  # of 2^-126, and after it in a chain of either order
    b[[0, 5]], b[[1, 2, 4, 64]] = 2.0**-63, np.array(less) * 2.0**75
    for row in range(M):
        large, small = places[row // 2 % 4]
        sign, times = (-1) ** row, 1 + row // 8 / 2
        a[row, large], a[row, small] = sign * 2.0**-63, -sign * times * 2.0**-75
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _top(rng: Generator, dtype: str) -> Iterator[Tile]:
    """Products and sums at the largest FP32 number, some of them beyond. (FP16: its largest.)"""
    exponents = (124, 125, 126, 127, 128) if dtype == "bfloat16" else (24, 26, 28)
    for density in (0.03, 0.08):
        a, b = _scattered(rng, dtype, exponents, density)
        yield Tile(name=f"top: {density:.0%} of terms", group="top", a=a, b=b)
    if dtype == "bfloat16":
        for p, q in ((0, 1), (0, 12), (5, 40)):
            a, b = _scattered(rng, dtype, (100, 104, 126), 0.1)
            a[:, [p, q]] = np.stack([2.0 ** rng.integers(60, 67, M)] * 2, 1) * [1, -1]
            b[[p, q]] = 2.0 ** rng.integers(61, 67, N)
            yield Tile(name=f"top: pair ({p}, {q}) that cancels", group="top", a=a, b=b)
        # Products beyond the largest number, often of both signs in a step.
        for density in (0.15, 1.0):
            a, b = _scattered(rng, dtype, (128, 130, 160, 230), density)
            yield Tile(name=f"top: {density:.0%} of products beyond", group="top", a=a, b=b)
        a, b = _beside_the_largest()
        yield Tile(name="top: half a last place", group="top", a=a, b=b, thorough=True)


def _beside_the_largest() -> tuple[NDArray, NDArray]:
    """BF16: plus or minus the largest number, 2^128 - 2^104, half its last place or about that, and
    in some rows a smaller term, in one step or in the next: infinity, or not yet.
    """
    a, b = np.zeros((M, K)), np.zeros((K, N))
    for place, down in ((0, 0), (1, 8), (2, 16)):  # 255 * (2^120 + 2^112 + 2^104)
        a[:, place], b[place] = 255 * 2.0 ** (60 - down // 2), 2.0 ** (60 - down // 2)
    # Half a last place is 128 * 128 * 2^89; 127 * 129 and 113 * 145 are 2^14 less and more one.
    about = np.array([128, 64, 128, 127, 128, 129, 128, 145, 128, 255, 128, 192, 128, 130, 128, 96])
    columns = np.arange(N)
    b[[5, 64]] = about * 2.0**44
    b[[6, 66]] = (-1.0) ** (columns // 2) * 2.0 ** (51 - 3 * columns)
    for row in range(M):
        half, rest = ((5, 6), (64, 66))[row // 2 % 2]
        a[row, half] = (128, 127, 113, 128)[row // 4] * 2.0**45
        a[row, rest] = 2.0**50 if row // 4 == 3 else 0.0
        a[row] *= (-1) ** row
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _zeros(dtype: str) -> Iterator[Tile]:
    """Rows of zeros and vanishing numbers of either sign, at every place and at some."""
    k = ORDER_K
    small = 2.0**-100 if dtype == "bfloat16" else 2.0**-24
    rows, columns = np.zeros((M, k)), np.zeros((k, N))
    values = (0.0, -0.0, small, -small)
    for number in range(M):
        rows[number], columns[:, number] = values[number % 4], values[number * 5 % 4]
        rows[number, number :: number // 4 + 2] = values[(number // 4 + number) % 4]
    columns[:, 8:] = np.where(np.arange(k)[:, None] % 3 == np.arange(8) % 3, -1.0, 1.0)
    for count in (40, 96):  # whole steps of most units: a short one ends with products +0
        a, b = np.full((M, count), -0.0), np.ones((count, N))
        b[::7, N // 2 :] = -1.0
        name = f"{count} minus zeros"
        yield Tile(name=name, group="zeros", a=_cast(a, dtype), b=_cast(b, dtype), thorough=True)
    yield Tile(name="zeros", group="zeros", a=_cast(rows, dtype), b=_cast(columns, dtype))
    if dtype == "bfloat16":
        # The sum becomes tiny and negative at k = 64, and after it come zeros of one sign.
        a, b = np.zeros((M, k)), np.ones((k, N))
        a[M // 2 :] = -0.0
        a[:, 0], b[0] = -(2.0**-63), 2.0**-62
        a[:, 64], b[64] = 2.0**-63, 2.0**-62 * (1 - 2.0 ** -np.arange(1, N + 1).clip(max=8))
        yield Tile(
            name="zeros after a tiny sum", group="zeros", a=_cast(a, dtype), b=_cast(b, dtype)
        )
        a, b = _tiny_beside_one()
        yield Tile(name="tiny beside one", group="zeros", a=a, b=b, thorough=True)
        for low in (63, 110):
            a, b = _vanishing_last(low)
            name = f"vanishing last, from 2^-{63 + low}"
            yield Tile(name=name, group="zeros", a=a, b=b, thorough=True)
        for name, steps in (("vanishing products", 4.375), ("products beside 2^-150", 0.3)):
            a, b = _vanishing(steps)
            yield Tile(name=name, group="zeros", a=a, b=b, thorough=True)


def _vanishing(step: float) -> tuple[NDArray, NDArray]:
    """BF16: one negative product and one of either sign or none; from row to row and from column to
    column 2^step smaller, so that they lie around 2^-150, or reach from 2^-126 to 2^-256.
    """
    a, b = np.zeros((M, K)), np.zeros((K, N))
    first = 63 if step > 1 else 74
    down = first + np.floor(np.arange(M) * step)
    a[:, 0], b[0] = -(2.0**-down), np.choose(np.arange(N) % 2, [1.0, 1.5]) * 2.0**-down
    a[:, 1] = 2.0 ** -(down + 2)
    b[1] = b[0] * np.choose(np.arange(N) % 3, [0.0, 1.0, -1.0])
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _tiny_beside_one() -> tuple[NDArray, NDArray]:
    """BF16: first +-1, and in a later step one product of -1 or -1.5 times 2^-126 down to 2^-253:
    only a cut toward minus infinity can make it count, and only if nothing cut it before.
    """
    a, b = np.zeros((M, ORDER_K)), np.zeros((ORDER_K, N))
    columns = np.arange(N)
    a[:, 0], b[0] = np.choose(np.arange(M) % 2, [1.0, -1.0]), 1.0
    for row in range(M):
        a[row, 64 + 2 * row] = 2.0 ** -(63 + 4 * row)
        b[64 + 2 * row] = -(1 + columns % 2 / 2) * 2.0 ** -(63 + 4 * row + columns // 2)
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _vanishing_last(low: int) -> tuple[NDArray, NDArray]:
    """BF16: -1 and 1.5, or -1 and -0, or their negatives, times powers of two from 2^-(63 + low)
    down to 2^-(126 + low), and nothing after them: the sign of what is left may hang on a cut.
    """
    rows, columns = np.arange(M), np.arange(N)
    kinds = np.where(rows[:, None] < 8, [-1.0, 1.5], [-1.0, -0.0])
    a = kinds * 2.0 ** -(63 + 8 * (rows[:, None] % 8))
    b = np.ones((2, 1)) * (1 - 2 * (columns % 2)) * 2.0 ** -(low + columns // 2)
    return _cast(a, "bfloat16"), _cast(b, "bfloat16")


def _specials(rng: Generator, dtype: str) -> Iterator[Tile]:
    kind = DTYPES[dtype]
    raw = rng.integers(0, 1 << 16, (2, M, K)).astype(np.uint16)
    raw[:, :, 20:] = 0
    yield Tile(name="raw bits", group="specials", a=raw[0].view(kind), b=raw[1].view(kind).T.copy())
    infinity, fraction = (0x7F80, 0x7F) if dtype == "bfloat16" else (0x7C00, 0x3FF)
    for name, share in (("few", 0.02), ("one in ten", 0.1)):
        operands = _cast(rng.normal(size=(2, M, K)), dtype).view(np.uint16)
        words = rng.choice([infinity, infinity, infinity + 1, infinity | fraction, 0], (2, M, K))
        words[:, :, 0] = infinity | fraction // 2 + 7
        signs = rng.choice([0, 0x8000], words.shape)
        chosen = rng.random(words.shape) < share / 2
        operands = np.where(chosen, words | signs, operands).astype(np.uint16)
        a, b = operands[0].view(kind), operands[1].view(kind).T.copy()
        yield Tile(name=f"specials: {name}", group="specials", a=a, b=b)
    # Infinities and zeros alone, so that every NaN is the unit's own.
    a, b = _cast(rng.choice([1.0, -2.0], (2, M, K)), dtype)
    a[np.arange(M), np.arange(M) * 2], b[np.arange(N), np.arange(N)[::-1] * 2] = np.inf, -np.inf
    a[:4, ::3], b[:4, 1::3] = 0, 0
    yield Tile(name="infinities and zeros", group="specials", a=a, b=b.T.copy())


def _dense(rng: Generator, dtype: str) -> Iterator[Tile]:
    a, b = rng.normal(size=(2, M, K))
    yield Tile(name="normal", group="dense", a=_normal(a, dtype), b=_normal(b.T, dtype))
    # The same rows and columns in another order: an output depends on its row and column only.
    yield Tile(
        name="normal, reversed",
        group="dense",
        a=_normal(a[::-1], dtype),
        b=_normal(b[::-1].T, dtype),
    )
    span = 12 if dtype == "bfloat16" else 5
    for turn in range(2):
        scale = 2.0 ** rng.integers(-span, span + 1, (2, M, K))
        a, b = rng.normal(size=(2, M, K)) * scale
        yield Tile(name=f"wide {turn}", group="dense", a=_normal(a, dtype), b=_normal(b.T, dtype))
    for half in (8, 36):
        a, b = rng.normal(size=(2, M, K)) * 2.0 ** rng.integers(0, 6, (2, M, K))
        a[:, half : 2 * half], b[:, half : 2 * half] = -a[:, :half], b[:, :half]
        a[:, 0] *= 1 + 2.0**-7
        a[:, -1] *= 2.0**-12
        yield Tile(
            name=f"cancelling at distance {half}",
            group="dense",
            a=_normal(a, dtype),
            b=_normal(b.T, dtype),
        )
    a, b = rng.normal(size=(2, M, 3))
    a[1::2] *= [1, 2.0**-12, 1]
    a[1::2, 2], b[:, 2] = -a[1::2, 0], b[:, 0]
    yield Tile(name="K = 3", group="dense", a=_normal(a, dtype), b=_normal(b.T, dtype))


def _accumulator(rng: Generator, tile: Tile) -> NDArray[np.float32]:
    """Values of C that matter beside the sums of `tile`."""
    shape = (tile.a.shape[0], tile.b.shape[1])
    sign = _signs(rng, shape)
    fraction = 1 + rng.integers(0, 1 << 23, shape) * 2.0**-23
    if tile.group in ("sums", "dense"):
        c = sign * fraction * 2.0 ** rng.integers(-30, 22, shape)
    elif tile.group == "top":
        c = sign * np.where(rng.random(shape) < 0.5, 1.9999999, fraction) * 2.0**127
    elif tile.group == "bottom":
        few = rng.integers(1, 8, shape) * 2.0**-23  # of 2^-149
        c = sign * np.choose(rng.integers(0, 3, shape), [fraction, fraction - 1, few]) * 2.0**-126
    elif tile.group == "zeros":
        c = rng.choice([0.0, -0.0, -0.0, 2.0**-149, -(2.0**-127)], shape)
    else:
        words = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFC12345, 0x80000000, 0x3F800000])
        return rng.choice(words, shape).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        return c.astype(np.float32)
