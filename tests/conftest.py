"""What all tests share. JAX's platform and settings are left as they are."""

from __future__ import annotations

import os

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
