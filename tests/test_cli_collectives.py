"""`cm384 collectives`: its table, its files, and how it refuses."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.cli.collectives import _LONG_SWEEP
from emulator.fabric import collective
from emulator.machines import Machine, cloudmatrix384
from tests.conftest import Answer

Command = Callable[..., Answer]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_table_has_the_columns_of_nccl_tests_and_the_bound(cm384: Command, cloud: Machine) -> None:
    answer = cm384("collectives", "all_reduce", "--min", "1M", "--max", "5M", "--devices", "16")
    assert answer.code == 0, answer.err
    heads = "size count type time algbw busbw algorithm bound".split()
    assert all(head in answer.out for head in [*heads, "of bound"])
    line = next(line for line in answer.out.splitlines() if line.split()[:1] == [str(4 * 2**20)])
    told = collective("all_reduce", 4 * 2**20, cloud, range(16))
    size, count, dtype, time_us, algbw, busbw, *rest = line.split()
    assert (count, dtype) == (str(2 * 2**20), "bfloat16")
    assert float(time_us) == pytest.approx(told.time_s * 1e6, abs=0.01)
    assert float(algbw) == pytest.approx(told.algbw / 1e9, abs=0.01)
    assert float(busbw) == pytest.approx(told.busbw / 1e9, abs=0.01)
    assert rest[:2] == ["nhr", "(sdma)"]
    assert float(rest[-1]) == pytest.approx(100 * told.bound_s / told.time_s, abs=0.06)
    assert "HCCL's rule" in answer.out


def test_several_algorithms_stand_side_by_side(cm384: Command, cloud: Machine) -> None:
    words = ("--algorithm", "ring, nhr,best", "--min", "1M", "--max", "1M", "--devices", "0-15")
    answer = cm384("collectives", "all_gather", *words)
    line = next(line for line in answer.out.splitlines() if line.split()[:1] == [str(2**20)])
    numbers = [float(word) for word in line.split()]
    for name, time_us in zip(("ring", "nhr", "best"), numbers[2::3], strict=True):
        told = collective("all_gather", 2**20, cloud, range(16), name)
        assert time_us == pytest.approx(told.time_s * 1e6, abs=0.01)


def test_csv_on_the_terminal_is_nothing_but_csv(cm384: Command, cloud: Machine) -> None:
    words = ("--devices", "0:384:48", "--root", "48", "--min", "3K", "--max", "16K", "--csv", "-")
    lines = read(cm384("collectives", "broadcast", *words).out)
    assert [line["nbytes"] for line in lines] == ["3072", "12288"]
    told = collective("broadcast", 12288, cloud, range(0, 384, 48), root=48)
    assert float(lines[1]["time_s"]) == told.time_s and lines[1]["devices"] == "8"
    assert lines[1]["reason"] == told.reason


def test_files(cm384: Command, tmp_path: Path) -> None:
    table, picture = tmp_path / "table.csv", tmp_path / "sweep.png"
    files = ("--csv", table, "--plot", picture)
    answer = cm384("collectives", "permute", "--devices", "12", "--max", "16K", *files)
    assert answer.code == 0 and "busbw" in answer.out, answer.err
    assert [row["algorithm"] for row in read(table.read_text())] == ["direct"] * 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [picture, table]  # nothing half written beside them


def test_transport_dtype_machine_and_production(cm384: Command) -> None:
    die = cloudmatrix384("die")
    words = ("--machine", "cloudmatrix384-die", "--devices", "16", "--min", "2K", "--max", "2K")
    more = ("--transport", "roce", "--dtype", "float32", "--production", "--csv", "-")
    (line,) = read(cm384("collectives", "all_gather", *words, *more).out)
    told = collective(
        "all_gather", 2048, die, range(16), transport="roce", dtype="float32", launch="production"
    )
    assert float(line["time_s"]) == told.time_s
    assert (line["count"], line["transport"]) == ("512", "roce")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithm", "ring,ring"], "--algorithm 'ring,ring': write different names"),
        (["--algorithm", "rung"], "unknown algorithm 'rung' for all_reduce; known: ring"),
        (["--devices", "9-3"], "'9-3' is an empty range"),
        (["--devices", "0:8:0"], "'0:8:0' is an empty range"),
        (["--devices", "0:999"], "outside CloudMatrix 384"),
        (["--transport", "pigeon"], "has no transport 'pigeon'; known: aiv_small"),
        (["--csv", "no/such/folder/x.csv"], "there is no folder"),
        (["--plot", "no/such/folder/x.png"], "there is no folder"),
        (["--plot", "x.jpg"], "--plot x.jpg: expected a name that ends in .png"),
        (["--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["--root", "9", "--devices", "4"], None),
    ],
)
def test_refusals(cm384: Command, words: list[str], message: str | None) -> None:
    answer = cm384("collectives", "all_reduce", "--max", "1K", *words)
    if message is None:  # an all_reduce has no root, and none is needed
        assert answer.code == 0
        return
    assert answer.code == 2 and message in answer.err and answer.out == ""


def test_a_long_sweep_shows_no_bar_where_nobody_looks(cm384: Command) -> None:
    names = "ring,nhr,nb,rhd,full_mesh,pairwise,star"
    answer = cm384(
        "collectives", "all_reduce", "--devices", "4", "--algorithm", names, "--factor", "2"
    )
    assert 21 * 7 > _LONG_SWEEP
    assert answer.code == 0 and answer.err == ""


@pytest.mark.parametrize("devices", ["1", "8"])
def test_a_picture_of_one_size_or_of_no_time(cm384: Command, tmp_path: Path, devices: str) -> None:
    words = ("--devices", devices, "--min", "1K", "--max", "1K", "--plot", tmp_path / "x.png")
    answer = cm384("collectives", "all_reduce", *words)
    assert answer.code == 0 and "Warning" not in answer.err
