"""NVIDIA GB200 NVL72: 72 Blackwell GPUs in one NVLink domain."""

from __future__ import annotations

import functools

from emulator.machines.chip import Chip
from emulator.machines.engines import NVIDIA_TENSOR_CORE
from emulator.machines.fabric import Fabric, Port, Tier, Transport
from emulator.machines.fact import build, cite
from emulator.machines.machine import Machine
from emulator.machines.power import Power
from emulator.machines.vector_engines import NVIDIA_SM

MB = 10**6
GB = 10**9
TERA = 10**12
us = 1e-6

# Fitted to four digits; `cm384 validate --refit` finds them again from `calibration/`.
RING_STEP_S = 3.177 * us
RING_BYTES_PER_S = 866.5 * GB

_NV = "NVIDIA GB200 NVL72 product page"
_NCCL = "coreweave/nccl-tests PR #43 (Feb 2025)"
_SEMI = "SemiAnalysis, 16 April 2025"

_BF16 = 2500 * TERA
_FP32 = 80 * TERA


def _gpu() -> Chip:
    return build(
        Chip,
        cite(
            "assumed", "148 SMs, the count of shipped B200 parts", cube_cores=148, vector_cores=148
        ),
        cite(
            "inferred",
            _NV,
            "2.5 PFLOPS / (148 SMs x 8192 FLOP per cycle)",
            clock_hz=_BF16 / (148 * 8192),
        ),
        cite(
            "documented",
            _NV,
            "dense; the product page's system figures / 72; FP32 is the ordinary cores' rate",
            matmul_peaks_flops_per_s=(
                ("bfloat16", _BF16),
                ("float16", _BF16),
                ("int8", 2 * _BF16),
                ("float8", 2 * _BF16),
                ("float4", 4 * _BF16),
                ("tf32", _BF16 / 2),
                ("float32", _FP32),
            ),
        ),
        cite("documented", _NV, "180 PFLOPS dense / 72", quoted_bf16_flops_per_s=_BF16),
        cite(
            "inferred",
            _NV,
            "FP32 5,760 TFLOPS / 72; 16-bit assumed twice that, integers half",
            vector_peaks_flops_per_s=(
                ("float32", _FP32),
                ("bfloat16", 2 * _FP32),
                ("float16", 2 * _FP32),
                ("float64", _FP32 / 2),
                ("int32", _FP32 / 2),
                ("uint32", _FP32 / 2),
                ("int16", _FP32 / 2),
                ("uint16", _FP32 / 2),
                ("int8", _FP32 / 2),
                ("uint8", _FP32 / 2),
                ("bool", _FP32 / 2),
                ("int64", _FP32 / 4),
                ("uint64", _FP32 / 4),
            ),
        ),
        cite(
            "documented",
            "MLPerf system descriptions",
            "192 GB is printed elsewhere",
            memory_bytes=186 * GB,
        ),
        cite("documented", _NV, "576 TB/s / 72", memory_bytes_per_s=8 * TERA),
        cite("assumed", "no measured stream figure at hand", memory_efficiency=0.9),
        cite("assumed", "126 MB is widely quoted", l2_bytes=126 * MB),
        cite("assumed", "not published; above HBM", l2_bytes_per_s=16 * TERA),
        cite("assumed", "a CUDA graph node", launch_s=2.5 * us),
        cite("assumed", "usual CUTLASS tile", base_m=128, base_n=256, base_k=64),
        cite(
            "inferred",
            _NV,
            "4096 multiply-adds per cycle and SM, as a cube",
            cube_m=16,
            cube_n=16,
            cube_k=16,
        ),
        name="NVIDIA Blackwell GPU (GB200)",
        fp32_mode="tf32",
        engines=NVIDIA_TENSOR_CORE,
        vector=NVIDIA_SM,
    )


def _transports() -> tuple[Transport, ...]:
    kernel = cite(
        "assumed",
        "kernel start; additions run at the rate of the link",
        startup_s=6.0 * us,
        reduce_startup_s=0.0,
        overlap_s=0.0,
        reduce_s_per_byte=0.0,
    )
    return (
        build(
            Transport,
            cite(
                "inferred",
                _NCCL,
                "fit: all_reduce of 0.5 and 8 GiB among 72, in and out of place, as a ring of 142 "
                "steps",
                step_s=RING_STEP_S,
                rates_bytes_per_s=(("node", RING_BYTES_PER_S),),
            ),
            kernel,
            name="nvlink",
            scope="node",
            reads=False,
        ),
        build(
            Transport,
            cite(
                "assumed",
                "NCCL's low-latency protocol: a flag beside each word, so half the rate, and no "
                "wait but the link's latency",
                step_s=0.0,
                rates_bytes_per_s=(("node", RING_BYTES_PER_S / 2),),
            ),
            kernel,
            name="nvlink_ll",
            scope="node",
            reads=False,
        ),
    )


def _fabric() -> Fabric:
    tier = build(
        Tier,
        cite("documented", _NV, "NVLink 5, 18 x 50 GB/s", bytes_per_s=900 * GB),
        cite(
            "inferred",
            _NCCL,
            "slope of the two all_reduce sizes as ring traffic",
            read_bytes_per_s=RING_BYTES_PER_S,
            write_bytes_per_s=RING_BYTES_PER_S,
        ),
        cite(
            "assumed", "no vendor figure found", read_latency_s=1.0 * us, write_latency_s=1.0 * us
        ),
        name="node",
        link="nvlink",
    )
    return build(
        Fabric,
        cite(
            "documented",
            _NV,
            "9 trays of 2 switches, one of a GPU's 18 links to each",
            planes=18,
            lane_bytes_per_s=50 * GB,
            switches_per_plane=1,
            node_uplink_bytes_per_s=72 * 900 * GB,
        ),
        cite(
            "assumed",
            "no point at hand: a kernel start and one round of flags",
            exchange_s=(("dispatch", 10.0 * us), ("combine", 10.0 * us)),
        ),
        name="NVLink 5, one domain",
        tiers=(tier,),
        transports=_transports(),
        in_network_reduction=True,
        ports=(_host_port(),),
    )


def _host_port() -> Port:
    return build(
        Port,
        cite("documented", _NV, "36 Grace CPUs, each with two GPUs", per_node=36),
        cite(
            "assumed",
            "descriptions of the GB200 superchip by third parties",
            "NVLink-C2C: 900 GB/s, taken for both directions and both GPUs together; no reading of "
            "what copies reach is at hand",
            bytes_per_s=450 * GB,
            read_bytes_per_s=450 * GB,
            write_bytes_per_s=450 * GB,
        ),
        cite("assumed", "no vendor figure found", latency_s=1.0 * us),
        name="host",
        to="its two GPUs",
        medium="electrical",
    )


def _power() -> Power:
    return build(
        Power,
        cite("assumed", "no reading at hand", idle_device_w=(120.0, 250.0)),
        cite(
            "documented", "NVIDIA GB200 brief: up to 1200 W a GPU", peak_device_w=(1000.0, 1200.0)
        ),
        cite(
            "assumed",
            "no reading at hand",
            "up to a fifth of the step from idle to peak",
            active_device_w=(0.0, 200.0),
        ),
        cite(
            "inferred",
            "NVIDIA GB200 brief",
            "the step from idle to 1000 to 1200 W, at 70 to 100 % of 2.5 PFLOPS",
            matmul_j_per_flop=((1000 - 250) / _BF16, (1200 - 120) / (0.7 * _BF16)),
        ),
        cite("assumed", "no reading at hand", vector_j_per_flop=(0.5e-12, 3e-12)),
        cite("assumed", "on-chip, 0.25 to 1 pJ/bit", l2_j_per_byte=(2e-12, 8e-12)),
        cite("documented", _NV, "copper inside the rack", optics_w=(0.0, 0.0)),
        cite(
            "inferred",
            "press: superchip 2.7 kW",
            "less two GPUs of 1.2 kW: 300 W, or a third, for each of 36 CPUs",
            cpu_w=(3.6e3, 10.8e3),
        ),
        cite(
            "assumed",
            "press: nine switch trays of 3.6 kW together, which seems low; cards besides",
            switch_w=(3.6e3, 15e3),
        ),
        cite("assumed", "pumps, fans, supply loss", cooling_share=(0.05, 0.15)),
        cite(
            "documented", f"{_SEMI} (145 kW); several sites (about 120 kW)", system_w=(120e3, 145e3)
        ),
        cite(
            "assumed",
            "copper NVLink and switches",
            link_j_per_byte=(("node", (40e-12, 120e-12)),),
        ),
        cite("assumed", "HBM3e at 3 to 5 pJ/bit", memory_j_per_byte=(24e-12, 40e-12)),
    )


@functools.cache
def gb200_nvl72() -> Machine:
    """GB200 NVL72: one device per GPU, 72 of them; the NVLink domain counts as one node."""
    return build(
        Machine,
        cite(
            "documented",
            _NV,
            "18 trays of 4 GPUs in one NVLink domain; a GPU's two dies appear as one",
            num_devices=72,
            dies_per_device=1,
            devices_per_node=72,
            packages=72,
            pods=1,
        ),
        cite("documented", _NV, "dense", headline_bf16_flops_per_s=180e15),
        name="GB200 NVL72",
        device_kind="GPU",
        chip=_gpu(),
        fabric=_fabric(),
        power=_power(),
        arithmetic="NVIDIA_BLACKWELL",
    )
