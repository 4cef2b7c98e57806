"""Huawei CloudMatrix 384: 384 Ascend 910C packages of two dies, 48 nodes of 8 packages."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

from emulator.machines.chip import Chip
from emulator.machines.cloudmatrix384_transports import EXCHANGE_PHASES_S, transports
from emulator.machines.engines import ASCEND_DAV_C220
from emulator.machines.fabric import Fabric, Port, Tier, Transport
from emulator.machines.fact import Citation, build, cite
from emulator.machines.machine import Machine
from emulator.machines.power import Power
from emulator.machines.vector_engines import ASCEND_AIV_C220

T = TypeVar("T", Machine, Power, Transport)

GiB = 2**30
MiB = 2**20
GB = 10**9
TERA = 10**12
us = 1e-6

_CM = "arXiv 2506.12708 v2"
_INI = "hicann/runtime 681ef76 platform_config Ascend910_93xx"
_PROFILE = "Ascend/msmodeling 84fec85"
_MFH = "Ascend/memfabric_hybrid 7171ad35"
_SEMI = "SemiAnalysis, 16 April 2025"

MOST_PODS = 432  # 165,000 packages, arXiv 2506.12708 v2 (documented)

_CORES, _CLOCK_HZ = 24, 1.8e9
_BF16 = _CORES * 2 * 16 * 16 * 16 * _CLOCK_HZ  # 353.9 TFLOPS
_VECTOR = (
    2 * _CORES * 2 * 64 * _CLOCK_HZ
)  # 48 cores, 256 B a cycle = 64 FP32 lanes, multiply-add: 11.06 TFLOPS


def _die() -> Chip:
    return build(
        Chip,
        cite("documented", _INI, cube_cores=_CORES, vector_cores=2 * _CORES),
        cite(
            "inferred",
            _PROFILE,
            "353.9 TFLOPS = 24 cores x 8192 FLOP/cycle x 1.80 GHz; the 9391/9392 ini files say "
            "1.85 GHz",
            clock_hz=_CLOCK_HZ,
        ),
        cite(
            "documented",
            _PROFILE,
            "matrix unit alone, 2 x 16 x 16 x k x cores x clock with k = 16 (BF16, FP16), 32 "
            "(INT8), 64 (INT4, by Huawei asc-devkit), 4 (FP32), 8 (HF32)",
            matmul_peaks_flops_per_s=(
                ("bfloat16", _BF16),
                ("float16", _BF16),
                ("int8", 2 * _BF16),
                ("int4", 4 * _BF16),
                ("float32", _BF16 / 4),
                ("hf32", _BF16 / 2),
            ),
        ),
        cite(
            "documented",
            _PROFILE,
            "376 = 353.9 matrix + 22.1 vector; a package is quoted with 752",
            quoted_bf16_flops_per_s=376 * TERA,
        ),
        cite(
            "inferred",
            _PROFILE,
            "48 cores x 256 B a cycle x 1.80 GHz, a multiply-add as two; 22.1 TFLOPS FP16 and 11.1 "
            "FP32 are published; "
            "BF16 is widened to FP32, 8-bit and 64-bit rates are assumed from the lane width",
            vector_peaks_flops_per_s=(
                ("float32", _VECTOR),
                ("bfloat16", _VECTOR),
                ("float16", 2 * _VECTOR),
                ("int32", _VECTOR),
                ("uint32", _VECTOR),
                ("int16", 2 * _VECTOR),
                ("uint16", 2 * _VECTOR),
                ("int8", 2 * _VECTOR),
                ("uint8", 2 * _VECTOR),
                ("bool", 2 * _VECTOR),
                ("int64", _VECTOR / 2),
                ("uint64", _VECTOR / 2),
            ),
        ),
        cite("documented", _INI, "printed as 64 GB in " + _CM, memory_bytes=64 * GiB),
        cite("documented", _CM, memory_bytes_per_s=1.6 * TERA),
        cite(
            "inferred",
            "msopprof d6c29df, catlass 0dfcf9d",
            "1.3 to 1.5 TB/s are reached of 1.6",
            memory_efficiency=0.85,
        ),
        cite("documented", _INI, l2_bytes=192 * MiB),
        cite(
            "inferred",
            "msopprof d6c29df",
            "pure reads; vendor documents 5 to 5.2",
            l2_bytes_per_s=5.0 * TERA,
        ),
        cite(
            "inferred",
            "Horacehxw/msModeling 39df672",
            "intercept of M=16 matmuls on a 910C die: 4.2 us + weight bytes / 1.20 TB/s",
            launch_s=4.2 * us,
        ),
        cite("documented", "ops-nn e5c3fa9 mat_mul_v3", base_m=128, base_n=256, base_k=64),
        cite("documented", _INI, "per cycle and core in BF16", cube_m=16, cube_n=16, cube_k=16),
        name="Ascend 910C die",
        fp32_mode="float32",
        engines=ASCEND_DAV_C220,
        vector=ASCEND_AIV_C220,
    )


def _tiers() -> tuple[Tier, ...]:
    table1 = _CM + " Table 1"
    return (
        build(
            Tier,
            cite("documented", _CM, "540 GB/s both ways together", bytes_per_s=270 * GB),
            cite(
                "measured",
                _MFH,
                "SDMA over SIO, 16 MB blocks; used for both directions of access",
                read_bytes_per_s=187 * GB,
                write_bytes_per_s=187 * GB,
            ),
            cite(
                "assumed",
                "not published",
                "not above the latency through the first-level switch",
                read_latency_s=1.0 * us,
                write_latency_s=1.1 * us,
            ),
            name="package",
            link="sio",
        ),
        build(
            Tier,
            cite("documented", _CM, "7 lanes x 28 GB/s", bytes_per_s=196 * GB),
            cite("measured", table1, read_bytes_per_s=167 * GB, write_bytes_per_s=137 * GB),
            cite("measured", table1, "512 B", read_latency_s=1.2 * us, write_latency_s=1.3 * us),
            name="node",
            link="ub",
        ),
        build(
            Tier,
            cite("documented", _CM, "7 lanes x 28 GB/s", bytes_per_s=196 * GB),
            cite("measured", table1, read_bytes_per_s=164 * GB, write_bytes_per_s=135 * GB),
            cite("measured", table1, "512 B", read_latency_s=1.9 * us, write_latency_s=2.1 * us),
            name="pod",
            link="ub",
        ),
    )


def _ports() -> tuple[Port, ...]:
    table1 = _CM + " Table 1"
    return (
        build(
            Port,
            cite(
                "documented",
                _CM,
                "4 CPUs a node, about 160 GB/s of UB each",
                per_node=4,
                bytes_per_s=160 * GB,
            ),
            cite(
                "measured",
                table1,
                "die to CPU memory of another node; 151 and 110 inside one",
                read_bytes_per_s=147 * GB,
                write_bytes_per_s=107 * GB,
            ),
            cite("assumed", "that of a die in the node", latency_s=1.3 * us),
            name="host",
            to="first-level switches",
            medium="electrical",
        ),
        build(
            Port,
            cite(
                "documented",
                _CM,
                "200 Gb/s per die, RoCE, to other pods",
                per_node=16,
                bytes_per_s=25 * GB,
            ),
            cite(
                "measured",
                "hicann/hixl 9ed283b benchmarks",
                read_bytes_per_s=23.8 * GB,
                write_bytes_per_s=23.8 * GB,
            ),
            cite("assumed", "no figure published for this machine", latency_s=5.0 * us),
            name="rdma",
            to="rdma switches",
            medium="optical",
        ),
    )


def _fabric() -> Fabric:
    return build(
        Fabric,
        cite(
            "documented",
            _CM,
            "sub-planes, one lane of a die each",
            planes=7,
            lane_bytes_per_s=28 * GB,
        ),
        cite("documented", _CM, "second-level switches of 48 ports", switches_per_plane=16),
        cite(
            "inferred",
            _CM,
            "7 first-level switches x 448 GB/s = 16 dies x 196: non-blocking",
            node_uplink_bytes_per_s=3136 * GB,
        ),
        cite(
            "inferred",
            _CM,
            "fit: what is left of dispatch and combine on 8 dies beside waiting and wire",
            exchange_s=EXCHANGE_PHASES_S,
        ),
        name="UnifiedBus, 2 switch levels",
        uplink_medium="optical",
        ports=_ports(),
        tiers=_tiers(),
        transports=transports(),
        in_network_reduction=False,
    )


def _power() -> Power:
    return build(
        Power,
        cite(
            "measured",
            "npu-smi readings in 14 public GitHub issues",
            "n=26, mean 171; A3 servers, not necessarily these racks",
            idle_device_w=(156.0, 187.0),
        ),
        cite(
            "assumed",
            "no loaded 910C reading is public",
            "two 910B cards at 364 W in a matmul loop; prior 1000 W",
            peak_device_w=(728.0, 1200.0),
        ),
        cite(
            "assumed",
            "no loaded 910C reading is public",
            "up to a fifth of the step from idle to peak",
            active_device_w=(0.0, 200.0),
        ),
        cite(
            "inferred",
            "FlagOpen/FlagPerf, 910B card, sustained 4096^3 BF16 loop",
            "364 W less 97 W idle, at 60 to 100 % of 353.9 TFLOPS; assumed for a 910C's die",
            matmul_j_per_flop=(267 / _BF16, 267 / (0.6 * _BF16)),
        ),
        cite(
            "assumed",
            "no reading is public",
            "operands of a vector lane come from and go to its buffer every time",
            vector_j_per_flop=(1e-12, 6e-12),
        ),
        cite("assumed", "on-chip, 0.25 to 1.5 pJ/bit", l2_j_per_byte=(2e-12, 12e-12)),
        cite(
            "inferred",
            f"{_SEMI}: 6,912 modules of 400G",
            "4 to 6.5 W each, half of an 800G LPO module, with or without traffic",
            optics_w=(28e3, 45e3),
        ),
        cite("assumed", "192 CPUs at 100 to 300 W", "prior 200 W", cpu_w=(19.2e3, 57.6e3)),
        cite(
            "assumed",
            "switches, cards, cooling and supply loss: prior 100 kW together",
            switch_w=(30e3, 60e3),
            cooling_share=(0.05, 0.15),
        ),
        cite(
            "documented",
            _SEMI,
            "a third party's 559 kW; other press 500 to 600",
            system_w=(500e3, 600e3),
        ),
        cite(
            "assumed",
            "lanes at 5 to 10 pJ/bit, two of them in a node and four between nodes",
            "optics are counted by module, not by byte",
            link_j_per_byte=(
                ("package", (8e-12, 20e-12)),
                ("node", (80e-12, 160e-12)),
                ("pod", (160e-12, 320e-12)),
            ),
        ),
        cite("assumed", "HBM2e at 4 to 7 pJ/bit", memory_j_per_byte=(32e-12, 56e-12)),
    )


def cloudmatrix384(device: str = "package", pods: int = 1) -> Machine:
    """CloudMatrix 384 with one device per package (384 devices) or per die (768); with `pods`,
    several of them that are joined by their RDMA cards.

    Raises:
        ValueError: `device` is neither "package" nor "die", or `pods` is no number from 1 to 432.
    """
    if device not in ("package", "die"):
        raise ValueError(f'cloudmatrix384: device must be "package" or "die"; got {device!r}')
    if isinstance(pods, bool) or not isinstance(pods, int) or not 1 <= pods <= MOST_PODS:
        raise ValueError(
            f"cloudmatrix384: pods must be a whole number from 1 to {MOST_PODS}, the most that "
            f"can be joined; got {pods!r}"
        )
    return _pods(device, pods)


@functools.cache
def _pods(device: str, pods: int) -> Machine:
    pod = _pod(device)
    return pod if pods == 1 else _joined(pod, pods)


def _joined(pod: Machine, pods: int) -> Machine:
    """Several pods: between them a die has its RDMA port, driven as inside the pod otherwise."""
    fabric = pod.fabric
    port = next(p for p in fabric.ports if p.name == "rdma")
    tier = build(
        Tier,
        cite("documented", _CM, "200 Gb/s per die, RoCE", bytes_per_s=port.bytes_per_s),
        cite(
            "measured",
            "hicann/hixl 9ed283b benchmarks",
            read_bytes_per_s=port.read_bytes_per_s,
            write_bytes_per_s=port.write_bytes_per_s,
        ),
        cite(
            "assumed",
            "no figure published for this machine",
            read_latency_s=port.latency_s,
            write_latency_s=port.latency_s,
        ),
        name="pods",
        link="rdma",
    )
    reaching = tuple(
        _reaching(transport, tier) if transport.scope == "pod" else transport
        for transport in fabric.transports
    )
    power = pod.power
    low, high = dict(power.link_j_per_byte)["pod"]
    return _changed(
        pod,
        cite(
            "inferred",
            f"{pods} pods",
            num_devices=pods * pod.num_devices,
            packages=pods * pod.packages,
            headline_bf16_flops_per_s=pods * pod.headline_bf16_flops_per_s,
            pods=pods,
        ),
        name=f"{pods} x {pod.name}",
        fabric=dataclasses.replace(fabric, tiers=(*fabric.tiers, tier), transports=reaching),
        power=_changed(
            power,
            cite(
                "assumed",
                f"{pods} pods; RDMA at two to three times the energy of a link between nodes",
                optics_w=_times(pods, power.optics_w),
                cpu_w=_times(pods, power.cpu_w),
                switch_w=_times(pods, power.switch_w),
                system_w=_times(pods, power.system_w),
                link_j_per_byte=(*power.link_j_per_byte, ("pods", (2 * low, 3 * high))),
            ),
        ),
    )


def _times(count: int, interval: tuple[float, float]) -> tuple[float, float]:
    return count * interval[0], count * interval[1]


def _changed(record: T, citation: Citation, **plain: Any) -> T:
    """`record` with the values of `citation`, and it as their source."""
    citations = (*record.citations, citation)
    return dataclasses.replace(record, citations=citations, **dict(citation.values), **plain)


def _reaching(transport: Transport, tier: Tier) -> Transport:
    """The transport with the rate of the RDMA port between pods."""
    rates = (*transport.rates_bytes_per_s, (tier.name, tier.write_bytes_per_s))
    return _changed(
        transport,
        cite(
            "measured",
            "hicann/hixl 9ed283b benchmarks",
            "between pods; inside them as for one pod",
            rates_bytes_per_s=rates,
        ),
        scope=tier.name,
    )


def _pod(device: str) -> Machine:
    dies = 2 if device == "package" else 1
    return build(
        Machine,
        cite(
            "documented",
            _CM,
            "48 nodes of 8 packages of 2 dies",
            num_devices=768 // dies,
            dies_per_device=dies,
            devices_per_node=16 // dies,
            packages=384,
            pods=1,
        ),
        cite(
            "documented",
            _SEMI,
            "a third party's figure (780 TFLOPS a package); 384 x 752 as the chip is quoted gives "
            "289, "
            "the matrix units alone 272",
            headline_bf16_flops_per_s=300e15,
        ),
        name="CloudMatrix 384",
        device_kind=device,
        chip=_die(),
        fabric=_fabric(),
        power=_power(),
        arithmetic="ASCEND_910C",
    )
