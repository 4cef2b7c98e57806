"""Single dies that measurements were published for, beside the one of CloudMatrix 384.

The Ascend ones have the core of the 910C die and differ in how many there are, clock and memory. No
system is described around them: `on_chip` puts one in the place of a machine's own.
"""

from __future__ import annotations

import dataclasses
import functools

from emulator.machines.chip import Chip
from emulator.machines.cloudmatrix384 import cloudmatrix384
from emulator.machines.engines import NVIDIA_TENSOR_CORE
from emulator.machines.fact import build, cite
from emulator.machines.gb200_nvl72 import gb200_nvl72
from emulator.machines.machine import Machine
from emulator.machines.vector_engines import NVIDIA_SM

GB = 10**9
GiB = 2**30
MiB = 2**20
TERA = 10**12
us = 1e-6

_INI = "hicann/runtime 681ef76 platform_config"
_SHEET = "NVIDIA H100 SXM data sheet"

# name -> cores, clock in MHz, memory in GiB, L2 in MiB, memory in GB/s (msopprof d6c29df).
_ASCEND = {
    "910B1": (24, 1850, 64, 192, 1800),
    "910B2": (24, 1800, 64, 192, 1750),
    "910B3": (20, 1800, 64, 192, 1750),
    "910B4": (20, 1500, 32, 96, 800),
    "910C": (24, 1850, 64, 192, 1600),
    "910C-20": (20, 1800, 64, 192, 1600),
}

_L2_OF_96_MIB = 4.0 / 8.0  # of the rate that the others have: 4 of 8 TB/s, reads and writes


def chip_names() -> tuple[str, ...]:
    """What `chip` knows."""
    return (*_ASCEND, "H100", "GB200")


@functools.cache
def chip(name: str) -> Chip:
    """A die by name: "910B3", "H100", ...; see `chip_names`.

    Raises:
        ValueError: there is no such die here.
    """
    if name == "H100":
        return _h100()
    if name == "GB200":
        return gb200_nvl72().chip
    if name not in _ASCEND:
        raise ValueError(f"unknown chip {name!r}; known: {', '.join(chip_names())}")
    return _ascend(name, *_ASCEND[name])


def on_chip(machine: Machine, chip: Chip) -> Machine:
    """`machine` with one die of another kind per device."""
    return dataclasses.replace(
        machine, name=chip.name, device_kind="die", dies_per_device=1, chip=chip
    )


@functools.cache
def single(name: str) -> Machine:
    """A machine whose devices are single dies of the given name, to time what one of them does.

    Raises:
        ValueError: there is no such die here.
    """
    base = gb200_nvl72() if name in ("H100", "GB200") else cloudmatrix384("die")
    return on_chip(base, chip(name))


def _ascend(name: str, cores: int, mhz: int, gib: int, l2_mib: int, gb_per_s: int) -> Chip:
    base = cloudmatrix384("die").chip.at_clock(mhz * 1e6)
    share = cores / base.cube_cores
    peaks = tuple((dtype, rate * share) for dtype, rate in base.matmul_peaks_flops_per_s)
    vector = tuple((dtype, rate * share) for dtype, rate in base.vector_peaks_flops_per_s)
    l2 = base.l2_bytes_per_s * (_L2_OF_96_MIB if l2_mib == 96 else 1.0)
    changed = (
        cite("inferred", "msopprof d6c29df", "reads", l2_bytes_per_s=l2),
        cite(
            "documented",
            _INI,
            cube_cores=cores,
            vector_cores=2 * cores,
            clock_hz=mhz * 1e6,
            memory_bytes=gib * GiB,
            l2_bytes=l2_mib * MiB,
        ),
        cite(
            "documented",
            "msopprof d6c29df; arXiv 2506.12708 v2 for the 910C",
            memory_bytes_per_s=gb_per_s * GB,
        ),
        cite(
            "inferred",
            "cores x clock",
            matmul_peaks_flops_per_s=peaks,
            vector_peaks_flops_per_s=vector,
            quoted_bf16_flops_per_s=base.quoted_bf16_flops_per_s * share,
        ),
    )
    values = {key: value for citation in changed for key, value in citation.values}
    return dataclasses.replace(
        base, name=f"Ascend {name}", citations=(*base.citations, *changed), **values
    )


def _h100() -> Chip:
    bf16, fp32 = 989.4 * TERA, 66.9 * TERA
    return build(
        Chip,
        cite("documented", _SHEET, cube_cores=132, vector_cores=132),
        cite(
            "inferred",
            _SHEET,
            "989.4 TFLOPS / (132 SMs x 4096 FLOP per cycle)",
            clock_hz=bf16 / (132 * 4096),
        ),
        cite(
            "documented",
            _SHEET,
            "dense; FP32 is the ordinary cores' rate",
            matmul_peaks_flops_per_s=(
                ("bfloat16", bf16),
                ("float16", bf16),
                ("int8", 2 * bf16),
                ("float8", 2 * bf16),
                ("tf32", bf16 / 2),
                ("float32", fp32),
            ),
            quoted_bf16_flops_per_s=bf16,
            memory_bytes=80 * GB,
            memory_bytes_per_s=3350 * GB,
        ),
        cite(
            "inferred",
            _SHEET,
            "16-bit assumed twice FP32, integers half; FP64 34 TFLOPS are documented",
            vector_peaks_flops_per_s=(
                *((dtype, fp32) for dtype in ("float32",)),
                *((dtype, 2 * fp32) for dtype in ("bfloat16", "float16")),
                *(
                    (dtype, fp32 / 2)
                    for dtype in (
                        *("float64", "int32", "uint32", "int16"),
                        *("uint16", "int8", "uint8", "bool"),
                    )
                ),
                *((dtype, fp32 / 4) for dtype in ("int64", "uint64")),
            ),
        ),
        cite("assumed", "no measured stream figure at hand", memory_efficiency=0.9),
        cite("documented", _SHEET, l2_bytes=50 * MiB),
        cite(
            "assumed",
            "not published; kernels near 70 % of the peak need it",
            l2_bytes_per_s=7.0 * TERA,
        ),
        cite("assumed", "a CUDA graph node", launch_s=2.5 * us),
        cite("assumed", "usual CUTLASS tile", base_m=128, base_n=256, base_k=64),
        cite(
            "inferred",
            _SHEET,
            "2048 multiply-adds per cycle and SM, as a cube",
            cube_m=16,
            cube_n=16,
            cube_k=8,
        ),
        name="NVIDIA H100 SXM",
        fp32_mode="tf32",
        engines=NVIDIA_TENSOR_CORE,
        vector=NVIDIA_SM,
    )
