"""An estimate as a trace in the Chrome JSON format, which Perfetto opens.

Devices with the same clocks throughout share one track, or two where collectives overlap with
kernels. A loop is a slice over all its trips; inside it the first trip is shown in detail, and what
runs less than once on average as short as it is on average.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from emulator import files
from emulator.report.result import Estimate
from emulator.timeline import PS_PER_S, CollectiveOp, Loop, Op, Span
from emulator.units import quantity, seconds

MAX_TRACKS = 64
PROCESS = 1  # 0 is the idle process of whoever reads traces


def write(estimate: Estimate, path: Path) -> Path:
    files.write(path, json.dumps(trace(estimate)))
    return path


def trace(estimate: Estimate) -> dict[str, Any]:
    """The trace as a JSON object; times in microseconds."""
    timeline = estimate.timeline
    events: list[dict[str, Any]] = [
        _meta("process_name", None, f"{estimate.machine.name}: {estimate.name}")
    ]
    lanes = timeline.lanes()
    engines = ("", ", collectives") if estimate.overlap else ("",)
    for number, lane in enumerate(lanes[:MAX_TRACKS]):
        first = 1 + number * len(engines)
        for track, engine in enumerate(engines, start=first):
            events.append(_meta("thread_name", track, lane_name(estimate, lane) + engine))
            events.append(_meta("thread_sort_index", track, track))
        ends: list[int] = []  # of the loops around a slice, in nanoseconds
        for span in timeline.spans:
            apart = estimate.overlap and isinstance(span.step, CollectiveOp)
            event = _slice(span, lane[0], first + apart)
            if event:
                del ends[span.depth :]
                _fit(event, ends)
                events.append(event)
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "machine": estimate.machine.name,
            "time": seconds(estimate.time_s),
            "bound": seconds(estimate.bound_s),
            "tracks": f"{min(len(lanes), MAX_TRACKS)} of {len(lanes)} different device histories",
        },
        "traceEvents": events,
    }


def _meta(kind: str, tid: int | None, value: str | int) -> dict[str, Any]:
    key = "sort_index" if kind.endswith("sort_index") else "name"
    event: dict[str, Any] = {"ph": "M", "name": kind, "pid": PROCESS, "args": {key: value}}
    if tid is not None:
        event["tid"] = tid
    return event


def lane_name(estimate: Estimate, lane: list[int]) -> str:
    """The devices of one story, by their numbers."""
    devices = [estimate.devices[i] for i in lane]
    if len(devices) == 1:
        return f"device {devices[0]}"
    if devices == list(range(devices[0], devices[-1] + 1)):
        return f"devices {devices[0]}-{devices[-1]} ({len(devices)} alike)"
    return f"device {devices[0]} and {len(devices) - 1} more ({len(devices)} alike)"


def _slice(span: Span, device: int, track: int) -> dict[str, Any] | None:
    start, end = int(span.start_ps[device]), int(span.end_ps[device])
    if end <= start:
        return None
    return {
        "ph": "X",
        "name": span.step.name,
        "cat": span.step.kind,
        "pid": PROCESS,
        "tid": track,
        "ts": start / 1e6,
        "dur": (end - start) / 1e6,
        "args": _args(span.step, device, end - start),
    }


def _fit(event: dict[str, Any], ends: list[int]) -> None:
    """Keeps a slice inside the loops around it, whose ends follow, where a reader cuts starts and
    durations to whole nanoseconds: Perfetto leaves out what reaches over an end by one.
    """
    start, duration = (round(event[key] * 1e6) // 1000 for key in ("ts", "dur"))
    if ends and start + duration == ends[-1] + 1:
        duration -= 1
        event["dur"] = (duration + 0.5) / 1000
    ends.append(start + duration)


def _args(step: Op | CollectiveOp | Loop, device: int, duration_ps: int) -> dict[str, Any]:
    if isinstance(step, Loop):
        shown = "first trip" if step.trips >= 1 else "mean of executions"
        return {"trips": step.trips, "shown": shown}
    if isinstance(step, Op):
        step = step.on(device)
    args: dict[str, Any] = {
        "where": step.where,
        "detail": step.detail,
        "bound": seconds(step.bound_s),
    }
    if isinstance(step, Op):
        args |= {
            "limited by": step.limited_by,
            "operations": quantity(step.flops, "FLOP"),
            "memory traffic": quantity(step.bytes, "B"),
        }
    else:
        waited_ps = duration_ps - math.ceil(step.group_s(device) * PS_PER_S)
        args |= {
            "op": step.op,
            "algorithm": step.algorithm,
            "why": step.reason,
            "bytes": quantity(step.nbytes, "B"),
            "waited for others": seconds(max(0, waited_ps) / PS_PER_S),
        }
    return args
