"""The `cm384` command.

A file for each command: `collectives`, `compare`, `exec`, `info`, `matmul`, `probe`, `run`,
`validate`. They read words with `choose`, write with `show`, keep compiled programs (`kept`) and
take real devices (`real_devices`).
"""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

import typer

from emulator import files
from emulator.cli import collectives, compare, exec, info, matmul, probe, run, validate

app = typer.Typer(
    name="cm384",
    help="A virtual CloudMatrix 384: what a sharded JAX program computes there, and when.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("info")(info.info)
app.command("run")(run.run)
app.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)(exec.exec_)
app.command("compare")(compare.compare)
app.command("collectives")(collectives.collectives)
app.command("matmul")(matmul.matmul)
app.command("probe")(probe.probe)
app.command("validate")(validate.validate)


def _origin(error: Exception) -> str:
    """The line of a program of the user's own that an error came from, if any."""
    beside = Path(__file__).parents[2]
    known = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    known += [str(beside / package) for package in ("emulator", "kernels")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in known):
            return f"\n  in {frame.filename}, line {frame.lineno}, {frame.name}"
    return ""


def main() -> None:
    """Runs the command; a mistake in what was asked for becomes one message and exit status 2."""
    files.print_all_names()
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError, NameError, SyntaxError) as error:
        # The rooms raise these for what a caller can put right, JAX a NameError for an axis that
        # the mesh does not have, Python a SyntaxError for a program of the user's own. Anything
        # else is our own bug and keeps its traceback, as does everything under `python -X dev`.
        unexpected = isinstance(error, NameError) and "axis name" not in str(error)
        if sys.flags.dev_mode or unexpected:
            raise
        print(f"cm384: {error}{_origin(error)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if sys.flags.dev_mode or not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        print(f"cm384: {error}", file=sys.stderr)
        sys.exit(2)
