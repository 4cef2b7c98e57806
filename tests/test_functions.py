"""Functions of FP32 numbers that the emulator evaluates itself: nearest to the true values, and the
same bits whatever instructions a processor has.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import emulator as em
from emulator.machines import Machine
from emulator.program import vector
from emulator.program.functions import IN_FP64, OWN
from tests.kernel_inputs import BF16, words

LEAST = 2.0**-126

TRUE = {
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "tanh": np.tanh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "erf": np.vectorize(math.erf, [float]),
    "erfc": np.vectorize(math.erfc, [float]),
}

ENDS = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0, -2.0, 3.4e38, -3.4e38, 1e-45, -1e-45]
    + [LEAST, -LEAST, 88.72, 88.73, -87.33, -87.34, 89.4, -104.0, 127.9, 128.0, -126.0, -126.5, 9.3]
    + [0.84375, 1.25, 1 / 0.35, 0.25, -0.25, math.sqrt(0.5), math.sqrt(2), 0.34657, 20.0, 0.85],
    np.float32,
)


def arguments(count: int = 20_000) -> np.ndarray:
    """Of all sizes, of those whose functions are no zeros, infinities and ones, beside 1 and -1,
    and the ends of ranges.
    """
    rng = np.random.default_rng(0)
    wide = rng.normal(size=count) * 2.0 ** rng.integers(-126, 127, count)
    usual = rng.normal(size=count) * 2.0 ** rng.integers(-30, 8, count)
    beside = rng.choice([1, -1], count) * (1 + rng.normal(size=count) * 2.0 ** -rng.uniform(0, 24))
    within = rng.uniform(-1, 1, count)
    return np.concatenate([wide, usual, beside, within, ENDS]).astype(np.float32)


def own(name: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(OWN[name])(x))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LEAST, x * 0, x)


@pytest.mark.parametrize("name", TRUE)
def test_results_are_the_nearest_numbers(name: str) -> None:
    x = arguments()
    with np.errstate(all="ignore"):
        true = np.asarray(TRUE[name](flushed(x).astype(np.float64)))
        expected = flushed(true.astype(np.float32))
    got = own(name, x)
    none = np.isnan(expected)
    assert np.array_equal(np.isnan(got), none)
    special = (np.isinf(expected) | (expected == 0)) & ~none
    assert np.array_equal(words(got[special]), words(expected[special]))  # signs of zeros too
    usual = ~special & ~none
    place = np.spacing(np.abs(expected[usual])).astype(np.float64)
    # NumPy's FP64 results are themselves off by some 2^-52.
    assert np.all(np.abs(got[usual] - true[usual]) <= (0.5 + 2.0**-20) * place)


def test_inverse_error_function() -> None:
    """One step of Newton's from it, with the complement's digits near 1, is as good as none."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-1, 1, 9999), 1 - 2.0 ** -rng.uniform(1, 24, 9999)])
    x = np.append(x, [2.0**-125, 0.85, -0.85]).astype(np.float32)
    x = x[np.abs(x) < 1]
    got, size = own("erf_inv", x).astype(np.float64), np.abs(x).astype(np.float64)
    assert np.array_equal(np.sign(got), np.sign(x))
    small, far = TRUE["erf"](np.abs(got)) - size, (1 - size) - TRUE["erfc"](np.abs(got))
    off = np.where(size < 0.5, small, far) / (2 / math.sqrt(math.pi) * np.exp(-(got**2)))
    place = np.spacing(np.abs(got).astype(np.float32)).astype(np.float64)
    assert np.all(np.abs(off) <= (0.5 + 2.0**-20) * place)
    ends = own("erf_inv", np.array([1, -1, 0, -0.0, 1.5, np.nan], np.float32))
    assert words(ends[:4]).tolist() == [0x7F800000, 0xFF800000, 0, 0x80000000]
    assert np.isnan(ends[4:]).all()


def digests() -> dict[str, str]:
    """Of every function's results before they are rounded to FP32."""
    x = arguments(3000)
    x = x[~np.isnan(x)].astype(np.float64)
    found = {}
    with jax.enable_x64(True):
        for name, function in IN_FP64.items():
            results = np.asarray(jax.jit(function)(x))
            results = np.where(np.isnan(results), 0, results)  # whose words differ
            found[name] = hashlib.sha256(results.tobytes()).hexdigest()
    return found


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or jax.default_backend() != "cpu",
    reason="XLA knows an x86's levels of instructions",
)
@pytest.mark.parametrize(
    "level", ["SSE4_2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("AVX", "AVX2"))]
)
def test_bits_do_not_depend_on_instructions(level: str) -> None:
    """XLA's own functions have other bits there."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={level}"
    code = "import json; from tests import test_functions as t; print(json.dumps(t.digests()))"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "XLA_FLAGS": flags.strip()},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == digests()


def test_programs_have_these_bits(cloud: Machine) -> None:
    x = arguments(500)
    names = sorted(set(OWN) - {"log2"})  # which has no primitive
    found = em.emulate(lambda x: [getattr(lax, name)(x) for name in names], on=cloud)(x)
    for name, got in zip(names, found, strict=True):
        expected = own(name, np.pad(x, 64))[64:-64]
        assert np.array_equal(words(got), words(expected)), name
    narrow = x.astype(BF16)
    got = em.emulate(jnp.tanh, on=cloud)(narrow)
    expected = jnp.asarray(own("tanh", narrow.astype(np.float32))).astype(jnp.bfloat16)
    assert np.array_equal(np.asarray(got).view(np.uint16), np.asarray(expected).view(np.uint16))


def test_the_bits_are_those_where_calls_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where another way keeps functions apart from what is around them."""
    monkeypatch.setattr(vector, "calls_stay", lambda: False)
    x = arguments(100)
    for name in ("exp", "log1p", "erfc"):
        got = jax.jit(lambda x, name=name: vector._alone(OWN[name], [x]))(x)
        assert np.array_equal(words(got), words(own(name, x))), name


def test_derivatives_and_wide_numbers(cloud: Machine) -> None:
    """Derivatives use the functions too; FP64 is XLA's."""
    slope = em.emulate(jax.vmap(jax.grad(jnp.tanh)), on=cloud)(np.linspace(-3, 3, 65, dtype="f4"))
    true = 1 - np.tanh(np.linspace(-3, 3, 65, dtype="f4").astype(float)) ** 2
    assert np.allclose(slope, true, rtol=1e-5)
    with jax.enable_x64(True):
        x = np.linspace(-3, 3, 65)
        assert np.allclose(em.emulate(jnp.exp, on=cloud)(x), np.exp(x), rtol=1e-15)


def test_every_function_has_a_primitive_that_asks_for_it() -> None:
    assert set(OWN) <= vector.TRANSCENDENTAL
