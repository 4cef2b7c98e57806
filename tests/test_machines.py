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


# What the publications say, in the units that they print, to set beside the records.
PUBLISHED_CLOUD = {
    "num_devices": 384,
    "dies_per_device": 2,
    "devices_per_node": 8,
    "packages": 384,
    "pods": 1,
    "headline_bf16_flops_per_s": 300e15,
    # platform_config of an Ascend910_93xx; a core's steps in multiply-adds a cycle.
    "chip.cube_cores": 24,
    "chip.vector_cores": 48,
    "chip.matmul_peaks_flops_per_s": {
        dtype: 2 * 24 * macs * 1.8e9
        for dtype, macs in {
            "bfloat16": 16 * 16 * 16,
            "float16": 16 * 16 * 16,
            "int8": 16 * 16 * 32,
            "int4": 16 * 16 * 64,
            "float32": 16 * 16 * 4,
            "hf32": 16 * 16 * 8,
        }.items()
    },
    "chip.quoted_bf16_flops_per_s": 752e12 / 2,
    "chip.memory_bytes": 64 * 2**30,
    "chip.memory_bytes_per_s": 3.2e12 / 2,
    "chip.l2_bytes": 16384 * 24 * 512,  # sets x ways x bytes of a line
    "chip.base_m": 128,
    "chip.base_n": 256,
    "chip.base_k": 64,
    "chip.cube_m": 16,
    "chip.cube_n": 16,
    "chip.cube_k": 16,
    "chip.engines.l0a_bytes": 64 * 2**10,
    "chip.engines.l0b_bytes": 64 * 2**10,
    "chip.engines.l0c_bytes": 16 * 8 * 2**10,  # banks
    "chip.engines.l1_bytes": 512 * 2**10,
    "chip.engines.k_chunk_bytes": 512,
    "chip.engines.gemv_rows": 1,
    "chip.engines.step_k": 4,
    "chip.engines.line_bytes": 512,
    # The vendor's tables: 2r + 1, 4r + 1 cycles for r x 512 bytes; 150 + bytes / 160; bytes / 118.
    "chip.engines.l0a_bytes_per_cycle": 512 / 2,
    "chip.engines.l0b_bytes_per_cycle": 512 / 4,
    "chip.engines.load_nz_bytes_per_cycle": 160,
    "chip.engines.load_nd_bytes_per_cycle": 119,
    "chip.engines.store_bytes_per_cycle": 118,
    "chip.engines.tiling_s": (2e-6 + 4e-6) / 2,
    "chip.engines.int8_s": 15e-6 - 4.2e-6,  # without the launch
    "chip.vector.lane_bytes": 64 * 4,
    "chip.vector.startup_cycles": (18 + 20) / 2,
    "chip.vector.ub_bytes": 192 * 2**10,
    "chip.vector.block_bytes": 32,
    "chip.vector.load_wait_cycles": 242,
    "chip.vector.load_bytes_per_cycle": 46,
    "chip.vector.load_warm_bytes_per_cycle": 115,
    "chip.vector.store_wait_cycles": (150 + 200) / 2,
    "chip.vector.store_bytes_per_cycle": 64,
    "chip.vector.merge_lists": 4,
    "chip.vector.sorted_elements": 32,
    "chip.vector.score_keys": 1024,
    "chip.vector.mixed_s": (1e-6 + 5e-6) / 2,
    # Lanes of 224 Gb/s; 540 GB/s both ways between a package's dies; arXiv 2506.12708 v2, Table 1.
    "fabric.planes": 7,
    "fabric.lane_bytes_per_s": 224e9 / 8,
    "fabric.switches_per_plane": 112 / 7,
    "fabric.package.bytes_per_s": 540e9 / 2,
    "fabric.package.read_bytes_per_s": 187e9,
    "fabric.package.write_bytes_per_s": 187e9,
    "fabric.node.bytes_per_s": 392e9 / 2,
    "fabric.node.read_bytes_per_s": 167e9,
    "fabric.node.write_bytes_per_s": 137e9,
    "fabric.node.read_latency_s": 1.2e-6,
    "fabric.node.write_latency_s": 1.3e-6,
    "fabric.pod.bytes_per_s": 392e9 / 2,
    "fabric.pod.read_bytes_per_s": 164e9,
    "fabric.pod.write_bytes_per_s": 135e9,
    "fabric.pod.read_latency_s": 1.9e-6,
    "fabric.pod.write_latency_s": 2.1e-6,
    "fabric.host.per_node": 192 / 48,
    "fabric.host.bytes_per_s": 160e9,
    "fabric.host.read_bytes_per_s": 147e9,
    "fabric.host.write_bytes_per_s": 107e9,
    "fabric.rdma.per_node": 16,
    "fabric.rdma.bytes_per_s": 200e9 / 8,
    "fabric.rdma.read_bytes_per_s": 23.8e9,
    "fabric.rdma.write_bytes_per_s": 23.8e9,
    "fabric.aiv_small.production_offsets_s": {
        "all_gather": ((8, 1.2e-6), (16, 14.6e-6)),
        "all_reduce": ((16, 7.7e-6),),
        "reduce_scatter": ((8, 2.0e-6),),
    },
    "fabric.sdma.step_s": 1e-6,
    "fabric.sdma.rates_bytes_per_s": {"package": 187e9, "node": 167e9, "pod": 164e9},
    "fabric.sdma_write.step_s": 1e-6,
    "fabric.sdma_write.rates_bytes_per_s": {"package": 187e9, "node": 137e9, "pod": 135e9},
    "fabric.roce.step_s": 7e-6,
    "power.idle_device_w": (156, 187),
    "power.system_w": (500e3, 600e3),
}
# What follows from publications or measurements, with the sums that the notes tell; what is fitted
# is found again in test_transports.py and test_chip.py.
DERIVED_CLOUD = {
    "chip.clock_hz": 1.8e9,  # 353.9 TFLOPS of 24 cores x 8192
    "chip.vector_peaks_flops_per_s": {
        dtype: 48 * (256 / lane) * 2 * 1.8e9
        for lane, dtypes in {
            2: ("float16", "int16", "uint16", "int8", "uint8", "bool"),
            4: ("float32", "bfloat16", "int32", "uint32"),  # BF16 is widened
            8: ("int64", "uint64"),
        }.items()
        for dtype in dtypes
    },
    "chip.memory_efficiency": 1.36 / 1.6,  # 1.3 to 1.5 TB/s are reached
    "chip.l2_bytes_per_s": 5e12,
    "chip.launch_s": 4.2e-6,
    "chip.engines.head_cycles": 9,
    "chip.engines.load_row_cycles": 128 / 35.6,
    "chip.engines.request_bytes": 512,
    "chip.engines.load_cold_bytes_per_cycle": 100e9 / 1.85e9,
    "chip.vector.row_cycles": 128 / 35.6,
    "fabric.node_uplink_bytes_per_s": 7 * 448e9,
    "power.peak_device_w": (2 * 364, 1200),
    "power.matmul_j_per_flop": ((364 - 97) / 353.9e12, (364 - 97) / (0.6 * 353.9e12)),
    "power.memory_j_per_byte": (8 * 4e-12, 8 * 7e-12),
    "power.l2_j_per_byte": (8 * 0.25e-12, 8 * 1.5e-12),
    "power.link_j_per_byte": {  # 5 to 10 pJ a bit and lane, two in a node and four between nodes
        "package": (8e-12, 20e-12),
        "node": (2 * 8 * 5e-12, 2 * 8 * 10e-12),
        "pod": (4 * 8 * 5e-12, 4 * 8 * 10e-12),
    },
    "power.optics_w": (6912 * 4, 6912 * 6.5),
    "power.cpu_w": (192 * 100, 192 * 300),
}

PUBLISHED_RACK = {
    "num_devices": 72,
    "dies_per_device": 1,
    "devices_per_node": 72,
    "packages": 72,
    "pods": 1,
    "headline_bf16_flops_per_s": 180e15,
    # The product page's figures of the whole rack, dense.
    "chip.matmul_peaks_flops_per_s": {
        dtype: rack / 72
        for dtype, rack in {
            "bfloat16": 180e15,
            "float16": 180e15,
            "int8": 360e15,
            "float8": 360e15,
            "float4": 720e15,
            "tf32": 90e15,
            "float32": 5760e12,
        }.items()
    },
    "chip.quoted_bf16_flops_per_s": 180e15 / 72,
    "chip.memory_bytes": 186e9,
    "chip.memory_bytes_per_s": 576e12 / 72,
    "chip.engines.line_bytes": 128,
    "chip.engines.request_bytes": 32,
    "chip.vector.lane_bytes": 4 * 32 * 4,  # four warps
    "chip.vector.ub_bytes": 227 * 2**10,
    "chip.vector.block_bytes": 32,
    "chip.vector.picks_per_cycle": 32,
    "fabric.planes": 18,
    "fabric.lane_bytes_per_s": 50e9,
    "fabric.switches_per_plane": 18 / 18,
    "fabric.node_uplink_bytes_per_s": 72 * 18 * 50e9,
    "fabric.node.bytes_per_s": 18 * 50e9,
    "fabric.host.per_node": 36,
    "power.peak_device_w": (1000, 1200),
    "power.optics_w": (0, 0),
    "power.system_w": (120e3, 145e3),
}
DERIVED_RACK = {
    "chip.clock_hz": 2.5e15 / (148 * 8192),
    "chip.vector_peaks_flops_per_s": {
        dtype: 5760e12 / 72 * times
        for times, dtypes in {
            2: ("bfloat16", "float16"),
            1: ("float32",),
            0.5: ("float64", "int32", "uint32", "int16", "uint16", "int8", "uint8", "bool"),
            0.25: ("int64", "uint64"),
        }.items()
        for dtype in dtypes
    },
    "chip.cube_m": 16,
    "chip.cube_n": 16,
    "chip.cube_k": 4096 / 16 / 16,
    "fabric.host.bytes_per_s": 900e9 / 2,  # both directions together
    "power.matmul_j_per_flop": ((1000 - 250) / 2.5e15, (1200 - 120) / (0.7 * 2.5e15)),
    "power.memory_j_per_byte": (8 * 3e-12, 8 * 5e-12),
    "power.l2_j_per_byte": (8 * 0.25e-12, 8 * 1e-12),
    "power.cpu_w": (36 * 100, 36 * 300),
}

# What is said in two to four digits.
ROUNDED = {
    "chip.engines.load_row_cycles": 2e-3,
    "chip.engines.load_cold_bytes_per_cycle": 2e-3,
    "chip.vector.row_cycles": 2e-3,
    "power.matmul_j_per_flop": 1e-4,
    "power.optics_w": 0.02,
}


def flat(value: object) -> list[float | str]:
    """Numbers and names in a value, one after the other."""
    if isinstance(value, dict):
        return flat(sorted(value.items()))
    if isinstance(value, tuple | list):
        return [part for each in value for part in flat(each)]
    assert isinstance(value, int | float | str)
    return [value]


@pytest.mark.parametrize(
    ("machine", "published", "derived"),
    [
        (cloudmatrix384(), PUBLISHED_CLOUD, DERIVED_CLOUD),
        (gb200_nvl72(), PUBLISHED_RACK, DERIVED_RACK),
    ],
    ids=["cloud", "rack"],
)
def test_numbers_are_those_of_the_publications(
    machine: Machine, published: dict[str, object], derived: dict[str, object]
) -> None:
    facts = {fact.name: fact for fact in machine.facts()}
    known = {name for name, f in facts.items() if f.evidence in ("documented", "measured")}
    assert known == set(published)
    assert not known & set(derived)
    for name, value in {**published, **derived}.items():
        have = facts[name].value
        table = isinstance(value, dict)
        rel = ROUNDED.get(name, 1e-9)
        near = [v if isinstance(v, str) else pytest.approx(v, rel=rel, abs=0) for v in flat(value)]
        assert flat(dict(have) if table else have) == near, name


def test_assumptions_are_what_their_notes_lean_on() -> None:
    cloud, rack = cloudmatrix384(), gb200_nvl72()
    for machine in (cloud, rack):
        chip, power = machine.chip, machine.power
        # A start of the vector cores; what a combined kernel keeps back.
        assert chip.vector.sync_s == chip.engines.split_k_s == 2e-6
        # Up to a fifth of the step from idle to peak.
        least, step_w = power.active_device_w[0], power.peak_device_w[1] - power.idle_device_w[1]
        assert least == 0 and power.active_device_w[1] == pytest.approx(step_w / 5, rel=0.06)
        for transport in machine.fabric.transports:  # no start of a reduction beyond AIV's
            assert transport.startup_s < 200e-6 and transport.reduce_startup_s < 20e-6
            assert transport.overlap_s < 1e-6
    fabric = cloud.fabric
    (host,) = (port for port in fabric.ports if port.name == "host")
    node, package = fabric.tier("node"), fabric.tier("package")
    assert host.latency_s == node.write_latency_s  # that of a die in the node
    assert 0 < package.read_latency_s <= node.read_latency_s
    assert 0 < package.write_latency_s <= node.write_latency_s
    large, small = fabric.transport("aiv_large"), fabric.transport("aiv_small")
    assert dict(large.message_s) == pytest.approx(
        dict.fromkeys(("package", "node"), small.step_s + node.read_latency_s)
    )
    assert dict(large.rates_bytes_per_s) == {
        "package": package.read_bytes_per_s,
        "node": node.bytes_per_s,
    }
    assert {t.name for t in fabric.transports if t.reads} == {"aiv_small", "aiv_large", "sdma"}
    assert {t.name for t in fabric.transports if t.on_request} == {"sdma_write", "roce"}
    full, half = rack.fabric.transports  # a flag beside each word
    assert half.rates_bytes_per_s[0][1] * 2 == full.rates_bytes_per_s[0][1]
    assert rack.fabric.in_network_reduction and not fabric.in_network_reduction


def test_tiles_are_those_of_the_libraries() -> None:
    """Whole fractals; ops-nn mat_mul_v3 has 128 x 256 and, for some shapes, the others."""
    ascend, nvidia = cloudmatrix384().chip.engines, gb200_nvl72().chip.engines
    assert {(128, 256), (256, 128), (128, 128), (64, 512)} <= set(ascend.tiles)
    assert {(256, 256), (128, 256), (256, 128), (128, 128)} <= set(nvidia.tiles)
    for engines in (ascend, nvidia):
        every = [*engines.tiles, *engines.narrow, *engines.splits]
        assert all(rows % 16 == columns % 16 == 0 for rows, columns in every)
        assert max(rows * columns for rows, columns in every) * 4 == engines.l0c_bytes
    assert {rows for rows, _ in ascend.narrow} == {80, 96, 112, 128}
    assert {columns for _, columns in ascend.narrow} == {32, 64, 96, 128, 160, 192, 224}
    assert {rows for rows, columns in ascend.tiles if columns == 16} == {16, 32, 48, 64}


@pytest.mark.parametrize(
    ("name", "cores", "mhz", "memory_gib", "l2_mib", "memory_gb_per_s"),
    [
        ("910B1", 24, 1850, 64, 192, 1800),
        ("910B2", 24, 1800, 64, 192, 1750),
        ("910B3", 20, 1800, 64, 192, 1750),
        ("910B4", 20, 1500, 32, 96, 800),
        ("910C", 24, 1850, 64, 192, 1600),  # the 9391, as the ini files have it
        ("910C-20", 20, 1800, 64, 192, 1600),
    ],
)
def test_ascend_dies_are_those_of_the_publications(
    name: str, cores: int, mhz: int, memory_gib: int, l2_mib: int, memory_gb_per_s: int
) -> None:
    """Of 313 TFLOPS that are quoted for 20 cores, 294.9 are the cubes' and 18.4 the vectors'."""
    die = chip(name)
    assert (die.cube_cores, die.vector_cores) == (cores, 2 * cores)
    assert die.clock_hz == mhz * 1e6
    assert die.memory_bytes == memory_gib * 2**30 and die.l2_bytes == l2_mib * 2**20
    assert die.memory_bytes_per_s == memory_gb_per_s * 1e9
    assert die.l2_bytes_per_s == (2.5e12 if name == "910B4" else 5e12)  # 4 of 8 TB/s both ways
    of_20 = cores / 20 * mhz / 1800
    assert die.matmul_flops_per_s("bfloat16") == pytest.approx(294.9e12 * of_20, rel=1e-3)
    assert die.vector_flops_per_s("float16") == pytest.approx(18.4e12 * of_20, rel=5e-3)
    assert die.quoted_bf16_flops_per_s == pytest.approx(313e12 * of_20, rel=2e-3)


def test_h100_is_that_of_the_data_sheet() -> None:
    die = chip("H100")
    assert (die.cube_cores, die.vector_cores) == (132, 132)
    assert die.clock_hz == pytest.approx(989.4e12 / (132 * 4096))  # 1.83 GHz
    assert die.cube_macs_per_cycle() * 2 == 4096
    assert die.memory_bytes == 80e9 and die.memory_bytes_per_s == 3.35e12
    assert die.l2_bytes == 50 * 2**20
    peaks = {"bfloat16": 989.4, "int8": 1978.8, "float8": 1978.8, "tf32": 494.7, "float32": 66.9}
    for dtype, tflops in peaks.items():
        assert die.matmul_flops_per_s(dtype) == pytest.approx(tflops * 1e12), dtype
    assert die.matmul_flops_per_s("float16") == die.quoted_bf16_flops_per_s == 989.4e12
    assert die.vector_flops_per_s("float64") == pytest.approx(34e12, rel=0.02)
    assert die.vector_flops_per_s("float32") == pytest.approx(66.9e12)


def test_several_pods_have_as_much_of_everything() -> None:
    pod, pods = cloudmatrix384(), cloudmatrix384(pods=3)
    assert (pods.num_devices, pods.packages, pods.pods) == (3 * 384, 3 * 384, 3)
    assert pods.headline_bf16_flops_per_s == 900e15
    for name in ("optics_w", "cpu_w", "switch_w", "system_w"):
        one, all_ = getattr(pod.power, name), getattr(pods.power, name)
        assert all_ == pytest.approx((3 * one[0], 3 * one[1])), name
    for name in ("idle_device_w", "peak_device_w", "matmul_j_per_flop"):
        assert getattr(pods.power, name) == getattr(pod.power, name)
    links = dict(pods.power.link_j_per_byte)
    assert {name: links[name] for name in ("package", "node", "pod")} == dict(
        pod.power.link_j_per_byte
    )
    # RDMA at two to three times the energy of a link between nodes.
    assert links["pods"] == pytest.approx((2 * links["pod"][0], 3 * links["pod"][1]))
    rdma = pods.fabric.tier("pods")
    assert (rdma.bytes_per_s, rdma.read_bytes_per_s) == (25e9, 23.8e9)
    assert rdma.write_bytes_per_s == 23.8e9
    assert rdma.read_latency_s == rdma.write_latency_s == pytest.approx(5e-6)
    for transport in pods.fabric.transports:
        inside = pod.fabric.transport(transport.name)
        if inside.scope == "pod":
            assert transport.scope == "pods"
            between = ("pods", 23.8e9)
            assert transport.rates_bytes_per_s == (*inside.rates_bytes_per_s, between)
        else:
            assert transport == inside


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
