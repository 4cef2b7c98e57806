"""Products of other shapes than the tiles': odd sizes, long K, many outputs, one row or column.

Libraries cut such products: into parts of K that are summed apart, or with a start of K that
depends on where an output lies. A record that the tiles have settled is compared with them last; a
unit that refuses them, or is too slow for them, is not asked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from kernels.arithmetic import Arithmetic
from kernels.probe.answers import Answers, Failure, Probe
from kernels.probe.inputs import DTYPES, M, N, Tile
from kernels.tiling import Chain

ODD = ((5, 37, 3), (13, 131, 19))  # m, k, n
LONG_K = (320, 1088, 4160)
GROUPS = ("odd", "long", "single", "large")
Order = tuple[tuple[Chain, ...], ...]  # as in kernels.tiling.k_order

NEEDED = LONG_K[:2]
"""A record must predict sums of so many products, in one order or another."""

_OTHER = "in an order that is none of those that were tried"

_LARGE = (256, 576, 512)  # m, k, n: four output tiles of 128 x 256, more than two of K = 256
_DISTINCT = 4  # rows and columns of the large product that differ
_SAMPLED = 12  # outputs that are compared, per product
_LENGTHS = tuple(sorted(x << y for x in (1, 3, 5) for y in range(3, 12)))  # of parts of K
_ALIGNED = (1, 8, 16, 32, 64, 128, 256)  # to which equal parts are rounded up


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What products of other shapes say about a record: up to which K it holds as it is, what holds
    beyond or elsewhere, and the answers that contradict it without an order of K that explains
    them. `reordered`: longer sums were asked for and are not in ascending order. `compared`: how
    many answers the record was compared with.
    """

    longest_k: int
    reordered: bool = False
    notes: tuple[str, ...]
    failing: tuple[Failure, ...]
    compared: int = 0


def tiles(dtype: str) -> list[Tile]:
    """All of them, in the order in which they are judged."""
    rng = np.random.default_rng(20250117)
    row, column = _operands(rng, dtype, 2, 72, N), _operands(rng, dtype, M, 72, 1)
    m, k, n = _LARGE
    a, b = _operands(rng, dtype, _DISTINCT, k, _DISTINCT)
    a, b = np.tile(a, (m // _DISTINCT, 1)), np.tile(b, (1, n // _DISTINCT))
    long = [(f"K = {k}", _operands(rng, dtype, M, k, N)) for k in LONG_K]
    odd = [(f"{m} x {k} x {n}", _operands(rng, dtype, m, k, n)) for m, k, n in ODD]
    return [
        *(Tile(name=name, group="odd", a=x, b=y) for name, (x, y) in odd),
        *(Tile(name=name, group="long", a=x, b=y) for name, (x, y) in long),
        Tile(name="one row", group="single", a=row[0][1:], b=row[1]),
        Tile(name="one column", group="single", a=column[0], b=column[1]),
        Tile(name=f"{m} x {k} x {n}", group="large", a=a, b=b),
    ]


def _operands(rng: Generator, dtype: str, m: int, k: int, n: int) -> tuple[NDArray, NDArray]:
    """Normal data; in every other row the first and the last k / 2 - 5 products cancel each other,
    so that little but what rounding has left remains.
    """
    half = k // 2 - 5
    a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
    b[k - half :] = b[:half]
    a[1::2, k - half :] = -a[1::2, :half]
    a[:, half : k - half] *= 2.0**-12
    tiny = float(ml_dtypes.finfo(DTYPES[dtype]).tiny)
    left, right = (np.where(np.abs(x) < tiny, 0, x).astype(np.float32) for x in (a, b))
    return left.astype(DTYPES[dtype]), right.astype(DTYPES[dtype])


def judge(answers: Answers, unit: Arithmetic) -> Verdict:
    """Whether `unit` predicts products of other shapes too, and if not, in which order K is summed
    there.
    """
    longest = max(tile.a.shape[1] for tile in answers.tiles if tile.group not in GROUPS)
    notes = [f"Not asked: {text}." for text in answers.not_asked]
    failing: list[Failure] = []
    ascending, compared = True, 0
    for number, tile in enumerate(answers.tiles):
        if tile.group not in GROUPS:
            continue
        k = tile.a.shape[1]
        samples = _sampled(answers, number)
        compared += sum(len(x) for x in samples)
        missed = [x for x in samples if answers.first_miss(unit, x) is not None]
        if tile.group == "odd":
            failing += [x for sample in missed for x in answers.failures(unit, sample)]
            continue
        if tile.group == "long":
            ascending = ascending and not missed
            longest = k if ascending else longest
        found = {_order(answers, unit, sample): sample for sample in reversed(missed[:4])}
        for order, sample in reversed(found.items()):
            if order is None and tile.group == "long" and k in NEEDED:
                failing += answers.failures(unit, sample)
            place = f", from [{sample[0].i}, {sample[0].j}]" if tile.group == "large" else ""
            notes.append(
                f"{tile.name}{place}: K is not summed in ascending order, but {order or _OTHER}."
            )
        if tile.group == "large" and (text := _by_place(answers, number)):
            notes.append(f"{tile.name}: {text}.")
    return Verdict(
        longest_k=longest,
        reordered=not ascending,
        notes=tuple(notes),
        failing=tuple(failing),
        compared=compared,
    )


def _sampled(answers: Answers, number: int) -> list[list[Probe]]:
    """Outputs all over a tile, or all of them; of the large product, neighbours at some places,
    where a library may do each in its own way.
    """
    m, n = answers.words[number].shape
    if answers.tiles[number].group == "odd":
        return [[Probe(number, i, j) for i in range(m) for j in range(n)]]
    if answers.tiles[number].group == "large":
        corners = [(i, j) for i in range(0, m, 128) for j in range(0, n, 128)]
        return [
            [Probe(number, i + x, j + y) for x in (1, 0, 3) for y in (0, 1)] for i, j in corners
        ]
    outputs = [(x * 7 % m, (3 * x + x // m) % n) for x in range(max(m, n))]
    return [[Probe(number, i, j) for i, j in dict.fromkeys(outputs)][:_SAMPLED]]


def _by_place(answers: Answers, number: int) -> str | None:
    """Whether equal rows and columns give equal sums wherever they lie."""
    words = np.asarray(answers.words[number])
    m, n = words.shape
    equal = words.reshape(m // _DISTINCT, _DISTINCT, n // _DISTINCT, _DISTINCT)
    different = np.argwhere(equal != equal[:1, :, :1])
    if not len(different):
        return None
    i, row, j, column = different[0].tolist()
    return (
        f"the sum depends on where an output lies; [{row}, {column}] and "
        f"[{i * _DISTINCT + row}, {j * _DISTINCT + column}] have equal operands and other bits"
    )


def _order(answers: Answers, unit: Arithmetic, probes: list[Probe]) -> str | None:
    """The order of K in which `unit` predicts these probes, in words."""
    k = answers.tiles[probes[0].tile].a.shape[1]
    # Rows of pairs that cancel show nearly every change of the order.
    asked = sorted(probes, key=lambda probe: -(probe.i % 2))
    for words, order in _orders(k):
        if all(answers.predict(unit, p, order) == answers.got(p) for p in asked):
            return words
    return None


def _orders(k: int) -> Iterator[tuple[str, Order]]:
    """Ways to sum K that libraries have."""
    equal = {math.ceil(k / parts / step) * step for parts in range(2, 33) for step in _ALIGNED}
    for length in sorted({x for x in (*_LENGTHS, *equal) if x < k}, reverse=True):
        cut = _pieces(k, length)
        yield (
            f"in {len(cut)} parts of {length} that start at 0 and are added in ascending order",
            tuple(((piece,),) for piece in cut),
        )
    for length in _LENGTHS:
        cut = _pieces(k, length)
        for first in range(1, len(cut)) if length >= 32 else ():
            yield (
                f"from K = {first * length} upwards, and then from 0",
                (((*cut[first:], *cut[:first]),),),
            )
        if len(cut) > 1:
            yield f"in pieces of {length}, the last one first", ((tuple(reversed(cut)),),)


def _pieces(k: int, length: int) -> Chain:
    return tuple((start, min(start + length, k)) for start in range(0, k, length))
