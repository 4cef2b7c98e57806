"""The definition against exact rational arithmetic, published probes and its own mutants."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

import kernels
from kernels import ASCEND_910C, FP32_FMA_CHAIN, NVIDIA_HOPPER, Arithmetic
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw, words

PRESETS = [ASCEND_910C, FP32_FMA_CHAIN, NVIDIA_HOPPER]


def run(function, a, b, c, arithmetic) -> int:
    """One dot product of K=16 (shorter lists are filled up with zeros): the FP32 word of the
    result.
    """
    a, b = (np.array(list(x) + [0.0] * (16 - len(x)), np.float64).astype(BF16) for x in (a, b))
    c = np.full((1, 1), c, np.float32)
    return int(words(function(a[None], b[:, None], c, arithmetic=arithmetic))[0, 0])


def at(**places: float) -> list[float]:
    values = [0.0] * 16
    for place, value in places.items():
        values[int(place[1:])] = value
    return values


B = 2.0**7  # B * B = U
U, ULP = B * B, 2.0**-23
MAX = 255 * 2.0**120
ONES = dict.fromkeys((f"p{i}" for i in range(16)), 1.0)

# name: (a, b, c, (FP32_FMA_CHAIN, ASCEND_910C, NVIDIA_HOPPER))
PROBES = {
    "U-U+c, c=U*2^-24": ([B, -B], [B, B], U * 2.0**-24, (0, 0x3A800000, 0x3A800000)),
    "U-U+c, c=U*2^-25": ([B, -B], [B, B], U * 2.0**-25, (0, 0x3A000000, 0x3A000000)),
    "U-U+c, c=U*2^-26": ([B, -B], [B, B], U * 2.0**-26, (0, 0x39800000, 0)),
    "U-U+c, c=U*2^-30": ([B, -B], [B, B], U * 2.0**-30, (0, 0x37800000, 0)),
    "U-U+p2, p2=U*2^-25": ([B, -B, B], [B, B, B * 2.0**-25], 0, (0x3A000000,) * 3),
    "U-U+p2, p2=U*2^-26": ([B, -B, B], [B, B, B * 2.0**-26], 0, (0x39800000, 0x39800000, 0)),
    "U, -U at 9": (
        at(p0=B, p1=B, p9=-B),
        at(p0=B, p1=B * 2.0**-24, p9=B),
        0,
        (0, 0x3A800000, 0x3A800000),
    ),
    "U, -U at 5": (
        at(p0=B, p1=B, p5=-B),
        at(p0=B, p1=B * 2.0**-24, p5=B),
        0,
        (0, 0x3A800000, 0x3A800000),
    ),
    "U, -U at 3": (
        at(p0=B, p1=B, p3=-B),
        at(p0=B, p1=B * 2.0**-24, p3=B),
        0,
        (0, 0x3A800000, 0x3A800000),
    ),
    "1 + 0.75 ulp": ([1, 0.75], [1, ULP], 0, (0x3F800001, 0x3F800001, 0x3F800000)),
    "1 + 1.5 ulp": ([1, 1.5], [1, ULP], 0, (0x3F800002, 0x3F800002, 0x3F800001)),
    "2^30 - 2^30, 14 ones": (
        [2.0**15, -(2.0**15)] + [1] * 14,
        [2.0**15] * 2 + [1] * 14,
        0,
        (0x41600000, 0x41600000, 0),
    ),
    "2^30, 14 ones, -2^30": (
        [2.0**15] + [1] * 14 + [-(2.0**15)],
        [2.0**15] + [1] * 14 + [2.0**15],
        0,
        (0, 0x41600000, 0),
    ),
    "c=2^30, 15 ones, -2^30": (
        [1] * 15 + [-(2.0**15)],
        [1] * 15 + [2.0**15],
        2.0**30,
        (0, 0x41700000, 0),
    ),
    "max*max - max*max": ([MAX, -MAX], [MAX, MAX], 0, (0x7F800000, 0, 0)),
    "c=FLT_MAX, p0=2^103": (
        [2.0**100],
        [8],
        float(np.finfo(np.float32).max),
        (0x7F800000, 0x7F800000, 0x7F7FFFFF),
    ),
    "2^-133": ([2.0**-133], [1], 0, (0x00010000,) * 3),
    "c=2^-149": ([0], [0], 2.0**-149, (1, 1, 1)),
    "2^-149 - 2^-157": ([2.0**-75, -(2.0**-79)], [2.0**-74, 2.0**-78], 0, (1, 1, 0)),
    "2^-149 - 2^-159": ([2.0**-75, -(2.0**-80)], [2.0**-74, 2.0**-79], 0, (1, 1, 1)),
    "sixteen -0, c=-0": ([-0.0] * 16, [1] * 16, -0.0, (0x80000000, 0, 0)),
    "Inf*0": ([np.inf], [0], 0, (0x7FC00000, 0x7FC00000, 0x7FFFFFFF)),
    "Inf-Inf": ([np.inf, -np.inf], [1, 1], 0, (0x7FC00000, 0x7FC00000, 0x7FFFFFFF)),
    "NaN": ([np.nan], [1], 0, (0x7FC00000, 0x7FC00000, 0x7FFFFFFF)),
    "-Inf": ([-np.inf], [1], 0, (0xFF800000,) * 3),
    "192^2 - 192^2 + U*2^-25": ([192, -192, B], [192, 192, B * 2.0**-25], 0, (0x3A000000,) * 3),
    "sixteen 1.9921875^2": ([1.9921875] * 16, [1.9921875] * 16, 0, (0x427E0100,) * 3),
    "c=1, 2^-24, 2^-48": ([2.0**-24, 2.0**-48], [1, 1], 1, (0x3F800000, 0x3F800001, 0x3F800000)),
    "c=1, sixteen 2^-25": ([2.0**-25] * 16, [1] * 16, 1, (0x3F800000, 0x3F800004, 0x3F800004)),
}


@pytest.mark.parametrize(
    "function", [kernels.reference.matmul, kernels.matmul], ids=["reference", "twin"]
)
@pytest.mark.parametrize("name", PROBES)
def test_probe_words(name, function):
    a, b, c, expected = PROBES[name]
    got = [run(function, a, b, c, p) for p in (FP32_FMA_CHAIN, ASCEND_910C, NVIDIA_HOPPER)]
    assert [f"{word:08x}" for word in got] == [f"{word:08x}" for word in expected]


@pytest.mark.parametrize(
    "function", [kernels.reference.matmul, kernels.matmul], ids=["reference", "twin"]
)
def test_hopper_exponent_floor_vector(function):
    """The public hardware vector that only e_zero = -133 explains (from MATLAB-tensor-core)."""
    a = "9b94 19f3 9a2e 1a67 9a25 9b4e 9b29 9a33 99e0 1a14 9914 99d1 9ae9 1b1a 9a9c 1b3a"
    b = "9aaf 99f3 9acc 1b7c 19ed 1b25 9a1b 9a20 9af7 9a48 1ae1 1b32 1b12 1b0e 9a68 1735"
    a, b = (np.array([int(w, 16) for w in x.split()], np.uint16).view(BF16) for x in (a, b))
    assert words(function(a[None], b[:, None], arithmetic=NVIDIA_HOPPER))[0, 0] == 0x0000000B
    for floor in (-126, -132, -134, -150):
        other = dataclasses.replace(NVIDIA_HOPPER, min_exponent=floor)
        assert words(function(a[None], b[:, None], arithmetic=other))[0, 0] == 0x0000000A


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


@pytest.mark.parametrize(
    "function", [kernels.reference.matmul, kernels.matmul], ids=["reference", "twin"]
)
def test_fprev_closed_forms(function):
    n = 32
    forms = {
        FP32_FMA_CHAIN: lambda i, j: n - 1 - j,
        ASCEND_910C: lambda i, j: exact_step(n, 16, i, j),
        NVIDIA_HOPPER: lambda i, j: n - 16 * (1 + j // 16),
    }
    for width in (2, 4, 8):
        narrow = dataclasses.replace(ASCEND_910C, products=width)
        forms[narrow] = lambda i, j, width=width: exact_step(n, width, i, j)
    for arithmetic, form in forms.items():
        expected = np.array([[form(i, j) if i < j else -1 for j in range(n)] for i in range(n)])
        assert (fprev(function, arithmetic, n) == expected).all(), arithmetic.name


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


def mutants(arithmetic: Arithmetic) -> list[tuple[str, Arithmetic]]:
    """The record with one parameter changed, for every parameter that can change bits."""
    changes: list[dict] = [
        {"products": arithmetic.products * 2},
        {"products": arithmetic.products // 2 or 3},
        {
            "rounding": {"nearest_even": "toward_zero", "toward_zero": "nearest_even"}[
                arithmetic.rounding
            ]
        },
        {"subnormal_inputs": "flush"},
        {"subnormal_results": "flush"},
        {"overflow": "saturate"},
        {"zero": {"positive": "ieee", "ieee": "positive"}[arithmetic.zero]},
        {"nan": 0x7FC00001},
        {"addend": "late"},
    ]
    if arithmetic.fraction_bits is None:
        changes += [
            {"fraction_bits": bits, "min_exponent": -133, "alignment": cut}
            for bits, cut in ((26, "truncate"), (27, "floor"), (25, "nearest_even"))
        ]
    else:
        changes += [{"fraction_bits": arithmetic.fraction_bits + d} for d in (-1, 1)]
        changes += [{"fraction_bits": None}, {"alignment": "floor"}, {"alignment": "nearest_even"}]
        changes += [{"min_exponent": arithmetic.min_exponent + d} for d in (-1, 1)]
    return [(str(change), dataclasses.replace(arithmetic, **change)) for change in changes]


@pytest.mark.parametrize(
    "arithmetic,mutant",
    [
        pytest.param(p, mutant, id=f"{p.name}-{change}")
        for p in [*PRESETS, NVIDIA_HOPPER.fp32, ASCEND_910C.fp32]
        for change, mutant in mutants(p)
    ],
)
def test_mutants_are_caught_and_the_twin_follows_them(arithmetic, mutant):
    """Every parameter shows in some generator, and the twin computes the mutant too."""
    dtype = FP32 if arithmetic.dtypes == ("float32",) else BF16
    names = [
        "cancelling",
        "wide",
        "tiny_with_zeros",
        "specials",
        "zeros",
        "ties",
        "raw",
        "tiny_sums",
    ]
    drawn = [draw(name, 31, 300, 32, dtype) for name in names]
    a, b = (np.concatenate([operands[i] for operands in drawn]) for i in (0, 1))
    no_c = np.zeros((300, 1, 1), np.float32)
    c = np.concatenate([no_c if operands[2] is None else operands[2] for operands in drawn])
    changed = words(kernels.matmul(a, b, c, arithmetic=mutant))
    few = slice(0, None, 11)
    definition = words(kernels.reference.matmul(a[few], b[few], c[few], arithmetic=mutant))
    assert (changed[few] == definition).all()
    caught = int((changed != words(kernels.matmul(a, b, c, arithmetic=arithmetic))).sum())
    if caught == 0 and mutant.min_exponent not in (None, arithmetic.min_exponent):
        pytest.skip("the exponent floor has its own directed vector")
    assert caught > 0


def test_generators_produce_what_they_promise():
    for name in GENERATORS:
        a, b, _ = draw(name, 1, 300, 16, BF16)
        assert a.shape == (300, 1, 16) and b.shape == (300, 16, 1), name
    subnormal = draw("subnormal_inputs", 1, 300, 16, BF16)[0].view(np.uint16) & 0x7FFF
    assert (subnormal < 0x80).all() and (subnormal > 0).any()
    a, _, _ = draw("raw", 1, 300, 16, BF16)
    assert np.isnan(a.astype(np.float32)).any()


@pytest.mark.parametrize(
    "change",
    [
        {"products": 0},
        {"products": 1.5},
        {"fraction_bits": -1, "min_exponent": -133},
        {"fraction_bits": 25},
        {"min_exponent": 3, "fraction_bits": 25},
        {"rounding": "up"},
        {"alignment": "round"},
        {"overflow": "wrap"},
        {"nan": 0x7F800000},
        {"dtypes": ("int4",)},
        {"operand_fraction_bits": 0},
        {"fp32": NVIDIA_HOPPER},
        {"evidence": "rumoured"},
    ],
    ids=str,
)
def test_impossible_records_are_refused(change):
    field = next(iter(change)) if change != {"fraction_bits": 25} else "min_exponent"
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(ASCEND_910C, **change)
