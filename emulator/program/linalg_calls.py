"""Factorisations in auto-sharded programs: calls that XLA's partitioner moves and does not enter.

JAX lowers them to routines of LAPACK, several operations each. Here a primitive becomes one call
with a name of its own, and the partitioned module's call becomes that primitive again, on what one
device has: parts of a batch, or whole matrices, as XLA divides LAPACK's.

So does XLA's own generator of random bits, which JAX lowers by way of 64-bit words; every device
draws all of them, as XLA has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax._src import config
from jax._src.interpreters import mlir
from jax._src.lax import linalg

#: Primitives, and how many dimensions of their first operand are not of a batch.
_MATRIX_DIMS = {
    linalg.eig_p: 2,
    linalg.eigh_p: 2,
    linalg.geqp3_p: 2,
    linalg.geqrf_p: 2,
    linalg.hessenberg_p: 2,
    linalg.householder_product_p: 2,
    linalg.lu_p: 2,
    linalg.ormqr_p: 2,
    linalg.schur_p: 2,
    linalg.svd_p: 2,
    linalg.tridiagonal_p: 2,
    linalg.tridiagonal_solve_p: 1,
}

#: Name of a call -> its primitive and parameters.
Calls = dict[str, tuple[Any, dict[str, Any]]]


def lowerings(calls: Calls) -> list[tuple[Any, Callable[..., Any]]]:
    """Lowering rules that write every factorisation as one call, noted in `calls`."""

    def rule(primitive: Any, matrix_dims: int) -> Callable[..., Any]:
        def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
            name = f"cm384_{primitive.name}_{len(calls)}"
            calls[name] = primitive, params
            batch = len(ctx.avals_in[0].shape) - matrix_dims
            attributes = {
                "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(batch)})
            }
            if config.use_shardy_partitioner.value:
                attributes["sdy.sharding_rule"] = linalg._build_sdy_sharding_rule(
                    ctx.module_context, batch, ctx.avals_in, ctx.avals_out
                )
            types = [mlir.aval_to_ir_type(ctx.module_context, aval) for aval in ctx.avals_out]
            return mlir.custom_call(
                name, result_types=types, operands=operands, extra_attributes=attributes
            ).results

        return lower

    def random_bits(ctx: Any, key: Any, **params: Any) -> Any:
        name = f"cm384_rng_bit_generator_{len(calls)}"
        calls[name] = lax.rng_bit_generator_p, params
        types = [mlir.aval_to_ir_type(ctx.module_context, aval) for aval in ctx.avals_out]
        return mlir.custom_call(name, result_types=types, operands=[key]).results

    rules = [(primitive, rule(primitive, dims)) for primitive, dims in _MATRIX_DIMS.items()]
    return [*rules, (lax.rng_bit_generator_p, random_bits)]
