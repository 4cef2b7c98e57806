"""Pictures of sweeps over sizes: collectives beside their bound, matmuls under their roof."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emulator import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from emulator.chip import MatmulTime
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
    figure = _figure((11, 4.5))
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
    style = {"color": "black", "linestyle": "--", "marker": "." if len(sizes) == 1 else None}
    speed.plot(sizes, at_bound, label="physical bound", **style)
    duration.plot(sizes, bounds, **style)
    speed.set_ylabel("bus bandwidth, GB/s")
    duration.set_ylabel("time, us")
    if shortest := min(a.time_s * 1e6 for _, each in rows for a in each):
        duration.set_yscale("log")
        duration.set_ylim(bottom=shortest / 10)
    for axes in (speed, duration):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("size, bytes (as in nccl-tests)")
        axes.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    speed.legend(fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def roofline(series: Mapping[str, Sequence[MatmulTime]], title: str, path: Path) -> None:
    """Draws the rate of matmuls over their arithmetic intensity to a PNG file, each series a line,
    under the roof of the matrix unit and the memory, and beside it the time they take.

    Raises:
        NotImplementedError: matplotlib is not installed.
    """
    figure = _figure((11, 4.5))
    rate, duration = figure.subplots(1, 2)
    some = [time for times in series.values() for time in times]
    for name, times in series.items():
        found = [(t.flops / t.bytes, t.flops_per_s / 1e12) for t in times]
        (line,) = rate.plot(*zip(*found, strict=True), marker="o", markersize=3, label=name)
        work = [t.flops for t in times]
        duration.plot(work, [t.time_s * 1e6 for t in times], marker="o", markersize=3)
        bounds = [t.bound_s * 1e6 for t in times]
        duration.plot(work, bounds, color=line.get_color(), linestyle="--", linewidth=0.8)
    peak = some[0].peak_flops_per_s
    memory = some[0].memory_bytes_per_s
    ends = [min(t.flops / t.bytes for t in some) / 2, max(t.flops / t.bytes for t in some) * 2]
    corner = peak / memory
    at = sorted({*ends, min(max(corner, ends[0]), ends[1])})
    roof = [min(peak, memory * x) / 1e12 for x in at]
    rate.plot(at, roof, color="black", label="matrix unit, memory")
    quoted = some[0].quoted_flops_per_s / 1e12
    rate.plot([corner, max(ends[1], corner)], [quoted] * 2, color="grey", ls=":", label="as quoted")
    rate.set_xlabel("operations per byte of operands and result")
    rate.set_ylabel("TFLOP/s")
    rate.legend(fontsize="small")
    duration.set_xlabel("operations")
    duration.set_ylabel("time, us (dashed: physical bound)")
    for axes in (rate, duration):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    _save(figure, path)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotImplementedError(
            'drawing needs matplotlib, which is an extra: pip install "cm384[plot]"'
        ) from error
    return Figure(figsize=size, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    files.write(path, image.getvalue())
