"""The same bits on a GPU as on the CPU; skipped where JAX finds none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
import kernels
from tests.kernel_inputs import BF16, FP16, GENERATORS, draw_matrices
from tests.programs import PROGRAMS, normal
from tests.test_values import same_bits

PRESETS = [*kernels.PRESETS.values(), *kernels.ASCEND_910C_CANDIDATES.values()]
MACHINE = em.cloudmatrix384()


@pytest.fixture(scope="module")
def both() -> Callable[..., tuple[Any, Any]]:
    """Calls a function on the CPU and on the GPU, jitted: (what the one gives, what the other)."""
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX finds no GPU")
    cpu = jax.devices("cpu")[0]

    def call(fun: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        results = []
        for device in (cpu, gpu):
            with jax.default_device(device):
                out = jax.jit(fun)(*jax.device_put(args, device))
                results.append(jax.tree.map(np.asarray, out))
        return results[0], results[1]

    return call


@pytest.mark.parametrize("arithmetic", PRESETS, ids=lambda a: a.name)
@pytest.mark.parametrize("generator", GENERATORS)
def test_matmul_bits(both: Any, generator: str, arithmetic: kernels.Arithmetic) -> None:
    dtype = BF16 if "bfloat16" in arithmetic.dtypes else FP16
    a, b, c = draw_matrices(generator, 0, 24, 80, 40, dtype)
    cpu, gpu = both(lambda *x: kernels.matmul(*x, arithmetic=arithmetic), a, b, c)
    assert same_bits(cpu, gpu)
    start = None if c is None else c[:3, :4]
    definition = kernels.reference.matmul(a[:3], b[:, :4], start, arithmetic=arithmetic)
    assert same_bits(gpu[:3, :4], definition)


def test_collective_bits(both: Any) -> None:
    mesh = MACHINE.mesh(dp=48, tp=8)

    def body(x: Any) -> Any:
        return lax.psum(x, "dp"), lax.psum_scatter(x, "tp", tiled=True), lax.all_gather(x, "tp")

    spec = P(("dp", "tp"))
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = normal(384 * 8, 5, dtype=BF16)
    x[0] = np.array([1, 2, 0x8003, 0x7F80, 0x7F], np.uint16).view(x.dtype)  # subnormals, infinity
    cpu, gpu = both(em.emulate(run, MACHINE), x)
    assert same_bits(cpu, gpu)


def test_program_bits(both: Any) -> None:
    """A gradient through matmuls, collectives, + - x and sums: what is promised on both."""
    mesh = MACHINE.mesh(dp=4, tp=2)

    def local(w: Any, x: Any) -> Any:
        h = lax.psum(x @ w, "tp")
        h = h * h - x[:, : h.shape[1]] * jnp.asarray(0.5, h.dtype)
        return lax.pmean(jnp.sum(h.astype(jnp.float32) ** 2), ("dp", "tp"))

    loss = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P("dp", "tp")), out_specs=P())
    grad = em.emulate(jax.value_and_grad(loss, argnums=(0, 1)), MACHINE)
    w = normal(64, 32, dtype=BF16)
    x = normal(16, 64, seed=1, dtype=BF16)
    cpu, gpu = both(grad, w, x)
    assert same_bits(cpu, gpu)


def test_a_training_program_runs(both: Any) -> None:
    """Transcendental functions are each platform's own: equal within rounding."""
    axes, build, args = PROGRAMS["tensor_parallel"]
    cpu, gpu = both(em.emulate(build(MACHINE.mesh(**axes)), MACHINE), *args)
    for one, other in zip(jax.tree.leaves(cpu), jax.tree.leaves(gpu), strict=True):
        one, other = one.astype(np.float32), other.astype(np.float32)
        np.testing.assert_allclose(one, other, atol=2**-5 * np.abs(one).max())
