"""The whole stack in seconds: one sharded program, its values by hand, its time, its report."""

from __future__ import annotations

import json
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
from emulator.machines import Machine

DP, TP = 3, 2
BF16 = ml_dtypes.bfloat16


def layer(mesh: Any) -> Any:
    """Column- then row-parallel product with a BF16 sum over "tp", and a mean over "dp"."""

    def local(x: jax.Array, w1: jax.Array, w2: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = lax.psum(jnp.maximum(x @ w1, 0) @ w2, "tp")
        return y, lax.psum(y.sum(axis=0), "dp")

    specs = (P("dp"), P(None, "tp"), P("tp"))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("dp"), P()))


def operands() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(7)
    shapes = ((DP, 32), (32, 48), (48, 5))
    return tuple(random.standard_normal(s, np.float32).astype(BF16) for s in shapes)


def cube(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b by the definition, rounded once to BF16."""
    return kernels.reference.matmul(a, b, arithmetic=kernels.ASCEND_910C).astype(BF16)


def ring(parts: list[np.ndarray]) -> np.ndarray:
    """All-reduce of one vector per rank: chunk c starts at rank c; every add rounds to BF16."""
    n, count = len(parts), parts[0].size
    flat, size = [p.reshape(-1) for p in parts], -(-count // len(parts))
    out = np.empty(count, BF16)
    for c in range(n):
        chunk = slice(c * size, (c + 1) * size)
        total = flat[c][chunk]
        for step in range(1, n):
            total = (total + flat[(c + step) % n][chunk]).astype(BF16)
        out[chunk] = total
    return out.reshape(parts[0].shape)


def package_ring(parts: list[np.ndarray]) -> np.ndarray:
    """The two dies of each package reduce one half of the payload each."""
    flat = [p.reshape(-1) for p in parts]
    half = -(-flat[0].size // 2)
    halves = [ring([f[:half] for f in flat]), ring([f[half:] for f in flat])]
    return np.concatenate(halves).reshape(parts[0].shape)


def by_hand(x: np.ndarray, w1: np.ndarray, w2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What every device computes, one after another, in NumPy and Python integers."""
    zero = np.zeros((), BF16)
    columns, rows = np.split(w1, TP, axis=1), np.split(w2, TP, axis=0)
    y = [
        package_ring(
            [cube(np.maximum(cube(x[i : i + 1], c), zero), r)
             for c, r in zip(columns, rows, strict=True)]
        )
        for i in range(DP)
    ]  # fmt: skip
    return np.concatenate(y), package_ring([row[0] for row in y])


@pytest.fixture(scope="module")
def run(cloud: Machine) -> Any:
    rings = {"all_reduce": "ring"}
    return em.run(layer(cloud.mesh(dp=DP, tp=TP)), *operands(), on=cloud, algorithms=rings)


def test_values_are_those_of_a_hand_written_evaluation(run: Any) -> None:
    for got, expected in zip(run.value, by_hand(*operands()), strict=True):
        bits = np.asarray(got).view(np.uint16)
        np.testing.assert_array_equal(bits, expected.view(np.uint16))


def test_native_values_agree_within_rounding(cloud: Machine, run: Any) -> None:
    native = em.emulate(layer(cloud.mesh(dp=DP, tp=TP)), on=cloud, arithmetic="native")
    for got, other in zip(run.value, native(*operands()), strict=True):
        # A few BF16 roundings of numbers up to about 32.
        np.testing.assert_allclose(np.float32(got), np.float32(other), atol=32 * 2**-7)


def test_time_memory_and_energy(run: Any) -> None:
    assert 0 < run.bound_s <= run.time_s < 1
    assert len(run.collectives) == 2
    assert str(run.table()).strip()
    assert run.assumptions


def test_estimate_from_shapes_is_the_time_of_the_run(cloud: Machine, run: Any) -> None:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands()]
    mesh = cloud.mesh(dp=DP, tp=TP)
    answer = em.estimate(layer(mesh), *shapes, on=cloud, algorithms={"all_reduce": "ring"})
    assert answer.time_s == run.time_s


def test_the_other_machine_is_one_argument_away(rack: Machine) -> None:
    answer = em.run(layer(rack.mesh(dp=DP, tp=TP)), *operands(), on=rack)
    assert answer.time_s >= answer.bound_s > 0


def test_trace_and_page(run: Any, tmp_path: Path) -> None:
    run.to_perfetto(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    run.to_html(tmp_path / "t.html")
    assert "</html>" in (tmp_path / "t.html").read_text()
