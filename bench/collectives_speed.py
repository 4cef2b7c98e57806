"""How fast are collectives answered and executed, next to XLA's own on as many host devices?

Usage: python bench/collectives_speed.py [--peer]

Prints one JSON line per case. `--peer` also runs XLA's psum on 384 forced host devices (in a child
process), so that the executed all_reduce is given as a ratio in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEER = "--as-peer"
DEVICES, COUNT = 384, 131072  # 256 KiB of BF16 for each device


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def median_s(call: Callable[[], Any], repeats: int) -> float:
    wall_s = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wall_s.append(time.perf_counter() - start)
    return statistics.median(wall_s)


def report(case: str, **numbers: Any) -> None:
    import jax

    line = {"case": case, **numbers, "commit": commit(), "jax": jax.__version__}
    print(
        json.dumps(line | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}), flush=True
    )


# Limits that a person notices: seconds for the first answer, and for the same question again.
COLD_S = {
    ("all_reduce", "ring"): 5e-3,
    ("all_to_all", "full_mesh"): 50e-3,
    ("all_reduce", "best"): 1.0,
}
AGAIN_S = 50e-6


def answering() -> None:
    """Time of asking for a time: cold (nothing cached), and repeated, as shares of the limits."""
    from emulator.fabric import collective, expert_exchange
    from emulator.machines import cloudmatrix384

    collective("all_reduce", 2**20, cloudmatrix384(), range(4))  # imports
    for op, algorithm in (
        ("all_reduce", "ring"),
        ("all_to_all", "full_mesh"),
        ("all_reduce", "hierarchical"),
        ("all_reduce", "full_mesh"),
        ("all_reduce", None),
        ("all_reduce", "best"),
    ):
        asked(
            f"time of {op} by {algorithm or 'its rule'}, 384 devices, 1 GiB",
            lambda op=op, a=algorithm: collective(op, 2**30, cloudmatrix384(), algorithm=a),
            COLD_S.get((op, algorithm or "")),
        )
    asked(
        "time of dispatch, 768 dies, 128 tokens to 8 experts",
        lambda: expert_exchange("dispatch", 128, 8, 7680, on=cloudmatrix384("die")),
        None,
    )
    larger()


def larger() -> None:
    """8192 devices, and numbers that no level divides: every operation by every algorithm."""
    from emulator.collectives import ALGORITHMS
    from emulator.fabric import collective
    from emulator.machines import cloudmatrix384, custom_machine

    fabrics = (
        custom_machine("switch(8, 196GB/s, 1us) / switch(1024, 196GB/s, 1us)"),
        custom_machine("torus(8, 8, 8, 50GB/s, 0.3us) / switch(16, 196GB/s, 1us)"),
        cloudmatrix384(pods=22),
    )
    cases = [
        (fabrics[0], n, op, a)
        for n in (8192, 5000)
        for op in ALGORITHMS
        for a in (None, *ALGORITHMS[op])
    ]
    cases += [
        (fabric, 8191, op, a)
        for fabric in fabrics[1:]
        for op, a in (
            ("all_reduce", "ring"),
            ("all_reduce", "rhd"),
            ("all_reduce", "full_mesh"),
            ("all_to_all", "full_mesh"),
            ("all_to_all", "bruck"),
            ("all_to_all", "ring"),
            ("broadcast", "pipeline"),
        )
    ]
    for fabric, n, op, algorithm in cases:
        pairs = tuple((i, (i + 1) % n) for i in range(n)) if op == "permute" else None
        asked(
            f"time of {op} by {algorithm or 'its rule'}, {n} devices of {fabric.name}, 1 GiB",
            functools.partial(
                collective, op, 2**30, fabric, range(n), algorithm=algorithm, pairs=pairs
            ),
            1.0,
        )


def asked(case: str, question: Callable[[], Any], limit_s: float | None) -> None:
    """One line for one question."""
    start = time.perf_counter()
    answer = question()
    cold_s = time.perf_counter() - start
    again_s = median_s(question, 100)
    numbers = {"cold_wall_s": round(cold_s, 6), "again_wall_s": round(again_s, 8)}
    if limit_s is not None:
        numbers["cold_of_limit"] = round(cold_s / limit_s, 3)
    numbers["again_of_limit"] = round(again_s / AGAIN_S, 3)
    report(case, **numbers, time_s=answer.time_s)


def executing(peer_s: float | None) -> None:
    """An all_reduce of 256 KiB per device on data, each addition rounded, in its order."""
    import jax.numpy as jnp
    import numpy as np

    from emulator.collectives import build, execute, group_of
    from emulator.machines import cloudmatrix384

    data = np.random.default_rng(0).standard_normal((DEVICES, 1, COUNT), dtype=np.float32)
    group = group_of(range(DEVICES), cloudmatrix384())
    for dtype in ("bfloat16", "float32"):
        x = jnp.asarray(data).astype(dtype)
        for algorithm in ("ring", "full_mesh", "nhr", "double_ring/nhr"):
            schedule = build("all_reduce", algorithm, group)
            start = time.perf_counter()
            execute.all_reduce(x, schedule).block_until_ready()
            first_s = time.perf_counter() - start
            run_s = median_s(
                lambda x=x, s=schedule: execute.all_reduce(x, s).block_until_ready(), 7
            )
            numbers = {"first_wall_s": round(first_s, 4), "wall_s": round(run_s, 4)}
            if peer_s is not None and dtype == "bfloat16":
                numbers |= {"peer_wall_s": round(peer_s, 4), "ratio": round(run_s / peer_s, 3)}
            report(f"values of all_reduce by {algorithm}, 384 x 131072 {dtype}", **numbers)


def be_peer() -> None:
    """XLA's psum on 384 host devices; prints its seconds."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((DEVICES, COUNT), jnp.bfloat16), NamedSharding(mesh, P("x")))
    body = jax.shard_map(lambda v: jax.lax.psum(v, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    psum = jax.jit(body)
    psum(x).block_until_ready()
    print(median_s(lambda: psum(x).block_until_ready(), 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", action="store_true", help="also time XLA on 384 host devices")
    parser.add_argument(PEER, dest="as_peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_peer:
        be_peer()
        return
    peer_s = None
    if arguments.peer:
        wanted = f"--xla_force_host_platform_device_count={DEVICES}"
        flags = " ".join([*os.environ.get("XLA_FLAGS", "").split(), wanted])
        child = subprocess.run(
            [sys.executable, __file__, PEER],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,  # errors go to the terminal
            text=True,
            check=True,
        )
        peer_s = float(child.stdout)
    answering()
    executing(peer_s)


if __name__ == "__main__":
    main()
