"""How long do 384 devices folded into one take, beside the same program natively on 384?

Three kinds of program over all 384 devices: a matmul in blocks (in two sizes), attention with heads
divided, and a training step of an MLP with tensor and data parallelism. Natively each
runs on 384 forced host devices, which share this host's cores as the emulation does; emulated it
runs on one, with the cube's arithmetic and with XLA's own matmuls. Every case has a process of its
own. "time" is the other reading: what `em.estimate` takes, tracing included.

    python bench/fold_speed.py            prints one JSON line per case, then the ratios
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import emulator as em

WAYS = ("native", "cube", "xla", "time")
TRACES = 101
PATIENCE_S = 300  # natively a program may wait for ever: XLA:CPU has threads for 256 devices

AnyMesh = Mesh | AbstractMesh
Program = tuple[Callable[..., Any], list[Any], Any, Any, int]
"""A local function, its arguments, in_specs, out_specs, and multiply-adds over all devices."""


def normal(seed: int, shape: tuple[int, ...]) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def matmul(n: int) -> Program:
    def local(a: Any, b: Any) -> Any:
        rows = lax.all_gather(a, "tp", axis=1, tiled=True)
        return jnp.matmul(rows, b, preferred_element_type=jnp.float32)

    arguments = [normal(0, (n, n)), normal(1, (n, n))]
    return local, arguments, (P("dp", "tp"), P(None, "tp")), P("dp", "tp"), n**3


def attention(length: int, width: int) -> Program:
    def local(q: Any, k: Any, v: Any, w: Any) -> Any:
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / width**0.5).astype(jnp.bfloat16)
        heads = jnp.einsum("bhqk,bhkd->bqhd", weights, v)
        out = jnp.einsum("bqhd,hdo->bqo", heads, w, preferred_element_type=jnp.float32)
        return lax.psum(out, "tp")

    q, k, v = (normal(i, (48, 8, length, width)) for i in range(3))
    heads = P("dp", "tp")
    count = 48 * 8 * (2 * length**2 * width + length * width * width * 8)
    return (
        local,
        [q, k, v, normal(3, (8, width, 8 * width))],
        (*[heads] * 3, P("tp")),
        P("dp"),
        count,
    )


def mlp(tokens: int, width: int, hidden: int) -> Program:
    def local(x: Any, w1: Any, w2: Any) -> Any:
        def loss(w1: Any, w2: Any) -> Any:
            y = lax.psum(jax.nn.relu(x @ w1) @ w2, "tp")
            return jnp.mean(jnp.square((x - y).astype(jnp.float32)))

        grads = jax.grad(loss, (0, 1))(w1, w2)
        summed = [lax.pmean(g.astype(jnp.float32), "dp") for g in grads]
        return [w - (0.1 * g).astype(w.dtype) for w, g in zip((w1, w2), summed, strict=True)]

    arguments = [normal(0, (48 * tokens, width)), normal(1, (width, hidden))]
    specs = (P("dp"), P(None, "tp"), P("tp"))
    count = 5 * 48 * tokens * width * hidden  # no gradient for x
    return local, [*arguments, normal(2, (hidden, width))], specs, list(specs[1:]), count


PROGRAMS: dict[str, Callable[[], Program]] = {
    "matmul": lambda: matmul(1536),
    "attention": lambda: attention(128, 64),
    "mlp": lambda: mlp(32, 256, 512),
    "large matmul": lambda: matmul(2304),
}


def measured(name: str, way: str, repeats: int) -> dict[str, Any]:
    """Seconds of tracing (and of JAX's own), lowering, compiling and a step, in a process that has
    compiled something that way before, which takes "start_s"; for "time" of an estimate.
    """
    machine = em.cloudmatrix384()

    def made(mesh: AnyMesh) -> tuple[Callable[..., Any], list[Any], Any, int]:
        local, arguments, in_specs, out_specs, count = PROGRAMS[name]()
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(local, mesh=mesh, **specs, check_vma=False), arguments, in_specs, count

    virtual, arguments, in_specs, count = made(machine.mesh(dp=48, tp=8))
    if way == "time":
        began = time.perf_counter()
        jax.make_jaxpr(virtual)(*arguments)
        traced = time.perf_counter()
        answer = em.estimate(virtual, *arguments, on=machine)
        wall_s = time.perf_counter() - traced
        return {
            "trace_s": round(traced - began, 3),
            "estimate_s": round(wall_s, 3),
            "pod_s": answer.time_s,
        }

    def emulated(program: Callable[..., Any]) -> Callable[..., Any]:
        return em.emulate(program, on=machine, arithmetic="native" if way == "xla" else None)

    found: dict[str, Any] = {"multiply_adds": count}
    if way == "native":
        mesh = jax.make_mesh((48, 8), ("dp", "tp"))
        step = jax.jit(made(mesh)[0])
        arguments = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arguments, in_specs, strict=True)
        ]
        jax.jit(jnp.matmul)(jnp.ones((8, 8)), jnp.ones((8, 8)))  # as much as it takes to start
    else:
        began = time.perf_counter()
        jax.jit(emulated(made_small(machine)))(jnp.ones((8, 8)), jnp.ones((8, 8)))
        found["start_s"] = round(time.perf_counter() - began, 3)
        step = jax.jit(emulated(virtual))
    traced = step.trace(*arguments)
    marks = [time.perf_counter()]
    lowered = traced.lower()
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())
    lower_s, compile_s = (b - a for a, b in zip(marks, marks[1:], strict=False))
    jax.block_until_ready(compiled(*arguments))
    walls = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        walls.append(time.perf_counter() - began)
    found["lower_s"], found["compile_s"] = round(lower_s, 3), round(compile_s, 3)
    found["step_s"] = round(statistics.median(walls), 4)
    if way != "native":
        own, with_ours = [], []
        for _ in range(TRACES):  # anew each time, by turns, for JAX remembers
            program = made(machine.mesh(dp=48, tp=8))[0]
            own.append(traced_s(jax.jit(program), arguments))
            program = made(machine.mesh(dp=48, tp=8))[0]
            with_ours.append(traced_s(jax.jit(emulated(program)), arguments))
        found["own_trace_s"] = round(statistics.median(own), 5)
        found["trace_s"] = round(statistics.median(with_ours), 5)
    return found


def made_small(machine: em.Machine) -> Callable[..., Any]:
    """A program for which everything is loaded that programs of matmuls and sums need."""
    return jax.shard_map(
        lambda a, b: lax.psum(a @ b, "x"),
        mesh=machine.mesh(x=2),
        in_specs=(P(None, "x"), P("x")),
        out_specs=P(),
    )


def traced_s(jitted: Any, arguments: list[Any]) -> float:
    """Seconds of this thread that tracing takes."""
    gc.collect()
    gc.disable()  # a collection takes longer than tracing, and comes when it likes
    began = time.thread_time()
    jitted.trace(*arguments)
    wall_s = time.thread_time() - began
    gc.enable()
    return wall_s


def in_a_process(name: str, way: str, repeats: int) -> dict[str, Any]:
    environment = {**os.environ}
    if way == "native":
        flag = "--xla_force_host_platform_device_count=384"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
    command = [sys.executable, __file__, "--case", name, way, "--repeats", str(repeats)]
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
    except subprocess.TimeoutExpired:
        return {"waited_s": PATIENCE_S}
    except subprocess.CalledProcessError as error:
        if way != "native":
            raise
        return {"exit_status": error.returncode}  # XLA:CPU gives up after a while of waiting
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", nargs=2, metavar=("PROGRAM", "WAY"), help="in this process")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(*options.case, options.repeats)))
        return
    for name in PROGRAMS:
        found = {}
        for way in WAYS:
            found[way] = in_a_process(name, way, options.repeats)
            about = {"jax": jax.__version__, "cores": os.cpu_count()}
            print(json.dumps({"program": name, "way": way, **found[way], **about}), flush=True)
        if "step_s" in found["native"]:
            for way in ("cube", "xla"):
                ours, native = found[way], found["native"]
                built = [x["lower_s"] + x["compile_s"] for x in (ours, native)]
                ratios = {
                    "step": round(ours["step_s"] / native["step_s"], 2),
                    "compile": round(built[0] / built[1], 2),
                    "trace": round(ours["trace_s"] / ours["own_trace_s"], 2),
                }
                print(json.dumps({"program": name, "ratio_to_native": way, **ratios}), flush=True)


if __name__ == "__main__":
    main()
