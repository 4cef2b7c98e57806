"""Non-uniform hierarchical ring (HCCL's NHR): ceil(log2 n) steps for each half, any n.

Seen from its owner, the positions that a block has reached are 0, then 0 and 2^(k-1), then all
multiples of 2^(k-2), and so on: every holder sends to the position half as far away as the step
before, if there is one. A reduction runs the same steps backwards, so what it adds are pairs of
neighbours, then pairs of pairs.

Source: HCCL's documentation of NHR, ceil(log2 n) alpha + (n-1)/n of the bytes (documented).
"""

from __future__ import annotations

from emulator.collectives.levels import Hop, there_and_back


def _hops(m: int) -> list[Hop]:
    distances = [1 << j for j in range((m - 1).bit_length())]
    return [
        Hop(0, 2 * distance, len(range(0, m - distance, 2 * distance)), distance)
        for distance in reversed(distances)
    ]


reduce, spread = there_and_back(_hops)
