"""`cm384 matmul`: one product, sweeps, files and clear errors."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.chip import matmul_time
from emulator.machines import cloudmatrix384
from emulator.units import seconds
from tests.conftest import Answer

Command = Callable[..., Answer]

_ODD, _ROWS = (4096, 4096, 4097), ("padded", "packed")


def test_one_product_says_where_the_time_goes(cm384: Command) -> None:
    answer = cm384("matmul", "8192", "8192", "8192", "--machine", "cloudmatrix384-die")
    assert answer.code == 0, answer.err
    for words in (
        seconds(matmul_time(8192, 8192, 8192, cloudmatrix384("die")).time_s),
        "limited by",
        "2,048 of 128 x 256; 86 on the busiest of 24 cores",
        "3.19 ms",
        "of the quoted figure",
        "3.11 ms",
        "Clock 1.80 GHz (assumed to be kept)",
        "8 degrees of freedom",
    ):
        assert words in answer.out, words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dtype", "int8", "--groups", "9,0,7"), "in 3 groups, int8"),
        (("--batch", "3", "--layout", "nz"), "3 x (16 x 512) @ (512 x 512), bfloat16, a as nd, b"),
        (("--a-layout", "nd_t"), "a as nd_t, b as nd, cold cache"),
        (("--chip", "H100", "--l2", "warm"), "warm cache, on one die of NVIDIA H100 SXM"),
        (("--library", "--dtype", "float32"), "16 x 128"),
    ],
)
def test_options(cm384: Command, arguments: tuple[str, ...], words: str) -> None:
    answer = cm384("matmul", "16", "512", "512", *arguments)
    assert answer.code == 0, answer.err
    assert words in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layout", "nz"), "10.0 us of the time, read as they are"),
        (("--layout", "nd", "--a-layout", "nz"), None),
        (("--layout", "nz", "--rows", "padded"), None),
    ],
)
def test_what_unaligned_rows_cost_is_said(
    cm384: Command, arguments: tuple[str, ...], words: str | None
) -> None:
    """Rows of 3200 bytes are six lines and a quarter; those of b, of 10240, are whole ones."""
    one = ("matmul", "3072", "1600", "5120", "--machine", "cloudmatrix384-die")
    answer = cm384(*one, *arguments)
    assert answer.code == 0, answer.err
    assert ("unaligned rows" in answer.out) == (words is not None)
    assert (words or "except the last line of them") in answer.out


def test_a_copy_of_unaligned_rows_is_a_line_of_its_own(cm384: Command) -> None:
    answer = cm384("matmul", "4096", "4096", "4097", "--machine", "cloudmatrix384-die")
    assert answer.code == 0, answer.err
    padded, packed = (matmul_time(*_ODD, cloudmatrix384("die"), rows=rows) for rows in _ROWS)
    cost = seconds(packed.time_s - padded.time_s)
    for words in (
        f"copy to padded rows      {seconds(packed.pad_s)}",
        f"unaligned rows             {cost} of the time, b copied first",
        "except the last two lines of them",
    ):
        assert words in answer.out, words


def test_sweep_is_the_model_row_by_row(cm384: Command) -> None:
    answer = cm384("matmul", "100", "512", "768", "--sweep", "--csv", "-")
    assert answer.code == 0, answer.err
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert [int(row["m"]) for row in rows] == [1, 2, 4, 8, 16, 32, 64, 100]
    for row in rows:
        time = matmul_time(int(row["m"]), 512, 768, cloudmatrix384())
        assert float(row["time_s"]) == time.time_s
        assert float(row["cube_s"]) == time.cube_s and row["limited_by"] == time.limited_by


def test_sweep_draws_its_roofline(cm384: Command, tmp_path: Path) -> None:
    picture, table = tmp_path / "roof.png", tmp_path / "rows.csv"
    answer = cm384("matmul", "--sweep", "--plot", str(picture), "--csv", str(table))
    assert answer.code == 0, answer.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == 1 + 11 + 2 * 16
    assert "16,384" in answer.out and "memory 3.20 TB/s" in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("16",), "give M K N, or --sweep"),
        (("16", "16", "0"), "n=0"),
        (("16", "16", "16", "--plot", "x.png"), "add --sweep"),
        (("16", "--sweep"), "give M K N for 1 to M rows"),
        (("16", "16", "16", "--groups", "8,x"), "write rows with commas"),
        (("16", "16", "16", "--groups", "8,9"), "17 rows together"),
        (("16", "16", "16", "--sweep", "--groups", "16"), "leave out --sweep"),
        (("16", "16", "16", "--chip", "910Z"), "known: 910B1"),
        (("16", "16", "16", "--rows", "loose"), "expected 'packed' (one after the other"),
        (("16", "16", "16", "--dtype", "tf32"), "has bfloat16, float16, int8, int4, float32, hf32"),
        (("16", "16", "16", "--library", "--dtype", "int8"), "int8"),
        (("--sweep", "--plot", "/nowhere/x.png"), "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(cm384: Command, arguments: tuple[str, ...], words: str) -> None:
    answer = cm384("matmul", *arguments)
    assert answer.code == 2
    assert words in answer.err and len(answer.err.strip().splitlines()) == 1
