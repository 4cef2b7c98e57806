"""A matrix unit's answers to the probes, and whether a hypothesis predicts them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kernels import reference
from kernels.arithmetic import Arithmetic
from kernels.probe.inputs import Tile

RESULTS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Types of results that are understood; FP64 ones are rounded to FP32."""

_NOTHING = reference.decode(0, "float32")
_NAN = -1  # any NaN, where results are narrower than FP32


class Probe(NamedTuple):
    """One output: row i and column j of a tile."""

    tile: int
    i: int
    j: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A probe that contradicts a hypothesis: the words expected and received, of the results' type
    (-1: any NaN).
    """

    probe: str
    i: int
    j: int
    expected: int
    got: int
    result: str = "float32"

    def __str__(self) -> str:
        digits = 8 if self.result == "float32" else 4
        got, expected = (
            "NaN" if word == _NAN else f"{word:0{digits}x}" for word in (self.got, self.expected)
        )
        return f"{self.probe} [{self.i}, {self.j}]: got {got}, expected {expected}"


@dataclass(slots=True, eq=False)
class Answers:
    """Tiles and the words a unit gave for them; `dtype` of the operands, `result` of the answers.

    Narrow results (BF16, FP16) are FP32 sums rounded once to nearest even.
    """

    dtype: str
    result: str
    tiles: Sequence[Tile]
    words: list[NDArray[np.int64]]
    any_nan: bool = False  # NaNs count as equal
    not_asked: tuple[str, ...] = ()  # products that the unit refused, or was too slow for
    unsteady: str | None = None  # a probe that was answered differently when asked again
    hard: list[Probe] = field(default_factory=list)  # probes that contradicted a hypothesis: asked
    # first from then on
    _decoded: dict[Any, Any] = field(default_factory=dict)
    _steps: tuple[Any, dict[Any, int]] = (None, {})
    _mixed: dict[Any, list[Probe]] = field(default_factory=dict)

    def probes(
        self, groups: Sequence[str], limit: int | None = None, thorough: bool = False
    ) -> list[Probe]:
        """The probes of these groups, the hard ones first and the others in a fixed mixed order
        in which every tile has its turn, up to `limit`; with `thorough` and all those of thorough
        tiles.
        """
        key = (len(self.tiles), tuple(groups), limit, thorough)
        if key not in self._mixed:
            self._mixed[key] = self._in_turn(*key[1:])
        return list(dict.fromkeys([*self.hard_ones(groups), *self._mixed[key]]))

    def _in_turn(self, groups: Sequence[str], limit: int | None, thorough: bool) -> list[Probe]:
        rng = np.random.default_rng(7)
        turns, whole = [], []
        for number, tile in enumerate(self.tiles):
            if tile.group in groups:
                m, n = self.words[number].shape
                outputs = [Probe(number, int(x) // n, int(x) % n) for x in rng.permutation(m * n)]
                if thorough and tile.thorough:
                    whole += outputs
                else:
                    turns += [(k, *probe) for k, probe in enumerate(outputs)]
        return [*(Probe(*rest) for _, *rest in sorted(turns)[:limit]), *whole]

    def hard_ones(self, groups: Sequence[str]) -> list[Probe]:
        return [probe for probe in self.hard if self.tiles[probe.tile].group in groups]

    def got(self, probe: Probe) -> int:
        return self._one_nan(int(self.words[probe.tile][probe.i, probe.j]))

    def predict(self, arithmetic: Arithmetic, probe: Probe, order: Any = None) -> int:
        """The word that a unit with this arithmetic would give, with K in an order of
        `kernels.tiling.k_order` or ascending.
        """
        tile = self.tiles[probe.tile]
        row = self._operands((probe.tile, "a", probe.i), tile.a[probe.i], arithmetic)
        column = self._operands((probe.tile, "b", probe.j), tile.b[:, probe.j], arithmetic)
        c = 0 if tile.c is None else int(tile.c[probe.i, probe.j].view(np.uint32))
        if order is None:
            word = _dot(row, column, c, arithmetic, self._steps_of(tile, arithmetic))
        else:
            word = reference.dot_in_order(row, column, c, order, arithmetic)
        return self._one_nan(narrow(word, self.result))

    def _steps_of(self, tile: Tile, arithmetic: Arithmetic) -> dict[Any, int] | None:
        """Steps that were done, for tiles of a few numbers in which most steps come again."""
        if tile.group not in ("order", "zeros"):
            return None
        if self._steps[0] is not arithmetic:
            self._steps = arithmetic, {}
        return self._steps[1]

    def _one_nan(self, word: int) -> int:
        return _NAN if self.any_nan and (word & 0x7FFFFFFF) > 0x7F800000 else word

    def first_miss(self, arithmetic: Arithmetic, probes: Iterable[Probe]) -> Probe | None:
        """The first probe that contradicts `arithmetic`."""
        return next(self.misses(arithmetic, probes), None)

    def misses(self, arithmetic: Arithmetic, probes: Iterable[Probe]) -> Iterator[Probe]:
        return (p for p in probes if self.predict(arithmetic, p) != self.got(p))

    def failures(self, arithmetic: Arithmetic, probes: Iterable[Probe]) -> Iterator[Failure]:
        """The probes that contradict `arithmetic`, with what came."""
        for probe in probes:
            expected, got = self.predict(arithmetic, probe), self.got(probe)
            if expected != got:
                yield Failure(
                    probe=self.tiles[probe.tile].name,
                    i=probe.i,
                    j=probe.j,
                    expected=expected,
                    got=got,
                    result=self.result,
                )

    def _operands(self, where: Any, x: NDArray, arithmetic: Arithmetic) -> Any:
        """A row or column as the unit reads it; kept, and so is every word once read."""
        rules = arithmetic.subnormal_inputs, arithmetic.specials
        if (rules, where) not in self._decoded:
            known = self._decoded.setdefault(rules, {})
            found = []
            for word in np.ascontiguousarray(x).view(np.uint16).tolist():
                if word not in known:
                    term = reference.decode(word, self.dtype)
                    known[word] = reference._read(term, self.dtype, arithmetic)
                found.append(known[word])
            self._decoded[rules, where] = found
        return self._decoded[rules, where]


def narrow(word: int, result: str) -> int:
    """An FP32 word as the word of a result of type `result`, rounded to nearest even."""
    if result == "float32":
        return word
    with np.errstate(all="ignore"):
        value = np.uint32(word).view(np.float32).astype(RESULTS[result])
    return _NAN if np.isnan(value) else int(value.view(np.uint16))


def float_of(word: int, result: str) -> float:
    """The value of a result's word."""
    if word == _NAN:
        return float("nan")
    words = np.array(word).astype(np.uint32 if result == "float32" else np.uint16)
    return float(words.view(RESULTS[result]))


def words_of(results: Any, shape: tuple[int, int], where: str) -> tuple[str, NDArray[np.int64]]:
    """The type and the words of an array of results.

    Raises:
        TypeError, ValueError: results that are not a float array of this shape.
    """
    array = np.asarray(results)
    if array.shape != shape:
        raise ValueError(f"{where}: expected results of shape {shape}, got {array.shape}")
    if array.dtype == np.float64:
        with np.errstate(all="ignore"):
            array = array.astype(np.float32)
    if array.dtype.name not in RESULTS:
        raise TypeError(
            f"{where}: expected float32 results (or {', '.join(list(RESULTS)[1:])}), "
            f"got {array.dtype}; convert them"
        )
    if array.dtype == np.float32:
        return "float32", np.ascontiguousarray(array).view(np.uint32).astype(np.int64)
    words = np.ascontiguousarray(array).view(np.uint16).astype(np.int64)
    return array.dtype.name, np.where(np.isnan(array.astype(np.float32)), _NAN, words)


def _dot(
    row: Any, column: Any, c: int, arithmetic: Arithmetic, known: dict[Any, int] | None
) -> int:
    """`reference.dot`, without work that cannot change bits: of the products +0 in a fused step one
    is enough, and when one step of nothing else has left C alone, so do the ones right after it.
    Steps that are `known` are not done again. (Equal operands of a unit are one object.)
    """
    pairs = list(zip(row, column, strict=True))
    size = arithmetic.products
    pairs += [(_NOTHING, _NOTHING)] * (-len(pairs) % size)
    steps = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    if arithmetic.summation == "chain":
        steps = [[pair] for step in steps for pair in reversed(step)]
    settled = None
    for step in steps:
        busy = [
            (x, y) for x, y in step if x.significand and y.significand or not _is_plus_zero(x, y)
        ]
        if not busy and c == settled:
            continue
        before = c
        if arithmetic.summation == "fused" and len(busy) < len(step):
            step = [*busy, (_NOTHING, _NOTHING)]
        if known is None:
            c = reference.step(step, c, arithmetic)
        else:
            key = c, *map(id, itertools.chain.from_iterable(step))
            if key not in known:
                known[key] = reference.step(step, c, arithmetic)
            c = known[key]
        settled = c if not busy and c == before else None
    return c


def _is_plus_zero(x: Any, y: Any) -> bool:
    return (
        (not x.significand or not y.significand)
        and x.sign == y.sign
        and x.kind == y.kind == "finite"
    )
