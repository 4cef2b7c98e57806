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
when both are alike. The first load and the last instructions and store overlap with nothing. In a
kernel that loads the operands of one instruction at a time, without the large packets that the
library's have, loads and L1 to L0 take turns (inferred: four such kernels of asc-devkit take the
sum of both within 2 %).

Every term grows with m, k, n and the groups for a given tile, and falls with no rate that grows.
A matrix whose rows (of A) or columns (of B) lie along K is loaded row by row, a piece of K of each;
one that lies across K in rows as wide as the tile; fractals come in one piece. A product of a
single row runs in the matrix unit's mode for one, which takes that row alone into L0A instead of a
whole fractal; the weights' way, and so nearly all of its time, is that of 16 rows.

Packed rows lie one after the other as in an array; if they are no multiple of what the cache hands
out at once, a piece of one touches more of it than it fills: where a row starts at multiples of g,
a piece of len bytes touches 1 + (ceil(len / g) - 1) g / 512 requests of 512 bytes on average. The
vector cores may copy such an operand into padded rows first; the quicker way is taken. Padded rows
are whole lines, each of them.

Arrays are flat, every tiling of the first share before those of the second: for a few hundred
numbers NumPy takes longer to broadcast than to compute.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emulator.chip.vector import copy_time
from emulator.machines import Chip

Groups = tuple[tuple[int, int], ...]
"""Rows of the groups: (rows, number of groups that have so many)."""

Share = tuple[Groups, int]
"""What one die does: its groups and its n."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tilings:
    """Tilings as arrays of one length, once for each share of the work: `base` are rows and columns
    of a tile, then the same in whole fractals; `chunk` is bytes of K per matrix instruction and
    row, `step` instructions per load and `load` the bytes of a row that they take; `pieces` are the
    bytes of a row of A and of B that lies along K which L1 takes at a time, and `row` what such a
    row takes of a core's time, in cycles per byte; `alone`: a tile takes more than half of L0C, so
    that no other can be summed beside it; `narrow`: for products whose rows are one tile. `parts`
    are those of K, 0 for all of it, and `split_s` seconds because of them; `whole`: K is never
    divided; `turns`: L1 holds the operands of one instruction, so that loads into it and from it
    take turns.
    """

    base: np.ndarray
    chunk: np.ndarray
    step: np.ndarray
    load: np.ndarray
    pieces: np.ndarray
    row: np.ndarray
    alone: np.ndarray
    narrow: np.ndarray
    split_k: np.ndarray
    parts: np.ndarray
    split_s: np.ndarray
    whole: bool
    turns: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What does not depend on a tiling or on how dies divide the work.

    Attributes:
        item, out: bytes per element of the operands and of the result.
        scaled: integers become other numbers on their way out.
        a_layout, b_layout: an operand lies in "rows" along K, in "columns" (rows across K) or in
            fractals ("nz").
        warm: what the L2 cache can hold of the operands is in it.
        packed: rows lie one after the other, not padded to whole lines.
        starts: of A and B, the bytes at multiples of which rows start, if that is less than what
            the cache hands out at once, or else 0.
    """

    k: int
    dtype: str
    item: float
    out: float
    scaled: bool
    a_layout: str
    b_layout: str
    warm: bool
    packed: bool
    starts: tuple[int, int]


Row = tuple[int, int, int]
"""base_m, base_n and split_k of one tiling."""


def tilings_of(
    rows: Sequence[Row],
    chunks: Sequence[int],
    steps: Sequence[int],
    shares: int,
    chip: Chip,
    turns: bool = False,
) -> Tilings:
    """Tilings as arrays, with matrix instructions of `chunks` bytes. L1 takes `steps` of them of
    each row at a time if they fit its share; the pipeline fills with as much of a row as the base
    tile loads.
    """
    e = chip.engines
    m, n, split = np.array(list(rows) * shares, float).T.copy()
    chunk, most = np.array(list(chunks) * shares, float), np.array(list(steps) * shares, float)
    step = np.clip(e.step_k * e.chunk_bytes(chip.base_m, chip.base_n) // chunk, 1, most)
    fits = np.array([[e.row_bytes(base) for base in row[:2]] for row in rows] * shares).T
    pieces = np.clip(fits // chunk, 1, most) * chunk
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
        load=step * chunk,
        pieces=pieces,
        row=np.maximum(1 / e.load_nd_bytes_per_cycle, e.load_row_cycles / pieces),
        alone=(m * n * 8 > e.l0c_bytes).astype(float),
        narrow=np.array([row[:2] in e.narrow and row[2] == 1 for row in rows] * shares),
        split_k=split,
        parts=np.where(split > 1, split, 0.0),
        split_s=np.where(split > 1, e.split_k_s, 0.0),
        whole=bool((split == 1).all()),
        turns=turns,
    )


@functools.lru_cache(maxsize=64)
def _family(chip: Chip, shares: int, narrow: bool, split: bool) -> Tilings:
    """The tilings that the library of a chip chooses from, for so many shares."""
    e = chip.engines
    rows = [(bm, bn, 1) for bm, bn in (*e.tiles, *(e.narrow if narrow else ()))]
    rows += [(bm, bn, parts) for parts in (2, 4, 8, 16) for bm, bn in (e.splits if split else ())]
    chunks = [e.chunk_bytes(bm, bn) for bm, bn, _ in rows]
    return tilings_of(rows, chunks, [e.l1_bytes // chunk for chunk in chunks], shares, chip)


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


class Best(NamedTuple):
    """The quickest share and tiling, as numbers, which operands are copied into padded rows first,
    and its seconds by engine.
    """

    share: int
    tiling: int
    padded: tuple[str, ...]
    seconds: dict[str, float]


def best(
    shares: Sequence[Share], product: Product, tilings: Tilings, chip: Chip, cores: int
) -> Best:
    """The quickest share, tiling and treatment of unaligned rows (the first of equals). `tilings`
    are for as many shares.

    The library divides K only if it has few tiles: for less than half of the cores.
    """
    found = _times(shares, product, tilings, chip, cores)
    p = chip.engines.overlap
    least = found.longer + found.rest
    count = len(tilings.chunk)
    if count > len(shares) and not tilings.whole:
        least[..., (tilings.parts > 0) & (found.tiles > cores / 2)] = np.inf
    if tilings.narrow.any():
        least[..., tilings.narrow & (found.m_tiles > 1)] = np.inf
    least, longer, shorter, rest = (
        x.ravel() for x in (least, found.longer, found.shorter, found.rest)
    )
    # What takes longer with a perfect overlap of its engines than another with theirs cannot win.
    first = least.argmin()
    near = np.flatnonzero(least <= _norm(longer[first], shorter[first], p) + rest[first])
    time_s = _norm(longer[near], shorter[near], p) + rest[near]
    way, at = divmod(int(near[time_s.argmin()]), count)
    share = at * len(shares) // count
    parts = _parts(found, way * count + at, at, float(time_s.min()), chip, cores)
    parts["pad_s"] = float(found.pad[way, share])
    unaligned = [name for name, start in zip("ba", product.starts[::-1], strict=True) if start]
    padded = tuple(name for i, name in enumerate(unaligned) if way >> i & 1)
    return Best(share, at, padded[::-1], parts)


_NOT_COPIED = np.array([[1.0], [0.0]])


class _Times(NamedTuple):
    """Seconds by engine for each share of the work and each tiling: `longer` and `shorter` of what
    overlaps, `rest` of what nothing hides, `fixed` of these what does not grow with the work.

    Where a copy may pay, each operand with unaligned rows adds an axis in front, of length 2: rows
    as they are, or copied into padded ones. `pad` are seconds of copies, by way and share.
    """

    longer: np.ndarray
    shorter: np.ndarray
    rest: np.ndarray
    pad: np.ndarray
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
    byte_s = rounds / (t.split_k * rate)
    loads = [tile_m * a_row * byte_s, tile_n * b_row * byte_s]
    more: list[float | np.ndarray] = [0.0, 0.0]  # because rows are unaligned
    for i, (layout, tile) in enumerate(((product.a_layout, tile_m), (product.b_layout, tile_n))):
        if start := product.starts[i]:
            piece = np.minimum(t.pieces[i], own_bytes) if layout == "rows" else tile * item
            more[i] = loads[i] * (_touched(piece, start, e.request_bytes) - 1)
    pad_s = np.zeros((1, len(shares)))
    if any(product.starts) and np.max(more[0] + more[1]) > copy_time(0, 0, chip):  # a copy may pay
        pad_s = np.array([_pads(*share, product, chip) for share in shares]).T
        if product.starts[0]:
            more[0] = more[0] * (_NOT_COPIED[:, None] if product.starts[1] else _NOT_COPIED)
        if product.starts[1]:
            more[1] = more[1] * _NOT_COPIED
    l2_s = loads[0] + loads[1] + more[0] + more[1]
    own_s = _own(product.a_layout, tile_m, own_k, own_bytes, item, t.row[0], chip)
    own_s = own_s + _own(product.b_layout, tile_n, own_k, own_bytes, item, t.row[1], chip)
    own_s *= rounds * cycle_s
    cold = np.minimum(fetched, a_bytes * n_tiles + b_one * m_tiles)
    if product.warm:
        cold = np.maximum(cold - chip.l2_bytes, 0)
    miss_s = cold / cores
    if not product.warm:
        miss_s = np.maximum(tile_n * own_bytes, miss_s)
    miss_s *= cycle_s / e.load_cold_bytes_per_cycle
    load_s = l2_s + cold * max(0.0, 1 / memory - 1 / (rate * cores))
    load_s = np.maximum(load_s, np.maximum(own_s, miss_s))
    load_s += store_s
    if t.turns:
        load_s = load_s + l0_s

    # The pipeline fills with one step of loads and drains with one of the cube and a store.
    front_s = np.maximum(mac_s + wait_s, l0_s)
    front_s += (tile_m + tile_n) * (step_bytes / rate)
    back_s = macs * step_bytes
    back_s += np.minimum(t.step, mmads) * head_s
    back_s = back_s + load_s
    fixed_s = (rounds > 1) * e.tiling_s
    if not t.whole:
        fixed_s += t.split_s + t.parts * partial_s
    fixed_s += chip.launch_s + (e.int8_s if product.scaled else 0.0)
    rest_s = one_store_s + fixed_s
    if len(pad_s) > 1:
        rest_s = (rest_s.reshape(1, -1, count) + pad_s[..., None]).reshape(back_s.shape)
    return _Times(
        np.maximum(front_s, back_s),
        np.minimum(front_s, back_s),
        rest_s,
        pad_s,
        fixed_s,
        *(m_tiles, tiles, rounds, mac_s, wait_s, l0_s, l2_s, own_s, miss_s, cold, load_s),
        *(store_s, one_store_s),
    )


def _own(
    layout: str,
    tile: np.ndarray,
    own_k: int | np.ndarray,
    own_bytes: float | np.ndarray,
    item: float,
    row: np.ndarray,
    chip: Chip,
) -> np.ndarray:
    """Cycles of one core's load of one operand of a tile, of `tile` rows of a or columns of b:
    rows along K, rows across it, or fractals in one piece.
    """
    e = chip.engines
    if layout == "nz":
        return tile * (own_bytes / e.load_nz_bytes_per_cycle)
    if layout == "rows":
        return tile * np.maximum(own_bytes * row, e.load_row_cycles)
    return own_k * np.maximum(tile * (item / e.load_nd_bytes_per_cycle), e.load_row_cycles)


def _pads(groups: Groups, columns: int, product: Product, chip: Chip) -> list[float]:
    """Seconds in which a share's unaligned operands are copied into padded rows: none of them, B
    (if it is unaligned), A, both.
    """
    used = sum(c for r, c in groups if r)
    ways = [0.0]
    for i, vectors in ((1, used * columns), (0, sum(r * c for r, c in groups))):  # as long as K
        if product.starts[i]:
            along = (product.a_layout, product.b_layout)[i] == "rows"
            rows = vectors if along else used * product.k
            pad_s = copy_time(rows, math.ceil(vectors * product.k * product.item), chip)
            ways += [way_s + pad_s for way_s in ways]
    return ways


def _touched(piece: np.ndarray, start: int, request: int) -> np.ndarray:
    """What is moved for each byte of rows that are cut in pieces and start at multiples of `start`
    bytes: all requests that a piece touches; of a piece shorter than one, that piece again for each
    request more than one.
    """
    requests = np.ceil(piece * (1 / start)) * (start / request)
    requests += 1 - start / request
    requests *= np.minimum(piece, request)
    requests /= piece
    return requests


def _parts(
    found: _Times, at: int, tiling: int, time_s: float, chip: Chip, cores: int
) -> dict[str, float]:
    """Seconds by engine of one of the tilings, `at` where unaligned rows add axes. Of the loads,
    `memory_s` is what memory's rate alone would take, `l2_s` the rest.
    """
    e = chip.engines
    rate = min(
        e.load_bytes_per_cycle * chip.clock_hz * e.sustained_clock, chip.l2_bytes_per_s / cores
    )

    def one(table: np.ndarray) -> float:
        return float(table[tiling] if table.ndim == 1 else table.flat[at])

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
    k_row = k * item + (0 if product.packed else _odd(k * item, line))
    # Bytes of a row of A and of a column of B, and of all of A and one B.
    a_row = k_row if product.a_layout == "rows" else k * item
    b_row = k_row if product.b_layout == "rows" else k * item
    a_bytes = rows * a_row
    if product.a_layout == "columns" and not product.packed:
        a_bytes += k * sum(c * _odd(r * item, line) for r, c in groups)
    b_one = columns * b_row
    if product.b_layout == "columns" and not product.packed:
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


def _odd(row_bytes: float, line: int) -> float:
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
