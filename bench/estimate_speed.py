"""How long does it take to estimate a program of 10,000 operations, with and without tracing?

The program mixes element-wise work, reductions, matmuls, layout changes and collectives, half of it
inside a `shard_map` over all 384 devices and half outside; every layer has a shape of its own, so
that few answers come from a cache. Tracing is JAX's own work and timed apart: `first_s` and
`again_s` are estimates of a function that JAX has traced already (`again_s` the best of several).
`total_s` is an estimate of a function that is new to JAX, and `make_jaxpr_s` what `jax.make_jaxpr`
alone takes of another such, both after JAX has seen these shapes. One JSON line per case.

    python bench/estimate_speed.py [--operations 10000] [--repeat 3] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a checkout too

import emulator as em  # noqa: E402
from emulator.program.trace import trace, walk  # noqa: E402

PER_BLOCK = 20  # roughly, in equations


def block(x: Any, i: int) -> Any:
    """About twenty operations: a layer's worth of everything."""
    n = 64 + 8 * i
    w = jnp.full((x.shape[1], n), 0.01, x.dtype)
    h = jax.nn.gelu(x @ w)
    h = jax.nn.softmax(h.astype(jnp.float32) - h.max(axis=1, keepdims=True), axis=1)
    h = (h.T * 0.5).T.astype(x.dtype)
    return x + h @ w.T


def inside(blocks: int, mesh: Any) -> Callable[..., Any]:
    def body(x: Any) -> Any:
        for i in range(blocks):
            x = block(x, i)
            if i % 3 == 0:
                x = lax.psum(x, "tp")
            if i % 3 == 1:
                x = lax.all_gather(x, "dp", tiled=True)[: x.shape[0]]
        return x

    return jax.shard_map(body, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), check_vma=False)


def outside(blocks: int, mesh: Any) -> Callable[..., Any]:
    place = jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"))

    def body(x: Any) -> Any:
        x = place(x)
        for i in range(blocks):
            x = block(x, i)
            x = x / (1 + jnp.abs(x).sum())
        return x

    return body


def gradient(blocks: int, mesh: Any) -> Callable[..., Any]:
    forward = inside(-(-blocks // 3), mesh)
    return jax.grad(lambda x: forward(x).astype(jnp.float32).sum())


def chain(blocks: int, mesh: Any) -> Callable[..., Any]:
    """Nothing but element-wise work: one kernel in the end."""

    def body(x: Any) -> Any:
        for i in range(blocks * PER_BLOCK // 2):
            x = jnp.sin(x) * (1 + i % 7)
        return x

    return jax.shard_map(body, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"))


def collectives(blocks: int, mesh: Any) -> Callable[..., Any]:
    """Nothing but collectives, each of another size."""

    def body(x: Any) -> Any:
        for i in range(blocks * PER_BLOCK // 2):
            x = x.at[: 1 + i % 100].set(lax.psum(x[: 1 + i % 100], "tp"))
        return x

    return jax.shard_map(body, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), check_vma=False)


def mixed(blocks: int, mesh: Any) -> Callable[..., Any]:
    first, second = inside(blocks // 2, mesh), outside(blocks // 2, mesh)
    return lambda x: second(first(x))


def best(fun: Callable[[], Any], repeat: int) -> float:
    walls = []
    for _ in range(repeat):
        began = time.perf_counter()
        fun()
        walls.append(time.perf_counter() - began)
    return min(walls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the first case's time goes")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    on = em.cloudmatrix384()
    mesh = on.mesh(dp=48, tp=8)
    x = jax.ShapeDtypeStruct((48 * 128, 512), jnp.bfloat16)
    cases = (mixed, inside, outside, gradient, chain, collectives)
    for make in cases:
        name = make.__name__
        count = _blocks(make, mesh, x, options.operations)
        fun = jax.jit(make(count, mesh))  # jit keeps the trace, so that `estimate` finds it
        began = time.perf_counter()
        operations = sum(1 for _ in walk(trace(fun, (x,)).jaxpr))
        trace_s = time.perf_counter() - began
        began = time.perf_counter()
        estimate = em.estimate(fun, x, on=on)
        cold_s = time.perf_counter() - began
        warm_s = best(lambda f=fun: em.estimate(f, x, on=on), options.repeat)
        alone_s = best(lambda f=make, n=count: jax.make_jaxpr(f(n, mesh))(x), 1)
        total_s = best(lambda f=make, n=count: em.estimate(f(n, mesh), x, on=on), 1)
        print(
            json.dumps(
                {
                    "case": name,
                    "operations": operations,
                    "steps": len(estimate.steps),
                    "trace_s": round(trace_s, 3),
                    "first_s": round(cold_s, 3),
                    "again_s": round(warm_s, 3),
                    "make_jaxpr_s": round(alone_s, 3),
                    "total_s": round(total_s, 3),
                    "of_tracing": round(cold_s / trace_s, 3),
                    "us_per_operation": round(cold_s / operations * 1e6, 1),
                    "jax": jax.__version__,
                    "commit": commit,
                }
            )
        )
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(em.estimate, fun, x, on=on)
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
            return


def _blocks(make: Callable[..., Any], mesh: Any, x: Any, operations: int) -> int:
    """How many blocks make so many equations."""
    few = [sum(1 for _ in walk(trace(make(n, mesh), (x,)).jaxpr)) for n in (12, 24)]
    return 12 + -(-(operations - few[0]) * 12 // (few[1] - few[0]))


if __name__ == "__main__":
    main()
