"""`cm384 exec`: an unmodified script on the virtual machine."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from emulator import files
from emulator.cli import choose
from emulator.cli.run import FUSIONS
from emulator.script.process import Options, command, run


def exec_(
    script: Annotated[Path, typer.Argument(help="A Python file, as for python FILE.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments.")
    ] = None,
    machine: Annotated[str, typer.Option(help=choose.MACHINE_HELP)] = "cloudmatrix384",
    devices: Annotated[
        int | None, typer.Option(min=1, help="What jax.devices() has. Default: all.")
    ] = None,
    arithmetic: Annotated[
        str | None, typer.Option(help="How matmuls sum, as in cm384 run. Default: the machine's.")
    ] = None,
    algorithms: Annotated[str | None, typer.Option(help=choose.ALGORITHMS_HELP)] = None,
    fusion: Annotated[str, typer.Option(help="chains or eager, as in cm384 run.")] = "chains",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Collectives run beside independent kernels.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a trace of the longest function's last step to this file."),
    ] = None,
    host_time: Annotated[
        bool,
        typer.Option("--host-time", help="The host's work between steps takes pod time, too."),
    ] = False,
    allow_oom: Annotated[
        bool, typer.Option("--allow-oom", help="Go on if a device's memory is too small.")
    ] = False,
) -> None:
    """Run a whole Python script and report its steps.

    jax.devices() has the machine's devices; whatever the script jits (or maps with shard_map or
    pmap) is computed as the machine computes it and takes the machine's time on Python's clocks.
    Options of this command stand before the script, the script's own after it.
    """
    on = choose.machine(machine)
    count = on.num_devices if devices is None else devices
    if count > on.num_devices:
        raise ValueError(f"--devices {count}: {on.name} has {on.num_devices} devices")
    if not script.is_file():
        raise ValueError(f"no such file: {script}")
    if fusion not in FUSIONS:
        raise ValueError(f"--fusion {fusion}: expected one of {', '.join(FUSIONS)}")
    files.check("--trace", trace)
    choose.arithmetic(arithmetic)
    options = Options(
        script=str(script),
        arguments=tuple(arguments or ()),
        machine=machine,
        devices=count,
        arithmetic=arithmetic,
        algorithms=choose.algorithms(algorithms),
        fusion=fusion,
        overlap=overlap,
        trace=None if trace is None else str(trace.absolute()),
        host_time=host_time,
        allow_oom=allow_oom,
    )
    status = _wait(*command(options))
    raise typer.Exit(status if status >= 0 else 128 - status)


def _wait(words: list[str], environment: dict[str, str]) -> int:
    """The exit status of the script's process, which gets the signals that this one gets."""
    process = subprocess.Popen(words, env=environment)
    forward = {
        signal.SIGINT: lambda *_: None,  # the terminal sends it to both
        signal.SIGTERM: lambda *_: process.terminate(),
    }
    before = {number: signal.signal(number, handler) for number, handler in forward.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def child(words: str) -> int:
    """What runs in the script's process."""
    options = Options(**json.loads(words))
    return run(options, choose.machine(options.machine))
