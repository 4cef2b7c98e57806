"""An estimate as one self-contained HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from emulator import files
from emulator.report.perfetto import lane_name
from emulator.report.result import Estimate, collective_rows, groups_of
from emulator.timeline import Loop, Span
from emulator.units import capacity, count, interval, quantity, seconds, several
from emulator.units import fact as units_fact

TOP = 25
MAX_LANES = 12
MAX_SLICES = 4000
NARROW = 1.0  # thousandths of the whole time: about a pixel

# Colour-blind safe (Okabe and Ito).
COLOURS = {
    "matmul": "#0072b2",
    "attention": "#56b4e9",
    "vector": "#009e73",
    "move": "#e69f00",
    "sort": "#cc79a7",
    "collective": "#d55e00",
    "waiting": "#bbbbbb",
    "loop": "#ced6de",
}


def write(estimate: Estimate, path: Path) -> Path:
    files.write(path, page(estimate))
    return path


def page(estimate: Estimate) -> str:
    """The page's text."""
    template = resources.files("emulator.report").joinpath("page.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        seconds=seconds,
        bytes=capacity,
        quantity=quantity,
        count=count,
        several=several,
        fact=units_fact,
        groups=groups_of,
    )
    collectives = collective_rows(estimate)
    lanes = _lanes(estimate)
    return environment.from_string(template).render(
        e=estimate,
        kinds=_kinds(estimate),
        rows=estimate.rows()[:TOP],
        row_count=len(estimate.rows()),
        collectives=collectives[:TOP],
        collective_count=len(collectives),
        energy=interval(estimate.energy.low_j, estimate.energy.high_j, "J"),
        power=interval(*estimate.energy.power_w, "W"),
        device=interval(*estimate.energy.device_w, "W"),
        lanes=lanes,
        lane_count=len(estimate.timeline.lanes()),
        colours=COLOURS,
        alive=estimate.memory.alive[:TOP],
    )


def _kinds(e: Estimate) -> list[dict[str, Any]]:
    kinds = e.by_kind()
    waiting = e.time_s - sum(kinds.values())
    if waiting > 1e-3 * e.time_s:
        kinds["waiting"] = waiting
    whole = e.time_s or 1.0
    return [{"name": k, "time_s": t, "share": t / whole} for k, t in kinds.items()]


def _lanes(e: Estimate) -> list[dict[str, Any]]:
    """Slices of the timeline for each different device history, longest first."""
    whole = e.timeline.time_ps or 1
    depth = max((s.depth for s in e.timeline.spans), default=0)
    rows = 2 if e.overlap else 1  # of each depth: kernels, and collectives below them
    lanes = []
    for lane in e.timeline.lanes()[:MAX_LANES]:
        slices = _slices(e.timeline.spans, lane[0], whole, rows)
        narrow = len(slices) > MAX_SLICES
        lanes.append(
            {
                "name": lane_name(e, lane),
                "slices": _joined(slices) if narrow else slices,
                "narrow": narrow,
                "rows": rows * (depth + 1),
            }
        )
    return lanes


def _joined(slices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fewer slices with the same share of each colour: of neighbours in one row that are too narrow
    to see, those of a kind become one.
    """
    joined = []
    for run in _runs(sorted(slices, key=lambda s: s["y"])):
        x = run[0]["x"]
        kinds = sorted(run, key=lambda s: s["kind"])
        for kind, of_kind in itertools.groupby(kinds, key=lambda s: s["kind"]):
            same = list(of_kind)
            width = sum(s["w"] for s in same)
            title = same[0]["title"] if len(same) == 1 else f"{len(same)} x {kind}"
            joined.append({**same[0], "x": x, "w": width, "title": title})
            x += width
    return joined


def _runs(slices: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Neighbours in one row that are together at most `NARROW`, or one wider slice."""
    run = slices[:1]
    for s in slices[1:]:
        if s["y"] != run[0]["y"] or s["x"] + s["w"] - run[0]["x"] > NARROW:
            yield run
            run = []
        run.append(s)
    yield run


def _slices(spans: Sequence[Span], device: int, whole: int, rows: int = 1) -> list[dict[str, Any]]:
    """Slices in thousandths of the whole time.

    A loop's first trip is stretched over the loop, so that widths are shares of the time at every
    depth.
    """
    slices = []
    # For each depth: where its clocks start, where that is drawn, and how far they are stretched.
    frames: list[tuple[int, float, float]] = [(0, 0.0, 1000 / whole)]
    for i, span in enumerate(spans):
        start, end = int(span.start_ps[device]), int(span.end_ps[device])
        del frames[span.depth + 1 :]
        origin, drawn, scale = frames[span.depth]
        x, width = drawn + (start - origin) * scale, (end - start) * scale
        where = ""
        if isinstance(span.step, Loop):
            last = _end_inside(spans[i + 1 :], span.depth, device, start)
            frames.append((start, x, width / max(1, last - start)))
        else:
            where = f" {span.step.where}"
        if end > start:
            slices.append(
                {
                    "x": x,
                    "w": width,
                    "kind": span.step.kind,
                    "y": rows * span.depth + (rows - 1) * (span.step.kind == "collective"),
                    "colour": COLOURS.get(span.step.kind, "#999999"),
                    "title": f"{span.step.name}: {seconds((end - start) / 1e12)}{where}",
                }
            )
    return slices


def _end_inside(after: Sequence[Span], depth: int, device: int, start: int) -> int:
    """When the trip of a loop at `depth` ends whose spans come first in `after`."""
    inside = itertools.takewhile(lambda span: span.depth > depth, after)
    return max((int(span.end_ps[device]) for span in inside), default=start)
