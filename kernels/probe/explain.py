"""Why each parameter of a probed record has its value, and which other values would do as well."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from kernels.arithmetic import ASCEND_910C_CANDIDATES, CHOICES, PRESETS, Arithmetic
from kernels.probe.answers import Answers, Probe
from kernels.probe.search import ALIGNMENTS, EVERY, LOWEST, WIDTHS, nan_words, vary

_UNPROBED = ("name", "fp32", "fp32_reduced", "fp32_full", "fp16", "dtypes", "evidence", "source")
_OPERANDS = ("operand_fraction_bits", "operand_rounding")  # of FP32 operands
PARAMETERS = [f.name for f in fields(Arithmetic) if f.name not in (*_UNPROBED, *_OPERANDS)]

_WHERE = {
    "min_exponent": ("bottom", "zeros"),
    "subnormal_inputs": ("bottom", "zeros"),
    "subnormal_results": ("bottom", "zeros"),
    "zero": ("zeros", "bottom"),
    "specials": ("specials",),
    "product_overflow": ("top", "specials"),
    "overflow": ("top", "specials"),
    "nan": ("specials",),
    "nan_rule": ("specials",),
}
"""Probes that can tell a parameter's values apart; other parameters are told by ordinary sums."""

_ASKED = 2000  # probes of a parameter's own groups that are asked before all others


def known(answers: Answers, found: Arithmetic) -> tuple[Arithmetic, list[str]]:
    """Names of the units that predict the same answers; where `found` differs from the first of
    them, no probe can tell, and its values are taken.
    """
    same, exact = [], []
    probes = answers.probes(EVERY)
    for name, unit in units().items():
        try:
            mode = unit.mode(answers.dtype, answers.dtype)
        except TypeError:
            continue
        mode = replace(found, **{field: getattr(mode, field) for field in PARAMETERS})
        if mode == found:
            exact.append(name)
        elif answers.first_miss(mode, probes) is None:
            same.append((name, mode))
    if exact or not same:
        return found, exact
    chosen = same[0][1]
    return chosen, [name for name, mode in same if mode == chosen]


def units() -> dict[str, Arithmetic]:
    """Presets and candidates, one name for each."""
    candidates = {unit.name: unit for unit in ASCEND_910C_CANDIDATES.values()}
    return {name: unit for name, unit in {**PRESETS, **candidates}.items() if "HF32" not in name}


def explain(answers: Answers, found: Arithmetic) -> tuple[dict[str, str], dict[str, str]]:
    """For each parameter the answers that contradict its other values, and the other values that
    none contradicts.
    """
    evidence, ambiguous = {}, {}
    every = answers.probes(EVERY)
    for field in PARAMETERS:
        value = getattr(found, field)
        against: list[tuple[Any, Probe, Arithmetic]] = []
        allowed = []
        groups = _WHERE.get(field, ("order", "sums", "dense"))
        if field == "sum_fraction_bits":
            groups += ("bottom",)
        probes = answers.probes(groups, _ASKED, thorough=True)
        own = set(probes)
        elsewhere = [probe for probe in every if probe not in own]
        for other, variant in _variants(answers, found, field, probes):
            probe = None
            if variant is not None:  # asked where it shows most, and then everywhere
                probe = answers.first_miss(variant, itertools.chain(probes, elsewhere))
            if probe is None or variant is None:
                allowed.append(other)
            else:
                against.append((other, probe, variant))
        if against or allowed:
            evidence[field] = f"{_shown(field, value)}: " + (
                "; ".join(
                    f"not {_shown(field, other)} ({next(answers.failures(variant, [probe]))})"
                    for other, probe, variant in against[:3]
                )
                or "no probe contradicts another value"
            )
        if allowed:
            ambiguous[field] = "also " + _ranges([_shown(field, x) for x in allowed])
    return evidence, ambiguous


def _variants(
    answers: Answers, found: Arithmetic, field: str, probes: list[Probe]
) -> Iterator[tuple[Any, Arithmetic | None]]:
    """The record with other values of one parameter, those that make a possible record; None in
    its place where it is known to predict the same answers.
    """
    value = getattr(found, field)
    others: Iterable[Any] = []
    if field in CHOICES:
        others = [x for x in CHOICES[field] if x != value]
        if field == "alignment" and found.fraction_bits is None or value == "joined":
            others = []
    elif field == "products":
        tree = found.summation == "tree"  # whose sizes are powers of 2
        halves = (value // 2, value * 2) if tree else (value - 1, value + 1)
        others = [x for x in halves if 1 <= x <= 64]
    elif field == "min_exponent" and value is not None:
        fitting, others = _neighbours(answers, found, field, range(LOWEST, -125), probes)
        yield from ((x, None) for x in fitting)
    elif field == "fraction_bits" and value is None:
        if found.summation != "fused":
            return
        yield from _widths(answers, found, probes)
        return
    elif field.endswith("fraction_bits") and value is not None:
        fitting, others = _neighbours(answers, found, field, WIDTHS, probes)
        yield from ((x, None) for x in fitting)
        if field == "fraction_bits" and found.addend != "joined":
            yield None, replace(found, fraction_bits=None, min_exponent=None, alignment="truncate")
    elif field == "nan":
        others = [word for word in (0x7FC00000, 0x7FFFFFFF, *nan_words(answers)) if word != value]
        others = list(dict.fromkeys(others))
    for other in others:
        variant = with_value(found, field, other)
        if variant is not None:
            yield other, variant


def with_value(found: Arithmetic, field: str, other: Any) -> Arithmetic | None:
    """`found` with another value, and what that value needs; None if nothing makes it possible."""
    changes: dict[str, Any] = {field: other}
    if field == "summation":
        changes["addend"] = "late" if other == "tree" else "fused"
        if other != "fused":
            changes |= {"fraction_bits": None, "min_exponent": None, "alignment": "truncate"}
        if other != "chain":
            changes["nan_rule"] = "word"
    if field == "specials" and other == "saturate":
        changes["overflow"] = "saturate"
    try:
        return replace(found, **changes)
    except ValueError:
        return None


def _neighbours(
    answers: Answers, found: Arithmetic, field: str, scale: range, probes: list[Probe]
) -> tuple[list[int], list[int]]:
    """The values next to the record's that predict the same answers, and on either side the first
    that does not. Both sides are searched by halving: what one probe tells apart, it tells apart
    from everything beyond.
    """
    value = getattr(found, field)

    def fits(other: int) -> bool:
        variant = with_value(found, field, other)
        return variant is not None and answers.first_miss(variant, probes) is None

    fitting: list[int] = []
    outside: list[int] = []
    for step, end in ((-1, scale.start), (1, scale.stop - 1)):
        near, far = value, end + step  # `near` fits; `far` does not, or is outside
        if value != end and fits(value + step):
            near = end if fits(end) else value + step
            while abs(far - near) > 1:
                middle = (near + far) // 2
                near, far = (middle, far) if fits(middle) else (near, middle)
        elif value != end:
            far = value + step
        fitting += range(near, value, -step)
        if scale.start <= far < scale.stop:
            outside.append(far)
    return fitting, outside


def _widths(
    answers: Answers, found: Arithmetic, probes: list[Probe]
) -> Iterator[tuple[Any, Arithmetic | None]]:
    """Cuts so far down that an exact sum cannot be told from them, and the first that can."""
    probes = [probe for probe in probes if answers.tiles[probe.tile].group == "sums"]
    for alignment in ALIGNMENTS:
        low, high = 0, 49  # `low` can be told from the exact sum, `high` and beyond cannot
        while high - low > 1:
            bits = (low + high) // 2
            cut = vary(found, fraction_bits=bits, alignment=alignment, min_exponent=LOWEST)
            low, high = (low, bits) if answers.first_miss(cut, probes) is None else (bits, high)
        if high <= 48:
            yield f"{high} to 48 ({alignment})", None
        if low:
            cut = vary(found, fraction_bits=low, alignment=alignment, min_exponent=LOWEST)
            yield f"{low} ({alignment})", cut


def short(found: Arithmetic) -> str:
    """The parameters that are not the usual ones."""
    usual = Arithmetic(name="", products=1)
    fields = [x for x in PARAMETERS if getattr(found, x) != getattr(usual, x) or x == "products"]
    return ", ".join(f"{field}={_shown(field, getattr(found, field))}" for field in fields)


def _shown(field: str, value: Any) -> str:
    if value is None:
        return "exact" if field == "fraction_bits" else "none"
    return f"0x{value:08x}" if field == "nan" else str(value)


def _ranges(shown: list[str]) -> str:
    """Runs of numbers as `low to high`."""
    numbers = sorted(int(x) for x in shown if x.lstrip("-").isdigit())
    words = [x for x in shown if not x.lstrip("-").isdigit()]
    runs: list[list[int]] = []
    for x in numbers:
        if runs and x == runs[-1][1] + 1:
            runs[-1][1] = x
        else:
            runs.append([x, x])
    return ", ".join([*(f"{x} to {y}" if x < y else str(x) for x, y in runs), *words])
