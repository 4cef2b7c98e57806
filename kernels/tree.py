"""Trees of rounded additions: `[batch, m, k] x [batch, k, n]`."""

from jaxtyping import Array

from kernels import exact
from kernels.arithmetic import Arithmetic


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`, operands as read."""
    return exact.accumulate(a, b, c, arithmetic)
