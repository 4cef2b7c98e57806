"""Matmuls and convolutions of all devices as one batched matmul on the cube.

A mesh axis that both operands vary over becomes a batch dimension; one that only the left operand
varies over makes the matmul taller, one that only the right operand varies over makes it wider. No
axis is ever summed over, so the bits are those of each device's own matmul. (The two dies of a
package divide M or N, never K, and so change no bits.)

With a tiling the bits of a row depend on where it is: there every mesh axis is a batch dimension,
and each die has its own part of the rows or columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import kernels
from emulator.chip import die_share
from emulator.program.folded import Folded, FoldedMesh, spread, union_axes


def dot_general(
    eqn: Any, lhs: Folded, rhs: Folded, mesh: FoldedMesh, arithmetic: kernels.Arithmetic
) -> Folded:
    """One `dot_general` equation for all devices."""
    params = eqn.params
    return _dot(
        lhs,
        rhs,
        params["dimension_numbers"],
        mesh,
        arithmetic,
        precision=params["precision"],
        preferred_element_type=eqn.outvars[0].aval.dtype,
    )


def _dot(
    lhs: Folded,
    rhs: Folded,
    dimension_numbers: Any,
    mesh: FoldedMesh,
    arithmetic: kernels.Arithmetic,
    **options: Any,
) -> Folded:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    n_lhs, n_rhs = len(lhs.axes), len(rhs.axes)
    shared = [a for a in lhs.axes if a in rhs.axes]
    taller = [a for a in lhs.axes if a not in shared]
    wider = [a for a in rhs.axes if a not in shared]
    numbers = (
        (tuple(n_lhs + d for d in lhs_contract), tuple(n_rhs + d for d in rhs_contract)),
        (
            (*(lhs.axes.index(a) for a in shared), *(n_lhs + d for d in lhs_batch)),
            (*(rhs.axes.index(a) for a in shared), *(n_rhs + d for d in rhs_batch)),
        ),
    )
    out = kernels.dot_general(lhs.array, rhs.array, numbers, arithmetic=arithmetic, **options)
    # out: [shared, local batch, taller, local rows, wider, local columns]
    n_rows = len(lhs.local_shape) - len(lhs_contract) - len(lhs_batch)
    sections = [len(shared), len(lhs_batch), len(taller), n_rows, len(wider)]
    starts = [0, *itertools.accumulate(sections)]
    position = {a: starts[0] + i for i, a in enumerate(shared)}
    position |= {a: starts[2] + i for i, a in enumerate(taller)}
    position |= {a: starts[4] + i for i, a in enumerate(wider)}
    axes = mesh.ordered(position)
    local = [
        *range(starts[1], starts[2]),
        *range(starts[3], starts[4]),
        *range(starts[5], out.ndim),
    ]
    out = lax.transpose(out, [*(position[a] for a in axes), *local])
    return Folded(out, axes, lies=(*shared, *taller, *wider))


def tiled_dot_general(
    eqn: Any, lhs: Folded, rhs: Folded, mesh: FoldedMesh, settings: Any
) -> Folded:
    """One `dot_general` equation for all devices, each with its own tiles."""
    axes = union_axes(mesh, (lhs, rhs))
    lhs, rhs = spread(lhs, axes, mesh), spread(rhs, axes, mesh)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs_shape, rhs_shape = lhs.local_shape, rhs.local_shape
    rows = [d for d in range(len(lhs_shape)) if d not in (*lhs_contract, *lhs_batch)]
    columns = [d for d in range(len(rhs_shape)) if d not in (*rhs_contract, *rhs_batch)]
    batch_shape = [lhs_shape[d] for d in lhs_batch]
    sizes = [math.prod(lhs_shape[d] for d in dims) for dims in (lhs_batch, rows, lhs_contract)]
    (batch, m, k), n = sizes, math.prod(rhs_shape[d] for d in columns)
    names = {jnp.result_type(v.array).name for v in (lhs, rhs)}
    if not (batch and m and k and n) or not names <= set(kernels.floats.FLOAT_DTYPES):
        return dot_general(eqn, lhs, rhs, mesh, settings.arithmetic)
    lead = len(axes)
    a = _ordered(lhs.array, lead, (*lhs_batch, *rows, *lhs_contract)).reshape(-1, m, k)
    b = _ordered(rhs.array, lead, (*rhs_batch, *rhs_contract, *columns)).reshape(-1, k, n)
    name = names.pop() if len(names) == 1 else "float32"
    out = _dies(a, b, name, batch, eqn, settings)
    shape = [*mesh.shape(axes), *batch_shape, *(lhs_shape[d] for d in rows)]
    return Folded(out.reshape(*shape, *(rhs_shape[d] for d in columns)), axes)


def _dies(a: Array, b: Array, dtype: str, batch: int, eqn: Any, settings: Any) -> Array:
    """`a[.., m, k] @ b[.., k, n]`, rows or columns divided over the dies of each device."""
    (_, m, k), n, on = a.shape, b.shape[2], settings.machine
    unit = dtype if dtype != "float32" else on.chip.fp32_mode
    out_type = eqn.outvars[0].aval.dtype.name
    die_m, die_n, _ = die_share(m, k, n, on, unit, batch, out_type)

    def product(a: Array, b: Array) -> Array:
        tiling = settings.tiling
        if isinstance(tiling, str):
            cores = on.chip.cube_cores
            tiling = kernels.tiling.library(a.shape[1], k, b.shape[2], dtype, cores=cores)
        return kernels.dot_general(
            a,
            b,
            (((2,), (1,)), ((0,), (0,))),
            arithmetic=settings.arithmetic,
            tiling=tiling,
            precision=eqn.params["precision"],
            preferred_element_type=eqn.outvars[0].aval.dtype,
        )

    if die_m < m:
        return jnp.concatenate([product(a[:, i : i + die_m], b) for i in range(0, m, die_m)], 1)
    return jnp.concatenate([product(a, b[..., i : i + die_n]) for i in range(0, n, die_n)], 2)


def _ordered(x: Any, lead: int, dims: tuple[int, ...]) -> Array:
    """Local dimensions in another order, behind `lead` device axes."""
    return lax.transpose(jnp.asarray(x), [*range(lead), *(lead + d for d in dims)])


def conv_general_dilated(
    eqn: Any, lhs: Folded, rhs: Folded, mesh: FoldedMesh, arithmetic: kernels.Arithmetic
) -> Folded:
    """One convolution equation: patches times kernel, K running over (kernel positions, channels
    in), channels fastest.
    """
    p = eqn.params
    numbers = p["dimension_numbers"]
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    # image [batch, *space, channels], kernel [*space, channels in per group, channels out]
    image = _local(lhs, lambda x: lax.transpose(x, _last(numbers.lhs_spec)))
    kernel = _local(
        rhs,
        lambda w: lax.transpose(
            w, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
        ),
    )
    window = kernel.local_shape[:-2]
    patches = _local(
        image,
        lambda x: _patches(
            x, window, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"]
        ),
    )  # [batch, *out space, kernel positions, channels]
    batch, *space, taps, channels = patches.local_shape
    c_in, c_out = kernel.local_shape[-2:]
    n_groups = max(groups, batch_groups)
    # Groups of channels (or of images) never meet: a batch dimension of the matmul.
    if batch_groups > 1:
        shape = (batch_groups, batch // batch_groups, *space, taps, channels)
        patches = _local(patches, lambda x: x.reshape(shape))
        batch //= batch_groups
    else:
        shape = (batch, *space, taps, groups, channels // groups)
        patches = _local(
            patches,
            lambda x: lax.transpose(x.reshape(shape), _to_front(len(shape), len(shape) - 2)),
        )
    left = _local(patches, lambda x: x.reshape(n_groups, batch * math.prod(space), taps * c_in))
    kernel_shape = (taps * c_in, n_groups, c_out // n_groups)
    right = _local(kernel, lambda w: lax.transpose(w.reshape(kernel_shape), (1, 0, 2)))
    options = {"precision": p["precision"], "preferred_element_type": eqn.outvars[0].aval.dtype}
    out = _dot(left, right, (((2,), (1,)), ((0,), (0,))), mesh, arithmetic, **options)
    out = _local(out, lambda y: lax.transpose(y, (1, 0, 2)).reshape(batch, *space, c_out))
    out_spec = _last(numbers.out_spec)
    inverse = [out_spec.index(d) for d in range(len(out_spec))]
    return _local(out, lambda y: lax.transpose(y, inverse))


def _patches(
    x: Array, window: Any, strides: Any, padding: Any, lhs_dilation: Any, rhs_dilation: Any
) -> Array:
    """[batch, *space, c] -> [batch, *out space, prod(window), c], zeros outside; negative padding
    crops.
    """
    zero = lax.full((), 0, x.dtype)
    config = [
        (0, 0, 0),
        *((lo, hi, d - 1) for (lo, hi), d in zip(padding, lhs_dilation, strict=True)),
        (0, 0, 0),
    ]
    x = lax.pad(x, zero, config)
    spans = [(w - 1) * d + 1 for w, d in zip(window, rhs_dilation, strict=True)]
    sizes = [
        max(0, (n - span) // s + 1)
        for n, span, s in zip(x.shape[1:-1], spans, strides, strict=True)
    ]
    if 0 in sizes:  # the window is nowhere inside, and where it begins may not be either
        return lax.full((x.shape[0], *sizes, math.prod(window), x.shape[-1]), 0, x.dtype)
    taps = []
    for tap in itertools.product(*map(range, window)):
        start = [t * d for t, d in zip(tap, rhs_dilation, strict=True)]
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, sizes, strides, strict=True)]
        taps.append(
            lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))
        )
    if not taps:
        return lax.full((x.shape[0], *sizes, 0, x.shape[-1]), 0, x.dtype)
    return lax.concatenate(
        [lax.expand_dims(t, (t.ndim - 1,)) for t in taps], dimension=len(window) + 1
    )


def _local(value: Folded, fun: Callable[[Array], Array]) -> Folded:
    """`fun` of the local array, for every device."""
    array, n = value.array, len(value.axes)
    flat = array.reshape(math.prod(array.shape[:n]), *array.shape[n:])
    out = jax.vmap(fun)(flat)
    return Folded(out.reshape(*array.shape[:n], *out.shape[1:]), value.axes)


def _last(spec: Any) -> tuple[int, ...]:
    """(batch, feature, *space) positions -> (batch, *space, feature)."""
    return (spec[0], *spec[2:], spec[1])


def _to_front(rank: int, dim: int) -> list[int]:
    return [dim, *(d for d in range(rank) if d != dim)]
