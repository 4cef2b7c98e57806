"""Sharded programs that tests run twice: emulated, and natively on forced host devices in a child
process.

Each entry of `PROGRAMS` maps a name to (mesh axes, function of the mesh -> program, arguments). Run
as a script, this module evaluates all of them natively and writes their flat outputs to the file
named on the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

DEVICES = 8


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _sharded(body: Callable[..., Any]) -> Callable[..., Any]:
    spec = P("x", "y")
    options = {"in_specs": spec, "out_specs": spec, "check_vma": False}
    return lambda mesh: jax.shard_map(body, mesh=mesh, **options)


def movement(a: Any) -> Any:
    groups = [[0, 2], [3, 1]]
    return [
        v[None, None]
        for v in (
            lax.all_to_all(a, "x", 0, 1, tiled=True),
            lax.all_to_all(a[:4], "x", 0, 1),
            lax.all_to_all(a[:, :4], "x", 1, 0),
            lax.all_to_all(a, ("x", "y"), 0, 0, tiled=True),
            lax.all_to_all(a, "y", 1, 0, tiled=True),
            lax.all_to_all(a, "x", 0, 0, axis_index_groups=groups, tiled=True),
            lax.all_gather(a, "x"),
            lax.all_gather(a, ("x", "y"), axis=1, tiled=True),
            lax.all_gather(a, ("y", "x"), axis=1, tiled=True),
            lax.all_gather(a, "x", axis_index_groups=groups),
            lax.ppermute(a, "x", [(0, 1)]),
            lax.ppermute(a, ("x", "y"), [(0, 1), (3, 2), (5, 7)]),
            lax.pshuffle(a, "x", [1, 0, 3, 2]),
            lax.pmax(a, "x"),
            lax.pmin(a, ("x", "y")),
            lax.axis_index(("x", "y")),
            lax.axis_index("y") + a,
            a[lax.axis_index("x")],
            lax.dynamic_slice_in_dim(a, lax.axis_index("y"), 3, 1),
            jnp.argsort(a, axis=0),
            jax.random.bits(jax.random.fold_in(jax.random.key(0), lax.axis_index("x")), (3, 4)),
        )
    ]


def sums(a: Any) -> Any:
    groups = [[0, 3], [2, 1]]
    return [
        v[None, None]
        for v in (
            lax.psum(a, "x"),
            lax.psum(a, ("y", "x")),
            lax.psum((a, a * 2), "y")[1],
            lax.psum(jnp.float32(0.1), ("x", "y")),
            lax.pmean(a, "x"),
            lax.psum(a, "x", axis_index_groups=groups),
            lax.psum_scatter(a[:4], "x"),
            lax.psum_scatter(a, ("x", "y"), tiled=True),
            lax.psum_scatter(a, ("y", "x"), scatter_dimension=1, tiled=True),
            lax.psum_scatter(a, "x", axis_index_groups=groups, tiled=True),
        )
    ]


def control(a: Any) -> Any:
    x, y = lax.axis_index("x"), lax.axis_index("y")

    def add_mean(state: Any) -> Any:
        i, v = state
        return i + 1, v + lax.psum(v.mean(), "y")

    def nested(carry: Any, row: Any) -> Any:
        carry = lax.cond(y == 0, lambda c: c + row, lambda c: c - row, carry)
        carry, _ = lax.scan(lambda c, r: (c * 0.5 + r, None), carry, a[:2])
        return carry, lax.psum(carry, "x")

    return [
        v[None, None]
        for v in (
            lax.fori_loop(0, x + 1, lambda i, c: c * 2 + i, a),
            lax.cond(y == 0, jnp.sin, jnp.cos, a),
            lax.switch(x, [lambda v: v, lambda v: -v, lambda v: v * 2], a),
            lax.while_loop(lambda s: s[0] < 3, add_mean, (0, a))[1],
            lax.while_loop(
                lambda s: s[1].sum() < 100 + 50 * x, lambda s: (s[0] + 1, s[1] + 1), (0, a)
            )[0],
            lax.scan(nested, jnp.zeros_like(a[0]), a)[1],
            lax.scan(nested, a[0] * 0 + y, a, reverse=True)[0],
            jax.checkpoint(jnp.tanh)(a),
            jax.nn.relu(a),
            jax.jit(jnp.exp)(a),
            jnp.cumsum(a, axis=1),
        )
    ]


def tensor_parallel(mesh: Any) -> Callable[..., Any]:
    """Loss and gradients of a residual network, columns then rows over y, data over x."""

    def body(w1: Any, w2: Any, h: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            a, b = w
            h = h + lax.psum(jax.nn.gelu(h @ a) @ b, "y")
            return h, None

        h, _ = lax.scan(layer, h, (w1, w2))
        return lax.pmean(jnp.mean(h.astype(jnp.float32) ** 2), "x")

    specs = (P(None, None, "y"), P(None, "y", None), P("x"))
    loss = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def fully_sharded(mesh: Any) -> Callable[..., Any]:
    """Weights gathered before use, their gradients scattered back; mixed precision."""

    def body(w: Any, x: Any) -> Any:
        full = lax.all_gather(w.astype(jnp.bfloat16), ("x", "y"), tiled=True)
        y = jnp.dot(x.astype(jnp.bfloat16), full, preferred_element_type=jnp.float32)
        return lax.psum(jnp.sum(jax.nn.softmax(y, axis=-1) ** 2), ("x", "y"))

    loss = jax.shard_map(body, mesh=mesh, in_specs=(P(("x", "y")), P(("x", "y"))), out_specs=P())
    return jax.value_and_grad(loss, argnums=(0, 1))


def experts(mesh: Any) -> Callable[..., Any]:
    """Tokens exchanged, multiplied by the expert of each device, and exchanged back."""

    def body(tokens: Any, weights: Any) -> Any:
        sent = lax.all_to_all(tokens, "x", 0, 0, tiled=True)
        out = jnp.tanh(sent @ weights[0])
        return lax.all_to_all(out, "x", 0, 0, tiled=True)

    def loss(tokens: Any, weights: Any) -> Any:
        run = jax.shard_map(body, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"))
        return jnp.mean(run(tokens, weights) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))


def outside(mesh: Any) -> Callable[..., Any]:
    """Several shard_maps, a convolution and dots outside of them."""

    def program(x: Any, w: Any, image: Any, kernel: Any) -> Any:
        half = jax.shard_map(
            lambda v: lax.psum_scatter(v @ v.T, "y", tiled=True),
            mesh=mesh,
            in_specs=P("x"),
            out_specs=P(("x", "y")),
        )(x)
        other = jax.shard_map(
            lambda v: v * lax.axis_index("y"), mesh=mesh, in_specs=P("y"), out_specs=P("y")
        )(half @ w)
        y = lax.conv_general_dilated(
            image,
            kernel,
            (2, 1),
            [(1, 0), (0, 2)],
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )
        return other, jnp.einsum("bhwc,bhwd->cd", y, y), jnp.linalg.norm(x), jnp.sort(x, axis=0)

    return program


bf16 = ml_dtypes.bfloat16
PROGRAMS: dict[str, tuple[dict[str, int], Callable[[Any], Callable[..., Any]], tuple[Any, ...]]] = {
    "movement": ({"x": 4, "y": 2}, _sharded(movement), (normal(64, 16),)),
    "sums": ({"x": 4, "y": 2}, _sharded(sums), (normal(64, 16),)),
    "control": ({"x": 4, "y": 2}, _sharded(control), (normal(64, 16),)),
    "tensor_parallel": (
        {"x": 4, "y": 2},
        tensor_parallel,
        (
            normal(3, 16, 32, dtype=bf16) * bf16(0.25),
            normal(3, 32, 16, seed=1, dtype=bf16) * bf16(0.25),
            normal(8, 16, seed=2, dtype=bf16),
        ),
    ),
    "fully_sharded": ({"x": 2, "y": 4}, fully_sharded, (normal(16, 24), normal(8, 16, seed=1))),
    "experts": (
        {"x": 8},
        experts,
        (normal(64, 8, dtype=bf16), normal(8, 8, 8, seed=1, dtype=bf16)),
    ),
    "outside": (
        {"x": 2, "y": 4},
        outside,
        (
            normal(16, 8),
            normal(8, 4, seed=1),
            normal(2, 9, 8, 4, seed=2),
            normal(3, 3, 2, 6, seed=3),
        ),
    ),
}


def flat_words(tree: Any) -> list[np.ndarray]:
    """Leaves as NumPy arrays that a plain .npz can hold (BF16 widened to FP32, exactly)."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [leaf.astype(np.float32) if leaf.dtype == bf16 else leaf for leaf in leaves]


def main(path: str) -> None:
    results = {}
    for name, (axes, build, args) in PROGRAMS.items():
        auto = (jax.sharding.AxisType.Auto,) * len(axes)
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)
        for i, leaf in enumerate(flat_words(jax.jit(build(mesh))(*args))):
            results[f"{name}/{i}"] = leaf
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
