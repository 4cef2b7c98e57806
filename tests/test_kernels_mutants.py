"""Every parameter of every unit shows in its results: a record with one parameter changed is
caught, or stands below with the reason why nothing can tell.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kernels
from kernels import Arithmetic, reference
from kernels.arithmetic import CHOICES
from tests import probe_table
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, Operands, draw, words

UNITS: dict[str, Arithmetic] = {}
for preset in [*kernels.PRESETS.values(), *kernels.ASCEND_910C_CANDIDATES.values()]:
    for mode in (preset, preset.fp32, preset.fp32_reduced, preset.fp32_full, preset.fp16):
        if mode is not None:
            UNITS.setdefault(mode.name, mode)

NUMBERS = (
    "fraction_bits",
    "min_exponent",
    "sum_fraction_bits",
    "addend_fraction_bits",
    "result_fraction_bits",
    "operand_fraction_bits",
)

# What a change needs to be a record at all.
COMPANIONS: tuple[dict[str, Any], ...] = (
    {},
    {"overflow": "saturate"},
    {"specials": "ieee"},
    {"addend": "late"},
    {"addend": "fused"},
    {"summation": "chain"},
    {"nan_rule": "word", "addend": "fused"},
    {"nan_rule": "word", "addend": "late"},
    {"nan_rule": "word"},
    {"fraction_bits": None, "min_exponent": None},
    {"fraction_bits": None, "min_exponent": None, "addend": "late"},
    {"sum_fraction_bits": None, "addend_fraction_bits": None, "result_fraction_bits": None},
    {"sum_fraction_bits": 32, "addend_fraction_bits": 24, "result_fraction_bits": 31},
    {
        **{"sum_fraction_bits": 32, "addend_fraction_bits": 24, "result_fraction_bits": 31},
        **{"fraction_bits": 24, "min_exponent": -133},
    },
    {
        **dict.fromkeys(("sum_fraction_bits", "addend_fraction_bits", "result_fraction_bits")),
        **{"fraction_bits": None, "min_exponent": None, "addend": "fused"},
    },
    {
        **dict.fromkeys(("sum_fraction_bits", "addend_fraction_bits", "result_fraction_bits")),
        **{"fraction_bits": None, "min_exponent": None, "addend": "late"},
    },
)


def mutants(unit: Arithmetic) -> Iterator[tuple[str, Arithmetic]]:
    """Records with one parameter changed, and whatever must change with it."""
    changes: list[tuple[str, Any]] = [("products", unit.products * 2), ("nan", 0x7FC00001)]
    if unit.products > 1:
        changes.append(("products", unit.products // 2))
    for field in NUMBERS:
        value = getattr(unit, field)
        if value is not None:
            changes += [(field, value - 1), (field, value + 1), (field, None)]
    if unit.fraction_bits is None:
        changes += [("fraction_bits", bits) for bits in (24, 28)]
    if "float32" in unit.dtypes and unit.operand_fraction_bits is None:
        changes.append(("operand_fraction_bits", 22))
    for field, choices in CHOICES.items():
        if field != "evidence":
            changes += [(field, x) for x in choices if x != getattr(unit, field)]
    for field, value in changes:
        mutant = changed(unit, field, value)
        if mutant is not None and not is_moot(mutant, field):
            yield f"{field}={value}", mutant


def changed(unit: Arithmetic, field: str, value: Any) -> Arithmetic | None:
    floor = {} if unit.fraction_bits is not None else {"min_exponent": -133}
    for companion in COMPANIONS:
        more = (floor if field == "fraction_bits" else {}) | companion | {field: value}
        try:
            return dataclasses.replace(unit, **more)
        except ValueError:
            continue
    return None


def is_moot(mutant: Arithmetic, field: str) -> bool:
    """Whether the record says of a parameter that it does not apply."""
    if field in ("alignment", "min_exponent"):
        return mutant.fraction_bits is None
    if field == "operand_rounding":
        return mutant.operand_fraction_bits is None
    if field == "product_overflow":  # a tree rounds its products; FP16 products are small
        return mutant.summation == "tree" or mutant.dtypes == ("float16",)
    return False


def survivors(unit: Arithmetic) -> dict[str, str]:
    """Changes that nothing can tell, and why."""
    known: dict[str, str] = {}
    if unit.products == 1:
        known["summation=chain"] = "one product a step is a chain"
    if unit.summation == "chain" and unit.products == 1:
        known["summation=fused"] = "one product a step is a chain"
    halves_only = unit.dtypes == ("float16",)
    floors = [f"min_exponent={(unit.min_exponent or 0) + d}" for d in (-1, 1)]
    if unit.min_exponent is not None and unit.min_exponent < -300:
        known |= dict.fromkeys(floors, "below every product's exponent: no floor at all")
    elif unit.min_exponent is not None and halves_only:
        known |= dict.fromkeys(floors, "no FP16 product and no C has so small an exponent")
    if halves_only:
        known["overflow=saturate"] = "half an ulp of the largest C is beyond FP16 products"
    if unit.zero == "positive" and unit.subnormal_inputs == "flush":
        known["subnormal_inputs=plus_zero"] = "the sign of a zero is never seen"
    if unit.specials == "saturate":
        known["nan=2143289345"] = "there are no NaNs"
    if unit.addend == "joined":
        known["sum_fraction_bits=33"] = (
            "a sum with bits below 2^(E-32) is below 2^(E-4), so that the leading bit of the total "
            "is E-1 or E, and its last one E-32"
        )
    return known


def batches(dtype: np.dtype) -> Iterator[Operands]:
    """Directed rows first, then drawn ones."""
    with np.errstate(all="ignore"):
        yield probe_table.operands(
            probe_table.PROBES | probe_table.CANDIDATE_PROBES | directed(), dtype
        )
    for name in GENERATORS:
        a, b, c = draw(name, 31, 40, 32, dtype)
        yield a, b, np.zeros((len(a), 1, 1), np.float32) if c is None else c


def directed() -> dict[str, tuple[list[float], list[float], float, str]]:
    rows: dict[str, tuple[list[float], list[float], float]] = {}
    for j in range(150, 172):  # what is cut off next to 2^-149: the exponent floor
        half = -(j // 2)
        rows[f"2^-149 - 2^-{j}"] = [2.0**-75, -(2.0**half)], [2.0**-74, 2.0 ** (-j - half)], 0
    for j in range(28, 36):  # just above a tie: how far a sum reaches before it is rounded
        rows[f"1 + 2^-24 + 2^-{j}"] = [2.0**-24, 2.0**-j], [1.0, 1.0], 1.0
    # Beside a tie and just below a power of two: where a joined sum of products is cut.
    rows["1 - 3 * 2^-25 + 2^-32"] = [-3 * 2.0**-12, 2.0**-16], [2.0**-13, 2.0**-16], 1.0
    rows["2^128 - 2^127"] = [2.0**64], [2.0**64], -(2.0**127)
    rows["2^128 - 2^128"] = [2.0**64, -(2.0**64)], [2.0**64] * 2, 1
    rows["largest + its half ulp"] = [2.0**100], [2.0**3], probe_table.FLT_MAX
    for sign in (-1, 1):
        for half in (0.5, 0.75):  # at 2^-126, less what a tiny result is rounded to
            rows[f"{sign}: 2^-126 - {half} * 2^-150"] = (
                [-sign * half],
                [2.0**-133],
                sign * 2.0**-126,
            )
        rows[f"{sign}: 2^-126 - half"] = [-sign * 2.0**-70], [2.0**-81], sign * 2.0**-126
        rows[f"{sign}: 2^-126 - 3/4"] = [-sign * 0.75 * 2.0**-70], [2.0**-80], sign * 2.0**-126
        rows[f"{sign}: underflow"] = [sign * 2.0**-100], [2.0**-100], 0
        rows[f"{sign}: subnormal c"] = [0.0], [1.0], sign * 2.0**-130
        rows[f"{sign}: infinite"] = [sign * np.inf, 1], [2.0**-3, 1], 3
        rows[f"{sign}: infinite c"] = [1], [1], sign * np.inf
    late = [0.0] * 12
    rows["-0 from underflow at last"] = late + [2.0**-63], late + [2.0**-63], -1.5 * 2.0**-126
    rows["NaN c"] = [1], [1], np.nan
    rows["-0"] = [-0.0] * 16, [1] * 16, -0.0
    rows["-0 c"] = [0.0], [1], -0.0
    return {name: (*row, "") for name, row in rows.items()}


def dtype_of(unit: Arithmetic) -> np.dtype:
    if "float32" in unit.dtypes:
        return FP32
    return BF16 if "bfloat16" in unit.dtypes else FP16


@pytest.mark.parametrize("name", UNITS)
def test_every_changed_parameter_is_caught(name):
    unit = UNITS[name]
    drawn = list(batches(dtype_of(unit)))
    right = [words(reference.matmul(*operands, arithmetic=unit)) for operands in drawn]

    def is_caught(mutant: Arithmetic) -> bool:
        return any(
            (words(reference.matmul(*operands, arithmetic=mutant)) != expected).any()
            for operands, expected in zip(drawn, right, strict=True)
        )

    changes = dict(mutants(unit))
    assert len(changes) >= 10
    missed = {label for label, mutant in changes.items() if not is_caught(mutant)}
    assert missed == set(survivors(unit)) & set(changes)


@pytest.mark.slow  # a compilation for each of them
def test_the_twin_has_every_units_bits_on_the_gates_inputs():
    """What the gate catches in the definition it would catch in the twin."""
    for unit in UNITS.values():
        for operands in batches(dtype_of(unit)):
            expected = words(reference.matmul(*operands, arithmetic=unit))
            assert (words(kernels.matmul(*operands, arithmetic=unit)) == expected).all(), unit.name
