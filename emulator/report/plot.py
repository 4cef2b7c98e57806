"""A picture of a sweep over sizes: bus bandwidth and time, each algorithm a line, and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emulator.fabric import Collective


def bandwidths(
    rows: Sequence[tuple[int, Sequence[Collective]]],
    names: Sequence[str | None],
    title: str,
    path: Path,
) -> None:
    """Draws `rows` (size, the answer of each of `names`) to a PNG file.

    Raises:
        NotImplementedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotImplementedError(
            'drawing needs matplotlib, which is an extra: pip install "cm384[plot]"'
        ) from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, duration = figure.subplots(1, 2)
    sizes = [size for size, _ in rows]
    for i, name in enumerate(names):
        answers = [each[i] for _, each in rows]
        label = name or "the machine's choice"
        speed.plot(sizes, [a.busbw / 1e9 for a in answers], marker="o", markersize=3, label=label)
        duration.plot(sizes, [a.time_s * 1e6 for a in answers], marker="o", markersize=3)
    first = [each[0] for _, each in rows]
    bounds = [a.bound_s * 1e6 for a in first]
    at_bound = [a.busbw * a.time_s / a.bound_s / 1e9 if a.bound_s else 0.0 for a in first]
    speed.plot(sizes, at_bound, color="black", linestyle="--", label="physical bound")
    duration.plot(sizes, bounds, color="black", linestyle="--")
    speed.set_ylabel("bus bandwidth, GB/s")
    duration.set_ylabel("time, us")
    duration.set_yscale("log")
    duration.set_ylim(bottom=min(a.time_s * 1e6 for _, each in rows for a in each) / 10 or None)
    for axes in (speed, duration):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("size, bytes (as in nccl-tests)")
        axes.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    speed.legend(fontsize="small")
    figure.suptitle(title)
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
