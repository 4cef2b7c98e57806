"""Random programs that leave the division of their arrays to the compiler, over whole numbers:
whatever the order of addition, the bits are the same.

Run as a script, this module evaluates the seeds named after the output file, natively on 8 devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = {"x": 4, "y": 2}
SHAPE = (16, 8)
_SPECS = (
    P("x", "y"), P("y", "x"), P("x"), P(None, "x"), P("y"), P(None, "y"), P(("x", "y")),
    P(("y", "x")), P(None, ("x", "y")), P(),
)  # fmt: skip
_VALUES = np.random.default_rng(0).integers(-6, 7, (2, *SHAPE)).astype(np.float32)
ARGUMENTS = (*_VALUES, np.int32(2))

#: (two earlier values, a number that only values tell, a small number, a dimension) -> an array.
_Step = Callable[[Any, Any, Any, int, int], Any]


def _rows(v: Any, below: int) -> Any:
    """Row numbers, made of the first column."""
    return jnp.abs(v[:, 0].astype(int)) % below


def _powers(u: Any, v: Any) -> Any:
    def body(state: Any) -> Any:
        return state[0] + 1, small(state[1] @ (v.T @ v))

    return lax.while_loop(lambda state: state[0] < 3, body, (0, u))[1]


_STEPS: tuple[_Step, ...] = (
    lambda u, v, n, k, d: u @ v.T,
    lambda u, v, n, k, d: jnp.einsum("ij,ik->jk", u, v),
    lambda u, v, n, k, d: jnp.sort(u, axis=d),
    lambda u, v, n, k, d: jnp.argsort(u, axis=d, stable=True),
    lambda u, v, n, k, d: jnp.cumsum(u, axis=d),
    lambda u, v, n, k, d: jnp.cumprod(jnp.sign(u), axis=d),
    lambda u, v, n, k, d: jnp.take(u, _rows(v, SHAPE[d]), axis=d),
    lambda u, v, n, k, d: u.at[_rows(v, 16)].add(v),
    lambda u, v, n, k, d: u.at[k, ::2].set(k),
    lambda u, v, n, k, d: lax.dynamic_slice(u, (n + k, n), (4, 5)),
    lambda u, v, n, k, d: lax.dynamic_update_slice(u, v[:3, :2], (n, k)),
    lambda u, v, n, k, d: jnp.concatenate([u, v], d)[k:],
    lambda u, v, n, k, d: jnp.pad(u, ((k, 1), (0, 2)), mode=("edge", "reflect", "wrap")[k % 3]),
    lambda u, v, n, k, d: u.T.reshape(4, 32),
    lambda u, v, n, k, d: jnp.flip(u, d) + v,
    lambda u, v, n, k, d: jnp.roll(u, k, d),
    lambda u, v, n, k, d: jnp.where(u > v, u, -v),
    lambda u, v, n, k, d: jnp.argmax(u, d)[None] + v[:1, :1],
    lambda u, v, n, k, d: jnp.max(u, d, keepdims=True) - v,
    lambda u, v, n, k, d: jnp.sum(u * v, d, keepdims=True) + u,
    lambda u, v, n, k, d: lax.top_k(u, 3)[k % 2],
    lambda u, v, n, k, d: lax.scan(lambda c, row: (small(c + row), c * row), u[0], v)[1],
    lambda u, v, n, k, d: lax.fori_loop(0, n + 1, lambda i, c: small(c + v * i), u),
    lambda u, v, n, k, d: _powers(u, v),
    lambda u, v, n, k, d: lax.cond(u.sum() > 0, lambda: u + v, lambda: u - v),
    lambda u, v, n, k, d: lax.switch(_rows(u, 3)[0], [lambda: u, lambda: v, lambda: u * v]),
    lambda u, v, n, k, d: lax.reduce_window(u, 0.0, lax.add, (3, 2), (1, 1), "SAME"),
    lambda u, v, n, k, d: lax.reduce_window(u, -jnp.inf, lax.max, (2, 2), (2, 1), "VALID"),
    lambda u, v, n, k, d: lax.conv(u[None, None], v[None, None, :3, :3], (1, 1), "SAME")[0, 0],
    lambda u, v, n, k, d: jax.ops.segment_sum(u, _rows(v, 5), 5),
    lambda u, v, n, k, d: jax.nn.one_hot(_rows(u, 8), 8) * v,
    lambda u, v, n, k, d: jnp.bitwise_xor(u.astype(jnp.int32), v.astype(jnp.int32)) << k,
    lambda u, v, n, k, d: lax.population_count(u.astype(jnp.int32)),
    lambda u, v, n, k, d: u.astype(jnp.bfloat16) + v.astype(jnp.bfloat16),
    lambda u, v, n, k, d: jax.vmap(lambda a, b: jnp.outer(a, b)[k])(u, v),
    lambda u, v, n, k, d: jax.grad(lambda w: (w * w * v).sum())(u),
    lambda u, v, n, k, d: jax.random.randint(jax.random.key(k), SHAPE, -5, 5) + u,
    lambda u, v, n, k, d: jnp.searchsorted(jnp.sort(u[0]), v),
    lambda u, v, n, k, d: lax.sort((u, v), dimension=d, num_keys=2)[k % 2],
    lambda u, v, n, k, d: jnp.tril(u[:8] @ v.T, k),
    lambda u, v, n, k, d: jnp.repeat(u, 2, axis=d)[:, ::2],
    lambda u, v, n, k, d: jax.checkpoint(lambda w: w * w + v)(u),
    lambda u, v, n, k, d: lax.map(lambda row: row * row.max(), u),
    lambda u, v, n, k, d: jnp.stack([u, v], 1).reshape(16, 16),
    lambda u, v, n, k, d: jnp.clip(u, -k, k) // (1 + jnp.abs(v)),
)


def small(a: Any) -> Any:
    """Whole numbers from -6 to 6, of which sums of products are exact."""
    return jnp.mod(a.astype(jnp.float32), 13) - 6


def _fitted(a: Any) -> Any:
    flat = small(a).reshape(-1)
    count = SHAPE[0] * SHAPE[1]
    return jnp.tile(flat, -(-count // flat.size))[:count].reshape(SHAPE)


def build(seed: int, mesh: Any) -> Callable[..., Any]:
    """Seven random steps, each of two earlier values, with shardings asked for here and there."""

    def placed(rng: np.random.Generator) -> NamedSharding:
        return NamedSharding(mesh, _SPECS[rng.integers(len(_SPECS))])

    def program(a: Any, b: Any, n: Any) -> Any:
        rng = np.random.default_rng(seed)
        values = [a, b]
        for _ in range(7):
            step = _STEPS[rng.integers(len(_STEPS))]
            left, right = (values[i] for i in rng.integers(0, len(values), 2))
            out = _fitted(step(left, right, n, int(rng.integers(7)), int(rng.integers(2))))
            asks = rng.integers(2)
            values.append(lax.with_sharding_constraint(out, placed(rng)) if asks else out)
        return values[-3:]

    rng = np.random.default_rng([seed, 1])
    return jax.jit(program, in_shardings=(placed(rng), placed(rng), None))


def main(path: str, seeds: list[str]) -> None:
    auto = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=auto)
    results = {
        f"{seed}/{i}": np.asarray(leaf)
        for seed in seeds
        for i, leaf in enumerate(build(int(seed), mesh)(*ARGUMENTS))
    }
    np.savez(path, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
