"""The groups of devices of XLA's collectives, read from the text of an HLO module.

A module writes them in three ways, here over 8 devices:

    {{0,2,4,6},{1,3,5,7}}                       one by one
    [2,4]<=[4,2]T(1,0)                          0, 1, 2, ... reshaped, transposed, reshaped
    mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'b','a':(2)2}
                                                along axes, or parts of axes, of a mesh

(The conversion to StableHLO forgets the `device_ids` of the third.)
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray


def replica_groups(text: str) -> dict[int, NDArray[np.int64]]:
    """Partitions [group, rank] of every collective of a module, by its channel; empty groups mean
    all devices.
    """
    found = {}
    pattern = r"channel_id=(\d+), .*?replica_groups=(mesh\[[^{]*\{[^}]*\}|\{\{.*?\}\}|\{\}|\[\S+)"
    for channel, groups in re.findall(pattern, text):
        found[int(channel)] = _groups(groups.rstrip(","))
    return found


def _groups(text: str) -> NDArray[np.int64]:
    if text.startswith("mesh"):
        return _along_axes(text)
    if text.startswith("["):
        shape, order = text.split("<=")
        return _iota(order).reshape(_numbers(shape))
    rows = [_numbers(row) for row in re.findall(r"\{([\d,]+)\}", text)]
    if len({len(row) for row in rows}) > 1:
        raise NotImplementedError("a collective with groups of different sizes has no rule here")
    return np.array(rows, np.int64)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> NDArray[np.int64]:
    """`[4,2]T(1,0)`: 0, 1, 2, ... in this shape, transposed, flat."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    table = np.arange(math.prod(sizes)).reshape(sizes)
    return (table.transpose(_numbers(order)) if order else table).reshape(-1)


def _along_axes(text: str) -> NDArray[np.int64]:
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", text)]
    sizes = dict(axes)
    ids = re.search(r"device_ids=\((.*?\]?(?:T\([\d,]+\))?)\) \{", text)
    order = np.arange(math.prod(sizes.values()))
    if ids is not None:
        listed = ids[1].startswith("[")
        order = _iota(ids[1]) if listed else np.array(_numbers(ids[1]), np.int64)
    named = [  # axis, the product of the parts of it that are slower, its own size
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(
            r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :]
        )
    ]
    parts: list[tuple[str, int, int]] = []
    for name, size in axes:
        cuts = {1, size, *(c for n, b, s in named if n == name for c in (b, b * s))}
        ends = sorted(cuts)
        parts += [(name, low, high // low) for low, high in zip(ends, ends[1:], strict=False)]
    at = [
        i
        for name, before, size in named
        for i, (n, low, _) in enumerate(parts)
        if n == name and before <= low < before * size
    ]
    rest = [i for i in range(len(parts)) if i not in at]
    table = order.reshape([size for *_, size in parts]).transpose(*rest, *at)
    return table.reshape(-1, math.prod(size for _, _, size in named))
