"""`cm384 collectives`: the table of nccl-tests and hccl_test, beside what physics allows."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from emulator import files
from emulator.cli import choose, show
from emulator.cli.show import err, out, whole
from emulator.collectives import OPS
from emulator.fabric import Collective, collective
from emulator.fabric.arguments import ITEM_BYTES
from emulator.machines import Machine
from emulator.units import several

_COLUMNS = ("size", "count", "type", "time", "algbw", "busbw", "algorithm", "bound", "of bound")
_UNITS = ("B", "", "", "us", "GB/s", "GB/s", "", "us", "%")
_LONG_SWEEP = 64  # answers; fewer are there before a bar is drawn

Rows = list[tuple[int, list[Collective]]]


def collectives(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(OPS)}.")],
    smallest: Annotated[
        str, typer.Option("--min", help="Smallest size in bytes: 4096, 64K, 1M or 1G.")
    ] = "1K",
    largest: Annotated[str, typer.Option("--max", help="Largest size.")] = "1G",
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 4,
    devices: Annotated[
        str | None,
        typer.Option(
            help="A count, or numbers and ranges: 0,8,16 or 0-15 or 0:384:8. Default: all."
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="One or several, side by side: ring,nhr,best. Default: the machine's choice."
        ),
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(help="How bytes are moved, e.g. sdma. Default: the machine's choice."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What is sent.")] = "bfloat16",
    root: Annotated[
        int | None,
        typer.Option(help="Of broadcast, reduce, scatter, gather. Default: the first device."),
    ] = None,
    production: Annotated[
        bool, typer.Option("--production", help="Add what production takes longer than benchmarks.")
    ] = False,
    table: Annotated[
        str | None, typer.Option("--csv", help="Write the rows to this file; - for the terminal.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw bus bandwidth and time to this PNG file.")
    ] = None,
    machine: Annotated[str, typer.Option(help=choose.MACHINE_HELP)] = "cloudmatrix384",
) -> None:
    """Time one collective over a range of sizes.

    Sizes and bandwidths are those of nccl-tests. A permute sends from each device to the next
    one of the group.
    """
    on = choose.machine(machine)
    group = choose.devices(devices, on)
    sizes = _sizes(smallest, largest, factor)
    names: list[str | None] = [None]
    if algorithm is not None:
        names = [*choose.names("--algorithm", algorithm, "ring,nhr,best")]
    rows_to = None if table in (None, "-") else Path(table)
    files.check("--plot", plot, ".png")
    files.check("--csv", rows_to)
    files.check_apart(("--plot", plot), ("--csv", rows_to))
    pairs = None
    if op == "permute":
        pairs = tuple(zip(group, (*group[1:], group[0]), strict=True))

    def ask(size: int, name: str | None) -> Collective:
        return collective(
            op,
            size,
            on=on,
            devices=group,
            algorithm=name,
            dtype=dtype,
            root=root,
            pairs=pairs,
            transport=transport,
            launch="production" if production else "benchmark",
        )

    rows: Rows = [
        (size, [ask(size, name) for name in names])
        for size in _with_progress(sizes, len(sizes) * len(names))
    ]
    if plot is not None:
        from emulator.report.plot import bandwidths

        bandwidths(rows, names, _title(op, group, on), plot)
        show.line(f"drawn to {plot}", err)
    if table is not None:
        text = _csv(rows)
        if table == "-":
            sys.stdout.write(text)
            return
        files.write(Path(table), text)
        show.line(f"written to {table}", err)
    _print(rows, names, _title(op, group, on))


def _sizes(smallest: str, largest: str, factor: int) -> list[int]:
    low, high = choose.byte_count(smallest), choose.byte_count(largest)
    if not 1 <= low <= high:
        raise ValueError(f"--min {smallest} must be at least one byte and at most --max {largest}")
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return sizes


def _with_progress(sizes: list[int], answers: int) -> Iterable[int]:
    """The sizes; a bar on standard error while a long sweep runs, if that is a terminal."""
    if answers < _LONG_SWEEP or not err.is_terminal:
        return sizes
    return track(sizes, description="timing", console=err, transient=True)


def _title(op: str, group: tuple[int, ...], on: Machine) -> str:
    return f"{op} over {several(len(group), on.device_kind)} of {on.name}"


def _cells(answer: Collective) -> list[str]:
    """One row: nccl-tests' columns, then ours."""
    share = 100 * answer.bound_s / answer.time_s if answer.time_s else 100.0
    return [
        str(answer.nbytes),
        str(-(-answer.nbytes // ITEM_BYTES[answer.dtype])),
        answer.dtype,
        f"{answer.time_s * 1e6:.2f}",
        f"{answer.algbw / 1e9:.2f}",
        f"{answer.busbw / 1e9:.2f}",
        f"{answer.algorithm} ({answer.transport})",
        f"{answer.bound_s * 1e6:.2f}",
        f"{share:.1f}",
    ]


def _print(rows: Rows, names: list[str | None], title: str) -> None:
    if len(names) == 1:
        heads = [f"{c}\n{u}" if u else c for c, u in zip(_COLUMNS, _UNITS, strict=True)]
        lines = [_cells(answers[0]) for _, answers in rows]
    else:  # what is common once, then time, bus bandwidth and share of the bound of each
        heads = ["size\nB", "bound\nus"]
        heads += [f"{n}\n{h}" for n in names for h in ("us", "busbw GB/s", "% of bound")]
        lines = []
        for size, answers in rows:
            cells = [_cells(answer) for answer in answers]
            each = [part for c in cells for part in (c[3], c[5], c[8])]
            lines.append([str(size), cells[0][7], *each])
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(
            head, justify="left" if head.startswith(("algorithm", "type")) else "right"
        )
    for line in lines:
        table.add_row(*line)
    whole(table)
    if len(names) == 1:
        for reason in dict.fromkeys(answers[0].reason for _, answers in rows):
            out.print(f"Why: {reason}.", soft_wrap=True)


def _csv(rows: Rows) -> str:
    """All answers, one a line, in bytes, seconds and bytes per second."""
    fields = "op nbytes count dtype devices algorithm transport time_s algbw busbw bound_s reason"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields.split())
    for _, answers in rows:
        for a in answers:
            count = -(-a.nbytes // ITEM_BYTES[a.dtype])
            line: list[Any] = [a.op, a.nbytes, count, a.dtype, len(a.devices), a.algorithm]
            line += [a.transport, a.time_s, a.algbw, a.busbw, a.bound_s, a.reason]
            writer.writerow(line)
    return text.getvalue()
