"""Which operations share a kernel: chains, attention, or none at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as S
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.chip import matmul_time
from emulator.program import walker
from emulator.program.attention import find
from emulator.program.graph import flatten
from emulator.timeline import Op, each

DIE, POD, NVL72 = em.cloudmatrix384("die"), em.cloudmatrix384(), em.gb200_nvl72()
F32, BF16 = jnp.float32, jnp.bfloat16
dot_product_attention = jax.nn.dot_product_attention


def ops(answer: em.Estimate, kind: str = "") -> list[Op]:
    return [s for s, _ in each(answer.steps) if isinstance(s, Op) and kind in ("", s.kind)]


def heads(batch: int, length: int, count: int, width: int) -> Any:
    return S((batch, length, count, width), BF16)


# -- chains and single operations


def test_a_chain_is_one_kernel_and_its_parts_are_as_many_as_there_are() -> None:
    x = S((512, 1024), F32)
    f = lambda x: jax.nn.softmax(jnp.tanh(x) * 2, -1)  # noqa: E731
    chain = em.estimate(f, x, on=DIE)
    (kernel,) = ops(chain)
    assert kernel.bytes == 2 * 4 * 512 * 1024
    eager = em.estimate(f, x, on=DIE, fusion="eager")
    # tanh, times 2, maximum (and its guard), difference, exponential, sum, quotient; the repeated
    # maximum and sum as well.
    assert len(ops(eager)) == 10
    assert eager.bound_s > 4 * chain.bound_s and eager.time_s > 4 * chain.time_s


def test_a_number_taken_from_an_array_rides_along() -> None:
    x, scales = S((512, 1024), F32), S((16,), F32)
    f = lambda x, s: jnp.tanh(x * s[3]) + s[5] * 2  # noqa: E731
    (kernel,) = ops(em.estimate(f, x, scales, on=DIE))
    assert kernel.bytes >= 2 * 4 * 512 * 1024
    (alone,) = ops(em.estimate(lambda s: s[3], scales, on=DIE))  # it needs a launch of its own
    assert alone.time_s > 0


def test_the_choice_is_stated() -> None:
    x = S((64, 64), F32)
    for fusion in ("chains", "eager"):
        answer = em.estimate(lambda x: x + 1, x, on=DIE, fusion=fusion)
        assert f"(fusion='{fusion}')" in str(answer.table())
    assert "(fusion='chains')" in str(em.estimate(lambda x: x + 1, x, on=DIE))
    with pytest.raises(ValueError, match="fusion='none': expected one of 'chains', 'eager'"):
        em.estimate(lambda x: x + 1, x, on=DIE, fusion="none")


STEPS: dict[str, Callable[[Any, random.Random], Any]] = {
    "unary": lambda x, r: r.choice((jnp.tanh, jnp.exp, lambda y: y * 2, jnp.square))(x),
    "add": lambda x, r: x + jnp.sin(x),
    "softmax": lambda x, r: jax.nn.softmax(x, r.choice((0, 1))),
    "norm": lambda x, r: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1),
    "sum": lambda x, r: x - x.sum(r.choice((0, 1, (0, 1))), keepdims=True),
    "matmul": lambda x, r: (x.astype(BF16) @ x.T.astype(BF16) @ x.astype(BF16)).astype(F32),
    "sort": lambda x, r: jnp.sort(x, r.choice((0, 1))),
    "transpose": lambda x, r: x.T,
    "slice": lambda x, r: jnp.concatenate([x[1:], x[:1]]),
    "cumsum": lambda x, r: jnp.cumsum(x, r.choice((0, 1))),
    "mask": lambda x, r: jnp.where(jnp.arange(x.shape[1]) % 3 == 0, x, 0),
    "attention": lambda x, r: jax.nn.softmax(x @ x.T, -1) @ x,
}


@pytest.mark.parametrize("seed", range(24))
def test_fused_is_never_slower_than_eager(seed: int) -> None:
    r = random.Random(seed)
    names = r.choices(sorted(STEPS), k=r.randint(2, 7))
    shape = (r.choice((1, 2, 65, 200, 3000)), r.choice((3, 64, 500, 4096)))
    on = r.choice((DIE, POD, NVL72))

    def program(x: Any) -> Any:
        choice = random.Random(seed)
        for name in names:
            x = STEPS[name](x, choice)
        return x

    if r.random() < 0.3:
        program = jax.grad(lambda x, f=program: f(x).sum())
    fused, eager = (
        em.estimate(program, S(shape, F32), on=on, fusion=f) for f in ("chains", "eager")
    )
    assert fused.time_s <= eager.time_s, (names, shape, on.name)
    assert fused.memory.peak_bytes <= eager.memory.peak_bytes
    for answer in (fused, eager):
        assert answer.time_s >= answer.bound_s
        assert all(op.time_s >= op.bound_s for op in ops(answer))


# -- attention: what is taken as one kernel

Q, KV = heads(2, 256, 8, 64), heads(2, 256, 2, 64)


def scores(q: Any, k: Any) -> Any:
    return jnp.einsum("bthd,bshd->bhts", q, k).astype(F32) / 8


def mixed(weights: Any, v: Any) -> Any:
    return jnp.einsum("bhts,bshd->bthd", weights.astype(BF16), v)


def plain(q: Any, k: Any, v: Any) -> Any:
    return mixed(jax.nn.softmax(scores(q, k), -1), v)


def divided_later(q: Any, k: Any, v: Any) -> Any:
    weights = jnp.exp(scores(q, k))
    return mixed(weights, v) / weights.sum(-1).transpose(0, 2, 1)[..., None]


def with_dropout(q: Any, k: Any, v: Any) -> Any:
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, (2, 8, 256, 256))
    return mixed(jnp.where(keep, jax.nn.softmax(scores(q, k), -1), 0), v)


def with_sums(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    return mixed(jax.nn.softmax(s, -1), v), jax.nn.logsumexp(s, -1)


def square_loss(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (f(*args).astype(F32) ** 2).sum()


def causal(q: Any, k: Any, v: Any) -> Any:
    return dot_product_attention(q, k, v, is_causal=True)


ALL = (0, 1, 2)
FORWARD: tuple[str, ...] = ("rdk", "rkw")
BACKWARD: tuple[str, ...] = ("krd", "krw", "rdk", "rkd", "rwk")
ATTENTION: dict[str, tuple[Callable[..., Any], Sequence[Any], list[tuple[str, ...]]]] = {
    "plain": (plain, (Q, Q, Q), [FORWARD]),
    "jax": (dot_product_attention, (Q, Q, Q), [FORWARD]),
    "grouped and causal": (causal, (Q, KV, KV), [FORWARD]),
    "mask": (
        lambda q, k, v, m: dot_product_attention(q, k, v, mask=m),
        (Q, Q, Q, S((2, 8, 256, 256), bool)),
        [FORWARD],
    ),
    "bias": (
        lambda q, k, v, b: dot_product_attention(q, k, v, bias=b),
        (Q, Q, Q, S((1, 8, 256, 256), F32)),
        [FORWARD],
    ),
    "lengths": (
        lambda q, k, v, n: dot_product_attention(
            q, k, v, query_seq_lengths=n, key_value_seq_lengths=n
        ),
        (Q, Q, Q, S((2,), jnp.int32)),
        [FORWARD],
    ),
    "one query": (dot_product_attention, (heads(2, 1, 8, 64), Q, Q), [FORWARD]),
    "as wide as long": (causal, (heads(2, 64, 8, 64),) * 3, [FORWARD]),
    "no maximum, divided later": (divided_later, (Q, Q, Q), [FORWARD]),
    "dropout": (with_dropout, (Q, Q, Q), [FORWARD]),
    "sums kept": (with_sums, (Q, Q, Q), [FORWARD]),
    "two in a row": (lambda q, k, v: plain(plain(q, k, v), k, v), (Q, Q, Q), [FORWARD] * 2),
    "gradient": (jax.grad(square_loss(causal), ALL), (Q, KV, KV), [FORWARD, BACKWARD]),
    "gradient, as wide as long": (
        jax.grad(square_loss(causal), ALL),
        (heads(2, 64, 8, 64),) * 3,
        [FORWARD, BACKWARD],
    ),
    "gradient of queries": (
        jax.grad(square_loss(plain)),
        (Q, Q, Q),
        [FORWARD, ("rdk", "rkd", "rwk")],
    ),
    "linear in the result": (
        jax.grad(lambda *args: causal(*args).astype(F32).sum(), ALL),
        (Q, KV, KV),
        [BACKWARD],
    ),
    "rematerialised": (
        jax.grad(square_loss(jax.checkpoint(plain)), ALL),
        (Q, Q, Q),
        [FORWARD, BACKWARD],
    ),
    "over vmap": (jax.vmap(plain), (S((3, 2, 256, 8, 64), BF16),) * 3, [FORWARD]),
    "flat matrices": (
        lambda q, k, v: jax.nn.softmax(q @ k.T, -1) @ v,
        (S((300, 64), F32), S((200, 64), F32), S((200, 32), F32)),
        [FORWARD],
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_found(name: str) -> None:
    f, args, roles = ATTENTION[name]
    patterns = find(flatten(jax.make_jaxpr(f)(*args)))
    assert [tuple(sorted(k.roles)) for p in patterns for k in p.kernels] == roles
    answer = em.estimate(f, *args, on=DIE)
    fused = ops(answer, "attention")
    assert len(fused) == len(roles) and not ops(answer, "matmul")
    assert all("fused attention" in op.name for op in fused)
    assert "fused attention" in str(answer.table())
    eager = em.estimate(f, *args, on=DIE, fusion="eager")
    assert not ops(eager, "attention") and len(ops(eager, "matmul")) >= 2
    assert answer.time_s < eager.time_s


def projected(x: Any, w: Any, u: Any) -> Any:
    return jax.nn.silu(x @ w) @ u


X = S((256, 64), F32)
OTHER: dict[str, tuple[Callable[..., Any], Sequence[Any]]] = {
    "two layers": (projected, (X, S((64, 256), F32), S((256, 64), F32))),
    "weights are a result": (
        lambda q, k, v: (lambda w: (mixed(w, v), w))(jax.nn.softmax(scores(q, k), -1)),
        (Q, Q, Q),
    ),
    "softmax over queries": (
        lambda q, k, v: mixed(jax.nn.softmax(scores(q, k), -2), v),
        (Q, Q, Q),
    ),
    "softmax over both": (
        lambda q, k, v: mixed(
            jnp.exp(scores(q, k)) / jnp.exp(scores(q, k)).sum((2, 3))[..., None, None], v
        ),
        (Q, Q, Q),
    ),
    "no softmax": (lambda q, k, v: mixed(jnp.exp(scores(q, k)), v), (Q, Q, Q)),
    "scores are sorted": (
        lambda q, k, v: mixed(jax.nn.softmax(jnp.sort(scores(q, k), -1), -1), v),
        (Q, Q, Q),
    ),
    "too wide a head": (
        lambda q, k, v: jax.nn.softmax(q @ k.T, -1) @ v,
        (S((300, 513), F32),) * 3,
    ),
    "gradient of a classifier": (
        jax.grad(lambda w, x, y: -(jax.nn.log_softmax(x @ w) * y).sum()),
        (S((64, 256), F32), X, S((256, 256), F32)),
    ),
    "weights used twice": (
        lambda q, k, v: (lambda w: mixed(w, v) + mixed(w, k))(jax.nn.softmax(scores(q, k), -1)),
        (Q, Q, Q),
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_products_are_left_alone(name: str) -> None:
    f, args = OTHER[name]
    assert not find(flatten(jax.make_jaxpr(f)(*args)))
    answer = em.estimate(f, *args, on=DIE)
    assert not ops(answer, "attention") and len(ops(answer, "matmul")) >= 2


# -- attention: what it costs


def test_scores_take_no_memory_and_no_traffic() -> None:
    q = heads(1, 4096, 8, 128)
    size = 4096 * 8 * 128 * 2
    answer = em.estimate(dot_product_attention, q, q, q, on=DIE)
    (kernel,) = ops(answer)
    assert kernel.bytes == 4 * size
    assert answer.memory.peak_bytes == 4 * size
    assert kernel.flops == answer.flops == 4 * 8 * 4096**2 * 128
    eager = em.estimate(dot_product_attention, q, q, q, on=DIE, fusion="eager")
    assert eager.memory.peak_bytes > 2 * 4 * 8 * 4096**2
    assert eager.flops == answer.flops


def lanes(op: Op) -> float:
    return op.vector_s * DIE.chip.vector_flops_per_s("float32")


def test_operations_of_attention_by_hand() -> None:
    """16 heads of 256 queries and 512 keys, d = 64. Each score: to FP32, a division, the maximum,
    minus it, an exponential, the sum, back to BF16. Each query: a maximum with what there was, and
    a division of its 64 results.
    """
    q, k = heads(2, 256, 8, 64), heads(2, 512, 8, 64)
    (kernel,) = ops(em.estimate(plain, q, k, k, on=DIE))
    scores_, queries = 16 * 256 * 512, 16 * 256
    assert kernel.flops == 2 * scores_ * (64 + 64)
    assert kernel.bytes == 2 * (2 * q.size + 2 * k.size)
    each = 1 + 4 + 1 + 1 + 8 + 1 + 1
    assert lanes(kernel) == pytest.approx(each * scores_ + (1 + 4 * 64) * queries)
    # Backward: all three and the result's gradient are read, three are written, and each query has
    # kept its maximum and its sum in FP32.
    gradient = jax.grad(lambda *args: plain(*args).astype(F32).sum(), (0, 1, 2))
    (back,) = ops(em.estimate(gradient, q, k, k, on=DIE), "attention")
    assert back.flops == 2.5 * kernel.flops
    assert back.bytes == 2 * (3 * q.size + 4 * k.size) + 8 * queries
    # Scores as before, but for maximum and sum; their gradients to FP32, two products, a sum, an
    # addition, a product, a division, back to BF16. Each query: a maximum, the sum to the power of
    # -2, a sign, a sum, and a division as before.
    again, more = 1 + 4 + 1 + 8 + 1, 1 + 2 + 1 + 1 + 1 + 4 + 1
    assert lanes(back) == pytest.approx(
        (again + more) * scores_ + (1 + (1 + 4) + 1 + 1 + 4 * 64) * queries
    )


def test_scores_of_hidden_tiles_are_no_work_for_the_vector_cores_either() -> None:
    f = hidden(lambda: positions()[1] < 1024)
    (half,), (whole,) = (ops(em.estimate(g, LONG, LONG, LONG, on=DIE)) for g in (f, plain))
    # One operation more on half the scores, and a comparison and a choice on the mask.
    scores_ = 2 * 2048**2
    assert lanes(half) < lanes(whole) - 17 / 2 * scores_ + scores_ / 2 + 3 * 2048**2


def test_backward_computes_the_scores_again() -> None:
    f, args, _ = ATTENTION["gradient"]
    forward, backward = ops(em.estimate(f, *args, on=DIE), "attention")
    assert "backward" in backward.name
    assert backward.flops == 2.5 * forward.flops
    tiles = 2 * 2 * 4 * 256 * 256 * 64 * 2  # batch, groups, heads of each, scores, width
    assert forward.flops == 2 * tiles * 0.75  # three of the four tiles of a causal mask


def test_attention_is_quicker_than_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (f, args, _) in ATTENTION.items():
        for on in (DIE, POD, NVL72):
            fused = em.estimate(f, *args, on=on)
            with monkeypatch.context() as patch:
                patch.setattr(walker, "find", lambda graph: ())
                parts = em.estimate(f, *args, on=on)
            assert ops(parts, "matmul") and not ops(parts, "attention")
            assert fused.time_s < parts.time_s, (name, on.name)
            # One kernel holds all operands and results at once; parts of small ones may need less.
            assert fused.memory.peak_bytes <= 1.1 * parts.memory.peak_bytes


def share(f: Callable[..., Any], *args: Any) -> float:
    """Of the scores' work, what the kernel does."""
    (kernel,) = ops(em.estimate(f, *args, on=DIE), "attention")
    (batch, t, heads_, d), s = args[0].shape, args[1].shape[1]
    return kernel.flops / (4 * batch * heads_ * t * s * d)


LONG = heads(1, 2048, 2, 64)
TILES = 2048 // 128
CAUSAL = (TILES + 1) / (2 * TILES)


def banded(window: tuple[int, int], **how: Any) -> Callable[..., Any]:
    return lambda q, k, v: dot_product_attention(q, k, v, local_window_size=window, **how)


def hidden(keep: Any) -> Callable[..., Any]:
    return lambda q, k, v: mixed(jax.nn.softmax(jnp.where(keep(), scores(q, k), -1e30), -1), v)


def positions() -> tuple[Any, Any]:
    return lax.broadcasted_iota(int, (2048, 2048), 0), lax.broadcasted_iota(int, (2048, 2048), 1)


def biased(q: Any, k: Any, v: Any) -> Any:
    row, column = positions()
    return mixed(jax.nn.softmax(scores(q, k) + jnp.where(row < column, -jnp.inf, 0.0), -1), v)


MASKS: dict[str, tuple[Callable[..., Any], float]] = {
    "none": (plain, 1.0),
    "causal": (causal, CAUSAL),
    "tril": (hidden(lambda: jnp.tril(jnp.ones((2048, 2048), bool))), CAUSAL),
    "the other way": (hidden(lambda: positions()[0] <= positions()[1]), CAUSAL),
    "inverted": (hidden(lambda: ~(positions()[0] < positions()[1])), CAUSAL),
    "bias": (biased, CAUSAL),
    # Each row of tiles sees its own tile and the one or two beside it.
    "window": (banded((128, 128)), (3 * TILES - 2) / TILES**2),
    "causal window": (banded((128, 0), is_causal=True), (2 * TILES - 1) / TILES**2),
    "first half": (hidden(lambda: positions()[1] < 1024), 0.5),
    "an array": (hidden(lambda: np.tril(np.ones((2048, 2048), bool))), CAUSAL),
    "a checkerboard": (hidden(lambda: (positions()[0] + positions()[1]) % 2 == 0), 1.0),
}


@pytest.mark.parametrize("name", MASKS)
def test_tiles_that_a_mask_of_positions_hides_are_left_out(name: str) -> None:
    f, expected = MASKS[name]
    assert share(f, LONG, LONG, LONG) == pytest.approx(expected, rel=1e-6)
    rests = em.estimate(f, LONG, LONG, LONG, on=DIE).assumptions
    assert any("leaves out tiles" in text for text in rests) == (expected < 1)


def test_a_mask_of_values_hides_nothing() -> None:
    mask = S((1, 1, 2048, 2048), bool)
    f = lambda q, k, v, m: dot_product_attention(q, k, v, mask=m)  # noqa: E731
    (kernel,) = ops(em.estimate(f, LONG, LONG, LONG, mask, on=DIE), "attention")
    assert kernel.flops == 4 * 2 * 2048**2 * 64
    assert kernel.bytes == 4 * 2048 * 2 * 64 * 2 + 2048**2


# -- attention: where it stands


def test_inside_shard_map_and_loops() -> None:
    mesh = POD.mesh(dp=48, tp=8)
    x = S((48, 256, 8, 64), BF16)

    def local(x: Any) -> Any:
        body = jax.checkpoint(lambda c, _: (causal(c, c, c), None))
        return lax.scan(body, x, None, length=3)[0]

    def loss(x: Any) -> Any:
        spec = P("dp", None, "tp")
        y = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)
        return (y.astype(F32) ** 2).sum()

    found = [
        (s.name, n)
        for s, n in each(em.estimate(jax.grad(loss), x, on=POD).steps)
        if s.kind == "attention"
    ]
    assert found == [("fused attention 256x64x256", 3), ("fused attention backward 256x64x256", 3)]


@pytest.mark.parametrize(
    ("spec", "fused"),
    [
        (P("x"), True),
        (P(None, None, "x"), True),
        (P(None, "x"), False),
        (P(*[None] * 3, "x"), False),
    ],
)
def test_only_batch_and_heads_may_be_divided(spec: P, fused: bool) -> None:
    """A device then has all the queries, keys and columns of its heads."""
    pod = em.cloudmatrix384()
    keep = jax.shard_map(
        lambda *args: [jnp.sin(x) for x in args],
        mesh=pod.mesh(x=2),
        in_specs=spec,
        out_specs=[spec] * 3,
    )
    q = heads(2, 256, 8, 64)
    found = ops(em.estimate(lambda q, k, v: plain(*keep(q, k, v)), q, q, q, on=pod))
    assert [op.name for op in found if op.kind == "attention"] == (
        ["fused attention 256x64x256 x8"] if fused else []
    )
    assert (sum(op.kind == "matmul" for op in found) == 0) == fused


def test_residuals_that_another_loop_reads_keep_the_parts_apart() -> None:
    """Without rematerialisation the forward loop hands its weights to the backward loop."""

    def loss(x: Any) -> Any:
        y = lax.scan(lambda c, _: (causal(c, c, c), None), x, None, length=3)[0]
        return (y.astype(F32) ** 2).sum()

    answer = em.estimate(jax.grad(loss), heads(1, 256, 2, 64), on=DIE)
    assert not ops(answer, "attention")
    assert answer.memory.peak_bytes > 3 * 2 * 256 * 256 * 2


def test_values_do_not_depend_on_fusion() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, 1, 16)), BF16) for _ in range(3))
    runs = [
        em.run(causal, q, k, v, on=DIE, arithmetic="native", fusion=fusion)
        for fusion in ("chains", "eager")
    ]
    assert runs[0].time_s < runs[1].time_s
    bits = [np.asarray(run.value).view(np.uint16) for run in runs]
    assert np.array_equal(bits[0], bits[1]) and bits[0].any()


def test_transposes_beside_products_cost_nothing() -> None:
    """A matmul writes its result in any order, also if two transposes say which."""
    a = S((8, 128, 256), BF16)

    def f(a: Any, b: Any) -> Any:
        turned = jnp.matmul(a, b).transpose(1, 0, 2)
        return turned.reshape(128, 8, 2, 64).transpose(2, 1, 0, 3)

    (step,) = ops(em.estimate(f, a, S((8, 256, 128), BF16), on=DIE))
    assert step.time_s == matmul_time(128, 256, 128, DIE, batch=8).time_s
