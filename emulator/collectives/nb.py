"""Non-uniform Bruck (HCCL's NB): ceil(log2 n) steps for each half, any n.

In step k of an all_gather every rank passes all it holds, up to 2^k blocks, to the rank 2^k below;
the last step passes only what is missing there. A reduction runs the same steps backwards.

Source: HCCL's documentation of NB, ceil(log2 n) alpha + (n-1)/n of the bytes (documented); Bruck et
al. (1997).
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.levels import Blocks, travel
from emulator.collectives.schedule import IntArray, Round


def reduce(members: IntArray, blocks: Blocks, slots: int) -> tuple[list[Round], IntArray]:
    """Ends at the owners."""
    owners = np.arange(len(blocks))
    steps = [
        [(destination, source) for source, destination in hops] for hops in _hops(len(members))
    ]
    return travel(members, blocks, owners, steps[::-1], reduce=True), owners


def spread(members: IntArray, blocks: Blocks, holders: IntArray, slots: int) -> list[Round]:
    """From the holders."""
    return travel(members, blocks, holders, _hops(len(members)), reduce=False)


def _hops(m: int) -> list[list[tuple[int, int]]]:
    distances = [1 << k for k in range((m - 1).bit_length())]
    return [
        [(-at, -at - distance) for at in range(min(distance, m - distance))]
        for distance in distances
    ]
