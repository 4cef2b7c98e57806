"""`cm384 probe`: which arithmetic a matrix unit has, from its answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from emulator import files
from emulator.cli import show
from emulator.cli.show import err, out

if TYPE_CHECKING:
    from kernels.probe import Report


def probe(
    write: Annotated[
        Path | None,
        typer.Option(help="Write the probes and a script for a device without JAX to this folder."),
    ] = None,
    read: Annotated[
        Path | None, typer.Option(help="Read the answers that the script left in this folder.")
    ] = None,
    result: Annotated[
        Path | None, typer.Option("--out", help="Write what was found to this arithmetic file.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Probe the emulation of a preset, candidate or file.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the operands: bfloat16 or float16. Default: what the unit takes."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write where other files or a changed script are.")
    ] = False,
) -> None:
    """Find out how a matrix unit sums.

    Without options XLA's own here, with --preset an emulated one. On a real device: cm384 probe
    --write DIR; copy DIR there and run python run_probe.py; copy it back; cm384 probe --read
    DIR --out unit.json; cm384 run ... --arithmetic unit.json.
    """
    if sum(choice is not None for choice in (write, read, preset)) > 1:
        raise ValueError("probe: --write, --read and --preset are three different things; give one")
    if result is not None and write is not None:
        raise ValueError(
            f"--out {result}: there is nothing to write it from yet; it goes with --read"
        )
    files.check("--out", result)
    if read is not None and dtype is not None:
        raise ValueError(f"--dtype {dtype}: the folder's probes have their own; leave it out")
    if force and write is None:
        raise ValueError("--force goes with --write")
    from kernels import arithmetic_file
    from kernels import probe as probes

    if write is not None:
        _write(write, dtype or "bfloat16", force)
        return
    with err.status("asking, and comparing some thousand answers"):
        report = probes.judge(_read(read)) if read is not None else _here(preset, dtype)
    _show(report)
    if report.arithmetic is None:
        unwritten = "" if result is None else f"; {result} is not written"
        raise ValueError(f"none of the known families: no record describes this unit{unwritten}")
    if result is not None:
        arithmetic_file.save(report.arithmetic, result)
        show.line(f"\nwritten to {result}; use it as --arithmetic {result}")


def _write(folder: Path, dtype: str, force: bool) -> None:
    from kernels.probe import folder as probe_folder

    probe_folder.write(folder, dtype=dtype, force=force)
    show.line(f"Probes are in {folder}. Copy it to the device and run there:")
    show.line(f"  python {folder.name}/run_probe.py")
    show.line("(NumPy and PyTorch; no JAX). Then, with the folder back here:")
    show.line(f"  cm384 probe --read {folder} --out unit.json")


def _read(folder: Path) -> Any:
    from kernels.probe import folder as probe_folder

    return probe_folder.read(folder)


def _here(preset: str | None, dtype: str | None) -> Report:
    """XLA's own dot on this machine, or an emulated unit."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    import kernels
    from kernels import arithmetic_file
    from kernels import probe as probes

    if preset is not None:
        unit = arithmetic_file.named(preset)
        return probes.investigate(partial(kernels.matmul, arithmetic=unit), dtype=dtype)
    dot = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    dtype = dtype or "bfloat16"
    show.line(f"XLA's {dtype} dot on {jax.devices()[0].device_kind}")
    return probes.investigate(dot, dtype=dtype, takes_c=False)


def _show(report: Report) -> None:
    out.print(
        f"{report.compared:,} of {report.asked:,} answers compared: {report.dtype} operands, "
        f"{report.result} results, "
        f"sums start at {'0 or a given C' if report.with_c else '0'}",
        soft_wrap=True,
    )
    if report.arithmetic is None:
        show.line(str(report))
        return
    names = ", ".join(report.same_as) or "no preset or candidate"
    out.print(f"[b]Same bits as[/b]: {names}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("parameter", "value, and answers that rule out others", "not told apart"):
        table.add_column(column, overflow="fold")
    for name, text in report.evidence.items():
        table.add_row(name, escape(text), report.ambiguous.get(name, ""))
    out.print(table)
    out.print(
        "An answer is one output \\[row, column] of a probe. got: the FP32 word that came, "
        "expected: the one with the other value.",
        soft_wrap=True,
    )
    for note in report.notes:
        show.line(f"Note: {note}")
