"""The arithmetic of one matrix unit: what it is, and matrix products that have its bits.

Where to read, from what is meant to what is fast:

- what a unit is: `arithmetic`, and as a file `arithmetic_file`; what that means: `reference`, the
  definition in Python integers;
- what is called: `matmul` (checked by `arguments`), `dot`, `tiling` and `tiled` (K in a library's
  order), `fractal`, `fixpipe`; `probe` finds a record from a unit's answers;
- bits in JAX: `floats`, `encode`, `operands`, `apart`;
- the twins in XLA's operations, one for each kind of sum: `aligned` with `aligned_step` (terms cut
  to a grid), `tree`, `chain`, and `exact`, whose blocks go by `pairs`, `halves`, `split` or at last
  `fixed_point`; shared by these: `blocks`, `extents`, `singles`;
- the same on a CPU's own vectors: `product` chooses, `compiled` and `custom_call` compile by numba
  in the terms of `vectors`; `native_operands` reads; exact sums are `native` with `native_steps`
  and `native_extents`, those that FP64 may round `native_careful` with `native_bounds`,
  `native_elements`, `native_extraction` and `native_fixed_point`; chains `native_chain` with
  `native_chain_steps`, terms cut to a grid `native_aligned` with `native_aligned_steps`, sums over
  devices `native_sums`;
- `files` are written whole or not at all.
"""

from kernels import arithmetic_file, fixpipe, floats, fractal, probe, reference, tiling
from kernels.arithmetic import (
    AMD_CDNA1,
    AMD_CDNA2,
    AMD_CDNA3,
    ASCEND_910C,
    ASCEND_910C_CANDIDATES,
    ASCEND_910C_HF32,
    FP32_FMA_CHAIN,
    NVIDIA_ADA,
    NVIDIA_AMPERE,
    NVIDIA_BLACKWELL,
    NVIDIA_HOPPER,
    NVIDIA_TURING,
    NVIDIA_VOLTA,
    PRESETS,
    X86_AVX512_BF16,
    Arithmetic,
)
from kernels.dot import dot_general
from kernels.matmul import matmul
from kernels.tiling import Tiling

__all__ = [
    "AMD_CDNA1",
    "AMD_CDNA2",
    "AMD_CDNA3",
    "ASCEND_910C",
    "ASCEND_910C_CANDIDATES",
    "ASCEND_910C_HF32",
    "FP32_FMA_CHAIN",
    "NVIDIA_ADA",
    "NVIDIA_AMPERE",
    "NVIDIA_BLACKWELL",
    "NVIDIA_HOPPER",
    "NVIDIA_TURING",
    "NVIDIA_VOLTA",
    "PRESETS",
    "X86_AVX512_BF16",
    "Arithmetic",
    "Tiling",
    "arithmetic_file",
    "dot_general",
    "fixpipe",
    "floats",
    "fractal",
    "matmul",
    "probe",
    "reference",
    "tiling",
]
