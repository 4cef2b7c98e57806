"""Every primitive that JAX 0.10 to 0.12 can put into a jaxpr, and what becomes of it.

Plain lists of names. The values reading looks its primitives up here and in the tables of its
rules; whatever is in none of them is refused by name. `primitive_table` prints all of it.
"""

from __future__ import annotations

#: Evaluated by XLA on each device's own arrays.
PER_DEVICE = frozenset(
    # shapes and movement
    """broadcast_in_dim bitcast_convert_type concatenate dynamic_slice dynamic_update_slice empty
    empty2 gather iota pad reshape rev scatter scatter-add scatter-sub scatter-mul scatter-min
    scatter-max select_and_gather_add select_and_scatter select_and_scatter_add slice split squeeze
    stack tile transpose unstack zeros_like
    argmax argmin reduce reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or
    reduce_xor reduce_window reduce_window_sum reduce_window_max reduce_window_min
    cumsum cumprod cummax cummin cumlogsumexp sort top_k approx_top_k
    random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap
    random_wrap rng_bit_generator threefry2x32 threefry4x32 philox2x32 philox4x32
    iota_2x32_shape consume assert_consumed_value to_edtype from_edtype
    create_token after_all""".split()
)

#: This package's own, in programs that are emulated already or call `kernels.matmul`.
OWN = frozenset(("exact_product", "ordered_sums", "unit_matmul"))

#: Factorisations and transforms: XLA's (LAPACK's) on each device's own arrays.
LINEAR_ALGEBRA = frozenset(
    """cholesky eig eigh fft geqp3 geqrf hessenberg householder_product lu lu_pivots_to_permutation
    ormqr qr schur svd triangular_solve tridiagonal tridiagonal_solve cholesky_update""".split()
)

#: Change placement, order or type, never a value.
IDENTITIES = frozenset(
    """pvary preduced sharding_constraint reshard layout_constraint optimization_barrier device_put
    name stage shard_alike xla_metadata_value vary_unreduced_cast_p reduced_vary_cast_p
    vary_unreduced_cast reduced_vary_cast with_memory_space_constraint relayout""".split()
)

#: Call the host: once per device, in device order (see `host_calls`).
HOST = frozenset("pure_callback io_callback debug_callback debug_print".split())

#: Mutable arrays: rewritten as values before anything is read (see `refs`).
REFERENCES = frozenset(
    "new_ref empty_ref get swap addupdate freeze free_ref accum_grad_in_ref run_state".split()
)

_FAMILIES: dict[str, str] = {
    "an asynchronous or one-sided message; use the synchronous collective": """
        psend precv all_gather_start all_gather_reduced_start psum_start
        psum_invariant_start unreduced_psum_start reduce_scatter_start
        unreduced_reduce_scatter_start all_to_all_start pbroadcast_start ppermute_start
        all_gather_done psum_done reduce_scatter_done all_to_all_done pbroadcast_done
        ppermute_done""",
    "a kernel written for another chip (Pallas, Mosaic, cuDNN)": """
        pallas_call mosaic_gpu_p tpu_custom_call core_map mpmd_map run_scoped masked_load
        masked_swap num_programs program_id multiple_of reciprocal roll
        semaphore_read semaphore_signal semaphore_wait get_barrier_semaphore get_global
        stochastic_round prng_join prng_random_bits prng_seed prng_split matmul_acc_lhs matmul_pop
        matmul_push_rhs conv matmul_lhs_fifo matmul_pop_fifo dma_start dma_wait delay emit_pipeline
        pipeline_body has_memory_space pack_dtype pack_elementwise unpack_dtype unpack_elementwise
        trace_value bitcast add_dependency jaxpr_call einshape_lo custom_fusion fusible
        remove_memory_space
        cudnn_fusion dot_product_attention_bwd dot_product_attention_bwd_wrapper
        dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper
        dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
        dot_product_attention_fwd dot_product_attention_fwd_wrapper rnn_bwd rnn_fwd
        scaled_matmul scaled_matmul_wrapper""",
    "a broadcast whose root only values know; use lax.psum of a masked value": "pbroadcast_dynamic",
    "a step of XLA's own runtime, below every program": """
        thunky.all_gather thunky.all_reduce thunky.all_to_all thunky.async_done thunky.async_start
        thunky.call_jax thunky.call_thunky_nested thunky.collective_group
        thunky.collective_permute thunky.cond thunky.copy thunky.custom_call
        thunky.inline_constant thunky.memset thunky.memzero thunky.ptx_kernel
        thunky.reduce_scatter thunky.while""",
    "foreign code, whose arithmetic nobody here knows": """
        ffi_call buffer_callback spsolve coo_spmm coo_spmv csr_spmm csr_spmv""",
    "an exported or shape-polymorphic program; pass the function that was exported": """
        call_exported dim_as_value dimension_size shape_assertion""",
    "work placed on the host": "compute_on fused_call",
    "drawn from a hidden state of the host; use jax.random": "rng_uniform",
    "about the arrays of real processes": """
        global_array_to_host_local_array host_local_array_to_global_array inspect_sharding""",
    "JAX removes it before a program runs; apply the transformation it belongs to": """
        check custom_lin unreachable todense tie program_order
        broadcast_to pin unpin create_linear""",
    "a mutable or user-defined type": """
        box_get box_set new_box new_log log_extend log_read call_hi_primitive
        call_hi_primitive_linearized""",
    "a product of scaled 8-bit floats, which the machine has no unit for": "scaled_dot",
}

#: Refused, with the reason.
REFUSED: dict[str, str] = {
    name: reason for reason, names in _FAMILIES.items() for name in names.split()
}
