"""The definition against published probes, closed forms and exact rational arithmetic; and the
twin beside it.
"""

import dataclasses
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import kernels
from kernels import (
    ASCEND_910C,
    ASCEND_910C_CANDIDATES,
    FP32_FMA_CHAIN,
    NVIDIA_HOPPER,
    X86_AVX512_BF16,
    Arithmetic,
)
from tests import probe_table
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, words

FUNCTIONS = pytest.mark.parametrize(
    "function", [kernels.reference.matmul, kernels.matmul], ids=["reference", "twin"]
)

COLUMNS: dict[str, Arithmetic] = {
    # Volta multiplies FP16 alone; the probes need the range of BF16.
    "V100": dataclasses.replace(kernels.NVIDIA_VOLTA, dtypes=("bfloat16",)),
    "A100": kernels.NVIDIA_AMPERE,
    "H100": NVIDIA_HOPPER,
    "CDNA1": kernels.AMD_CDNA1,
    "CDNA2": kernels.AMD_CDNA2,
    "CDNA3": kernels.AMD_CDNA3,
    "chain": FP32_FMA_CHAIN,
    "VDP": X86_AVX512_BF16,
    "A16": ASCEND_910C,
    "A4": ASCEND_910C_CANDIDATES["products_4"],
}


def same_words(got: np.ndarray, expected: list[str], names: list[str]) -> None:
    wrong = {
        name: f"{int(word):08x}, expected {value:0>8}"
        for name, word, value in zip(names, words(got).ravel(), expected, strict=True)
        if value != "?" and int(word) != int(value, 16)
    }
    assert not wrong


@FUNCTIONS
@pytest.mark.parametrize("column", probe_table.COLUMNS)
def test_probe_table(column, function):
    a, b, c = probe_table.operands(probe_table.PROBES)
    got = function(a, b, c, arithmetic=COLUMNS[column])
    expected = probe_table.expected(probe_table.PROBES, probe_table.COLUMNS.index(column))
    same_words(got, expected, list(probe_table.PROBES))


@FUNCTIONS
@pytest.mark.parametrize("column", probe_table.CANDIDATE_COLUMNS)
def test_probes_that_tell_the_candidates_apart(column, function):
    probes = probe_table.CANDIDATE_PROBES
    a, b, c = probe_table.operands(probes)
    got = function(a, b, c, arithmetic=ASCEND_910C_CANDIDATES[column])
    expected = probe_table.expected(probes, probe_table.CANDIDATE_COLUMNS.index(column))
    same_words(got, expected, list(probes))


def test_a_late_or_narrow_or_partial_sum_is_no_other_candidate():
    """Any two candidates differ on some probe or some drawn input."""
    a, b, c = probe_table.operands(probe_table.PROBES | probe_table.CANDIDATE_PROBES)
    seen: dict[bytes, str] = {}
    drawn = [draw(name, 5, 60, 32, BF16) for name in ("wide", "cancelling", "tiny_with_zeros")]
    for name, arithmetic in ASCEND_910C_CANDIDATES.items():
        answers = [words(kernels.reference.matmul(a, b, c, arithmetic=arithmetic)).tobytes()]
        for x, y, z in drawn:
            found = kernels.reference.matmul(x, y, z, arithmetic=arithmetic)
            answers.append(words(found).tobytes())
        key = b"".join(answers)
        assert key not in seen, f"{name} and {seen.get(key)} never differ"
        seen[key] = name


E = 2.0**-24

# Fasi, Higham, Mikaitis and Pranesh (2021), K filled up with zeros: (a, b, c), then what V100, A100
# and H100 give.
FASI = {
    "D1": ([1], [1], -(1 - E), (2 * E, E, E)),
    "D2": ([1] * 4, [E] * 4, 1 - E, (1 + 2 * E,) * 3),
    "D3": ([1, 1], [1, -E], -1 + E, (2 * E, 0, 0)),
    "D4": ([1] * 4, [1, 1.5, 1.75, 1.875], 1.875, (8,) * 3),
    "D4b": ([1] * 4, [1] * 4, 1 + 3 * 2.0**-23, (5,) * 3),
    "D5, c=1-e": ([0.5] * 4, [E, E, E, 3 * E], 1 - E, (1, 1 + 2 * E, 1 + 2 * E)),
    "D5, c=1": ([0.5] * 4, [E, E, E, 3 * E], 1, (1, 1, 1 + 2 * E)),
    "D5b, c=1-e": ([2.0**-13] * 16, [2.0**-13] * 16, 1 - E, (1 - E, 1 - E, 1 + 2 * E)),
    "D5b, c=1": ([2.0**-13] * 16, [2.0**-13] * 16, 1, (1, 1, 1)),
}


@FUNCTIONS
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: d.name)
def test_feature_vectors(function, dtype):
    probes = {name: (*row[:3], "") for name, row in FASI.items()}
    a, b, c = probe_table.operands(probes, dtype)
    for place, column in enumerate(("V100", "A100", "H100")):
        record = dataclasses.replace(COLUMNS[column], dtypes=("bfloat16", "float16"))
        got = np.asarray(function(a, b, c, arithmetic=record)).ravel()
        expected = [np.float32(row[3][place]) for row in FASI.values()]
        assert dict(zip(FASI, got, strict=True)) == dict(zip(FASI, expected, strict=True)), column


@FUNCTIONS
def test_hopper_exponent_floor_vector(function):
    """The public hardware vector that only e_zero = -133 explains (from MATLAB-tensor-core)."""
    a = "9b94 19f3 9a2e 1a67 9a25 9b4e 9b29 9a33 99e0 1a14 9914 99d1 9ae9 1b1a 9a9c 1b3a"
    b = "9aaf 99f3 9acc 1b7c 19ed 1b25 9a1b 9a20 9af7 9a48 1ae1 1b32 1b12 1b0e 9a68 1735"
    a, b = (np.array([int(w, 16) for w in x.split()], np.uint16).view(BF16) for x in (a, b))
    assert words(function(a[None], b[:, None], arithmetic=NVIDIA_HOPPER))[0, 0] == 0x0000000B
    for floor in (-126, -132, -134, -150):
        other = dataclasses.replace(NVIDIA_HOPPER, min_exponent=floor)
        assert words(function(a[None], b[:, None], arithmetic=other))[0, 0] == 0x0000000A


@FUNCTIONS
def test_subnormal_sums_of_cdna3_are_cut_where_normal_ones_begin(function):
    """31 fraction bits below 2^-126, not below the leading one: 2^-158 is cut off beside a tie, so
    that the tie goes to even (mmasim 2.1.1 normalises with the exponent of subnormals).
    """
    tie, count = 2.0**-150, 2.0**-149
    rows = [(count, tie, sign * 2.0**-158) for sign in (1, -1)]
    rows += [(-x, -y, -z) for x, y, z in rows]
    a = np.array([[x * 2.0**75, y * 2.0**75, z * 2.0**75] for x, y, z in rows]).astype(BF16)
    b = np.full((3, 1), 2.0**-75).astype(BF16)
    got = words(function(a, b, arithmetic=kernels.AMD_CDNA3))[:, 0]
    # 1.5 counts are a tie. Cut toward minus infinity, +2^-158 becomes 0 and -2^-158 becomes
    # -2^-157: a tie stays one, or is passed by downwards.
    assert [f"{word:08x}" for word in got] == ["00000002", "00000001", "80000002", "80000002"]


@FUNCTIONS
def test_signs_of_zeros_of_amd(function):
    """AMD does not say; this is what `kernels.arithmetic` says was chosen."""
    a = np.array([[-(2.0**-100), 0], [-0.0, -0.0], [1, -1]]).astype(BF16)
    b = np.array([[2.0**-100, 1, 1], [2.0**-100, 1, 1]]).astype(BF16)
    c = np.full((3, 3), -0.0, np.float32)
    for unit in (kernels.AMD_CDNA1, kernels.AMD_CDNA2, kernels.AMD_CDNA3):
        assert not words(function(a, b, c, arithmetic=unit)).diagonal().any(), unit.name
    # CDNA2 flushes what is left of C, and keeps its sign.
    least, c = np.full((1, 1), 2.0**-63).astype(BF16), np.full((1, 1), -1.5 * 2.0**-126, np.float32)
    assert words(function(least, least, c, arithmetic=kernels.AMD_CDNA2))[0, 0] == 0x80000000


@FUNCTIONS
def test_nans_of_fp32_operands_that_are_cut(function):
    """TF32 ignores the last 13 bits, whatever they mean; HF32 rounds numbers only."""
    low, high = (
        np.array([[word]], np.uint32).view(np.float32) for word in (0x7F800001, 0x7F802000)
    )
    one = np.ones((1, 1), np.float32)
    for unit, expected in (
        (NVIDIA_HOPPER, (0x7F800000, 0x7FFFFFFF)),
        (kernels.ASCEND_910C_HF32, (0x7FC00000, 0x7FC00000)),
    ):
        got = [words(function(x, one, arithmetic=unit))[0, 0] for x in (low, high)]
        assert tuple(got) == expected, unit.name


def fprev(function, arithmetic: Arithmetic, n: int) -> np.ndarray:
    """What survives of n ones when summand i is 2^60 and j is -2^60 (order-revealing matrix, i <
    j).
    """
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    a = np.ones((len(pairs), 1, n))
    for row, (i, j) in zip(a, pairs, strict=True):
        row[0, i], row[0, j] = 2.0**30, -(2.0**30)
    b = np.where(np.abs(a) == 1, 1.0, 2.0**30).swapaxes(1, 2)
    left = function(a.astype(BF16), b.astype(BF16), arithmetic=arithmetic)
    table = np.full((n, n), -1.0)
    for (i, j), value in zip(pairs, np.asarray(left)[:, 0, 0], strict=True):
        table[i, j] = value
    return table


def exact_step(n: int, width: int, i: int, j: int) -> int:
    return n - 2 if i // width == j // width else n - 1 - width * (j // width)


def aligned_step(n: int, width: int, i: int, j: int) -> int:
    return n - width * (1 + j // width)


def tree_step(n: int, width: int, i: int, j: int) -> int:
    leaves = 1
    while leaves < width and i // leaves != j // leaves:
        leaves *= 2
    return n - leaves if i // leaves == j // leaves else aligned_step(n, width, i, j)


FORMS = [
    (FP32_FMA_CHAIN, lambda n, i, j: n - 1 - j),
    (X86_AVX512_BF16, lambda n, i, j: n - 1 - max(i ^ 1, j ^ 1)),
    (kernels.AMD_CDNA1, lambda n, i, j: exact_step(n, 2, i, j)),
    (kernels.AMD_CDNA2, lambda n, i, j: tree_step(n, 4, i, j)),
    (kernels.AMD_CDNA3, lambda n, i, j: aligned_step(n, 8, i, j)),
    (COLUMNS["V100"], lambda n, i, j: aligned_step(n, 4, i, j)),
    (kernels.NVIDIA_AMPERE, lambda n, i, j: aligned_step(n, 8, i, j)),
    (NVIDIA_HOPPER, lambda n, i, j: aligned_step(n, 16, i, j)),
    (ASCEND_910C, lambda n, i, j: exact_step(n, 16, i, j)),
    (ASCEND_910C_CANDIDATES["products_8"], lambda n, i, j: exact_step(n, 8, i, j)),
    (ASCEND_910C_CANDIDATES["products_4"], lambda n, i, j: exact_step(n, 4, i, j)),
    (ASCEND_910C_CANDIDATES["tree"], lambda n, i, j: tree_step(n, 16, i, j)),
    (ASCEND_910C_CANDIDATES["guard_2_truncate"], lambda n, i, j: aligned_step(n, 16, i, j)),
]


@FUNCTIONS
@pytest.mark.parametrize("arithmetic,form", FORMS, ids=[a.name for a, _ in FORMS])
def test_order_revealing_matrices(function, arithmetic, form):
    n = 32
    expected = np.array([[form(n, i, j) if i < j else -1 for j in range(n)] for i in range(n)])
    assert (fprev(function, arithmetic, n) == expected).all()


def test_order_revealing_row_of_vdpbf16ps():
    row = fprev(kernels.reference.matmul, X86_AVX512_BF16, 16)[0, 1:]
    assert row.tolist() == [14, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1]


def rational(a, b, c, width: int) -> int:
    """An oracle of its own for exact steps of finite operands: fractions, and the nearest FP32 by
    NumPy.
    """
    total = Fraction(float(c))
    for first in range(0, len(a), width):
        for x, y in zip(a[first : first + width], b[first : first + width], strict=True):
            total += Fraction(float(x)) * Fraction(float(y))
        total = nearest_float32(total)
        if isinstance(total, float):
            return int(np.float32(total).view(np.uint32))
    return int(np.float32(float(total)).view(np.uint32))


def nearest_float32(x: Fraction) -> Fraction | float:
    exponent = -149
    while abs(x) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    rounded = (
        round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent
    )  # Python rounds half to even
    return rounded if abs(rounded) < 2**128 else float("inf") if rounded > 0 else float("-inf")


@pytest.mark.parametrize(
    "name", ["normal", "wide", "cancelling", "tiny_sums", "tiny_with_zeros", "ties"]
)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda d: d.name)
def test_reference_is_exact_rational_arithmetic(name, dtype):
    a, b, c = draw(name, 21, 150, 32, dtype)
    got = words(kernels.reference.matmul(a, b, c, arithmetic=ASCEND_910C))[:, 0, 0]
    start = np.zeros(len(a)) if c is None else c[:, 0, 0]
    width = 4 if dtype == FP32 else 16
    for row in range(len(a)):
        assert got[row] == rational(a[row, 0], b[row, :, 0], start[row], width)


def test_generators_produce_what_they_promise():
    for name in GENERATORS:
        a, b, _ = draw(name, 1, 300, 16, BF16)
        assert a.shape == (300, 1, 16) and b.shape == (300, 16, 1), name
    subnormal = draw("subnormal_inputs", 1, 300, 16, BF16)[0].view(np.uint16) & 0x7FFF
    assert (subnormal < 0x80).all() and (subnormal > 0).any()
    a, _, _ = draw("raw", 1, 300, 16, BF16)
    assert np.isnan(a.astype(np.float32)).any()


JOINED = ("sum_fraction_bits", "addend_fraction_bits", "result_fraction_bits")


@pytest.mark.parametrize(
    "field,change",
    [
        ("products", {"products": 0}),
        ("products", {"products": 1.5}),
        ("products", {"products": 6, "summation": "tree", "addend": "late"}),
        ("fraction_bits", {"fraction_bits": -1, "min_exponent": -133}),
        ("fraction_bits", {"fraction_bits": 20, "min_exponent": -133, "summation": "chain"}),
        ("fraction_bits", {"addend": "joined", **dict.fromkeys(JOINED, 24)}),
        ("min_exponent", {"fraction_bits": 25}),
        ("min_exponent", {"min_exponent": 3, "fraction_bits": 25}),
        ("sum_fraction_bits", {"addend": "joined", "fraction_bits": 24, "min_exponent": -133}),
        ("result_fraction_bits", {"result_fraction_bits": 31}),
        ("summation", {"summation": "sequential"}),
        ("addend", {"summation": "tree"}),
        ("addend", {"summation": "chain", "addend": "late"}),
        ("rounding", {"rounding": "up"}),
        ("alignment", {"alignment": "round"}),
        ("specials", {"specials": "saturate"}),
        ("overflow", {"overflow": "wrap"}),
        ("nan_rule", {"nan_rule": "propagate"}),
        ("nan", {"nan": 0x7F800000}),
        ("nan", {"nan": -1}),
        ("nan", {"nan": 0x17FC00000}),
        ("alignment", {"alignment": "floor"}),
        ("min_exponent", {"min_exponent": -126}),
        ("operand_rounding", {"operand_rounding": "nearest_even"}),
        ("dtypes", {"dtypes": ["bfloat16"]}),
        ("dtypes", {"dtypes": ("int4",)}),
        ("dtypes", {"dtypes": ("int8",)}),
        ("operand_fraction_bits", {"operand_fraction_bits": 0}),
        ("fp32", {"fp32": NVIDIA_HOPPER}),
        ("fp16", {"fp16": X86_AVX512_BF16}),
        ("fp32", {"fp32": "ASCEND_910C"}),
        ("evidence", {"evidence": "rumoured"}),
    ],
    ids=str,
)
def test_impossible_records_are_refused(field, change):
    with pytest.raises(ValueError, match=field) as error:
        dataclasses.replace(ASCEND_910C, **change)
    assert str(error.value).startswith("Arithmetic 'ASCEND_910C': ")


@pytest.mark.parametrize("name", [3, None])
def test_a_record_has_a_name(name):
    with pytest.raises(ValueError, match="name must be a string"):
        dataclasses.replace(ASCEND_910C, name=name)


def test_modes():
    assert ASCEND_910C.mode("bfloat16", "bfloat16") is ASCEND_910C
    assert ASCEND_910C.mode("bfloat16", "float32") is ASCEND_910C.fp32
    assert ASCEND_910C.mode("float32", "float32", "reduced").operand_fraction_bits == 11
    assert kernels.AMD_CDNA1.mode("float16", "float16").products == 4
    assert kernels.AMD_CDNA1.mode("bfloat16", "bfloat16").products == 2
    with pytest.raises(TypeError, match="float64"):
        ASCEND_910C.mode("float64", "float32")
    with pytest.raises(TypeError, match="one dtype"):
        ASCEND_910C.mode("int8", "float32")
    with pytest.raises(TypeError, match="bfloat16"):
        kernels.NVIDIA_VOLTA.mode("bfloat16", "bfloat16")
    with pytest.raises(NotImplementedError, match="no FP32 mode"):
        dataclasses.replace(ASCEND_910C, fp32=None).mode("float32", "float32")


def test_every_unit_says_where_it_comes_from():
    for name, arithmetic in kernels.PRESETS.items():
        assert arithmetic.name == name and getattr(kernels, name) is arithmetic
    for arithmetic in [*kernels.PRESETS.values(), *ASCEND_910C_CANDIDATES.values()]:
        for mode in (arithmetic, arithmetic.fp32, arithmetic.fp32_reduced, arithmetic.fp16):
            assert mode is None or len(mode.source) > 20, mode.name


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4])
def test_integers_are_exact_and_wrap_around(dtype):
    rng = np.random.default_rng(3)
    info = ml_dtypes.iinfo(dtype)
    a = rng.integers(info.min, info.max + 1, (2, 3, 70)).astype(dtype)
    b = rng.integers(info.min, info.max + 1, (70, 5)).astype(dtype)
    c = rng.choice([0, 2**31 - 1, -(2**31)], (3, 5)).astype(np.int32)
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    wrapped = (exact + 2**31) % 2**32 - 2**31
    assert (wrapped != exact).any()
    for function in (kernels.reference.matmul, kernels.matmul):
        got = np.asarray(function(a, b, c, arithmetic=ASCEND_910C))
        assert got.dtype == np.int32 and (got == wrapped).all()
        with pytest.raises(TypeError, match="NVIDIA_HOPPER takes"):
            function(a, b, arithmetic=NVIDIA_HOPPER)
