"""The `cm384` command: what it prints, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kernels
from emulator import units
from emulator.cli import choose, show
from emulator.machines import Machine
from tests.conftest import Answer

Command = Callable[..., Answer]
ROOT = Path(__file__).resolve().parents[1]


def test_info_shows_both_machines_with_source_and_evidence(cm384: Command) -> None:
    answer = cm384("info", "--notes")
    assert answer.code == 0
    for words in (
        "CloudMatrix 384", "GB200 NVL72", "arXiv 2506.12708", "documented", "measured", "inferred",
        "assumed", "196 GB/s", "300 PFLOPS", "180 PFLOPS", "272 PFLOPS", "= 5.3 times", "TFLOPS/W",
    ):  # fmt: skip
        assert words in answer.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "llama"], "unknown program 'llama'; known: transformer, matmul"),
        (["run", "matmul", "--arithmetic", ""], "unknown arithmetic ''"),
        (["run", "nowhere.py:step"], "no such file: nowhere.py"),
        (["run", "program.py:steq"], "program.py has no function 'steq'"),
        (["run", "program.py:shaped"], "arguments contain 1 shapes without values"),
        (["run", "program.py:indivisible"], "evenly divisible"),
        (["run", "program.py:unknown_axis"], "tq"),
        (["run", "program.py:too_large"], "has 512 devices"),
        (["run", "transformer", "--size", "huge"], "unknown size 'huge'; known: tiny"),
        (["run", "transformer", "--size", ""], "unknown size ''; known: tiny"),
        (["compare", "transformer", "--size", ""], "unknown size ''; known: tiny"),
        (["compare", "matmul", "--arithmetic", "own,own"], "with commas: own,NVIDIA_HOPPER"),
        (["run", "matmul", "--algorithms", ""], "with commas: all_reduce=ring,all_gather=nhr"),
        (["run", "transformer", "--size", "70b"], "add --estimate"),
        (["run", "transformer", "--dp", "96"], "96 x tp=8 has 768 devices"),
        (["run", "transformer", "--tp", "3"], "tp=3 does not divide heads=8"),
        (["run", "transformer", "--tp", "400"], "--tp 400"),
        (["run", "transformer", "--process", "0"], "--coordinator, --processes: several"),
        (
            "run transformer --coordinator 127.0.0.1:1 --processes 2 --process 2".split(),
            "--process 2: expected 0 to 1",
        ),
        (["run", "transformer", "--trace", "no/such/folder/t.json"], "there is no folder"),
        (["run", "matmul", "--size", "100"], "positive multiple of 48, such as 96"),
        (["run", "matmul", "--size", "big"], "number of rows"),
        (["run", "matmul", "--fusion", "half"], "--fusion half: expected one of chains, eager"),
        (["run", "matmul", "--algorithms", "ring"], "'ring' is not operation=algorithm"),
        (["run", "matmul", "--algorithms", "all_reduse=ring"], "unknown operation 'all_reduse'"),
        (["run", "matmul", "--machine", "tpu"], "unknown machine 'tpu'; known: cloudmatrix384"),
        (["collectives", "all_reduce", "--machine", "ring(4, 1GX/s)"], "unknown unit 'GX/s'"),
        (["collectives", "all_reduse"], "all_reduce"),
        (["collectives", "all_reduce", "--devices", "500"], "1 to 384 devices"),
        (["collectives", "all_reduce", "--devices", "0"], "one by its number is written as in 0-0"),
        (["collectives", "all_reduce", "--devices", "3,3"], "more than once"),
        (["collectives", "all_reduce", "--devices", "a"], "write a count, or numbers and ranges"),
        (["collectives", "all_reduce", "--min", "1X"], "not a size in bytes: '1X'"),
        (["collectives", "all_reduce", "--min", "2K", "--max", "1K"], "at most --max 1K"),
        (["matmul", "0", "16", "16"], "m"),
        (["matmul", "16", "16", "16", "--dtype", "bf15"], "bf15"),
        (["matmul", "8", "8", "8", "--chip", "910B3", "--machine", "gb200_nvl72"], "give one of"),
        (["matmul", "8", "8", "8", "--csv", "folder"], "--csv folder: expected the name of a file"),
        (["matmul", "--sweep", "--plot", "folder"], "--plot folder: expected the name of a file"),
        (["collectives", "all_reduce", "--csv", "folder"], "--csv folder: expected the name of a"),
        (["collectives", "all_reduce", "--csv", "no/t.csv"], "--csv no/t.csv: there is no folder"),
        (["collectives", "all_reduce", "--machine", "ring(1e999, 1GB/s)"], "whole number; got"),
        (["compare", "matmul", "--estimate", "--json", "folder"], "--json folder: expected the"),
        (["run", "matmul", "--estimate", "--trace", "folder"], "--trace folder: expected the name"),
        (["run", "matmul", "--estimate", "--trace", ""], "expected the name of a file"),
        (
            ["exec", "--trace", "folder", "program.py"],
            "--trace folder: expected the name of a file",
        ),
        (["probe", "--out", "folder"], "--out folder: expected the name of a file"),
        (["run", "matmul", "--estimate", "--arithmetic", "native"], "leave one of the two out"),
        (["run", "transformer", "--estimate", "--steps", "3"], "--steps 3 --estimate: an estimate"),
        (["run", "matmul", "--estimate", "--real-devices", "2"], "--real-devices 2 --estimate"),
        (["collectives", "all_reduce", "--csv", "/proc/a.csv"], "/proc/a.csv"),
        (
            ["collectives", "all_reduce", "--csv", "a", "--plot", "./a"],
            "--plot a, --csv a: one file for two; name another",
        ),
        (["matmul", "--sweep", "--csv", "a", "--plot", "a"], "one file for two"),
        (["compare", "matmul", "--estimate", "--csv", "a", "--json", "a"], "one file for two"),
        (["run", "matmul", "--estimate", "--trace", "a", "--chakra", "a"], "one file for two"),
        (
            ["run", "matmul", "--tp", "2", "--steps", "3"],
            "--steps, --tp: of the program transformer",
        ),
        (["run", "program.py:mean", "--size", "tiny"], "--size tiny: of the programs transformer"),
        (["compare", "matmul", "--dp", "2"], "--dp: of the program transformer; leave it out"),
        (["run", "matmul", "--real-devices", "385"], "has 384 devices to divide over them"),
    ],
)
def test_refusals_are_one_message(
    words: list[str],
    message: str,
    cm384: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    answer = cm384(*words)
    assert answer.code == 2 and not answer.out.strip().startswith("time")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"program.py", "folder"}
    assert message in answer.err
    assert answer.err.startswith("cm384: ") and "Traceback" not in answer.err


PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P

def mean(x, mesh):
    def local(x):
        return jax.lax.pmean(x.sum(), "d")
    return jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P())(x)

def mean_mesh(machine): return machine.mesh(d=8)
def mean_args(machine): return (jnp.arange(16, dtype=jnp.float32),)

def shaped(x): return 2 * x
def shaped_args(machine): return (jax.ShapeDtypeStruct((64, 64), jnp.float32),)

indivisible, indivisible_mesh = mean, mean_mesh
def indivisible_args(machine): return (jnp.arange(15, dtype=jnp.float32),)

def unknown_axis(mesh):
    def local(): return jax.lax.psum(1.0, "tq")
    return jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P())()
unknown_axis_mesh = mean_mesh

too_large = mean
def too_large_mesh(machine): return machine.mesh(d=512)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_own_program(cm384: Command, program: Path) -> None:
    answer = cm384("run", f"{program}:mean")
    assert answer.code == 0, answer.err
    assert "float32" in answer.out and " 15 " in answer.out  # 120 / 8
    assert "all_reduce" in answer.out and "assum" in answer.out.lower()


def test_folders_that_cannot_be_written_are_said_at_once(
    cm384: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    for option in ("--trace", "--chakra"):
        answer = cm384("run", "matmul", "--estimate", option, tmp_path / "new")
        assert answer.code == 2 and not answer.out and "may not be written to" in answer.err


def test_an_error_of_the_users_own_says_where(cm384: Command, program: Path) -> None:
    program.write_text("import jax\n\ndef wrong():\n    return jax.numpy.ones(2) + 'a'\n")
    answer = cm384("run", f"{program}:wrong")
    assert answer.code == 2 and answer.err.startswith("cm384: ")
    assert answer.err.endswith(f"\n  in {program}, line 4, wrong\n")
    assert "\n  in " not in cm384("run", "llama").err


def test_values_of_every_type_are_shown(cm384: Command, tmp_path: Path) -> None:
    path = tmp_path / "every_type.py"
    path.write_text(
        "import jax, jax.numpy as jnp\n"
        "key = jax.random.key(7)\n"
        "def several(): return jnp.ones(2) * 2j, key, jnp.zeros((0, 3)), jnp.int8(5)\n"
    )
    answer = cm384("run", f"{path}:several")
    assert answer.code == 0, answer.err
    for words in ("mean 0+2j", "[0, 7]", "empty", "int8"):
        assert words in answer.out, words


def test_names_are_whole_on_a_narrow_terminal(
    cm384: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show.out, "_width", 60)
    answer = cm384("info")
    assert "…" not in answer.out
    assert "cycle" in answer.out


@pytest.mark.parametrize("columns", [80, 40])
def test_numbers_are_whole_on_a_narrow_terminal(
    cm384: Command, program: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    long = program.rename(program.with_name("a_program_whose_name_has_as_many_letters_as_some.py"))
    monkeypatch.setattr(show.out, "_width", columns)
    answer = cm384("run", f"{long}:mean", "--estimate")
    assert answer.code == 0, answer.err
    longest = answer.out.split("Longest operations")[1].split("Collectives")[0]
    row = next(line for line in longest.splitlines() if "psum" in line)
    assert re.search(r" 1 +[\d.]+ us +[\d.]+ [mun]?s +links ", row), longest
    assert re.search(r"\.py:\d", re.sub(r"\s", "", longest)), longest


def test_own_program_with_an_algorithm(cm384: Command, program: Path) -> None:
    for name in ("nhr", "pipeline"):
        answer = cm384("run", f"{program}:mean", "--algorithms", f"all_reduce={name}")
        assert answer.code == 0, answer.err
        assert re.search(rf"psum .*\b{name}\b", answer.out)


def test_own_program_from_shapes_with_trace(cm384: Command, program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "shaped.json"
    answer = cm384("run", f"{program}:shaped", "--estimate", "--trace", str(trace))
    assert answer.code == 0, answer.err
    assert json.loads(trace.read_text())["traceEvents"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".part") == []


def test_the_readmes_program(cm384: Command, tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.split("### A program of your own")[1]
    (tmp_path / "model.py").write_text(section.split("```python\n")[1].split("```")[0])
    answer = cm384("run", f"{tmp_path}/model.py:step")
    assert answer.code == 0, answer.err
    assert "bfloat16" in answer.out and "(96, 32)" in answer.out


def test_transformer_and_its_trace(cm384: Command, tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    answer = cm384(
        "run", "transformer", "--steps", "2", "--dp", "2", "--tp", "2", "--trace", str(trace)
    )
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("step"))
    (_, first, native, *_), (_, second, *_) = (line.split() for line in lines[heading + 1 :][:2])
    assert 4 < float(first) < 6 and float(second) < float(first)
    assert float(first) == pytest.approx(float(native), rel=1e-3)
    assert json.loads(trace.read_text())["traceEvents"]


def test_70b_is_answered_from_shapes_in_seconds(cm384: Command) -> None:
    began = time.perf_counter()
    answer = cm384("run", "transformer", "--size", "70b", "--estimate")
    assert answer.code == 0, answer.err
    assert "70,5" in answer.out and "reduce_scatter" in answer.out
    assert time.perf_counter() - began < 60  # not a measurement: it must not compute values


def test_matmul_program_on_the_other_machine(cm384: Command) -> None:
    answer = cm384("run", "matmul", "--size", "72", "--machine", "gb200_nvl72")
    assert answer.code == 0, answer.err
    assert answer.out.count("0 of 5,184 values differ") == 2


def test_matmul_time(cm384: Command) -> None:
    answer = cm384("matmul", "4096", "4096", "4096")
    assert answer.code == 0, answer.err
    assert "limited by" in answer.out and "FLOP/s" in answer.out


def test_device_lists(cloud: Machine) -> None:
    assert choose.devices(None, cloud) == tuple(range(384))
    assert choose.devices("3", cloud) == (0, 1, 2)
    assert choose.devices("0,8,16-18", cloud) == (0, 8, 16, 17, 18)
    assert choose.devices("0:384:128,7:9", cloud) == (0, 128, 256, 7, 8)


def test_sizes_and_units() -> None:
    assert [choose.byte_count(t) for t in ("7", "1K", "2MiB", "1g")] == [7, 1024, 2**21, 2**30]
    assert units.quantity(1.96e11, "B/s") == "196 GB/s"
    assert units.capacity(3 * 2**20) == "3.00 MiB"
    assert units.seconds(4.2e-6) == "4.20 us"
    assert units.seconds(2.4e-13) == "0.00024 ns"
    assert units.fact((1.5e-6, 2e-3), "s") == "1.5 us to 2 ms"
    assert units.fact((("a", 8.0e-12), ("b", 353.9e12)), "J/B") == "a 8 pJ/B\nb 353.9 TJ/B"


def test_what_is_compiled_is_kept(tmp_path: Path) -> None:
    """In a process of its own, because JAX keeps the folder that it used first."""
    code = "from emulator.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "matmul", "--size", "96"]
    unset = ("JAX_COMPILATION_CACHE_DIR",)
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # by default a second: a matter of luck
    kept, tables = [], []
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout[done.stdout.index("local on") :])
        kept.append({path.name for path in (tmp_path / "cm384").iterdir() if "-cache" in path.name})
    assert kept[0] and kept[0] == kept[1]  # the second run found all it needed
    assert tables[0] == tables[1]

    none = {**env, "JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "none")}
    done = subprocess.run(command, env=none, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not (tmp_path / "none").exists()


def test_names_that_standard_output_cannot_show_are_escaped(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("def größe():\n    import jax\n    return jax.numpy.ones(4) + 1\n")
    words = ["cm384", "run", f"{program}:größe", "--estimate"]
    code = f"import sys; sys.argv = {words!r}; from emulator.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "gr\\xf6\\xdfe on CloudMatrix 384" in done.stdout, done.stderr


def test_a_program_that_python_cannot_read_is_one_message(cm384: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:")
    answer = cm384("run", f"{tmp_path / 'broken.py'}:f")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "cm384: invalid syntax (broken.py, line 1)\n"


def test_help_of_the_command_cuts_no_line_short(cm384: Command, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = cm384("--help")
    commands = answer.out.partition("Commands:")[2]
    assert "validate" in commands and "..." not in commands


NAMES = """
import jax.numpy as jnp

def step(x):
    return {"a_parameter_whose_name_is_longer_than_a_narrow_terminal": x @ x * 1e30, "n": x > 2}

def step_args(machine):
    return (jnp.ones((8, 8), jnp.bfloat16) / 3,)
"""


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_narrow_terminals_cut_no_number_short(
    columns: str, cm384: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    (tmp_path / "program.py").write_text(NAMES)
    program = f"{tmp_path / 'program.py'}:step"
    for words in (["info"], ["run", program], ["compare", program]):
        answer = cm384(*words)
        assert answer.code == 0, answer.err
        assert "\N{HORIZONTAL ELLIPSIS}" not in answer.out


def test_brackets_in_names_are_no_markup(
    cm384: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`[red]` would vanish, `[/b]` be an error after all the work."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs[red]", "runs[/b]"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs[/b]/program.py").write_text(NAMES)
    unit = "runs[/b]/unit.json"
    kernels.arithmetic_file.save(dataclasses.replace(kernels.NVIDIA_HOPPER, name="a[/b]"), unit)
    program, wide = "runs[/b]/program.py:step", str(tmp_path / "runs[/b]" / ("x" * 200))
    for words, told in (
        (["compare", program, "--estimate"], ""),
        (["run", program, "--estimate", "--trace", wide], f"trace written to {wide}; open"),
        (
            ["run", program, "--estimate", "--chakra", "runs[/b]/c"],
            "1 device written to runs[/b]/c/",
        ),
        (["run", "matmul", "--size", "48", "--arithmetic", unit], "values in a[/b] arithmetic"),
        (
            ["collectives", "reduce", "--max", "2K", "--csv", "runs[/b]/x"],
            "written to runs[/b]/x\n",
        ),
        (["collectives", "reduce", "--max", "2K", "--plot", "runs[/b]/y"], "drawn to runs[/b]/y\n"),
        (["matmul", "8", "8", "8", "--csv", "runs[red]/x"], "written to runs[red]/x\n"),
        (["matmul", "8", "8", "8", "--sweep", "--plot", "runs[/b]/z"], "drawn to runs[/b]/z\n"),
        (["probe", "--write", "runs[/b]/[q]"], "python [q]/run_probe.py\n"),
    ):
        answer = cm384(*words)
        assert answer.code == 0 and told in answer.out + answer.err, words
