"""`cm384 compare`: one program on several machines, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from emulator import files
from emulator.cli import choose, show
from emulator.cli.kept import keep_compiled
from emulator.machines import Machine

if TYPE_CHECKING:
    from emulator.report.compare import Prepare

WORKLOADS = ("transformer", "matmul")


def compare(
    program: Annotated[
        str, typer.Argument(help="transformer, matmul, or path/to/file.py:function.")
    ],
    machine: Annotated[
        str, typer.Option(help="Machines with commas, each as in cm384 run.")
    ] = "cloudmatrix384,gb200_nvl72",
    arithmetic: Annotated[
        str | None,
        typer.Option(
            help="How matmuls sum, with commas: names as in cm384 run, own, native; or candidates: "
            "all that an Ascend's matrix unit might do."
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time, memory and energy from shapes; no values.")
    ] = False,
    size: Annotated[
        str | None, typer.Option(help="transformer: tiny, small, 7b, 70b. matmul: rows.")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="transformer: tensor-parallel devices (default: 8).")
    ] = None,
    dp: Annotated[
        int | None, typer.Option(min=1, help="transformer: replicas (default: all devices).")
    ] = None,
    fusion: Annotated[str, typer.Option(help="chains or eager, as in cm384 run.")] = "chains",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Collectives run beside independent kernels.")
    ] = False,
    allow_oom: Annotated[
        bool, typer.Option("--allow-oom", help="Answer even if a device's memory is too small.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Run a program on several virtual machines, side by side.

    Seconds, performance per watt, and errors against the same program in FP64. A program of
    your own is named as for cm384 run; its function_mesh(machine) and function_args(machine)
    are called for each machine.
    """
    machines = [choose.machine(name) for name in _machine_names(machine)]
    choose.check_belongs(program, transformer={"--tp": tp, "--dp": dp}, size=size)
    arithmetics: Any = None
    if arithmetic is not None:
        names = choose.names("--arithmetic", arithmetic, "own,NVIDIA_HOPPER")
        arithmetics = "candidates" if names == ["candidates"] else names
    files.check("--json", json)
    files.check("--csv", csv)
    files.check_apart(("--json", json), ("--csv", csv))

    from emulator.report.compare import compare_prepared

    if not estimate:
        keep_compiled()
    prepare = _prepare(program, size, dp, tp or 8, shapes_only=estimate)
    how = {"fusion": fusion, "overlap": overlap, "allow_oom": allow_oom}
    with show.err.status(f"comparing {escape(program)}"):
        found = compare_prepared(program, prepare, machines, arithmetics, not estimate, how)
    show.answer(found.table())
    if json is not None:
        files.write(json, found.to_json())
    if csv is not None:
        files.write(csv, found.to_csv())


def _machine_names(text: str) -> list[str]:
    """Names at the commas outside of brackets: a fabric's line has commas of its own."""
    names, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    names = [name.strip() for name in names]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"--machine {text!r}: write different machines with commas, such as "
            f"{', '.join(choose.MACHINES)}"
        )
    return names


def _prepare(program: str, size: str | None, dp: int | None, tp: int, shapes_only: bool) -> Prepare:
    """The program and its arguments for each machine."""
    if program == "transformer":
        return _transformer("tiny" if size is None else size, dp, tp, shapes_only)
    if program == "matmul":
        return _matmul(size, shapes_only)
    if ":" not in program:
        raise ValueError(
            f"unknown program {program!r}; known: {', '.join(WORKLOADS)}, or "
            "path/to/file.py:function"
        )

    from emulator.workloads.load import load

    def prepare(on: Machine) -> tuple[Any, tuple[Any, ...]]:
        import jax

        function, args = load(program, on)
        shapes = [x for x in jax.tree.leaves(args) if isinstance(x, jax.ShapeDtypeStruct)]
        if shapes and not shapes_only:
            raise ValueError(
                f"{program}: arguments contain {len(shapes)} shapes without values; return arrays, "
                "or add --estimate"
            )
        return function, args

    return prepare


def _transformer(size: str, dp: int | None, tp: int, shapes_only: bool) -> Prepare:
    from emulator.workloads import transformer

    if size not in transformer.SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(transformer.SIZES)}")
    if not shapes_only and size != "tiny":
        raise ValueError(f"--size {size}: values are compared for tiny; add --estimate")
    config = transformer.SIZES[size]

    def prepare(on: Machine) -> tuple[Any, tuple[Any, ...]]:
        replicas = dp or max(1, on.num_devices // tp)
        step = transformer.train_step(config, on.mesh(dp=replicas, tp=tp))
        if shapes_only:
            return step, transformer.shapes(config, replicas, tp)
        params, state = transformer.initial(config, replicas, tp)
        return step, (params, state, next(iter(transformer.batches(config, replicas))))

    return prepare


def _matmul(size: str | None, shapes_only: bool) -> Prepare:
    import jax
    import jax.numpy as jnp

    from emulator.workloads import matmul

    if size is not None and not size.isdecimal():
        raise ValueError(f"--size {size!r}: the matmul's size is a number of rows")

    def prepare(on: Machine) -> tuple[Any, tuple[Any, ...]]:
        x, y = matmul.grid(on.num_devices)
        # Both machines' own grids divide 1440.
        rows = int(size) if size is not None else matmul.near(1440, x, y)
        matmul.check(rows, x, y)
        shape = jax.ShapeDtypeStruct((rows, rows), jnp.bfloat16)
        args = (shape, shape) if shapes_only else matmul.operands(rows)
        return matmul.blocks(on.mesh(x=x, y=y)), args

    return prepare
