"""From a unit's answers to the `Arithmetic` that predicts every one of them.

Hypotheses are proposed part by part (structure and widths; what happens to tiny numbers; to huge
ones and specials) and struck out by the first probe that contradicts them. What is left must then
predict all answers; one that contradicts it is compared first from then on.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.arithmetic import Arithmetic
from kernels.probe import order
from kernels.probe.answers import Answers, Probe

ALIGNMENTS = ("truncate", "floor", "nearest_even")
ROUNDINGS = ("nearest_even", "toward_zero")
WIDTHS = range(1, 49)

LOWEST = -400
"""A `min_exponent` that no product of BF16 numbers reaches."""

_ORDINARY = ("order", "sums", "dense")
_TINY = ("bottom", "zeros")
_HUGE = ("top", "specials")
EVERY = _ORDINARY + _TINY + _HUGE
_QUICK = 400  # probes that a part of a hypothesis must pass before all of them are asked
_LOST = 0.7  # of the probes: contradicted by every set of joined widths, they are not joined
_STRUCTURES = 200  # that predict ordinary sums, until the search gives up
_ROUNDS = 60  # hypotheses that pass those and fail a later probe, until the search gives up
_TRIED = 40  # structures that are remembered, should none lead to a record


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The outcome: `arithmetic` predicts every answer; without one, `tried` predict many of them.
    `any_nan` says why NaNs were taken as equal.
    """

    arithmetic: Arithmetic | None
    tried: tuple[Arithmetic, ...] = ()
    any_nan: str | None = None


def search(answers: Answers) -> Found:
    """The record that predicts every answer, if there is one. NaNs are looked at last: no rule for
    their words decides what kind of unit it is.
    """
    answers.any_nan = True
    found, tried = _finite(answers)
    return Found(arithmetic=None, tried=tuple(tried)) if found is None else settled(answers, found)


def settled(answers: Answers, found: Arithmetic) -> Found:
    """The outcome for a record that predicts everything but, perhaps, the words of NaNs."""
    answers.any_nan = False
    with_words = _with_nan_words(answers, found)
    if with_words is not None:
        return Found(arithmetic=with_words)
    answers.any_nan = True
    return Found(arithmetic=found, any_nan=_nan_remark(answers))


def _finite(answers: Answers) -> tuple[Arithmetic | None, list[Arithmetic]]:
    """The record that predicts everything but NaN words, or None; and what was tried."""
    tried: list[Arithmetic] = []
    rounds = 0
    for number, widths in enumerate(itertools.islice(_widths(answers), _STRUCTURES)):
        tried += [widths] if number < _TRIED else []
        while rounds < _ROUNDS and answers.first_miss(widths, answers.hard_ones(_ORDINARY)) is None:
            found = _completed(answers, widths)
            if found is None:
                break
            miss = answers.first_miss(found, answers.probes(EVERY))
            if miss is None:
                return found, []
            tried, rounds = [*tried, found], rounds + 1
            answers.hard.insert(0, miss)
    return None, tried


def _with_nan_words(answers: Answers, found: Arithmetic) -> Arithmetic | None:
    """`found` with a word and a rule that predict every NaN among the probes."""
    if answers.result != "float32":
        return found
    probes = [p for p in answers.probes(_HUGE) if is_nan(answers.got(p))]
    words = nan_words(answers) or list({answers.got(p): None for p in probes[:64]}) or [found.nan]
    chains = [x for x in (found, *_as_chain(found)) if x.summation == "chain"]
    guesses = [
        *(vary(found, nan=word) for word in words),
        *(vary(x, nan=word, nan_rule="propagate") for x in chains for word in words),
    ]
    return next((x for x in guesses if answers.first_miss(x, probes) is None), None)


def _nan_remark(answers: Answers) -> str:
    common = ", ".join(f"0x{word:08x}" for word in nan_words(answers)) or "none of its own"
    return (
        "NaN results follow neither one word nor the priority a, b, C of a chain, so all NaNs were "
        f"taken as equal (words without a NaN operand: {common}); the record's word is a stand-in"
    )


def record(answers: Answers, **fields: Any) -> Arithmetic:
    """A hypothesis about operands of the probed type."""
    return Arithmetic(name="probed", dtypes=(answers.dtype,), **fields)


def vary(unit: Arithmetic, **fields: Any) -> Arithmetic:
    return replace(unit, **fields)


def plain(answers: Answers, summation: str, products: int) -> Iterator[Arithmetic]:
    """Hypotheses without a width."""
    addends = {"chain": ("fused",), "tree": ("late",)}.get(summation, ("fused", "late"))
    for addend, rounding in itertools.product(addends, ROUNDINGS):
        yield record(
            answers, summation=summation, products=products, addend=addend, rounding=rounding
        )


def _aligned(answers: Answers, products: int) -> Iterator[Arithmetic]:
    for bits, alignment, addend, rounding in itertools.product(
        reversed(WIDTHS), ALIGNMENTS, ("fused", "late"), ROUNDINGS
    ):
        yield record(
            answers,
            products=products,
            fraction_bits=bits,
            alignment=alignment,
            addend=addend,
            rounding=rounding,
            min_exponent=LOWEST,
        )


def _widths(answers: Answers) -> Iterator[Arithmetic]:
    """Structure, widths and rounding that predict sums of ordinary size, the simplest first."""
    structures = order.proposals(answers)
    probes = answers.probes(_ORDINARY, _QUICK)

    def left(hypotheses: Iterable[Arithmetic]) -> list[Arithmetic]:
        return [x for x in hypotheses if _fits(answers, x, probes)]

    found = [x for structure in structures for x in left(plain(answers, *structure))]
    yield from found
    sizes = [products for summation, products in structures if summation == "fused"]
    for products in sizes:
        aligned = left(_aligned(answers, products))
        found += aligned
        yield from aligned
    if len(structures) < 5:  # an order that was recognised
        for products in sizes:
            while (joined := _joined(answers, products)) is not None:
                known = len(answers.hard)
                yield joined
                if len(answers.hard) == known:
                    break  # no probe contradicted it that was not known before


def _joined(answers: Answers, products: int) -> Arithmetic | None:
    """`addend="joined"`: one width after the other is set to what predicts most answers."""
    every = answers.probes(_ORDINARY, 2 * _QUICK)
    probes = answers.probes(("sums",), 150)
    alone = [  # no C but +0: the widths of C and of the common scale hardly matter
        probe
        for probe in answers.probes(("sums",), 1500)
        if answers.tiles[probe.tile].c is None
        and not answers.tiles[probe.tile].a[probe.i, products:].any()
    ][:60]

    guess = record(
        answers,
        products=products,
        fraction_bits=24,
        addend="joined",
        min_exponent=LOWEST,
        sum_fraction_bits=48,
        addend_fraction_bits=48,
        result_fraction_bits=48,
    )
    for turn in range(6):
        asked = alone if turn == 0 and alone else probes
        cuts = itertools.product(reversed(WIDTHS), ALIGNMENTS, ROUNDINGS)
        guess = fewest_misses(
            answers,
            asked,
            (vary(guess, fraction_bits=w, alignment=x, rounding=y) for w, x, y in cuts),
        )
        for field in ("addend_fraction_bits", "result_fraction_bits", "sum_fraction_bits"):
            others = (vary(guess, **{field: w}) for w in reversed(WIDTHS))
            guess = fewest_misses(answers, probes, others)
        missed = sum(1 for _ in answers.misses(guess, probes))
        if missed > _LOST * len(probes):
            return None
        misses = list(itertools.islice(answers.misses(guess, every), 20))
        if not misses:
            return guess
        probes = misses + probes
    return None


def fewest_misses(
    answers: Answers, probes: list[Probe], guesses: Iterable[Arithmetic]
) -> Arithmetic:
    """The first of the guesses that contradict the fewest probes."""
    best, fewest = None, len(probes) + 1
    for guess in guesses:
        misses = sum(1 for _ in itertools.islice(answers.misses(guess, probes), fewest))
        if misses < fewest:
            best, fewest = guess, misses
    assert best is not None
    return best


def _fits(answers: Answers, unit: Arithmetic, probes: list[Probe]) -> bool:
    """Whether `unit` predicts all probes. One that contradicts it goes to the front of the list: it
    is likely to contradict the next hypothesis too.
    """
    for number, probe in enumerate(probes):
        if answers.predict(unit, probe) != answers.got(probe):
            probes.insert(0, probes.pop(number))
            return False
    return True


def _completed(answers: Answers, widths: Arithmetic) -> Arithmetic | None:
    """`widths` with what happens to tiny and huge numbers, or None if nothing predicts that."""
    tiny = answers.probes(_TINY, _QUICK)
    huge = answers.probes(_HUGE, _QUICK)
    for first in _tiny(answers, widths):
        if not _fits(answers, first, tiny):
            continue
        for second in _huge(first):
            if _fits(answers, second, huge):
                return second
        return None
    return None


def _tiny(answers: Answers, widths: Arithmetic) -> Iterator[Arithmetic]:
    floors: Iterable[int | None] = [None]
    if widths.fraction_bits is not None:
        floors = [LOWEST, *range(-126, -270, -1)]
    cuts = [widths]
    if widths.addend == "joined":
        # Ordinary sums may not show how products and their sum are cut, nor, of a sum cut to at
        # most 23 bits, the rounding.
        ordinary = answers.probes(_ORDINARY, _QUICK)
        others = (
            vary(widths, sum_fraction_bits=bits, alignment=alignment, rounding=rounding)
            for rounding in dict.fromkeys([widths.rounding, *ROUNDINGS])
            for alignment in dict.fromkeys([widths.alignment, *ALIGNMENTS])
            for bits in reversed(WIDTHS)
        )
        cuts = [x for x in others if _fits(answers, x, ordinary)]
    for cut, inputs, results, zero, floor in itertools.product(
        cuts, ("keep", "flush", "plus_zero"), ("keep", "flush"), ("positive", "ieee"), floors
    ):
        yield vary(
            cut,
            subnormal_inputs=inputs,
            subnormal_results=results,
            zero=zero,
            min_exponent=floor,
        )


def _huge(tiny: Arithmetic) -> Iterator[Arithmetic]:
    for product_overflow, overflow, specials in itertools.product(
        ("keep", "inf"), ("inf", "saturate"), ("ieee", "saturate")
    ):
        if specials == "ieee" or overflow == "saturate":
            yield vary(
                tiny, product_overflow=product_overflow, overflow=overflow, specials=specials
            )


def _as_chain(widths: Arithmetic) -> list[Arithmetic]:
    """A fused sum of one product is a chain as well, and only a chain propagates NaNs."""
    if widths.products > 1 or widths.fraction_bits is not None or widths.addend != "fused":
        return []
    return [vary(widths, summation="chain")]


def is_nan(word: int) -> bool:
    return (word & 0x7FFFFFFF) > 0x7F800000


def nan_words(answers: Answers) -> list[int]:
    """NaN words that were given where no operand is a NaN, the most frequent first."""
    if answers.result != "float32":
        return []
    own: dict[int, int] = {}
    for tile, words in zip(answers.tiles, answers.words, strict=True):
        if tile.group not in _HUGE:
            continue
        clean = ~(_has_nan(tile.a, 1)[:, None] | _has_nan(tile.b, 0)[None])
        if tile.c is not None:
            clean &= ~np.isnan(tile.c)
        for word in words[clean & ((words & 0x7FFFFFFF) > 0x7F800000)].tolist():
            own[word] = own.get(word, 0) + 1
    return sorted(own, key=lambda word: -own[word])[:4]


def _has_nan(x: NDArray, axis: int) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isnan(x.astype(np.float32)).any(axis))
