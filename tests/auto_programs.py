"""Programs that leave the division of their arrays to the compiler, which tests run twice:
emulated, and natively on forced host devices in a child process.

Each entry of `PROGRAMS` maps a name to (function of the mesh -> program, arguments, whether every
order of its sums gives the same bits). Run as a script, this module evaluates all of them natively
and writes their flat outputs to the file named on the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 8
AXES = {"dp": 4, "tp": 2}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(np.int32)


def jitted(fun: Callable[..., Any], ins: Any, outs: Any = None) -> Callable[[Any], Any]:
    """`fun` under `jax.jit` with these specs over a mesh."""

    def build(mesh: Any) -> Any:
        def place(tree: Any) -> Any:
            return jax.tree.map(
                lambda s: None if s is None else NamedSharding(mesh, s),
                tree,
                is_leaf=lambda x: x is None or isinstance(x, P),
            )

        return jax.jit(fun, in_shardings=place(ins), out_shardings=place(outs))

    return build


def sums(a: Any, b: Any) -> Any:
    return a @ b, a.sum(0), a.max(1), jnp.cumsum(a, axis=0), (a * 2).sum(), a.T, a[1:, ::2]


def sorting(a: Any, key: Any) -> Any:
    values, places = lax.top_k(a, 3)
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 0.5, a.shape)
    return (
        jnp.sort(a, axis=0),
        jnp.argsort(a, axis=1),
        values,
        places,
        a.argmax(0),
        jnp.where(kept, a, 0),
        a[jnp.clip(a[:, 0], 0, 7)],
        jnp.zeros((8, 3), a.dtype).at[jnp.clip(a[:, 0], 0, 7)].add(a[:, :3]),
        jnp.concatenate([a, a[:8]]).reshape(-1),
        jnp.roll(a, 3, axis=0),
        jnp.pad(a, ((1, 2), (0, 1))),
    )


def control(a: Any, n: Any) -> Any:
    def step(carry: Any, row: Any) -> Any:
        return 2 * carry + row, carry * row

    carry, rows = lax.scan(step, a[0], a)
    back = lax.scan(step, a[0], a, reverse=True)
    grown = lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] + s[1].sum()), (0, a))
    chosen = lax.cond(n > 3, lambda v: v + 1, lambda v: v - v.sum(), a)
    looped = lax.fori_loop(0, 5, lambda i, v: v + i * a, a)
    return carry, rows, back, grown, chosen, looped


def perceptron(mesh: Any) -> Any:
    """An Adam step of a residual network in a scan: data over dp, hidden units over tp."""

    def loss(weights: Any, x: Any, y: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            up, down = w
            inside = lax.with_sharding_constraint(
                jax.nn.gelu(h @ up), NamedSharding(mesh, P("dp", "tp"))
            )
            return h + inside @ down, None

        h, _ = lax.scan(layer, x, weights)
        return jnp.mean((h - y) ** 2)

    def step(weights: Any, first: Any, second: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(weights, x, y)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, grads)
        new = jax.tree.map(
            lambda w, m, v: w - 0.01 * m / (jnp.sqrt(v) + 1e-3), weights, first, second
        )
        return new, first, second, value

    specs = (P(None, None, "tp"), P(None, "tp", None))
    return jitted(step, (specs, specs, specs, P("dp"), P("dp")), (specs, specs, specs, P()))(mesh)


def attention(mesh: Any) -> Any:
    """Loss and gradients of a small transformer: embedding, heads over tp, cross entropy."""

    def norm(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def loss(p: Any, tokens: Any) -> Any:
        h = p["embed"][tokens]
        q, k, v = jnp.einsum("bsd,cdhe->cbshe", norm(h), p["qkv"])
        scores = jnp.einsum("bqhe,bkhe->bhqk", q, k)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores, -1), v)
        h = h + jnp.einsum("bqhe,hed->bqd", mixed, p["out"])
        logits = norm(h) @ p["embed"].T
        target = jnp.roll(tokens, -1, 1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)
        return -chosen.mean()

    specs = {"embed": P("tp"), "qkv": P(None, None, "tp"), "out": P("tp")}
    return jitted(jax.value_and_grad(loss), (specs, P("dp")), (P(), specs))(mesh)


def images(mesh: Any) -> Any:
    """Loss and gradients of a convolution with pooling."""

    def loss(kernel: Any, dense: Any, x: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims))
        y = lax.reduce_window(y, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.mean((y.reshape(len(x), -1) @ dense) ** 2)

    specs = (P(None, None, None, "tp"), P(), P("dp"))
    return jitted(jax.value_and_grad(loss, (0, 1)), specs)(mesh)


def experts(mesh: Any) -> Any:
    """A mixture of experts by one-hot einsums: tokens over dp, experts over dp."""

    def layer(x: Any, router: Any, w: Any) -> Any:
        weights, chosen = lax.top_k(jax.nn.softmax(x @ router), 2)
        gates = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(chosen, w.shape[0]))
        sent = jnp.einsum("te,td->etd", (gates > 0).astype(x.dtype), x)
        sent = lax.with_sharding_constraint(sent, NamedSharding(mesh, P("dp")))
        out = jnp.tanh(jnp.einsum("etd,edf->etf", sent, w))
        return jnp.einsum("te,etf->tf", gates, out)

    return jitted(layer, (P("dp"), P(), P("dp", None, "tp")), P("dp"))(mesh)


def mixed(mesh: Any) -> Any:
    """A `shard_map` inside a program that the compiler divides, and reshardings around it."""

    def program(a: Any, b: Any) -> Any:
        def body(x: Any) -> Any:
            return lax.psum(x, "dp") + lax.axis_index("tp")

        inside = jax.shard_map(body, mesh=mesh, in_specs=P("dp", "tp"), out_specs=P(None, "tp"))
        turned = lax.with_sharding_constraint(a + 1, NamedSharding(mesh, P("tp", "dp")))
        half = jax.shard_map(  # "tp" stays with the compiler
            lambda x: lax.psum(x, "dp") + x.sum(1, keepdims=True),
            mesh=mesh,
            in_specs=P("dp"),
            out_specs=P("dp"),
            axis_names={"dp"},
        )(a)
        return inside(turned) @ b, turned, inside(a).sum(), half

    return jitted(program, (P("dp"), P(None, "tp")))(mesh)


def windows(a: Any, b: Any) -> Any:
    """Sums along a divided axis, linear algebra, random numbers, several types."""
    lower = jnp.linalg.cholesky(b @ b.T + 8 * jnp.eye(8))
    return (
        lax.cumlogsumexp(a, 0),
        lax.cummax(a, 1),
        lax.reduce_window(a, 0.0, lax.add, (1, 3), (1, 1), "SAME"),
        jax.scipy.linalg.solve_triangular(lower, a[:8], lower=True),
        jnp.abs(jnp.fft.rfft(a)),
        jax.random.normal(jax.random.key(7), a.shape) * a,
        (a.astype(jnp.bfloat16) * jnp.array([1.5, jnp.nan, 3, 4] * 2, jnp.bfloat16)),
        lax.associative_scan(jnp.add, a, axis=0),
    )


def complexes(a: Any, b: Any) -> Any:
    """Complex constants: one number, a few, many, and such as are none; in a loop, too."""
    few = jnp.array([2 + 1j, 1 - 3j] * 2)
    many = jnp.arange(128).reshape(16, 8)[:8, :4] * (1 + 2j)
    odd = jnp.array([complex(jnp.nan, 1), complex(2, -jnp.inf), 0, -0.0])
    turned, rows = lax.scan(lambda c, r: ((c + r) * 1j, c.real), jnp.zeros(4, complex), a * few)
    return a * few + b, a * many, jnp.where(b > 0, odd, 3j), turned.imag, rows


def rolling_bits(a: Any, b: Any) -> Any:
    """XLA's own generator of random bits."""
    key = jax.random.key(3, impl="rbg")
    bits = jax.random.bits(jax.random.fold_in(key, 1), a.shape, "uint16")
    fast = jax.random.permutation(jax.random.key(4, impl="unsafe_rbg"), b)
    return a + bits, fast, lax.rng_bit_generator(jnp.arange(4, dtype=jnp.uint32), (5, 3))


Program = tuple[Callable[[Any], Any], tuple[Any, ...], bool]
_ADAM = [(normal(3, 8, 16, seed=i), normal(3, 16, 8, seed=i + 9)) for i in range(2)]
_ADAM.append(tuple(np.abs(a) for a in _ADAM[1]))  # type: ignore[arg-type]
PROGRAMS: dict[str, Program] = {
    "sums": (
        jitted(sums, (P("dp", "tp"), P("tp"))),
        (integers(16, 8), integers(8, 6, seed=1)),
        True,
    ),
    "sorting": (
        jitted(sorting, (P("dp", "tp"), P())),
        (integers(16, 8), np.array([1, 2], np.uint32)),
        True,
    ),
    "control": (jitted(control, (P("dp", "tp"), None)), (integers(8, 4), np.int32(4)), True),
    "rows": (jitted(control, (P(None, "dp"), None)), (integers(8, 4), np.int32(2)), True),
    "complexes": (
        jitted(complexes, (P("dp"), P(None, "tp"))),
        (integers(8, 4), integers(8, 4, seed=1)),
        True,
    ),
    "rolling_bits": (
        jitted(rolling_bits, (P("dp", "tp"), P("tp"))),
        (integers(8, 4), integers(8, 4, seed=1)),
        True,
    ),
    "mixed": (mixed, (integers(8, 8), integers(8, 4, seed=1)), True),
    "perceptron": (
        perceptron,
        (*_ADAM, normal(8, 8, seed=5), normal(8, 8, seed=6)),
        False,
    ),
    "attention": (
        attention,
        (
            {
                "embed": normal(16, 8),
                "qkv": normal(3, 8, 2, 4, seed=1),
                "out": normal(2, 4, 8, seed=2),
            },
            np.abs(integers(8, 6)) % 16,
        ),
        False,
    ),
    "images": (
        images,
        (normal(3, 3, 2, 4), normal(64, 5, seed=1), normal(8, 8, 8, 2, seed=2)),
        False,
    ),
    "windows": (jitted(windows, (P("dp", "tp"), P("dp"))), (normal(16, 8), normal(8, 8)), False),
    "experts": (
        experts,
        (normal(16, 8), normal(8, 4, seed=1), normal(4, 8, 6, seed=2)),
        False,
    ),
}


def plain(leaf: Any) -> np.ndarray:
    """An array that a .npz can hold (BF16 widened to FP32, exactly)."""
    return np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf)


def main(path: str) -> None:
    auto = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=auto)
    results = {}
    for name, (build, args, _) in PROGRAMS.items():
        for i, leaf in enumerate(jax.tree.leaves(build(mesh)(*args))):
            results[f"{name}/{i}"] = plain(leaf)
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
