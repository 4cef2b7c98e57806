"""A comparison as tables, JSON and CSV, and the sentences that can be drawn from it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from emulator.report.compare import Column, Comparison, outputs
from emulator.report.errors import QUANTILES, ULP_EDGES, differing
from emulator.report.literal import LiteralTable
from emulator.report.result import Estimate
from emulator.units import capacity, interval, quantity, seconds

TOP = 12


class Tables:
    """A rich renderable; `str()` of it is the same in plain text, 140 columns wide."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _body(self.comparison)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140, no_color=True, highlight=False).print(_body(self.comparison))
        return out.getvalue()


def _body(c: Comparison) -> Group:
    parts: list[Any] = [_times(c)]
    if any(column.errors for column in c.columns):
        parts.append(_values(c))
    found = conclusions(c)
    if found:
        parts.append(Text("\n".join(["What follows", "", *(f"  {line}" for line in found)])))
    return Group(*(piece for part in parts for piece in (part, Text(""))))


def _times(c: Comparison) -> Table:
    table = LiteralTable(
        title=c.name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("", overflow="fold")
    answers = [column.answer for column in c.machines]
    for column in c.machines:
        table.add_column(column.title, justify="right", overflow="fold")
    kinds = dict.fromkeys(kind for answer in answers for kind in answer.by_kind())
    rows: list[tuple[str, Callable[[Estimate], str]]] = [
        ("devices", _devices),
        ("mesh", lambda a: a.mesh),
        ("time", lambda a: seconds(a.time_s)),
        ("against the first", lambda a: _times_as_fast(answers[0], a)),
        ("bound", lambda a: f"{seconds(a.bound_s)} ({a.bound.limited_by})"),
        *((f"  {k}", lambda a, k=k: seconds(a.by_kind().get(k, 0.0))) for k in kinds),
        ("matmul, all devices", lambda a: quantity(a.energy.flops, "FLOP")),
        ("of the matrix peak", lambda a: f"{a.utilization:.1%}"),
        ("memory of a device", lambda a: f"{capacity(a.memory.peak_bytes)}"),
        ("energy", lambda a: interval(a.energy.low_j, a.energy.high_j, "J")),
        ("mean power", lambda a: interval(*a.energy.power_w, "W")),
        ("matmul per watt", lambda a: interval(*a.energy.flops_per_j, "FLOP/s/W")),
    ]  # fmt: skip
    for name, of in rows:
        table.add_row(name, *(of(answer) for answer in answers))
    return table


def _devices(a: Estimate) -> str:
    return f"{len(a.devices)} of {a.machine.num_devices} {a.machine.device_kind}s"


def _times_as_fast(first: Estimate, other: Estimate) -> str:
    return f"{first.time_s / other.time_s:.3g} times as fast" if other.time_s else ""


def _values(c: Comparison) -> Group:
    table = LiteralTable(
        title="Error against the same program in FP64",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    nonfinite = any(e.nonfinite for column in c.columns for e in column.errors)
    table.add_column("output", overflow="fold")
    for name in (
        "largest", "relative", "of RMS", "ULP: half", "99 %", "all",
        *(["not finite"] if nonfinite else []), "differ",
    ):  # fmt: skip
        table.add_column(name, justify="right", overflow="fold")
    for column in c.columns:
        table.add_row(Text(column.name, style="bold"))
        worst = sorted(range(len(column.errors)), key=lambda i: -column.errors[i].rel_rms)[:TOP]
        for i in sorted(worst):
            e, other = column.errors[i], column.differing[i]
            half, _, most, top = e.ulp_quantiles
            table.add_row(
                f"  {e.leaf} {e.dtype}[{','.join(map(str, e.shape))}]",
                *(f"{x:.2g}" for x in (e.max_abs, e.max_rel, e.rel_rms, half, most, top)),
                *([str(e.nonfinite or "")] if nonfinite else []),
                _share(other, math.prod(e.shape)),
            )
    notes = [
        "ULP: units in the last place that half, 99 % and all of the elements stay below.",
        f"Differ: elements with other bits than those of {c.columns[0].name}.",
    ]
    if (n := max(len(column.errors) for column in c.columns)) > TOP:
        notes.append(f"The {TOP} outputs with the largest errors of {n}; JSON and CSV have all.")
    if narrow := sorted({name for column in c.columns for name in column.narrow}):
        notes.append(f"In FP64 only around: {', '.join(narrow)}.")
    return Group(table, Text("\n".join(notes)))


def _share(other: int | None, count: int) -> str:
    if other is None:
        return "other shape"
    return f"{other / count:.1%}" if other > 0.0005 * count else f"{other:,}"


def conclusions(c: Comparison) -> tuple[str, ...]:
    """Which machine is faster, more efficient, nearer to FP64; and on what that depends."""
    found = []
    first, *others = c.machines
    for other in others:
        found += [_faster(first, other), *_efficient(first, other)]
        if first.errors and other.errors:
            found.append(_nearer(c.of(first.machine), c.of(other.machine)))
    for column in c.machines if any(x.errors for x in c.columns) else ():
        same = c.of(column.machine)
        if len(same) > 1:
            found.append(_spread(same))
    return tuple(found)


def _faster(first: Column, other: Column) -> str:
    a, b = first.answer.time_s, other.answer.time_s
    if a == b:
        return f"{first.title} and {other.title} take the same time."
    fast, slow = (first, other) if a < b else (other, first)
    ratio = max(a, b) / min(a, b) if min(a, b) else math.inf
    return f"{fast.title} is done {ratio:.3g} times sooner than {slow.title}."


def _efficient(first: Column, other: Column) -> list[str]:
    a, b = first.answer.energy.flops_per_j, other.answer.energy.flops_per_j
    if not (a[1] and b[1]):
        return []
    if a[0] <= b[1] and b[0] <= a[1]:
        names = f"{first.title} and {other.title}"
        return [f"Performance per watt: the intervals of {names} overlap."]
    better, worse = (first, other) if a[0] > b[1] else (other, first)
    low, high = (max(a, b)[0] / min(a, b)[1], max(a, b)[1] / min(a, b)[0])
    return [
        f"Performance per watt: {better.title} has {low:.3g} to {high:.3g} times that of "
        f"{worse.title}."
    ]


def _nearer(one: Sequence[Column], two: Sequence[Column]) -> str:
    pairs = [(a, b) for a in one for b in two]
    nearer = sum(a.rel_rms < b.rel_rms for a, b in pairs)
    farther = sum(a.rel_rms > b.rel_rms for a, b in pairs)
    names = one[0].title, two[0].title
    if nearer == farther == 0:
        return f"Error: {names[0]} and {names[1]} are equally near to FP64."
    if 0 in (nearer, farther):
        winner, count = (names[0], nearer) if nearer else (names[1], farther)
        every = f"in all {len(pairs)} pairs of arithmetics" if len(pairs) > 1 else "as computed"
        often = every if count == len(pairs) else f"in {count} of {len(pairs)} pairs, never farther"
        return f"Error: {winner} is nearer to FP64, {often}."
    return (
        f"Error: which of {names[0]} and {names[1]} is nearer to FP64 depends on the arithmetic: "
        f"the first in {nearer} of {len(pairs)} pairs."
    )


def _spread(columns: Sequence[Column]) -> str:
    low, high = (f(columns, key=lambda c: c.rel_rms) for f in (min, max))
    changed = sum(any(n != 0 for n in _against(columns[0], c)) for c in columns[1:])
    return (
        f"{columns[0].title}: RMS error {low.rel_rms:.3g} ({low.arithmetic}) to "
        f"{high.rel_rms:.3g} ({high.arithmetic}) of the values; {changed} of "
        f"{len(columns) - 1} other arithmetics change bits."
    )


def _against(first: Column, other: Column) -> list[int | None]:
    """How many elements of each output differ between two columns of one machine."""
    pairs = zip(outputs(first), outputs(other), strict=True)
    return [differing(a, b) for (_, a), (_, b) in pairs]


def record(column: Column) -> dict[str, Any]:
    """Everything about a column as plain data; units are in the names. None stands for what is no
    finite number.
    """
    a = column.answer
    return {
        "machine": column.title,
        "arithmetic": column.arithmetic,
        "devices": len(a.devices),
        "mesh": {name: size for shape in a.mesh_shapes for name, size in shape},
        "time_s": a.time_s,
        "bound_s": a.bound_s,
        "limited_by": a.bound.limited_by,
        "by_kind_s": a.by_kind(),
        "flops": a.energy.flops,
        "utilization": a.utilization,
        "memory_bytes": a.memory.peak_bytes,
        "energy_j": [a.energy.low_j, a.energy.high_j],
        "flops_per_j": list(a.energy.flops_per_j),
        "narrow": list(column.narrow),
        "outputs": [
            _finite(dataclasses.asdict(e)) | {"differing": n}
            for e, n in zip(column.errors, column.differing, strict=True)
        ],
    }


def _finite(value: Any) -> Any:
    """`value` without infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(c: Comparison) -> str:
    whole = {
        "name": c.name,
        "ulp_quantiles_at": QUANTILES,
        "ulp_histogram_up_to": ULP_EDGES,
        "columns": [record(column) for column in c.columns],
        "conclusions": conclusions(c),
    }
    return json.dumps(whole, indent=1, allow_nan=False)


_PLAIN = ("machine", "arithmetic", "devices", "time_s", "bound_s", "limited_by", "flops",
          "utilization", "memory_bytes")  # fmt: skip
_OUTPUT = ("leaf", "dtype", "shape", "count", "nonfinite", "max_abs", "max_rel", "rms", "rel_rms",
           "differing")  # fmt: skip


def as_csv(c: Comparison) -> str:
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    ulps = [f"ulp_{q:g}" for q in QUANTILES]
    ends = [f"{name}_{end}" for name in ("energy_j", "flops_per_j") for end in ("low", "high")]
    write.writerow([*_PLAIN, *ends, *_OUTPUT, *ulps])
    for column in c.columns:
        whole = record(column)
        start = [*(whole[name] for name in _PLAIN), *whole["energy_j"], *whole["flops_per_j"]]
        for output in whole["outputs"] or [{}]:
            cells = [output.get(name, "") for name in _OUTPUT]
            if output:
                cells[2] = "x".join(map(str, output["shape"]))
            write.writerow([*start, *cells, *output.get("ulp_quantiles", [""] * len(ulps))])
    return out.getvalue()
