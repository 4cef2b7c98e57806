"""What all tests share. JAX's platform and settings are left as they are."""

from __future__ import annotations

import pytest
from hypothesis import settings

import emulator as em
from emulator.machines import Machine

# Compilation makes the first example of a test slow, which says nothing about the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session")
def cloud() -> Machine:
    """CloudMatrix 384, one device per package."""
    return em.cloudmatrix384()


@pytest.fixture(scope="session")
def rack() -> Machine:
    """GB200 NVL72."""
    return em.gb200_nvl72()
