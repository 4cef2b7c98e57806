"""How a library cuts one matmul, as far as that decides the order in which K is summed.

Documented in the sources of ops-nn (`mat_mul_v3`), asc-devkit and CATLASS:

- The output is cut in tiles of base_m x base_n. A core takes K in outer tiles (what it loads at a
  time), each in pieces of base_k; one piece is one Mmad call, which pads its own last step.
- K shift: the core with block index i starts at outer tile i mod (number of outer tiles), goes up
  to the end of K and then wraps around. So the bits of a row depend on where the row is.
- Split-K: an outer tile starts from +0, and its FP32 result is added to a sum in memory. One core
  may walk all of K so, or cores take contiguous runs of outer tiles, as even as they go, and the
  vector cores add their sums in the order of the cores.
- Tiles go over the cores along diagonals: tile t has row t mod M and column (t + t / lcm(M, N)) mod
  N of the M x N tiles, and core t mod cores.

Inferred: an Mmad continues from the accumulator as it is, so neither pieces nor outer tiles that
ascend change a bit. Assumed: sums in memory round to nearest even; the matrices of a batch are
numbered one by one, and large matrices, which the library walks in blocks that fit its cache, as a
whole.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Segment = tuple[int, int]
"""A piece of K: start and stop."""

Chain = tuple[Segment, ...]
"""Pieces that follow each other in one accumulator."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_L1_BYTES = 512 * 1024 + 256
_LONG_K = 27392
_CORE_K = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """One way to cut a matmul.

    Attributes:
        base_m, base_n, base_k: rows, columns and K of the tile that one Mmad call multiplies.
        step_k: Mmad calls per outer K tile, which is step_k * base_k long.
        cores: cores over which output tiles (or, with split_k, K) are divided.
        tile_order: which core has which output tile. `diagonal`: see the module. `row`: tiles
            counted row by row, tile t on core t mod cores (for libraries without diagonals).
        k_shift: each core starts its outer K loop at a tile that depends on its number.
        split_k: contiguous parts of K, summed apart and then added in ascending order by FP32
            additions to nearest even; each gets whole outer tiles, the first ones one more if they
            do not divide. C belongs to the first part.
        accumulate_in: `l0c`: an outer tile continues from the accumulator. `gm`: every outer tile
            starts at +0 (the first at C) and is added to the part's sum in memory, in FP32 to
            nearest even.

    Raises:
        ValueError: a field is out of its range, or `k_shift` meets a K that is summed in parts.
    """

    base_m: int
    base_n: int
    base_k: int
    step_k: int = 1
    cores: int = 24
    tile_order: Literal["diagonal", "row"] = "diagonal"
    k_shift: bool = False
    split_k: int = 1
    accumulate_in: Literal["l0c", "gm"] = "l0c"

    def __post_init__(self) -> None:
        for field in ("base_m", "base_n", "base_k", "step_k", "cores", "split_k"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Tiling: {field} must be an integer of at least 1, got {value!r}")
        for field, choices in (
            ("tile_order", ("diagonal", "row")),
            ("k_shift", (False, True)),
            ("accumulate_in", ("l0c", "gm")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"Tiling: {field} must be one of {choices}, got {getattr(self, field)!r}"
                )
        if self.k_shift and (self.split_k > 1 or self.accumulate_in == "gm"):
            raise ValueError(
                f"Tiling: k_shift goes with one sum in L0C, got split_k={self.split_k} and "
                f"accumulate_in={self.accumulate_in!r}; no kernel of the library does both"
            )

    @property
    def outer_k(self) -> int:
        """Length of an outer K tile."""
        return self.step_k * self.base_k

    def grid(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        """How many tiles there are along m, along n, and outer ones along k."""
        return -(-m // self.base_m), -(-n // self.base_n), -(-k // self.outer_k)


def k_order(
    tiling: Tiling, m: int, k: int, n: int, m_tile: int, n_tile: int
) -> tuple[tuple[Chain, ...], ...]:
    """The order in which one output tile sums K: parts, each of chains, each of Mmad pieces.

    A chain starts at +0, the very first one at C. A part is the sum of its chains, added one by
    one; the result is the sum of the parts, added one by one.
    """
    m_tiles, n_tiles, k_tiles = tiling.grid(m, k, n)
    first = starts(tiling, m_tiles, n_tiles, k_tiles)[m_tile][n_tile] if k_tiles else 0
    order = [(first + i) % k_tiles for i in range(k_tiles)]
    result = []
    for start, stop in parts(tiling, k_tiles):
        tiles = [pieces(tiling, k, outer) for outer in order[start:stop]]
        joined = (tuple(piece for tile in tiles for piece in tile),)
        result.append(tuple(tiles) if tiling.accumulate_in == "gm" else joined)
    return tuple(result)


def pieces(tiling: Tiling, k: int, outer: int) -> Chain:
    """The Mmad pieces of one outer K tile; the last one of K may be short."""
    stop = min((outer + 1) * tiling.outer_k, k)
    return tuple(
        (start, min(start + tiling.base_k, stop))
        for start in range(outer * tiling.outer_k, stop, tiling.base_k)
    )


def parts(tiling: Tiling, k_tiles: int) -> tuple[Segment, ...]:
    """The outer tiles of each part of K: start and stop. Parts that would be empty are left out."""
    count = min(tiling.split_k, k_tiles)
    if not count:
        return ()
    each, more = divmod(k_tiles, count)
    edges = [i * each + min(i, more) for i in range(count + 1)]
    return tuple(zip(edges[:-1], edges[1:], strict=True))


@lru_cache(maxsize=64)
def starts(tiling: Tiling, m_tiles: int, n_tiles: int, k_tiles: int) -> tuple[tuple[int, ...], ...]:
    """The outer K tile with which each output tile starts: a row per row of tiles."""
    shift = k_tiles if tiling.k_shift else 1
    return tuple(tuple(core % shift for core in row) for row in blocks(tiling, m_tiles, n_tiles))


def blocks(tiling: Tiling, m_tiles: int, n_tiles: int) -> list[list[int]]:
    """The core (block index) that computes each output tile: a list per row of tiles."""
    table = [[0] * n_tiles for _ in range(m_tiles)]
    for tile in range(m_tiles * n_tiles):
        if tiling.tile_order == "row":
            row, column = divmod(tile, n_tiles)
        else:
            turn = tile // math.lcm(m_tiles, n_tiles)  # else the same diagonal would come again
            row, column = tile % m_tiles, (tile + turn) % n_tiles
        table[row][column] = tile % tiling.cores
    return table


def check(tiling: object) -> None:
    """Refuses what is no tiling.

    Raises:
        TypeError: not a Tiling, "library" or None.
    """
    if tiling is None or isinstance(tiling, Tiling):
        return
    if not (isinstance(tiling, str) and tiling == "library"):
        raise TypeError(
            f'tiling must be None (ascending K), "library" or a kernels.Tiling, got {tiling!r}'
        )


def resolve(tiling: Tiling | str | None, m: int, k: int, n: int, dtype: str) -> Tiling | None:
    """The tiling of one product of operands in `dtype`: what was given, or the library's choice
    (for an empty product, none).

    Raises:
        TypeError: not a Tiling, "library" or None.
    """
    check(tiling)
    if tiling is None or isinstance(tiling, Tiling):
        return tiling
    return library(m, k, n, dtype) if m and k and n else None


def library(
    m: int, k: int, n: int, dtype: str = "bfloat16", *, cores: int = 24, k_shift: bool = True
) -> Tiling:
    """The tiling that `mat_mul_v3` would choose for row-major `a (m, k)` and `b (k, n)`.

    Documented (ops-nn): the base tile 128 x 256 x 128 bytes; smaller ones for small outputs; fewer
    rows where that evens out the load of 24 cores; outer K tiles that fill half of L1 twice, halved
    for some shapes; multi-core split-K of 128 x 128 tiles in runs of 384 (FP32 192) of K where K >=
    384 * cores and there are few output tiles, or where K >= 27392, and for small FP32 outputs with
    K >= 6144. Assumed: where K >= 27392 and the output is large (384 * 1024 per core), one core
    walks all of K in such runs. Not modelled: rows that are no multiple of 256 bytes, transposed
    and fractal operands, operands kept in L1 as a whole.

    Whether K is shifted is decided per shape by a table that comes with the library and is not
    public; the setting CLOSE_MATMUL_K_SHIFT=1 turns it off (`k_shift=False`). Shifting every
    matmul that is not split is assumed.

    Raises:
        ValueError: a size or a number of cores below 1.
        TypeError: a dtype other than BF16, FP16, FP32.
    """
    for name, size in (("m", m), ("k", k), ("n", n), ("cores", cores)):
        if size < 1:
            raise ValueError(f"library: {name} must be at least 1, got {size}")
    if dtype not in ITEM_BYTES:
        raise TypeError(f"library: expected dtype in {tuple(ITEM_BYTES)}, got {dtype!r}")
    item = ITEM_BYTES[dtype]
    split = _split(m, k, n, item, cores)
    if split:
        return Tiling(
            base_m=128,
            base_n=128,
            base_k=256 // item,
            step_k=3,
            cores=cores,
            split_k=split,
            accumulate_in="gm",
        )
    base_m, base_n, k_bytes = _base_tile(m, n, cores)
    base_k = k_bytes // item
    step_k = _step_k(base_m, base_n, k_bytes, k * item)
    if cores == 24 and (base_m, base_n) == (128, 256):
        base_m = _even_rows(m, n, base_m, base_n, cores)
        if base_m == 128 and step_k == 8 and item == 2 and _halves_step(m, k, n):
            step_k = 4
    return Tiling(
        base_m=base_m, base_n=base_n, base_k=base_k, step_k=step_k, cores=cores, k_shift=k_shift
    )


def _split(m: int, k: int, n: int, item: int, cores: int) -> int:
    """The cores that divide K: 1 if one core walks it in parts, 0 if it is not split at all."""
    few = 2 * -(-m // 128) * -(-n // 128) < cores
    if k >= _LONG_K and m * n >= _CORE_K * 1024 * cores:
        return 1
    if (k >= _CORE_K * cores and few) or k >= _LONG_K:
        return cores
    if item == 4 and max(m, n) <= 64 and k >= 6144:
        return min(cores, 8 + (k - 6144) // 1024 + -(-m // 16) + -(-n // 16))
    return 0


def _base_tile(m: int, n: int, cores: int) -> tuple[int, int, int]:
    """Rows, columns and bytes of K of the base tile, before rows are evened out."""
    if min(m, n) >= 256 and -(-m // 128) * -(-n // 256) >= cores:
        return 128, 256, 128
    candidates = []
    for largest, columns, k_bytes in ((128, 256, 128), (128, 128, 256), (64, 512, 64)):
        n_tiles = -(-n // columns)
        rows = min(_up(max(m // max(cores // n_tiles, 1), 1), 16), largest)
        rounds = -(-(-(-m // rows) * n_tiles) // cores)
        candidates.append(((rows + columns) * rounds, rows, columns, k_bytes))
    _, rows, columns, k_bytes = min(candidates, key=lambda candidate: candidate[0])
    if 128 < m < 256:
        columns = min(columns, 128)
    elif 128 < n < 256:
        rows = min(rows, 128)
    return rows, columns, k_bytes


def _step_k(base_m: int, base_n: int, k_bytes: int, row_bytes: int) -> int:
    """Mmad calls per outer K tile: the larger of what A and B keep in L1 at a time."""
    depth_a, depth_b = (_L1_BYTES // 2 // (base * k_bytes) for base in (base_m, base_n))
    if (depth_a * base_m + depth_b * base_n) * k_bytes > _L1_BYTES:
        depth_a, depth_b = (depth_a // 2, depth_b) if base_m <= base_n else (depth_a, depth_b // 2)
    steps = (_whole_lines(depth // 2, k_bytes, row_bytes) for depth in (depth_a, depth_b))
    low, high = sorted(max(step, 1) for step in steps)
    return high // low * low


def _whole_lines(step: int, k_bytes: int, row_bytes: int) -> int:
    """`step` cut down so that a load is a multiple of 512 (or else 256) bytes of a row."""
    if step * k_bytes >= row_bytes:
        return step
    for line in (512, 256):
        if step * k_bytes > line:
            return step * k_bytes // line * line // k_bytes
    return step


def _halves_step(m: int, k: int, n: int) -> bool:
    """Shapes for which the library loads 4 instead of 8 base tiles of K at a time."""
    if m * n <= 128 * 256 * 24 or m % 16384 == 0 or n % 16384 == 0:
        return False
    aligned = m % 256 == n % 256 == k % 256 == 0 and min(m, n) >= 768 and k & (k - 1) != 0
    middle = range(1280, 5121)
    return (
        aligned
        or (10368 <= m <= 18000 and n in middle and k in middle)
        or (13788 <= k <= 19304 and m in middle and n in middle)
        or (320000 <= m <= 380000 and 960 <= n <= 3500 and 1280 <= k <= 3328)
    )


def _even_rows(m: int, n: int, base_m: int, base_n: int, cores: int) -> int:
    """Fewer rows per tile where the last round of tiles would leave cores idle."""
    m_tiles, n_tiles = -(-m // base_m), -(-n // base_n)
    if m_tiles * n_tiles < 4 * cores:
        return _up(-(-m // (_up(m_tiles * n_tiles, cores) // n_tiles)), 16)
    if 128 < m <= 672:
        return _up(-(-m // m_tiles), 16)
    return base_m


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
