"""How much vector work one element of each primitive is, in lane operations (one add = 1).

The counts of transcendental functions are assumed: the instruction sequences of the vector unit are
not public. They only matter where a kernel is not limited by memory.
"""

from __future__ import annotations

# Lane operations per result element. Comparisons, selects, conversions and bit operations count
# like an add.
PER_ELEMENT: dict[str, int] = {
    **dict.fromkeys(
        """abs add add_any and ceil clamp convert_element_type eq eq_to floor ge gt le
        le_to lt lt_to max min mul ne neg not or real imag conj round select_n
        shift_left shift_right_arithmetic shift_right_logical sign sub xor is_finite
        square one_minus_square reduce_precision mulhi nextafter population_count clz
        complex rem""".split(),
        1,
    ),
    **dict.fromkeys("div sqrt rsqrt cbrt".split(), 4),
    **dict.fromkeys("exp exp2 log log2 expm1 log1p integer_pow".split(), 8),
    **dict.fromkeys(
        """tanh logistic sin cos tan sinh cosh asin acos atan asinh acosh atanh atan2 pow
        erf erfc erf_inv""".split(),
        16,
    ),
    **dict.fromkeys(
        """lgamma digamma igamma igammac igamma_grad_a polygamma zeta bessel_i0e bessel_i1e
        regularized_incomplete_beta""".split(),
        64,
    ),
}

# Results without arithmetic, made on the fly inside a kernel that uses them.
GENERATED = frozenset("iota broadcast_in_dim empty empty2 zeros_like".split())

# The same bytes under another shape, type or name: no work, no new buffer.
ALIASES = frozenset(
    """reshape squeeze expand_dims pvary pcast stop_gradient
    bitcast_convert_type name random_wrap random_unwrap optimization_barrier
    layout_constraint reduced_vary_cast_p vary_unreduced_cast_p reduced_vary_cast
    vary_unreduced_cast mesh_cast
    with_memory_space_constraint preduced stage shard_alike xla_metadata_value relayout""".split()
)

# Reductions along axes: lane operations per operand element.
REDUCTIONS: dict[str, int] = {
    "reduce_sum": 1,
    "reduce_max": 1,
    "reduce_min": 1,
    "reduce_prod": 1,
    "reduce_and": 1,
    "reduce_or": 1,
    "reduce_xor": 1,
    "reduce": 2,
    "argmax": 2,
    "argmin": 2,
}

# Scans along an axis: two passes over the data.
CUMULATIVE: dict[str, int] = {
    "cumsum": 2,
    "cumprod": 2,
    "cummax": 2,
    "cummin": 2,
    "cumlogsumexp": 20,
}

# Parts of an array that a kernel can read in place of the whole.
SLICES = frozenset("slice dynamic_slice split unstack rev".split())

# Layout changes and copies: a kernel of their own that reads and writes.
MOVES = frozenset("transpose concatenate pad copy copy_p device_put stack tile".split())

# Random bits: lane operations per 32-bit word.
RANDOM: dict[str, int] = {
    "threefry2x32": 60,
    "random_bits": 60,
    "random_split": 60,
    "random_fold_in": 60,
    "random_seed": 2,
    "random_clone": 0,
    "rng_bit_generator": 30,
    "rng_uniform": 30,
    "random_gamma": 400,
}

# Happen on the host or only in the type system.
FREE = frozenset(
    "debug_callback debug_print axis_index create_token after_all dce_sink platform_index".split()
)
