"""How fast are matrix products with a unit's bits, against XLA's own dots in the same run?

One JSON line per case: billions of multiply-adds per second (median), the ratio to XLA's BF16->FP32
dot and to its FP32 dot of the same shape and values, how many times slower than the same unit on
N(0,1) values, the seconds to compile, and the memory in use over that of operands and result.

Run: `python bench/matmul_speed.py [sizes] [units] [data] [batches] [--full]` (all four by default).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels

BATCHED = (((2,), (1,)), ((0,), (0,)))

# Drawn in FP32 and rounded to their type afterwards, so that exponents spread as in real data.
DATA: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape, np.float32),
    "integers": lambda rng, shape: rng.integers(-8, 9, shape).astype(np.float32),
    "relu": lambda rng, shape: np.maximum(rng.standard_normal(shape, np.float32), 0),
    "softmax": lambda rng, shape: (
        np.exp(-8 * np.abs(rng.standard_normal(shape, np.float32))) * (rng.random(shape) < 0.5)
    ),
    "gradient": lambda rng, shape: (
        np.float32(1e-8)
        * rng.standard_normal(shape, np.float32)
        * np.exp(3 * rng.standard_normal(shape, np.float32))
    ),
    "outlier row": lambda rng, shape: (
        rng.standard_normal(shape, np.float32)
        * np.where(np.arange(shape[-2]) == 0, np.float32(1e30), np.float32(1))[:, None]
    ),
    "cancelling": lambda rng, shape: _cancelling(rng, shape),
    "powers of two": lambda rng, shape: (
        np.exp2(rng.integers(-12, 13, shape)) * rng.choice([-1.0, 1.0], shape)
    ),
    # Made to be slow: sums that are ties on one scale and on others below it.
    "several scales": lambda rng, shape: (
        rng.choice([-1.0, 1.0], shape)
        * np.exp2(-25.0 * rng.integers(0, 5, shape) * (rng.random(shape) < 0.6))
    ),
    "wide": lambda rng, shape: (
        rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-12, 13, shape))
    ),
    "very wide": lambda rng, shape: (
        rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-40, 41, shape))
    ),
    "spread to 2^60": lambda rng, shape: (
        rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-60, 61, shape))
    ),
    "specials": lambda rng, shape: _with_specials(rng, rng.standard_normal(shape, np.float32)),
    "tiny sums": lambda rng, shape: rng.standard_normal(shape, np.float32) * 2.0**-74,
    "a tenth large": lambda rng, shape: np.where(
        rng.random(shape) < 0.1,
        rng.choice([-(2.0**60), 2.0**60], shape),
        rng.standard_normal(shape),
    ),
    "a tenth subnormal": lambda rng, shape: _with_subnormals(rng, shape, 0.1),
    "nearly half subnormal": lambda rng, shape: _with_subnormals(rng, shape, 0.45),
    "small": lambda rng, shape: rng.standard_normal(shape, np.float32) * 2.0**-61,
    "rows of all sizes": lambda rng, shape: (
        rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-60, 1, (*shape[:-1], 1)))
    ),
    "one NaN": lambda rng, shape: _with_one_nan(rng.standard_normal(shape, np.float32)),
    "finite bit patterns": lambda rng, shape: _patterns(rng, shape, finite=True),
    "bit patterns": lambda rng, shape: _patterns(rng, shape, finite=False),
}


# Otherwise b is normal.
OF_BOTH = frozenset(
    ("very wide", "tiny sums", "a tenth large", "a tenth subnormal", "nearly half subnormal")
    + ("small", "rows of all sizes", "finite bit patterns", "bit patterns", "several scales")
)


class Case(NamedTuple):
    unit: str
    data: str
    operands: str
    shape: tuple[int, int, int, int]  # batch, m, k, n


BF16 = "bf16 x bf16"
SQUARE = (1, 1024, 1024, 1024)


def cases(questions: list[str], full: bool) -> Iterator[Case]:
    if "sizes" in questions:
        for size in (256, 512, 1024, 2048) + ((4096,) if full else ()):
            yield Case("ASCEND_910C", "normal", BF16, (1, size, size, size))
            yield Case("NVIDIA_HOPPER", "normal", BF16, (1, size, size, size))
    if "units" in questions:
        for name, unit in kernels.PRESETS.items():
            operands = BF16 if "bfloat16" in unit.dtypes else "f16 x f16"
            yield Case(name, "normal", operands, SQUARE)
        for name in ("ASCEND_910C", "ASCEND_910C_HF32", "NVIDIA_HOPPER", "FP32_FMA_CHAIN"):
            yield Case(name, "normal", "f32 x f32", SQUARE)
        for name in kernels.ASCEND_910C_CANDIDATES if full else ():
            yield Case(f"ASCEND_910C/{name}", "normal", BF16, SQUARE)
    if "data" in questions:
        for name in ("ASCEND_910C", "NVIDIA_HOPPER", "FP32_FMA_CHAIN", "X86_AVX512_BF16"):
            for data in DATA:
                yield Case(name, data, BF16, SQUARE)
    if "batches" in questions:
        for shape in (
            (384, 64, 512, 512),
            (384, 64, 16, 64),
            (384, 64, 64, 16),
            (8, 3072, 128, 64),
        ):
            yield Case("ASCEND_910C", "normal", BF16, shape)
        yield Case("ASCEND_910C", "normal", "f32 x bf16", (8, 1024, 128, 64))


def _cancelling(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Neighbours along K cancel but for a residue, against operands whose neighbours are equal."""
    values = rng.standard_normal(shape, np.float32)
    values[..., 1::2] = -values[..., 0::2] * (
        1 + 2.0**-7 * (rng.random(values[..., 0::2].shape) < 0.1)
    )
    return values


def _with_subnormals(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """Of BF16, among normal numbers."""
    subnormal = rng.integers(1, 128, shape) * rng.choice([-1, 1], shape) * 2.0**-133
    return np.where(rng.random(shape) < share, subnormal, rng.standard_normal(shape))


def _with_one_nan(values: np.ndarray) -> np.ndarray:
    values[(0,) * values.ndim] = np.nan
    return values


def _with_specials(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """About one to each row: infinities, NaNs, zeros of both signs and largest numbers."""
    place = rng.random(values.shape) < 1 / values.shape[-1]
    largest = float(jnp.finfo(jnp.bfloat16).max)
    some = [np.inf, -np.inf, np.nan, 0.0, -0.0, largest, -largest]
    values[place] = rng.choice(some, np.count_nonzero(place))
    return values


def _patterns(rng: np.random.Generator, shape: tuple[int, ...], finite: bool) -> np.ndarray:
    words = rng.integers(0, 1 << 16, shape, dtype=np.uint32) << 16
    if finite:
        words = np.where((words & 0x7F800000) == 0x7F800000, words & 0xBFFFFFFF, words)
    return words.view(np.float32)


def median_walls_s(funs: Sequence[Callable[[], jax.Array]], repeats: int) -> list[float]:
    """Of each, measured in turn, so that all have their share of a machine's slower minutes."""
    walls: list[list[float]] = [[] for _ in funs]
    for fun in funs:
        fun().block_until_ready()
    for _ in range(repeats):
        for fun, taken in zip(funs, walls, strict=True):
            start = time.perf_counter()
            fun().block_until_ready()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in walls]


def operands_of(case: Case) -> tuple[jax.Array, jax.Array]:
    batch, m, k, n = case.shape
    rng = np.random.default_rng(0)
    types = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
    left, right = (types[name] for name in case.operands.split(" x "))
    a = jnp.asarray(DATA[case.data](rng, (batch, m, k)), left)
    b = rng.standard_normal((batch, k, n), np.float32)
    if case.data == "cancelling":
        b[:, 1::2] = b[:, 0::2]
    elif case.data in OF_BOTH:
        b = DATA[case.data](rng, (batch, k, n))
    return a, jnp.asarray(b, right)


def unit_named(name: str) -> kernels.Arithmetic:
    family, _, candidate = name.partition("/")
    return kernels.ASCEND_910C_CANDIDATES[candidate] if candidate else kernels.PRESETS[family]


def measure(case: Case, repeats: int) -> dict:
    batch, m, k, n = case.shape
    a, b = operands_of(case)

    def xla(dtype: jnp.dtype) -> float:
        x, y = a.astype(dtype), b.astype(dtype)
        dot = jax.jit(
            lambda x, y: lax.dot_general(x, y, BATCHED, preferred_element_type=jnp.float32)
        )
        return median_walls_s([lambda: dot(x, y)], repeats)[0]

    start = time.perf_counter()
    product = jax.jit(lambda a, b: kernels.matmul(a, b, arithmetic=unit_named(case.unit)))
    compiled = product.lower(a, b).compile()
    compile_s = time.perf_counter() - start
    runs = [lambda: compiled(a, b)]
    if case.data != "normal":
        normal = operands_of(case._replace(data="normal"))
        runs.append(lambda: compiled(*normal))
    wall_s, *others = median_walls_s(runs, repeats)
    memory = compiled.memory_analysis()
    needed = a.nbytes + b.nbytes + 4 * batch * m * n
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    answer = case._asdict() | {
        "gmac_per_s": round(batch * m * k * n / wall_s / 1e9, 2),
        "ratio_to_xla_bf16": round(xla(jnp.bfloat16) / wall_s, 3),
        "ratio_to_xla_f32": round(xla(jnp.float32) / wall_s, 3),
        "compile_wall_s": round(compile_s, 2),
        "memory_ratio": round(used / needed, 2),
    }
    if others:
        answer["times_slower_than_normal"] = round(wall_s / others[0], 2)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    questions = ["sizes", "units", "data", "batches"]
    parser.add_argument("questions", nargs="*", help=f"some of {', '.join(questions)}")
    parser.add_argument("--full", action="store_true", help="4096^3 and the candidates as well")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.questions) - set(questions):
        parser.error(f"unknown questions {sorted(unknown)}; known: {', '.join(questions)}")
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
    for case in cases(options.questions or questions, options.full):
        print(json.dumps(measure(case, options.repeats) | host), flush=True)


if __name__ == "__main__":
    main()
