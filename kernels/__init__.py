"""The arithmetic of one matrix unit: what it is, and matrix products that have its bits."""

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
