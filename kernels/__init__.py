"""The arithmetic of one matrix unit: what it is, and matrix products that have its bits."""

from kernels import fixpipe, floats, reference
from kernels.arithmetic import ASCEND_910C, FP32_FMA_CHAIN, NVIDIA_HOPPER, Arithmetic
from kernels.dot import dot_general
from kernels.matmul import matmul

__all__ = [
    "ASCEND_910C",
    "FP32_FMA_CHAIN",
    "NVIDIA_HOPPER",
    "Arithmetic",
    "dot_general",
    "fixpipe",
    "floats",
    "matmul",
    "reference",
]
