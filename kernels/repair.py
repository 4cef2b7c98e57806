"""Output elements computed again, exactly: the ones a fast path could not vouch for."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from kernels import distill, floats
from kernels.arithmetic import Arithmetic

_CHUNK = 1 << 17  # products computed at once
_DEPTH = 64  # elements that share a bin


def repair(
    found: Array, mark: np.uint32, a: Array, b: Array, c: Array | None, arithmetic: Arithmetic
) -> Array:
    """`found[batch, m, n]` (FP32) with exact results in place of the words `mark`.

    `a[batch, m, k]`, `b[batch, k, n]` as the unit reads them, k a multiple of its products; `c`
    FP32 or `None`. The cost grows with the number of elements to replace, not with the size of the
    product: each round takes one from each of some bins. Element i is in bin i mod (an
    odd number), so that a bad row or column spreads over the bins.
    """
    batch, m, n = found.shape
    products = arithmetic.products
    total = found.size
    bins = -(-total // _DEPTH) | 1
    chunk = min(max(16, _CHUNK // a.shape[2]), bins)
    marks = jnp.pad((floats.bits32(found) == mark).reshape(-1), (0, _DEPTH * bins - total)).reshape(
        _DEPTH, bins
    )

    # Picked as integers, because XLA:CPU would widen all of a BF16 array first.
    rows, columns = (
        lax.bitcast_convert_type(x, jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16)
        for x in (a, b)
    )

    def operands(picked: Array) -> Array:
        words = floats.bits32(lax.bitcast_convert_type(picked, a.dtype))
        return words.reshape(chunk, -1, products).transpose(1, 2, 0)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        found, marks, counts = state
        filled, chosen = lax.top_k(jnp.minimum(counts, 1).astype(jnp.float32), chunk)
        depth = lax.argmax(marks[:, chosen], 0, jnp.int32)
        index = jnp.where(filled > 0, depth * bins + chosen, total).astype(jnp.int32)
        inside = jnp.minimum(index, total - 1)
        batch_index, row, column = inside // (m * n), inside // n % m, inside % n
        exact = distill.dots(
            operands(rows[batch_index, row]),
            operands(columns[batch_index, :, column]),
            jnp.zeros(chunk, jnp.uint32) if c is None else floats.bits32(c.reshape(-1)[inside]),
            arithmetic,
        )
        found = found.at[index].set(floats.from_bits32(exact), mode="drop")
        counts = counts.at[chosen].add(-filled.astype(jnp.int32))
        return found, marks.at[depth, chosen].set(False), counts

    counts = jnp.sum(marks, axis=0, dtype=jnp.uint8).astype(jnp.int32)  # small in memory
    state = found.reshape(-1), marks, counts
    found, _, _ = lax.while_loop(lambda state: jnp.any(state[2] > 0), body, state)
    return found.reshape(batch, m, n)
