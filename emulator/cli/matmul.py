"""`cm384 matmul`: a matrix product on one device, engine by engine; or a sweep over sizes."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from emulator import files
from emulator.chip import MatmulTime, matmul_time
from emulator.cli import choose, show
from emulator.cli.show import err, out, whole
from emulator.machines import Machine
from emulator.machines.chips import chip_names, single
from emulator.units import quantity, seconds

_LAYOUTS = "nd (row-major), nd_t (the transpose row-major) or nz (fractals)"

_NOTICED = 1.001  # what unaligned rows cost is told from a thousandth of the time on

Series = dict[str, list[MatmulTime]]

_WORDS = {
    "cube_s": "matrix unit",
    "l0_s": "L1 to L0",
    "l2_s": "L2 cache to L1",
    "memory_s": "memory to L1",
    "store_s": "results",
    "pad_s": "copy to padded rows",
    "fixed_s": "launch, tiling, split K",
}


_COLUMNS = (
    *("m", "k", "n", "batch", "dtype", "time_s", "bound_s", "limited_by", "flops", "bytes"),
    *("flops_per_s", "utilization", "quoted_utilization", "split_k", "tiles", "rounds"),
)


def matmul(
    m: Annotated[int | None, typer.Argument(help="Rows of a.")] = None,
    k: Annotated[int | None, typer.Argument(help="Columns of a, rows of b.")] = None,
    n: Annotated[int | None, typer.Argument(help="Columns of b.")] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, int8, int4, float32, ...")
    ] = "bfloat16",
    out_dtype: Annotated[
        str | None, typer.Option(help="Of the result. Default: as dtype; bfloat16 for integers.")
    ] = None,
    a_layout: Annotated[str, typer.Option(help=f"Of a: {_LAYOUTS}.")] = "nd",
    b_layout: Annotated[
        str, typer.Option("--layout", "--b-layout", help=f"Of b: {_LAYOUTS}.")
    ] = "nd",
    batch: Annotated[int, typer.Option(help="How many such products.")] = 1,
    groups: Annotated[
        str | None, typer.Option(help="Rows of each of several b (experts), adding up to M: 9,0,7.")
    ] = None,
    l2: Annotated[str, typer.Option(help="Operands are cold (in memory) or warm.")] = "cold",
    rows: Annotated[
        str, typer.Option(help="Rows lie packed, as arrays have them, or padded to whole lines.")
    ] = "packed",
    library: Annotated[
        bool, typer.Option("--library", help="The library's rule for tiles, not the quickest tile.")
    ] = False,
    chip: Annotated[
        str | None, typer.Option(help=f"A single die: {', '.join(chip_names())}.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help=f"{choose.MACHINE_HELP} Default: cloudmatrix384.")
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="A table of sizes: 1 to M rows; without M K N, usual ones."),
    ] = False,
    table: Annotated[
        str | None, typer.Option("--csv", help="Write the rows to this file; - for the terminal.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the sweep under its roofline to this PNG file.")
    ] = None,
) -> None:
    """Time one matrix product on one device.

    (M x K) @ (K x N), engine by engine, with what limits it.
    """
    if chip is not None and machine is not None:
        raise ValueError(f"--chip {chip} is a die by itself, of no --machine; give one of them")
    on = single(chip) if chip is not None else choose.machine(machine or "cloudmatrix384")
    rows_to = None if table in (None, "-") else Path(table)
    files.check("--plot", plot, ".png")
    files.check("--csv", rows_to)
    files.check_apart(("--plot", plot), ("--csv", rows_to))
    tiling = "library" if library else None

    def ask(
        m: int, k: int, n: int, each: Sequence[int] | None = None, rows: str = rows
    ) -> MatmulTime:
        return matmul_time(
            *(m, k, n, on, dtype, b_layout, batch, out_dtype),
            a_layout=a_layout,
            groups=each,
            tiling=tiling,
            l2=l2,
            rows=rows,
        )

    if not sweep:
        if m is None or k is None or n is None:
            raise ValueError("matmul: give M K N, or --sweep for a table of sizes")
        if plot is not None:
            raise ValueError("--plot draws a sweep: add --sweep")
        answer = ask(m, k, n, _groups(groups))
        if table is not None:
            return _write({"": [answer]}, table)
        aligned_s = ask(m, k, n, answer.groups, "padded").time_s
        return _show(answer, aligned_s, on, a_layout, b_layout, l2)
    if groups is not None:
        raise ValueError("--groups belongs to one product: leave out --sweep")
    if m is None:
        series = {
            "m = k = n": [ask(size, size, size) for size in _powers(16, 16384)],
            "k = n = 8192": [ask(size, 8192, 8192) for size in _powers(1, 32768)],
            "k = n = 2048": [ask(size, 2048, 2048) for size in _powers(1, 32768)],
        }
    elif k is None or n is None:
        raise ValueError("matmul --sweep: give M K N for 1 to M rows, or none of them")
    else:
        sizes = [*(size for size in _powers(1, m) if size < m), m]
        series = {f"k = {k}, n = {n}": [ask(size, k, n) for size in sizes]}
    if plot is not None:
        from emulator.report.plot import roofline

        roofline(series, f"{dtype} matmuls on one {on.device_kind} of {on.name}", plot)
        show.line(f"drawn to {plot}", err)
    if table is not None:
        _write(series, table)
    if table != "-":
        _table(series, on, dtype)


def _powers(low: int, high: int) -> list[int]:
    return [low << i for i in range((high // low).bit_length())]


def _groups(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--groups {text!r}: write rows with commas: 128,0,64") from None


def _show(
    time: MatmulTime, aligned_s: float, on: Machine, a_layout: str, b_layout: str, l2: str
) -> None:
    """`aligned_s`: the same with padded rows."""
    times = f"{time.batch} x " if time.batch > 1 else ""
    parted = f" in {len(time.groups)} groups" if time.groups else ""
    out.print(
        f"{times}({time.m} x {time.k}) @ ({time.k} x {time.n}){parted}, {time.dtype}, a as "
        f"{a_layout}, b as {b_layout}, {l2} cache, on one {on.device_kind} of {escape(on.name)}",
        soft_wrap=True,
    )
    split = f", K over {time.split_k} cores" if time.split_k > 1 else ""
    shown = Table(show_header=False, box=None)
    shown.add_row("time", seconds(time.time_s))
    shown.add_row("physical bound", seconds(time.bound_s))
    shown.add_row("limited by", time.limited_by)
    shown.add_row("rate", quantity(time.flops_per_s, "FLOP/s"))
    shown.add_row("of the matrix unit's peak", f"{100 * time.utilization:.1f} %")
    shown.add_row("of the quoted figure", f"{100 * time.quoted_utilization:.1f} %")
    shown.add_row(
        "tiles",
        f"{time.tiles:,} of {time.tile[0]} x {time.tile[1]}{split}; {time.rounds:,} on the busiest "
        f"of {time.cores} cores",
    )
    for name, time_s in time.breakdown.items():
        if name != "pad_s" or time_s:
            shown.add_row(f"  {_WORDS[name]}", seconds(time_s))
    if time.time_s > _NOTICED * aligned_s:
        how = f"{' and '.join(time.padded)} copied first" if time.padded else "read as they are"
        shown.add_row("unaligned rows", f"{seconds(time.time_s - aligned_s)} of the time, {how}")
    whole(shown)
    clock = on.chip.clock_hz * on.chip.engines.sustained_clock
    out.print(
        f"Engines are those of the busiest core and overlap, except the last "
        f"{'two lines' if time.pad_s else 'line'} of them. Clock "
        f"{clock / 1e9:.2f} GHz (assumed to be kept). {on.chip.engines.fit}.",
        soft_wrap=True,
    )


def _table(series: Series, on: Machine, dtype: str) -> None:
    first = next(iter(series.values()))[0]
    out.print(
        f"{dtype} matmuls on one {on.device_kind} of {escape(on.name)}: matrix unit "
        f"{quantity(first.peak_flops_per_s, 'FLOP/s')}, memory "
        f"{quantity(first.memory_bytes_per_s, 'B/s')}",
        soft_wrap=True,
    )
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("m", "k", "n", "time", "bound", "rate", "of peak", "limited by", "tile"):
        shown.add_column(column, justify="left" if column == "limited by" else "right")
    for times in series.values():
        for t in times:
            shown.add_row(
                *(f"{size:,}" for size in (t.m, t.k, t.n)),
                *(seconds(t.time_s), seconds(t.bound_s), quantity(t.flops_per_s, "FLOP/s")),
                *(f"{100 * t.utilization:.1f} %", t.limited_by),
                f"{t.tile[0]} x {t.tile[1]}" + (f" / {t.split_k}" if t.split_k > 1 else ""),
            )
        shown.add_section()
    whole(shown)


def _write(series: Series, table: str) -> None:
    """All numbers of all rows as CSV, to a file or the terminal."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, "tile_m", "tile_n", *_WORDS])
    for times in series.values():
        for t in times:
            values = [getattr(t, name) for name in _COLUMNS]
            writer.writerow([*values, *t.tile, *t.breakdown.values()])
    if table == "-":
        sys.stdout.write(text.getvalue())
        return
    files.write(Path(table), text.getvalue())
    show.line(f"written to {table}", err)
