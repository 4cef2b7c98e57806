"""Seconds of one matmul on one die for many tilings at once: the busiest core, engine by engine.

The output is cut in base tiles. Core after core takes one, or a share of K of one; the busiest core
has `rounds` of them. Its engines work at the same time:

- cube: matrix instructions of one chunk of K, each its multiply-adds plus a head; where a tile
  fills more than half of L0C, the store of the one before comes in between;
- L1 to L0A and L0B, one after the other;
- load, memory to L1: rows of A and columns of B of each tile, at the rate that a core has while all
  load, or that its own rows allow. What the L2 cache does not have comes from memory at memory's
  rate; so does what it cannot keep: of two operands, the one is walked in blocks of half the cache,
  the other is read again for each. Results go out through the cache and share the way.

Cube (or L1) and load overlap, joined by a norm with a high exponent: nearly the longer one, more
when both are alike. The first load and the last instructions and store overlap with nothing.

Every term grows with m, k, n and the groups for a given tile, and falls with no rate that grows.
A matrix whose rows (of A) or columns (of B) lie along K is loaded row by row, a step of K of each;
one that lies across K in rows as wide as the tile; fractals come in one piece. A product of a
single row runs in the matrix unit's mode for one, which takes that row alone into L0A instead of a
whole fractal; the weights' way, and so nearly all of its time, is that of 16 rows.

Arrays are flat, every tiling of the first share before those of the second: for a few hundred
numbers NumPy takes longer to broadcast than to compute.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emulator.machines import Chip

Groups = tuple[tuple[int, int], ...]
"""Rows of the groups: (rows, number of groups that have so many)."""

Share = tuple[Groups, int]
"""What one die does: its groups and its n."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tilings:
    """Tilings as arrays of one length, once for each share of the work: `base` are rows and columns
    of a tile, then the same in whole fractals; `chunk` is bytes of K per matrix instruction and
    row, `step` instructions per load and `load` the bytes of a row that they take; `row` is what
    rows along K take of a core's time, in cycles per byte of a row; `alone`: a tile takes more than
    half of L0C, so that no other can be summed beside it; `narrow`: for products whose rows are one
    tile. `parts` are those of K, 0 for all of it, and `split_s` seconds because of them; `whole`: K
    is never divided.
    """

    base: np.ndarray
    chunk: np.ndarray
    step: np.ndarray
    load: np.ndarray
    row: np.ndarray
    alone: np.ndarray
    narrow: np.ndarray
    split_k: np.ndarray
    parts: np.ndarray
    split_s: np.ndarray
    whole: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What does not depend on a tiling or on how dies divide the work. `item` and `out` are bytes
    per element; an operand lies in "rows" along K, in "columns" (rows across K) or in fractals
    ("nz"); `warm`: what the L2 cache can hold of the operands is in it.
    """

    k: int
    dtype: str
    item: int
    out: int
    a_layout: str
    b_layout: str
    warm: bool


Row = tuple[int, int, int]
"""base_m, base_n and split_k of one tiling."""


def tilings_of(
    rows: Sequence[Row], chunks: Sequence[int], steps: Sequence[int], shares: int, chip: Chip
) -> Tilings:
    """Tilings as arrays, `steps` matrix instructions of `chunks` bytes per load."""
    e = chip.engines
    m, n, split = np.array(list(rows) * shares, float).T.copy()
    chunk, step = np.array(list(chunks) * shares, float), np.array(list(steps) * shares, float)
    load = step * chunk
    return Tilings(
        base=np.array(
            [
                *(m, n),
                np.ceil(m / chip.cube_m) * chip.cube_m,
                np.ceil(n / chip.cube_n) * chip.cube_n,
            ]
        ),
        chunk=chunk,
        step=step,
        load=load,
        row=np.maximum(1 / e.load_nd_bytes_per_cycle, e.load_row_cycles / load),
        alone=(m * n * 8 > e.l0c_bytes).astype(float),
        narrow=np.array([row[:2] in e.narrow and row[2] == 1 for row in rows] * shares),
        split_k=split,
        parts=np.where(split > 1, split, 0.0),
        split_s=np.where(split > 1, e.split_k_s, 0.0),
        whole=bool((split == 1).all()),
    )


@functools.lru_cache(maxsize=64)
def _family(chip: Chip, shares: int, narrow: bool, split: bool) -> Tilings:
    """The tilings that the library of a chip chooses from, for so many shares. A load takes as much
    of a row as that of the base tile.
    """
    e = chip.engines
    rows = [(bm, bn, 1) for bm, bn in (*e.tiles, *(e.narrow if narrow else ()))]
    rows += [(bm, bn, parts) for parts in (2, 4, 8, 16) for bm, bn in (e.splits if split else ())]
    chunks = [e.chunk_bytes(bm, bn) for bm, bn, _ in rows]
    load = e.step_k * e.chunk_bytes(chip.base_m, chip.base_n)
    return tilings_of(rows, chunks, [max(load // chunk, 1) for chunk in chunks], shares, chip)


def family(shares: Sequence[Share], chip: Chip) -> Tilings:
    """All tilings that the library of a chip chooses from for these shares; what none of them may
    take is left out.
    """
    rows, columns, narrow = _largest(chip)
    few = low = False
    for groups, n in shares:
        tiles = 0
        for r, c in groups:
            tiles += -(-r // rows) * c
        few |= 2 * tiles * -(-n // columns) <= chip.cube_cores
        low |= groups[0][0] <= narrow
    return _family(chip, len(shares), low, few)


@functools.lru_cache(maxsize=64)
def _largest(chip: Chip) -> tuple[int, int, int]:
    """Most rows and columns of a tile whose K may be divided, and most rows of a narrow one."""
    e = chip.engines
    rows, columns = zip(*e.splits, strict=True)
    return max(rows), max(columns), max((rows for rows, _ in e.narrow), default=0)


def best(
    shares: Sequence[Share], product: Product, tilings: Tilings, chip: Chip, cores: int
) -> tuple[int, int, dict[str, float]]:
    """The quickest share and tiling (the first of equals), as numbers, and its seconds by engine.
    `tilings` are for as many shares.

    The library divides K only if it has few tiles: for less than half of the cores.
    """
    found = _times(shares, product, tilings, chip, cores)
    longer, shorter, rest, p = found.longer, found.shorter, found.rest, chip.engines.overlap
    least = longer + rest
    count = len(least) // len(shares)
    if count > 1 and not tilings.whole:
        least[(tilings.parts > 0) & (found.tiles > cores / 2)] = np.inf
    if tilings.narrow.any():
        least[tilings.narrow & (found.m_tiles > 1)] = np.inf
    # Two engines take at most 2^(1/p) of the longer one: what takes more cannot be the quickest.
    first = least.argmin()
    near = np.flatnonzero(least <= least[first] + (2 ** (1 / p) - 1) * longer[first])
    time_s = _norm(longer[near], shorter[near], p) + rest[near]
    at = int(near[time_s.argmin()])
    return at // count, at, _parts(found, at, float(time_s.min()), chip, cores)


class _Times(NamedTuple):
    """Seconds by engine for each share of the work and each tiling: `longer` and `shorter` of what
    overlaps, `rest` of what nothing hides, `fixed` of these what does not grow with the work.
    """

    longer: np.ndarray
    shorter: np.ndarray
    rest: np.ndarray
    fixed: np.ndarray
    m_tiles: np.ndarray
    tiles: np.ndarray
    rounds: np.ndarray
    mac: np.ndarray
    wait: np.ndarray
    l0: np.ndarray
    l2: np.ndarray
    own: np.ndarray
    miss: np.ndarray
    cold: np.ndarray
    load: np.ndarray
    store: np.ndarray
    one_store: np.ndarray


def _times(
    shares: Sequence[Share], product: Product, tilings: Tilings, chip: Chip, cores: int
) -> _Times:
    """What each share of the work takes with each tiling, on `cores` of the chip."""
    e, t, item = chip.engines, tilings, product.item
    clock = chip.clock_hz * e.sustained_clock
    rate = min(e.load_bytes_per_cycle * clock, chip.l2_bytes_per_s / cores)
    memory = chip.usable_memory_bytes_per_s
    cycle_s, head_s, l0_head_s = 1 / clock, e.head_cycles / clock, e.l0_head_cycles / clock
    count = len(t.chunk) // len(shares)
    plain = np.array([_plain(*share, product, chip) for share in shares]).T.repeat(count, axis=1)
    a_row, b_row, a_bytes, b_one, fetched, store_s, partial_s, a_l0 = plain[4:]

    # What K alone decides: what one core walks of it.
    own_k: int | np.ndarray = product.k if t.whole else np.ceil(product.k / t.split_k)
    own_bytes = own_k * item
    k_bytes = -(-own_bytes // 32) * 32
    mmads = np.ceil(k_bytes / t.chunk)
    step_bytes = np.minimum(t.load, k_bytes)

    # The busiest core: tiles, their size.
    m_tiles, n_tiles = np.ceil(plain[:2] / t.base[:2])
    if any(len(groups) > 1 for groups, _ in shares):
        m_tiles = _m_tiles(shares, t.base[0, :count])
    elif (times := [groups[0][1] for groups, _ in shares]) != [1] * len(shares):
        m_tiles = m_tiles * np.array(times, float).repeat(count)
    tiles = m_tiles * n_tiles
    rounds = np.ceil((tiles if t.whole else tiles * t.split_k) / cores)
    tile_m, tile_n, full_m, full_n = np.minimum(t.base, plain[:4])

    # Cube, with the stores between its tiles; L1 to L0.
    macs = full_m * full_n
    macs *= cycle_s / (chip.cube_macs_per_cycle(product.dtype) * item)
    one_store_s = tile_m * tile_n
    one_store_s *= cycle_s * product.out / e.store_bytes_per_cycle
    wait_s = t.alone * (rounds - 1)
    wait_s *= one_store_s
    mac_s = macs * k_bytes
    mac_s += mmads * head_s
    mac_s *= rounds
    l0_s = full_m * (a_l0 * cycle_s) + full_n * (cycle_s / e.l0b_bytes_per_cycle)
    l0_s *= k_bytes
    l0_s += mmads * l0_head_s
    l0_s *= rounds

    # Memory to L1. A byte of A or B is cold once, or as often as the cache forgets it.
    l2_s = tile_m * a_row
    l2_s += tile_n * b_row
    l2_s *= rounds
    l2_s /= t.split_k * rate
    own_s = _own(product.a_layout, tile_m, own_k, own_bytes, item, t, chip)
    own_s = own_s + _own(product.b_layout, tile_n, own_k, own_bytes, item, t, chip)
    own_s *= rounds * cycle_s
    cold = np.minimum(fetched, a_bytes * n_tiles + b_one * m_tiles)
    if product.warm:
        cold = np.maximum(cold - chip.l2_bytes, 0)
    miss_s = cold / cores
    if not product.warm:
        miss_s = np.maximum(tile_n * own_bytes, miss_s)
    miss_s *= cycle_s / e.load_cold_bytes_per_cycle
    load_s = l2_s + cold * max(0.0, 1 / memory - 1 / (rate * cores))
    load_s = np.maximum(np.maximum(load_s, own_s), miss_s)
    load_s += store_s

    # The pipeline fills with one step of loads and drains with one of the cube and a store.
    front_s = np.maximum(mac_s + wait_s, l0_s)
    front_s += (tile_m + tile_n) * (step_bytes / rate)
    back_s = macs * step_bytes
    back_s += load_s
    back_s += np.minimum(t.step, mmads) * head_s
    fixed_s = (rounds > 1) * e.tiling_s
    if not t.whole:
        fixed_s += t.split_s + t.parts * partial_s
    fixed_s += chip.launch_s + (e.int8_s if product.dtype == "int8" else 0.0)
    return _Times(
        np.maximum(front_s, back_s),
        np.minimum(front_s, back_s),
        one_store_s + fixed_s,
        fixed_s,
        *(m_tiles, tiles, rounds, mac_s, wait_s, l0_s, l2_s, own_s, miss_s, cold, load_s),
        *(store_s, one_store_s),
    )


def _own(
    layout: str,
    tile: np.ndarray,
    own_k: int | np.ndarray,
    own_bytes: int | np.ndarray,
    item: int,
    tilings: Tilings,
    chip: Chip,
) -> np.ndarray:
    """Cycles of one core's load of one operand of a tile, of `tile` rows of a or columns of b:
    rows along K, rows across it, or fractals in one piece.
    """
    e = chip.engines
    if layout == "nz":
        return tile * (own_bytes / e.load_nz_bytes_per_cycle)
    if layout == "rows":
        return tile * np.maximum(own_bytes * tilings.row, e.load_row_cycles)
    return own_k * np.maximum(tile * (item / e.load_nd_bytes_per_cycle), e.load_row_cycles)


def _parts(found: _Times, at: int, time_s: float, chip: Chip, cores: int) -> dict[str, float]:
    """Seconds by engine of one of the tilings. Of the loads, `memory_s` is what memory's rate
    alone would take, `l2_s` the rest.
    """
    e = chip.engines
    rate = min(
        e.load_bytes_per_cycle * chip.clock_hz * e.sustained_clock, chip.l2_bytes_per_s / cores
    )

    def one(table: np.ndarray) -> float:
        return float(table[at])

    memory, share = chip.usable_memory_bytes_per_s, 1 / (rate * cores)
    l2_s, own_s, miss_s, cold = one(found.l2), one(found.own), one(found.miss), one(found.cold)
    slower = miss_s > l2_s + cold * max(0.0, 1 / memory - share)
    return {
        "time_s": time_s,
        "cube_s": one(found.mac),
        "l0_s": one(found.l0),
        "l2_s": max(l2_s - min(cold * share, l2_s), own_s),
        "memory_s": max(cold / memory, miss_s if slower else 0.0),
        "load_s": one(found.load),
        "store_s": one(found.store) + one(found.wait) + one(found.one_store),
        "fixed_s": one(found.fixed),
        "tiles": one(found.tiles),
        "rounds": one(found.rounds),
    }


def _plain(groups: Groups, columns: int, product: Product, chip: Chip) -> tuple[float, ...]:
    """What one share has of everything, whatever its tiling."""
    e, item, k = chip.engines, product.item, product.k
    line, half = e.line_bytes, chip.l2_bytes / 2
    rows = used = most = 0
    for r, c in groups:
        rows, used, most = rows + r * c, used + (c if r else 0), max(most, r)
    k_row = k * item + _odd(k * item, line)
    # Bytes of a row of A and of a column of B, and of all of A and one B.
    a_row = k_row if product.a_layout == "rows" else k * item
    b_row = k_row if product.b_layout == "rows" else k * item
    a_bytes = rows * a_row
    if product.a_layout == "columns":
        a_bytes += k * sum(c * _odd(r * item, line) for r, c in groups)
    b_one = columns * b_row
    if product.b_layout == "columns":
        b_one += k * _odd(columns * item, line)
    b_bytes = used * b_one
    # One operand is walked in blocks of half the cache, the other is read again for each.
    a_first = a_bytes + b_bytes * max(1.0, most * a_row / half)
    b_first = b_bytes + a_bytes * max(1.0, b_one / half)
    c_row = columns * product.out
    written = rows * (c_row + _odd(c_row, line))
    spilled = max(0.0, written - chip.l2_bytes)
    alone = e.gemv_rows / chip.cube_m if most == 1 else 1.0
    return (
        float(most),
        float(columns),
        float(-(-most // chip.cube_m) * chip.cube_m),
        float(-(-columns // chip.cube_n) * chip.cube_n),
        float(a_row),
        float(b_row),
        float(a_bytes),
        float(b_one),
        float(min(a_first, b_first)),
        written / (e.store_share * chip.l2_bytes_per_s) + spilled / chip.usable_memory_bytes_per_s,
        2.0 * rows * columns * 4 / chip.l2_bytes_per_s,
        alone / e.l0a_bytes_per_cycle,
    )


def _odd(row_bytes: int, line: int) -> int:
    """What moving a row in whole lines adds to it; rows shorter than a line share lines."""
    return -row_bytes % line if row_bytes > line else 0


def _m_tiles(shares: Sequence[Share], base_m: np.ndarray) -> np.ndarray:
    """Row tiles of all groups of each share."""
    found = []
    for groups, _ in shares:
        counted = [np.ceil(rows / base_m) * many for rows, many in groups]
        found.append(functools.reduce(np.add, counted))
    return np.concatenate(found)


def _norm(longer: np.ndarray, shorter: np.ndarray, p: float) -> np.ndarray:
    """(longer^p + shorter^p)^(1/p), without overflow."""
    return longer * (1 + (shorter / longer) ** p) ** (1 / p)
