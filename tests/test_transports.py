"""Transports against measured points, their fit, the vendors' choices, the search for the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.collectives import ALGORITHMS, group_of
from emulator.fabric import choose, collective
from emulator.fabric.best import candidates
from emulator.fabric.choose import choose_with_transport
from emulator.machines import cloudmatrix384, gb200_nvl72
from emulator.machines.calibration import rows
from emulator.validate import Calibration, calibrations, refit
from emulator.validate.sets import with_transport

DIES, PACKAGES, RACK = cloudmatrix384("die"), cloudmatrix384(), gb200_nvl72()
MiB = 2**20


# --- measured points ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", rows("one_server_collectives"), ids=lambda r: f"{r['op']}-{r['ranks']}-{r['bench_us']}"
)
def test_one_server_points(row: dict[str, str]) -> None:
    """Within 2 %: three are rounded to 0.1 MiB or 0.1 us of 5, which is as much."""
    ranks, shard = int(row["ranks"]), int(row["shard_bytes"])
    size = shard if row["op"] == "all_reduce" else shard * ranks
    answer = collective(row["op"], size, DIES, range(ranks))
    assert answer.time_s * 1e6 == pytest.approx(float(row["bench_us"]), rel=0.02)
    if row["production_us"]:
        served = collective(row["op"], size, DIES, range(ranks), launch="production")
        assert served.time_s * 1e6 == pytest.approx(float(row["production_us"]), rel=0.05)
        assert served.time_s > answer.time_s and "production" in " ".join(served.assumptions)


def test_production_takes_longer_by_the_mean_of_the_published_ratios() -> None:
    ratios = [
        float(row["production_us"]) / float(row["bench_us"])
        for row in rows("one_server_collectives")
        if row["production_us"] and float(row["bench_us"]) > 100
    ]
    assert len(ratios) == 4
    factor = DIES.fabric.transport("aiv_large").production_factor
    assert factor == pytest.approx(sum(ratios) / 4, abs=5e-4)


@pytest.mark.parametrize("row", rows("nvl72_all_reduce"), ids=lambda r: f"{r['us']}")
def test_nvl72_points(row: dict[str, str]) -> None:
    answer = collective("all_reduce", int(row["bytes"]), RACK, dtype=row["dtype"])
    assert answer.time_s * 1e6 == pytest.approx(float(row["us"]), rel=0.02)
    assert answer.algorithm == "ring" and answer.transport == "nvlink"


def test_the_large_kernel_is_a_chain_of_the_small_one_s_exchanges() -> None:
    """16 dies, 1.3 MiB: 15 exchanges as the small kernel has one of, then 14 shards by UB."""
    small, node = DIES.fabric.transport("aiv_small"), DIES.fabric.tier("node")
    exchange_s = small.step_s + node.read_latency_s
    wire_s = 14 * 1363149 / node.bytes_per_s
    answer = collective("all_gather", 16 * 1363149, DIES, range(16), dtype="int8")
    assert answer.time_s == pytest.approx(15 * exchange_s + node.read_latency_s + wire_s)


def test_offsets_of_production_lie_on_lines_through_the_published_ones() -> None:
    def offset_us(op: str, ranks: int, machine=DIES) -> float:  # noqa: ANN001
        given = {"nbytes": 1024, "on": machine, "devices": range(ranks), "algorithm": "full_mesh"}
        given["transport"] = "aiv_small"
        late = collective(op, **given, launch="production").time_s
        return (late - collective(op, **given).time_s) * 1e6

    for row in rows("production_offsets"):
        assert offset_us(row["op"], int(row["ranks"])) == pytest.approx(float(row["offset_us"]))
    assert offset_us("all_gather", 12) == pytest.approx((1.2 + 14.6) / 2)
    assert offset_us("all_to_all", 8) == pytest.approx((1.2 + 2.0) / 2)
    assert offset_us("all_gather", 1) == 0
    # Eight packages are sixteen of HCCL's ranks.
    assert offset_us("all_gather", 8, PACKAGES) == pytest.approx(14.6)
    with pytest.raises(ValueError, match="launch must be one of benchmark, production; got 'fast'"):
        collective("all_gather", 8, DIES, launch="fast")


def test_reads_and_writes_and_the_other_plane() -> None:
    times = {
        name: collective("permute", 2**26, DIES, (0, 16), pairs=[(0, 16)], transport=name).time_s
        for name in ("sdma", "sdma_write", "roce")
    }
    start_s = DIES.fabric.transport("sdma").startup_s
    assert 2**26 / (times["sdma"] - start_s) == pytest.approx(164e9, rel=0.02)
    assert 2**26 / (times["sdma_write"] - start_s) == pytest.approx(135e9, rel=0.02)
    assert 2**26 / (times["roce"] - start_s) == pytest.approx(24e9, rel=0.02)
    # Pushing and RDMA are used only when asked for.
    assert collective("permute", 1, DIES, (0, 16), pairs=[(0, 16)]).transport == "sdma"


def test_messages_between_nodes_start_one_after_the_other() -> None:
    """A die that reads from 47 others starts 47 messages; with the engine's 3.1 us each."""
    message_s = dict(DIES.fabric.transport("sdma").message_s)["pod"]
    one, all_ = (
        collective("all_gather", 1, DIES, range(0, 16 * n, 16), "full_mesh", dtype="int8").time_s
        for n in (2, 48)
    )
    assert all_ - one == pytest.approx(46 * message_s, rel=0.01)
    # Whoever receives starts a read, whoever sends a write: a scatter's root has 47 to start.
    reads, writes = (
        collective("scatter", 1, DIES, range(0, 768, 16), dtype="int8", transport=name).time_s
        for name in ("sdma", "sdma_write")
    )
    assert writes - reads == pytest.approx(46 * message_s, rel=0.03)


@pytest.mark.parametrize("machine", [DIES, PACKAGES, RACK], ids=lambda m: f"{m.device_kind}")
def test_no_transport_claims_more_than_its_link(machine) -> None:  # noqa: ANN001
    for transport in machine.fabric.transports:
        for tier, rate in transport.rates_bytes_per_s:
            assert rate <= machine.fabric.tier(tier).bytes_per_s
    if machine is not RACK:
        assert dict(machine.fabric.transport("roce").rates_bytes_per_s)["pod"] <= 25e9


# --- the fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", calibrations(), ids=lambda c: c.name)
def test_shipped_numbers_are_the_fit(calibration: Calibration) -> None:
    fit = refit(calibration)
    assert all(fit.agrees), list(zip(calibration.parameters, fit.old, fit.new, strict=True))
    assert calibration.degrees_of_freedom >= 0
    squares = [sum(r * r for r in residuals) for residuals in (fit.old_residuals, fit.residuals)]
    assert squares[1] <= squares[0] * (1 + 1e-6) + 1e-9


def test_another_shipped_number_would_be_found_out() -> None:
    server = calibrations()[0]
    wrong = with_transport(server.machine, "aiv_small", overlap_s=0.60e-6)
    fit = refit(dataclasses.replace(server, machine=wrong))
    assert [p.name for p, same in zip(server.parameters, fit.agrees, strict=True) if not same] == [
        "aiv_small.overlap_s"
    ]


def test_the_validate_command(cm384) -> None:  # noqa: ANN001
    answer = cm384("validate", "--refit")
    assert answer.code == 0, answer.out
    assert "3,080.2 us" in answer.out and "degrees of freedom: 3" in answer.out
    assert "shipped numbers are the fit" in answer.out and "coreweave/nccl-tests" in answer.out
    plain = cm384("validate").out
    assert "found again" not in plain
    # An average core's time beside kernels' times.
    assert "3,559.1 us" in plain and "the kernel took 4,012.4 us" in plain


# --- choice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "nbytes", "devices", "algorithm", "transport"),
    [
        # One server of 8 packages; HCCL's rank is a die, which has half of a package's bytes.
        ("all_reduce", 2 * MiB, range(8), "full_mesh", "aiv_small"),
        ("all_reduce", 2 * MiB + 2, range(7), "full_mesh", "sdma"),
        ("all_reduce", 4 * MiB, range(8), "full_mesh", "aiv_large"),
        ("all_reduce", 4 * MiB, range(2), "full_mesh", "sdma"),
        ("all_reduce", 6 * MiB, range(2), "double_ring", "sdma"),
        ("all_gather", 8 * MiB, range(8), "full_mesh", "aiv_small"),
        ("all_gather", 16 * MiB, range(8), "full_mesh", "sdma"),
        ("all_gather", 2 * 4 * 3 * MiB, range(4), "double_ring", "sdma"),
        ("all_gather", 32 * MiB, range(8), "full_mesh", "aiv_large"),
        ("reduce_scatter", 16 * MiB, range(8), "full_mesh", "aiv_small"),
        ("reduce_scatter", 6 * MiB, range(2), "double_ring", "sdma"),
        ("all_to_all", MiB, range(8), "full_mesh", "aiv_small"),
        ("all_to_all", 3 * MiB, range(8), "full_mesh", "sdma"),
        ("broadcast", MiB, range(4), "full_mesh", "sdma"),
        ("scatter", MiB, range(4), "direct", "sdma"),
        # Several servers.
        ("all_reduce", MiB, range(0, 384, 8), "nhr", "sdma"),
        ("all_gather", 2**30, range(0, 384, 8), "nhr", "sdma"),
        ("all_reduce", 2 * 384 * 256 * 1024, range(384), "nhr", "sdma"),
        ("all_reduce", 2 * 384 * 256 * 1024 + 2, range(384), "double_ring/nhr", "sdma"),
        ("all_gather", MiB, range(384), "double_ring/nhr", "sdma"),
        ("all_gather", MiB, range(17), "nhr", "sdma"),  # servers with unequal numbers of ranks
        ("all_reduce", 2**30, [*range(9), *range(16, 24)], "nhr", "sdma"),
        ("reduce_scatter", 2**30, [*range(4), *range(8, 12)], "double_ring/nhr", "sdma"),
        ("reduce_scatter", MiB, range(16), "double_ring/nhr", "sdma"),
        ("all_to_all", MiB, range(384), "full_mesh", "sdma"),
        ("reduce", MiB, range(384), "nhr", "sdma"),
    ],
)
def test_choice(
    op: str, nbytes: int, devices: Sequence[int], algorithm: str, transport: str
) -> None:
    answer = collective(op, nbytes, PACKAGES, devices)
    assert (answer.algorithm, answer.transport) == (algorithm, transport)
    assert choose(op, nbytes, devices, PACKAGES) == (algorithm, answer.reason)


@pytest.mark.parametrize(
    ("op", "nbytes", "algorithm", "transport"),
    [
        ("all_reduce", MiB, "full_mesh", "nvlink_ll"),
        ("all_reduce", 4 * MiB, "full_mesh", "nvlink"),
        ("all_reduce", 16 * MiB, "double_binary_tree", "nvlink_ll"),
        ("all_reduce", 64 * MiB, "ring", "nvlink_ll"),
        ("all_reduce", 2**30, "ring", "nvlink"),
        ("broadcast", 2**30, "pipeline", "nvlink"),
    ],
)
def test_choice_on_nvl72(op: str, nbytes: int, algorithm: str, transport: str) -> None:
    answer = collective(op, nbytes, RACK)
    assert (answer.algorithm, answer.transport) == (algorithm, transport)


def test_nvl72_between_and_beyond_the_measured_sizes() -> None:
    """The line through both sizes; other counts of ranks have as many steps less."""
    times = {n: collective("all_reduce", n * 2**30, RACK).time_s for n in (1, 2, 4, 16)}
    slope = (20152.5e-6 - 1821.25e-6) / 7.5
    for size, time_s in times.items():
        assert time_s == pytest.approx(1821.25e-6 + (size - 0.5) * slope, rel=0.001)
    few = collective("all_reduce", 2**30, RACK, range(8))
    wire_s = 2 * 7 / 8 * 2**30 / 866.5e9
    assert few.time_s == pytest.approx(6e-6 + 14 * (3.177e-6 + 1e-6) + wire_s, rel=1e-6)


def test_switches_that_add() -> None:
    answer = collective("all_reduce", 2**30, RACK, algorithm="nvls")
    ring = collective("all_reduce", 2**30, RACK, algorithm="ring")
    assert answer.bound_s < answer.time_s < 0.6 * ring.time_s
    assert answer.steps == 2 and dict(answer.link_bytes) == {"node": 73 * 2**30}
    assert collective("all_reduce", 2**30, RACK, range(1), "nvls").time_s == 0
    with pytest.raises(ValueError, match="needs switches that add; those of CloudMatrix 384 do no"):
        collective("all_reduce", 8, PACKAGES, algorithm="nvls")
    with pytest.raises(ValueError, match="unknown algorithm 'nvls' for all_gather"):
        collective("all_gather", 8, RACK, algorithm="nvls")


# --- the best -------------------------------------------------------------------------------------


@given(
    op=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]),
    nbytes=st.integers(1, 2**32),
    devices=st.lists(st.integers(0, 383), min_size=1, max_size=12, unique=True),
)
@settings(max_examples=15)
def test_best_is_no_slower_than_any_other(op: str, nbytes: int, devices: list[int]) -> None:
    best = collective(op, nbytes, PACKAGES, devices, "best")
    for name in ALGORITHMS[op]:
        assert best.time_s <= collective(op, nbytes, PACKAGES, devices, name).time_s
    default, transport, _ = choose_with_transport(op, nbytes, tuple(devices), PACKAGES)
    chosen = collective(op, nbytes, PACKAGES, devices, default, transport=transport)
    assert best.bound_s <= best.time_s <= chosen.time_s
    assert "algorithms tried" in best.reason and best.algorithm in best.reason


def test_best_of_the_whole_pod() -> None:
    names = candidates("all_reduce", group_of(range(384), PACKAGES))
    assert {"ring", "nhr", "rhd", "full_mesh/nhr", "double_ring/nhr"} <= set(names)
    best = collective("all_reduce", 2**26, PACKAGES, algorithm="best")
    for name in names:
        assert best.time_s <= collective("all_reduce", 2**26, PACKAGES, algorithm=name).time_s
    asked = collective("all_reduce", 2**26, PACKAGES, algorithm="best", transport="roce")
    assert asked.transport == "roce" and asked.time_s > best.time_s


def test_a_program_may_ask_for_the_best() -> None:
    """Both readings then take the algorithm that the search finds."""
    mesh = PACKAGES.mesh(x=5)
    total = jax.shard_map(
        lambda v: jax.lax.psum(v, "x"), mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False
    )
    x = jax.random.normal(jax.random.key(0), (5, 999), jnp.bfloat16)
    found = em.run(total, x, on=PACKAGES, algorithms={"all_reduce": "best"})
    (step,) = found.collectives
    best = collective("all_reduce", 2 * 999, PACKAGES, range(5), "best")
    assert step.algorithm == best.algorithm and step.time_s == best.time_s
    pinned = em.run(total, x, on=PACKAGES, algorithms={"all_reduce": best.algorithm})
    bits = [np.asarray(answer.value).view(np.uint16) for answer in (found, pinned)]
    assert np.array_equal(*bits)
    with pytest.raises(ValueError, match="unknown algorithm 'fastest'"):
        em.run(total, x, on=PACKAGES, algorithms={"all_reduce": "fastest"})


def test_production_where_nothing_is_published_is_refused() -> None:
    on = gb200_nvl72()
    with pytest.raises(NotImplementedError, match="nothing is published about GB200 NVL72 there"):
        collective("all_reduce", 2**20, on, launch="production")
    assert "production" not in " ".join(collective("all_reduce", 2**20, on).assumptions)
