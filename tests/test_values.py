"""The values reading: sharded programs against the same programs on real host devices, and against
hand-written loops.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
import kernels
from emulator.program.emulate import evaluate_with_counts
from emulator.program.trace import trace
from tests import programs
from tests.programs import PROGRAMS, flat_words, normal

BF16 = ml_dtypes.bfloat16
PACKAGE, DIE = em.cloudmatrix384(), em.cloudmatrix384(device="die")
RING = {"all_reduce": "ring", "reduce_scatter": "ring"}


def words(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind not in "biu" else x


def same_bits(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.shape(a) == np.shape(b) and np.array_equal(words(a), words(b)) for a, b in pairs)


# --- against the same program on real host devices ------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("native") / "outputs.npz"
    flags = f"--xla_force_host_platform_device_count={programs.DEVICES}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "tests.programs", str(path)], env=env, cwd=root, check=True
    )
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("vector", ["exact", "native"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_real_devices_within_rounding(
    name: str, vector: str, native: dict[str, np.ndarray]
) -> None:
    axes, build, args = PROGRAMS[name]
    run = em.emulate(build(PACKAGE.mesh(**axes)), PACKAGE, arithmetic="native", vector=vector)
    outputs = flat_words(run(*args))
    expected = [native[f"{name}/{i}"] for i in range(len(outputs))]
    assert f"{name}/{len(outputs)}" not in native
    half = any(np.asarray(a).dtype == BF16 for a in args) or name == "fully_sharded"
    for got, want in zip(outputs, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if name == "movement" or got.dtype.kind in "biu":
            np.testing.assert_array_equal(got, want)
        else:  # other orders of addition: a few roundings of the type the values pass through
            scale = np.abs(want).max() + 1e-30
            np.testing.assert_allclose(got / scale, want / scale, atol=2**-5 if half else 2**-19)


# --- collectives: the bits of a loop in the algorithm's order -------------------------------------


def ring_order(x: np.ndarray) -> np.ndarray:
    """[n, count] -> [count]: chunk c is x[c] + x[c+1] + ..., rounded to the array's type at each
    addition.
    """
    n, count = x.shape
    size = -(-count // n)
    out = np.empty(count, x.dtype)
    for c in range(n):
        at = slice(c * size, (c + 1) * size)
        total = x[c, at]
        for step in range(1, n):
            total = total + x[(c + step) % n, at]
        out[at] = total
    return out


def in_two_dies(x: np.ndarray) -> np.ndarray:
    cut = -(-x.shape[1] // 2)
    return np.concatenate([ring_order(x[:, :cut]), ring_order(x[:, cut:])])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize(("machine", "by_hand"), [(PACKAGE, in_two_dies), (DIE, ring_order)])
def test_psum_adds_in_ring_order(machine: Any, by_hand: Any, dtype: Any, check_vma: bool) -> None:
    mesh = machine.mesh(x=3, y=4)
    x = normal(3 * 4, 5 * 7, dtype=dtype)  # 35 elements: no even chunks anywhere

    def over(axes: Any) -> Any:
        body = lambda v: lax.psum(v.reshape(5, 7), axes)  # noqa: E731
        rest = tuple(a for a in ("x", "y") if a not in axes)
        out = P(rest) if rest else P()
        run = jax.shard_map(
            body, mesh=mesh, in_specs=P(("x", "y")), out_specs=out, check_vma=check_vma
        )
        return np.asarray(em.emulate(run, machine, algorithms=RING)(x)).reshape(-1, 35)

    grid = x.reshape(3, 4, 35)
    assert same_bits(over(("x",)), np.stack([by_hand(grid[:, j]) for j in range(4)]))
    assert same_bits(over(("y",)), np.stack([by_hand(grid[i]) for i in range(3)]))
    assert same_bits(over(("x", "y"))[0], by_hand(x))
    turned = grid.transpose(1, 0, 2).reshape(12, 35)  # the first axis named is the slowest
    assert same_bits(over(("y", "x"))[0], by_hand(turned))
    assert not same_bits(by_hand(turned), by_hand(x))


def test_psum_keeps_subnormals_and_rounds_each_addition() -> None:
    mesh = DIE.mesh(x=6)
    tiny = np.array([[1, 3, 0x8002, 0x7F, 0x80, 0x8081]] * 6, np.uint16).view(BF16)
    tiny[::2] *= BF16(1)
    run = jax.shard_map(lambda v: lax.psum(v, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    got = em.emulate(run, DIE, algorithms=RING)(tiny)
    assert same_bits(got[0], ring_order(tiny)) and np.any(words(got) != 0)


def test_psum_of_a_replicated_value_adds_it_n_times() -> None:
    mesh = DIE.mesh(x=48)
    run = jax.shard_map(
        lambda v: lax.psum(v, "x"), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    got = em.emulate(run, DIE, algorithms=RING)(np.full(1, 1.0078125, BF16))
    assert float(got[0]) == 48.25  # 48 x 1.0078125 is 48.375, which BF16 would round to 48.5


@pytest.mark.parametrize("machine", [PACKAGE, DIE])
def test_psum_scatter_has_the_order_of_its_blocks_owner(machine: Any) -> None:
    mesh = machine.mesh(x=6)
    x = normal(6, 6, 11, dtype=BF16)

    def body(v: Any) -> Any:
        return lax.psum_scatter(v[0], "x", tiled=True)

    run = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    got = np.asarray(em.emulate(run, machine, algorithms=RING)(x))
    by_hand = []
    for r in range(6):
        total = x[r, r]
        for step in range(1, 6):
            total = total + x[(r + step) % 6, r]
        by_hand.append(total)
    assert same_bits(got, np.stack(by_hand))


def test_groups_of_an_axis_reduce_apart() -> None:
    mesh = DIE.mesh(x=6)
    x = normal(6, 9, dtype=BF16)
    groups = [[0, 3, 5], [4, 2, 1]]
    run = jax.shard_map(
        lambda v: lax.psum(v, "x", axis_index_groups=groups),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    )
    got = np.asarray(em.emulate(run, DIE, algorithms=RING)(x))
    for group in groups:
        for member in group:
            assert same_bits(got[member], ring_order(x[group]))


def test_algorithms_change_bits_and_a_users_own_is_followed() -> None:
    mesh = DIE.mesh(x=5)
    x = normal(5, 64, dtype=BF16)
    run = jax.shard_map(lambda v: lax.psum(v, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    ring = em.emulate(run, DIE, algorithms={"all_reduce": "ring"})(x)
    mesh_order = em.emulate(run, DIE, algorithms={"all_reduce": "full_mesh"})(x)
    assert not same_bits(ring, mesh_order)
    from emulator.collectives import build

    own = em.emulate(
        run, DIE, algorithms={"all_reduce": lambda g: build("all_reduce", "full_mesh", g)}
    )(x)
    assert same_bits(own, mesh_order)


# --- matmuls --------------------------------------------------------------------------------------


def test_each_devices_matmul_has_the_cubes_bits() -> None:
    mesh = PACKAGE.mesh(x=3, y=2)
    a, b = normal(3 * 4, 40, dtype=BF16), normal(40, 2 * 5, seed=1, dtype=BF16)

    def body(a: Any, b: Any) -> Any:
        both = jnp.dot(a, b, preferred_element_type=jnp.float32)
        own = a * (1 + lax.axis_index("y")).astype(a.dtype)
        batched = jnp.dot(own, b, preferred_element_type=jnp.float32)
        rounded = a @ b
        mixed = jnp.dot(a.astype(jnp.float32), b)
        turned = jnp.einsum("mk,kn->nm", a, b, preferred_element_type=jnp.float32)
        return both, batched, rounded, mixed, turned[None, None]

    specs = (P("x"), P(None, "y"))
    out = (P("x", "y"),) * 4 + (P("x", "y"),)
    run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out)
    both, batched, rounded, mixed, turned = em.emulate(run, PACKAGE)(a, b)
    reference = kernels.reference.matmul
    cube = kernels.ASCEND_910C
    for i in range(3):
        for j in range(2):
            rows, cols = slice(4 * i, 4 * i + 4), slice(5 * j, 5 * j + 5)
            block = reference(a[rows], b[:, cols], arithmetic=cube)
            assert same_bits(both[rows, cols], block)
            assert same_bits(
                batched[rows, cols], reference(a[rows] * BF16(1 + j), b[:, cols], arithmetic=cube)
            )
            assert same_bits(rounded[rows, cols], block.astype(BF16))
            assert same_bits(turned[i, j], block.T)
            wide = reference(
                a[rows].astype(np.float32), b[:, cols].astype(np.float32), arithmetic=cube
            )
            assert same_bits(mixed[rows, cols], wide)


def test_arithmetic_is_the_machines_own_unless_named() -> None:
    x, w = normal(8, 512, dtype=BF16), normal(512, 8, seed=1, dtype=BF16)

    def f(x: Any, w: Any) -> Any:
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    nvl72 = em.gb200_nvl72()
    ascend, hopper = em.emulate(f, PACKAGE)(x, w), em.emulate(f, nvl72)(x, w)
    assert same_bits(ascend, kernels.matmul(x, w, arithmetic=kernels.ASCEND_910C))
    assert same_bits(hopper, kernels.matmul(x, w, arithmetic=kernels.NVIDIA_HOPPER))
    assert same_bits(em.emulate(f, PACKAGE, arithmetic=kernels.NVIDIA_HOPPER)(x, w), hopper)
    assert not same_bits(ascend, hopper)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": [(2, 1), (0, 3)], "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": [(1, 1), (-1, 2)], "lhs_dilation": (2, 2)},
        {"window_strides": (1, 2), "padding": "VALID", "feature_group_count": 2},
        {"window_strides": (1, 1), "padding": "VALID", "batch_group_count": 2},
        {"window_strides": (1, 2), "padding": [(0, 0), (0, 2)], "rhs_dilation": (6, 1)},
    ],
)
def test_convolutions_are_matmuls_over_kernel_positions_and_channels(
    options: dict[str, Any],
) -> None:
    groups = options.get("feature_group_count", 1)
    x, w = normal(4, 8, 9, 6, dtype=BF16), normal(3, 2, 6 // groups, 8, seed=1, dtype=BF16)

    def f(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            w,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
            **options,
        )

    got, native = em.emulate(f, PACKAGE)(x, w), jax.jit(f)(x, w)
    np.testing.assert_allclose(got, native, atol=1e-4)
    small = (
        np.round(np.asarray(x, np.float32)).astype(BF16),
        np.round(np.asarray(w, np.float32)).astype(BF16),
    )
    assert np.array_equal(
        em.emulate(f, PACKAGE)(*small), jax.jit(f)(*small)
    )  # integers: exact in any order
    if options == {"window_strides": (1, 1), "padding": "SAME"}:
        padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), axis=(1, 2))
        patches = np.ascontiguousarray(windows.transpose(0, 1, 2, 4, 5, 3)).reshape(-1, 36)
        by_hand = kernels.matmul(patches, w.reshape(36, 8), arithmetic=kernels.ASCEND_910C)
        assert same_bits(np.asarray(got).reshape(-1, 8), by_hand)


# --- element-wise work and sums -------------------------------------------------------------------


def test_elementwise_operations_round_once() -> None:
    a, b, c = (normal(4099, seed=s) for s in range(3))
    one = jnp.float32(3)

    def f(a: Any, b: Any, c: Any) -> Any:
        return a * b + c, (a * b) * c - a / one, a**3 + b * b, a / b.shape[0]

    got = em.emulate(f, PACKAGE)(a, b, c)
    three, n = np.float32(3), np.float32(4099)
    want = a * b + c, (a * b) * c - a / three, a * a * a + b * b, a / n
    assert same_bits(got, want)
    assert not same_bits(jax.jit(f)(a, b, c), want)  # XLA contracts, and divides by multiplying


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_xla_would_compute_in_another_order(dtype: Any) -> None:
    a, b, c = (np.abs(normal(4099, seed=s)).astype(dtype) + dtype(0.5) for s in range(3))
    small, large = dtype(1.1), dtype(100)

    def f(a: Any, b: Any, c: Any) -> Any:
        quotients = (a / b) / c, a / (b / c), (a / small) / large, small / (large / a)
        return quotients, (a + small) + large, (a * small) * large, large - (large - a)

    assert same_bits(em.emulate(f, PACKAGE)(a, b, c), f(a, b, c))


def test_constants_that_a_program_makes_are_added_in_its_order() -> None:
    """XLA knows what nothing given has a part in, and would add it up first."""
    x = normal(4000, seed=1)
    mesh = PACKAGE.mesh(d=4)

    def added(x: Any, small: Any, large: Any) -> Any:
        return (x + small) + large

    def f(x: Any) -> Any:
        small, large = (jnp.full(x.shape, value, x.dtype) for value in (0.1, 0.7))
        return {
            "plain": added(x, small, large),
            "jit": jax.jit(added)(x, small, large),
            "scan": lax.scan(lambda c, _: (added(c, small, large), None), x, length=1)[0],
            "cond": lax.cond(x[0] < 9, added, lambda x, *_: x, x, small, large),
            "shard_map": jax.shard_map(added, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(
                x, small, large
            ),
        }

    want = (x + np.float32(0.1)) + np.float32(0.7)
    found = jax.jit(em.emulate(f, PACKAGE))(x)
    assert {name for name, y in found.items() if not same_bits(y, want)} == set()


def test_conversions_of_wide_numbers_round_once() -> None:
    def narrowed(x: np.ndarray, dtype: Any) -> list[float]:
        with jax.enable_x64(True):
            got = em.emulate(lambda x: x.astype(dtype), PACKAGE)(x)
        return [float(x) for x in np.asarray(got)]

    # Beside a tie of the narrow type, by less than FP32 can tell.
    whole = np.array([(257 << 17) + 1, (259 << 17) - 1, (257 << 17), 2**31 - 1, 12])
    want = [float(x) for x in (258 << 17, 258 << 17, 256 << 17, 2**31, 12)]
    for dtype in (np.int32, np.uint32, np.int64, np.uint64):
        assert narrowed(whole.astype(dtype), jnp.bfloat16) == want
    longer = np.array([(257 << 54) + 1, -(257 << 54) - 1])
    assert narrowed(longer, jnp.bfloat16) == [258.0 * 2**54, -258.0 * 2**54]
    for dtype, digits in ((jnp.bfloat16, 7), (jnp.float16, 10)):
        last = 2.0**-digits
        beside = np.array([1 + last / 2 + 2.0**-40, -1 - 1.5 * last + 2.0**-40, 1e300, -0.0])
        assert narrowed(beside, dtype) == [1 + last, -1 - last, np.inf, 0.0]


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_a_mask_multiplies(dtype: Any) -> None:
    """Where it is 0 the product is 0 of the other's sign, or NaN of what is not finite."""
    x = np.array([-2, np.inf, np.nan, -2, np.inf], dtype)
    mask = np.array([False, False, False, True, True])
    masked = em.emulate(lambda x, mask: x * mask.astype(x.dtype), PACKAGE)
    for got in (masked(x, mask), jax.vmap(masked, (0, None))(x[None], mask)[0]):
        numbers = np.asarray(got, np.float32)
        assert np.array_equal(numbers, [0, np.nan, np.nan, -2, np.inf], equal_nan=True)
        assert np.signbit(numbers[0])


def test_bf16_intermediates_are_really_bf16() -> None:
    a, b, c = (normal(4099, seed=s, dtype=BF16) for s in range(3))

    def f(a: Any, b: Any, c: Any) -> Any:
        return (a * b + c) * a - b / c, (a.astype(jnp.float32) * 1.1).astype(jnp.bfloat16) + b

    want = (a * b + c) * a - b / c, (a.astype(np.float32) * np.float32(1.1)).astype(BF16) + b
    assert same_bits(em.emulate(f, PACKAGE)(a, b, c), want)


def blocks_of_eight(x: np.ndarray) -> np.ndarray:
    """The documented order of a floating sum over the first axis."""
    while len(x) > 1:
        size = -(-len(x) // 8)
        padded = np.concatenate([x, np.full((8 * size - len(x), *x.shape[1:]), -0.0, x.dtype)])
        p = padded.reshape(8, size, *x.shape[1:])
        x = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
    return x[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 63, 64, 65, 100, 1000])
def test_floating_sums_have_the_documented_order(count: int) -> None:
    x = normal(count, 3)
    f = em.emulate(lambda x: (x.sum(0), x.T.sum(1), x.sum()), PACKAGE)
    rows, columns, total = f(x)
    assert same_bits(rows, blocks_of_eight(x)) and same_bits(columns, blocks_of_eight(x))
    assert same_bits(total, blocks_of_eight(x.reshape(-1)))


@pytest.mark.parametrize("width", [3, 7, 16, 33])
def test_bits_do_not_depend_on_batching(width: int) -> None:
    """384 devices at once against one device at a time, through everything XLA would fuse."""

    def layer(x: Any) -> Any:
        mean = x.mean(-1, keepdims=True)
        norm = (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
        return jax.nn.softmax(norm) * jnp.tanh(x) + jnp.log1p(jnp.exp(-x)) + jax.nn.gelu(norm)

    x = normal(384, 5, width)
    mesh = PACKAGE.mesh(dp=48, tp=8)
    spec = P(("dp", "tp"))
    everywhere = em.emulate(
        jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec), PACKAGE
    )(x)
    alone = em.emulate(layer, PACKAGE)
    for device in (0, 1, 17, 383):
        assert same_bits(everywhere[device], alone(x[device]))


# --- derivatives, transformations -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tensor_parallel", pytest.param("fully_sharded", marks=pytest.mark.slow)]
)
def test_gradient_of_emulated_is_emulated_gradient(name: str) -> None:
    axes, build, args = PROGRAMS[name]
    both, wrt = build(PACKAGE.mesh(**axes)), tuple(range(len(args)))
    loss = lambda *a: both(*a)[0]  # noqa: E731
    emulated = em.emulate(loss, PACKAGE)
    outside = jax.grad(emulated, argnums=wrt)(*args)
    inside = em.emulate(jax.grad(loss, argnums=wrt), PACKAGE)(*args)
    jitted = jax.jit(jax.grad(emulated, argnums=wrt))(*args)
    assert same_bits(outside, inside) and same_bits(jitted, inside)
    by_closure = jax.grad(lambda w: em.emulate(lambda *a: loss(w, *a), PACKAGE)(*args[1:]))(args[0])
    assert same_bits(by_closure, inside[0])


def test_gradients_keep_the_sign_of_zero() -> None:
    """Results that a loss ignores add nothing to a gradient: -0 + 0 would be 0."""

    def several(v: Any, w: Any) -> Any:
        return -v, jnp.sin(v) * v, v * 0 + w, jnp.int32(3)

    def gradient(f: Any) -> Any:
        return jax.grad(lambda v, w: (f(v, w)[0] * 0 + f(v, w)[3]).sum() + (w * -0.0).sum(), (0, 1))

    x = np.arange(3, dtype=np.float32)
    outside = gradient(em.emulate(several, PACKAGE))(x, x)
    assert same_bits(outside, em.emulate(gradient(several), PACKAGE)(x, x))
    assert same_bits(outside, (np.full(3, -0.0, np.float32),) * 2)


def test_gradients_use_the_arithmetic_that_is_asked_for() -> None:
    x, w = normal(8, 64), normal(64, 8, seed=1)

    def gradient(arithmetic: Any) -> Any:
        return jax.grad(em.emulate(lambda w: jnp.tanh(x @ w).sum(), PACKAGE, arithmetic))(w)

    cube, sequential = gradient(kernels.ASCEND_910C), gradient(kernels.FP32_FMA_CHAIN)
    assert same_bits(cube, gradient(None)) and not same_bits(cube, sequential)
    np.testing.assert_allclose(cube, sequential, rtol=1e-3, atol=1e-4)


def test_vmap_is_a_loop_over_emulated_calls() -> None:
    axes, build, (w1, w2, x) = PROGRAMS["tensor_parallel"]
    emulated = em.emulate(build(PACKAGE.mesh(**axes)), PACKAGE)
    batch = jnp.stack([x, x * 2, x + 1])
    together = jax.vmap(emulated, in_axes=(None, None, 0))(w1, w2, batch)
    for i in range(3):
        assert same_bits(jax.tree.map(lambda v, i=i: v[i], together), emulated(w1, w2, batch[i]))


def test_custom_derivatives_are_kept_and_forward_mode_refuses() -> None:
    @jax.custom_vjp
    def straight_through(x: Any) -> Any:
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    f = em.emulate(lambda x: (straight_through(x) * 3).sum(), PACKAGE)
    assert np.array_equal(jax.grad(f)(np.full(2, 0.4, np.float32)), [3, 3])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (jnp.ones(2),), (jnp.ones(2),))
    g = em.emulate(lambda x: jnp.sum(jnp.sin(x) ** 3), PACKAGE)
    x = np.arange(1, 4, dtype=np.float32)
    twice = jax.grad(lambda y: jax.grad(g)(y).sum())(x)
    np.testing.assert_allclose(
        twice, 6 * np.sin(x) * np.cos(x) ** 2 - 3 * np.sin(x) ** 3, rtol=1e-5
    )


def test_pytrees_statics_integers_and_keyword_arguments() -> None:
    def f(tree: Any, mode: str, *, scale: Any) -> Any:
        x, (i, key) = tree["x"], tree["rest"]
        out = x * scale if mode == "times" else x / scale
        return {"out": out, "i": i + 1, "noise": jax.random.uniform(key, (2,))}

    tree = {"x": normal(3), "rest": (np.arange(3), jax.random.key(1))}
    for mode in ("times", "over"):
        got, want = em.emulate(f, PACKAGE)(tree, mode, scale=2.0), f(tree, mode, scale=2.0)
        assert same_bits(got, want)
    assert np.array_equal(
        jax.grad(
            lambda x: em.emulate(f, PACKAGE)({**tree, "x": x}, "times", scale=2.0)["out"].sum()
        )(tree["x"]),
        [2, 2, 2],
    )


# --- replication, counting ------------------------------------------------------------------------


def test_replicated_work_is_done_once() -> None:
    mesh = PACKAGE.mesh(dp=48, tp=8)

    def body(x: Any, w: Any) -> Any:
        return lax.psum(jnp.tanh(w @ w)[:4] + x, "dp")

    run = jax.shard_map(body, mesh=mesh, in_specs=(P("dp"), P()), out_specs=P())
    emulated = em.emulate(run, PACKAGE, arithmetic="native")
    lowered = jax.jit(emulated).lower(np.ones((192, 16), np.float32), np.ones((16, 16), np.float32))
    text = lowered.as_text()
    assert re.search(r"dot_general.*-> tensor<16x16xf32>", text)
    assert "tensor<48x4x16xf32>" in text and "tensor<48x8x4x16xf32>" not in text
    assert "tensor<384" not in text


def test_counts_of_data_dependent_control_flow() -> None:
    mesh = PACKAGE.mesh(x=4)

    def body(v: Any) -> Any:
        v = lax.while_loop(lambda v: lax.psum(v.sum(), "x") < 1000, lambda v: v * 2, v)

        def row(carry: Any, i: Any) -> Any:
            carry = lax.cond(i < 1, lambda c: c + 1, lambda c: c * 2, carry)
            return lax.fori_loop(0, i, lambda _, c: c + 1, carry), None

        return lax.scan(row, v, jnp.arange(4))[0]

    run = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    x = np.ones((4, 2), np.float32)
    value, counts = evaluate_with_counts(trace(run, (x,)), (x,), PACKAGE)
    assert counts == {"while_0": 7.0, "cond_0": (0.75, 0.25), "while_1": 1.5}
    assert same_bits(value, em.emulate(run, PACKAGE)(x))


def test_counts_of_a_loop_in_a_condition() -> None:
    """The condition is evaluated once more than the body."""

    def rounds(n: Any) -> Any:
        return lax.while_loop(lambda i: i < n, lambda i: i + 1, 0)

    def f(n: Any) -> Any:
        return lax.while_loop(lambda i: rounds(n + i) < 5, lambda i: i + 1, 0)

    answer = em.run(f, np.int32(2), on=PACKAGE)
    assert int(answer.value) == 3
    assert answer.counts == {"while_0": 3.0, "while_1": (2 + 3 + 4 + 5) / 4}


def _halved(n: Any) -> Any:
    """Would never end for 0."""
    even = lambda s: (s[0] % 2 == 0) & (s[1] < 1000)  # noqa: E731
    return lax.while_loop(even, lambda s: (s[0] // 2, s[1] + 1), (n, 0))[0]


def _in_branch(n: Any) -> Any:
    return lax.cond(n > 0, _halved, lambda n: n, n)


def _in_loop(n: Any) -> Any:
    return lax.while_loop(lambda n: (n > 0) & (n % 2 == 0), _halved, n)


def _in_condition(n: Any) -> Any:
    def odd(n: Any) -> Any:
        return lax.cond(n > 0, lambda n: _halved(n) > 1, lambda n: False, n)

    return lax.while_loop(odd, lambda n: n - 1, n)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (_in_branch, [0, 1, 1, 3, 1, 5, 3, 7]),
        (_in_loop, [0, 1, 1, 3, 1, 5, 3, 7]),
        (_in_condition, [0, 1, 2, 2, 4, 4, 4, 4]),
    ],
)
def test_a_loop_waits_for_no_device_that_is_elsewhere(f: Any, expected: list[int]) -> None:
    mesh, spec = PACKAGE.mesh(x=8), P("x")
    program = jax.shard_map(
        lambda x: f(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    answer = em.run(program, np.arange(8), on=PACKAGE)
    assert np.array_equal(answer.value, expected)
    assert all(n < 8 for name, n in answer.counts.items() if name.startswith("while"))


def test_counts_leave_out_devices_that_are_elsewhere() -> None:
    """Device d makes d trips, each of 4 - d inner ones; in trip t those with d > t are there."""

    def body(x: Any) -> Any:
        d = lax.axis_index("x")

        def inner(x: Any) -> Any:
            x = lax.cond(d == 3, lambda x: x * 2, lambda x: x + 1, x)
            return lax.while_loop(lambda s: s[0] < 4 - d, lambda s: (s[0] + 1, s[1] + 1), (0, x))[1]

        return lax.while_loop(lambda s: s[0] < d, lambda s: (s[0] + 1, inner(s[1])), (0, x))[1]

    run = jax.shard_map(
        body, mesh=PACKAGE.mesh(x=4), in_specs=P("x"), out_specs=P("x"), check_vma=False
    )
    x = np.zeros((4, 1), np.float32)
    value, counts = evaluate_with_counts(trace(run, (x,)), (x,), PACKAGE)
    assert np.array_equal(value, [[0], [4], [6], [7]])
    shares = ((0, 0), (1 / 3, 0), (2 / 3, 0), (0, 1))
    assert counts == {"while_0": 3.0, "cond_0": shares, "while_1": (3 + 2 + 1) / 3}


@pytest.mark.parametrize("devices", [None, 1])
def test_derivatives_of_a_branch_in_a_branch(devices: Any) -> None:
    """JAX keeps the inner predicate for the derivative, as one that does not vary over x: on
    devices that take the other branch it is nothing at all.
    """

    def inner(v: Any) -> Any:
        return lax.cond(lax.axis_index("y") == 1, lambda v: v * v * v, lambda v: 5 / v, v)

    def body(v: Any) -> Any:
        return lax.cond(lax.axis_index("x") == 1, inner, lambda v: 2 * v, v)

    program = jax.shard_map(
        body, mesh=PACKAGE.mesh(x=2, y=2), in_specs=P(("x", "y")), out_specs=P(("x", "y"))
    )
    x = np.full(4, 2, np.float32)
    real = None if devices is None else jax.devices()[:devices]
    for gradient in (
        em.emulate(jax.grad(lambda x: program(x).sum()), PACKAGE, devices=real),
        jax.grad(lambda x: em.emulate(program, PACKAGE, devices=real)(x).sum()),
    ):
        assert np.array_equal(gradient(x), [2, 2, -5 / 4, 12])


def test_what_types_hide_of_branches_is_refused() -> None:
    """Two branches keep a predicate each in the same place, which does not vary over x by type."""

    def gradient(varying: bool) -> Any:
        def inner(k: int, v: Any) -> Any:
            test = lax.axis_index("y") == k
            test = lax.pcast(test, "x", to="varying") if varying else test
            return lax.cond(test, lambda v: v * v * v, lambda v: 5 / v, v)

        def body(v: Any) -> Any:
            ways = functools.partial(inner, 0), functools.partial(inner, 1)
            return lax.cond(lax.axis_index("x") == 1, *ways, v)

        both = P(("x", "y"))
        program = jax.shard_map(body, mesh=PACKAGE.mesh(x=2, y=2), in_specs=both, out_specs=both)
        emulated = em.emulate(program, PACKAGE)
        return jax.grad(lambda x: emulated(x).sum())(np.full(4, 2, np.float32))

    with pytest.raises(NotImplementedError, match="lax.pcast"):
        gradient(varying=False)
    assert np.array_equal(gradient(varying=True), [-5 / 4, 12, 12, -5 / 4])


# --- pmap -----------------------------------------------------------------------------------------


def test_pmap_maps_384_devices_that_do_not_exist() -> None:
    x = np.arange(384, dtype=np.float32)

    def f(x: Any, y: Any, *, z: Any) -> Any:
        return {"sum": lax.psum(x * y, "i"), "here": x + lax.axis_index("i") + z}

    run = em.pmap(f, "i", on=PACKAGE, in_axes=(0, None), out_axes={"sum": None, "here": 0})
    out = run(x, 2.0, z=np.ones(384, np.float32))
    assert out["sum"].shape == () and float(out["sum"]) == x.sum() * 2
    assert np.array_equal(out["here"], 2 * x + 1)
    gradient = jax.grad(lambda v: em.pmap(lambda a: lax.psum(a, "i"), "i", on=PACKAGE)(v).sum())(x)
    assert np.array_equal(gradient, np.full(384, 384.0))  # as jax.pmap: every device's copy counts
    columns = em.pmap(lambda v: v * 2, on=PACKAGE, in_axes=1, out_axes=1)(normal(3, 5))
    assert same_bits(columns, normal(3, 5) * 2)
    with pytest.raises(ValueError, match="385 but CloudMatrix 384 has 384"):
        em.pmap(lambda v: v, on=PACKAGE)(np.ones(385, np.float32))
    with pytest.raises(ValueError, match="sizes \\[2, 3\\]"):
        em.pmap(lambda v, w: v, on=PACKAGE)(np.ones(2), np.ones(3))


# --- refusals -------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    f = lambda x: x  # noqa: E731
    with pytest.raises(TypeError, match="on must be a Machine"):
        em.emulate(f, "cloudmatrix")
    with pytest.raises(ValueError, match="unknown arithmetic 'bf16'.*ASCEND_910C"):
        em.emulate(f, PACKAGE, arithmetic="bf16")
    with pytest.raises(TypeError, match="arithmetic must be"):
        em.emulate(f, PACKAGE, arithmetic=16)
    with pytest.raises(ValueError, match="unknown operation 'allreduce'.*all_reduce"):
        em.emulate(f, PACKAGE, algorithms={"allreduce": "ring"})
    with pytest.raises(ValueError, match="unknown algorithm 'rings'.*ring"):
        em.emulate(f, PACKAGE, algorithms={"all_reduce": "rings"})
    with pytest.raises(ValueError, match="vector must be"):
        em.emulate(f, PACKAGE, vector="fast")
    with pytest.raises(TypeError, match="callable"):
        em.emulate(3, PACKAGE)


def test_programs_outside_the_model_are_refused_by_name() -> None:
    small, big = em.gb200_nvl72(), PACKAGE.mesh(x=384)
    run = jax.shard_map(lambda v: lax.psum(v, "x"), mesh=big, in_specs=P("x"), out_specs=P())
    with pytest.raises(ValueError, match="384 devices, but .* has 72"):
        em.emulate(run, small)(np.ones(384, np.float32))

    mesh = PACKAGE.mesh(x=4)

    def shard(body: Any) -> Any:
        return jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)

    def diverging(v: Any) -> Any:
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: c + lax.psum(c, "x"), v)

    with pytest.raises(NotImplementedError, match="predicate differs.*psum"):
        em.emulate(shard(diverging), PACKAGE)(np.arange(4, dtype=np.float32))
    with pytest.raises(NotImplementedError, match="mesh's order"):
        mesh2 = PACKAGE.mesh(x=2, y=2)
        swap = jax.shard_map(
            lambda v: lax.ppermute(v, ("y", "x"), [(0, 1)]),
            mesh=mesh2,
            in_specs=P(("x", "y")),
            out_specs=P(("x", "y")),
        )
        em.emulate(swap, PACKAGE)(np.ones(4, np.float32))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        lambda v: lax.psum(v, "z"),
        lambda v: lax.ppermute(v, "z", [(0, 1)]),
        lambda v: lax.all_gather(v, "z"),
        lambda v: v + lax.axis_index("z"),
    ],
)
def test_an_unknown_axis_is_a_clear_error(body: Any, check_vma: bool) -> None:
    run = jax.shard_map(
        body, mesh=PACKAGE.mesh(x=4), in_specs=P("x"), out_specs=P("x"), check_vma=check_vma
    )
    for call in (em.emulate(run, PACKAGE), lambda x: em.estimate(run, x, on=PACKAGE)):
        with pytest.raises(
            ValueError, match="names an axis that no enclosing shard_map.*z.*test_values"
        ):
            call(np.ones(4, np.float32))


@pytest.mark.parametrize("call", [em.emulate, lambda f, on: lambda x: em.run(f, x, on=on)])
def test_a_pmap_of_more_rows_than_devices_names_em_pmap(call: Any) -> None:
    program = jax.pmap(lambda v: lax.psum(v, "i"), axis_name="i")
    x = np.ones((jax.device_count(), 2), np.float32)
    for more in (np.tile(x, (48, 1)), np.concatenate([x, x, x[:1]])):
        with pytest.raises(ValueError, match=r"em\.pmap\(fun"):
            call(program, PACKAGE)(more)
    squeezed = jax.pmap(lambda v: v.squeeze(0), axis_name="i")
    with pytest.raises(ValueError, match="squeeze out"):
        call(squeezed, PACKAGE)(x)


def test_an_assertion_of_the_program_is_its_own() -> None:
    def program(x: Any) -> Any:
        if x.ndim != 2:
            raise AssertionError  # as a bare assert does where pytest says no more
        return x

    for call in (em.emulate(program, PACKAGE), lambda x: em.estimate(program, x, on=PACKAGE)):
        with pytest.raises(AssertionError):
            call(np.ones(4, np.float32))


# --- placement, shardings, groups that differ -----------------------------------------------------


def test_results_and_arguments_mix_with_ordinary_arrays() -> None:
    """A literal traced under the mesh must not leave its sharding on the result."""
    mesh = PACKAGE.mesh(d=8)
    double = jax.shard_map(lambda v: v * 2, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    x = jnp.arange(16.0)
    real = jax.make_mesh((1,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(x, jax.sharding.NamedSharding(real, P("r")))
    for argument in (x, placed):
        result = em.emulate(double, PACKAGE)(argument)
        assert np.array_equal(result - argument, x)
        other = PACKAGE.mesh(q=4)
        triple = jax.shard_map(lambda v: v * 3, mesh=other, in_specs=P("q"), out_specs=P("q"))
        assert np.array_equal(em.emulate(triple, PACKAGE)(result), 6 * x)
    loss = em.emulate(lambda v: (double(v) ** 2).sum(), PACKAGE)
    assert np.array_equal(jax.grad(loss)(x), 8 * x)


@pytest.mark.parametrize("algorithm", ["ring", "hierarchical", None])
def test_groups_that_lie_differently_on_the_nodes(algorithm: str | None) -> None:
    """Six neighbours start at every sixth device: some groups cross into the next node of eight."""
    mesh = PACKAGE.mesh(d=4, t=6)
    x = normal(24, 6, dtype=BF16)
    pins = {"all_reduce": algorithm, "reduce_scatter": algorithm} if algorithm else None

    def loops(v: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            part = carry * (1 + lax.axis_index("t")).astype(carry.dtype)
            carry = lax.psum(part, "t") * jnp.asarray(0.125, carry.dtype)
            return lax.cond(carry.sum() > 0, lambda c: lax.psum(c, "t"), lambda c: c, carry), None

        carry, _ = lax.scan(step, lax.psum(v, "d"), None, length=2)
        blocks = lax.psum_scatter(jnp.tile(carry, (6, 1)), "t", tiled=True)
        return carry + blocks

    def flat(v: Any) -> Any:
        return lax.psum(v, "t")

    def run(body: Any) -> np.ndarray:
        sharded = jax.shard_map(
            body, mesh=mesh, in_specs=P(("d", "t")), out_specs=P(("d", "t")), check_vma=False
        )
        return np.asarray(em.emulate(sharded, PACKAGE, algorithms=pins)(x))

    grid = run(flat).reshape(4, 6, 6)
    for d in range(
        4
    ):  # alone on the machine, each group has the very bits it has beside the others
        devices = range(6 * d, 6 * d + 6)
        alone = jax.shard_map(
            flat, mesh=PACKAGE.mesh(t=6, devices=devices), in_specs=P("t"), out_specs=P("t"),
            check_vma=False,
        )  # fmt: skip
        expected = em.emulate(alone, PACKAGE, algorithms=pins)(x[6 * d : 6 * d + 6])
        assert same_bits(grid[d], expected)
    assert np.isfinite(run(loops).astype(np.float32)).all()


def test_predicates_that_differ_may_ask_for_their_device() -> None:
    def body(v: Any) -> Any:
        i = lax.axis_index("x")
        v = lax.cond(i == 0, lambda u: u * (1 + lax.axis_index("x")), lambda u: u + 1, v)
        return lax.while_loop(lambda s: s.sum() < lax.axis_index("x"), lambda s: s + 1, v)

    run = jax.shard_map(body, mesh=PACKAGE.mesh(x=4), in_specs=P("x"), out_specs=P("x"))
    assert np.array_equal(em.emulate(run, PACKAGE)(np.zeros(4, np.float32)), [0, 1, 2, 3])


def test_elements_of_a_vmap_leave_a_loop_each_at_its_time() -> None:
    """JAX gives such a loop a predicate for each element, and leaves the waiting to the loop."""
    trips = np.array([[3, 0, 1], [2, 5, 0], [0, 0, 0], [4, 4, 1]], np.float32)
    starts = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    want = starts + 2 * trips[..., None]

    def one(n: Any, start: Any) -> Any:
        return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] + 2), (0 * n, start))[1]

    each = jax.vmap(one)
    assert same_bits(em.emulate(each, PACKAGE)(trips[0], starts[0]), want[0])
    for whose in (P("x"), P()):  # trips that differ between devices, and such that do not
        n = trips if whose == P("x") else np.broadcast_to(trips[:1], trips.shape)

        def body(n: Any, start: Any) -> Any:
            return each(n[0], start[0])[None]

        run = jax.shard_map(
            body, mesh=PACKAGE.mesh(x=4), in_specs=(whose, P("x")), out_specs=P("x")
        )
        given = n if whose == P("x") else n[:1]
        assert same_bits(em.emulate(run, PACKAGE)(given, starts), starts + 2 * n[..., None])
    keys = jax.random.split(jax.random.key(3), 3)

    def turned(n: Any, key: Any) -> Any:
        def step(state: Any) -> Any:
            return state[0] + 1, jax.random.fold_in(state[1], 7)

        return lax.while_loop(lambda s: s[0] < n, step, (0 * n, key))[1]

    found, known = em.emulate(jax.vmap(turned), PACKAGE)(trips[0], keys), jax.vmap(turned)
    assert same_bits(jax.random.key_data(found), jax.random.key_data(known(trips[0], keys)))


def test_empty_arrays_pass_through_collectives() -> None:
    def body(v: Any) -> Any:
        return lax.psum(v, "x"), lax.pmax(v, "x"), lax.psum_scatter(v.T, "x", tiled=True)

    run = jax.shard_map(body, mesh=PACKAGE.mesh(x=3), in_specs=P(), out_specs=P(), check_vma=False)
    shapes = [out.shape for out in em.emulate(run, PACKAGE)(np.ones((0, 3), np.float32))]
    assert shapes == [(0, 3), (0, 3), (1, 0)]


def test_run_reads_one_program_for_values_and_time() -> None:
    mesh = PACKAGE.mesh(x=4)
    step = jax.jit(
        jax.shard_map(lambda v: lax.psum(v, "x") + v, mesh=mesh, in_specs=P("x"), out_specs=P("x")),
        donate_argnums=0,
    )
    answer = em.run(lambda v: step(step(v)), np.arange(4, dtype=np.float32), on=PACKAGE)
    assert np.array_equal(answer.value, [36, 37, 38, 39]) and answer.time_s >= answer.bound_s > 0
    emulated = em.emulate(step, PACKAGE)
    with pytest.raises(ValueError, match="made by em.emulate"):
        em.estimate(lambda v: emulated(v) + 1, np.ones(4, np.float32), on=PACKAGE)
    nested = em.emulate(lambda v: emulated(v) + 1, PACKAGE)(np.ones(4, np.float32))
    assert np.array_equal(nested, [6, 6, 6, 6])


def test_programs_of_this_packages_own_operations() -> None:
    """What is emulated already, and exact matmuls that a program calls itself, on each device."""
    mesh, rng = PACKAGE.mesh(x=4), np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((12, 40), (40, 6)))

    def local(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.psum(kernels.matmul(a, b), "x")

    step = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P())
    found = em.emulate(step, PACKAGE)(a, b)
    parts = kernels.reference.matmul(a, b, arithmetic=kernels.ASCEND_910C).reshape(4, 3, 6)
    summed = em.emulate(
        jax.shard_map(lambda v: lax.psum(v[0], "x"), mesh=mesh, in_specs=P("x"), out_specs=P()),
        PACKAGE,
    )
    assert np.array_equal(found, summed(parts))
    emulated = em.emulate(
        lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32), PACKAGE
    )
    again = em.emulate(lambda a, b: emulated(a, b) + 1, PACKAGE)(a, b)
    assert np.array_equal(again, parts.reshape(12, 6) + 1)


def test_arguments_of_the_wrong_kind_are_named() -> None:
    one = np.ones(4, np.float32)
    with pytest.raises(TypeError, match="algorithms must map"):
        em.emulate(jnp.sin, PACKAGE, algorithms="ring")
    with pytest.raises(ValueError, match="unknown operation 'psum'"):
        em.estimate(jnp.sin, one, on=PACKAGE, algorithms={"psum": "ring"})
    with pytest.raises(TypeError, match="counts must map"):
        em.estimate(jnp.sin, one, on=PACKAGE, counts=3)
    with pytest.raises(TypeError, match="shape without values"):
        em.run(jnp.sin, jax.ShapeDtypeStruct((4,), np.float32), on=PACKAGE)
    with pytest.raises(TypeError, match="cannot be hashed"):
        em.emulate(lambda x, s: x, PACKAGE)(one, {1, 2})
    with pytest.raises(TypeError, match="functools.partial"):
        em.emulate(jax.jit(lambda x, n: x * n, static_argnums=1), PACKAGE)(one, 3)
    with pytest.raises(ValueError, match="maps axis 0 of an argument of shape \\(\\)"):
        em.pmap(lambda v: v, on=PACKAGE)(1.0)
    chosen = em.pmap(
        lambda v, n: v + 10 if n < 2 else v * n, on=PACKAGE, static_broadcasted_argnums=1
    )
    for n in (1, 3, True):  # a number decides what is traced
        assert np.array_equal(chosen(np.ones(3), n), np.ones(3) + 10 if n < 2 else 3 * np.ones(3))
    with pytest.raises(ValueError, match="names argument 1, but the call has 1"):
        chosen(np.ones(3))
    last = em.pmap(lambda v, n: v * n, on=PACKAGE, static_broadcasted_argnums=-1)
    assert np.array_equal(last(one, 3), 3 * one)
    assert np.array_equal(em.emulate(chosen, PACKAGE)(one, 1), one + 10)
    for n, expected in ((1, one + 10), (3, 3 * one)):
        assert np.array_equal(em.run(chosen, one, n, on=PACKAGE).value, expected)
        assert em.estimate(chosen, one, n, on=PACKAGE).time_s > 0
        assert em.compare(chosen, one, n, on=[PACKAGE]).columns[0].rel_rms == 0


def test_donated_arguments_of_pmap_are_memory_for_results() -> None:
    def program(state: Any, x: Any, factor: int) -> Any:
        return {"sum": state["sum"] + x * factor}, x.sum()

    state, x = {"sum": jnp.ones((8, 1 << 16))}, jnp.ones((8, 1 << 16))
    how: dict[str, Any] = {"on": PACKAGE, "static_broadcasted_argnums": 2}
    kept, donated = em.pmap(program, **how), em.pmap(program, donate_argnums=0, **how)
    values = [f(state, x, 3) for f in (kept, donated)]
    jax.tree.map(np.testing.assert_array_equal, *values)
    peaks = [em.estimate(f, state, x, 3, on=PACKAGE).memory.peak_bytes for f in (kept, donated)]
    assert peaks[0] - peaks[1] == 4 << 16
    with pytest.raises(ValueError, match="donate_argnums names argument 5, but the call has 3"):
        em.pmap(program, donate_argnums=5, **how)(state, x, 3)
    with pytest.raises(ValueError, match="argument 2 is in static_broadcasted_argnums and in don"):
        em.pmap(program, donate_argnums=(0, -1), **how)(state, x, 3)


def test_what_wraps_an_emulated_function_is_another_function() -> None:
    """Wrappers, those of JAX among them, copy a function's attributes."""
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    square = em.emulate(lambda x: (x * x).sum(), PACKAGE)

    @functools.wraps(square)
    def twice(x: Any) -> Any:
        return 2 * square(x)

    for wrapped in (twice, jax.grad(square), jax.vmap(square), em.pmap(square, on=PACKAGE)):
        assert np.array_equal(em.emulate(wrapped, PACKAGE)(x), wrapped(x))
    assert np.array_equal(em.pmap(square, on=PACKAGE)(x), [5, 50])
    with pytest.raises(ValueError, match="estimate the program that em.emulate was given"):
        em.run(jax.grad(square), x, on=PACKAGE)


def test_a_product_of_two_types_has_the_type_that_jax_gives_it() -> None:
    a, b = np.ones((4, 8), BF16), np.ones((2, 8, 3), np.float16)
    sizes = np.array([1, 3], np.int32)
    for tiling in (None, "library"):
        for f in (lambda a, b, n: a @ b[0], lambda a, b, n: lax.dot(a, b[0]), lax.ragged_dot):
            expected = jax.eval_shape(f, a, b, sizes).dtype
            assert em.emulate(f, PACKAGE, tiling=tiling)(a, b, sizes).dtype == expected


def test_reductions_from_values_that_differ_between_devices() -> None:
    def body(x: Any) -> Any:
        start = lax.axis_index("x").astype(jnp.float32)
        whole = lax.reduce(x, start, lambda a, b: a - b + 0, (0,))
        return whole, lax.reduce_window(x, start, lambda a, b: a - b, (2,), (2,), "VALID")

    run = jax.shard_map(
        lambda x: jnp.concatenate([jnp.atleast_1d(r) for r in body(x)]),
        mesh=PACKAGE.mesh(x=4),
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    )
    out = em.emulate(run, PACKAGE)(np.ones(8, np.float32)).reshape(4, 2)
    assert np.array_equal(out, np.arange(4.0)[:, None] - [2, 2])


def test_groups_of_different_sizes_are_refused() -> None:
    run = jax.shard_map(
        lambda v: lax.psum(v, "x", axis_index_groups=[[0, 1, 2], [3]]),
        mesh=PACKAGE.mesh(x=4),
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    )
    with pytest.raises(NotImplementedError, match="psum over axis_index_groups of different"):
        em.emulate(run, PACKAGE)(np.ones(4, np.float32))


def test_broadcasts_and_reductions_of_a_vmap_have_values_and_time() -> None:
    def body(v: Any) -> Any:
        both = jax.vmap(lambda r: lax.psum(r, ("x", "v")) + lax.psum(r, "v"), axis_name="v")(v)
        return both + lax.pbroadcast(v, "x", 1)

    run = jax.shard_map(
        body, mesh=PACKAGE.mesh(x=4), in_specs=P("x"), out_specs=P("x"), check_vma=False
    )
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    answer = em.run(run, x, on=PACKAGE)
    blocks = x.reshape(4, 2, 2)
    expected = x.sum(0) + blocks.sum(1, keepdims=True) + blocks[1]
    assert np.array_equal(answer.value, expected.reshape(8, 2))
    assert {c.op for c in answer.collectives} == {"all_reduce", "broadcast"}
    assert answer.time_s >= answer.bound_s > 0


def test_links_without_a_known_energy_are_not_free() -> None:
    power = dataclasses.replace(PACKAGE.power, link_j_per_byte=())
    machine = dataclasses.replace(PACKAGE, power=power)
    run = jax.shard_map(
        lambda v: lax.psum(v, "x"), mesh=machine.mesh(x=4), in_specs=P("x"), out_specs=P()
    )
    with pytest.raises(ValueError, match="no energy for the links node"):
        em.estimate(run, np.ones(4, np.float32), on=machine)


def test_collectives_over_axes_around_the_emulator_are_refused() -> None:
    for program in (
        lambda v: lax.psum(v, "v"),
        lambda v: lax.all_gather(v, "v"),
        lambda v: v + lax.axis_index("v"),
        lambda v: lax.ppermute(v, "v", [(0, 1)]),
    ):
        with pytest.raises(NotImplementedError, match="'v', an axis that a shard_map or vmap"):
            jax.vmap(em.emulate(program, PACKAGE), axis_name="v")(jnp.arange(2.0))


def test_only_devices_that_come_to_a_call_to_the_host_make_it() -> None:
    mesh = PACKAGE.mesh(x=4, y=2)
    seen: dict[str, list[float]] = {"branch": [], "loop": [], "both": []}

    def local(v: Any) -> Any:
        def note(name: str, value: Any) -> None:
            jax.debug.callback(lambda number: seen[name].append(float(number)), value)

        def root(v: Any) -> Any:  # of a negative number there is none
            return jax.pure_callback(lambda n: np.float32(math.sqrt(n)), jax.typeof(v), v)

        x, y = lax.axis_index("x"), lax.axis_index("y")
        number = v[0]

        def trip(i: Any, total: Any) -> Any:
            note("loop", number)
            lax.cond(y == 1, lambda: note("both", number * 10 + i), lambda: None)
            return total + 1

        trips = lax.fori_loop(0, x, trip, 0)
        lax.cond(x == 2, lambda: note("branch", number), lambda: None)
        found = lax.cond(number >= 4, root, lambda n: n * 2, number - 4)
        return jnp.stack([found, trips.astype(jnp.float32)])

    over = P(("x", "y"))
    program = jax.shard_map(local, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    values = np.arange(8, dtype=np.float32)
    got = np.asarray(em.emulate(program, PACKAGE)(values)).reshape(8, 2)
    jax.effects_barrier()
    negative, positive = values[:4] - 4, values[4:] - 4
    assert same_bits(got[:, 0], np.concatenate([negative * 2, np.sqrt(positive)]))
    assert same_bits(got[:, 1], values // 2)
    assert sorted(seen["branch"]) == [4, 5]
    assert sorted(seen["loop"]) == [2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7]
    assert sorted(seen["both"]) == [30, 50, 51, 70, 71, 72]
