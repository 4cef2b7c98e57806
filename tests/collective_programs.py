"""Sharded programs over exact numbers, fixed and random, whose bits no order of addition changes.

Run as a script, this module evaluates those named after the output file, natively on 8 devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lax import parallel
from jax.sharding import PartitionSpec as P

SHAPE = {"x": 4, "y": 2}
BOTH = P(("x", "y"))
#: [32, 8] small whole numbers: every sum and product is exact.
VALUES = np.random.default_rng(1).integers(-4, 5, (32, 8)).astype(np.float32)

_map = partial(jax.shard_map, in_specs=BOTH, out_specs=BOTH)


def _of(name: str) -> Callable[..., Any]:
    """A collective that `lax` does not offer; some have lost their public name in JAX 0.12."""
    return getattr(parallel, name, None) or getattr(parallel, f"_{name}")


def invariant_types(mesh: Any) -> Callable[..., Any]:
    """What `check_vma` types distinguish: sums, gathers and casts of every kind."""

    def body(a: Any) -> Any:
        gathered = _of("all_gather_invariant")(a, "x", axis=0, tiled=True)
        varied = lax.pcast(gathered, "x", to="varying")
        return varied[:4] + lax.psum(a, "x") + lax.pmax(a, ("x", "y")) + lax.axis_index("y")

    return _map(body, mesh=mesh)


def unreduced_types(mesh: Any) -> Callable[..., Any]:
    def body(a: Any) -> Any:
        partial_sums = lax.pcast(a, "x", to="unreduced")
        total = _of("unreduced_psum")(partial_sums, "x")
        scattered = _of("unreduced_psum_scatter")(partial_sums, "x", tiled=True)
        reduced = _of("all_gather_reduced")(scattered, "x", tiled=True)
        kept = lax.pcast(lax.pcast(total, "x", to="reduced"), "x", to="varying")
        return lax.pcast(reduced, "x", to="varying") + kept

    return _map(body, mesh=mesh)


def partly_manual(mesh: Any) -> Callable[..., Any]:
    """Manual over x, automatic over y."""

    def body(a: Any) -> Any:
        return lax.psum_scatter(a @ a.T, "x", tiled=True).sum(1)

    return jax.shard_map(
        body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names=frozenset({"x"})
    )


def nested(mesh: Any) -> Callable[..., Any]:
    """A shard_map over y inside one over x."""

    def inner(a: Any) -> Any:
        return a + lax.psum(a, "y") * lax.axis_index("x")

    def outer(a: Any) -> Any:
        within = jax.shard_map(
            inner, in_specs=P("y"), out_specs=P("y"), axis_names=frozenset({"y"})
        )
        return lax.ppermute(within(a), "x", [(i, (i + 1) % 4) for i in range(4)])

    return jax.shard_map(
        outer, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names=frozenset({"x"})
    )


def keys(mesh: Any) -> Callable[..., Any]:
    """Random keys through collectives, loops and branches."""

    def body(a: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(3), lax.axis_index("x") * 2 + lax.axis_index("y"))
        every = lax.all_gather(key[None], "x", tiled=True)
        moved = lax.ppermute(key, "y", [(0, 1), (1, 0)])
        picked = lax.cond(lax.axis_index("y") == 0, lambda: key, lambda: moved)

        def draw(carry: Any, k: Any) -> Any:
            return jax.random.fold_in(carry, k.sum().astype(jnp.int32)), jax.random.bits(
                carry, (2,)
            )

        _, bits = lax.scan(draw, picked, a)
        return bits.sum(0)[None] ^ jax.random.bits(every[1], (2,))

    return _map(body, mesh=mesh, check_vma=False)


def grouped(mesh: Any) -> Callable[..., Any]:
    """Parts of an axis."""
    groups = [[0, 3], [2, 1]]
    within = {"axis_index_groups": groups}

    def body(a: Any) -> Any:
        return [
            lax.psum(a, "x", **within),
            lax.pmax(a, "x", **within),
            lax.all_gather(a, "x", tiled=True, **within),
            lax.psum_scatter(a, "x", tiled=True, **within),
            lax.psum_scatter(a[:2], "x", **within),
            lax.all_to_all(a, "x", 0, 1, tiled=True, **within),
            lax.all_to_all(a[:2], "x", 0, 1, **within),
            lax.pshuffle(a, "x", [2, 3, 1, 0]),
            lax.pswapaxes(a, "x", 0),
        ]

    return _map(body, mesh=mesh, check_vma=False)


FIXED = {
    f.__name__: f for f in (invariant_types, unreduced_types, partly_manual, nested, keys, grouped)
}

# -- random programs: a few values, and operations that keep them whole and small


def _wrapped(v: Any) -> Any:
    """Back to small numbers, so that everything stays exact."""
    return v - 8 * jnp.floor((v + 4) / 8)


def _loop(rng: np.random.Generator, a: Any, b: Any) -> Any:
    trips = int(rng.integers(1, 4))
    axis = str(rng.choice(["x", "y"]))
    return lax.fori_loop(0, trips, lambda i, c: _wrapped(c + lax.psum(c, axis) + i), a)


def _branch(rng: np.random.Generator, a: Any, b: Any) -> Any:
    axis = str(rng.choice(["x", "y"]))
    if rng.integers(2):  # the same for all devices
        return lax.cond(lax.pmax(a[0, 0], ("x", "y")) > 2, lambda: a + lax.psum(b, axis), lambda: b)
    return lax.cond(lax.axis_index(axis) == 1, lambda: a * 2, lambda: b - 1)


def _scanned(rng: np.random.Generator, a: Any, b: Any) -> Any:
    reverse = bool(rng.integers(2))
    return lax.scan(lambda c, r: (_wrapped(c * 2 + r), c - r), a[0], b, reverse=reverse)[1]


def _while(rng: np.random.Generator, a: Any, b: Any) -> Any:
    limit = lax.axis_index("x") + 1 if rng.integers(2) else 2
    return lax.while_loop(lambda s: s[0] < limit, lambda s: (s[0] + 1, _wrapped(s[1] + b)), (0, a))[
        1
    ]


def _moved(rng: np.random.Generator, a: Any, b: Any) -> Any:
    axis = [("x",), ("y",), ("x", "y")][rng.integers(3)]
    n = int(np.prod([SHAPE[name] for name in axis]))
    to = rng.permutation(n)
    kept = int(rng.integers(1, n + 1))
    return lax.ppermute(a, axis, [(i, int(to[i])) for i in range(kept)])


def _exchanged(rng: np.random.Generator, a: Any, b: Any) -> Any:
    axis = str(rng.choice(["x", "y"]))
    split, concat = (int(d) for d in rng.integers(0, 2, 2))
    out = lax.all_to_all(a, axis, split, concat, tiled=True)
    return out.reshape(a.shape)


def _gathered(rng: np.random.Generator, a: Any, b: Any) -> Any:
    axis = [("x",), ("y",), ("y", "x")][rng.integers(3)]
    every = lax.all_gather(a, axis, axis=int(rng.integers(0, 3)))
    return every.reshape(-1, *a.shape)[int(rng.integers(2))]


def _scattered(rng: np.random.Generator, a: Any, b: Any) -> Any:
    axis = str(rng.choice(["x", "y"]))
    part = lax.psum_scatter(a, axis, scatter_dimension=1, tiled=True)
    return _wrapped(lax.all_gather(part, axis, axis=1, tiled=True))


def _reduced(rng: np.random.Generator, a: Any, b: Any) -> Any:
    axis = [("x",), ("y",), ("x", "y")][rng.integers(3)]
    kind = [lax.psum, lax.pmax, lax.pmin][rng.integers(3)]
    return _wrapped(a + kind(b, axis))


def _local(rng: np.random.Generator, a: Any, b: Any) -> Any:
    return [
        lambda: _wrapped(a @ (b.T @ b)),
        lambda: jnp.sort(a, axis=int(rng.integers(2))),
        lambda: _wrapped(jnp.cumsum(a, axis=1)),
        lambda: jnp.where(a > b, a, -b),
        lambda: a[::-1].at[1].add(b[0]),
        lambda: jnp.take_along_axis(a, jnp.argsort(b, axis=1), 1),
        lambda: _wrapped(a * b + lax.axis_index("y")),
        lambda: _wrapped(jax.checkpoint(lambda v: v * v + b)(a)),
        lambda: _wrapped(jax.grad(lambda v: (v * v * lax.axis_index("x")).sum())(a)),
    ][rng.integers(9)]()


_STEPS = (
    _loop,
    _branch,
    _scanned,
    _while,
    _moved,
    _exchanged,
    _gathered,
    _scattered,
    _reduced,
    _local,
)


def random_program(seed: int) -> Callable[[Any], Callable[..., Any]]:
    """Eight random steps, each of two earlier values; some of the values are returned."""

    def build(mesh: Any) -> Callable[..., Any]:
        def body(a: Any) -> Any:
            rng = np.random.default_rng(seed)
            values = [a, a[::-1] * 1]
            if rng.integers(2):  # a value that is the same on every device
                values.append(jnp.broadcast_to(jnp.arange(8.0), a.shape))
            for _ in range(8):
                step = _STEPS[rng.integers(len(_STEPS))]
                left, right = (values[i] for i in rng.integers(0, len(values), 2))
                values.append(step(rng, left, right))
            return values[-3:]

        return _map(body, mesh=mesh, check_vma=False)

    return build


def native(names: list[str]) -> dict[str, np.ndarray]:
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=auto)
    results = {}
    for name in names:
        build = FIXED.get(name) or random_program(int(name))
        for i, leaf in enumerate(jax.tree.leaves(jax.jit(build(mesh))(VALUES))):
            results[f"{name}/{i}"] = np.asarray(leaf)
    return results


if __name__ == "__main__":
    np.savez(sys.argv[1], **native(sys.argv[2:]))
