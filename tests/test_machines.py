"""Machines: the published headline figures follow from the records, and meshes say what is wrong
with them.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from emulator.machines import Machine, Tier, build, cite, cloudmatrix384, gb200_nvl72
from emulator.machines.chips import chip, chip_names
from emulator.machines.fact import EVIDENCE
from emulator.mesh import PodMesh, device_numbers

MACHINES = [cloudmatrix384(), cloudmatrix384(device="die"), gb200_nvl72(), cloudmatrix384(pods=2)]


def test_headline_figures() -> None:
    cloud, rack = cloudmatrix384(), gb200_nvl72()
    assert cloud.num_devices / rack.num_devices == pytest.approx(5.33, abs=0.01)
    assert cloud.headline_bf16_flops_per_s == 300e15
    assert cloud.quoted_bf16_flops_per_s() == pytest.approx(384 * 752e12)
    assert cloud.matmul_flops_per_s("bfloat16") == pytest.approx(272e15, rel=1e-3)
    assert rack.quoted_bf16_flops_per_s() == rack.matmul_flops_per_s() == pytest.approx(180e15)
    assert rack.matmul_flops_per_s("float8") == pytest.approx(360e15)
    assert rack.matmul_flops_per_s("float4") == pytest.approx(720e15)

    def watts_per_tflop(machine: Machine, system_w: float) -> float:
        low, high = machine.power.system_w
        assert low <= system_w <= high
        return system_w / (machine.headline_bf16_flops_per_s / 1e12)

    ratio = watts_per_tflop(cloud, 559e3) / watts_per_tflop(rack, 145e3)
    assert ratio == pytest.approx(2.3, abs=0.05)


def test_die_and_package_are_one_machine() -> None:
    package, die = cloudmatrix384(), cloudmatrix384(device="die")
    assert package.num_dies == die.num_dies == 768
    assert package.matmul_flops_per_s() == die.matmul_flops_per_s()
    assert package.memory_bytes_per_device == 2 * die.memory_bytes_per_device == 128 * 2**30
    assert [package.node_of(d) for d in (0, 7, 8, 383)] == [0, 0, 1, 47]
    assert [die.node_of(2 * d) for d in (0, 7, 8, 383)] == [0, 0, 1, 47]


def test_cube_peaks_follow_from_the_step_shape() -> None:
    chip = cloudmatrix384().chip
    cycle = 2 * chip.cube_m * chip.cube_n * chip.cube_cores * chip.clock_hz
    assert chip.matmul_flops_per_s("bfloat16") == pytest.approx(cycle * chip.cube_k)
    assert chip.matmul_flops_per_s("bfloat16") == pytest.approx(353.9e12, rel=1e-3)
    assert chip.matmul_flops_per_s("int8") == pytest.approx(707.8e12, rel=1e-3)
    assert chip.matmul_flops_per_s("int4") == 2 * chip.matmul_flops_per_s("int8")
    assert chip.matmul_flops_per_s("float32") == pytest.approx(88.5e12, rel=1e-3)
    vector = chip.quoted_bf16_flops_per_s - chip.matmul_flops_per_s("bfloat16")
    assert vector == pytest.approx(chip.vector_flops_per_s("float16"), rel=2e-3)
    assert chip.matmul_flops_per_s(jnp.dtype("bfloat16")) == chip.matmul_flops_per_s("bfloat16")
    with pytest.raises(NotImplementedError, match="no matmul rate for dtype float8_e4m3fn"):
        chip.matmul_flops_per_s("float8_e4m3fn")


def test_die_lanes_and_node_uplinks_agree() -> None:
    """Seven lanes make a die's port, and sixteen dies fill a node's uplinks: non-blocking."""
    fabric = cloudmatrix384().fabric
    assert fabric.planes * fabric.lane_bytes_per_s == fabric.tier("pod").bytes_per_s == 196e9
    assert fabric.node_uplink_bytes_per_s == 16 * fabric.tier("pod").bytes_per_s


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m.name} {m.device_kind}")
def test_every_number_has_a_source(machine: Machine) -> None:
    facts = list(machine.facts())
    assert len(facts) > 40
    for fact in facts:
        assert fact.source != "no source given", fact.name
        assert fact.evidence in EVIDENCE
        last = fact.name.rsplit(".", 1)[-1]
        if last.endswith("bytes_per_s"):
            assert fact.unit == "B/s", fact.name
    assert len({fact.name for fact in facts}) == len(facts)


def test_a_changed_number_loses_its_source() -> None:
    machine = cloudmatrix384()
    faster = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, clock_hz=1.85e9))
    by_name = {fact.name: fact for fact in faster.facts()}
    assert by_name["chip.clock_hz"].evidence == "assumed"
    assert by_name["chip.clock_hz"].source == "changed by the user"
    assert by_name["chip.cube_cores"].evidence == "documented"
    assert faster != machine


@pytest.mark.parametrize("name", chip_names())
def test_caches_are_two_to_four_times_as_fast_as_memory(name: str) -> None:
    """The vendor's documents say three to four for Ascend."""
    die = chip(name)
    assert 2 <= die.l2_bytes_per_s / die.memory_bytes_per_s <= 4


def test_records_are_checked() -> None:
    chip = cloudmatrix384().chip
    with pytest.raises(ValueError, match=r"Chip.memory_efficiency must be at most 1; got 1.5"):
        dataclasses.replace(chip, memory_efficiency=1.5)
    with pytest.raises(ValueError, match=r"Chip.cube_cores must be a number above 0; got 0"):
        dataclasses.replace(chip, cube_cores=0)
    fabric = cloudmatrix384().fabric
    tier = fabric.tier("node")
    with pytest.raises(ValueError, match="above the link's"):
        dataclasses.replace(tier, read_bytes_per_s=200e9)
    large = dataclasses.replace(
        fabric.transport("aiv_large"), rates_bytes_per_s=(("package", 1e9), ("node", 300e9))
    )
    with pytest.raises(ValueError, match="'aiv_large' claims 3e\\+11 B/s on tier 'node'"):
        dataclasses.replace(fabric, transports=(large, fabric.transport("sdma")))
    with pytest.raises(ValueError, match="reaches the whole pod"):
        dataclasses.replace(fabric, transports=(fabric.transport("aiv_large"),))
    with pytest.raises(ValueError, match="evidence must be one of"):
        cite("rumour", "somebody", clock_hz=1.0)
    with pytest.raises(ValueError, match="cited twice"):
        build(Tier, cite("assumed", "a", bytes_per_s=1.0), cite("assumed", "b", bytes_per_s=2.0))


def test_machines_are_cached_and_hashable() -> None:
    assert cloudmatrix384() is cloudmatrix384()
    assert len({*MACHINES, *MACHINES}) == len(MACHINES)
    with pytest.raises(ValueError, match="got 'core'"):
        cloudmatrix384(device="core")
    with pytest.raises(ValueError, match=r"device must be .*; got \[\]"):
        cloudmatrix384([])  # type: ignore[arg-type]
    for pods in ([], 433, True, 1.0):  # though True == 1.0 == 1, for which an answer is kept
        with pytest.raises(ValueError, match=f"pods must be .*; got {re.escape(str(pods))}"):
            cloudmatrix384(pods=pods)  # type: ignore[arg-type]


def test_mesh() -> None:
    machine = cloudmatrix384()
    mesh = machine.mesh(dp=48, tp=8)
    assert isinstance(mesh, AbstractMesh)
    assert mesh.axis_names == ("dp", "tp") and mesh.size == 384
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert device_numbers(mesh) == tuple(range(384))
    assert machine.mesh(dp=48, tp=8) == mesh
    explicit = machine.mesh(x=4, axis_types=AxisType.Explicit)
    assert explicit.axis_types == (AxisType.Explicit,)


@pytest.mark.parametrize(
    ("sizes", "extra", "message"),
    [
        ({"dp": 48, "tp": 16}, {}, "has 768 devices, but CloudMatrix 384 has 384"),
        ({"dp": 0}, {}, "mesh axis 'dp' must have a size of at least 1; got 0"),
        ({"dp": -2}, {}, "mesh axis 'dp' must have a size of at least 1; got -2"),
        ({}, {}, "mesh has no axes"),
        ({"x": 2}, {"devices": [1, 1]}, r"devices \[1\] are listed more than once"),
        ({"x": 2}, {"devices": [1, 384]}, r"devices \[384\] are outside CloudMatrix 384"),
        ({"x": 2}, {"devices": [1, -1]}, r"devices \[-1\] are outside CloudMatrix 384"),
        ({"x": 2}, {"devices": [1, 2, 3]}, r"mesh x=2 needs 2 devices; devices= lists 3"),
        ({"x": 2}, {"devices": []}, "devices is empty"),
        ({"x": 2}, {"axis_types": "Auto"}, "axis_types must be one jax.sharding.AxisType"),
        ({"x": 2}, {"axis_types": (AxisType.Auto,) * 2}, "for each of the 1 axes"),
        ({"x": 2}, {"axis_types": 3}, "axis_types must be one jax.sharding.AxisType.*got 3"),
    ],
)
def test_mesh_errors(sizes: dict, extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cloudmatrix384().mesh(**sizes, **extra)


def test_mesh_type_errors() -> None:
    with pytest.raises(TypeError, match="mesh axis 'dp' must have an integer size; got 2.5"):
        cloudmatrix384().mesh(dp=2.5)
    with pytest.raises(TypeError, match="devices must be integers"):
        cloudmatrix384().mesh(x=2, devices=[0.5, 1])


def test_mesh_over_chosen_devices_reaches_the_traced_program() -> None:
    machine = cloudmatrix384()
    mesh = machine.mesh(a=2, b=2, devices=[3, 5, 1, 0])
    assert isinstance(mesh, PodMesh)
    assert mesh is machine.mesh(a=2, b=2, devices=(3, 5, 1, 0))
    assert mesh != machine.mesh(a=2, b=2) and mesh != machine.mesh(a=2, b=2, devices=[0, 1, 3, 5])
    assert machine.mesh(a=2, b=2, devices=range(4)) == machine.mesh(a=2, b=2)

    def loss(x: jax.Array) -> jax.Array:
        body = jax.shard_map(
            lambda y: jax.lax.psum(jnp.sin(y), ("a", "b")),
            mesh=mesh,
            in_specs=P(("a", "b")),
            out_specs=P(),
        )
        return body(x).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jax.ShapeDtypeStruct((4, 3), jnp.float32))
    meshes = [e.params["mesh"] for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    assert len(meshes) >= 2
    assert all(device_numbers(m) == (3, 5, 1, 0) for m in meshes)


def test_machines_and_times_need_no_jax() -> None:
    code = (
        "import sys; from emulator.machines import cloudmatrix384; from emulator.fabric import "
        "collective;"
        "collective('all_reduce', 2**20, cloudmatrix384()); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
