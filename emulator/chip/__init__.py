"""One device's time: matmul, vector and memory operations -> seconds. No JAX here."""

from emulator.chip.matmul import MatmulTime, die_share, matmul_time
from emulator.chip.vector import VectorTime, lane_factor, vector_time

__all__ = ["MatmulTime", "VectorTime", "die_share", "lane_factor", "matmul_time", "vector_time"]
