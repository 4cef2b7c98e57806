"""Folded arrays as the words they are made of, for rules that move values and round nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from emulator.program.folded import Folded


def on_words(rule: Callable[..., Folded]) -> Callable[..., Folded]:
    """`rule` of folded arrays of one type, on their bit patterns: XLA:CPU may move BF16 through
    FP32, flushing it. A random key is moved as the words it is made of.
    """

    def moved(*values: Folded) -> Folded:
        words, back = words_of(jnp.result_type(values[0].array), values[0].array)
        out = rule(*(Folded(words(v.array), v.axes) for v in values))
        return Folded(back(out.array), out.axes)

    return moved


def words_of(dtype: Any, like: Any) -> tuple[Callable[[Any], Array], Callable[[Array], Array]]:
    """From arrays of `dtype` to arrays of whole bytes, and back."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(like)
        return jax.random.key_data, lambda words: jax.random.wrap_key_data(words, impl=impl)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
        if bits < 8:  # FP32 holds them all
            wide, back = words_of(jnp.dtype(jnp.float32), None)
            return lambda x: wide(x.astype(jnp.float32)), lambda w: back(w).astype(dtype)
        word = jnp.dtype(f"uint{bits}")
        return (
            lambda x: lax.bitcast_convert_type(x, word),
            lambda words: lax.bitcast_convert_type(words, dtype),
        )
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return lambda x: x.astype(jnp.int8), lambda words: words.astype(dtype)
    return jnp.asarray, jnp.asarray
