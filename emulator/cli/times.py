"""`cm384 collectives` and `cm384 matmul`: single answers of the time model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from emulator.chip import matmul_time
from emulator.cli import choose
from emulator.cli.show import out
from emulator.fabric import collective
from emulator.units import capacity, quantity, seconds


def collectives(
    op: Annotated[str, typer.Argument(help="all_reduce, all_gather, reduce_scatter, ...")],
    smallest: Annotated[str, typer.Option("--min", help="Smallest size.")] = "1K",
    largest: Annotated[str, typer.Option("--max", help="Largest size.")] = "1G",
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 4,
    devices: Annotated[
        str | None, typer.Option(help="A count, or numbers and ranges such as 0,8,16-23.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Its name; by default the machine's choice for each size.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What is sent.")] = "bfloat16",
    machine: Annotated[str, typer.Option(help=choose.MACHINE_HELP)] = "cloudmatrix384",
) -> None:
    """Time one collective over a range of sizes (sizes and bandwidths as in nccl-tests)."""
    on = choose.machine(machine)
    group = choose.devices(devices, on)
    low, high = choose.byte_count(smallest), choose.byte_count(largest)
    if not 1 <= low <= high:
        raise ValueError(f"--min {smallest} must be at least one byte and at most --max {largest}")
    table = Table(
        title=f"{op} over {len(group)} devices of {on.name}; bandwidths in GB/s",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("size", "algorithm", "time", "algbw", "busbw", "bound", "of bound"):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    size = low
    while size <= high:
        answer = collective(op, size, on=on, devices=group, algorithm=algorithm, dtype=dtype)
        table.add_row(
            capacity(size),
            answer.algorithm,
            seconds(answer.time_s),
            f"{answer.algbw / 1e9:.2f}",
            f"{answer.busbw / 1e9:.2f}",
            seconds(answer.bound_s),
            f"{100 * answer.bound_s / answer.time_s:.1f} %" if answer.time_s else "-",
        )
        size *= factor
    out.print(table)


def matmul(
    m: Annotated[int, typer.Argument(help="Rows of a.")],
    k: Annotated[int, typer.Argument(help="Columns of a, rows of b.")],
    n: Annotated[int, typer.Argument(help="Columns of b.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, int8, float32, ...")] = "bfloat16",
    b_layout: Annotated[str, typer.Option(help="nd or nz.")] = "nd",
    machine: Annotated[str, typer.Option(help=choose.MACHINE_HELP)] = "cloudmatrix384",
) -> None:
    """Time one matrix product on one device, with what limits it."""
    on = choose.machine(machine)
    answer = matmul_time(m, k, n, on=on, dtype=dtype, b_layout=b_layout)
    out.print(f"({m} x {k}) @ ({k} x {n}) in {dtype} on one {on.device_kind} of {on.name}")
    table = Table(show_header=False, box=None)
    table.add_row("time", seconds(answer.time_s))
    table.add_row("rate", quantity(answer.flops_per_s, "FLOP/s"))
    table.add_row("of the matrix unit's peak", f"{100 * answer.utilization:.1f} %")
    table.add_row("bound", seconds(answer.bound_s))
    table.add_row("limited by", answer.limited_by)
    for part, time_s in answer.breakdown.items():
        table.add_row(f"  {part.removesuffix('_s')}", seconds(time_s))
    out.print(table)
