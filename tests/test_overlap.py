"""Collectives beside kernels: what may overlap does, what waits for it does not, and laws."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator import overlap, timeline
from emulator.timeline import CollectiveOp, Loop, Needs, Op, Step

POD = em.cloudmatrix384()
MESH = POD.mesh(dp=48, tp=8)
X = jax.ShapeDtypeStruct((48 * 1024, 8 * 1024), jnp.bfloat16)
SPEC = P("dp", "tp")


def times(fun: Any, *args: Any) -> tuple[em.Estimate, em.Estimate]:
    specs = tuple(SPEC for _ in args)
    f = jax.shard_map(fun, mesh=MESH, in_specs=specs, out_specs=SPEC, check_vma=False)
    return em.estimate(f, *args, on=POD), em.estimate(f, *args, on=POD, overlap=True)


def by_kind(answer: em.Estimate) -> tuple[float, float]:
    kinds = answer.by_kind()
    links = kinds.pop("collective")
    return sum(kinds.values()), links


def deep(x: Any) -> Any:
    for _ in range(6):
        x = x @ x
    return x


def test_independent_work_hides_a_collective() -> None:
    off, on = times(lambda x, y: deep(x) + lax.psum(y, "tp"), X, X)
    kernels, links = by_kind(off)
    assert kernels > links
    assert off.time_s == pytest.approx(kernels + links, rel=1e-6)
    assert on.time_s == pytest.approx(kernels, rel=1e-6)


def test_what_waits_for_a_collective_does_not_overlap() -> None:
    off, on = times(lambda x: deep(lax.psum(deep(x), "tp")), X)
    assert on.time_s == off.time_s


def test_collectives_start_in_the_programs_order() -> None:
    """One that waits for nothing, but stands behind one that waits, is not started first; the
    answer says so.
    """

    def late(x: Any, y: Any) -> Any:
        total = lax.psum(deep(x), "tp")
        return total @ lax.pmax(y, "tp")

    def early(x: Any, y: Any) -> Any:
        largest = lax.pmax(y, "tp")
        return lax.psum(deep(x), "tp") @ largest

    off, on = times(late, X, X)
    assert on.time_s == off.time_s
    assert any("the most that overlap can give in the program's order" in a for a in on.assumptions)
    off, on = times(early, X, X)
    assert on.time_s < off.time_s


def test_waiting_goes_through_numbers_and_layouts() -> None:
    """A maximum over devices becomes a factor: scalar work that is no kernel of its own."""

    def f(x: Any, y: Any) -> Any:
        scale = 1 / (1 + lax.pmax(jnp.abs(x).max(), ("dp", "tp")))
        return deep(y * scale.astype(y.dtype))

    off, on = times(f, X, X)
    assert on.time_s == off.time_s


def test_waiting_goes_through_what_is_no_step() -> None:
    """A sum over an axis of one device makes a new value and takes no time."""
    mesh = POD.mesh(tp=8, one=1)
    f = jax.shard_map(
        lambda x: deep(lax.psum(lax.psum(x, "tp"), "one")),
        mesh=mesh,
        in_specs=P(None, "tp"),
        out_specs=P(),
    )
    x = jax.ShapeDtypeStruct((1024, 8 * 1024), jnp.bfloat16)
    off, on = em.estimate(f, x, on=POD), em.estimate(f, x, on=POD, overlap=True)
    assert len(off.collectives) == 1 and on.time_s == off.time_s


def test_a_kernel_waits_for_operands_that_move() -> None:
    """What a shard_map left divided is gathered to be sorted."""

    def f(x: Any) -> Any:
        double = jax.shard_map(lambda x: x * 2, mesh=MESH, in_specs=SPEC, out_specs=SPEC)
        return jnp.sort(double(x), axis=0)

    off, on = em.estimate(f, X, on=POD), em.estimate(f, X, on=POD, overlap=True)
    assert len(off.collectives) == 1 and on.time_s == off.time_s


def test_steps_of_one_operation_take_turns() -> None:
    """A sum over a vmap's axis and devices: each device adds up its own part first."""

    def f(x: Any) -> Any:
        rows = x.reshape(8, -1, x.shape[1])
        return jax.vmap(lambda r: lax.psum(r, ("i", "tp")), axis_name="i")(rows).reshape(x.shape)

    off, on = times(f, X)
    assert sorted(off.by_kind()) == ["collective", "vector"] and on.time_s == off.time_s


def test_loops_overlap_inside_a_trip_only() -> None:
    def f(x: Any, y: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            x, y = carry
            return (x @ x, lax.psum(y, "tp")), None

        x, y = lax.scan(body, (x, y), None, length=10)[0]
        return x + y

    off, on = times(f, X, X)
    last = on.timeline.spans[-1]
    add_s = float(last.end_ps[0] - last.start_ps[0]) * 1e-12
    (trip,) = (s for s in off.steps if isinstance(s, Loop))
    kernel_s, collective_s = sorted(s.time_s for s in trip.body)
    assert off.time_s == pytest.approx(10 * (kernel_s + collective_s) + add_s, rel=1e-6)
    assert on.time_s == pytest.approx(10 * collective_s + add_s, rel=1e-6)


def test_tables_say_so() -> None:
    off, on = times(lambda x, y: deep(x) + lax.psum(y, "tp"), X, X)
    assert "no overlap" in str(off) and "hidden by overlap" not in str(off)
    assert "overlap=True" in str(on) and "hidden by overlap" in str(on)
    assert on.memory == off.memory and on.bound == off.bound


def test_trace_and_page_draw_collectives_apart(tmp_path: Path) -> None:
    _, on = times(lambda x, y: deep(x) + lax.psum(y, "tp"), X, X)
    events = json.loads(on.to_perfetto(tmp_path / "t.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    for track in {e["tid"] for e in slices}:
        ends = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == track)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(ends, ends[1:], strict=False))
    assert {e["tid"] for e in slices if e["cat"] == "collective"} == {2}
    assert 'y="23"' in on.to_html(tmp_path / "p.html").read_text()


# -- laws over random programs of steps


def program(rng: random.Random, count: int, devices: int, depth: int = 0) -> Any:
    steps: list[Step] = []
    needs: list[Needs] = []
    for v in range(count):
        kind = rng.random()
        if kind < 0.5:
            seconds = rng.randrange(1, 9) * 1e-6
            steps.append(
                Op(
                    name="k",
                    kind="vector",
                    time_s=seconds,
                    bound_s=seconds,
                    limited_by="",
                    flops=0,
                    bytes=0,
                )
            )
        elif kind < 0.9 or depth == 2:
            order = rng.sample(range(devices), devices)
            table = np.array(order).reshape(2, -1)
            seconds = rng.randrange(1, 9) * 1e-6
            steps.append(
                CollectiveOp(
                    name="c",
                    op="all_reduce",
                    algorithm="ring",
                    reason="",
                    nbytes=1,
                    dtype="float32",
                    groups=((table, np.full(2, seconds)),),
                    bounds_s=(np.full(2, seconds),),
                    link_bytes=(),
                )
            )
        else:
            body, inner = program(rng, 4, devices, depth + 1)
            steps.append(Loop(name="l", trips=rng.randrange(1, 40), body=body, needs=inner))
        reads = tuple(rng.randrange(v) for _ in range(rng.randrange(3))) if v else ()
        needs.append(Needs(reads=reads, writes=(v,)))
    return tuple(steps), tuple(needs)


@pytest.mark.parametrize("seed", range(12))
def test_between_the_bound_and_no_overlap(seed: int) -> None:
    rng = random.Random(seed)
    steps, needs = program(rng, 20, 8)
    slow = [1.0 + rng.randrange(3) for _ in range(8)]
    without = timeline.play(steps, range(8), slow)
    with_it = overlap.play(steps, needs, range(8), slow)
    assert (with_it.clocks_ps <= without.clocks_ps).all()
    each = list(timeline.each(steps))
    kernels = sum(n * s.time_s for s, n in each if isinstance(s, Op))
    links = sum(n * s.time_s for s, n in each if isinstance(s, CollectiveOp))
    assert with_it.time_s >= max(kernels, links) * (1 - 1e-9)
    # A chain of steps that each wait for the one before is a program without overlap.
    chain = tuple(Needs(reads=(v - 1,), writes=(v,)) for v in range(len(steps)))
    if not any(isinstance(s, Loop) for s in steps):
        alone = overlap.play(steps, chain, range(8), slow)
        assert np.array_equal(alone.clocks_ps, without.clocks_ps)
    # So is one in which nothing waits, as long as there is but one engine.
    only = [s for s in steps if isinstance(s, Op)]
    free = [Needs()] * len(only)
    assert np.array_equal(
        overlap.play(only, free, range(8), slow).clocks_ps,
        timeline.play(only, range(8), slow).clocks_ps,
    )


def test_a_step_starts_when_what_it_reads_is_there() -> None:
    rng = random.Random(1)
    steps, needs = program(rng, 30, 8)
    spans = [s for s in overlap.play(steps, needs, range(8)).spans if s.depth == 0]
    ends: dict[int, Any] = {}
    for span, need in zip(spans, needs, strict=True):
        for v in need.reads:
            assert (span.start_ps >= ends[v]).all()
        ends.update(dict.fromkeys(need.writes, span.end_ps))


# --- clocks ---------------------------------------------------------------------------------------


def kernel(*seconds: float) -> Op:
    """A kernel that takes so long, on each device if there are several numbers."""
    ops = tuple(
        Op(name="k", kind="vector", time_s=s, bound_s=0.0, limited_by="", flops=0, bytes=0)
        for s in seconds
    )
    if len(ops) == 1:
        return ops[0]
    return dataclasses.replace(max(ops, key=lambda op: op.time_s), each=ops)


def meeting(seconds: float, ranks: int = 2) -> CollectiveOp:
    return CollectiveOp(
        name="c",
        op="all_reduce",
        algorithm="",
        reason="",
        nbytes=1,
        dtype="float32",
        groups=((np.arange(ranks)[None], np.array([seconds])),),
        bounds_s=(np.zeros(1),),
        link_bytes=(),
    )


def clocks(steps: list[Step], slowness: tuple[float, ...]) -> list[float]:
    found = timeline.play(steps, range(len(slowness)), slowness).clocks_ps
    return [ps / timeline.PS_PER_S for ps in found]


def test_kernels_take_longer_on_slow_devices_whether_or_not_they_are_alike() -> None:
    assert clocks([kernel(2.0)], (1, 3)) == [2, 6]
    assert clocks([kernel(1.0, 2.0)], (1, 3)) == [1, 6]
    assert clocks([kernel(1.0, 2.0), meeting(0.5)], (1, 3)) == [6.5, 6.5]


@pytest.mark.parametrize(
    ("trips", "ends"), [(0, [0, 0]), (1, [1, 3]), (1.5, [2.5, 4.5]), (2, [4, 6]), (5, [13, 15])]
)
def test_trips_of_a_loop_whose_devices_wait_for_one_another(trips: float, ends: list) -> None:
    """They meet and work for 1 s and 3 s: from the second trip on the first one waits."""
    loop = Loop(name="l", trips=trips, body=(meeting(0.0), kernel(1.0)))
    assert clocks([loop], (1, 3)) == ends


def test_devices_that_take_a_branch_more_often() -> None:
    loop = Loop(name="l", trips=0.5, device_trips=(0.25, 0.75), body=(kernel(4.0),))
    assert clocks([loop], (1, 1)) == [1, 3]


def test_clocks_hold_what_slow_devices_need() -> None:
    healthy = kernel(timeline.LONGEST_S / 2)
    assert timeline.play([healthy], [0], [1.9]).time_s == pytest.approx(0.95 * timeline.LONGEST_S)
    with pytest.raises(ValueError, match="clocks in picoseconds end at"):
        timeline.play([healthy], [0], [2.1])
    often = Loop(name="l", trips=0.5, device_trips=(0.1, 0.9), body=(kernel(5e6),))
    assert timeline.play([often] * 2, [0, 1]).time_s == pytest.approx(9e6)
    with pytest.raises(ValueError, match="clocks in picoseconds end at"):
        timeline.play([often] * 3, [0, 1])  # 1.35e7 s on the device that takes it most
