"""Files of arithmetics: written whole, and read with care."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kernels
from kernels import arithmetic_file


def test_a_file_of_an_arithmetic_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "unit.json"
    arithmetic_file.save(kernels.NVIDIA_HOPPER, path)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda self, path: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            arithmetic_file.save(kernels.ASCEND_910C, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert arithmetic_file.load(path) == kernels.NVIDIA_HOPPER


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_what_is_no_file_is_written_to(tmp_path):
    """Not replaced, as /dev/stdout would be."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit(pipe.read_text)
        arithmetic_file.save(kernels.NVIDIA_HOPPER, pipe)
        assert '"NVIDIA_HOPPER"' in text.result(timeout=10)
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "in JSON"),
        ('{"format": "cm384 arithmetic 1", "name": "x", "products": 4, "nan": "-0x1"}', "nan must"),
        (
            '{"format": "cm384 arithmetic 1", "name": "x", "products": 4, "nan": "0x17fc00000"}',
            "nan must",
        ),
    ],
    ids=["deep", "negative", "33 bits"],
)
def test_files_of_no_arithmetic(text, message, tmp_path):
    path = tmp_path / "unit.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        arithmetic_file.load(path)
    assert str(error.value).startswith(str(path))
