"""What all tests share. JAX's platform and settings are left as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

import emulator as em
from emulator.machines import Machine

# Compilation makes the first example of a test slow, which says nothing about the code. CI, which
# decides what lands, draws the same examples every time; everywhere else they are new ones.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def cloud() -> Machine:
    """CloudMatrix 384, one device per package."""
    return em.cloudmatrix384()


@pytest.fixture(scope="session")
def rack() -> Machine:
    """GB200 NVL72."""
    return em.gb200_nvl72()


class Answer(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cm384(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs the command in this process, on a terminal of 160 columns."""
    from emulator.cli import main

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.path", [*sys.path])  # to which programs add their folders
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # nothing is kept from test to test

    def run(*words: str | Path) -> Answer:
        monkeypatch.setattr("sys.argv", ["cm384", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        code = end.value.code
        return Answer(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
