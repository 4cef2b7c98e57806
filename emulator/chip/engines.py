"""Rates of a chip's inner engines that a data sheet does not list, each with where it comes from.

The `Chip` record of a machine holds what vendors publish about a die: cores, clock, peaks, memory.
A matmul also waits for the paths between memory and the matrix unit. Those are properties of the
core's architecture, not of one product, so they live here, in cycles, and scale with the clock of
the chip they are used for.
"""

from __future__ import annotations

import dataclasses

from emulator.machines import Chip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """Paths and fixed costs around one matrix core.

    Attributes:
        tiles: output tiles (base_m, base_n) that the library chooses from.
        k_step_bytes: bytes of K that one matrix instruction consumes of a row.
        head_cycles: cycles that each matrix instruction costs beyond its multiply-adds.
        load_nd_bytes_per_cycle: memory to core, per core, row-major operand, data in the last-level
            cache.
        load_nz_bytes_per_cycle: the same for an operand stored in fractals.
        cold_bytes_per_cycle: memory to core, per core, data not in the last-level cache.
        store_bytes_per_cycle: accumulator to memory, per core.
        l2_efficiency: share of the last-level cache's read rate that all cores together reach in a
            matmul.
        line_bytes: smallest piece of memory that a gather fetches.
        first_load_s: from the start of the kernel to the first tile in place.
        split_k_s: fixed cost of adding the partial sums of a K that several cores divided.
        notes: where these numbers come from.
        fit: how far the matmul model lies from published measurements.
    """

    tiles: tuple[tuple[int, int], ...]
    k_step_bytes: int
    head_cycles: float
    load_nd_bytes_per_cycle: float
    load_nz_bytes_per_cycle: float
    cold_bytes_per_cycle: float
    store_bytes_per_cycle: float
    l2_efficiency: float
    line_bytes: int
    first_load_s: float
    split_k_s: float
    notes: tuple[str, ...]
    fit: str

    def __post_init__(self) -> None:
        for name in ("k_step_bytes", "load_nd_bytes_per_cycle", "load_nz_bytes_per_cycle"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"Engines({name}={getattr(self, name)}): expected a positive number"
                )
        if not 0 < self.l2_efficiency <= 1:
            raise ValueError(
                f"Engines(l2_efficiency={self.l2_efficiency}): expected a share in (0, 1]"
            )


ASCEND_DAV_C220 = Engines(
    tiles=(
        (128, 256),
        (256, 128),
        (128, 128),
        (64, 256),
        (32, 256),
        (16, 256),
        (16, 128),
        (64, 128),
    ),
    k_step_bytes=128,
    head_cycles=9.0,
    load_nd_bytes_per_cycle=119.0,
    load_nz_bytes_per_cycle=160.0,
    cold_bytes_per_cycle=54.0,
    store_bytes_per_cycle=118.0,
    l2_efficiency=0.78,
    line_bytes=512,
    first_load_s=1.0e-6,
    split_k_s=2.0e-6,
    notes=(
        "base tile 128x256x64 and its alternatives: ops-nn mat_mul_v3 (documented)",
        "mmad head 9 cycles in a tuned 8192^3 kernel: asc-devkit 0da921b (inferred)",
        "GM->L1 119 (nd) and 160 (nz) B/cycle, fixpipe 118 B/cycle: mskpp 065b75c (measured)",
        "cold GM->L1 about 100 GB/s per core (fit to a 16-row matmul, inferred)",
        "78 % of the 5 TB/s L2 read rate, all cores loading (fit to published matmuls, inferred)",
        "last-level cache lines of 512 B: msopprof d6c29df (documented)",
        "first load and split-K sums: 1 and 2 us (assumed)",
    ),
    fit=(
        "matmul times: a model of tiles and engines fitted to 7 published library kernels: six "
        "within 17 % (median of all 3 %), 1024^3 28 % too fast; not checked on others"
    ),
)

# Public depth only: tile quantisation, clock, peak, memory. The loads are set so that peak or
# memory limits, not they.
NVIDIA_TENSOR_CORE = Engines(
    tiles=((256, 256), (128, 256), (256, 128), (128, 128), (64, 256), (64, 128), (64, 64)),
    k_step_bytes=128,
    head_cycles=0.0,
    load_nd_bytes_per_cycle=128.0,
    load_nz_bytes_per_cycle=128.0,
    cold_bytes_per_cycle=64.0,
    store_bytes_per_cycle=64.0,
    l2_efficiency=1.0,
    line_bytes=128,
    first_load_s=1.0e-6,
    split_k_s=2.0e-6,
    notes=(
        "tiles of CUTLASS kernels; 256x256 is what a pair of SMs shares (documented)",
        "128 B/cycle per SM from L2, 64 B/cycle cold and stored, the whole L2 rate (assumed)",
        "first load and split-K sums: 1 and 2 us (assumed)",
    ),
    fit="matmul times: tiles, peak and memory at public depth, fitted to no measurement",
)


def engines_of(chip: Chip) -> Engines:
    """The engines of a chip, told apart by HF32: a mode that only Ascend's cube has."""
    if "hf32" in dict(chip.matmul_peaks_flops_per_s):
        return ASCEND_DAV_C220
    return NVIDIA_TENSOR_CORE
