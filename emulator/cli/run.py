"""`cm384 run`: a program's values and its time on the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from emulator import files
from emulator.cli import choose, show
from emulator.cli import real_devices as cluster
from emulator.cli.kept import keep_compiled
from emulator.cli.show import err, out
from emulator.machines import Machine
from emulator.units import capacity, several

if TYPE_CHECKING:
    from emulator.report import Estimate

WORKLOADS = ("transformer", "matmul")
FUSIONS = ("chains", "eager")

# Beyond this, initial parameters and optimizer state are not for a host with two cores.
LARGEST_STATE_BYTES = 4 * 2**30


def run(
    program: Annotated[
        str, typer.Argument(help="transformer, matmul, or path/to/file.py:function.")
    ],
    machine: Annotated[str, typer.Option(help=choose.MACHINE_HELP)] = "cloudmatrix384",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time, memory and energy from shapes; no values.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev to this file.")
    ] = None,
    chakra: Annotated[
        Path | None,
        typer.Option(help="Write Chakra execution traces, one a device, to this new folder."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="transformer: training steps (default: 4).")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="transformer: tiny, small, 7b, 70b. matmul: rows.")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="transformer: tensor-parallel devices (default: 8).")
    ] = None,
    dp: Annotated[
        int | None, typer.Option(min=1, help="transformer: replicas (default: all devices).")
    ] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            help="How matmuls sum: a preset such as NVIDIA_HOPPER, ASCEND_910C/late_addend, a file "
            "from cm384 probe, or native. Default: the machine's own."
        ),
    ] = None,
    algorithms: Annotated[str | None, typer.Option(help=choose.ALGORITHMS_HELP)] = None,
    fusion: Annotated[
        str,
        typer.Option(
            help="chains: neighbouring operations are one kernel, attention too, as a graph "
            "compiler makes them; eager: every operation is a kernel of its own."
        ),
    ] = "chains",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Collectives run beside independent kernels.")
    ] = False,
    allow_oom: Annotated[
        bool, typer.Option("--allow-oom", help="Answer even if a device's memory is too small.")
    ] = False,
    real_devices: Annotated[
        int | None,
        typer.Option(min=1, help="Compute with so many of this host's devices (GPUs, say)."),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first of several processes.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many processes there are.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, help="Which of them this one is, from 0.")
    ] = None,
) -> None:
    """Run a program on the virtual machine: values and time.

    A program of your own is named as path/to/file.py:function. If the function takes arguments,
    the file also defines function_args(machine), which returns them as a tuple; if it has a
    parameter called mesh, the file defines function_mesh(machine), which returns
    machine.mesh(...).
    """
    on = choose.machine(machine)
    choose.check_belongs(program, transformer={"--steps": steps, "--tp": tp, "--dp": dp}, size=size)
    if fusion not in FUSIONS:
        raise ValueError(f"--fusion {fusion}: expected one of {', '.join(FUSIONS)}")
    if estimate and arithmetic is not None:
        raise ValueError(
            f"--arithmetic {arithmetic} --estimate: times do not depend on how matmuls sum; leave "
            "one of the two out"
        )
    for option, value in (("--steps", steps), ("--real-devices", real_devices)):
        if estimate and value is not None:
            raise ValueError(
                f"{option} {value} --estimate: an estimate computes no values and is of one step; "
                "leave one of the two out"
            )
    choose.arithmetic(arithmetic)
    files.check("--trace", trace)
    if chakra is not None:
        if chakra.exists():
            raise ValueError(f"--chakra {chakra}: name a new folder; this one is there already")
        files.check_folder("--chakra", chakra)
        files.check_apart(("--trace", trace), ("--chakra", chakra))
    how: dict[str, Any] = {"fusion": fusion, "overlap": overlap, "allow_oom": allow_oom}
    how["algorithms"] = choose.algorithms(algorithms)
    devices = cluster.real_devices(real_devices, coordinator, processes, process, on)
    if devices is None and not estimate:
        keep_compiled()
    if program == "transformer":
        size = "tiny" if size is None else size
        answer = _transformer(
            *(on, size, steps or 4, dp, tp or 8, estimate, arithmetic, devices, how)
        )
    elif program == "matmul":
        answer = _matmul(on, size, estimate, arithmetic, devices, how)
    elif ":" in program:
        answer = _own(on, program, estimate, arithmetic, devices, how)
    else:
        raise ValueError(
            f"unknown program {program!r}; known: {', '.join(WORKLOADS)}, "
            f"or path/to/file.py:function"
        )
    out.print()
    show.answer(answer.table())
    if out.quiet:
        return  # of several processes, the first writes
    if trace is not None:
        answer.to_perfetto(trace)
        show.line(f"trace written to {trace}; open it at https://ui.perfetto.dev")
    if chakra is not None:
        answer.to_chakra(chakra)
        written = f"Chakra traces of {several(len(answer.devices), 'device')} written to {chakra}/"
        show.line(written)


def _transformer(
    on: Machine,
    size: str,
    steps: int,
    dp: int | None,
    tp: int,
    shapes_only: bool,
    arithmetic: str | None,
    devices: Any,
    how: dict[str, Any],
) -> Estimate:
    import jax

    import emulator as em
    from emulator.workloads import transformer

    if size not in transformer.SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(transformer.SIZES)}")
    config = transformer.SIZES[size]
    if tp > on.num_devices:
        raise ValueError(f"--tp {tp}: {on.name} has {on.num_devices} devices")
    dp = dp or on.num_devices // tp
    mesh = on.mesh(dp=dp, tp=tp)
    step = transformer.train_step(config, mesh)
    tokens = dp * config.sequences * config.sequence
    out.print(
        f"[b]transformer {size}[/b]: {config.parameters:,} parameters, {config.layers} layers, "
        f"{tokens:,} tokens a step, on dp={dp} x tp={tp} devices of {escape(on.name)}",
        soft_wrap=True,
    )
    shapes = transformer.shapes(config, dp, tp)
    if not shapes_only:
        needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        if needed > LARGEST_STATE_BYTES:
            raise ValueError(
                f"size {size}: parameters and optimizer state are {capacity(needed)}, too much to "
                f"compute values with on this host; add --estimate"
            )
        _train(on, config, step, dp, tp, steps, arithmetic, devices, how["algorithms"])
    with err.status("reading the program for its time"):
        return em.estimate(step, *shapes, on=on, **how)


def _train(
    on: Machine,
    config: Any,
    step: Callable[..., Any],
    dp: int,
    tp: int,
    steps: int,
    arithmetic: str | None,
    devices: Any,
    algorithms: Any,
) -> None:
    """Trains twice from the same start, matmuls in the machine's arithmetic and in XLA's."""
    import jax

    import emulator as em
    from emulator.program.real_devices import everywhere
    from emulator.workloads import transformer

    def placed(values: Any) -> Any:
        return jax.tree.map(lambda x: everywhere([x], devices)[0], values)

    with err.status("initial parameters"):
        start = placed(transformer.initial(config, dp, tp))
        text = map(placed, transformer.batches(config, dp))
        tokens = next(text)
    runs = {}
    own = arithmetic or on.arithmetic
    for label, chosen in ((own, arithmetic), ("native XLA", "native")):
        options = {"arithmetic": chosen, "algorithms": algorithms, "devices": devices}
        emulated = jax.jit(em.emulate(step, on=on, **options))
        with err.status(
            f"compiling the step for {on.mesh(dp=dp, tp=tp).size} devices, {escape(label)}"
        ):
            began = time.perf_counter()
            runs[label] = emulated.lower(*start, tokens).compile()
            wall_s = time.perf_counter() - began
        show.line(f"compiled with matmuls in {label} arithmetic in {wall_s:.1f} s on this host")
    wide = max(20, len(own) + 6)
    head = f"{'step':>4}  {'loss, ' + own:>{wide}}  {'loss, native XLA':>18}  wall on this host"
    show.line("\n" + head)
    states = {label: start for label in runs}
    for number in range(1, steps + 1):
        losses, walls = [], []
        for label, compiled in runs.items():
            with err.status(f"step {number} of {steps}, {escape(label)}"):
                began = time.perf_counter()
                *state, loss = compiled(*states[label], tokens)
                states[label] = tuple(state)
                losses.append(float(loss))
                walls.append(time.perf_counter() - began)
        seconds = f"{walls[0]:.2f} s and {walls[1]:.2f} s"
        show.line(f"{number:>4}  {losses[0]:>{wide}.6f}  {losses[1]:>18.6f}  {seconds}")
        tokens = next(text)


def _matmul(
    on: Machine,
    size: str | None,
    shapes_only: bool,
    arithmetic: str | None,
    devices: Any,
    how: dict[str, Any],
) -> Estimate:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import emulator as em
    import kernels
    from emulator.workloads import matmul

    x, y = matmul.grid(on.num_devices)
    if size is not None and not size.isdecimal():
        raise ValueError(f"--size {size!r}: the matmul's size is a number of rows")
    rows = int(size) if size is not None else matmul.near(1536, x, y)
    matmul.check(rows, x, y)
    product = matmul.blocks(on.mesh(x=x, y=y))
    out.print(
        f"[b]matmul[/b]: ({rows} x {rows}) @ ({rows} x {rows}) in BF16, in {x} x {y} blocks on the "
        f"{x * y} devices of {escape(on.name)}",
        soft_wrap=True,
    )
    if not shapes_only:
        if arithmetic == "native":
            raise ValueError(
                "--arithmetic native: XLA's bits depend on the shape, and this program compares "
                "bits between divisions; name a unit"
            )
        unit = kernels.arithmetic_file.named(arithmetic or on.arithmetic)
        show.line(f"  values in {unit.name} arithmetic")
        a, b = matmul.operands(rows)

        def tiles() -> Any:
            per_device = em.pmap(
                lambda a, b: matmul.tile(a, b, x, y),
                axis_name="device",
                on=on,
                in_axes=(None, None),
                axis_size=x * y,
                arithmetic=unit,
                devices=devices,
            )
            return matmul.assemble(jax.jit(per_device)(a, b), x, y)

        ways: dict[str, Callable[[], Any]] = {
            "undivided": lambda: kernels.matmul(a, b, arithmetic=unit),
            "shard_map": lambda: jax.jit(
                em.emulate(product, on=on, arithmetic=unit, devices=devices)
            )(a, b),
            "pmap": tiles,
        }
        bits = {}
        for name, way in ways.items():
            with err.status(f"{name}, arithmetic {escape(unit.name)}"):
                began = time.perf_counter()
                bits[name] = np.asarray(jax.block_until_ready(way())).view(np.uint32)
                wall_s = time.perf_counter() - began
            differing = int((bits[name] != bits["undivided"]).sum())
            verdict = (
                "" if name == "undivided" else f"  {differing} of {rows * rows:,} values differ"
            )
            out.print(f"  {name:<10} {wall_s:6.2f} s on this host{verdict}")
            if differing:
                raise RuntimeError(f"{name} does not give the bits of the undivided product")
    shape = jax.ShapeDtypeStruct((rows, rows), jnp.bfloat16)
    return em.estimate(product, shape, shape, on=on, **how)


def _own(
    on: Machine,
    target: str,
    shapes_only: bool,
    arithmetic: str | None,
    devices: Any,
    how: dict[str, Any],
) -> Estimate:
    import jax

    import emulator as em
    from emulator.report.literal import LiteralTable
    from emulator.workloads.load import load

    function, args = load(target, on)
    if shapes_only:
        return em.estimate(function, *args, on=on, **how)
    shapes = [x for x in jax.tree.leaves(args) if isinstance(x, jax.ShapeDtypeStruct)]
    if shapes:
        raise ValueError(
            f"{target}: arguments contain {len(shapes)} shapes without values; "
            f"return arrays, or add --estimate"
        )
    with err.status(f"running {escape(target)} on {escape(on.name)}"):
        began = time.perf_counter()
        answer = em.run(function, *args, on=on, arithmetic=arithmetic, devices=devices, **how)
        wall_s = time.perf_counter() - began
    out.print(f"values, computed in {wall_s:.2f} s on this host")
    table = LiteralTable()
    for column in ("output", "dtype", "shape", "value"):
        table.add_column(column, overflow="fold")
    for path, leaf in jax.tree_util.tree_leaves_with_path(answer.value):
        name = jax.tree_util.keystr(path) or "result"
        table.add_row(name, str(leaf.dtype), str(leaf.shape), _in_brief(leaf))
    out.print(table)
    return answer


def _in_brief(leaf: Any) -> str:
    """One number that tells values apart."""
    import jax

    if not leaf.size:
        return "empty"
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
        return str(jax.random.key_data(leaf).reshape(-1).tolist()[:4])
    mean = "" if leaf.size == 1 else "mean "
    return mean + f"{leaf.mean().item():.6g}"
