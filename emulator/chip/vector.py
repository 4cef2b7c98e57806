"""Seconds of vector-unit kernels on one device: element-wise chains, reductions, layout changes,
gathers, sorts.
"""

from __future__ import annotations

import dataclasses
import functools

from emulator.machines import Machine


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VectorTime:
    """One kernel's duration; compute and memory traffic overlap, the launch does not."""

    time_s: float
    bound_s: float
    limited_by: str
    compute_s: float
    memory_s: float
    launch_s: float


@functools.lru_cache(maxsize=65536)
def vector_time(lane_ops: int, nbytes: int, on: Machine, launches: int = 1) -> VectorTime:
    """Time in seconds of one kernel on one device of `on`.

    Args:
        lane_ops: FP32 operations, each one lane for one cycle (see `lane_factor` for other types).
        nbytes: memory traffic, reads and writes together.
        launches: kernel starts; 0 for work that rides along with another kernel.

    A device of several dies divides both evenly. The peak counts a multiply-add as two, so single
    operations run at half of it; the bound is taken at the full one.

    Raises:
        ValueError: negative work.
    """
    if lane_ops < 0 or nbytes < 0 or launches < 0:
        raise ValueError(
            f"vector_time(lane_ops={lane_ops}, nbytes={nbytes}, launches={launches}): expected "
            "counts of at least 0"
        )
    chip, dies = on.chip, on.dies_per_device
    peak = dies * chip.vector_flops_per_s("float32")
    compute_s = lane_ops / (peak / 2)
    memory_s = nbytes / (dies * chip.usable_memory_bytes_per_s)
    launch_s = launches * chip.launch_s
    limits = {"vector": compute_s, "memory": memory_s, "launch": launch_s}
    return VectorTime(
        time_s=max(compute_s, memory_s) + launch_s,
        bound_s=max(lane_ops / peak, nbytes / (dies * chip.memory_bytes_per_s)),
        limited_by=max(limits, key=lambda name: limits[name]),
        compute_s=compute_s,
        memory_s=memory_s,
        launch_s=launch_s,
    )


@functools.lru_cache(maxsize=1024)
def lane_factor(dtype: str, on: Machine) -> float:
    """FP32 lane operations that one operation on an element of `dtype` costs.

    Raises:
        NotImplementedError: the vector units have no rate for `dtype`.
    """
    chip = on.chip
    if dtype.startswith("key<"):  # pairs of 32-bit words
        return 2 * lane_factor("uint32", on)
    if dtype == "complex64":  # real and imaginary part; a product takes four
        return 4.0
    if dtype.startswith(("float8", "float4", "float6", "int4", "uint4", "int2", "uint2")):
        return lane_factor("int8", on)  # only conversions exist for these
    return chip.vector_flops_per_s("float32") / chip.vector_flops_per_s(dtype)
