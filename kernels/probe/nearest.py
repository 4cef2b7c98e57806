"""What comes nearest to answers that no record predicts, and where it fails."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kernels.arithmetic import CHOICES, Arithmetic
from kernels.probe import explain, inputs, order, search
from kernels.probe.answers import Answers, Failure, Probe

_FIRST, _THEN = 120, 400  # answers that hypotheses, and variants of the better ones, are ranked by
_BETTER = 3
_EDGES = ("subnormal_inputs", "subnormal_results", "zero", "overflow", "product_overflow")
_FEW = 4  # values of K, or groups of probes, that are listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The hypothesis that fewest answers contradict, its name, and the answers that do."""

    arithmetic: Arithmetic
    name: str
    failing: tuple[Failure, ...]
    compared: int


def nearest(answers: Answers, tried: Iterable[Arithmetic]) -> Nearest:
    """Among presets and candidates, hypotheses that the search has `tried`, and those without a
    width; and variants of the better ones in what happens to tiny and huge numbers.
    """
    tried = list(tried)
    names = presets(answers)
    structures = order.proposals(answers)
    plain = (x for structure in structures for x in search.plain(answers, *structure))
    left = list(dict.fromkeys([*names, *tried, *plain]))
    few = answers.probes(search.EVERY, _FIRST)
    ranked = sorted(left, key=lambda x: _count(answers, x, few))
    left = list(dict.fromkeys([*ranked[:_BETTER], *tried[:1]]))
    if _count(answers, ranked[0], few) < len(few) / 2:
        few = answers.probes(search.EVERY, _THEN)
        left = [*left, *(_varied(answers, x, few) for x in left)]
    best = search.fewest_misses(answers, few, left)
    every = answers.probes((*search.EVERY, "odd"))
    failing = tuple(answers.failures(best, every))
    name = names.get(best, explain.short(best))
    return Nearest(arithmetic=best, name=name, failing=failing, compared=len(every))


def _varied(answers: Answers, unit: Arithmetic, probes: list[Probe]) -> Arithmetic:
    """`unit` with the values at the edges of the range that fewest probes contradict."""
    for field in _EDGES:
        others = [explain.with_value(unit, field, other) for other in CHOICES[field]]
        variants = [unit, *(x for x in others if x is not None)]
        unit = search.fewest_misses(answers, probes, variants)
    return unit


def _count(answers: Answers, unit: Arithmetic, probes: list[Probe]) -> int:
    return sum(1 for _ in answers.misses(unit, probes))


def presets(answers: Answers) -> dict[Arithmetic, str]:
    """Presets and candidates as hypotheses, those with the same parameters once."""
    found: dict[Arithmetic, str] = {}
    for name, unit in explain.units().items():
        try:
            mode = unit.mode(answers.dtype, answers.dtype)
        except TypeError:
            continue
        fields = {field: getattr(mode, field) for field in explain.PARAMETERS}
        found.setdefault(replace(search.record(answers, products=1), **fields), name)
    return found


def where(answers: Answers, failing: Iterable[Failure]) -> str | None:
    """The few values of K, or the few groups of probes, to which failures are confined."""
    tiles = {tile.name: tile for tile in answers.tiles}
    failed = [tiles[failure.probe] for failure in failing]
    usual = Counter(tile.a.shape[1] for tile in answers.tiles).most_common(1)[0][0]
    lengths = sorted({tile.a.shape[1] for tile in failed})
    if len(lengths) <= _FEW and usual not in lengths:
        return f"where K is {_listed([str(k) for k in lengths])}"
    groups = [group for group in inputs.GROUPS if group in {tile.group for tile in failed}]
    if len(groups) <= _FEW // 2 and {tile.group for tile in failed} <= set(inputs.GROUPS):
        return f"in {_listed([inputs.GROUPS[group] for group in groups])}"
    return None


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
