"""Steps of very many transfers: what the time reading takes for them is what their lists say."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulator as em
from emulator.collectives import (
    ALGORITHMS,
    Group,
    Schedule,
    find,
    flat,
    full_mesh,
    group_of,
    hierarchical,
    levels,
    pairwise,
)
from emulator.collectives.schedule import Round, Wide
from emulator.collectives.traffic import Chain, Exchange, Sends, Shift
from emulator.fabric import network_of, wide_steps
from emulator.fabric.cost import dies_of, load_schedule, transports_for
from emulator.fabric.steps import load_round
from emulator.fabric.wide_steps import StepSum, WideSteps, load_listed
from emulator.machines import Machine
from tests.random_machines import POD, groups, machines

WIDE = {
    "all_reduce": ("full_mesh", "pairwise", "pipeline"),
    "reduce_scatter": ("full_mesh", "pairwise", "pipeline"),
    "all_gather": ("full_mesh", "pairwise", "pipeline"),
    "all_to_all": ("full_mesh", "pairwise", "ring", "bruck", "hierarchical"),
    "broadcast": ("full_mesh", "pipeline", "ring"),
    "reduce": ("full_mesh", "pipeline", "ring"),
}


@pytest.fixture(autouse=True, scope="module")
def _small_groups_are_wide_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (levels, full_mesh, pairwise, hierarchical):
            patch.setattr(module, "MANY", 2)
        patch.setattr(hierarchical, "_LISTED", 40)
        yield


@st.composite
def schedules(draw: st.DrawFn, group: Group) -> Schedule:
    op = draw(st.sampled_from([*WIDE]))
    names = WIDE[op]
    if op in ("all_reduce", "reduce_scatter", "all_gather"):
        inner = draw(st.sampled_from([*flat.LEVELS]))
        names += (f"{inner}/full_mesh", f"{inner}/pairwise", f"full_mesh/{inner}")
    make = find(op, draw(st.sampled_from(names)))
    assert make is not None
    root = draw(st.integers(0, group.n - 1))
    return make(group, root) if op in ("broadcast", "reduce") else make(group)


def check_case(data: st.DataObject) -> None:
    machine = data.draw(machines())
    devices = data.draw(groups(machine))
    schedule = data.draw(schedules(group_of(devices, machine)))
    dies = np.array(dies_of(machine, tuple(devices))[0])
    transport = data.draw(st.sampled_from(transports_for(machine, tuple(dies.tolist()))))
    wide = WideSteps(machine, dies, transport)
    for part in schedule.rounds:
        if isinstance(part, Wide):
            assert moved(part) == told(part)
            quick, plain = wide.load(part), load_round(part.listed(), machine, dies, transport)
            if plain is None or quick is None:
                assert quick is plain
                continue
            assert quick.port_s == pytest.approx(plain.port_s, rel=1e-11)
            assert quick.latency_s == pytest.approx(plain.latency_s, rel=1e-11)
            assert quick.message_s == pytest.approx(plain.message_s, rel=1e-11)
            assert (quick.added, quick.tier_slots) == (plain.added, plain.tier_slots)


def moved(part: Wide) -> collections.Counter[tuple[int, int]]:
    """Slots from rank to rank, by the list."""
    step = part.listed().single_slots()
    pairs = zip(step.src.tolist(), step.dst.tolist(), strict=True)
    return collections.Counter(pair for pair in pairs if pair[0] != pair[1])


def told(part: Wide) -> collections.Counter[tuple[int, int]]:
    """Slots from rank to rank, by what the time reading is told."""
    total: collections.Counter[tuple[int, int]] = collections.Counter()
    for item in part.traffic:
        for src, dst, width in item.listed():
            for a, b, slots in zip(src.tolist(), dst.tolist(), width.tolist(), strict=True):
                if a != b:
                    total[a, b] += slots
    return total


@given(data=st.data())
@settings(max_examples=60)
def test_at_once_or_one_by_one(data: st.DataObject) -> None:
    check_case(data)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=3000)
def test_at_once_or_one_by_one_at_length(data: st.DataObject) -> None:
    check_case(data)


@pytest.mark.parametrize(
    "fabric",
    [
        "ring(7, 50GB/s, 1us)",
        "ring(2, 50GB/s, 1us) / ring(6, 25GB/s, 1us)",
        "torus(4, 3, 2, 50GB/s, 0.3us)",
        "mesh(5, 4, 50GB/s, 0.3us)",
        "full_mesh(4, 50GB/s, 0.2us) / mesh(3, 25GB/s, 1us) / torus(2, 5, 196GB/s, 0.3us)",
    ],
)
def test_rotations_of_all_devices_of_direct_levels(fabric: str) -> None:
    machine = em.custom_machine(fabric)
    dies, transport = np.arange(machine.num_devices), machine.fabric.transports[0]
    rates = np.array([level.bytes_per_s for level in machine.fabric.levels])
    wide = WideSteps(machine, dies, transport)
    for by in range(1, machine.num_devices):
        assert network_of(machine).rotation_s(dies[None], by, rates) is not None
        step = Shift(dies[None], by, 1, reduce=False)
        quick = wide.load(Wide((step,), lambda: pytest.fail("listed")))
        plain = load_listed((step,), machine, dies, transport)
        assert quick is not None and plain is not None
        assert quick.port_s == pytest.approx(plain.port_s, rel=1e-11)
        assert quick.latency_s == pytest.approx(plain.latency_s, rel=1e-11)
        assert quick.tier_slots == plain.tier_slots


@pytest.mark.parametrize(
    "fabric",
    [
        "switch(4, 50GB/s, 1us, taper=2.5) / switch(3, 50GB/s, 2us)",
        "switch(4, 50GB/s, 1us, planes=2, taper=2.5) / switch(3, 196GB/s, 1us, taper=8) / "
        "switch(2, 25GB/s, 1us, taper=4)",
    ],
)
def test_rotations_over_uplinks_that_are_too_few(fabric: str) -> None:
    machine = em.custom_machine(fabric)
    dies, transport = np.arange(machine.num_devices), machine.fabric.transports[0]
    wide = WideSteps(machine, dies, transport)
    full = set()
    for by in range(1, machine.num_devices):
        step = Shift(dies[None], by, 1, reduce=False)
        quick = wide.load(Wide((step,), lambda: pytest.fail("listed")))
        plain = load_listed((step,), machine, dies, transport)
        assert quick is not None and plain is not None
        assert quick.port_s == pytest.approx(plain.port_s, rel=1e-11)
        full.add(round(quick.port_s * 1e12, 3))
    # One that leaves its switch has the port for itself, more of them wait for the uplinks.
    assert len(full) > 1


@pytest.mark.parametrize(
    "fabric",
    ["ring(16, 50GB/s, 1us)", "switch(4, 50GB/s, 1us, taper=4) / switch(4, 25GB/s, 2us, taper=3)"],
)
def test_every_stretch_of_a_chain_from_either_end(fabric: str) -> None:
    """Whose hops are ever longer, or load ever more of the same links."""
    machine = em.custom_machine(fabric)
    dies, transport = np.arange(16), machine.fabric.transports[0]
    chain = Chain(np.array([0, 1, 2, 4, 3, 5, 8, 6, 9, 7, 10, 15, 11, 14, 12, 13]), 0, 14, False)
    wide, seen = WideSteps(machine, dies, transport), set()
    for first, last in [(0, hop) for hop in range(15)] + [(hop, 14) for hop in range(15)]:
        step = dataclasses.replace(chain, first=first, last=last)
        quick = wide.load(Wide((step,), lambda: pytest.fail("listed")))
        assert quick == load_listed((step,), machine, dies, transport), (first, last)
        seen.add((quick.port_s, quick.latency_s) if quick else None)
    assert len(seen) > 2


TAPERED = dataclasses.replace(
    em.cloudmatrix384("die"),
    fabric=dataclasses.replace(POD.fabric, node_uplink_bytes_per_s=100e9),
)


@pytest.mark.parametrize(
    "machine",
    [
        TAPERED,
        em.custom_machine("torus(6, 10, 50GB/s, 0.3us)"),
        em.custom_machine("switch(4, 50GB/s, 1us) / mesh(3, 5, 25GB/s, 1us)"),
        em.custom_machine("ring(6, 50GB/s, 1us) / switch(10, 100GB/s, 2us, planes=2, taper=3)"),
    ],
    ids=lambda machine: machine.name,
)
@pytest.mark.parametrize("count", [24, 41])
def test_exchanges_by_sums(machine: Machine, count: int) -> None:
    rank = np.arange(count)
    step = Exchange(rank, rank[::2], 1 + rank % 3, 1 + rank[::2] % 2, reduce=True)
    dies, transport = np.arange(count) + count // 5, transports_for(machine, (0, 40))[0]
    total = StepSum(machine, transport)
    assert total.exchange(step, dies)
    quick, plain = total.step(), load_listed((step,), machine, dies, transport)
    assert quick is not None and plain is not None
    assert quick.port_s == pytest.approx(plain.port_s, rel=1e-11)
    assert quick.latency_s == pytest.approx(plain.latency_s, rel=1e-11)
    assert quick.message_s == pytest.approx(plain.message_s, rel=1e-11)
    assert (quick.added, quick.tier_slots) == (plain.added, plain.tier_slots)


def test_every_wide_algorithm_is_wide() -> None:
    """Or the tests above would compare lists with lists."""
    group = Group((*np.repeat(np.arange(6), 5).tolist(), 6, 6))  # a pipeline is so if nodes differ
    for op, names in WIDE.items():
        assert set(names) <= set(ALGORITHMS[op])
        for name in names:
            make = find(op, name)
            assert make is not None
            schedule = make(group, 3) if op in ("broadcast", "reduce") else make(group)
            assert any(isinstance(part, Wide) for part in schedule.rounds), (op, name)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("all_to_all", name) for name in WIDE["all_to_all"]),
        ("all_reduce", "full_mesh"),
        ("all_gather", "pairwise"),
        ("all_reduce", "ring/full_mesh"),
        ("broadcast", "pipeline"),
        ("reduce", "ring"),
        ("broadcast", "full_mesh"),
    ],
)
@pytest.mark.parametrize("n", [5000, 8191])
def test_thousands_of_ranks_are_not_listed(monkeypatch, op: str, name: str, n: int) -> None:  # noqa: ANN001
    """A step that lists its transfers fails here; so do steps that are taken one by one."""
    machine = em.custom_machine("switch(8, 196GB/s, 1us) / switch(1024, 196GB/s, 1us, taper=2)")
    make = find(op, name)
    assert make is not None
    group = group_of(range(n), machine)
    schedule = make(group, 3) if op in ("broadcast", "reduce") else make(group)
    listed = 0

    def counted(part: Round, *others: object) -> object:
        nonlocal listed
        listed += len(part.src)
        return load_round(part, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("emulator.fabric.cost.load_round", counted)
    load = load_schedule(schedule, machine, tuple(range(n)), machine.fabric.transports[0])
    assert load.time_s(1 << 20) > 0
    assert (
        listed + sum(part.src.size for part in schedule.rounds if isinstance(part, Round)) < 2**21
    )


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter"])
@pytest.mark.parametrize("name", ["star/full_mesh", "binary_tree/full_mesh", "star/pairwise"])
@pytest.mark.parametrize("machine", [POD, POD.degrade(planes=[2])], ids=["whole", "broken"])
def test_what_goes_to_one_rank_is_one_message(machine: Machine, op: str, name: str) -> None:
    """However many exchanges it is part of: a star's blocks are all with one rank of a node."""
    devices = (*range(16), 17, 18, 19, 25, 26, 40, 41)
    make = find(op, name)
    assert make is not None
    schedule = make(group_of(devices, machine))
    dies, transport = np.array(dies_of(machine, devices)[0]), machine.fabric.transport("sdma")
    wide = WideSteps(machine, dies, transport)
    parts = [part for part in schedule.rounds if isinstance(part, Wide)]
    assert parts
    for part in parts:
        plain = load_round(part.listed(), machine, dies, transport)
        for told_ in (wide.load(part), load_listed(part.traffic, machine, dies, transport)):
            assert told_ is not None and plain is not None
            assert told_.message_s == pytest.approx(plain.message_s, rel=1e-11)
            assert told_.port_s == pytest.approx(plain.port_s, rel=1e-11)
            assert told_.tier_slots == plain.tier_slots


@pytest.mark.parametrize("overlap", [True, False])
def test_exchanges_between_some_of_the_same_ranks(overlap: bool) -> None:
    """Where exchanges, and what is listed, have some transfers in common, all are listed."""
    rank = np.arange(6)
    first = Exchange(rank[:4], rank[:4], np.ones(4, int), np.ones(4, int), reduce=False)
    second = dataclasses.replace(first, senders=rank[2:], receivers=rank[2:])
    pairs = (np.array([0, 1]), np.array([1, 2] if overlap else [8, 9]), np.array([1, 1]))
    for traffic in ((first, second), (first, Sends(*pairs, np.zeros(2, bool)))):
        dies, transport = 17 * np.arange(10), POD.fabric.transport("sdma")
        quick = WideSteps(POD, dies, transport).load(Wide(traffic, lambda: pytest.fail("listed")))
        plain = load_listed(traffic, POD, dies, transport)
        assert quick is not None and plain is not None
        assert quick.message_s == pytest.approx(plain.message_s, rel=1e-11)


def test_a_list_in_parts_counts_messages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Sends(*(np.array([x] * 3) for x in (0, 20, 1)), np.zeros(3, bool))
    transport = POD.fabric.transport("sdma")
    whole = load_listed((same, same), POD, np.arange(30), transport)
    monkeypatch.setattr(wide_steps, "_AT_A_TIME", 1)
    parts = load_listed((same, same), POD, np.arange(30), transport)
    assert whole is not None and parts == whole


def test_ranks_that_were_are_not_mistaken_for_others() -> None:
    """What rotations have in common is found by which array their ranks are: one that is gone must
    not lend its place in memory to another.
    """
    machine = em.custom_machine("switch(2, 196GB/s, 1us) / switch(8, 25GB/s, 3us)")
    dies, transport = np.arange(machine.num_devices), machine.fabric.transports[0]
    wide = WideSteps(machine, dies, transport)
    for turn in range(50):
        # Neighbours under one switch, then ranks in pairs under different ones.
        order = np.arange(16) if turn % 2 == 0 else np.arange(16).reshape(8, 2).T.reshape(-1)
        step = Shift(order.reshape(8, 2).copy(), 1, 1, reduce=False)
        quick = wide.load(Wide((step,), lambda: pytest.fail("listed")))
        plain = load_listed((step,), machine, dies, transport)
        assert quick is not None and plain is not None
        assert (quick.tier_slots, quick.latency_s) == (plain.tier_slots, plain.latency_s)
        del step
