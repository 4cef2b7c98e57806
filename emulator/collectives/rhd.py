"""Recursive halving-doubling: log2 n steps for each half; partners are n/2, n/4, ..., 1 apart.

If n is no power of two, p = 2^floor(log2 n) and the first 2 (n - p) members form pairs: the first
of a pair hands all its data to the second beforehand and receives the result at the end.

Source: HCCL's documentation of RHD, log2 n alpha + (n-1)/n of the bytes for each half (documented);
which members pair up is Rabenseifner's choice (assumed).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, runs, send
from emulator.collectives.schedule import IntArray, Round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Halving. Each pair's second member ends with both blocks of the pair."""
    core, extra = _core(len(members))
    total = len(blocks)
    pair, q = 2 * np.arange(extra), np.arange(len(core))
    rounds = send(members, blocks, pair, pair + 1, 0, reduce=True, count=total)
    distance = len(core) // 2
    while distance:  # the half of what is still shared that is the other's
        first, count = _owned_by((q ^ distance) // distance * distance, distance, extra, total)
        to = core[q ^ distance]
        rounds += send(members, blocks, core, to, first, reduce=True, count=count)
        distance //= 2
    return rounds, core[_core_of(np.arange(total), extra)]


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """Doubling, after what is not where halving would leave it has been moved there."""
    core, extra = _core(len(members))
    home = _core_of(np.asarray(holders), extra)
    every = np.arange(len(blocks))
    rounds = send(members, blocks, np.asarray(holders), core[home], every, reduce=False)
    q = np.arange(len(core))
    distance = 1
    while distance < len(core):
        first, count = _owned_by(q // distance * distance, distance, extra, len(blocks))
        to = core[q ^ distance]
        rounds += send(members, blocks, core, to, first, reduce=False, count=count)
        distance *= 2
    pair = 2 * np.arange(extra)
    lacking, block, count = runs(np.asarray(holders) != pair[:, None])
    to = pair[lacking]
    return rounds + send(members, blocks, to + 1, to, block, reduce=False, count=count)


def _core(m: int) -> tuple[IntArray, int]:
    """The positions that take part in every step, and how many pairs there are."""
    size = 1 << (m.bit_length() - 1)
    extra = m - size
    q = np.arange(size)
    return np.where(q < extra, 2 * q + 1, q + extra), extra


def _core_of(position: IntArray, extra: int) -> IntArray:
    return np.where(position < 2 * extra, position // 2, position - extra)


def _owned_by(q: IntArray, many: int, extra: int, total: int) -> tuple[IntArray, IntArray]:
    """(first, count) of the blocks, of `total`, whose owners belong to the `many` core members from
    each `q` on.
    """
    first, end = (np.minimum(np.where(x < extra, 2 * x, x + extra), total) for x in (q, q + many))
    return first, end - first
