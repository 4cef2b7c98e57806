"""The programs that come with the emulator: right as JAX programs, and right when emulated."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import emulator as em
import kernels
from emulator.machines import Machine
from emulator.workloads import matmul, transformer
from emulator.workloads.load import load

SMALL = dataclasses.replace(
    transformer.SIZES["tiny"],
    d_model=32, heads=4, kv_heads=2, d_ff=64, sequence=16, learning_rate=2e-2,
)  # fmt: skip
DP, TP, STEPS = 4, 2, 4


def losses(config: transformer.Config, step: Any, dp: int = DP, tp: int = TP) -> list[float]:
    params, state = transformer.initial(config, dp, tp)
    found = []
    for _, tokens in zip(range(STEPS), transformer.batches(config, dp), strict=False):
        params, state, loss = step(params, state, tokens)
        found.append(float(loss))
    return found


def emulated(config: transformer.Config, on: Machine, **options: Any) -> list[float]:
    step = transformer.train_step(config, on.mesh(dp=DP, tp=TP))
    return losses(config, jax.jit(em.emulate(step, on=on, **options)))


@pytest.fixture(scope="module")
def native(cloud: Machine) -> list[float]:
    """Losses of the emulated training run with XLA's matmuls."""
    return emulated(SMALL, cloud, arithmetic="native")


ON_REAL_DEVICES = """
import jax
from test_workloads import DP, SMALL, TP, losses
from emulator.workloads import transformer
mesh = jax.make_mesh((DP, TP), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
print(*losses(SMALL, jax.jit(transformer.train_step(SMALL, mesh))))
"""


def test_transformer_equals_real_devices(native: list[float]) -> None:
    """XLA's own BF16 sums round differently; 2**-8 is one BF16 rounding of a loss near 4."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DP * TP}"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    real = subprocess.run(
        [sys.executable, "-c", ON_REAL_DEVICES],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    expected = [float(word) for word in real.stdout.split()]
    assert expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(native, expected, rtol=2**-8)


def test_slicing_the_optimizer_changes_only_the_order_of_additions(
    cloud: Machine, native: list[float]
) -> None:
    sliced = dataclasses.replace(SMALL, zero=True, remat=True)
    found = emulated(sliced, cloud, arithmetic="native")
    assert found[0] == native[0]
    np.testing.assert_allclose(found, native, rtol=2**-8)


@pytest.mark.parametrize("size", transformer.SIZES)
def test_transformer_sizes(size: str, cloud: Machine) -> None:
    config = transformer.SIZES[size]
    params, state, tokens = transformer.shapes(config, 48, 8)
    out = jax.eval_shape(
        transformer.train_step(config, cloud.mesh(dp=48, tp=8)), params, state, tokens
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out[:2]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (params, state)
    )
    if not config.zero:
        assert sum(x.size for x in jax.tree.leaves(params)) == config.parameters


def test_the_70b_configuration_has_70_billion_parameters() -> None:
    assert transformer.SIZES["70b"].parameters == pytest.approx(70.6e9, rel=0.01)


def test_text_is_real_text() -> None:
    text = transformer.text()
    assert len(text) > 100_000 and text.max() < 128
    assert b"statement" in text.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [({}, 3, "tp=3 does not divide heads=4"), ({"kv_heads": 1}, 2, "kv_heads=1")],
)
def test_indivisible_transformer(
    change: dict[str, int], tp: int, message: str, cloud: Machine
) -> None:
    with pytest.raises(ValueError, match=message):
        transformer.train_step(dataclasses.replace(SMALL, **change), cloud.mesh(dp=2, tp=tp))


def test_bad_configuration() -> None:
    with pytest.raises(ValueError, match="d_model=33"):
        dataclasses.replace(SMALL, d_model=33)


def test_divided_matmuls_have_the_bits_of_the_undivided(cloud: Machine) -> None:
    x, y = 2, 3
    a, b = matmul.operands(48)
    expected = np.asarray(kernels.matmul(a, b)).view(np.uint32)
    sharded = em.emulate(matmul.blocks(cloud.mesh(x=x, y=y)), on=cloud)(a, b)
    tiles = em.pmap(
        lambda a, b: matmul.tile(a, b, x, y),
        axis_name="device",
        on=cloud,
        in_axes=(None, None),
        axis_size=x * y,
    )(a, b)
    np.testing.assert_array_equal(np.asarray(sharded).view(np.uint32), expected)
    assembled = np.asarray(matmul.assemble(tiles, x, y)).view(np.uint32)
    np.testing.assert_array_equal(assembled, expected)
    native = np.asarray(jnp.dot(a, b, preferred_element_type=jnp.float32)).view(np.uint32)
    assert (native != expected).any()


def test_matmul_grid_and_sizes() -> None:
    assert matmul.grid(384) == (16, 24)
    assert matmul.grid(72) == (8, 9)
    assert matmul.grid(7) == (1, 7)
    with pytest.raises(ValueError, match="multiple of 48, such as 96"):
        matmul.check(100, 16, 24)


PROGRAM = """
import jax.numpy as jnp
def double(x): return 2 * x
def double_args(machine): return (jnp.arange(3.0),)
def size(mesh): return jnp.float32(mesh.size)
def size_mesh(machine): return machine.mesh(a=machine.num_devices)
def lost(mesh): return mesh
def one(): return jnp.float32(1)
def listed(x): return x
def listed_args(machine): return [1]
"""


def test_a_program_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: Machine
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "p.py").write_text(PROGRAM)
    function, args = load(f"{tmp_path}/p.py:double", cloud)
    np.testing.assert_array_equal(function(*args), [0, 2, 4])
    function, args = load(f"{tmp_path}/p.py:size", cloud)
    assert args == () and function() == cloud.num_devices
    function, args = load(f"{tmp_path}/p.py:one", cloud)
    assert args == () and function() == 1


MODULE = """
from __future__ import annotations
import dataclasses, pickle

@dataclasses.dataclass
class Config:
    width: int = 8

def later():
    import beside
    return beside.twice(pickle.loads(pickle.dumps(Config())).width)
"""


@pytest.mark.parametrize("name", ["own_program.py", "json.py"])
def test_a_file_is_a_module_as_if_it_were_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: Machine
) -> None:
    """Also one that is called like a module which is there already, and a second time."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    json = sys.modules["json"]
    (tmp_path / name).write_text(MODULE)
    (tmp_path / "beside.py").write_text("def twice(x): return 2 * x")
    for _ in range(2):
        function, _ = load(f"{tmp_path}/{name}:later", cloud)
        assert function() == 16
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("p.py", "expected path/to/file.py:function"),
        ("missing.py:f", "no such file"),
        ("p.py:nothing", "has no function 'nothing'; it has double"),
        ("p.py:lost", r"must define lost_mesh\(machine\)"),
        ("p.py:listed", "listed_args must return a tuple, got list"),
        ("p.txt:f", "must end in .py"),
    ],
)
def test_a_wrong_program(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: Machine
) -> None:
    (tmp_path / "p.py").write_text(PROGRAM)
    (tmp_path / "p.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=message):
        load(target, cloud)
