"""`em.compare` and `cm384 compare`: side by side, against FP64."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
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
from emulator.program.emulate import trace_once
from emulator.program.wide import in_fp64
from emulator.report.errors import QUANTILES, ULP_EDGES, differing, errors
from tests.conftest import Answer

DP, TP = 3, 2


def mesh_of(machine: Machine) -> Any:
    return machine.mesh(dp=DP, tp=TP)


def layer(x: jax.Array, w: jax.Array, mesh: Any) -> tuple[jax.Array, jax.Array]:
    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum(jnp.dot(x, w, preferred_element_type=jnp.float32), "tp")

    specs = (P("dp", "tp"), P("tp"))
    y = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("dp"))(x, w)
    return y, jnp.argmax(y, axis=1)


def operands(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x, w = random.standard_normal((DP, 128)), random.standard_normal((128, 5))
    return x.astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def found(cloud: Machine, rack: Machine) -> em.Comparison:
    asked = ["own", kernels.ASCEND_910C_CANDIDATES["toward_zero"]]
    return em.compare(layer, *operands(), on=[cloud, rack], mesh=mesh_of, arithmetics=asked)


# What everything is measured against.


def test_errors_are_those_of_the_exact_product(found: em.Comparison) -> None:
    x, w = (a.astype(np.float64) for a in operands())
    exact = x @ w
    for column in found.columns:
        got = np.asarray(column.answer.value[0], np.float64)
        error = np.abs(got - exact)
        e = column.errors[0]
        # FP64 sums of 128 products in another order differ by their own roundings.
        assert e.max_abs == pytest.approx(error.max(), abs=1e-12)
        assert e.rms == pytest.approx(np.sqrt(np.mean(error**2)), abs=1e-12)
        assert e.rel_rms == column.rel_rms < 1e-5
        assert 0 < e.ulp_quantiles[0] <= e.ulp_quantiles[-1]
        assert e.nonfinite == 0 and e.count == exact.size == sum(e.ulp_histogram)
        assert column.errors[1].max_abs == 0 and column.errors[1].dtype == "int32"


def everything(x: Any, key: Any, mesh: Any) -> Any:
    """Most kinds of equations; with exact FP64 counterparts in `by_hand`."""

    def local(x: Any) -> Any:
        total = lax.psum(x, ("dp", "tp"))
        part = lax.psum_scatter(jnp.tile(total, 2), "tp", tiled=True)
        return total, lax.all_gather(part, "tp", tiled=True), lax.pmax(x, "dp")

    specs = {"in_specs": P(("dp", "tp")), "out_specs": (P(), P(), P("tp")), "check_vma": False}
    total, gathered, most = jax.shard_map(local, mesh=mesh, **specs)(x)
    carried, rows = lax.scan(lambda c, v: (c * v + 1, c), jnp.ones((), x.dtype), total)
    doubled = lax.while_loop(lambda c: c < 100, lambda c: c * 1.5, jnp.abs(total[0]) + 1)
    chosen = lax.cond(total[0] > 0, lambda t: t / 3, lambda t: t / 7, total)
    slope = jax.grad(lambda t: (jnp.sin(t) ** 2).sum())(total)
    normal = jax.random.normal(key, (4,))
    counted = jnp.zeros(3, x.dtype).at[jnp.array([0, 1, 1, 2])].add(total)
    bits = lax.bitcast_convert_type(total, jnp.uint16)
    cast = (total.astype(jnp.float32) / 3).astype(x.dtype)
    return {
        "cast": cast,
        "total": total, "gathered": gathered, "most": most, "carried": carried, "rows": rows,
        "doubled": doubled, "chosen": chosen, "slope": slope, "normal": normal,
        "counted": counted, "bits": bits, "order": jnp.argsort(total),
    }  # fmt: skip


def test_fp64_means_every_equation(cloud: Machine) -> None:
    """Against NumPy in FP64; each line would be 2**-9 off if anything of it stayed in BF16."""
    raw = np.random.default_rng(1).standard_normal((DP * TP * 4,)).astype(ml_dtypes.bfloat16)
    key = jax.random.key(5)
    program = trace_once(everything, (raw, key, mesh_of(cloud)))
    wide = in_fp64(program, (raw, key, mesh_of(cloud)), cloud)
    got = jax.tree.unflatten(program.out_tree, wide.leaves)
    x = raw.astype(np.float64).reshape(DP, TP, 4)
    total = x.sum((0, 1))
    expected: dict[str, Any] = {"cast": total / 3, "total": total, "gathered": np.tile(total, 2)}
    expected["gathered"] = 2 * expected["gathered"]  # two ranks scatter the same sum
    expected["most"] = x.max(0).reshape(-1)
    rows = [1.0]
    for v in total:
        rows.append(rows[-1] * v + 1)
    expected |= {"carried": rows[-1], "rows": rows[:-1], "order": np.argsort(total)}
    doubled = abs(total[0]) + 1
    while doubled < 100:
        doubled *= 1.5
    expected |= {"doubled": doubled, "chosen": total / (3 if total[0] > 0 else 7)}
    expected |= {"slope": np.sin(2 * total), "counted": [total[0], total[1] + total[2], total[3]]}
    expected["bits"] = total.astype(ml_dtypes.bfloat16).view(np.uint16)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-13, err_msg=name)
    assert all(leaf.dtype in (np.float64, np.int32, np.uint16) for leaf in wide.leaves)
    # Drawn from the same bits; erf_inv of FP32 arguments.
    np.testing.assert_allclose(got["normal"], jax.random.normal(key, (4,)), rtol=1e-5)


def test_a_function_at_indices_is_computed_in_its_own_type(cloud: Machine) -> None:
    def f(x: Any) -> Any:
        return x.at[np.array([1, 3])].apply(lambda v: v * 3 + 1).at[0].set(7)

    x = np.arange(5, dtype=np.float32)
    wide = in_fp64(trace_once(f, (x,)), (x,), cloud)
    assert np.array_equal(wide.leaves[0], [7, 4, 2, 10, 4])
    assert wide.leaves[0].dtype == np.float64 and wide.narrow == ("scatter",)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_ulp_is_the_spacing_of_the_type(dtype: Any) -> None:
    exact = np.array([1.0, 1.75, -2.0, 1000.0, float(ml_dtypes.finfo(dtype).smallest_normal) / 2])
    got = exact.astype(dtype)
    assert errors("x", got, exact).ulp_quantiles == (0.0,) * len(QUANTILES)
    up = (got.view(f"u{got.itemsize}") + 1).view(dtype)
    found = errors("x", up, exact)
    assert found.ulp_quantiles == (1.0,) * len(QUANTILES)
    assert found.ulp_histogram[ULP_EDGES.index(1.0)] == 5
    assert differing(got, up) == 5 and differing(got, got) == 0
    assert differing(got, up[:2]) is None


def test_what_is_not_finite_is_counted_apart() -> None:
    exact = np.array([np.inf, np.nan, 1.0, np.nan, 0.0])
    got = np.array([np.inf, np.nan, np.inf, 2.0, 0.0], np.float32)
    found = errors("x", got, exact)
    assert (found.nonfinite, found.count, found.max_abs, found.rel_rms) == (2, 1, 0.0, 0.0)


# Side by side.


def test_columns_hold_what_run_says(found: em.Comparison, cloud: Machine, rack: Machine) -> None:
    names = [(c.machine, c.arithmetic) for c in found.columns]
    other = kernels.ASCEND_910C_CANDIDATES["toward_zero"].name
    expected = [(m, a) for m in (cloud, rack) for a in (m.arithmetic, other)]
    assert names == expected and [c.machine for c in found.machines] == [cloud, rack]
    for column in found.machines:
        ran = em.run(
            lambda *args: layer(*args, mesh=mesh_of(column.machine)),  # noqa: B023
            *operands(),
            on=column.machine,
        )
        assert ran.time_s == column.answer.time_s
        bits = [np.asarray(r.value[0]).view(np.uint32) for r in (ran, column.answer)]
        np.testing.assert_array_equal(*bits)
    first = np.asarray(found.columns[0].answer.value[0]).view(np.uint32)
    for column in found.columns:
        bits = np.asarray(column.answer.value[0]).view(np.uint32)
        assert column.differing == (int((bits != first).sum()), 0)
    assert found.columns[0].differing == (0, 0) != found.columns[1].differing


def test_conclusions_say_on_what_they_depend(found: em.Comparison) -> None:
    said = "\n".join(found.conclusions())
    one, two = found.machines
    fast, slow = sorted((one, two), key=lambda c: c.answer.time_s)
    assert f"{fast.machine.name} is done" in said and f"sooner than {slow.machine.name}" in said
    assert "Performance per watt" in said and "1 of 1 other arithmetics change bits" in said
    a, b = (found.of(c.machine) for c in (one, two))
    nearer, farther = (any(f(x.rel_rms - y.rel_rms) for x in a for y in b) for f in (_less, _more))
    assert ("depends on the arithmetic" in said) == (nearer and farther)
    worse = dataclasses.replace(b[0].errors[0], rel_rms=1.0)
    columns = (*a, *(dataclasses.replace(c, errors=(worse,)) for c in b))
    changed = dataclasses.replace(found, columns=columns)
    assert "CloudMatrix 384 is nearer to FP64, in all 4 pairs" in "\n".join(changed.conclusions())


def _less(x: float) -> bool:
    return x < 0


def _more(x: float) -> bool:
    return x > 0


def test_table_json_and_csv(found: em.Comparison) -> None:
    text = str(found.table())
    for words in ("GB200 NVL72", "matmul per watt", "FP64", "[0]", "What follows", "dp=3 x tp=2"):
        assert words in text
    whole = json.loads(found.to_json())
    assert [c["time_s"] for c in whole["columns"]] == [c.answer.time_s for c in found.columns]
    assert whole["columns"][1]["outputs"][0]["differing"] == found.columns[1].differing[0]
    lines = list(csv.DictReader(found.to_csv().splitlines()))
    assert len(lines) == 2 * len(found.columns)
    assert float(lines[0]["rms"]) == found.columns[0].errors[0].rms


def test_shapes_are_enough_without_values(cloud: Machine, rack: Machine) -> None:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands()]
    found = em.compare(layer, *shapes, mesh=mesh_of, values=False)
    assert [c.machine for c in found.columns] == [cloud, rack]
    for column in found.columns:
        fixed = lambda *args, on=column.machine: layer(*args, mesh=mesh_of(on))  # noqa: E731
        assert em.estimate(fixed, *shapes, on=column.machine).time_s == column.answer.time_s
    assert "FP64" not in str(found)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"on": []}, TypeError, "expected a list of machines"),
        ({"on": ["gb200_nvl72"]}, TypeError, "expected a list of machines"),
        ({"on": [em.gb200_nvl72()] * 2}, ValueError, "GB200 NVL72 is listed more than once"),
        ({}, ValueError, "mesh=lambda machine"),
        ({"mesh": "dp"}, TypeError, "must be a function of the machine"),
        ({"mesh": mesh_of, "arithmetics": "native"}, TypeError, "a list of names"),
        ({"mesh": mesh_of, "arithmetics": ["A100"]}, ValueError, "unknown arithmetic 'A100'"),
        ({"mesh": mesh_of, "arithmetics": ["own", 3]}, TypeError, "3.*expected a name, a file"),
        ({"mesh": mesh_of, "counts": {"while_0": 1}}, ValueError, "leave it out"),
        ({"mesh": mesh_of, "values": False, "arithmetics": ["own"]}, ValueError, "do not depend"),
        ({"mesh": lambda on: em.cloudmatrix384().mesh(dp=48, tp=8)}, ValueError, "72"),
    ],
)
def test_refusals(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    args = np.ones((48, 128), ml_dtypes.bfloat16), np.ones((128, 5), ml_dtypes.bfloat16)
    with pytest.raises(kind, match=message):
        em.compare(layer, *args, **{"on": [em.gb200_nvl72()], **options})


def test_machines_of_one_name_are_told_apart(cloud: Machine) -> None:
    """A pod whole, with a fault, and of dies; and two fabrics whose names say nothing of rates."""
    slow, fast = (em.custom_machine(f"ring(4, {rate}GB/s)") for rate in (50, 100))
    on = [cloud, cloud.degrade(devices={0: 0.5}), em.cloudmatrix384(device="die"), slow, fast]
    x = jax.ShapeDtypeStruct((2**24,), jnp.float32)
    found = em.compare(lambda x: x + 1, x, on=on, values=False)
    titles = [
        "CloudMatrix 384 (packages)",
        "CloudMatrix 384 (packages with faults)",
        "CloudMatrix 384 (dies)",
        "ring(4) (devices)",
        "ring(4) (devices) #2",
    ]
    assert [column.title for column in found.machines] == titles
    assert [entry["machine"] for entry in json.loads(found.to_json())["columns"]] == titles
    assert all(title in " ".join(found.conclusions()) for title in titles)
    assert [found.of(machine) for machine in on] == [(column,) for column in found.columns]


def test_json_has_no_infinities() -> None:
    """In FP64 the result is 0, so an error has no share of it."""
    x = jnp.asarray(np.linspace(1, 2, 16), jnp.bfloat16)
    found = em.compare(lambda x: x * 3 - x - x - x, x, on=[em.gb200_nvl72()])
    assert found.columns[0].errors[0].rel_rms == math.inf
    text = found.to_json()
    (output,) = json.loads(text, parse_constant=lambda name: 1 / 0)["columns"][0]["outputs"]
    assert output["rel_rms"] is None and output["rms"] > 0


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
def total(x, mesh):
    specs = {"in_specs": P("d"), "out_specs": P()}
    return jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, **specs)(x)
def total_mesh(machine): return machine.mesh(d=machine.num_devices)
def total_args(machine): return (np.arange(machine.num_devices, dtype=np.float32) / 3,)
"""


def test_the_command(cm384: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(PROGRAM)
    line = f"compare {tmp_path}/p.py:total --json {tmp_path}/c.json --csv {tmp_path}/c.csv"
    answer = cm384(*line.split())
    assert answer.code == 0, answer.err
    whole = json.loads((tmp_path / "c.json").read_text())
    assert [c["devices"] for c in whole["columns"]] == [384, 72]
    assert whole["columns"][1]["outputs"][0]["differing"] == 1  # other sizes, other sums
    assert "CloudMatrix 384" in answer.out and (tmp_path / "c.csv").read_text()
    answer = cm384(
        "compare", "transformer", "--estimate", "--machine", "ring(8, 9GB/s, 1us),gb200_nvl72"
    )
    assert answer.code == 0 and "GB200 NVL72" in answer.out and "dp=9 x tp=8" in answer.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama"], "unknown program 'llama'"),
        (["matmul", "--machine", "gb200_nvl72,"], "write different machines"),
        (["matmul", "--machine", "tpu"], "unknown machine 'tpu'"),
        (["transformer", "--size", "70b"], "add --estimate"),
        (["matmul", "--json", "no/such/c.json"], "no folder"),
        (["matmul", "--estimate", "--arithmetic", "own"], "do not depend"),
    ],
)
def test_the_command_refuses(words: list[str], message: str, cm384: Callable[..., Answer]) -> None:
    answer = cm384("compare", *words)
    assert answer.code == 2 and message in answer.err and answer.err.startswith("cm384:")
