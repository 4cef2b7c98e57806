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
All arrays have the shape (shares, tilings).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from emulator.machines import Chip

Groups = tuple[tuple[int, int], ...]
"""Rows of the groups: (rows, number of groups that have so many)."""

Share = tuple[Groups, int]
"""What one die does: its groups and its n."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tilings:
    """Tilings as arrays of one length: `wide` are the base tile in whole fractals, `chunk` is bytes
    of K per matrix instruction and row, `step` instructions per load, `row` what a row-major A
    takes of a core's time, in cycles per byte of a row.
    """

    base_m: np.ndarray
    base_n: np.ndarray
    wide_m: np.ndarray
    wide_n: np.ndarray
    chunk: np.ndarray
    step: np.ndarray
    split_k: np.ndarray
    row: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What does not depend on a tiling or on how dies divide the work. `item` and `out` are bytes
    per element; `warm`: what the L2 cache can hold of the operands is in it.
    """

    k: int
    dtype: str
    item: int
    out: int
    b_nz: bool
    warm: bool


Row = tuple[int, int, int]
"""base_m, base_n and split_k of one tiling."""


def tilings_of(rows: Sequence[Row], chunk: np.ndarray, step: int, chip: Chip) -> Tilings:
    """Tilings as arrays, `step` matrix instructions of `chunk` bytes per load."""
    e = chip.engines
    m, n, split = np.array(rows, float).T
    wide_m = np.ceil(m / chip.cube_m) * chip.cube_m
    wide_n = np.ceil(n / chip.cube_n) * chip.cube_n
    row = np.maximum(1 / e.load_nd_bytes_per_cycle, e.load_row_cycles / (step * chunk))
    steps = np.full(len(rows), float(min(step, e.step_k)))
    return Tilings(m, n, wide_m, wide_n, chunk, steps, split, row)


@functools.lru_cache(maxsize=64)
def family(chip: Chip) -> Tilings:
    """All tilings that the library of a chip chooses from."""
    e = chip.engines
    rows = [(bm, bn, 1) for bm, bn in e.tiles]
    rows += [(bm, bn, split) for split in (2, 4, 8, 16) for bm, bn in e.splits]
    chunk = np.array([e.chunk_bytes(bm, bn) for bm, bn, _ in rows], float)
    return tilings_of(rows, chunk, e.step_k, chip)


def best(
    shares: Sequence[Share], product: Product, tilings: Tilings, chip: Chip, cores: int
) -> tuple[int, int, dict[str, float]]:
    """The quickest share and tiling (the first of equals), as numbers, and its seconds by engine.

    The library divides K only if it has few tiles: for less than half of the cores.
    """
    found = times(shares, product, tilings, chip, cores)
    time_s = found["time_s"]
    if time_s.shape[1] > 1:
        many = (tilings.split_k > 1) & (2 * found["tiles"] > cores)
        time_s = np.where(many, np.inf, time_s)
    which, at = divmod(int(time_s.argmin()), time_s.shape[1])
    return (
        which,
        at,
        {name: float(value[min(which, len(value) - 1)][at]) for name, value in found.items()},
    )


def times(
    shares: Sequence[Share], product: Product, tilings: Tilings, chip: Chip, cores: int
) -> dict[str, np.ndarray]:
    """Seconds by engine for each share of the work and each tiling, on `cores` of the chip."""
    e, t, item = chip.engines, tilings, product.item
    clock = chip.clock_hz * e.sustained_clock
    rate = min(e.load_bytes_per_cycle * clock, chip.l2_bytes_per_s / cores)
    plain = np.array([_plain(*share, product, chip) for share in shares]).T[:, :, None]
    n, most, wide_m, wide_n, a_row, a_bytes, b_one, fetched, store_s, partial_s = plain

    # The busiest core: tiles, their size, their K.
    m_tiles, n_tiles = _m_tiles(shares, t), np.ceil(n / t.base_n)
    tiles = m_tiles * n_tiles
    rounds = np.ceil(tiles * t.split_k / cores)
    tile_m, tile_n = np.minimum(t.base_m, most), np.minimum(t.base_n, n)
    own_k = np.ceil(product.k / t.split_k)
    k_bytes = np.ceil(own_k * (item / 32)) * 32
    mmads = np.ceil(k_bytes / t.chunk)

    # Cube, with the stores between its tiles; L1 to L0.
    full_m, full_n = np.minimum(t.wide_m, wide_m), np.minimum(t.wide_n, wide_n)
    macs = full_m * full_n / (chip.cube_macs_per_cycle(product.dtype) * item * clock)
    one_store_s = tile_m * tile_n * (product.out / (e.store_bytes_per_cycle * clock))
    wait_s = np.where(t.base_m * t.base_n * 8 > e.l0c_bytes, rounds - 1, 0.0) * one_store_s
    mac_s = rounds * (macs * k_bytes + mmads * (e.head_cycles / clock))
    per_byte = full_m / (e.l0a_bytes_per_cycle * clock) + full_n / (e.l0b_bytes_per_cycle * clock)
    l0_s = rounds * (per_byte * k_bytes + mmads * (e.l0_head_cycles / clock))

    # Memory to L1. A byte of A or B is cold once, or as often as the cache forgets it.
    size = tile_m + tile_n
    own_bytes = own_k * item
    l2_s = rounds * (tile_n * own_bytes + tile_m * (a_row / t.split_k)) / rate
    a_s = tile_m * np.maximum(own_bytes * t.row, e.load_row_cycles)
    if product.b_nz:
        b_s = tile_n * own_bytes / e.load_nz_bytes_per_cycle
    else:
        b_s = own_k * np.maximum(tile_n * (item / e.load_nd_bytes_per_cycle), e.load_row_cycles)
    own_s = rounds * (a_s + b_s) / clock
    cold = np.minimum(fetched, a_bytes * n_tiles + b_one * m_tiles)
    if product.warm:
        cold = np.maximum(cold - chip.l2_bytes, 0)
    memory = chip.usable_memory_bytes_per_s
    cold_s = cold * max(0.0, 1 / memory - 1 / (rate * cores))
    unique = 0.0 if product.warm else tile_n * own_bytes
    miss_s = np.maximum(unique, cold / cores) / (e.load_cold_bytes_per_cycle * clock)
    load_s = np.maximum(np.maximum(l2_s + cold_s, own_s), miss_s) + store_s

    # The pipeline fills with one step of loads and drains with one of the cube and a store.
    step_bytes = np.minimum(t.step * t.chunk, k_bytes)
    fill_s = step_bytes * size / rate
    drain_s = macs * step_bytes + np.minimum(t.step, mmads) * (e.head_cycles / clock)
    busy_s = _norm(np.maximum(mac_s + wait_s, l0_s) + fill_s, load_s + drain_s, e.overlap)
    fixed_s = chip.launch_s + (e.int8_s if product.dtype == "int8" else 0.0)
    extra_s = np.where(rounds > 1, e.tiling_s, 0.0)
    extra_s += np.where(t.split_k > 1, e.split_k_s + t.split_k * partial_s, 0.0)
    # Of the loads, what memory's rate alone would take, and the rest.
    memory_s = np.maximum(cold / memory, np.where(miss_s > l2_s + cold_s, miss_s, 0.0))
    cached_s = np.maximum(l2_s - np.minimum(cold / (rate * cores), l2_s), own_s)
    return {
        "time_s": busy_s + one_store_s + fixed_s + extra_s,
        "cube_s": mac_s,
        "l0_s": l0_s,
        "l2_s": cached_s,
        "memory_s": memory_s,
        "load_s": load_s,
        "store_s": store_s + wait_s + one_store_s,
        "fixed_s": fixed_s + extra_s,
        "tiles": tiles,
        "rounds": rounds,
    }


def _plain(groups: Groups, columns: int, product: Product, chip: Chip) -> tuple[float, ...]:
    """What one share has of everything, whatever its tiling."""
    line, half = chip.engines.line_bytes, chip.l2_bytes / 2
    rows, most = sum(r * c for r, c in groups), max(r for r, _ in groups)
    b_row = columns * product.item
    a_row = product.k * product.item + _odd(product.k * product.item, line)
    b_one = product.k * (b_row if product.b_nz else b_row + _odd(b_row, line))
    a_bytes, b_bytes = rows * a_row, sum(c for r, c in groups if r) * b_one
    # One operand is walked in blocks of half the cache, the other is read again for each.
    a_first = a_bytes + b_bytes * max(1.0, most * a_row / half)
    b_first = b_bytes + a_bytes * max(1.0, b_one / half)
    c_row = columns * product.out
    written = rows * (c_row + _odd(c_row, line))
    spilled = max(0.0, written - chip.l2_bytes)
    return (
        float(columns),
        float(most),
        float(-(-most // chip.cube_m) * chip.cube_m),
        float(-(-columns // chip.cube_n) * chip.cube_n),
        float(a_row),
        float(a_bytes),
        float(b_one),
        float(min(a_first, b_first)),
        written / (chip.engines.store_share * chip.l2_bytes_per_s)
        + spilled / chip.usable_memory_bytes_per_s,
        2.0 * rows * columns * 4 / chip.l2_bytes_per_s,
    )


def _odd(row_bytes: int, line: int) -> int:
    """What moving a row in whole lines adds to it; rows shorter than a line share lines."""
    return -row_bytes % line if row_bytes > line else 0


def _m_tiles(shares: Sequence[Share], tilings: Tilings) -> np.ndarray:
    """Row tiles of all groups of each share."""
    found = []
    for groups, _ in shares:
        counted = [np.ceil(rows / tilings.base_m) * count for rows, count in groups]
        found.append(functools.reduce(np.add, counted))
    return np.array(found)


def _norm(a: np.ndarray, b: np.ndarray, p: float) -> np.ndarray:
    """(a^p + b^p)^(1/p), without overflow."""
    larger = np.maximum(a, b)
    return larger * (1 + (np.minimum(a, b) / larger) ** p) ** (1 / p)
