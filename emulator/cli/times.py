"""`cm384 matmul`: a single answer of the time model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from emulator.chip import matmul_time
from emulator.cli import choose
from emulator.cli.show import out
from emulator.units import quantity, seconds


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
