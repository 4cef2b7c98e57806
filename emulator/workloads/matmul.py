"""One BF16 matrix product, divided in two dimensions over every device.

Twice in plain JAX: `blocks` for `jax.shard_map` over a mesh with axes ("x", "y"), `tile` for
`jax.pmap` over one axis "device", from whose index each device works out its row and column.
Neither cuts K, so both must give the bits of the undivided product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16, Float


def grid(devices: int) -> tuple[int, int]:
    """The most nearly square (x, y) with x * y == devices and x <= y."""
    x = max(d for d in range(1, math.isqrt(devices) + 1) if devices % d == 0)
    return x, devices // x


def operands(size: int, seed: int = 0) -> tuple[Array, Array]:
    """Two normally distributed BF16 matrices of shape [size, size]."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((2, size, size), np.float32)
    return jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)


def near(size: int, x: int, y: int) -> int:
    """The size closest to `size` that a grid of x by y devices can divide."""
    each = math.lcm(x, y)
    return max(1, round(size / each)) * each


def check(size: int, x: int, y: int) -> None:
    """Raises ValueError unless every device gets an equal block of each of the three matrices."""
    if size < 1 or size % math.lcm(x, y):
        raise ValueError(
            f"size={size} cannot be divided over a grid of {x} by {y} devices; it must be "
            f"a positive multiple of {math.lcm(x, y)}, such as {near(size, x, y)}"
        )


def blocks(mesh: Any) -> Callable[[Array, Array], Array]:
    """`product(a, b)` over `mesh`: each device gathers a row of blocks of a, a column of b's."""

    def local(
        a: BFloat16[Array, "m_x k_y"], b: BFloat16[Array, "k_x n_y"]
    ) -> Float[Array, "m_x n_y"]:
        a = lax.all_gather(a, "y", axis=1, tiled=True)
        b = lax.all_gather(b, "x", axis=0, tiled=True)
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P("x", "y"), P("x", "y")), out_specs=P("x", "y")
    )


def tile(
    a: BFloat16[Array, "m k"], b: BFloat16[Array, "k n"], x: int, y: int
) -> Float[Array, "m_x n_y"]:
    """This device's block of a @ b, under `jax.pmap(axis_name="device")`, both operands whole."""
    row, column = jnp.divmod(lax.axis_index("device"), y)
    rows, columns = a.shape[0] // x, b.shape[1] // y
    a = lax.dynamic_slice_in_dim(a, row * rows, rows, axis=0)
    b = lax.dynamic_slice_in_dim(b, column * columns, columns, axis=1)
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def assemble(tiles: Float[Array, "d m n"], x: int, y: int) -> Float[Array, "M N"]:
    """The product from its tiles in device order."""
    _, rows, columns = tiles.shape
    return tiles.reshape(x, y, rows, columns).swapaxes(1, 2).reshape(x * rows, y * columns)
