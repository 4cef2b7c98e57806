"""All_to_all over a grid: two steps and about 2 sqrt(n) messages a rank instead of n - 1, for twice
the bytes.

Ranks in a row are consecutive. First each rank sends, to its column's place in every row, what is
meant for that row; then everybody hands out, inside the row, what has come. A last row that is
shorter takes more from each rank.

Source: Kale, Kumar, Varadarajan (2003), the mesh of their virtual topologies.
"""

from __future__ import annotations

import numpy as np

from emulator.collectives.schedule import Group, Schedule, make_round


def all_to_all(group: Group) -> Schedule:
    """Along the columns, then along the rows. Scratch slot 2n + t n + g row + j of a rank holds
    what its t-th source in row g sends to place j of its row.
    """
    n = group.n
    row = _row(n)
    sizes = [min(row, n - first) for first in range(0, n, row)]
    size = np.array(sizes)
    line, place = np.divmod(np.arange(n), row)

    source, to = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(len(sizes))))
    turn, middle = np.divmod(place[source], size[to])
    columns = make_round(
        source,
        to * row + middle,
        to * row,
        2 * n + turn * n + line[source] * row,
        width=size[to],
        reduce=False,
    )

    # Place i of every row that has it sends by the same member: one run of slots, a row apart.
    receiver, origin = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(row)))
    turn, middle = np.divmod(origin, size[line[receiver]])
    rows = make_round(
        receiver - place[receiver] + middle,
        receiver,
        2 * n + turn * n + place[receiver],
        n + origin,
        width=len(sizes) - (origin >= sizes[-1]),
        stride=row,
        reduce=False,
    )
    return Schedule(
        op="all_to_all",
        algorithm="grid",
        ranks=n,
        slots=(3 + (row - 1) // sizes[-1]) * n,
        rounds=(columns, rows),
    )


def _row(n: int) -> int:
    """The length of a row: near the root of n, and such that the last row is nearly full."""
    near = max(1, round(n**0.5))
    lengths = range(near, 2 * near + 1)
    return min(lengths, key=lambda row: (row + -(-n // row)) * (2 - ((n - 1) % row + 1) / row))
