"""A decoder-only transformer language model, trained over a mesh with axes ("dp", "tp").

Plain JAX, as one would write it for 384 real devices: `jax.shard_map` over the whole step,
tensor parallel over "tp" (columns, rows, then a `psum`), data parallel over "dp", BF16 matmuls,
FP32 master weights, Adam written out. The only thing that it needs to be given is the mesh.

Gradients are all-reduced over "dp" once per step, in two buckets. Configurations with `zero=True`
keep only a flat 1/dp slice of every layer's weights and Adam moments per device: the layer gathers
its weights over "dp", and the transpose of that is the `psum_scatter` of their gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Sizes of one model and of its training step.

    Attributes:
        sequences: sequences per data-parallel replica and step.
        zero: keep layer weights and their Adam moments sliced over "dp" as well (ZeRO-3).
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_ff: int
    vocabulary: int
    sequence: int
    sequences: int = 1
    zero: bool = False
    remat: bool = False
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"d_model={self.d_model} must be an even multiple of heads={self.heads}, "
                f"and heads a multiple of kv_heads={self.kv_heads}"
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.heads

    @property
    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """The weight matrices of one layer: (rows, columns, which of the two "tp" divides)."""
        d, ff, kv = self.d_model, self.d_ff, self.kv_heads * self.d_head
        return {
            "wq": (d, d, 1),
            "wk": (d, kv, 1),
            "wv": (d, kv, 1),
            "wo": (d, d, 0),
            "gate": (d, ff, 1),
            "up": (d, ff, 1),
            "down": (ff, d, 0),
        }

    @property
    def parameters(self) -> int:
        per_layer = sum(rows * columns for rows, columns, _ in self.matrices.values())
        norms = (2 * self.layers + 1) * self.d_model
        return self.layers * per_layer + norms + 2 * self.vocabulary * self.d_model


SIZES: dict[str, Config] = {
    # One device's share of a step is a few million multiply-adds: the pod fits two host cores.
    "tiny": Config(
        d_model=128, layers=2, heads=8, kv_heads=8, d_ff=256, vocabulary=128, sequence=64,
        learning_rate=4e-3,
    ),
    "small": Config(
        d_model=512, layers=4, heads=16, kv_heads=8, d_ff=1536, vocabulary=128, sequence=128,
        learning_rate=1e-3,
    ),
    # The shapes of Llama 2 7B (arXiv:2307.09288).
    "7b": Config(
        d_model=4096, layers=32, heads=32, kv_heads=32, d_ff=11008, vocabulary=32000,
        sequence=4096, sequences=4, zero=True, remat=True,
    ),
    # The shapes of Llama 3 70B (arXiv:2407.21783).
    "70b": Config(
        d_model=8192, layers=80, heads=64, kv_heads=8, d_ff=28672, vocabulary=128256,
        sequence=4096, sequences=4, zero=True, remat=True,
    ),
}  # fmt: skip


class AdamState(NamedTuple):
    """First and second moments, shaped and sharded like the parameters, and the steps taken."""

    m: Any
    v: Any
    steps: Any


def check(config: Config, tp: int) -> None:
    """Raises ValueError unless `tp` devices can divide every tensor-parallel dimension."""
    for name in ("heads", "kv_heads", "d_ff", "vocabulary"):
        size = getattr(config, name)
        if size % tp:
            raise ValueError(f"tp={tp} does not divide {name}={size}; choose tp as a divisor of it")


# --- the model, seen from one device ------------------------------------------------------------


def rms_norm(x: Array, scale: Array) -> Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-5)
    return (x32 * scale).astype(jnp.bfloat16)


def rotate(x: Array) -> Array:
    """Rotary position embedding of x[batch, sequence, ..., d_head]."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-np.arange(half, dtype=np.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    angle = angle.reshape(x.shape[1], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(jnp.bfloat16)


def attention(config: Config, layer: Params, x: Array) -> Array:
    """Causal grouped-query attention over this device's heads."""
    x = lax.pcast(x, "tp", to="varying")  # once, so that the backward pass has one psum, not three
    b, s, _ = x.shape
    q = (x @ layer["wq"]).reshape(b, s, -1, config.heads // config.kv_heads, config.d_head)
    k = (x @ layer["wk"]).reshape(b, s, -1, config.d_head)
    v = (x @ layer["wv"]).reshape(b, s, -1, config.d_head)
    scores = jnp.einsum("bsngd,btnd->bngst", rotate(q), rotate(k)).astype(jnp.float32)
    causal = jnp.tril(jnp.ones((s, s), bool))
    scores = jnp.where(causal, scores * config.d_head**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(jnp.bfloat16)
    mixed = jnp.einsum("bngst,btnd->bsngd", weights, v).reshape(b, s, -1)
    return lax.psum(mixed @ layer["wo"], "tp")


def feed_forward(layer: Params, x: Array) -> Array:
    """SwiGLU over this device's columns."""
    x = lax.pcast(x, "tp", to="varying")
    hidden = jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])
    return lax.psum(hidden @ layer["down"], "tp")


def layer_weights(config: Config, layer: Params) -> Params:
    """This device's "tp" slice of a layer's matrices, in BF16."""
    weights = {}
    for name, (rows, columns, divided) in config.matrices.items():
        w = layer[name].astype(jnp.bfloat16)
        if config.zero:
            shape = [rows, columns]
            shape[divided] //= lax.axis_size("tp")
            w = lax.all_gather(w.reshape(-1), "dp", tiled=True)
            w = w[: math.prod(shape)].reshape(shape)
        weights[name] = w
    return weights


def embed(table: Array, tokens: Array) -> Array:
    """Rows of a table whose rows are divided over "tp": look up what is here, add up the rest."""
    local = tokens - lax.axis_index("tp") * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    rows = table.astype(jnp.bfloat16)[jnp.where(here, local, 0)]
    return lax.psum(jnp.where(here[..., None], rows, 0), "tp")


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean loss over this replica's tokens; the vocabulary is divided over "tp"."""
    logits = logits.astype(jnp.float32)
    peak = lax.pmax(lax.stop_gradient(logits.max(axis=-1)), "tp")
    total = jnp.exp(logits - peak[..., None]).sum(axis=-1)
    local = targets - lax.axis_index("tp") * logits.shape[-1]
    is_target = local[..., None] == jnp.arange(logits.shape[-1])
    target = jnp.where(is_target, logits, 0).sum(axis=-1)
    total, target = lax.psum(jnp.stack([total, target]), "tp")
    return jnp.mean(jnp.log(total) + peak - target)


def loss(config: Config, params: Params, tokens: Int[Array, "sequences length"]) -> Array:
    """Next-token loss, averaged over this replica's tokens. Runs inside `shard_map`."""

    def one_layer(x: Array, layer: Params) -> tuple[Array, None]:
        weights = layer_weights(config, layer)
        x = x + attention(config, weights, rms_norm(x, layer["norm1"]))
        return x + feed_forward(weights, rms_norm(x, layer["norm2"])), None

    x = embed(params["embed"], tokens[:, :-1])
    x, _ = lax.scan(jax.checkpoint(one_layer) if config.remat else one_layer, x, params["layers"])
    logits = rms_norm(x, params["norm"]) @ params["unembed"].astype(jnp.bfloat16)
    return cross_entropy(logits, tokens[:, 1:])


def local_gradients(config: Config, params: Params, tokens: Array) -> tuple[Array, Params]:
    """Loss and gradients of this replica's tokens, as if each replica had weights of its own."""
    own = jax.tree.map(
        lambda w, p: w if "dp" in p else lax.pcast(w, "dp", to="varying"), params, specs(config)
    )
    return jax.value_and_grad(lambda p: loss(config, p, tokens))(own)


def all_reduce_mean(spec: Any, grads: Any) -> Any:
    """Mean over "dp" of what is not divided over it; what is was summed by its `psum_scatter`."""
    mean = 1 / lax.axis_size("dp")
    summed = unpack(spec, grads, [lax.psum(bucket, "dp") for bucket in pack(spec, grads)])
    return jax.tree.map(lambda g: g * mean, summed)


# Matrices are cast to BF16 before use, so their gradients are BF16 numbers and are sent as such;
# the leaves that "tp" does not divide are few and stay FP32.
BUCKETS = ((True, jnp.bfloat16), (False, jnp.float32))


def pack(spec: Any, tree: Any) -> list[Array]:
    """Two vectors: the leaves that "tp" divides, in BF16, and those that it does not, in FP32."""
    leaves = jax.tree.leaves(tree)
    return [
        jnp.concatenate([leaves[i].reshape(-1).astype(dtype) for i in members])
        for members, dtype in _buckets(spec)
    ]


def unpack(spec: Any, tree: Any, buckets: list[Array]) -> Any:
    """`tree` with the leaves that `pack` took replaced by what `buckets` holds, in FP32."""
    leaves, structure = jax.tree.flatten(tree)
    for (members, _), bucket in zip(_buckets(spec), buckets, strict=True):
        ends = np.cumsum([leaves[i].size for i in members])
        for i, part in zip(members, jnp.split(bucket, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i].shape).astype(jnp.float32)
    return jax.tree.unflatten(structure, leaves)


def _buckets(spec: Any) -> list[tuple[list[int], Any]]:
    """Which leaves go into which bucket; those that "dp" divides go into none."""
    specs = list(enumerate(jax.tree.leaves(spec, is_leaf=_is_spec)))
    return [
        ([i for i, p in specs if "dp" not in p and ("tp" in p) == divided], dtype)
        for divided, dtype in BUCKETS
    ]


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def adam(config: Config, params: Params, state: AdamState, grads: Params) -> tuple[Any, AdamState]:
    steps = state.steps + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.m, grads)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, state.v, grads)
    t = steps.astype(jnp.float32)
    rate = config.learning_rate * jnp.sqrt(1 - 0.95**t) / (1 - 0.9**t)
    params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, m, v)
    return params, AdamState(m, v, steps)


# --- the training step, seen from outside -------------------------------------------------------


def specs(config: Config) -> Params:
    """How each parameter lies on the mesh."""
    layer: Params = {"norm1": P(), "norm2": P()}
    for name, (_, _, divided) in config.matrices.items():
        split: list[str | None] = [None, None]
        split[divided] = "tp"
        layer[name] = P(None, "tp", "dp") if config.zero else P(None, *split)
    return {"embed": P("tp"), "layers": layer, "norm": P(), "unembed": P(None, "tp")}


def train_step(config: Config, mesh: Any) -> Callable[..., tuple[Params, AdamState, Array]]:
    """`step(params, state, tokens) -> (params, state, loss)` over `mesh`, ready for `jax.jit`.

    `tokens` is int32[dp * sequences, sequence + 1].
    """
    check(config, mesh.shape["tp"])
    params_spec = specs(config)
    state_spec = AdamState(params_spec, params_spec, P())

    def step(params: Params, state: AdamState, tokens: Array) -> tuple[Params, AdamState, Array]:
        value, grads = local_gradients(config, params, tokens)
        value, grads = all_reduce_mean((P(), params_spec), (value, grads))
        params, state = adam(config, params, state, grads)
        return params, state, value

    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(params_spec, state_spec, P("dp")),
        out_specs=(params_spec, state_spec, P()),
    )


def initial(config: Config, dp: int, tp: int, seed: int = 0) -> tuple[Params, AdamState]:
    """Parameters and optimizer state at step 0. Use under `jax.eval_shape` for shapes alone."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 + len(config.matrices)))
    deep = 1 / math.sqrt(2 * config.layers)  # keeps the residual stream's variance at any depth

    def matrix(name: str, rows: int, columns: int, divided: int) -> Array:
        scale = rows**-0.5 * (deep if divided == 0 else 1)
        w = scale * jax.random.normal(next(keys), (config.layers, rows, columns), jnp.float32)
        return _flat_slices(w, divided, dp, tp) if config.zero else w

    table = (config.vocabulary, config.d_model)
    params = {
        "embed": 0.5 * jax.random.normal(next(keys), table, jnp.float32),
        "layers": {
            "norm1": jnp.ones((config.layers, config.d_model), jnp.float32),
            "norm2": jnp.ones((config.layers, config.d_model), jnp.float32),
            **{name: matrix(name, *shape) for name, shape in config.matrices.items()},
        },
        "norm": jnp.ones(config.d_model, jnp.float32),
        "unembed": 0.02 * jax.random.normal(next(keys), table[::-1], jnp.float32),
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    return params, AdamState(zeros, zeros, jnp.zeros((), jnp.int32))


def _flat_slices(w: Float[Array, "l r c"], divided: int, dp: int, tp: int) -> Array:
    """[layers, tp, flat]: each device's matrix as one vector, padded to a multiple of dp."""
    w = jnp.stack(jnp.split(w, tp, axis=1 + divided), axis=1).reshape(w.shape[0], tp, -1)
    return jnp.pad(w, ((0, 0), (0, 0), (0, -w.shape[2] % dp)))


def shapes(config: Config, dp: int, tp: int) -> tuple[Params, AdamState, jax.ShapeDtypeStruct]:
    """The arguments of `train_step` as shapes alone, for configurations that fit no host."""
    params, state = jax.eval_shape(lambda: initial(config, dp, tp))
    tokens = jax.ShapeDtypeStruct((dp * config.sequences, config.sequence + 1), jnp.int32)
    return params, state, tokens


def text() -> Int[np.ndarray, " n"]:
    """The reference manual that comes with every Python, as ASCII codes."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(joined.encode("ascii", "replace"), np.uint8).astype(np.int32)


def batches(config: Config, dp: int, seed: int = 0) -> Iterator[Int[np.ndarray, "b length"]]:
    """Random windows of `text()`, without end."""
    if config.vocabulary < 128:
        raise ValueError(f"vocabulary={config.vocabulary} cannot hold 128 ASCII codes")
    codes, random = text(), np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(codes) - config.sequence - 1, dp * config.sequences)
        yield codes[starts[:, None] + np.arange(config.sequence + 1)]
