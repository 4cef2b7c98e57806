"""Non-uniform Bruck (HCCL's NB): ceil(log2 n) steps for each half, any n.

In step k of an all_gather every rank passes all it holds, up to 2^k blocks, to the rank 2^k below;
the last step passes only what is missing there. A reduction runs the same steps backwards.

Source: HCCL's documentation of NB, ceil(log2 n) alpha + (n-1)/n of the bytes (documented); Bruck et
al. (1997).
"""

from __future__ import annotations

from emulator.collectives.levels import Hop, there_and_back


def _hops(m: int) -> list[Hop]:
    hops = []
    for distance in (1 << k for k in range((m - 1).bit_length())):
        count = min(distance, m - distance)
        hops.append(Hop(1 - count, 1, count, -distance))
    return hops


reduce, spread = there_and_back(_hops)
