"""How fast are matrix products with a unit's bits, against XLA's own dots in the same run?

One JSON line per case: billions of multiply-adds per second (median), the ratio to XLA's BF16->FP32
dot and to its FP32 dot, and the seconds to compile. Run: `python bench/matmul_speed.py [--full]`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels

Shape = tuple[int, int, int, int]
BATCHED = (((2,), (1,)), ((0,), (0,)))

# (preset, data, operand types, [batch, m, k, n])
CASES: list[tuple[str, str, str, Shape]] = [
    ("ASCEND_910C", "normal", "bf16 x bf16", (1, 256, 256, 256)),
    ("ASCEND_910C", "normal", "bf16 x bf16", (1, 1024, 1024, 1024)),
    ("ASCEND_910C", "normal", "bf16 x bf16", (384, 64, 16, 64)),
    ("ASCEND_910C", "normal", "bf16 x bf16", (8, 3072, 128, 64)),
    ("ASCEND_910C", "gradient", "bf16 x bf16", (8, 3072, 128, 64)),
    ("ASCEND_910C", "softmax", "bf16 x bf16", (384, 64, 64, 16)),
    ("ASCEND_910C", "wide", "bf16 x bf16", (1, 1024, 1024, 1024)),
    ("ASCEND_910C", "normal", "f32 x bf16", (8, 1024, 128, 64)),
    ("ASCEND_910C", "normal", "f32 x f32", (8, 1024, 128, 64)),
    ("FP32_FMA_CHAIN", "normal", "bf16 x bf16", (1, 1024, 1024, 1024)),
    ("NVIDIA_HOPPER", "normal", "bf16 x bf16", (1, 512, 512, 512)),
]
FULL: list[tuple[str, str, str, Shape]] = [
    ("ASCEND_910C", "normal", "bf16 x bf16", (1, 2048, 2048, 2048)),
    ("ASCEND_910C", "normal", "bf16 x bf16", (1, 4096, 4096, 4096)),
    ("ASCEND_910C", "normal", "bf16 x bf16", (384, 64, 512, 512)),
    ("ASCEND_910C", "subnormal", "bf16 x bf16", (1, 256, 256, 256)),
    ("NVIDIA_HOPPER", "normal", "bf16 x bf16", (1, 1024, 1024, 1024)),
]


def draw(data: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values in FP32; rounded to their type afterwards, so that exponents spread as real ones."""
    normal = rng.standard_normal(shape, np.float32)
    match data:
        case "normal":
            return normal
        case "wide":
            return normal * np.exp2(rng.integers(-12, 13, shape)).astype(np.float32)
        case "gradient":
            return np.float32(1e-8) * normal * np.exp(3 * rng.standard_normal(shape, np.float32))
        case "softmax":
            return np.exp(-8 * np.abs(normal)) * (rng.random(shape) < 0.5)
        case "subnormal":
            return normal * np.float32(2.0**-127)
    raise ValueError(f"unknown data {data!r}")


def median_wall_s(fun: Callable[[], jax.Array], repeats: int) -> float:
    fun().block_until_ready()
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        fun().block_until_ready()
        walls.append(time.perf_counter() - start)
    return statistics.median(walls)


def measure(preset: str, data: str, types: str, shape: Shape, repeats: int) -> dict:
    batch, m, k, n = shape
    rng = np.random.default_rng(0)
    dtypes = [{"bf16": jnp.bfloat16, "f32": jnp.float32}[name] for name in types.split(" x ")]
    a = jnp.asarray(draw(data, rng, (batch, m, k)), dtypes[0])
    b = jnp.asarray(draw("normal", rng, (batch, k, n)), dtypes[1])

    def xla(dtype: jnp.dtype) -> float:
        x, y = a.astype(dtype), b.astype(dtype)
        dot = jax.jit(
            lambda x, y: lax.dot_general(x, y, BATCHED, preferred_element_type=jnp.float32)
        )
        return median_wall_s(lambda: dot(x, y), repeats)

    start = time.perf_counter()
    unit = (
        jax.jit(
            lambda a, b: kernels.dot_general(
                a,
                b,
                BATCHED,
                arithmetic=getattr(kernels, preset),
                preferred_element_type=jnp.float32,
            )
        )
        .lower(a, b)
        .compile()
    )
    compile_s = time.perf_counter() - start
    wall_s = median_wall_s(lambda: unit(a, b), repeats)
    work = batch * m * k * n
    return {
        "preset": preset,
        "data": data,
        "operands": types,
        "shape": shape,
        "gmac_per_s": round(work / wall_s / 1e9, 2),
        "ratio_to_xla_bf16": round(xla(jnp.bfloat16) / wall_s, 3),
        "ratio_to_xla_f32": round(xla(jnp.float32) / wall_s, 3),
        "compile_wall_s": round(compile_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the large shapes as well (minutes)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    host = {
        "commit": commit,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    for case in CASES + (FULL if options.full else []):
        print(json.dumps(measure(*case, options.repeats) | host), flush=True)


if __name__ == "__main__":
    main()
