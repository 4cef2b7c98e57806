"""The meshes that a program names come in one order, whatever Python's hashes are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
from emulator.program.costs import meshes

a, b = (NamedSharding(AbstractMesh((2,), (axis,)), P()) for axis in "ab")
jaxpr = jax.make_jaxpr(jax.jit(lambda x: x + 1, in_shardings=a, out_shardings=b))(jnp.ones(2))
print(*(mesh.axis_names[0] for mesh in meshes(jaxpr)))
"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_meshes_come_as_arguments_then_results(seed: str) -> None:
    env = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["a", "b"], done.stderr
