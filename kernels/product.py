"""Exact step sums and FMA chains as one operation inside that of `kernels.matmul`: compiled for the
processor where that is a CPU (`kernels.native`, `kernels.native_chain`), XLA's operations elsewhere
(`kernels.exact`, `kernels.chain`). The bits are the same.
"""

import platform
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from kernels import chain, exact
from kernels.arithmetic import Arithmetic
from kernels.compiled import CHAIN, FUSED, compiled

_product = Primitive("exact_product")


def accumulate(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    """FP32 results `[batch, m, n]` of `a[batch, m, k]` and `b[batch, k, n]`, in ascending steps.

    Args:
        a, b: BF16, FP16 or FP32; no size is 0.
        c: FP32 `[batch, m, n]`, or `None` for +0.
        arithmetic: one with `fraction_bits=None` and no tree.
    """
    if not is_native(arithmetic):
        return _by_xla(a, b, c, arithmetic)
    found: Array = _product.bind(a, b, *([] if c is None else [c]), arithmetic=arithmetic)
    return found


def is_native(arithmetic: Arithmetic) -> bool:
    """Whether a CPU has a way of its own for the unit. Step sums: C among the terms, one rounding
    to nearest even that keeps subnormal numbers; of two products `kernels.pairs` is the quicker on
    wide data. Chains: such roundings that keep subnormal numbers everywhere or nowhere, as an x86
    does.
    """
    if arithmetic.is_chain:
        return (
            arithmetic.rounding == "nearest_even"
            and arithmetic.subnormal_inputs == arithmetic.subnormal_results
            and arithmetic.product_overflow == "keep"
            and arithmetic.overflow == "inf"
            and platform.machine().lower() in ("x86_64", "amd64")
        )
    return (
        arithmetic.products > 2
        and arithmetic.addend == "fused"
        and arithmetic.rounding == "nearest_even"
        and arithmetic.subnormal_inputs == arithmetic.subnormal_results == "keep"
        and arithmetic.product_overflow == "keep"
        and arithmetic.zero == "positive"
    )


def _by_xla(a: Array, b: Array, c: Array | None, arithmetic: Arithmetic) -> Array:
    return (chain if arithmetic.is_chain else exact).accumulate(a, b, c, arithmetic)


def _on_cpu(a: Array, b: Array, *c: Array, arithmetic: Arithmetic) -> Array:
    if (native := compiled(CHAIN if arithmetic.is_chain else FUSED)) is None:
        return _elsewhere(a, b, *c, arithmetic=arithmetic)
    addend = c[0] if c else None
    if b.shape[2] < native.columns(arithmetic) < a.shape[1]:
        turned = (None if x is None else x.swapaxes(1, 2) for x in (b, a, addend))
        return native.accumulate(*turned, arithmetic, turned=True).swapaxes(1, 2)
    found: Array = native.accumulate(a, b, addend, arithmetic)
    return found


def _elsewhere(a: Array, b: Array, *c: Array, arithmetic: Arithmetic) -> Array:
    return _by_xla(a, b, c[0] if c else None, arithmetic)


@_product.def_abstract_eval
def _shape(a: Any, b: Any, *c: Any, arithmetic: Arithmetic) -> Any:
    return a.update(shape=(a.shape[0], a.shape[1], b.shape[2]), dtype=jnp.dtype(jnp.float32))


mlir.register_lowering(_product, mlir.lower_fun(_elsewhere, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
