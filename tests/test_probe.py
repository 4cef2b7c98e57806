"""Recovering an arithmetic from answers alone, in this process and by way of files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import emulator as em
import kernels
from kernels import arithmetic_file, probe
from kernels.probe import box, explain, folder, foreign, inputs, nearest, search, shapes
from kernels.probe import report as reports
from kernels.probe.answers import Answers, narrow, words_of
from tests.conftest import Answer
from tests.kernel_inputs import BF16, FP16, GENERATORS, words

UNITS = {
    **kernels.PRESETS,
    **{unit.name: unit for unit in kernels.ASCEND_910C_CANDIDATES.values()},
}


class OnDemand:
    """The words of a tile's outputs, by the definition; computed when they are asked for."""

    def __init__(self, tile: inputs.Tile, unit: kernels.Arithmetic) -> None:
        self.tile, self.unit = tile, unit.mode(tile.a.dtype.name, tile.b.dtype.name)
        self.shape = tile.a.shape[0], tile.b.shape[1]
        self.operands: dict[tuple[str, int], list] = {}
        self.known: dict[tuple[int, int], int] = {}

    def __getitem__(self, at: tuple[int, int]) -> int:
        if at not in self.known:
            i, j = at
            c = 0 if self.tile.c is None else int(self.tile.c[i, j].view(np.uint32))
            row = self._decoded(("row", i), self.tile.a[i])
            column = self._decoded(("column", j), self.tile.b[:, j])
            self.known[at] = kernels.reference.dot(row, column, c, self.unit)
        return self.known[at]

    def _decoded(self, where: tuple[str, int], x: np.ndarray) -> list:
        if where not in self.operands:
            self.operands[where] = [kernels.reference._operand(value, self.unit) for value in x]
        return self.operands[where]


def answers_of(unit: kernels.Arithmetic, dtype: str, with_c: bool) -> Answers:
    """What the definition answers; whole tiles only where the search looks at them as a whole."""
    tiles = inputs.tiles(dtype, with_c)
    found = [
        words(kernels.reference.matmul(t.a, t.b, t.c, arithmetic=unit)).astype(np.int64)
        if t.group in ("order", "top", "specials")
        else OnDemand(t, unit)
        for t in tiles
    ]
    return Answers(dtype, "float32", tiles, found)  # type: ignore[arg-type]


def parameters(unit: kernels.Arithmetic) -> dict[str, object]:
    return {field: getattr(unit, field) for field in explain.PARAMETERS}


def custom(seed: int) -> kernels.Arithmetic:
    """A unit that nobody has built."""
    rng = random.Random(seed)
    kind = rng.choice("exact aligned aligned aligned late joined joined chain tree".split())
    fields: dict[str, object] = {
        "products": rng.choice([1, 2, 3, 4, 5, 8, 16, 32]),
        "rounding": rng.choice(["nearest_even", "toward_zero"]),
        "subnormal_inputs": rng.choice(["keep", "flush", "plus_zero"]),
        "subnormal_results": rng.choice(["keep", "keep", "flush"]),
        "product_overflow": rng.choice(["keep", "inf"]),
        "overflow": rng.choice(["inf", "saturate"]),
        "nan": rng.choice([0x7FC00000, 0x7FFFFFFF, 0xFFC00000, rng.randint(0x7F800001, 2**31 - 1)]),
        "zero": rng.choice(["positive", "ieee"]),
    }
    if fields["overflow"] == "saturate":
        fields["specials"] = rng.choice(["ieee", "saturate"])
    if kind == "chain":
        fields |= {"summation": "chain", "nan_rule": rng.choice(["word", "propagate"])}
    elif kind == "tree":
        products = rng.choice([1, 2, 4, 8, 16, 32])
        fields |= {"summation": "tree", "addend": "late", "products": products}
    elif kind in ("late", "joined"):
        fields["addend"] = kind
    if kind in ("aligned", "joined") or (kind == "late" and rng.random() < 0.6):
        fields["fraction_bits"] = rng.randint(*((14, 36) if kind == "joined" else (10, 48)))
        fields["alignment"] = rng.choice(["truncate", "floor", "nearest_even"])
        lowest = rng.choice([-400, -175, -160])
        fields["min_exponent"] = rng.choice([-400, -126, -133, *[rng.randint(lowest, -126)] * 3])
    if kind == "joined":
        for field, low in (("sum", 20), ("addend", 20), ("result", 22)):
            fields[f"{field}_fraction_bits"] = rng.randint(low, 44)
    return kernels.Arithmetic(name=f"custom {seed}", **fields)  # type: ignore[arg-type]


def assert_same_bits(
    unit: kernels.Arithmetic, found: kernels.Arithmetic, dtype: np.dtype, with_c: bool, seed: int
) -> None:
    """On adversarial sums that no probe has; a box that takes no C is asked without one."""
    for number, (name, draw) in enumerate(GENERATORS.items()):
        for k in (1 + seed % 7, 40):
            a, b, c = draw(np.random.default_rng([seed, number]), 100, k, dtype)
            c = c[:, None, None] if with_c and c is not None else None
            expected, got = (
                words(kernels.reference.matmul(a[:, None], b[:, :, None], c, arithmetic=x))
                for x in (unit, found)
            )
            assert (expected == got).all(), (name, k, np.argwhere(expected != got)[:3, 0], found)


def recovered(
    unit: kernels.Arithmetic, dtype: str = "bfloat16", with_c: bool = False, seed: int = 0
) -> probe.Report:
    """What is not recovered must be called ambiguous, and must not show."""
    report = probe.judge(answers_of(unit, dtype, with_c))
    assert report.arithmetic is not None, str(report)
    truth, found = parameters(unit.mode(dtype, dtype)), parameters(report.arithmetic)
    assert_same_bits(unit, report.arithmetic, BF16 if dtype == "bfloat16" else FP16, with_c, seed)
    for field in ("products", "fraction_bits", "rounding"):
        assert truth[field] == found[field] or report.ambiguous, (field, truth, found)
    return report


def test_hopper_is_recovered_with_evidence() -> None:
    def hopper(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return kernels.reference.matmul(a, b, arithmetic=kernels.NVIDIA_HOPPER)

    report = probe.investigate(hopper)
    assert report.same_as == ("NVIDIA_HOPPER", "NVIDIA_BLACKWELL")
    assert report.ambiguous == {} and not report.with_c
    assert report.longest_k in (1088, 4160)  # as fast as this processor is
    assert all(note.startswith("Not asked") for note in report.notes)  # too slow for that
    assert {"products", "fraction_bits", "min_exponent", "nan"} <= set(report.evidence)
    assert "not 24" in report.evidence["fraction_bits"]


def test_a_unit_that_is_no_preset_is_recovered() -> None:
    unit = replace(
        kernels.NVIDIA_HOPPER,
        name="x",
        products=8,
        fraction_bits=27,
        alignment="floor",
        rounding="nearest_even",
        min_exponent=-130,
    )
    report = recovered(unit)
    assert report.same_as == ()
    assert parameters(report.arithmetic) == parameters(unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "shows"), [(30, True), (31, True), (32, False)])
def test_where_joined_sums_are_cut(bits: int, shows: bool) -> None:
    """Beside a larger C, where CDNA3's result has no place below 2^-32 of that."""
    units = [replace(kernels.AMD_CDNA3, sum_fraction_bits=bits + i) for i in range(2)]
    (tile,) = [t for t in inputs.tiles("bfloat16", False) if t.name.endswith("(0, 64, 65, 66)")]
    found = [words(kernels.reference.matmul(tile.a, tile.b, arithmetic=unit)) for unit in units]
    assert shows != np.array_equal(*found)


@pytest.mark.parametrize("floor", [-148, -149, -150, -151])
def test_floors_below_all_of_fp32_show(floor: int) -> None:
    """In sums of products that are smaller than their result can be."""
    units = [replace(kernels.NVIDIA_HOPPER, min_exponent=floor - i) for i in range(2)]
    small = [tile for tile in inputs.tiles("bfloat16", False) if tile.name.endswith("in parts")]
    found = [
        [words(kernels.reference.matmul(t.a, t.b, arithmetic=unit)) for t in small]
        for unit in units
    ]
    assert len(small) == 2 and not np.array_equal(*found)


@pytest.mark.slow
def test_a_joined_unit_with_other_widths_is_recovered_with_c() -> None:
    unit = replace(
        kernels.AMD_CDNA3,
        name="x",
        products=4,
        fraction_bits=23,
        sum_fraction_bits=38,
        addend_fraction_bits=30,
        result_fraction_bits=26,
    )
    report = recovered(unit, with_c=True)
    assert report.with_c
    wrong = {x for x, y in parameters(unit).items() if y != parameters(report.arithmetic)[x]}
    assert wrong <= set(report.ambiguous)


def case(seed: int) -> dict[str, object]:
    """FP16 for some, a C for half of them."""
    return {
        "dtype": "float16" if seed % 6 == 5 else "bfloat16",
        "with_c": seed % 2 == 0,
        "seed": seed,
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_many_custom_units_are_recovered(seed: int) -> None:
    recovered(custom(seed), **case(seed))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("name", UNITS)
def test_every_unit_is_recovered(name: str, with_c: bool) -> None:
    dtype = "bfloat16" if "bfloat16" in UNITS[name].dtypes else "float16"
    report = recovered(UNITS[name], dtype, with_c)
    assert name in report.same_as or name == "ASCEND_910C_HF32"


def test_a_c_is_found_by_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "judge", lambda answers: answers)
    given: list[np.ndarray | None] = []

    def by_place(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
        return by_name(x, y, c=start)

    def by_name(a: np.ndarray, b: np.ndarray, *, c: np.ndarray | None = None) -> np.ndarray:
        given.append(c)
        with np.errstate(all="ignore"):
            return integers(a, b) + (np.float32(0) if c is None else c)

    def without(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return by_name(a, b)

    for multiply in (by_place, by_name):
        answers = probe.investigate(multiply, dtype="bfloat16")
        assert all(c is not None and c.dtype == np.float32 for c in given)
        for c in (tile.c for tile in answers.tiles):
            wanted = [x for x in given if c is None or x.shape == c.shape]  # type: ignore[union-attr]
            assert any((words(x) == (0 if c is None else words(c))).all() for x in wanted)
        assert any(tile.c is not None for tile in answers.tiles)
        given.clear()
    for multiply, takes_c in ((without, None), (by_name, False)):
        answers = probe.investigate(multiply, dtype="bfloat16", takes_c=takes_c)
        assert all(c is None for c in given) and all(tile.c is None for tile in answers.tiles)


class Rounded:
    """Words of BF16 results, from FP32 ones."""

    def __init__(self, found: np.ndarray | OnDemand) -> None:
        self.found, self.shape = found, found.shape

    def __getitem__(self, at: tuple[int, int]) -> int:
        return narrow(int(self.found[at]), "bfloat16")

    def astype(self, dtype: type) -> np.ndarray:
        m, n = self.shape
        return np.array([[self[i, j] for j in range(n)] for i in range(m)]).astype(dtype)


@pytest.mark.slow
def test_rounded_results_are_understood() -> None:
    """A library that returns BF16 shows less, but nothing that is wrong."""
    unit = kernels.NVIDIA_HOPPER
    answers = answers_of(unit, "bfloat16", with_c=False)
    answers.result = "bfloat16"
    for number, found in enumerate(answers.words):
        answers.words[number] = Rounded(found)  # type: ignore[call-overload]
    report = probe.judge(answers)
    assert report.result == "bfloat16" and report.arithmetic is not None, str(report)
    assert "NVIDIA_HOPPER" in report.same_as
    assert "nan" in report.ambiguous


@pytest.mark.slow
def test_words_of_nans_do_not_decide_the_family() -> None:
    """NaNs of many words, as operands leave them: all else is recovered, and it is said."""
    unit = kernels.NVIDIA_HOPPER
    answers = answers_of(unit, "bfloat16", with_c=False)
    for tile, found in zip(answers.tiles, answers.words, strict=True):
        if tile.group == "specials":
            nan = np.argwhere((found & 0x7FFFFFFF) > 0x7F800000)
            for i, j in nan:
                found[i, j] = 0x7FC00000 | (i * 5 + j) << 3
    report = probe.judge(answers)
    assert report.arithmetic is not None, str(report)
    assert "nan" in report.ambiguous and "NaN" in report.notes[0]
    truth, found = parameters(unit), parameters(report.arithmetic)
    assert {x for x in truth if truth[x] != found[x]} <= {"nan", "nan_rule"}


def half_precision(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An accumulator of FP16: no family of ours."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float16)
    for k in range(a.shape[1]):
        total += (a[:, k : k + 1].astype(np.float32) * b[k].astype(np.float32)).astype(np.float16)
    return total.astype(np.float32)


def test_a_unit_of_no_known_family_is_refused_with_the_failing_probes() -> None:
    with pytest.raises(probe.UnknownArithmetic, match="none of the known families") as refused:
        probe.identify(half_precision)
    report = refused.value.report
    assert report.arithmetic is None and report.failing
    assert all(failure.expected != failure.got for failure in report.failing)


def test_one_wrong_answer_is_noticed() -> None:
    tiles = inputs.tiles("bfloat16", with_c=False)[:2]
    unit = kernels.NVIDIA_HOPPER
    words = [
        words_of(kernels.reference.matmul(t.a, t.b, arithmetic=unit), (16, t.b.shape[1]), t.name)[1]
        for t in tiles
    ]
    answers = Answers("bfloat16", "float32", tiles, words)
    probes = answers.probes(("order", "sums"))
    assert answers.first_miss(unit, probes) is None
    words[1][3, 5] ^= 1
    miss = answers.first_miss(unit, probes)
    assert miss is not None and (miss.tile, miss.i, miss.j) == (1, 3, 5)


def small_answers(unit: kernels.Arithmetic) -> Answers:
    """To the first few tiles and those of short K."""
    tiles = inputs.tiles("bfloat16", with_c=False)
    tiles = [t for t in tiles if t.a.shape[1] < 8 or t.group == "order" or t.name[:6] == "sums 1"]
    found = [
        words(kernels.reference.matmul(t.a, t.b, arithmetic=unit)).astype(np.int64) for t in tiles
    ]
    return Answers("bfloat16", "float32", tiles, found)


def test_every_answer_is_compared_and_what_rejects_a_unit_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit = kernels.NVIDIA_HOPPER
    answers = small_answers(unit)
    monkeypatch.setattr(search, "_widths", lambda answers: [unit])
    monkeypatch.setattr(search, "_completed", lambda answers, widths: widths)
    probes = answers.probes(search.EVERY)
    assert len(probes) == sum(found.size for found in answers.words)
    assert search.search(answers).arithmetic is not None
    last = probes[-1]
    answers.words[last.tile][last.i, last.j] ^= 1
    found = search.search(answers)
    assert found.arithmetic is None and unit in found.tried
    near = nearest.nearest(answers, found.tried)
    assert near.name == "NVIDIA_HOPPER" and near.compared == len(probes)
    assert [(x.i, x.j) for x in near.failing] == [(last.i, last.j)]


def test_the_nearest_record_is_nearest_among_all() -> None:
    """A unit that is a preset but for short K; nothing was tried."""
    answers = small_answers(kernels.X86_AVX512_BF16)
    for tile, found in zip(answers.tiles, answers.words, strict=True):
        if tile.a.shape[1] < 4:
            found[3][found[3] & 0x7FFFFFFF == 0] ^= 0x80000000  # zeros of the other sign
    near = nearest.nearest(answers, ())
    assert near.name == "X86_AVX512_BF16" and near.failing
    assert nearest.where(answers, near.failing) == "where K is 2 or 3"


def exact_sums(tile: inputs.Tile) -> list[tuple[int, int, Fraction]]:
    a, b = (x.astype(np.float64) for x in (tile.a, tile.b))
    return [
        (i, j, sum((Fraction(a[i, k]) * Fraction(b[k, j]) for k in a[i].nonzero()[0]), Fraction()))
        for i, j in np.ndindex(a.shape[0], b.shape[1])
    ]


def named(name: str) -> Answers:
    """One tile and no answers yet."""
    tile = next(t for t in inputs.tiles("bfloat16", with_c=False) if t.name == name)
    return Answers("bfloat16", "float32", [tile], [np.zeros((16, 16), np.int64)])


@pytest.mark.parametrize(
    ("products", "addend"), [(1, "fused"), (4, "fused"), (64, "fused"), (4, "late")]
)
def test_what_is_flushed_shows(products: int, addend: str) -> None:
    """Below 2^-126 before rounding, after rounding to 24 bits (as a record has it), or to counts of
    2^-149.
    """
    unit = kernels.Arithmetic(
        name="x",
        products=products,
        addend=addend,
        subnormal_results="flush",
    )
    answers = named("bottom: just below 2^-126")
    contradicted = {}
    for rule, lowest in (("exact", 0), ("24 bits", 1), ("counts", 2)):
        for i, j, total in exact_sums(answers.tiles[0]):
            # A sum of 2^-126 - lowest * 2^-151 is a tie, and rounds to the even 2^-126.
            tiny = abs(total) < Fraction(2) ** -126 - lowest * Fraction(2) ** -151
            size = 0.0 if tiny else max(2.0**-126, float(abs(total)))
            value = np.float32(size).view(np.uint32)
            answers.words[0][i, j] = int(value) | int(total < 0 and not tiny) << 31
        # Not the rows whose small term is flushed alone: it comes first, or in a step of its own.
        alone = {1: [1], 4: [3] if addend == "late" else []}.get(products, [])
        probes = [x for x in answers.probes(("bottom",)) if x.i // 2 % 4 not in alone]
        contradicted[rule] = len(list(answers.misses(unit, probes)))
    assert contradicted["24 bits"] == 0
    assert contradicted["exact"] > 30 and contradicted["counts"] > 30, contradicted


@pytest.mark.parametrize("products", [1, 16])
def test_where_overflow_begins_shows(products: int) -> None:
    """Infinity from half a last place above the largest number, or for whatever is above it."""
    unit = kernels.Arithmetic(name="x", products=products)
    answers = named("top: half a last place")
    largest = Fraction(2) ** 128 - Fraction(2) ** 104
    half = Fraction(2) ** 103
    beyond = [abs(total) - largest for *_, total in exact_sums(answers.tiles[0])]
    assert min(beyond) < half < max(beyond) and half in beyond
    assert min(abs(x - half) for x in beyond if x != half) < half / 2**20
    contradicted = {}
    for rule, least in (("rounded", half), ("exact", Fraction(0))):
        for i, j, total in exact_sums(answers.tiles[0]):
            over = abs(total) - largest >= least
            answers.words[0][i, j] = (0x7F800000 if over else 0x7F7FFFFF) | int(total < 0) << 31
        probes = answers.probes(("top",))
        if products == 1:  # of these, a smaller term comes after the rounding
            probes = [x for x in probes if x.i < 12]
        contradicted[rule] = len(list(answers.misses(unit, probes)))
    assert contradicted["rounded"] == 0 and contradicted["exact"] > 30, contradicted


def test_amx_is_named() -> None:
    tiles = [
        t
        for t in inputs.tiles("bfloat16", with_c=False)
        if t.group == "dense" or t.name == "bottom: 3 about 2^-149"
    ]
    assert {t.a.shape[1] for t in tiles} == {inputs.K, 3}
    words = []
    for tile in tiles:
        whole = np.zeros((16, 16), np.float32)
        whole[:4, :4] = foreign._amx(tile) if tile.a.shape[1] > 3 else -0.0  # by other cores
        words.append(words_of(whole, (16, 16), tile.name)[1])
    answers = Answers("bfloat16", "float32", tiles, words)
    assert foreign.resembled(answers) == foreign.AMX
    words[1][2, 2] ^= 1
    assert foreign.resembled(answers) is None


def integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Right for small integers."""
    with np.errstate(all="ignore"):
        return a.astype(np.float32) @ b.astype(np.float32)


@pytest.mark.parametrize(
    ("matmul", "message"),
    [
        (
            lambda a, b: integers(a, b)[:2, :2],
            r"expected results of shape \(16, 32\), got \(2, 2\)",
        ),
        (lambda a, b: integers(a, b).astype(np.int32), "expected float32 results .*got int32"),
        (lambda a, b: None, "expected results of shape"),
        (lambda a, b: 0 * integers(a, b), "does not compute A @ B: .* expected -3, got -?0"),
        (lambda a, b: np.nan * integers(a, b), "does not compute A @ B: .* got nan"),
        (
            lambda a, b: np.nextafter(integers(a, b), np.float32(99)),
            r"expected -?\d+, got -?\d+\.\d{6}",
        ),
        (lambda a, b: integers(b.T, a.T).T[::-1], "does not compute A @ B"),
        (lambda a, b, c: integers(a, b), r"does not compute A @ B \+ C"),
        (lambda a, b: 1 / 0, r"ZeroDivisionError for a\[16, 72\] @ b\[72, 32\].*also refused"),
    ],
)
def test_what_multiplies_no_matrices_is_refused_at_once(
    matmul: Callable[..., np.ndarray], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        probe.identify(matmul)


def asked(matmul: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The questions and answers, not judged."""
    monkeypatch.setattr(box, "judge", lambda answers: answers)
    return probe.investigate(matmul)  # type: ignore[return-value]


def one_after_the_other(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In FP32, whatever the sizes are; NumPy's own product may have another order for others."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(np.float32) * b[k].astype(np.float32)
    return total


def test_sizes_that_a_unit_wants_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if any(size % 64 for size in (*a.shape, *b.shape)):
            raise ValueError("sizes must be multiples of 64")
        return one_after_the_other(a, b)

    answers = asked(only_64, monkeypatch)
    for tile, found in zip(answers.tiles, answers.words, strict=True):
        assert tile.a.shape[1] % 64 == 0 and found.shape == (tile.a.shape[0], tile.b.shape[1])
        if tile.group == "order":
            assert (words(one_after_the_other(tile.a, tile.b)) == found).all()


def test_a_unit_that_refuses_specials_is_asked_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def finite(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not (np.isfinite(a.astype(np.float32)).all() and a.shape[1] < 1000):
            raise RuntimeError("cube exception")
        return integers(a, b)

    answers = asked(finite, monkeypatch)
    assert "specials: few (cube exception)" in answers.not_asked
    assert "K = 1088 (cube exception)" in answers.not_asked
    assert {"top", "dense", "long"} <= {tile.group for tile in answers.tiles}
    assert len(answers.tiles) == len(answers.words)


@pytest.mark.parametrize("way", ["raises", "another shape", "another type"])
def test_a_unit_that_refuses_odd_sizes_is_asked_the_rest(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def even(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = integers(a, b)
        if len(a) % 2 and len(a) > 1:
            if way == "raises":
                raise RuntimeError("odd sizes")
            product = product[:, :2] if way == "another shape" else product.astype(BF16)
        return product

    answers = asked(even, monkeypatch)
    text = {
        "raises": "5 x 37 x 3 (odd sizes)",
        "another shape": "expected results of shape (5, 3), got (5, 2)",
        "another type": "its results are bfloat16, others float32",
    }
    assert text[way] in " ".join(answers.not_asked)
    assert {"dense", "long", "single"} <= {tile.group for tile in answers.tiles}
    assert "odd" not in {tile.group for tile in answers.tiles}


def test_long_sums_are_asked_of_a_slow_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "_PATIENCE_S", 0)
    answers = asked(integers, monkeypatch)
    assert [t.name for t in answers.tiles if t.group == "long"] == ["K = 320", "K = 1088"]
    # A second for every call, whatever its size, is no reason to leave products out.
    timed = [(10_000, 1.0), (200_000, 1.01), (10_000, 1.0)]
    assert 1 <= box._seconds(timed, 16 * 4160 * 16) < 2
    assert box._seconds([(10_000, 0.1), (200_000, 1.1)], 10_000_000) > 30


def test_long_sums_that_change_from_run_to_run_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = iter(range(10_000))

    def unsteady(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        k = a.shape[1]
        half = (k // 2, k // 4)[next(turns) % 2] if k == 1088 else k
        return integers(a[:, :half], b[:half]) + integers(a[:, half:], b[half:])

    assert asked(unsteady, monkeypatch).unsteady == "K = 1088"


def test_answers_that_change_from_run_to_run_are_noticed() -> None:
    rng = np.random.default_rng()

    def unsteady(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        order = rng.permutation(a.shape[1])
        return integers(a[:, order], b[order])

    with pytest.raises(probe.UnknownArithmetic, match="not give the same bits every time"):
        probe.identify(unsteady)


def other_shapes(unit: kernels.Arithmetic, tiling: kernels.Tiling | None = None) -> Answers:
    """Sums of up to 1088 products and the large product, in an order of a library's."""
    tiles = [t for t in shapes.tiles("bfloat16") if t.name != "K = 4160"]
    answers = Answers("bfloat16", "float32", [inputs.tiles("bfloat16", False)[0], *tiles], [])
    for tile in answers.tiles:
        few = 4 if tile.group == "large" else 32
        a, b = tile.a[:few], tile.b[:, :few]
        product = words(kernels.reference.matmul(a, b, arithmetic=unit, tiling=tiling))
        repeat = tile.a.shape[0] // a.shape[0], tile.b.shape[1] // b.shape[1]
        answers.words.append(np.tile(product, repeat).astype(np.int64))
    return answers


def test_long_sums_are_compared_too() -> None:
    unit = kernels.NVIDIA_HOPPER
    verdict = shapes.judge(other_shapes(unit), unit)
    assert replace(verdict, compared=0) == shapes.Verdict(longest_k=1088, notes=(), failing=())
    assert verdict.compared > 5 * 3 + 13 * 19 + 2 * 12 + 48  # all odd ones, samples of others
    other = shapes.judge(other_shapes(replace(unit, products=8)), unit)
    assert other.failing and other.longest_k == inputs.ORDER_K
    names = {"5 x 37 x 3", "13 x 131 x 19", "K = 320", "K = 1088"}
    assert {failure.probe for failure in other.failing} == names


def test_sizes_that_are_no_multiples_of_8_are_compared() -> None:
    """A library may give them to other cores: here to a chain of multiply-adds."""
    unit = kernels.NVIDIA_HOPPER
    answers = small_answers(unit)
    for tile in shapes.tiles("bfloat16"):
        if tile.group == "odd":
            product = kernels.reference.matmul(tile.a, tile.b, arithmetic=kernels.FP32_FMA_CHAIN)
            answers.tiles = [*answers.tiles, tile]
            answers.words.append(words(product).astype(np.int64))
    failing = shapes.judge(answers, unit).failing
    assert {failure.probe for failure in failing} == {"5 x 37 x 3", "13 x 131 x 19"}
    assert nearest.where(answers, failing) == "where K is 37 or 131"
    assert not shapes.judge(answers, kernels.FP32_FMA_CHAIN).failing


def test_parts_of_a_long_sum_are_named() -> None:
    unit = kernels.NVIDIA_HOPPER
    tiling = kernels.Tiling(base_m=64, base_n=64, base_k=64, step_k=4, split_k=3)
    verdict = shapes.judge(other_shapes(unit, tiling), unit)
    assert not verdict.failing and verdict.longest_k == inputs.ORDER_K and verdict.reordered
    assert "K = 320: K is not summed in ascending order, but in 2 parts of 256" in verdict.notes[0]


def test_a_record_says_up_to_which_k_it_holds() -> None:
    verdict = shapes.Verdict(longest_k=128, reordered=True, notes=("x",), failing=())
    said = {"compared": 1, "asked": 1, "dtype": "bfloat16", "with_c": False}
    unit = reports._named(kernels.NVIDIA_HOPPER, ["NVIDIA_HOPPER"], {}, verdict, said)
    assert unit.name == "probed (NVIDIA_HOPPER), K up to 128"
    unit = reports._named(unit, ["NVIDIA_HOPPER"], {}, replace(verdict, reordered=False), said)
    assert unit.name == "probed (NVIDIA_HOPPER)"


def test_failures_name_nans() -> None:
    failure = probe.Failure(probe="x", i=1, j=2, expected=-1, got=0x3F800000)
    assert str(failure) == "x [1, 2]: got 3f800000, expected NaN"
    narrow = probe.Failure(probe="x", i=1, j=2, expected=0, got=0x42C0, result="bfloat16")
    assert str(narrow) == "x [1, 2]: got 42c0, expected 0000"


def test_sums_that_depend_on_their_place_are_noticed() -> None:
    unit = kernels.FP32_FMA_CHAIN
    answers = other_shapes(unit)
    tile = answers.tiles[-1]
    start = {
        "arithmetic": unit,
        "tiling": kernels.Tiling(base_m=4, base_n=4, base_k=256, k_shift=True),
    }
    a, b = tile.a[:4], tile.b[:, :8]
    moved = words(kernels.reference.matmul(a, b, **start))[:, 4:]
    answers.words[-1][128:132, 256:260] = moved
    verdict = shapes.judge(answers, unit)
    assert not verdict.failing
    assert (
        "from [129, 256]: K is not summed in ascending order, but from K = 256" in verdict.notes[0]
    )
    assert "depends on where an output lies; [0, 0] and [128, 256]" in verdict.notes[1]


@pytest.mark.parametrize("name", UNITS)
def test_an_arithmetic_file_holds_a_record(name: str, tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    arithmetic_file.save(UNITS[name], path)
    assert arithmetic_file.load(path) == UNITS[name]
    assert arithmetic_file.named(name) == UNITS[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected an arithmetic file in JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": "cm384 arithmetic 1", "name": "x"}', "'products' is missing"),
        ('{"format": "cm384 arithmetic 1", "name": "x", "products": 0}', "products must be"),
        ('{"format": "cm384 arithmetic 1", "name": "x", "products": 4, "k": 1}', "unknown field"),
        ('{"format": "cm384 arithmetic 1", "name": "x", "products": 4, "nan": "z"}', "nan must"),
        ('{"format": "cm384 arithmetic 1", "name": "x", "products": 4, "fp32": 1}', "fp32 must"),
    ],
)
def test_a_bad_arithmetic_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        arithmetic_file.load(path)


def test_emulate_takes_names_and_files(tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    arithmetic_file.save(kernels.NVIDIA_HOPPER, path)
    a = np.random.default_rng(0).normal(size=(2, 16, 48)).astype(np.float32).astype(BF16)
    cloud = em.cloudmatrix384()
    wanted = np.asarray(kernels.matmul(a[0], a[1].T, arithmetic=kernels.NVIDIA_HOPPER))

    def product(x, y):
        import jax.numpy as jnp

        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    for choice in ("NVIDIA_HOPPER", str(path), path):
        got = np.asarray(em.emulate(product, on=cloud, arithmetic=choice)(a[0], a[1].T))
        assert (got.view(np.uint32) == wanted.view(np.uint32)).all()
    with pytest.raises(ValueError, match="unknown arithmetic 'NVIDIA_HOPER'"):
        em.emulate(product, on=cloud, arithmetic="NVIDIA_HOPER")


def run_script(at: Path) -> None:
    """The stand-alone script in a process that sees NumPy and nothing of the project."""
    command = [sys.executable, "-I", str(at / "run_probe.py"), "--backend", "numpy"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=at.parent)
    assert "in outputs.npz" in done.stdout and "cm384 probe --read" in done.stdout


def replace_outputs(at: Path, unit: kernels.Arithmetic) -> None:
    """As if the folder had been to a device with this unit."""
    answers = folder.read(at)
    with np.load(at / "outputs.npz") as outputs:
        arrays = dict(outputs)
    about = json.loads(str(arrays["about"]))
    for number, tile in enumerate(answers.tiles):
        if tile.group in shapes.GROUPS:  # the definition would take minutes
            about["refused"][number] = "other shapes are not supported"
            continue
        product = kernels.reference.matmul(tile.a, tile.b, arithmetic=unit)
        arrays[f"d{number}"] = product.view(np.uint32)
    arrays["about"] = np.array(json.dumps(about))
    np.savez(at / "outputs.npz", **arrays)


def test_from_the_probes_to_a_program_by_the_command(
    cm384: Callable[..., Answer], tmp_path: Path
) -> None:
    at, unit = tmp_path / "probe", tmp_path / "unit.json"
    answer = cm384("probe", "--write", at)
    assert answer.code == 0 and "python probe/run_probe.py" in answer.out
    answer = cm384("probe", "--read", at)
    assert answer.code and "on the device first" in answer.err
    run_script(at)
    replace_outputs(at, kernels.NVIDIA_AMPERE)
    answer = cm384("probe", "--read", at, "--out", unit)
    assert answer.code == 0, answer.err
    assert "Not asked: K = 320 (other shapes are not supported)" in answer.out
    assert "Same bits as: NVIDIA_AMPERE, NVIDIA_ADA" in answer.out
    assert f"--arithmetic {unit}" in answer.out
    found = arithmetic_file.load(unit)
    assert parameters(found) == parameters(kernels.NVIDIA_AMPERE)
    assert found.evidence == "measured" and "answers compared: bfloat16" in answer.out
    answer = cm384("run", "matmul", "--size", "48", "--arithmetic", unit)
    assert answer.code == 0 and "probed (NVIDIA_AMPERE)" in answer.out + answer.err, answer


@pytest.mark.slow  # each compiles its own arithmetic three ways
@pytest.mark.parametrize("name", ["NVIDIA_HOPPER", "ASCEND_910C/late_addend"])
def test_run_takes_an_arithmetic(cm384: Callable[..., Answer], name: str) -> None:
    answer = cm384("run", "matmul", "--size", "48", "--arithmetic", name)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("probe --write x --read y", "three different things"),
        ("probe --read nowhere", "nowhere is not a probe folder"),
        ("probe --read nowhere --dtype float16", "--dtype float16: the folder"),
        ("probe --preset NVIDIA_HOPER", "unknown arithmetic 'NVIDIA_HOPER'"),
        ("probe --preset NVIDIA_HOPPER --dtype float64", "must be bfloat16 or float16"),
        ("probe --write x --dtype int8", "must be bfloat16 or float16"),
        ("probe --write x --out unit.json", "it goes with --read"),
        ("probe --preset NVIDIA_HOPPER --out no/where.json", "there is no folder no"),
        ("probe --preset NVIDIA_HOPPER --force", "--force goes with --write"),
        ("run matmul --arithmetic NVIDIA_HOPER", "unknown arithmetic 'NVIDIA_HOPER'"),
    ],
)
def test_the_command_refuses(
    cm384: Callable[..., Answer],
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = cm384(*arguments.split())
    assert answer.code and message in answer.err, answer
    assert not list(tmp_path.iterdir())


def test_a_preset_is_probed_with_the_operands_asked_for(
    cm384: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def investigate(matmul: object, *, dtype: str | None = None) -> probe.Report:
        asked.append(dtype)
        return probe.Report(
            arithmetic=None,
            evidence={},
            ambiguous={},
            dtype="float16",
            result="float32",
            with_c=True,
            compared=0,
        )

    monkeypatch.setattr(probe, "investigate", investigate)
    answer = cm384("probe", "--preset", "NVIDIA_HOPPER", "--dtype", "float16")
    assert asked == ["float16"]
    assert answer.code and "none of the known families" in answer.err
    assert "float16 operands" in answer.out


def test_a_folder_holds_the_same_probes(tmp_path: Path) -> None:
    at = folder.write(tmp_path / "probe")
    run_script(at)
    answers = folder.read(at)
    asked = [*inputs.tiles("bfloat16", with_c=False), *shapes.tiles("bfloat16")]
    for tile, other, found in zip(asked, answers.tiles, answers.words, strict=True):
        assert tile.name == other.name and tile.group == other.group
        assert (tile.a.view(np.uint16) == other.a.view(np.uint16)).all()
        assert (tile.b.view(np.uint16) == other.b.view(np.uint16)).all()
        if tile.name == "normal":  # the same product, in FP32 by NumPy
            values = found.astype(np.uint32).view(np.float32)
            exact = tile.a.astype(np.float64) @ tile.b.astype(np.float64)
            assert np.abs(values - exact).max() < 1e-4


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    at = tmp_path / "probe"
    with pytest.raises(FileNotFoundError, match="not a probe folder"):
        folder.read(at)
    at.mkdir()
    (at / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        folder.write(at)
    folder.write(at, force=True)
    assert (at / "letter.txt").read_text() == "keep me"
    with pytest.raises(FileNotFoundError, match="run_probe.py.* on the device first"):
        folder.read(at)
    run_script(at)
    with np.load(at / "outputs.npz") as outputs:
        whole = dict(outputs)
    for change, message in (
        ({"d3": whole["d3"][:5]}, r"probe 3 .*: expected uint32 words of shape \(16, 16\)"),
        ({"d3": whole["d3"].astype(np.int64)}, "probe 3 .*: expected uint32 words"),
        ({"about": np.array("{}")}, "outputs.npz"),
        ({"about": np.array('{"inputs": "x", "result": "float32"}')}, "belongs to other inputs"),
    ):
        np.savez(at / "outputs.npz", **(whole | change))
        with pytest.raises(ValueError, match=message):
            folder.read(at)
    about = json.loads(str(whole["about"]))
    for remarks, message in (
        ({"result": ["float32"]}, r"expected results in float32, .* got \['float32'\]"),
        ({"refused": [1]}, "'refused' names other probes than 0 to"),
        ({"refused": {"999": "no"}}, "'refused' names other probes than 0 to"),
        ({"refused": {"-1": "no"}}, "'refused' names other probes than 0 to"),
        ({"refused": {"0": "too hot"}}, r"refused probe 0 \(order\): too hot; only infinities"),
        ({"changed": None}, "'changed' names other probes than 0 to"),
        ({"changed": ["a"]}, "'changed' names other probes than 0 to"),
    ):
        np.savez(at / "outputs.npz", **whole | {"about": np.array(json.dumps(about | remarks))})
        with pytest.raises(ValueError, match=message):
            folder.read(at)
    np.savez(at / "outputs.npz", **{name: x for name, x in whole.items() if name != "d7"})
    with pytest.raises(ValueError, match="probe 7 .* is missing; run run_probe.py again"):
        folder.read(at)
    (at / "outputs.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="outputs.npz is damaged"):
        folder.read(at)
    with np.load(at / "inputs.npz") as stored:
        asked = dict(stored)
    tiles = json.loads(str(asked["tiles"]))
    for listed, message in (
        (None, "its list of probes is None"),
        (tiles[:3], "probes of the group 'bottom' are missing; write"),
        ([*tiles[:-1], tiles[-1] | {"group": "x"}], "group 'large' are missing; write"),
        ([*tiles, tiles[3] | {"group": "x"}], "inputs.npz: a[0-9]+ is missing"),
        ([tiles[0], tiles[1] | {"group": "x"}, *tiles[2:]], "there is no group 'x'"),
        ([tiles[0], tiles[1] | {"group": [5]}, *tiles[2:]], r"probe 1, got .*'group': \[5\]"),
        ([tiles[0], tiles[1] | {"c": 1}, *tiles[2:]], "thorough .* of probe 1, got .*'c': 1"),
        ([tiles[0], tiles[1] | {"name": 7}, *tiles[2:]], "inputs.npz is damaged: expected name"),
        ([tiles[0], "x", *tiles[2:]], "probe 1, got 'x'; write the probes again"),
        ([tiles[0], tiles[1] | {"group": "large"}, *tiles[2:]], "in fours of probe 1"),
    ):
        few = {"a1": asked["a1"][:15]} if "fours" in message else {}
        np.savez(at / "inputs.npz", **asked | few | {"tiles": np.array(json.dumps(listed))})
        with pytest.raises(ValueError, match=message):
            folder.read(at)
    np.savez(at / "inputs.npz", **asked | {"a0": asked["a0"][:0]})
    with pytest.raises(ValueError, match=r"inputs.npz: shapes \(0, 128\) and .* of probe 0 do not"):
        folder.read(at)
    np.savez(at / "inputs.npz", **asked)
    (at / "inputs.npz").write_bytes((at / "inputs.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="inputs.npz is damaged: it is cut short"):
        folder.read(at)
    folder.write(at)  # a new start
    assert not (at / "outputs.npz").exists()


def test_what_others_wrote_is_kept(tmp_path: Path) -> None:
    at = folder.write(tmp_path / "probe")
    folder.write(at)  # the same again
    (at / "run_probe.py").unlink()
    folder.write(at)
    (at / "run_probe.py").write_text("def multiply(): ...")
    with pytest.raises(ValueError, match="run_probe.py is not the script that would be written"):
        folder.write(at)
    assert (at / "run_probe.py").read_text() == "def multiply(): ..."
    folder.write(at, force=True)
    assert "hashlib" in (at / "run_probe.py").read_text()
    other = tmp_path / "other"
    other.mkdir()
    np.savez(other / "inputs.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="not empty and not a probe folder"):
        folder.write(other)
    (other / "inputs.npz").unlink()
    (other / "inputs.npz").mkdir()
    with pytest.raises(ValueError, match="inputs.npz is a folder; remove it"):
        folder.write(other, force=True)
    assert [path.name for path in other.iterdir()] == ["inputs.npz"]


def test_the_script_refuses_what_cannot_be_read_afterwards(tmp_path: Path) -> None:
    at = folder.write(tmp_path / "probe")
    command = [sys.executable, "-I", str(at / "run_probe.py"), "--backend", "numpy"]

    def refused(message: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode and message in done.stderr, done
        assert "Traceback" not in done.stderr and not (at / "outputs.npz").exists()

    (at / "outputs.npz.part").mkdir()
    refused("outputs.npz.part is a folder; remove it")
    (at / "outputs.npz.part").rmdir()
    script, call = at / "run_probe.py", "return multiply_numpy(a, b, dtype)"
    text = script.read_text()
    for change, message in (
        (
            "x, y = multiply_numpy(a, b, dtype); return x.view(np.float32), y",
            "uint32 words, got fl",
        ),
        ("return multiply_numpy(a, b, dtype)[0].tolist(), 'float32'", "uint32 words, got list"),
        ("return multiply_numpy(a, b, dtype)[0], 'float64'", "bfloat16, float16, got 'float64'"),
        ("x, y = multiply_numpy(a, b, dtype); return x[:2], y", "shape (16, 128), got (2, 128)"),
    ):
        script.write_text(text.replace(call, change))
        refused(message)
