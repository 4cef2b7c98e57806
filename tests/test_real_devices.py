"""The virtual devices divided over several real ones: the same bits as on one, in processes of
their own, because JAX fixes the number of devices when it starts.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.program.folded import FoldedMesh
from emulator.program.real_devices import parts_of
from tests import real_device_programs as programs

HERE = Path(__file__).parent


def start(names: str, count: int, *cluster: Any) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(HERE.parent)
    command = [sys.executable, "-W", "ignore", "real_device_programs.py", names, str(count)]
    return subprocess.Popen(
        [*command, *map(str, cluster)],
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def digests(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err[-3000:]
    return dict(json.loads(line) for line in out.splitlines() if line.startswith('["'))


@functools.cache
def on_one(name: str) -> Any:
    """What JAX's default device computes, the mesh undivided."""
    return json.loads(json.dumps(programs.PROGRAMS[name](None)))


@pytest.mark.parametrize(
    ("count", "names"),
    [
        pytest.param(1, "movement,control,pod", marks=pytest.mark.slow),
        (2, "pod"),
        pytest.param(3, "movement,control,pod,divided", marks=pytest.mark.slow),
        (5, "control"),  # does not divide the mesh: all repeat the same work
        (8, "step,gradient,movement,control,pod,divided"),
        (384, "pod"),
    ],
)
def test_bits_do_not_depend_on_the_number_of_real_devices(count: int, names: str) -> None:
    found = digests(start(names, count))
    assert found == {name: on_one(name) for name in names.split(",")}


def test_bits_do_not_depend_on_the_number_of_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    names = "step,gradient,movement,control"
    both = [start(names, 2, coordinator, 2, process) for process in range(2)]
    for process in both:
        assert digests(process) == {name: on_one(name) for name in names.split(",")}


def test_the_command_divides_its_program() -> None:
    command = "from emulator.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", command, *"run matmul --size 384 --real-devices 3".split()],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("0 of 147,456 values differ") == 2
    assert "repeat their work" not in ran.stderr


@pytest.mark.parametrize(
    ("sizes", "count", "parts"),
    [
        ((48, 8), 8, (8, 1)),
        ((48, 8), 384, (48, 8)),
        ((48, 8), 96, (48, 2)),
        ((8, 48), 16, (8, 2)),
        ((48, 8), 5, (1, 1)),
        ((48, 8), 10, (2, 1)),
        ((3, 5), 15, (3, 5)),
        ((384,), 7, (1,)),
    ],
)
def test_a_mesh_is_cut_into_as_many_parts_as_divide_it(
    sizes: tuple[int, ...], count: int, parts: tuple[int, ...]
) -> None:
    assert parts_of(sizes, count) == parts
    mesh = FoldedMesh(names=("a", "b")[: len(sizes)], sizes=sizes).cut(parts)
    assert mesh.shape(mesh.names) == tuple(n // p for n, p in zip(sizes, parts, strict=True))
    assert mesh.whole(mesh.names).shape(mesh.names) == sizes


def test_devices_are_checked() -> None:
    machine = em.cloudmatrix384()
    device = jax.devices()[0]
    with pytest.raises(TypeError, match="devices must be a list"):
        em.emulate(lambda: 0, on=machine, devices="cpu")
    with pytest.raises(TypeError, match="devices must be a list"):
        em.emulate(lambda: 0, on=machine, devices=[0])
    with pytest.raises(ValueError, match="different and at least one"):
        em.emulate(lambda: 0, on=machine, devices=[device, device])
    with pytest.raises(ValueError, match="different and at least one"):
        em.emulate(lambda: 0, on=machine, devices=[])


def test_what_cannot_be_in_order_is_refused_by_name() -> None:
    from jax.experimental import io_callback

    machine = em.cloudmatrix384()

    def local(x: Any) -> Any:
        return io_callback(lambda v: np.asarray(v), jax.ShapeDtypeStruct((1,), jnp.float32), x)

    program = jax.shard_map(
        local, mesh=machine.mesh(a=384), in_specs=P("a"), out_specs=P("a"), check_vma=False
    )
    with pytest.raises(NotImplementedError, match="io_callback.*several real devices"):
        em.emulate(program, on=machine, devices=jax.devices()[:1])(jnp.zeros(384))
