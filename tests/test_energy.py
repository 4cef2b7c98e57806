"""Energy as an interval: its parts by hand, its laws, and what stands beside it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.energy import Energy, energy, nominal
from emulator.machines import Machine, cloudmatrix384, gb200_nvl72
from emulator.timeline import CollectiveOp, Loop, Op, Step

POD = cloudmatrix384()
NVL = gb200_nvl72()
S = jax.ShapeDtypeStruct


def part(e: Energy, name: str) -> tuple[float, float]:
    (found,) = (p for p in e.parts if p.name == name)
    return found.low_j, found.high_j


def product(seconds: float, **work: Any) -> Op:
    return Op(
        name="k",
        kind="matmul",
        time_s=seconds,
        bound_s=0.0,
        limited_by="",
        flops=work.pop("flops", 0),
        bytes=work.pop("bytes", 0),
        **work,
    )


def wire(**crossed: int) -> CollectiveOp:
    return CollectiveOp(
        name="c",
        op="permute",
        algorithm="",
        reason="",
        nbytes=1,
        dtype="float32",
        groups=(),
        bounds_s=(),
        link_bytes=tuple(crossed.items()),
    )


def test_parts_by_hand() -> None:
    """A second of one matmul at half rate on 48 packages, and a gigabyte over each tier."""
    peak = 2 * POD.chip.matmul_flops_per_s("bfloat16")
    op = product(
        1.0, flops=int(peak / 2), bytes=10**11, matmul_s=0.5, vector_s=0.25, l2_bytes=4 * 10**11
    )
    steps: list[Step] = [op, wire(package=10**9, node=10**9, pod=10**9)]
    e, power, vector = energy(steps, 1.0, 48, POD), POD.power, 2 * POD.chip.vector_flops_per_s()
    for end in (0, 1):
        expected = {
            "idle devices": 48 * power.idle_device_w[end],
            "matrix units": 48 * 0.5 * peak * power.matmul_j_per_flop[end],
            "vector units": 48 * 0.25 * vector * power.vector_j_per_flop[end],
            "memory": 48 * 1e11 * power.memory_j_per_byte[end],
            "L2 cache": 48 * 4e11 * power.l2_j_per_byte[end],
            "clocks and control": 48 * power.active_device_w[end],
            "links": 1e9 * sum(interval[end] for _, interval in power.link_j_per_byte),
            "optics": power.optics_w[end] / 8,
            "CPUs": power.cpu_w[end] / 8,
            "switches and cards": power.switch_w[end] / 8,
        }
        for name, joules in expected.items():
            assert part(e, name)[end] == pytest.approx(joules), name
        total = sum(expected.values()) * (1 + power.cooling_share[end])
        assert (e.low_j, e.high_j)[end] == pytest.approx(total)
    own = [p for p in e.parts if p.per_device]
    assert e.device_w == pytest.approx(
        (sum(p.low_j for p in own) / 48, sum(p.high_j for p in own) / 48)
    )
    assert e.flops_per_j == pytest.approx((48 * peak / 2 / e.high_j, 48 * peak / 2 / e.low_j))


def parts_of(e: Energy) -> dict[str, tuple[float, float]]:
    return {p.name: (p.low_j, p.high_j) for p in e.parts}


def test_every_trip_of_a_loop_counts() -> None:
    op = product(0.01, flops=10**12, bytes=10**9, matmul_s=1e-3, vector_s=2e-3, l2_bytes=10**10)
    steps: list[Step] = [op, wire(node=10**8)]
    loop = Loop(name="scan", trips=7, body=tuple(steps))
    looped, listed = energy([loop], 1.0, 4, POD), energy(steps * 7, 1.0, 4, POD)
    assert looped.flops == listed.flops == 4 * 7 * 10**12
    for name, joules in parts_of(listed).items():
        assert parts_of(looped)[name] == pytest.approx(joules), name
        once = parts_of(energy(steps, 1.0, 4, POD))[name]
        if name in ("matrix units", "vector units", "memory", "L2 cache", "links"):
            assert joules == pytest.approx((7 * once[0], 7 * once[1])), name


def test_kernels_draw_while_they_run_however_long_that_is() -> None:
    """Devices of which one runs a kernel longer, slower devices, and never more than all along."""

    def running(step: Op, time_s: float, **more: float) -> float:
        return part(energy([step], time_s, 2, POD, **more), "clocks and control")[1] / 2

    each = (product(1.0, matmul_s=1e-6), product(3.0, matmul_s=1e-6))
    active_w = POD.power.active_device_w[1]
    assert running(dataclasses.replace(each[1], each=each), 3.0) == pytest.approx(2.0 * active_w)
    assert running(each[0], 2.0, slowness=1.5) == pytest.approx(1.5 * active_w)
    assert running(each[0], 1.2, slowness=1.5) == pytest.approx(1.2 * active_w)


def test_what_comes_from_memory_passes_the_cache() -> None:
    e = energy([product(1.0, bytes=10**9)], 1.0, 1, POD)
    assert part(e, "L2 cache") == pytest.approx(tuple(1e9 * j for j in POD.power.l2_j_per_byte))


def test_only_products_count_as_operations() -> None:
    vector = dataclasses.replace(product(1.0, flops=10**12), kind="vector")
    assert energy([vector], 1.0, 4, POD).flops == 0
    attention = dataclasses.replace(vector, kind="attention")
    assert energy([attention], 1.0, 4, POD).flops == 4 * 10**12


def test_the_high_end_is_never_cut_below_the_low_one() -> None:
    """Of a machine that draws more than it is said to by all its parts."""
    power = dataclasses.replace(POD.power, system_w=(1.0, 2.0))
    e = energy([], 1.0, 384, dataclasses.replace(POD, power=power))
    assert 0 < e.low_j <= e.high_j and "less" not in parts_of(e)


def test_device_never_exceeds_its_peak() -> None:
    op = product(1.0, matmul_s=1.0, vector_s=1.0, bytes=10**14)
    for on in (POD, NVL):
        e = energy([op], 1.0, on.num_devices, on)
        assert e.device_w == pytest.approx(on.power.peak_device_w)
        assert "no more than" in next(p.why for p in e.parts if p.name == "matrix units")


def test_machine_never_exceeds_what_is_published() -> None:
    e = energy([product(1.0, matmul_s=1.0, bytes=10**14)], 1.0, 384, POD)
    assert e.high_j == pytest.approx(POD.power.system_w[1])
    assert part(e, "less")[1] < 0
    # The published figure lies in the interval of a machine that computes all the time.
    e = energy([product(1.0, matmul_s=0.8, bytes=10**12)], 1.0, 384, POD)
    assert e.low_j < 559e3 <= e.high_j


def test_a_die_is_half_a_package() -> None:
    """The same work on both dies of a package, or on a device of two."""
    dies = cloudmatrix384("die")
    op = product(1.0, matmul_s=0.5, bytes=10**11)
    half = dataclasses.replace(op, bytes=op.bytes // 2)
    whole, parts = energy([op], 1.0, 384, POD), energy([half], 1.0, 768, dies)
    assert parts.low_j == pytest.approx(whole.low_j)
    assert parts.high_j == pytest.approx(whole.high_j)
    assert parts.device_w == pytest.approx(tuple(w / 2 for w in whole.device_w))


@pytest.mark.parametrize("on", [POD, NVL, em.custom_machine("torus(4, 4, 50GB/s, 1us)")])
def test_laws(on: Machine) -> None:
    """More of anything never costs less; idle is the least; low is never above high."""
    base = product(1e-3, matmul_s=1e-4, vector_s=1e-4, bytes=10**8, l2_bytes=10**9)
    least = energy([], 1e-3, 4, on)
    e = energy([base], 1e-3, 4, on)
    assert all(p.low_j <= p.high_j or p.name == "less" for p in e.parts)
    assert 0 < least.low_j <= e.low_j < e.high_j and least.high_j <= e.high_j
    more = [
        dataclasses.replace(base, matmul_s=2e-4),
        dataclasses.replace(base, vector_s=2e-4),
        dataclasses.replace(base, bytes=2 * 10**8),
        dataclasses.replace(base, l2_bytes=2 * 10**9),
    ]
    for step in more:
        other = energy([step], 1e-3, 4, on)
        assert other.low_j > e.low_j and other.high_j > e.high_j
    for devices, seconds in ((8, 1e-3), (4, 2e-3)):
        other = energy([base], seconds, devices, on)
        assert other.low_j > e.low_j and other.high_j > e.high_j
    tier = on.power.link_j_per_byte[-1][0]
    assert energy([base, wire(**{tier: 10**6})], 1e-3, 4, on).low_j > e.low_j


def test_machines_at_their_quoted_peak() -> None:
    ascend, nvidia = nominal(POD).flops_per_j, nominal(NVL).flops_per_j
    assert ascend[0] <= 0.537e12 <= ascend[1]
    assert nvidia[0] == pytest.approx(1.24e12, rel=2e-3)
    assert 2 < nvidia[0] / ascend[1] and nvidia[1] / ascend[0] < 3.1  # the press says 2.3 to 2.6


def test_report_sets_it_beside_the_other_machine() -> None:
    f = jax.shard_map(
        lambda x: lax.psum(x @ x.T, "a"), mesh=POD.mesh(a=8), in_specs=P("a"), out_specs=P()
    )
    e = em.estimate(f, S((8 * 512, 512), jnp.bfloat16), on=POD)
    assert [m.name for m in e.energy.nominal] == ["CloudMatrix 384", "GB200 NVL72"]
    text = str(e)
    for words in ("Performance per watt", "GB200 NVL72", "cooling", "optics", "package by itself"):
        assert words in text, words


def test_nothing_costs_nothing() -> None:
    e = energy([], 0.0, 384, POD)
    assert (e.low_j, e.high_j, e.power_w, e.device_w) == (0, 0, (0, 0), (0, 0))
    assert e.flops_per_j == (0, 0)


def test_every_number_has_a_source() -> None:
    for machine in (POD, NVL, cloudmatrix384(pods=2)):
        facts = [f for f in machine.facts() if f.name.startswith("power.")]
        assert len(facts) == 13
        assert all(f.source and f.source != "no source given" for f in facts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"idle_device_w": (187.0, 156.0)}, "idle_device_w must be a pair"),
        ({"cooling_share": (-0.1, 0.1)}, "cooling_share must be a pair"),
        ({"matmul_j_per_flop": 1e-12}, "matmul_j_per_flop must be a pair"),
        ({"link_j_per_byte": (("node", (2.0, 1.0)),)}, "link_j_per_byte\\['node'\\]"),
        ({"idle_device_w": (900.0, 900.0)}, "exceeds peak_device_w"),
        ({"system_w": (math.nan, 1.0)}, "system_w must be a pair"),
    ],
)
def test_power_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(POD.power, **change)
