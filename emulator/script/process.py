"""The process in which a script runs: what `cm384 exec` asks, the rest is its own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emulator import files
from emulator.machines import Machine
from emulator.script.clock import PodClock

_OURS = tuple(
    str(Path(__file__).resolve().parents[2] / room) + os.sep for room in ("emulator", "kernels")
)
_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `cm384 exec` was asked for; it travels to the script's process as JSON."""

    script: str
    arguments: tuple[str, ...]
    machine: str
    devices: int
    arithmetic: str | None = None
    algorithms: Mapping[str, str] | None = None
    fusion: str = "chains"
    overlap: bool = False
    trace: str | None = None
    host_time: bool = False
    allow_oom: bool = False


def command(options: Options) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of the script's process."""
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.append({root!r}); "
        "from emulator.cli.exec import child; sys.exit(child(sys.argv[1]))"
    )
    flag = f"{_FLAG}={options.devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flag])),
        "JAX_PLATFORMS": "cpu",
    }
    words = json.dumps(dataclasses.asdict(options))
    return [sys.executable, "-c", code, words], environment


def run(options: Options, on: Machine) -> int:
    """Runs the script as `python script arguments...` would, prints the report, and returns the
    exit status of the script.
    """
    import jax

    from emulator.script.eager import Eager
    from emulator.script.jax_calls import caught
    from emulator.script.report import no_steps, report, show
    from emulator.script.steps import Steps

    jax.devices()  # before the script may ask for another number of them
    began_s = time.perf_counter()
    clock, eager = PodClock(options.host_time), Eager()
    steps = Steps(
        on,
        clock,
        options.arithmetic,
        options.algorithms,
        fusion=options.fusion,
        overlap=options.overlap,
        allow_oom=options.allow_oom,
    )
    asked: list[int] = []
    with caught(steps, eager, asked.append, steps.memory_stats), clock.shown():
        status = _script(options)
    with _while_read():
        sys.stdout.flush()
    if status:
        _say_devices(options.devices, asked)
    if not steps.functions:
        if not status:
            print(no_steps(options.script, eager), file=sys.stderr)
        return status
    files.print_all_names()
    with _while_read():
        print(flush=True)
        show(report(on, options.devices, steps, eager, time.perf_counter() - began_s))
    if options.trace is not None and (longest := steps.longest()) is not None:
        try:
            longest.to_perfetto(options.trace)
        except OSError as error:
            print(f"cm384: --trace: {error}", file=sys.stderr)
            return status or 2
        line = f"trace of {longest.name} written to {options.trace}"
        with _while_read():
            print(f"{line}; open it at https://ui.perfetto.dev", flush=True)
    return status


@contextmanager
def _while_read() -> Iterator[None]:
    """What prints inside ends where the reader of standard output does, as `head` does."""
    try:
        yield
    except (BrokenPipeError, SystemExit):  # the latter is rich's way to end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say_devices(devices: int, asked: list[int]) -> None:
    """Scripts that fail have often been written for another number of devices."""
    flags = re.findall(rf"{_FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    for wanted in (*asked[-1:], *map(int, flags[-1:])):
        if wanted != devices:
            print(
                f"cm384: the script asks for {wanted} devices and was given {devices}; "
                f"cm384 exec --devices {wanted} gives it as many",
                file=sys.stderr,
            )
            return


def _script(options: Options) -> int:
    """The exit status of the script, whatever ends it."""
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = str(Path(options.script).resolve().parent)
    try:
        runpy.run_path(os.path.abspath(options.script), run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.stdout.flush()
        summary = traceback.TracebackException.from_exception(error)
        if not sys.flags.dev_mode:
            _without_ours(summary)
        print("".join(summary.format()), end="", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _without_ours(summary: Any) -> None:
    """Leaves the script's frames, and those of the libraries that it calls."""
    kept = [
        frame
        for frame in summary.stack
        if not frame.filename.startswith(_OURS) and "runpy" not in frame.filename
    ]
    summary.stack = traceback.StackSummary.from_list(kept)
    for other in (summary.__cause__, summary.__context__):
        if other is not None:
            _without_ours(other)
