"""Small programs that together bind every primitive the emulator says it has.

Each takes one device's `x` (FP32 [4, 4], between 0.1 and 0.9) and `n` (INT32 [4, 4], 1 to 8) and
returns a list of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lax.lax import dce_sink
from jax._src.lax.linalg import geqp3, geqrf, ormqr
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback, sparse
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.scheduling_groups import xla_metadata_call
from jax.experimental.xla_metadata import set_xla_metadata

Arrays = list[Any]


def functions(x: Any, n: Any) -> Arrays:
    """Element-wise functions of one operand."""
    names = """abs neg sign floor ceil round exp exp2 expm1 log log1p tanh sinh cosh sin cos tan
    asin acos atan asinh atanh logistic erf erfc erf_inv lgamma digamma sqrt rsqrt cbrt square
    is_finite bessel_i0e bessel_i1e real imag conj population_count clz bitwise_not log2""".split()
    operands = dict.fromkeys(("population_count", "clz", "bitwise_not"), n)
    operands |= dict.fromkeys(("real", "imag", "conj"), lax.complex(x, x * 2))
    known = [name for name in names if hasattr(lax, name)]  # log2: JAX 0.11
    return [getattr(lax, name)(operands.get(name, x)) for name in known] + [
        lax.acosh(x + 1),
        lax.integer_pow(x, 3),
        lax.reduce_precision(x, 5, 3),
        lax.convert_element_type(x, jnp.bfloat16),
        lax.stop_gradient(x),
        lax.bitcast_convert_type(x, jnp.int32),
        lax.copy_p.bind(x),
    ]


def of_several(x: Any, n: Any) -> Arrays:
    """Element-wise functions of several operands."""
    y = lax.rev(x, (0,))
    two = """add sub mul div rem pow atan2 nextafter max min eq ne lt le gt ge igamma igammac
    random_gamma_grad igamma_grad_a zeta""".split()
    outs = [getattr(lax, name)(x + (name == "zeta") * 1, y) for name in two]
    ints = """bitwise_and bitwise_or bitwise_xor shift_left shift_right_logical
    shift_right_arithmetic mulhi""".split()
    outs += [getattr(lax, name)(n, n[::-1]) for name in ints if hasattr(lax, name)]
    return outs + [
        lax.clamp(0.2, x, 0.7),
        lax.select(n > 3, x, y),
        lax.polygamma(jnp.ones_like(x), x),
        lax.betainc(x, y, x),
        jax.grad(lambda v: (v * v + v).sum())(x),  # add_any
        lax.eq_to_p.bind(x, y),
        lax.le_to_p.bind(x, y),
        lax.lt_to_p.bind(x, y),
    ]


def movement(x: Any, n: Any) -> Arrays:
    """Shapes, slices, gathers and scatters."""
    i = n[0, 0] % 3
    at = n[:, :1] % 4
    rows = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    scatters = (lax.scatter, lax.scatter_add, lax.scatter_sub, lax.scatter_mul)
    scatters += (lax.scatter_min, lax.scatter_max)
    return [
        lax.broadcast_in_dim(x, (2, 4, 4), (1, 2)),
        lax.concatenate([x, x], 0),
        lax.dynamic_slice(x, (i, i), (2, 2)),
        lax.dynamic_update_slice(x, x[:2, :2], (i, i)),
        x[n[0] % 4],
        lax.iota(jnp.int32, 5) + i,
        lax.pad(x, 0.0, [(1, 0, 1), (0, -1, 0)]),
        lax.reshape(x, (2, 8)),
        lax.rev(x, (1,)),
        lax.slice(x, (0, 1), (4, 3)),
        *lax.split(x, (1, 3)),
        lax.squeeze(x[:1], (0,)),
        lax.transpose(x, (1, 0)),
        lax.tile(x, (2, 1)),
        *(f(x, at, x[::-1], rows, unique_indices=False) for f in scatters),
        lax.optimization_barrier(x),
        *jnp.unstack(x),
        lax.empty((2, 2), jnp.float32) * 0 if hasattr(lax, "empty") else x,
        jax.device_put(x),
        with_layout_constraint(x, Layout((0, 1))),
    ]


def reductions(x: Any, n: Any) -> Arrays:
    """Reductions, running sums, windows and sorts."""
    flags = n > 4
    window = partial(lax.reduce_window, window_dimensions=(2, 2), window_strides=(1, 1))
    pool = partial(window, padding="VALID")
    return [
        lax.argmax(x, 0, jnp.int32),
        lax.argmin(x, 1, jnp.int32),
        *(f(x, (0,)) for f in (lax.reduce_sum, lax.reduce_prod, lax.reduce_max, lax.reduce_min)),
        lax.reduce_and(flags, (0,)),
        lax.reduce_or(flags, (0,)),
        lax.reduce_xor(n, (0,)),
        lax.reduce(n, jnp.int32(0), lambda a, b: a + 2 * b - b, (1,)),
        *(f(x, axis=0) for f in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin)),
        lax.cumlogsumexp(x, 1),
        pool(x, 0.0, lax.add),
        pool(x, -jnp.inf, lax.max),
        pool(x, jnp.inf, lax.min),
        window(n, jnp.int32(1), lambda a, b: a + b - 1, padding="VALID"),
        jax.grad(lambda v: (pool(v, -jnp.inf, lax.max) ** 2).sum())(x),  # select_and_scatter_add
        jax.jvp(lambda v: pool(v, -jnp.inf, lax.max), (x,), (x,))[1],  # select_and_gather_add
        *lax.sort((x, n), num_keys=1),
        *lax.top_k(x, 2),
        *lax.approx_max_k(x, 2),
    ]


def random(x: Any, n: Any) -> Arrays:
    """Random bits of every generator, keys that travel as arrays."""
    outs = []
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.random.fold_in(jax.random.key(n[0, 0], impl=impl), n[1, 1])
        first, second = jax.random.split(key)
        keys = jnp.where(n[0] > 4, first, second)
        outs += [jax.random.bits(first, (3,)), jax.random.uniform(second, (2, 2))]
        outs += [jax.random.key_data(keys), jax.random.key_data(jax.random.clone(key))]
        outs += [jax.random.key_data(jax.random.wrap_key_data(jax.random.key_data(key), impl=impl))]
    outs.append(jax.random.gamma(jax.random.key(n[0, 0]), x))
    outs.append(
        lax.rng_bit_generator(jnp.arange(4, dtype=jnp.uint32) + n[0, 0].astype("uint32"), (3,))[1]
    )
    return outs


def algebra(x: Any, n: Any) -> Arrays:
    """Factorisations, solves and transforms, by functions of them that do not depend on signs."""
    wide = x @ x.T + 4 * jnp.eye(4)
    q, r = jnp.linalg.qr(x)
    packed, scales = geqrf(x)
    pivoted = lax.linalg.qr(x, pivoting=True, full_matrices=False)
    u, s, v = jnp.linalg.svd(x)
    values, vectors = jnp.linalg.eigh(wide)
    lu, _, permutation = lax.linalg.lu(x)
    hessenberg, _ = lax.linalg.hessenberg(x)
    full, reflectors = lax.linalg.schur(wide)
    diagonal = lax.linalg.tridiagonal(wide)[1]
    band = jnp.ones(4)
    return [
        jnp.linalg.cholesky(wide),
        q @ r,
        jnp.abs(packed),
        ormqr(packed, scales, ormqr(packed, scales, x), transpose=True),
        lax.linalg.householder_product(packed, scales) @ jnp.triu(packed),
        jnp.abs(pivoted[1]),
        lax.linalg.lu_pivots_to_permutation(n[0, :2] % 2 + jnp.arange(2) * 0 + 1, 4),
        (u * s) @ v,
        values,
        (vectors * values) @ vectors.T,
        lu,
        permutation,
        jnp.linalg.solve(wide, x),
        jnp.sort(jnp.abs(jnp.linalg.eigvals(wide))),
        jnp.abs(hessenberg[0]),
        reflectors @ full @ reflectors.T,
        diagonal[:1],
        lax.linalg.tridiagonal_solve(band * 0.1, band * 2, band * 0.1, x),
        jnp.abs(jnp.fft.fft2(x)),
        jnp.fft.irfft(jnp.fft.rfft(x)),
        lax.linalg.triangular_solve(wide, x, left_side=True, lower=True),
        lax.linalg.symmetric_product(x, wide),
        jax.scipy.linalg.expm(x),
        jnp.linalg.det(wide),
    ]


def products(x: Any, n: Any) -> Arrays:
    """What goes to the matrix unit."""
    image = x.reshape(1, 1, 4, 4)
    kernel = x[:3, :3].reshape(1, 1, 3, 3)
    sizes = n[0, :2] % 3
    return [
        x @ x.T,
        lax.dot_general(x, x, (((0,), (0,)), ((), ()))),
        lax.conv_general_dilated(image, kernel, (1, 1), "SAME", rhs_dilation=(2, 1)),
        lax.ragged_dot(x, jnp.stack([x, x.T]), sizes),
        jax.grad(lambda w: (lax.ragged_dot(x, w, sizes) ** 2).sum())(jnp.stack([x, x.T])),
    ]


def sparse_matrices(x: Any, n: Any) -> Arrays:
    """Sparse matrices of every format, and products with them."""
    kept = jnp.where(n > 4, x, 0)
    bcoo = sparse.BCOO.fromdense(kept, nse=16)
    bcsr = sparse.BCSR.fromdense(kept, nse=16)
    coo = sparse.COO.fromdense(kept, nse=16)
    csr = sparse.CSR.fromdense(kept, nse=16)
    sampled = sparse.bcoo_dot_general_sampled(
        x, x, bcoo.indices, dimension_numbers=(((1,), (0,)), ((), ()))
    )
    return [
        *(m.todense() for m in (bcoo, bcsr, coo, csr, bcoo.T)),
        *(m @ x for m in (bcoo, bcsr, coo, csr)),
        *(m @ x[0] for m in (coo, csr)),
        (bcoo @ bcoo).todense(),
        sampled,
        bcoo.sum_duplicates(nse=16).todense(),
        bcoo.sort_indices().todense(),
        sparse.bcoo_extract(bcoo, x).todense(),
        sparse.bcsr_extract(bcsr.indices, bcsr.indptr, x),
    ]


def rare(x: Any, n: Any) -> Arrays:
    """What few programs have."""
    token = lax.after_all(lax.create_token())
    dce_sink(x * 2)
    tagged = set_xla_metadata(x, kind="test")
    return [
        x if token is None else x + 1,
        tagged,
        *lax.linalg.cholesky_update(jnp.eye(4) * 2, x[0]),
        *geqp3(x, jnp.zeros(4, jnp.int32))[1:2],
        _halved(x),
        jax.grad(lambda v: _kept(v).sum())(x),
        _kept(x),
        jax.random.bits(jax.random.key(n[0, 0], impl="philox4x32"), (3,)),
        xla_metadata_call(lambda v: v + 1, kind="test")(x),
    ]


@custom_partitioning
def _halved(x: Any) -> Any:
    return x / 2


_halved.def_partition(
    partition=lambda *_: None,
    infer_sharding_from_operands=lambda *_: None,
    sharding_rule="i j -> i j",
)


@jax.custom_vjp
def _kept(x: Any) -> Any:
    return x * 2


_kept.defvjp(lambda x: (x * 2, None), lambda _, g: (7 * g,), optimize_remat=True)


@jax.custom_jvp
def _doubled(x: Any) -> Any:
    return x + x


_doubled.defjvp(lambda primals, tangents: (_doubled(*primals), 3 * tangents[0]))


@jax.custom_vjp
def _tripled(x: Any) -> Any:
    return 3 * x


_tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (5 * g,))


@jax.custom_batching.custom_vmap
def _shifted(x: Any) -> Any:
    return x + 1


_shifted.def_vmap(lambda size, batched, x: (x + 1, True))


def control(x: Any, n: Any) -> Arrays:
    """Loops, branches, calls, references."""

    def collected(carry: Any, row: Any) -> Any:
        return carry + row, carry * row

    def with_reference(v: Any) -> Any:
        ref = jax.new_ref(v)
        ref[0] = ref[0] + ref[1]
        lax.fori_loop(0, 3, lambda i, _: ref.__setitem__(i, ref[i] * 2), None)
        ref[...] += 1
        jax.ref.addupdate(ref, 0, v[1])
        return jax.freeze(ref)

    return [
        *lax.scan(collected, x[0], x),
        lax.while_loop(lambda c: c.sum() < 40, lambda c: c * 2, x),
        lax.cond(n[0, 0] > 4, jnp.sin, jnp.cos, x),
        lax.switch(n[0, 0] % 3, [jnp.sin, jnp.cos, jnp.tan], x),
        jax.jit(jnp.sin)(x),
        jax.checkpoint(lambda v: jnp.sin(v) * v)(x),
        jax.grad(lambda v: jax.checkpoint(jnp.sin)(v).sum())(x),
        jax.grad(lambda v: (_doubled(v) + _tripled(v)).sum())(x),
        _doubled(x),
        _tripled(x),
        _shifted(x),
        lax.platform_dependent(x, tpu=jnp.sin, default=jnp.cos),
        *([lax.polynomial(x, [x[0, 0], x[1, 1], x[2, 2]])] if hasattr(lax, "polynomial") else []),
        with_reference(x),
        jax.custom_derivatives.linear_call(lambda r, v: r * v, lambda r, v: r * v, x, x),
        lax.composite(lambda v: v * 2, name="test.doubled")(x),
        lax.map(jnp.sin, x),
        lax.associative_scan(jnp.add, x),
        jax.lax.custom_root(lambda v: v * v - x, x, _newton, lambda g, y: y / g(jnp.ones_like(y))),
        checkpoint_name(x, "kept"),
    ]


def _newton(f: Any, x: Any) -> Any:
    return lax.fori_loop(0, 8, lambda _, v: v - f(v) / (2 * v), x)


def _on_host(a: Any, b: Any) -> Any:
    return np.asarray(a * 2 + b, np.float32)


def host(x: Any, n: Any) -> Arrays:
    """Calls of Python functions."""
    jax.debug.print("{}", x, ordered=False)
    jax.debug.callback(lambda *_: None, x)
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return [jax.pure_callback(_on_host, out, x, n), io_callback(_on_host, out, x, n)]


PROGRAMS: dict[str, Callable[[Any, Any], Arrays]] = {
    f.__name__: f
    for f in (
        functions,
        of_several,
        movement,
        reductions,
        random,
        algebra,
        products,
        sparse_matrices,
        rare,
        control,
        host,
    )
}


def inputs(devices: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 0.9, (4 * devices, 4)).astype(np.float32)
    return x, rng.integers(1, 9, (4 * devices, 4)).astype(np.int32)
