"""What a product of matrices may be asked for: checked before any work, by the definition and the
twin alike. Shapes and dtypes only, so that it costs nothing under `jit`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from kernels.arithmetic import INTEGERS, Arithmetic
from kernels.floats import FLOAT_DTYPES


def checked(a: Any, b: Any, c: Any, arithmetic: Any) -> tuple[Arithmetic, tuple[int, ...]]:
    """The mode that multiplies arrays `a` and `b` onto `c` (or None), and the batch's shape.

    Raises:
        TypeError: a dtype that the unit does not take, `c` not of the accumulator's, or no record.
        ValueError: shapes that do not fit.
        NotImplementedError: FP32 operands on a unit without an FP32 mode.
    """
    if not isinstance(arithmetic, Arithmetic):
        raise TypeError(
            f"matmul: expected arithmetic to be a kernels.Arithmetic, got {arithmetic!r}; "
            "kernels.PRESETS has them by name"
        )
    unit = arithmetic.mode(a.dtype.name, b.dtype.name)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"matmul: expected a[..., m, k] and b[..., k, n], got {a.shape} and {b.shape}; "
            "the last axis of a must match the second last of b"
        )
    try:
        batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError as error:
        raise ValueError(
            f"matmul: batch dimensions {a.shape[:-2]} and {b.shape[:-2]} do not broadcast; "
            "they must be equal or 1"
        ) from error
    if c is not None:
        _check_c(c, a.dtype.name, (*batch, a.shape[-2], b.shape[-1]))
    return unit, batch


def _check_c(c: Any, operands: str, shape: tuple[int, ...]) -> None:
    accumulator = "int32" if operands in INTEGERS else "float32"
    if c.dtype.name != accumulator:
        raise TypeError(
            f"matmul: expected c in {accumulator}, got {c.dtype}; {operands} operands accumulate "
            f"in {accumulator}, so cast it"
        )
    fits = c.ndim <= len(shape) and all(
        x in (1, y) for x, y in zip(c.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"matmul: expected c of shape {shape} or one that broadcasts to it, got {c.shape}"
        )


def check_out_dtype(out_dtype: DTypeLike | None, operands: str) -> None:
    """Whether results can be given in `out_dtype`.

    Raises:
        TypeError: they cannot.
    """
    if out_dtype is None:
        return
    try:
        name = np.dtype(out_dtype).name
    except TypeError:
        name = str(out_dtype)
    if operands in INTEGERS and name != "int32":
        raise TypeError(
            f"matmul: {operands.upper()} operands give int32, got out_dtype={name}; leave it out "
            "and dequantise the result"
        )
    if operands not in INTEGERS and name not in FLOAT_DTYPES:
        raise TypeError(
            f"matmul: expected out_dtype in {FLOAT_DTYPES}, got {name}; cast the result yourself"
        )
