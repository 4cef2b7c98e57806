"""How one matmul is cut: among the dies of a device, and in tiles on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emulator.chip import pipeline
from emulator.chip.pipeline import Groups, Product, Share, Tilings
from emulator.machines import Chip


def shares_of(rows: Groups, n: int, dies: int) -> list[Share]:
    """The first die's part of the work in each way to divide it; it has at least as much as others.

    Batch or groups (dealt out from the largest on), rows (if all groups are alike), columns.
    """
    if dies == 1:
        return [(rows, n)]
    shares: list[Share] = []
    if sum(count for _, count in rows) > 1:
        dealt, before = [], 0
        for size, count in rows:
            mine = -(-(before + count) // dies) + -before // dies
            before += count
            if mine:
                dealt.append((size, mine))
        shares.append((tuple(dealt), n))
    if len(rows) == 1:
        ((m, count),) = rows
        shares.append((((-(-m // dies), count),), n))
    shares.append((rows, -(-n // dies)))
    return shares


def tilings_for(
    asked: Any, m: int, n: int, product: Product, shares: Sequence[Share], chip: Chip
) -> tuple[Tilings, int]:
    """The tilings to choose from for these shares of the work, and the cores that they use: all
    that the library has (None), the one that its published rules give ("library"), or a
    `kernels.Tiling`.

    Raises:
        TypeError: none of these.
        ValueError: a tiling that does not fit the core's buffers.
    """
    if asked is None:
        return pipeline.family(shares, chip), chip.cube_cores
    if isinstance(asked, str) and asked == "library":
        from kernels.tiling import library  # loads JAX, so only when asked for

        dtype = {"hf32": "float32", "tf32": "float32"}.get(product.dtype, product.dtype)
        asked = library(m, product.k, n, dtype, cores=chip.cube_cores)
    names = ("base_m", "base_n", "base_k", "step_k", "split_k", "cores")
    if not all(hasattr(asked, name) for name in names):
        raise TypeError(
            f'matmul_time(tiling={asked!r}): expected a kernels.Tiling, "library" or None'
        )
    chunk = asked.base_k * product.item
    chip.engines.check_tile(asked.base_m, asked.base_n, chunk, asked.step_k)
    row = (asked.base_m, asked.base_n, asked.split_k)
    few, steps = len(shares), asked.step_k
    tilings = pipeline.tilings_of([row], [chunk], [steps], few, chip, turns=steps == 1)
    return tilings, min(asked.cores, chip.cube_cores)
