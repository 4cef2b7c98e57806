"""Programs over several real devices, run in processes of their own: each prints a digest of the
bits that it computed.

    python tests/real_device_programs.py NAME DEVICES [COORDINATOR PROCESSES PROCESS]
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Digest = list[Any]


def digest(values: Any) -> str:
    """The bits of a pytree of arrays, each of which every process has whole."""
    import jax
    import numpy as np

    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(values):
        array = np.asarray(leaf)
        bits.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return bits.hexdigest()


def step(devices: Any) -> Digest:
    """Two layers of tensor parallelism, a sharded optimizer and a gradient, on 24 devices."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    import emulator as em

    machine = em.cloudmatrix384()
    mesh = machine.mesh(dp=6, tp=4)

    def local(w: Any, x: Any) -> Any:
        def loss(w: Any) -> Any:
            y = jnp.tanh(x @ w[0]).astype(jnp.bfloat16)
            y = lax.psum(y @ w[1], "tp")
            return jnp.mean(jnp.exp(-jnp.square(y.astype(jnp.float32))))

        value, grads = jax.value_and_grad(loss)(w)
        grads = [g / 6 for g in grads]
        # What varies over both axes already is summed over dp alone, the way ZeRO does it.
        shares = [lax.psum_scatter(g, "dp", scatter_dimension=0, tiled=True) for g in grads]
        whole = [lax.all_gather(g, "dp", axis=0, tiled=True) for g in shares]
        return lax.pmean(value, "dp"), [
            a - (0.1 * b).astype(a.dtype) for a, b in zip(w, whole, strict=True)
        ]

    specs = [P(None, "tp"), P("tp")]
    program = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P("dp")), out_specs=(P(), specs), check_vma=False
    )
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    w = [
        jax.random.normal(k1, (24, 48), jnp.bfloat16),
        jax.random.normal(k2, (48, 5), jnp.bfloat16),
    ]
    x = jax.random.normal(k3, (12, 24), jnp.bfloat16)
    run = jax.jit(em.emulate(program, on=machine, devices=devices))
    first, w = run(w, x)
    second, w = run(w, x)  # the results lie on the real devices already
    return [digest((first, second, w))]


def gradient(devices: Any) -> Digest:
    """A derivative taken outside of the emulation, under `vmap`."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    import emulator as em

    machine = em.cloudmatrix384()

    def local(w: Any, x: Any) -> Any:
        return lax.psum(jnp.sum(jnp.tanh(x @ w).astype(jnp.float32)), ("a", "b"))

    program = jax.shard_map(
        local, mesh=machine.mesh(a=4, b=6), in_specs=(P("a", "b"), P(None, "a")), out_specs=P()
    )
    emulated = em.emulate(program, on=machine, devices=devices)
    w = jax.random.normal(jax.random.key(0), (12, 12), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2, 6, 12), jnp.bfloat16)
    return [digest(jax.vmap(jax.grad(emulated), (None, 0))(w, x))]


def movement(devices: Any) -> Digest:
    """Everything that moves, for several dtypes, with specials among the bits, on 24 devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec as P

    import emulator as em

    machine = em.cloudmatrix384()
    mesh = machine.mesh(a=6, b=4)

    def local(x: Any) -> Any:
        ring = [(i, (i + 5) % 6) for i in range(6)]
        there = lax.ppermute(x, "a", ring[:4])
        exchanged = lax.all_to_all(there, ("a", "b"), 0, 1, tiled=True)
        groups = [[0, 3], [1, 4], [2, 5]]
        grouped = lax.all_gather(x[:1], "a", axis_index_groups=groups)
        chosen = lax.pbroadcast(x, "b", 2)
        return exchanged, grouped[None], there, chosen, lax.axis_index(("b", "a"))[None, None]

    out = P(("a", "b"))
    program = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=P(("b", "a")),  # not the mesh's order: a part is no contiguous range of rows
        out_specs=(out, out, P(("b", "a")), P("a", "b"), P("a", "b")),
        check_vma=False,
    )
    bits = np.random.default_rng(0).integers(0, 1 << 16, (24 * 24, 2), np.uint16)
    emulated = em.emulate(program, on=machine, devices=devices)
    arrays = [
        jnp.asarray(bits.view(jnp.bfloat16)),
        jnp.asarray(bits.view(np.float16)),
        jnp.asarray((bits & 255).astype(np.uint8)),
        jnp.asarray(bits % 3 == 0),
        jnp.asarray((bits % 16).astype(jnp.int4)),
        jnp.asarray((bits & 255).astype(np.uint8).view(jnp.float8_e4m3fn)),
        jnp.asarray(bits + 1j * bits, jnp.complex64),
    ]
    keys = jax.random.split(jax.random.key(1), 24 * 24 * 2).reshape(24 * 24, 2)
    moved = [emulated(x) for x in arrays]
    return [digest(moved), digest(jax.tree.map(_as_words, emulated(keys)))]


def _as_words(x: Any) -> Any:
    import jax

    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def control(devices: Any) -> Digest:
    """Loops and branches, the same and different on the devices, what they count, and groups that
    lie differently on the machine and so add in different orders.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import PartitionSpec as P

    import emulator as em

    machine = em.cloudmatrix384()
    mesh = machine.mesh(devices=[*range(20), *range(30, 34)], a=12, b=2)

    def local(x: Any, sizes: Any, experts: Any) -> Any:
        def round_(carry: Any, row: Any) -> Any:
            carry = carry + lax.psum(row * carry, "a")
            return carry, lax.pmax(carry, ("a", "b")) + row

        carry, rows = lax.scan(round_, x[0], x)
        rank = lax.axis_index("a")
        waited, _ = lax.while_loop(
            lambda s: s[0] < rank, lambda s: (s[0] + 2, lax.psum(s[1], "b")), (0, x[0])
        )

        def doubled(v: Any) -> Any:  # on the devices that are here
            return lax.while_loop(lambda s: s[0] < rank, lambda s: (s[0] + 1, s[1] * 2), (0, v))[1]

        chosen = lax.cond(rank % 3 == 0, jnp.sin, doubled, x)
        summed = lax.cond(lax.psum(rank, "a") > 3, lambda v: lax.psum(v, "b"), jnp.negative, x)
        grouped = lax.psum(
            rows,
            "a",
            axis_index_groups=[[0, 11, 3], [*range(1, 3), 4], [*range(5, 8)], [*range(8, 11)]],
        )
        routed = lax.ragged_dot(rows.astype(jnp.bfloat16), experts, sizes[0])
        return carry[None], rows, waited[None, None], chosen, summed, routed, grouped

    mine, row = P("a", "b"), P(("a", "b"))
    program = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(row, row, P()),
        out_specs=(row, row, mine, row, row, row, row),
        check_vma=False,
    )
    x = jax.random.normal(jax.random.key(0), (24 * 3, 8))
    sizes = np.random.default_rng(0).multinomial(3, [0.5, 0.2, 0.3], 24).astype(np.int32)
    experts = jax.random.normal(jax.random.key(1), (3, 8, 5), jnp.bfloat16)
    answer = em.run(program, x, sizes, experts, on=machine, devices=devices)
    calls: list[int] = []

    def noted(v: Any) -> Any:
        a, b = lax.axis_index("a"), lax.axis_index("b")
        jax.debug.callback(lambda i: calls.append(int(i)), b)
        note_some = functools.partial(jax.debug.callback, lambda i: calls.append(2 + int(i)), b)
        lax.cond(a > 3, note_some, lambda: None)
        host = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda i: np.float32(i) / 7, host, lax.axis_index("a")) + v

    called = jax.shard_map(noted, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    value = em.emulate(called, on=machine, devices=devices)(jnp.ones(12))
    jax.effects_barrier()
    # Of all processes together: a call for each device.
    made = process_allgather(np.array([calls.count(i) for i in range(4)]))
    once = np.asarray(made).reshape(-1, 4).sum(0).tolist()
    assert once == [12, 12, 8, 8], once
    return [digest(answer.value), str(answer.counts), digest(value), once]


def pod(devices: Any) -> Digest:
    """A matmul and two collectives on all 384 devices."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    import emulator as em

    machine = em.cloudmatrix384()

    def local(x: Any, w: Any) -> Any:
        return lax.all_gather(lax.psum(x @ w, "tp"), "dp", tiled=True)

    program = jax.shard_map(
        local,
        mesh=machine.mesh(dp=48, tp=8),
        in_specs=(P("dp", "tp"), P("tp")),
        out_specs=P(),
        check_vma=False,
    )
    x = jax.random.normal(jax.random.key(0), (48, 128), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (128, 4), jnp.bfloat16)
    return [digest(em.emulate(program, on=machine, devices=devices)(x, w))]


def divided(devices: Any) -> Digest:
    """Sums along a dimension that the caller has divided over this process's devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import emulator as em

    def program(x: Any) -> Any:
        windows = lax.reduce_window(x, 0.0, lax.add, (64,), (1,), "SAME")
        return jnp.cumsum(x), lax.cumlogsumexp(x), windows, jnp.cumsum(x.astype(jnp.bfloat16))

    over = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), P("all"))
    x = jax.random.normal(jax.random.key(0), (480,))
    found = []
    for given in (None, devices):
        run = em.emulate(program, on=em.cloudmatrix384(), devices=given)
        for outs in (None, over):
            found.append(digest(jax.jit(run, in_shardings=over, out_shardings=outs)(x)))
    return found


PROGRAMS: dict[str, Callable[[Any], Digest]] = {
    f.__name__: f for f in (step, gradient, movement, control, pod, divided)
}


def main(name: str, count: int, *cluster: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    import jax

    if cluster:
        join = functools.partial(jax.distributed.initialize, cluster[0])
        join(num_processes=int(cluster[1]), process_id=int(cluster[2]))
    for chosen in name.split(","):
        print(json.dumps([chosen, PROGRAMS[chosen](jax.devices())]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
