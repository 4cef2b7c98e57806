"""Output elements computed again, exactly: the ones a fast path could not vouch for."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels import distill, floats
from kernels.arithmetic import Arithmetic

_CHUNK = 2048  # elements taken at once
_DEPTH = 64  # elements that share a bin


def magnitude(x: Array) -> Array:
    """Integers ordered like |x|, infinity and NaN on top."""
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def repair(found: Array, a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """`found[batch, m, n]` (FP32) with exact results in place of what is not finite.

    `a`, `b`, `c` are FP32 words, as the fast paths take them. The cost grows with the number of
    elements to replace, not with the size of the product: each round takes one from each of up to
    `_CHUNK` bins. Element i is in bin i mod (an odd number), so that a bad row or column spreads
    over the bins.
    """
    batch, m, n = found.shape
    k, products = a.shape[-1], arithmetic.products
    steps = -(-k // products)
    total = found.size
    bins = -(-total // _DEPTH) | 1
    chunk = min(_CHUNK, bins)
    marks = jnp.pad(
        (magnitude(found) >= floats.INF).reshape(-1), (0, _DEPTH * bins - total)
    ).reshape(_DEPTH, bins)
    columns = b.swapaxes(-1, -2)

    def operands(matrix: Array, batch_index: Array, row: Array) -> Array:
        picked = jnp.pad(matrix[batch_index, row], ((0, 0), (0, steps * products - k)))
        return picked.reshape(chunk, steps, products).transpose(1, 2, 0)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        found, marks, counts = state
        filled, chosen = lax.top_k(jnp.minimum(counts, 1).astype(jnp.float32), chunk)
        depth = lax.argmax(marks[:, chosen], 0, jnp.int32)
        index = jnp.where(filled > 0, depth * bins + chosen, total).astype(jnp.int32)
        inside = jnp.minimum(index, total - 1)
        batch_index, row, column = inside // (m * n), inside // n % m, inside % n
        exact = distill.dots(
            operands(a, batch_index, row),
            operands(columns, batch_index, column),
            jnp.zeros(chunk, jnp.uint32) if c is None else c.reshape(-1)[inside],
            arithmetic,
        )
        found = found.at[index].set(floats.from_bits32(exact), mode="drop")
        counts = counts.at[chosen].add(-filled.astype(jnp.int32))
        return found, marks.at[depth, chosen].set(False), counts

    counts = jnp.sum(marks, axis=0, dtype=jnp.int32)
    state = found.reshape(-1), marks, counts
    found, _, _ = lax.while_loop(lambda state: jnp.any(state[2] > 0), body, state)
    return found.reshape(batch, m, n)
