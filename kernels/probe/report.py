"""What answers say: the record that predicts them, and why."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kernels.arithmetic import FP32_FMA_CHAIN, Arithmetic
from kernels.probe import explain, foreign, order, search, shapes
from kernels.probe import nearest as nearby
from kernels.probe.answers import Answers, Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the probes say about a matrix unit.

    Attributes:
        arithmetic: the record that predicts all answers; None if none of the known families does.
        same_as: the presets and candidates that the probes cannot tell from it.
        evidence: for each parameter, the answers that contradict its other values.
        ambiguous: for each parameter that is not settled, the values that predict the same answers.
        failing: without a record, the answers that contradict the nearest one.
        nearest: without a record, the name or the parameters of the nearest one, and where it fails
            if that is in few places.
        resembles: without a record, a design outside the known families that predicts all answers.
        notes: remarks on answers that the record leaves open, such as the words of NaNs.
        dtype, result: types of the operands and of the answers.
        with_c: whether probes started at a C of their own.
        compared: how many answers the record was compared with, of those `asked` for.
        longest_k: sums of up to so many products are as the record says; `notes` say what differs
            beyond.
    """

    arithmetic: Arithmetic | None
    same_as: tuple[str, ...] = ()
    evidence: dict[str, str]
    ambiguous: dict[str, str]
    failing: tuple[Failure, ...] = ()
    nearest: str | None = None
    resembles: str | None = None
    notes: tuple[str, ...] = ()
    dtype: str
    result: str
    with_c: bool
    compared: int
    asked: int = 0
    longest_k: int = 0

    def __str__(self) -> str:
        if self.arithmetic is None:
            shown = "\n".join(f"  {failure}" for failure in self.failing[:8])
            more = f"; it behaves as {self.resembles}" if self.resembles else ""
            lines = [f"none of the known families{more}.", *self.notes]
            if self.nearest:
                lines.append(f"It comes nearest to {self.nearest}.")
            if self.failing:
                lines.append(
                    f"{len(self.failing):,} of {self.compared:,} answers contradict the nearest "
                    f"record, such as\n{shown}"
                )
            return "\n".join(lines)
        lines = [f"{name}: {text}" for name, text in self.ambiguous.items()]
        return "\n".join([self.arithmetic.source, *lines, *self.notes])


class UnknownArithmetic(ValueError):
    """None of the known families predicts the answers; `report` has the failing probes."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def judge(answers: Answers) -> Report:
    """What answers say, whoever gave them."""
    said: dict[str, Any] = {
        "dtype": answers.dtype,
        "result": answers.result,
        "with_c": any(tile.c is not None for tile in answers.tiles),
        "compared": 0,
        "asked": sum(math.prod(words.shape) for words in answers.words),
    }
    if answers.unsteady:
        return _unknown(
            answers,
            said,
            notes=(
                f"It does not give the same bits every time: probe {answers.unsteady!r}, asked "
                "twice, was answered differently.",
            ),
        )
    found = search.search(answers)
    if found.arithmetic is None:
        near = nearby.nearest(answers, found.tried)
        if near.failing:
            said["compared"] = near.compared
            return _unknown(answers, said, near.name, near.failing)
        found = search.settled(answers, near.arithmetic)
        assert found.arithmetic is not None
    unit, same_as = explain.known(answers, found.arithmetic)
    verdict = shapes.judge(answers, unit)
    said["compared"] = len(answers.probes(search.EVERY)) + verdict.compared
    if verdict.failing:
        name = same_as[0] if same_as else explain.short(unit)
        return _unknown(answers, said, name, verdict.failing, verdict.notes)
    evidence, ambiguous = explain.explain(answers, unit)
    counted = order.describe(answers)
    evidence["products"] = f"{evidence.get('products', unit.products)}; {counted}"
    return Report(
        arithmetic=_named(unit, same_as, ambiguous, verdict, said),
        same_as=tuple(same_as),
        evidence=evidence,
        ambiguous=ambiguous,
        notes=(*([found.any_nan] if found.any_nan else []), *verdict.notes),
        longest_k=verdict.longest_k,
        **said,
    )


def _unknown(
    answers: Answers,
    said: dict[str, Any],
    name: str | None = None,
    failing: tuple[Failure, ...] = (),
    notes: tuple[str, ...] = (),
) -> Report:
    """Without a record; `name` is that of the nearest one."""
    place = nearby.where(answers, failing) if failing else None
    return Report(
        arithmetic=None,
        nearest=f"{name}, and differs only {place}" if place else name,
        failing=failing,
        resembles=foreign.resembled(answers) if failing else None,
        notes=notes,
        evidence={"products": order.describe(answers)},
        ambiguous={},
        **said,
    )


def _named(
    found: Arithmetic,
    same_as: list[str],
    ambiguous: dict[str, str],
    verdict: shapes.Verdict,
    said: dict[str, Any],
) -> Arithmetic:
    """The record with its provenance, and an FP32 mode that was not probed."""
    open_ones = "; ".join(f"{name} ({text})" for name, text in ambiguous.items())
    source = (
        f"kernels.probe: {said['compared']} outputs (of {said['asked']} that were asked for) with "
        f"{said['dtype']} operands predicted without a difference"
        f"{', C given' if said['with_c'] else ''}. "
        f"Same as: {', '.join(same_as) or 'no preset'}. Ambiguous: {open_ones or 'nothing'}. "
        f"K was probed up to {verdict.longest_k}. {' '.join(verdict.notes)}"
    ).rstrip()
    fp32 = dataclasses.replace(
        FP32_FMA_CHAIN,
        name="probed FP32",
        dtypes=("float32",),
        evidence="assumed",
        source="not probed: FP32 fused multiply-adds in ascending order",
    )
    # Beyond, the unit may be the same and its library's order of K another: the name says how far.
    holds = f", K up to {verdict.longest_k}" if verdict.reordered else ""
    return dataclasses.replace(
        found,
        name=(f"probed ({same_as[0]})" if same_as else "probed") + holds,
        fp32=fp32,
        evidence="measured",
        source=source,
    )
