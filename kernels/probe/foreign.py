"""Designs that no `Arithmetic` describes, so that a probe can name them all the same."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from kernels import reference
from kernels.arithmetic import X86_AVX512_BF16
from kernels.probe.answers import RESULTS, Answers, words_of
from kernels.probe.inputs import Tile

AMX = (
    "Intel AMX (TDPBF16PS): 32 products at a time, even and odd k in two chains of fused "
    "multiply-adds that start at 0 and are added, then C; subnormals are zeros"
)

_FMA = dataclasses.replace(X86_AVX512_BF16, products=1)


def resembled(answers: Answers) -> str | None:
    """The design that predicts a sample of answers from every group, or None.

    Products of fewer than a step's 32 are left out: libraries hand those to the ordinary cores.
    """
    if answers.dtype != "bfloat16":
        return None
    sampled = [
        number
        for number, tile in enumerate(answers.tiles)
        if tile.group in ("sums", "bottom", "top", "dense") and tile.a.shape[1] >= 32
    ]
    for number in sampled:
        tile = answers.tiles[number]
        with np.errstate(all="ignore"):
            expected = _amx(tile).astype(RESULTS[answers.result])
        wanted, got = words_of(expected, expected.shape, "AMX")[1], answers.words[number]
        if any(got[place] != word for place, word in np.ndenumerate(wanted)):
            return None
    return AMX


def _amx(tile: Tile) -> NDArray[np.float32]:
    """The first four rows and columns of a tile.

    Source: Intel Architecture Instruction Set Extensions reference, TDPBF16PS; checked against
    XLA's BF16 dot on a Xeon with AMX.
    """
    a, b = tile.a[:4], tile.b[:, :4]
    c = np.zeros((4, 4), np.float32) if tile.c is None else tile.c[:4, :4]
    for start in range(0, a.shape[1], 32):
        halves = []
        for first in (start, start + 1):
            stop = start + 32
            x, y = a[:, first:stop:2], b[first:stop:2]
            halves.append(reference.matmul(x, y, arithmetic=_FMA).astype(np.float32))
        c = _flush(c + _flush(halves[0] + halves[1]))
    return c


def _flush(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subnormals as zeros of their sign."""
    words = np.ascontiguousarray(x).view(np.uint32)
    tiny = words & 0x7F800000 == 0
    return np.where(tiny, words & 0x80000000, words).astype(np.uint32).view(np.float32)
