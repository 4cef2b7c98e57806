"""Products per step and kind of summation from the order-revealing tile.

With p_i = X, p_j = -X and one unit everywhere else, the units that are added while X is in the sum
are lost and the others survive; how many survive says how late i and j have met.
(FPRev, arXiv 2411.00442; the closed forms are checked against `kernels.reference`.)
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kernels.probe.answers import RESULTS, Answers

LARGEST = 64
"""Products per step that an `Arithmetic` may have."""


def proposals(answers: Answers) -> list[tuple[str, int]]:
    """(summation, products) that fit what was counted, or all likely ones if none does."""
    number = next(k for k, tile in enumerate(answers.tiles) if tile.group == "order")
    tile = answers.tiles[number]
    counts = _counts(answers, number)
    n = tile.a.shape[1]
    large = tile.a.astype(np.float64)
    i = large.argmax(axis=1)[:, None]
    j = np.arange(n)[None, :]
    clean = (counts >= 0) & (counts <= n) & (counts == np.round(counts)) & (i != j)
    found: list[tuple[str, int]] = []
    # -X first and then units, rounded toward zero, leaves more than n: not clean. For FP16, whose X
    # is only 2^29 units, it may look clean, and 64 units before X are not lost: then the pairs that
    # start with an early X decide.
    for asked in (clean, clean & (i < j) & (i < 32)):
        found = found or [
            structure
            for structure in _structures()
            if any(((x == counts) | ~asked).all() for x in _survivors(*structure, i, j, n))
        ]
    if clean.mean() > 0.25 and found:
        return found
    # Only steps that hold both i and j are clean (C late, toward zero): the smallest one that fits.
    late = [structure for structure in found if structure[0] == "fused" and clean.any()][:1]
    return list(dict.fromkeys([*late, *_structures(likely=True)]))


def describe(answers: Answers) -> str:
    """The counts of the first row, for people."""
    number = next(k for k, tile in enumerate(answers.tiles) if tile.group == "order")
    row = _counts(answers, number)[0, 1:20]
    return "units surviving between p_0 and p_j, j = 1, 2, ...: " + " ".join(
        f"{x:.0f}" if 0 <= x <= 128 else "*" for x in row
    )


def _counts(answers: Answers, number: int) -> NDArray[np.float64]:
    unit = float(answers.tiles[number].a.min()) * float(answers.tiles[number].b.max())
    dtype = RESULTS[answers.result]
    words = answers.words[number].astype(np.uint32 if answers.result == "float32" else np.uint16)
    with np.errstate(all="ignore"):
        values = np.ascontiguousarray(words).view(dtype).astype(np.float64) / unit
    return np.where(np.isfinite(values), values, -1.0)


def _structures(likely: bool = False) -> Iterator[tuple[str, int]]:
    sizes = (1, 2, 4, 8, 16, 32, 64) if likely else range(1, LARGEST + 1)
    for products in sizes:
        yield "fused", products
    for products in sizes:
        if products > 1:
            yield "chain", products
            if products & (products - 1) == 0:
                yield "tree", products


def _survivors(
    summation: str, products: int, i: NDArray, j: NDArray, n: int
) -> Iterator[NDArray[np.float64]]:
    """Counts that a unit of this kind may give, one array per variant."""
    same = i // products == j // products
    last = np.maximum(i // products, j // products)
    after = n - np.minimum(n, products * (last + 1))  # units in later steps
    in_step = np.minimum(products, n - products * last)
    if summation == "chain":
        step = np.arange(n) // products
        order = step * products + products - 1 - np.arange(n) % products
        ranks = np.argsort(np.argsort(order))
        yield n - 1 - np.maximum(ranks[i], ranks[j])
    elif summation == "tree":
        levels = np.frexp((i ^ j).astype(np.float64))[1]  # i and j meet at this level
        leaves = np.minimum(2**levels, products)
        start = np.maximum(i, j) // leaves * leaves
        yield np.where(same, n - np.minimum(leaves, n - start), after)
    else:
        lost_apart = [after + in_step - 1, after]  # exact with C; cut, or C added late
        yield np.where(same, n - 2, lost_apart[0])  # exact sum with C
        yield after + 0 * i  # terms cut
        yield np.where(same, n - 2, lost_apart[1])  # exact sum, C late
        yield np.where(same, n - in_step, lost_apart[1])  # terms cut, C late
