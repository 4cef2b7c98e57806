"""One device's time: matmul, vector and memory operations -> seconds. No JAX here.

`matmul` divides a product over dies (`tilings`) and asks `pipeline` for one die, engine by engine,
after `arguments`; `vector` has kernels of the vector units, `attention` the fused one.
"""

from emulator.chip.attention import Attention, AttentionTime, attention_time
from emulator.chip.matmul import MatmulTime, die_share, matmul_time
from emulator.chip.vector import PLAIN, Spread, VectorTime, lane_factor, vector_time

__all__ = [
    "PLAIN",
    "Attention",
    "AttentionTime",
    "MatmulTime",
    "Spread",
    "VectorTime",
    "attention_time",
    "die_share",
    "lane_factor",
    "matmul_time",
    "vector_time",
]
