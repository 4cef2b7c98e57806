"""Recursive halving-doubling: log2 n steps for each half; partners are n/2, n/4, ..., 1 apart.

If n is no power of two, p = 2^floor(log2 n) and the first 2 (n - p) members form pairs: the first
of a pair hands all its data to the second beforehand and receives the result at the end.

Source: HCCL's documentation of RHD, log2 n alpha + (n-1)/n of the bytes for each half (documented);
which members pair up is Rabenseifner's choice (assumed).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, grid, send
from emulator.collectives.schedule import IntArray, Round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Halving. Each pair's second member ends with both blocks of the pair."""
    core, extra = _core(len(members))
    home = _core_of(np.arange(len(blocks)), extra)
    pair, block = grid(extra, len(blocks))
    rounds = send(members, blocks, 2 * pair, 2 * pair + 1, block, reduce=True)
    q, block = grid(len(core), len(blocks))
    apart = home[block] ^ q
    distance = len(core) // 2
    while distance:  # those that still share a block agree in the bits above `distance`
        moves = (apart < 2 * distance) & (apart >= distance)
        source, kept = q[moves], block[moves]
        rounds += send(members, blocks, core[source], core[source ^ distance], kept, reduce=True)
        distance //= 2
    return rounds, core[home]


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Doubling, after what is not where halving would leave it has been moved there."""
    core, extra = _core(len(members))
    home = _core_of(np.asarray(holders), extra)
    every = np.arange(len(blocks))
    rounds = send(members, blocks, np.asarray(holders), core[home], every, reduce=False)
    q, block = grid(len(core), len(blocks))
    apart = home[block] ^ q
    distance = 1
    while distance < len(core):
        source, known = q[apart < distance], block[apart < distance]
        rounds += send(members, blocks, core[source], core[source ^ distance], known, reduce=False)
        distance *= 2
    pair, block = grid(extra, len(blocks))
    lacks = np.asarray(holders)[block] != 2 * pair
    pair, block = pair[lacks], block[lacks]
    return rounds + send(members, blocks, 2 * pair + 1, 2 * pair, block, reduce=False)


def _core(m: int) -> tuple[IntArray, int]:
    """The positions that take part in every step, and how many pairs there are."""
    size = 1 << (m.bit_length() - 1)
    extra = m - size
    q = np.arange(size)
    return np.where(q < extra, 2 * q + 1, q + extra), extra


def _core_of(position: IntArray, extra: int) -> IntArray:
    return np.where(position < 2 * extra, position // 2, position - extra)
