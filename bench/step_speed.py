"""How much slower is the emulated training step than the same step run natively by XLA?

The step is `cm384 run transformer` (tiny) over dp=48 x tp=8. Natively it runs on 384 forced host
devices, which share this host's cores as the emulation does. XLA:CPU lets at most 256 of them wait
inside a collective, so one program with a 48-way `psum` can stop for ever; natively the step is
therefore three programs (gradients, their all-reduce, Adam), each of which is timed with the rest.

    python bench/step_speed.py            prints one JSON line per case
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

DP, TP = 48, 8


def timed(step: Callable[..., Any], start: tuple[Any, Any], repeats: int) -> dict[str, Any]:
    """Median wall seconds of `step` after one warm-up call, and the losses on the way."""
    import jax

    from emulator.workloads import transformer

    params, state = start
    batches = transformer.batches(transformer.SIZES["tiny"], DP)
    walls, losses = [], []
    began = time.perf_counter()
    for _ in range(repeats + 1):
        tokens = next(batches)
        params, state, loss = jax.block_until_ready(step(params, state, tokens))
        walls.append(time.perf_counter() - began)
        losses.append(float(loss))
        began = time.perf_counter()
    return {
        "first_call_wall_s": round(walls[0], 3),
        "step_wall_s": round(statistics.median(walls[1:]), 4),
        "losses": losses,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def native(repeats: int) -> dict[str, Any]:
    """The step on 384 host devices."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from emulator.workloads import transformer as t

    config = t.SIZES["tiny"]
    mesh = jax.make_mesh((DP, TP), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    spec = t.specs(config)
    state_spec = t.AdamState(spec, spec, P())
    grads_spec = (P(), spec)
    # Between the programs each replica's buckets stand beside each other along a leading axis.
    local_spec, summed_spec = [P("dp", "tp"), P("dp")], [P("tp"), P()]

    def over_mesh(fun: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.jit(jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs))

    def gradients(params: Any, tokens: Any) -> Any:
        buckets = t.pack(grads_spec, t.local_gradients(config, params, tokens))
        return [bucket[None] for bucket in buckets]

    def all_reduce(buckets: Any) -> Any:
        return [lax.psum(bucket[0], "dp") for bucket in buckets]

    def update(params: Any, state: Any, buckets: Any) -> Any:
        loss, grads = t.unpack(grads_spec, (jnp.float32(0), params), buckets)
        return *t.adam(config, params, state, jax.tree.map(lambda g: g / DP, grads)), loss / DP

    first = over_mesh(gradients, (spec, P("dp")), local_spec)
    second = over_mesh(all_reduce, (local_spec,), summed_spec)
    third = over_mesh(update, (spec, state_spec, summed_spec), (spec, state_spec, P()))

    def step(params: Any, state: Any, tokens: Any) -> Any:
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("dp")))
        local = jax.block_until_ready(first(params, tokens))
        return third(params, state, jax.block_until_ready(second(local)))

    def place(values: Any, specs: Any) -> Any:
        to = jax.tree.map(lambda p: NamedSharding(mesh, p), specs, is_leaf=_is_spec)
        return jax.device_put(values, to)

    params, state = t.initial(config, DP, TP)
    return timed(step, (place(params, spec), place(state, state_spec)), repeats)


def emulated(repeats: int, arithmetic: str | None) -> dict[str, Any]:
    """The step on this process's own devices, through `em.emulate`."""
    import jax

    import emulator as em
    from emulator.workloads import transformer as t

    machine = em.cloudmatrix384()
    step = t.train_step(t.SIZES["tiny"], machine.mesh(dp=DP, tp=TP))
    run = jax.jit(em.emulate(step, on=machine, arithmetic=arithmetic))
    return timed(run, t.initial(t.SIZES["tiny"], DP, TP), repeats)


def estimated(repeats: int) -> dict[str, Any]:
    """Tracing and estimating the same step, from shapes."""
    import emulator as em
    from emulator.workloads import transformer as t

    machine, config = em.cloudmatrix384(), t.SIZES["tiny"]
    walls = []
    for _ in range(repeats):
        shapes = t.shapes(config, DP, TP)
        began = time.perf_counter()
        answer = em.estimate(t.train_step(config, machine.mesh(dp=DP, tp=TP)), *shapes, on=machine)
        walls.append(time.perf_counter() - began)
    return {
        "first_call_wall_s": round(walls[0], 3),
        "estimate_wall_s": round(statistics.median(walls), 4),
        "pod_time_s": answer.time_s,
    }


def _is_spec(x: Any) -> bool:
    from jax.sharding import PartitionSpec

    return isinstance(x, PartitionSpec)


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "native": native,
    "emulated_native_matmuls": lambda repeats: emulated(repeats, "native"),
    "emulated_cube": lambda repeats: emulated(repeats, None),
    "estimate": estimated,
}


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=CASES, help="run this one in this process")
    options = parser.parse_args()
    if options.case:
        import jax

        about = {"jax": jax.__version__, "commit": commit(), "cores": os.cpu_count()}
        result = CASES[options.case](options.repeats)
        print(json.dumps({"case": options.case, **result, **about, "host": platform.machine()}))
        return
    walls = {}
    for case in CASES:  # a process each: the native one has 384 devices
        environment = {**os.environ}
        if case == "native":
            flag = f"--xla_force_host_platform_device_count={DP * TP}"
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
        line = subprocess.run(
            [sys.executable, __file__, "--case", case, "--repeats", str(options.repeats)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.strip()
        print(line, flush=True)
        walls[case] = json.loads(line).get("step_wall_s")
    for case in ("emulated_native_matmuls", "emulated_cube"):
        print(
            json.dumps({"ratio_to_native": case, "ratio": round(walls[case] / walls["native"], 2)})
        )


if __name__ == "__main__":
    main()
