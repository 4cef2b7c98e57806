"""Links, routes, shared links, faults, and fabrics of a user's own."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.collectives import ALGORITHMS, OPS, build, group_of, hierarchical, make_round
from emulator.fabric import bound_s, collective, concurrent, network_of, time_schedule
from emulator.fabric.cost import dies_of, transports_for
from emulator.fabric.flows import Phase, fair_rates, finish_s
from emulator.fabric.plane_network import Bundles, Planes
from emulator.fabric.steps import link_loads, transfers_of
from emulator.machines import Machine, cloudmatrix384, custom_machine, gb200_nvl72
from emulator.machines.wiring import wiring
from emulator.timeline import Loop, Op, play

POD, DIES, RACK = cloudmatrix384(), cloudmatrix384(device="die"), gb200_nvl72()
TWO = cloudmatrix384(pods=2)
CASES = [(op, name) for op in OPS for name in ALGORITHMS[op]]
FABRICS = [
    custom_machine("torus(4, 3, 50GB/s, 300ns) / switch(3, 100GB/s, 1us, planes=4, taper=2)"),
    custom_machine("full_mesh(4, 56GB/s, 0.2us) / ring(5, 50GB/s, 1us)"),
    custom_machine("switch(6, 100GB/s, 1us, planes=3) / mesh(2, 3, 40GB/s, 500ns)"),
]


def extra(op: str, pairs: tuple[tuple[int, int], ...]) -> dict:
    return {"pairs": pairs} if op == "permute" else {}


# --- links and routes -----------------------------------------------------------------------------


def test_the_pod_is_wired_as_published() -> None:
    """arXiv 2506.12708 v2: 7 lanes of 28 GB/s per die, 7 first-level switches per node with 16
    uplinks each, 7 x 16 second-level switches of 48 ports.
    """
    links = list(POD.links())
    assert len({link.name for link in links}) == len(links)
    up = {link.name: link for link in links if link.name.endswith("/up")}
    lanes = [link for name, link in up.items() if name.startswith("die") and "plane" in name]
    uplinks = [link for link in up.values() if "switch" in link.name]
    assert len(lanes) == 768 * 7 and len(uplinks) == 48 * 7 * 16
    assert {link.bytes_per_s for link in lanes + uplinks} == {28e9}
    # One 400G module carries two lanes: 2,688 of them at the nodes' ends.
    assert {link.medium for link in uplinks} == {"optical"} and len(uplinks) / 2 == 2688
    assert {link.medium for link in lanes} == {"electrical"}
    ports = collections.Counter(link.ends[1] for link in uplinks)
    assert len(ports) == 112 and set(ports.values()) == {48}
    first_level = collections.Counter(link.ends[0] for link in uplinks)
    assert len(first_level) == 48 * 7 and set(first_level.values()) == {16}
    assert sum("/sio/up" in name for name in up) == 384
    assert sum("/host/up" in name for name in up) == 48 * 4
    assert sum("/rdma/up" in name for name in up) == 768
    assert up["die5/rdma/up"].bytes_per_s == 25e9
    assert len(list(RACK.links())) == 2 * (72 * 18 + 36)  # and NVLink-C2C of 36 CPUs


def test_a_transfer_crosses_the_links_it_should() -> None:
    """Inside a node a lane up and down in each plane; between nodes also every switch of it."""
    network = Planes(DIES)
    rates = np.array([270e9, 196e9, 196e9])

    def busy(src: int, dst: int) -> dict[int, float]:
        a, b = np.array([src]), np.array([dst])
        tier = network.tier_between(a, b)
        found: dict[int, float] = {}
        for first, seconds in network.loads(a, b, np.ones(1), tier, rates):
            found |= {first + int(i): float(seconds[i]) for i in np.flatnonzero(seconds)}
        return found

    assert list(busy(0, 1).values()) == [pytest.approx(1 / 270e9)]
    assert len(busy(0, 1)) == 1 and busy(0, 1).keys() != busy(1, 0).keys()
    inside = list(busy(0, 2).values())
    assert inside == [pytest.approx(1 / 7 / 28e9)] * 14
    between = busy(0, 16)
    assert len(between) == 14 + 2 * 7 * 16
    uplinks = sorted(between.values())[: 2 * 7 * 16]
    assert uplinks == [pytest.approx(1 / 112 / 28e9)] * len(uplinks)


@pytest.mark.parametrize("machine", [POD, DIES, RACK], ids=["package", "die", "rack"])
def test_bundles_and_every_link_for_itself_agree(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    for size in (2, 9, 31):
        devices = tuple(int(d) for d in rng.permutation(machine.num_devices)[:size])
        for op, name in (("all_reduce", "hierarchical"), ("all_to_all", "full_mesh")):
            schedule = build(op, name, group_of(devices, machine))
            dies = dies_of(machine, devices)[0]
            transport = transports_for(machine, dies)[0]
            for part in schedule.steps():
                transfers = transfers_of(part, machine, np.array(dies))
                if transfers is None:
                    continue
                bundled = link_loads(machine, transfers, transport)
                src, dst, tier, width, _ = transfers
                places = range(machine.dies_per_device)
                every = [np.concatenate([end + i for i in places]) for end in (src, dst)]
                rates = dict(transport.rates_bytes_per_s)
                explicit = Planes(machine).loads(
                    *every,
                    np.tile(width, len(places)),
                    np.tile(tier, len(places)),
                    np.array([rates.get(t, np.nan) for t in machine.fabric.tier_names]),
                )
                busiest = [max(b.max() for _, b in loads) for loads in (bundled, explicit)]
                assert busiest[0] == pytest.approx(busiest[1], rel=1e-12)


def test_the_healthy_machine_takes_the_fast_way() -> None:
    assert type(network_of(POD)) is Bundles and network_of(POD).spare
    assert type(network_of(POD.degrade(devices={3: 0.5}))) is Bundles
    assert type(network_of(POD.degrade(planes=[0]))) is Planes


def test_pods_are_joined_by_their_rdma_cards() -> None:
    two = cloudmatrix384(pods=2)
    assert two.num_devices == 768 and two.num_nodes == 96
    for op in ("all_reduce", "all_to_all"):  # each pod is what it was
        alone = collective(op, 2**28, POD, range(384))
        assert collective(op, 2**28, two, range(384, 768)).time_s == alone.time_s
    across = collective("permute", 2**28, two, pairs=[(0, 384)])
    assert dict(across.link_bytes) == {"pods": 2**28}
    tier = two.fabric.tier("pods")
    assert across.time_s == pytest.approx(2**27 / 23.8e9 + tier.write_latency_s, rel=0.1)
    broken = two.degrade(planes=range(6), links=["device0"])  # the cards are no part of the planes
    assert type(network_of(broken)) is Planes
    again = collective("permute", 2**28, broken, [384, 767], pairs=[(384, 767)])
    assert again.time_s > collective("permute", 2**28, two, [384, 767], pairs=[(384, 767)]).time_s
    cards = [collective("permute", 2**28, m, [0, 384], pairs=[(0, 384)]) for m in (broken, two)]
    assert cards[0].time_s == cards[1].time_s
    exchange = collective("all_to_all", 2**28, two, algorithm="full_mesh")
    half = 2**28 * 384 // 768 * 768
    assert dict(exchange.link_bytes)["pods"] == pytest.approx(half, rel=1e-2)
    assert exchange.bound_s == pytest.approx(2**28 / 2 / 50e9)  # half of it through 2 x 25 GB/s
    # What leaves a node, half of it to the other pod: its lanes and its cards together.
    mixed = [(i, 8 + i) for i in range(4)] + [(i, 384 + i) for i in range(4, 8)]
    assert collective("permute", 2**28, two, pairs=mixed).bound_s == 2**28 / (2 * (196e9 + 25e9))
    with pytest.raises(ValueError, match="pods must be a whole number from 1 to 432"):
        cloudmatrix384(pods=0)


# --- faults ---------------------------------------------------------------------------------------

FREE = {"startup_s": 0.0, "reduce_startup_s": 0.0, "step_s": 0.0, "overlap_s": 0.0}


def ideal(machine: Machine) -> Machine:
    """The machine with a transport that reaches the links' rates and costs nothing else."""
    fabric = machine.fabric
    last = dataclasses.replace(
        fabric.transports[-1],
        name="ideal",
        scope=fabric.tiers[-1].name,
        rates_bytes_per_s=tuple((t.name, t.bytes_per_s) for t in fabric.tiers),
        reduce_s_per_byte=0.0,
        message_s=(),
        on_request=False,
        **FREE,
    )
    tiers = tuple(
        dataclasses.replace(t, read_latency_s=0.0, write_latency_s=0.0) for t in fabric.tiers
    )
    return dataclasses.replace(
        machine, fabric=dataclasses.replace(fabric, tiers=tiers, transports=(last,))
    )


IDEAL = ideal(POD)


def ratio(op: str, **faults: object) -> float:
    algorithm = {"all_to_all": "full_mesh", "all_reduce": "ring"}[op]
    broken = IDEAL.degrade(**faults)  # type: ignore[arg-type]
    slow = collective(op, 2**30, broken, algorithm=algorithm)
    assert slow.time_s >= slow.bound_s
    return slow.time_s / collective(op, 2**30, IDEAL, algorithm=algorithm).time_s


@pytest.mark.parametrize(
    ("faults", "slower"),
    [
        ({"planes": [3]}, 7 / 6),  # one lane of seven is gone everywhere
        ({"planes": {3: 0.5}}, 7 / 6.5),
        ({"planes": [1, 3]}, 7 / 5),
        ({"links": {"device9": 0.25}}, 4.0),
        ({"links": ["die18/plane0"]}, 7 / 6),
        ({"switches": ["node2/plane3"]}, 7 / 6),  # all lanes into it
        ({"links": {"node2": 0.5}}, 1.0),  # a ring crosses a node's uplinks once
    ],
)
def test_what_a_fault_costs_a_ring(faults: dict, slower: float) -> None:
    assert ratio("all_reduce", **faults) == pytest.approx(slower, rel=1e-6)


def test_what_a_fault_costs_all_to_all() -> None:
    """Everything leaves through the uplinks: those of a node are 8 / 383 too wide for it."""
    needed = 376 / 383
    assert ratio("all_to_all", links={"node2": 0.5}) == pytest.approx(2 * needed, rel=1e-6)
    # Six planes are as before and the seventh has 15/16: balanced, 7 / (6 + 15/16) of the work.
    one = ratio("all_to_all", links=["node2/plane3/switch7"])
    assert 1.0 <= one <= 7 / (6 + 15 / 16) + 1e-9
    assert ratio("all_to_all", switches=["plane3/switch7"]) >= one


def test_faults_add_up_whatever_the_order() -> None:
    a = POD.degrade(planes=[3]).degrade(links={"device9": 0.5}, missing=[4])
    b = POD.degrade(missing=[4], links={"device9": 0.5}).degrade(planes={3: 0})
    assert a == b and hash(a) == hash(b) and a != POD and hash(a) != hash(POD)
    assert POD.degrade() == POD
    twice = POD.degrade(links={"device9": 0.5}).degrade(links={"device9": 0.5})
    assert wiring(twice).lanes[0, 18].sum() == pytest.approx(196e9 / 4)
    assert any("device9" in line for line in twice.faults.describe())
    answers = {collective("all_reduce", 2**28, m).time_s for m in (POD, a, twice)}
    assert len(answers) == 3  # no cache mixes them


def test_only_one_direction_of_a_link() -> None:
    broken = IDEAL.degrade(links={"die0/up": 0.5, "die1/up": 0.5})

    def seconds(pair: tuple[int, int]) -> float:
        return collective("permute", 2**30, broken, pairs=[pair]).time_s

    assert seconds((0, 9)) == pytest.approx(2 * seconds((9, 0)))

    out = [(16 + i, 40 + i) for i in range(8)]  # all of node 2 to all of node 5
    back = [(b, a) for a, b in out]
    narrow = IDEAL.degrade(links={"node2/up": 0.25})
    times = [collective("permute", 2**30, narrow, pairs=pairs).time_s for pairs in (out, back)]
    assert times[0] == pytest.approx(4 * times[1])


def test_dies_of_a_package_meet_in_the_switch_if_their_link_is_dead() -> None:
    broken = DIES.degrade(links=["package0/sio"])
    dead = collective("all_gather", 2**24, broken, [0, 1], "full_mesh")
    assert dict(dead.link_bytes).keys() == {"node"}
    alive = collective("all_gather", 2**24, broken, [2, 3], "full_mesh")
    assert dict(alive.link_bytes).keys() == {"package"}
    assert dead.time_s >= alive.time_s


def test_switches_that_add_go_as_fast_as_their_slowest_lanes() -> None:
    rack = ideal(RACK)

    def seconds(machine: Machine) -> float:
        return collective("all_reduce", 2**30, machine, algorithm="nvls").time_s

    assert seconds(rack.degrade(planes=[2])) == pytest.approx(18 / 17 * seconds(rack))
    apart = rack.degrade(links=["device1/plane0", "device2/plane1"])  # two planes miss somebody
    assert seconds(apart) == pytest.approx(18 / 16 * seconds(rack))
    with pytest.raises(ValueError, match="'nvls': no plane of this GB200 NVL72 reaches all"):
        seconds(rack.degrade(links=["device1"]))


def test_what_is_cut_off_is_named() -> None:
    with pytest.raises(ValueError, match="device 5 is cut off from device 4 of this CloudMatrix"):
        collective("all_reduce", 2**20, POD.degrade(links=["device5"]), range(4, 8), "ring")
    assert collective("all_reduce", 2**20, POD.degrade(links=["device5"]), range(4)).time_s > 0
    # No plane in common: device 0 has lost the first three, device 1 the last four.
    lost = [f"device0/plane{p}" for p in range(3)] + [f"device1/plane{p}" for p in range(3, 7)]
    with pytest.raises(ValueError, match="device 1 is cut off from device 0"):
        collective("permute", 2**20, POD.degrade(links=lost), [0, 1], pairs=[(0, 1)])


def test_missing_devices() -> None:
    broken = POD.degrade(missing_nodes=[1], missing=3)
    assert len(broken.devices) == 375 and 3 not in broken.devices and 8 not in broken.devices
    assert len(collective("all_reduce", 2**20, broken).devices) == 375
    with pytest.raises(ValueError, match=r"devices \[8, 9\] are missing"):
        collective("all_reduce", 2**20, broken, [7, 8, 9])
    mesh = broken.mesh(x=16)
    assert mesh.device_numbers == (0, 1, 2, 4, 5, 6, 7, *range(16, 25))
    with pytest.raises(ValueError, match="has 375"):
        broken.mesh(x=376)
    program = jax.shard_map(
        lambda v: jax.lax.psum(v, "x"), mesh=POD.mesh(x=4), in_specs=P("x"), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"uses devices \[3\], which are missing"):
        em.estimate(program, jax.ShapeDtypeStruct((4, 8), jnp.float32), on=broken)
    with pytest.raises(ValueError, match="no device of GB200 NVL72 would be left"):
        RACK.degrade(missing_nodes=[0])


def test_a_slow_device_holds_up_its_group() -> None:
    mesh = POD.mesh(dp=2, tp=4)

    def program(x: jax.Array) -> jax.Array:
        body = jax.shard_map(
            lambda v: jax.lax.psum(jnp.sin(v) @ v.T, "tp"),
            mesh=mesh,
            in_specs=P(("dp", "tp")),
            out_specs=P("dp"),
        )
        return body(x)

    x = jax.ShapeDtypeStruct((8 * 256, 1024), jnp.bfloat16)
    healthy = em.estimate(program, x, on=POD)
    slow = em.estimate(program, x, on=POD.degrade(devices={5: 0.5}))
    kernels_s = sum(step.time_s for step in healthy.steps if isinstance(step, Op))
    clocks = (slow.timeline.clocks_ps - healthy.timeline.clocks_ps) * 1e-12
    assert clocks[4:] == pytest.approx(kernels_s, rel=1e-3)  # it and those who wait for it
    assert not clocks[:4].any()
    assert slow.time_s >= slow.bound_s and "device 5 at 0.5 x" in slow.assumptions


def test_loops_of_slow_devices() -> None:
    kernel = Op(name="k", kind="vector", time_s=1e-6, bound_s=0.0, limited_by="", flops=0, bytes=0)
    looped = play([Loop(name="l", trips=7, body=(kernel,))], range(2), (1.0, 2.5))
    flat = play([kernel] * 7, range(2), (1.0, 2.5))
    assert looped.clocks_ps.tolist() == flat.clocks_ps.tolist() == [7_000_000, 17_500_000]


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"planes": [7]}, ValueError, "no plane 7; it has planes 0..6"),
        ({"planes": ["a"]}, TypeError, "planes are numbers; got 'a'"),
        ({"links": ["die5/plane9"]}, ValueError, "no plane9 .in 'die5/plane9'.; it has planes"),
        ({"links": ["cable"]}, ValueError, "'cable' in 'cable' names no part of a link"),
        ({"links": ["die5/rdma/up"]}, NotImplementedError, "'die5/rdma/up' is not modelled: rdma"),
        ({"links": ["node2/cpu1/host/up"]}, NotImplementedError, "host links keep their rate"),
        ({"links": ["die5/up/down"]}, ValueError, "both up and down"),
        ({"links": ["plane3"]}, ValueError, "no link 'plane3'; links are named as in"),
        ({"links": {"die5": 1.5}}, ValueError, "factor of the healthy rate.*got 1.5"),
        ({"links": {"die5": float("nan")}}, ValueError, "got nan"),
        ({"links": {"die5": "half"}}, TypeError, "must be a number; got 'half'"),
        ({"switches": ["die5"]}, ValueError, "no switch 'die5'"),
        ({"switches": ["node48/plane0"]}, ValueError, "no node48"),
        ({"devices": {3: 0}}, ValueError, "a device without any rate is missing="),
        ({"devices": [3]}, TypeError, "devices must map names to the factor"),
        ({"devices": {400: 0.5}}, ValueError, "device 400 is outside"),
        ({"missing": [384]}, ValueError, "device 384 is outside"),
        ({"missing_nodes": [48]}, ValueError, "no node 48; it has nodes 0..47"),
    ],
)
def test_faults_that_cannot_be(faults: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        POD.degrade(**faults)


# --- laws -----------------------------------------------------------------------------------------


@st.composite
def faults_of(draw: st.DrawFn, machine: Machine) -> dict:
    """One to three things wrong with the fabric."""
    factor = st.sampled_from([0.0, 0.1, 0.5, 0.9])
    device = st.integers(0, machine.num_devices - 1)
    fabric = machine.fabric
    found: dict = {"links": {}}
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["device", "plane", "switch", "lane"]))
        if kind == "device" and machine.num_devices > 1:
            found["links"][f"device{draw(device)}"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        if fabric.levels:
            names = [link.name for link in machine.links()]
            if names:
                found["links"][draw(st.sampled_from(names))] = draw(factor)
        elif kind == "plane":
            found["planes"] = {draw(st.integers(0, fabric.planes - 1)): draw(factor)}
        elif kind == "switch":
            node = draw(st.integers(0, machine.num_nodes - 1))
            plane = draw(st.integers(0, fabric.planes - 1))
            found["switches"] = {f"node{node}/plane{plane}": draw(factor)}
            if machine.num_nodes > 1:
                found["switches"][f"plane{plane}/switch{draw(st.integers(0, 15))}"] = draw(factor)
        elif kind == "lane":
            plane = draw(st.integers(0, fabric.planes - 1))
            found["links"][f"device{draw(device)}/plane{plane}/up"] = draw(factor)
            if machine is not RACK:
                found["links"][f"package{draw(st.integers(0, 9))}/sio"] = draw(factor)
    return found


@st.composite
def fabrics(draw: st.DrawFn) -> Machine:
    """One to three levels of any kind."""
    levels = []
    for i in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["full_mesh", "ring", "mesh", "torus", "switch"]))
        count = draw(st.integers(1, 2)) if kind in ("mesh", "torus") else 1
        switch = kind == "switch"
        levels.append(
            em.Level(
                name=f"{kind}{i}",
                kind=kind,
                sizes=tuple(draw(st.integers(1, 5)) for _ in range(count)),
                bytes_per_s=draw(st.sampled_from([1e9, 50e9, 196e9])),
                latency_s=draw(st.sampled_from([0.0, 1e-6])),
                planes=draw(st.integers(1, 4)) if switch else 1,
                taper=draw(st.sampled_from([1.0, 2.5])) if switch else 1.0,
            )
        )
    return custom_machine(levels, node_levels=draw(st.integers(1, len(levels))))


@st.composite
def broken_situations(draw: st.DrawFn) -> tuple:
    machine = draw(st.sampled_from([POD, DIES, RACK, TWO, *FABRICS]) | fabrics())
    numbers = st.integers(0, machine.num_devices - 1) | st.integers(
        0, min(machine.num_devices, 20) - 1
    )
    devices = tuple(draw(st.lists(numbers, min_size=1, max_size=14, unique=True)))
    pairs = tuple(zip(devices, draw(st.permutations(devices)), strict=True))
    return machine, draw(faults_of(machine)), devices, pairs


@pytest.mark.parametrize(("op", "name"), CASES)
@given(situation=broken_situations(), nbytes=st.integers(1, 2**32), more=st.integers(0, 2**30))
@settings(max_examples=6)
def test_laws_of_broken_machines(
    op: str, name: str, situation: tuple, nbytes: int, more: int
) -> None:
    """Nothing is faster for a fault, nor below the bound, nor faster for more bytes."""
    machine, faults, devices, pairs = situation
    before = collective(op, nbytes, machine, devices, name, **extra(op, pairs))
    broken = machine.degrade(**faults)
    keep = {"transport": before.transport, **extra(op, pairs)}
    try:
        after = collective(op, nbytes, broken, devices, name, **keep)
    except ValueError as error:
        assume("cut off" not in str(error))
        raise
    assert after.time_s >= before.time_s * (1 - 1e-12)
    assert after.time_s >= after.bound_s * (1 - 1e-12) and after.bound_s >= before.bound_s
    assert before.time_s >= before.bound_s * (1 - 1e-12)
    large = collective(op, nbytes + more, broken, devices, name, **keep)
    assert large.time_s >= after.time_s
    if len(devices) == 1:
        assert after.time_s == after.bound_s == 0


@pytest.mark.parametrize(("op", "name"), [("all_reduce", "hierarchical"), ("all_to_all", "bruck")])
@given(
    node=st.integers(0, 47),
    plane=st.integers(0, 6),
    shift=st.integers(1, 47),
    group=st.lists(st.integers(0, 383), min_size=2, max_size=10, unique=True),
)
@settings(max_examples=10)
def test_the_fault_and_the_group_may_move_together(
    op: str, name: str, node: int, plane: int, shift: int, group: list[int]
) -> None:
    def seconds(by: int, turn: int) -> float:
        broken = POD.degrade(
            links={f"node{(node + by) % 48}/plane{(plane + turn) % 7}/switch{turn}": 0.1},
            switches={f"node{(node + 5 + by) % 48}/plane{(plane + turn) % 7}": 0.5},
        )
        moved = [(device + 8 * by) % 384 for device in group]
        return collective(op, 2**24, broken, moved, name, transport="sdma").time_s

    assert seconds(0, 0) == pytest.approx(seconds(shift, 2), rel=1e-12)


def test_groups_of_one_pattern_cost_the_same() -> None:
    """What `pattern` calls alike takes equally long; a fault makes groups differ."""
    broken = POD.degrade(links={"device17": 0.5, "node40/plane2/switch3": 0.0})
    for machine in (broken, *FABRICS):
        seconds: dict[bytes, float] = {}
        near = min(machine.num_devices, 40) - 9
        for start, last in [(s, g) for g in (3, 5, 9) for s in (*range(near), *range(316, 330))]:
            if start + last >= machine.num_devices:
                continue
            group = np.array([start, start + 1, start + last])
            answer = collective("all_reduce", 2**24, machine, group.tolist(), "full_mesh")
            pattern = network_of(machine).pattern(group)
            assert seconds.setdefault(pattern, answer.time_s) == pytest.approx(answer.time_s)
    patterns = {network_of(broken).pattern(np.array([i, i + 1])) for i in range(0, 384, 2)}
    assert len(patterns) == 3  # ordinary, in the node with the dead uplink, with device 17


def test_a_pattern_tells_places_apart_where_blocks_are_joined_directly() -> None:
    """From 0 to 5 it is first a hop inside the block, from 0 to 4 it is not."""
    machine = custom_machine("full_mesh(4, 50GB/s, 1us) / ring(4, 50GB/s, 1us)")
    seconds: dict[bytes, set[float]] = {}
    for group in itertools.permutations(range(10), 2):
        answer = collective("all_reduce", 2**20, machine, group, "ring")
        pattern = network_of(machine).pattern(np.array(group))
        seconds.setdefault(pattern, set()).add(answer.time_s)
    assert len(seconds) < 90 and all(len(times) == 1 for times in seconds.values())


# --- sharing --------------------------------------------------------------------------------------


def test_progressive_filling() -> None:
    """The textbook case: two links, one member over both."""
    usage = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    assert fair_rates(usage, np.ones(4)).tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3, 1 / 3])
    # A member that could not use its part leaves it to the others.
    usage = np.array([[0.2, 1.0, 1.0]])
    assert fair_rates(usage, np.array([0.2, 1.0, 1.0])).tolist() == pytest.approx([0.2, 0.4, 0.4])


def fluid_s(sizes: list[float], seconds_per_byte: np.ndarray) -> float:
    """Seconds until the last of these flows ends, links [link, flow] shared max-min fairly; rates
    are found anew whenever one ends.
    """
    left, now = np.array(sizes, dtype=float), 0.0
    while (left > 0).any():
        active = np.flatnonzero(left > 0)
        cost = seconds_per_byte[:, active]
        alone = 1 / cost.max(axis=0)
        rates = fair_rates(cost * alone, alone)
        step_s = float((left[active] / rates).min())
        now += step_s
        left[active] -= step_s * rates
        left[left < 1e-9 * max(sizes)] = 0
    return now


@given(
    situation=broken_situations(),
    moves=st.lists(
        st.tuples(st.integers(0, 13), st.integers(0, 13), st.integers(1, 3)), min_size=1, max_size=8
    ),
)
@settings(max_examples=60)
def test_a_step_is_its_slots_sharing_links_fairly(situation: tuple, moves: list) -> None:
    """Each slot a flow, event by event: as long as the busiest link, whatever is slow or dead."""
    machine, faults, devices, _ = situation
    try:
        machine = machine.degrade(**faults)
        dies = np.array(dies_of(machine, devices)[0])
        src, dst, width = (np.array(column) for column in zip(*moves, strict=True))
        src, dst = src % len(dies), dst % len(dies)
        transport = transports_for(machine, tuple(dies))[0]

        def busy(which: np.ndarray, slots: np.ndarray | int) -> dict[int, float]:
            step = make_round(src[which], dst[which], 0, 0, reduce=False, width=slots)
            transfers = transfers_of(step, machine, dies)
            found: dict[int, float] = {}
            for first, seconds in link_loads(machine, transfers, transport) if transfers else ():
                found |= {first + i: float(seconds[i]) for i in np.flatnonzero(seconds).tolist()}
            return found

        whole = busy(np.arange(len(src)), width)
        slots = [busy(np.array([i]), 1) for i in np.repeat(np.arange(len(src)), width)]
    except ValueError as error:
        assume("cut off" not in str(error) and "missing" not in str(error))
        raise
    slots = [links for links in slots if links]  # the others stay on their die
    cost = np.array([[links.get(link, 0.0) for links in slots] for link in whole])
    if slots:
        assert fluid_s([1.0] * len(slots), cost) == pytest.approx(max(whole.values()))


def test_unequal_flows_would_let_more_bytes_end_sooner() -> None:
    """Why a flow is a slot: here a longer message ends the step earlier."""
    ends = [(0, 1), (0, 2), (0, 3), (2, 3), (1, 4), (3, 4)]  # the two links of each flow
    cost = np.array([[float(link in crossed) for crossed in ends] for link in range(5)])
    before, after = [3, 2, 4, 3, 8, 5], [3, 3, 4, 3, 8, 5]
    assert fluid_s(after, cost) < fluid_s(before, cost)
    assert max(cost @ after) >= max(cost @ before)
    assert fluid_s([1] * 6, cost) == max(cost.sum(axis=1))


def phase(wire_s: float, fixed_s: float = 0.0, repeat: int = 1, link: int = 0) -> Phase:
    return Phase(
        repeat=repeat,
        fixed_s=fixed_s,
        wire_s=wire_s,
        links=np.array([link]),
        busy=np.ones(1),
        bytes_per_s=1.0,
    )


def test_events_by_hand() -> None:
    assert finish_s([[phase(1.0)], [phase(2.0)]]) == [2.0, 3.0]
    assert finish_s([[phase(1.0)], [phase(2.0, link=1)]]) == [1.0, 2.0]
    # Alike collectives work and wait in step: 3 x (1 + 2).
    assert finish_s([[phase(1.0, 1.0, 3)]] * 2) == [9.0, 9.0]
    # One works while the other waits: 0.5 together at a half, then apart.
    assert finish_s([[phase(1.0)], [phase(1.0, 0.5)]]) == [1.5, 2.0]


def requests(*groups: object, nbytes: int = 2**28, **more: object) -> list[dict]:
    return [
        {"op": "all_reduce", "algorithm": "ring", "nbytes": nbytes, "devices": group} | more
        for group in groups
    ]


def slowdown(listed: list[dict], on: Machine) -> list[float]:
    alone = [collective(on=on, **request).time_s for request in listed]
    return [c.time_s / a for c, a in zip(concurrent(listed, on), alone, strict=True)]


def test_overlapping_collectives_slow_each_other_and_disjoint_ones_do_not() -> None:
    assert slowdown(requests(range(8), range(8, 16), range(16, 380)), IDEAL) == [1, 1, 1]
    assert slowdown(requests(range(384), range(384)), IDEAL) == pytest.approx([2, 2])
    assert slowdown(requests(range(8), range(7, 15)), IDEAL)[0] > 1.5
    with_start = slowdown(requests(range(384), range(384)), POD)
    assert with_start[0] == with_start[1] and 1 < with_start[0] < 2  # only the wire is shared


@pytest.mark.parametrize(("op", "algorithm"), [("all_gather", "ring"), ("all_to_all", "full_mesh")])
def test_two_alike_take_what_one_of_twice_the_bytes_does(op: str, algorithm: str) -> None:
    """They start, wait and work in step; only what the links carry is twice as much."""
    one = {"op": op, "nbytes": 2**28, "devices": range(384), "algorithm": algorithm}
    both = concurrent([one, one], POD)
    twice_s = collective(on=POD, **{**one, "nbytes": 2**29}).time_s
    assert [c.time_s for c in both] == pytest.approx([twice_s, twice_s], rel=1e-9)


@pytest.mark.parametrize("broken", [False, True])
def test_switches_that_add_fill_the_ports_of_their_devices(broken: bool) -> None:
    """In both directions, for rings and for what a device beside them sends or fetches."""
    rack = RACK.degrade(links={"device3": 0.9}) if broken else RACK
    switch = {"op": "all_reduce", "algorithm": "nvls", "nbytes": 2**30, "devices": range(36)}
    assert slowdown([switch, switch], rack) == pytest.approx([2, 2])
    assert slowdown([switch, {**switch, "devices": range(36, 72)}], rack) == [1, 1]
    assert slowdown([switch, *requests(range(36, 72))], rack) == [1, 1]
    assert min(slowdown([switch, *requests(range(36), nbytes=2**30)], rack)) > 1.3
    for pair in ((0, 50), (50, 0)):
        move = {"op": "permute", "nbytes": 2**30, "pairs": [pair]}
        assert slowdown([switch, move], rack)[1] > 1.8, pair


@given(
    starts=st.lists(
        st.tuples(st.integers(0, 60), st.integers(2, 12), st.sampled_from([1, 7, 8])),
        min_size=1,
        max_size=4,
    ),
    sizes=st.lists(st.integers(1, 2**28), min_size=4, max_size=4),
    broken=st.booleans(),
)
@settings(max_examples=40)
def test_laws_of_sharing(starts: list, sizes: list[int], broken: bool) -> None:
    """Never faster together than alone, never slower than one after the other, and no link carries
    more than it can.
    """
    machine = POD.degrade(links={"node2": 0.05, "device3": 0.3}) if broken else POD
    names = ["ring", "full_mesh", "rhd", "hierarchical"]
    listed = [
        {
            "op": "all_reduce",
            "nbytes": size,
            "devices": range(start, start + count * step, step),
            "algorithm": name,
        }
        for (start, count, step), size, name in zip(starts, sizes, names, strict=False)
    ]
    alone = [collective(on=machine, **request) for request in listed]
    together = concurrent(listed, machine)
    for a, b in zip(alone, together, strict=True):
        assert b.time_s >= a.time_s and b.time_s >= b.bound_s
        assert dataclasses.replace(b, time_s=a.time_s, assumptions=a.assumptions) == a
    assert max(b.time_s for b in together) <= sum(a.time_s for a in alone) * (1 + 1e-9)


@given(st.lists(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), min_size=1, max_size=5))
def test_no_link_is_overfull_and_nobody_could_have_more(rows: list[list[float]]) -> None:
    usage = np.array(rows) / np.max(rows, axis=0)
    alone = np.array([1.0, 2.0, 0.5])
    part = fair_rates(usage, alone) / alone
    load = usage @ part
    assert (load <= 1 + 1e-9).all() and (part <= 1 + 1e-9).all()
    full = load >= 1 - 1e-6
    assert all(part[i] >= 1 - 1e-6 or (usage[full, i] > 0).any() for i in range(3))


def test_groups_of_one_axis_share_what_they_share() -> None:
    """Eight groups across all nodes fill tapered uplinks; on the pod as it is, nothing changes."""
    fabric = dataclasses.replace(
        POD.fabric, node_uplink_bytes_per_s=POD.fabric.node_uplink_bytes_per_s / 8
    )
    tapered = dataclasses.replace(POD, fabric=fabric)
    sent = jax.ShapeDtypeStruct((384, 2**25), jnp.bfloat16)

    def seconds(machine: Machine, axis: str) -> float:
        program = jax.shard_map(
            lambda v: jax.lax.psum(v, axis),
            mesh=machine.mesh(dp=48, tp=8),
            in_specs=P(("dp", "tp")),
            out_specs=P("tp" if axis == "dp" else "dp"),
        )
        return em.estimate(program, sent, on=machine, algorithms={"all_reduce": "ring"}).time_s

    def alone(machine: Machine, group: range) -> float:
        return collective("all_reduce", 2**26, machine, group, "ring").time_s

    across, inside = range(0, 384, 8), range(8)
    assert seconds(POD, "dp") == pytest.approx(alone(POD, across), rel=1e-9)
    assert seconds(tapered, "tp") == pytest.approx(alone(tapered, inside), rel=1e-9)
    assert seconds(tapered, "dp") > 1.5 * alone(tapered, across)
    listed = requests(*(range(i, 384, 8) for i in range(8)), nbytes=2**26)
    assert seconds(tapered, "dp") == pytest.approx(concurrent(listed, tapered)[0].time_s, rel=1e-9)


def test_bad_requests() -> None:
    with pytest.raises(TypeError, match="request 1 is 'all_reduce'"):
        concurrent([{"op": "all_reduce", "nbytes": 8}, "all_reduce"], POD)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="request 0: unknown collective operation 'allreduce'"):
        concurrent([{"op": "allreduce", "nbytes": 8}], POD)
    with pytest.raises(ValueError, match="request 0 names a machine"):
        concurrent([{"op": "all_reduce", "nbytes": 8, "on": POD}], POD)
    with pytest.raises(TypeError, match="request 0: .*unexpected keyword argument 'bytes'"):
        concurrent([{"op": "all_reduce", "bytes": 8}], POD)
    assert concurrent([], POD) == ()
    with pytest.raises(TypeError, match="requests must be a sequence of mappings; got 5"):
        concurrent(5, POD)  # type: ignore[arg-type]


def test_requests_that_can_be_read_only_once() -> None:
    def asked(once: bool) -> list[dict]:
        to = [(i, i + 8) for i in range(4)]
        shared = {"op": "permute", "nbytes": 2**26, "devices": range(16), "transport": "sdma"}
        return [shared | {"pairs": iter(to) if once else to} for _ in range(2)]

    listed = concurrent(asked(once=False), POD)
    assert concurrent(iter(asked(once=True)), POD) == listed
    assert listed[0].time_s > collective(**asked(once=False)[0], on=POD).time_s


def test_rounding_makes_nothing_faster_beside_others() -> None:
    some, others = [10, 8, 4, 14, 3, 0, 13], [2, 1, 9, 8]
    listed: list[dict] = [
        {"op": "reduce", "nbytes": 995, "devices": some, "algorithm": "double_binary_tree"},
        {"op": "broadcast", "nbytes": 2209335, "devices": others, "algorithm": "pipeline"},
    ]
    for answer, request in zip(concurrent(listed, POD), listed, strict=True):
        assert answer.time_s >= collective(**request, on=POD).time_s


# --- fabrics of a user's own ----------------------------------------------------------------------


def rings(op: str):  # noqa: ANN201
    """A ring in each block, then rings between the blocks."""
    return lambda group: getattr(hierarchical, op)(group, inner="ring", outer="ring")


@pytest.mark.parametrize(
    ("fabric", "op", "size", "algorithm", "expected_ns"),
    [
        ("switch(8, {}, 400ns) / switch(48, {}, 2us)", "all_reduce", 2**30, rings, 10_371_109),
        (
            "switch(8, {}, 400ns) / switch(48, {}, 2us)",
            "all_gather",
            384 * 2**30,
            rings,
            1_954_178_433,
        ),
        ("full_mesh(8, {}, 200ns) / switch(48, {}, 2us)", "all_reduce", 2**30, rings, 10_368_309),
        ("ring(384, {}, 1us)", "all_reduce", 2**30, "ring", 10_943_509),
        ("switch(384, {}, 2us)", "all_reduce", 2**30, "ring", 11_709_509),
        ("switch(384, {}, 2us)", "all_to_all", 2**30, "full_mesh", 5_090_754),
        ("switch(384, {}, 2us)", "all_reduce", 2**30, "full_mesh", 10_181_509),
    ],
)
def test_published_closed_forms(
    fabric: str, op: str, size: int, algorithm: object, expected_ns: int
) -> None:
    machine = custom_machine(fabric.replace("{}", "196GiB/s"))
    chosen = algorithm(op) if algorithm is rings else algorithm
    answer = collective(op, size, machine, algorithm=chosen, dtype="int8")
    assert answer.time_s * 1e9 == pytest.approx(expected_ns, rel=1e-5)
    assert answer.time_s >= answer.bound_s > 0 and answer.transport == "ideal"


def test_ring_all_to_all_forwards_along_the_ring() -> None:
    """n (n - 1) / 2 blocks over one link, n - 1 hops of latency."""
    n, size = 384, 384 * 2**20
    machine = custom_machine(f"ring({n}, 196GB/s, 1us)")
    answer = collective("all_to_all", size, machine, algorithm="ring", dtype="int8")
    assert answer.time_s == pytest.approx(n * (n - 1) / 2 * 2**20 / 196e9 + (n - 1) * 1e-6)


def moved(machine: Machine, *pairs: tuple[int, int], nbytes: int = 10**9) -> float:
    return collective("permute", nbytes, machine, pairs=pairs).time_s


def test_routes_in_the_order_of_the_levels() -> None:
    ring = custom_machine("ring(8, 1GB/s, 1us)")
    assert moved(ring, (0, 1)) == pytest.approx(1 + 1e-6)
    assert moved(ring, (0, 3)) == moved(ring, (3, 0)) == pytest.approx(1 + 3e-6)
    assert moved(ring, (0, 7)) == pytest.approx(1 + 1e-6)  # backwards
    assert moved(ring, (0, 4)) == pytest.approx(0.5 + 4e-6)  # half each way
    assert moved(ring, (0, 2), (1, 3)) == pytest.approx(2 + 2e-6)  # both over 1 > 2
    two = custom_machine("ring(2, 1GB/s, 1us)")  # one link, not two
    assert len(list(two.links())) == 2 and moved(two, (0, 1), (1, 0)) == pytest.approx(1 + 1e-6)
    grid = custom_machine("mesh(4, 3, 1GB/s, 1us)")
    assert moved(grid, (0, 11)) == pytest.approx(1 + 5e-6)
    assert moved(grid, (0, 3)) == pytest.approx(1 + 3e-6)  # a mesh does not go round
    assert moved(custom_machine("torus(4, 3, 1GB/s, 1us)"), (0, 11)) == pytest.approx(1 + 2e-6)
    # The first dimension first: 0 > 1 > 5 and 1 > 5 meet on 1 > 5; 4 > 5 meets neither.
    assert moved(grid, (0, 5), (4, 8)) == pytest.approx(1 + 2e-6)
    assert moved(grid, (0, 5), (1, 9)) == pytest.approx(2 + 2e-6)
    both = custom_machine("full_mesh(4, 1GB/s, 1us) / ring(3, 2GB/s, 5us)")
    assert moved(both, (0, 7)) == pytest.approx(1 + 6e-6)  # 0 > 3 inside, then 3 > 7
    assert moved(both, (0, 4)) == pytest.approx(0.5 + 5e-6)
    switch = custom_machine("full_mesh(4, 1GB/s, 1us) / switch(3, 2GB/s, 5us, taper=4)")
    assert moved(switch, (0, 7)) == pytest.approx(0.5 + 5e-6)  # straight through the switch
    assert moved(switch, (0, 7), (1, 6)) == pytest.approx(1 + 5e-6)  # one block, one uplink
    assert moved(switch, (0, 7), (4, 8)) == pytest.approx(0.5 + 5e-6)


def test_ways_round_what_is_dead() -> None:
    ring = custom_machine("ring(8, 1GB/s, 1us)")
    assert moved(ring.degrade(links=["ring1/0>1"]), (0, 1)) == pytest.approx(1 + 7e-6)
    assert moved(ring.degrade(links=["ring1/0>1"]), (1, 0)) == pytest.approx(1 + 1e-6)
    assert moved(ring.degrade(links={"ring1/0-1": 0.5}), (0, 1)) == pytest.approx(2 + 1e-6)
    with pytest.raises(ValueError, match="device 1 is cut off from device 0"):
        moved(ring.degrade(links=["ring1/0-1", "ring1/4-5"]), (0, 1))
    gone = ring.degrade(missing=[1])  # it passes nothing on
    assert moved(gone, (0, 2)) == pytest.approx(1 + 6e-6)
    with pytest.raises(ValueError, match="device 2 is cut off from device 0"):
        moved(ring.degrade(missing=[1, 6]), (0, 2))
    mesh = custom_machine("full_mesh(4, 1GB/s, 1us) / switch(3, 2GB/s, 5us, planes=2, taper=2)")
    assert moved(mesh.degrade(links=["full_mesh1/0-1"]), (0, 1)) == pytest.approx(1 + 2e-6)
    assert moved(mesh.degrade(planes=[1]), (0, 5)) == pytest.approx(1 + 5e-6)
    assert moved(mesh.degrade(switches=["switch2/0/plane0"]), (0, 5)) == pytest.approx(1 + 5e-6)
    assert moved(mesh.degrade(links=["switch2/block0/plane1/up"]), (0, 5)) == pytest.approx(
        1 + 5e-6
    )
    # Device 0 has lost its port: its neighbour's leads out.
    assert moved(mesh.degrade(links=["switch2/device0"]), (0, 5)) >= 1 + 6e-6
    with pytest.raises(ValueError, match="cut off"):
        moved(mesh.degrade(switches=["switch2/0"]), (0, 5))


def test_a_way_round_that_is_less_crowded_gains_nothing() -> None:
    """0 > 1 > 3 and 1 > 3 > 5 meet on 1 > 3; with 0 > 1 dead, 0 > 2 > 3 would meet nothing."""
    mesh = custom_machine("mesh(2, 3, 1GB/s, 1us)")
    before = moved(mesh, (0, 3), (1, 5))
    assert before == pytest.approx(2 + 2e-6)
    assert moved(mesh.degrade(links=["mesh1/0>1"]), (0, 3), (1, 5)) == before


def test_planes_share_by_what_they_carry() -> None:
    """A block of four sends 4 GB; the uplinks carry 2 and, with half of it gone, 1 GB/s."""
    tapered = custom_machine("switch(4, 9GB/s) / switch(3, 2GB/s, planes=2, taper=2)")
    pairs = [(i, 4 + i) for i in range(4)]
    assert moved(tapered, *pairs) == pytest.approx(1)
    half = tapered.degrade(links={"switch2/block0/plane1/up": 0.5})
    assert moved(half, *pairs) == pytest.approx(4 / 3)


def test_links_of_their_own_rate() -> None:
    slow = custom_machine("ring(4, 1GB/s, 1us)", links={"ring1/1-2": "250MB/s"})
    assert moved(slow, (1, 2)) == pytest.approx(4 + 1e-6)
    assert moved(slow, (0, 1)) == pytest.approx(1 + 1e-6)
    assert bound_s("all_reduce", 10**9, slow, (0, 1, 2, 3)) > 0
    by_name = {link.name: link.bytes_per_s for link in slow.links()}
    assert len(by_name) == 8 and by_name["ring1/1>2"] == 250e6 and by_name["ring1/0>3"] == 1e9


def test_a_line_a_file_and_records_say_the_same(tmp_path: Path) -> None:
    line = "full_mesh(8, 56GB/s, 0.2us) / switch(48, 196GB/s, 1us, planes=7, taper=2)"
    path = tmp_path / "fabric.toml"
    path.write_text(
        """
        name = "rails"
        [[level]]
        kind = "full_mesh"
        sizes = 8
        rate = "56GB/s"
        latency = "200ns"
        [[level]]
        kind = "switch"
        sizes = [48]
        rate = 196e9
        latency = 1e-6
        planes = 7
        taper = 2.0
        [links]
        "full_mesh1/0-1" = "448Gb/s"
        """
    )
    levels = (
        em.Level(
            name="full_mesh1", kind="full_mesh", sizes=(8,), bytes_per_s=56e9, latency_s=0.2e-6
        ),
        em.Level(
            name="switch2",
            kind="switch",
            sizes=(48,),
            bytes_per_s=196e9,
            latency_s=1e-6,
            planes=7,
            taper=2.0,
        ),
    )
    machines = [em.custom_machine(source) for source in (line, path, str(path), levels)]
    assert machines[1].name == "rails" and machines[0].name == "full_mesh(8) / switch(48)"
    for machine in machines:
        assert machine.num_devices == 384 and machine.devices_per_node == 8
        for op in ("all_reduce", "all_to_all"):
            times = {collective(op, 2**26, m).time_s for m in machines}
            assert max(times) == pytest.approx(min(times), rel=1e-12)
    assert machines[0] == machines[3] and machines[1] == machines[2]


def test_programs_run_on_a_users_fabric() -> None:
    machine = FABRICS[0]
    program = jax.shard_map(
        lambda v: jax.lax.psum(v @ v.T, "y"),
        mesh=machine.mesh(x=3, y=12),
        in_specs=P(("x", "y")),
        out_specs=P("x"),
    )
    answer = em.estimate(program, jax.ShapeDtypeStruct((36 * 64, 256), jnp.bfloat16), on=machine)
    assert answer.time_s >= answer.bound_s > 0 and answer.energy.high_j > answer.energy.low_j > 0
    slow = em.estimate(
        program,
        jax.ShapeDtypeStruct((36 * 64, 256), jnp.bfloat16),
        on=machine.degrade(links={"torus1/12-13": 0.1}),
    )
    clocks = slow.timeline.clocks_ps > answer.timeline.clocks_ps
    assert clocks.tolist() == [False] * 12 + [True] * 12 + [False] * 12
    large = custom_machine("torus(16, 16, 32, 50GB/s, 300ns)")
    assert math.isfinite(collective("all_reduce", 2**30, large, algorithm="ring").time_s)
    assert all(fact.source for fact in large.facts())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1: expected full_mesh, ring, mesh, torus, switch"),
        ("star(3, 1GB/s)", r"character 1: expected .* got 'star\(3, 1GB/s\)'"),
        ("ring(4, 1GB/s) / ", "character 18: expected"),
        ("full_mesh(8, 56GX/s)", "character 14: unknown unit 'GX/s'"),
        ("ring(4, fast)", "character 9: 'fast' is no number with a unit"),
        ("ring(4)", "gives no rate, such as 56GB/s"),
        ("ring(4, 0GB/s)", "character 9: a link's rate must be above 0; got 0.0"),
        ("ring(4, -1GB/s)", "character 9: a link's rate must be above 0"),
        ("ring(4, 1GB/s, -1us)", "character 16: a latency must be 0 or above"),
        ("ring(0, 1GB/s)", "a size must be a whole number of at least 1; got 0"),
        ("ring(2.5, 1GB/s)", "character 6: a size must be a whole number; got '2.5'"),
        ("ring(2, 3, 1GB/s)", r"ring takes one size; got \(2, 3\)"),
        ("ring(4, 1GB/s, planes=2)", "planes and taper belong to a switch"),
        ("switch(4, 1GB/s, taper=0.5)", "taper must be at least 1; got 0.5"),
        ("switch(4, 1GB/s, colour=red)", "character 18: unknown 'colour'"),
        ("switch(4, 1GB/s, planes=two)", "planes must be a number; got 'two'"),
        ("ring(4, 1GB/s, name=a) / ring(4, 1GB/s, name=a)", "need different names"),
        ("full_mesh(100000, 1GB/s)", "more than the 33554432 that are modelled"),
        ("torus(1GB/s)", r"torus takes a size for each dimension; got \(\)"),
        ("ring(4, 1GB/s, 2GB/s)", "character 16: a level has one rate"),
        ("ring(4, 1GB/s, 1us, 2us)", "character 21: a level has one latency"),
        ("switch(4, 1GB/s, planes=1, planes=2)", "character 28: a level has one planes"),
        ("switch(4, 1GB/s, name=a b)", "letters, digits and _, .* got 'a b'"),
        ("switch(4, 1GB/s, name=)", "letters, digits and _, .* got ''"),
    ],
)
def test_descriptions_that_cannot_be_built(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        custom_machine(text)


def test_other_bad_descriptions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no link 'ring1/0-2'; links are named as in 'ring1/0"):
        custom_machine("ring(4, 1GB/s)", links={"ring1/0-2": "1GB/s"})  # dangling
    with pytest.raises(ValueError, match=r"links\['ring1/0-1'\]: a link's rate must be above 0"):
        custom_machine("ring(4, 1GB/s)", links={"ring1/0-1": 0})
    with pytest.raises(TypeError, match="fabric must be a line of text"):
        custom_machine([])
    with pytest.raises(TypeError, match="like must be a Machine"):
        custom_machine("ring(4, 1GB/s)", like="pod")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="node_levels must be 1..1; got 2"):
        custom_machine("ring(4, 1GB/s)", node_levels=2)
    for arguments, message in (
        ({"links": 5}, "links must map link names to rates"),
        ({"links": {5: 1e9}}, "links must map link names to rates"),
        ({"name": 5}, "name must be a text; got 5"),
    ):
        with pytest.raises(TypeError, match=message):
            custom_machine("ring(4, 1GB/s)", **arguments)
    with pytest.raises(ValueError, match="node_levels must be 1..1; got 1.0"):
        custom_machine("ring(4, 1GB/s)", node_levels=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fabric must be a line of text, .* got 5"):
        custom_machine(5)  # type: ignore[arg-type]
    good = {"name": "a", "kind": "switch", "sizes": (4,), "bytes_per_s": 1e9, "latency_s": 0.0}
    with pytest.raises(TypeError, match=r"level 'a': sizes must be a tuple; got \[4\]"):
        em.Level(**(good | {"sizes": [4]}))
    with pytest.raises(ValueError, match="planes must be a whole number of at least 1; got 2.0"):
        em.Level(**(good | {"planes": 2.0}))
    path = tmp_path / "fabric.toml"
    for text, message in (
        ("[[level]\n", "cannot read the fabric in .*fabric.toml"),
        ("name = 'x'\n", "expected fabric = .* got both or neither"),
        ("fabrics = 'ring(4, 1GB/s)'\n", "unknown fabrics"),
        ("level = 5\n", r"levels are tables headed \[\[level\]\]; got 5"),
        ("[level]\nkind = 'ring'\n", r"levels are tables headed \[\[level\]\]"),
        ("[[level]]\nkind = 5\nsizes = 4\nrate = 1e9\n", "level 1: .*unknown kind 5"),
        (
            "[[level]]\nkind = 'switch'\nsizes = 4\nrate = 1e9\nplanes = 2.0\n",
            "level 1: .*planes must be a whole number",
        ),
        ("[[level]]\nkind = 'ring'\nsizes = 4\n", "level 1: expected kind, sizes, rate"),
        ("[[level]]\nkind = 'ring'\nsizes = 4\nrate = '4us'\n", "level 1: rate: '4us' is no rate"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            custom_machine(path)
    with pytest.raises(ValueError, match="cannot read the fabric in"):
        custom_machine(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="has no switch 'ring1/0'; it has none"):
        custom_machine("ring(4, 1GB/s)").degrade(switches=["ring1/0"])


def test_a_shared_link_in_a_step_is_a_slowed_one() -> None:
    """Two transfers of one step over one uplink take twice as long as one."""
    machine = custom_machine("switch(4, 1GB/s) / switch(2, 1GB/s, taper=4)")
    one = build("permute", "direct", group_of(range(8), machine), pairs=((0, 4),))
    two = dataclasses.replace(
        one,
        rounds=(make_round([0, 1], [4, 5], 0, 1, reduce=False),),
        pairs=((0, 4), (1, 5)),
    )
    everyone = tuple(range(8))
    assert time_schedule(two, machine, everyone, 10**6) == pytest.approx(
        2 * time_schedule(one, machine, everyone, 10**6)
    )


def test_backward_ways_cross_the_links_between() -> None:
    """4 -> 1 of a line shares the link from 3 with 3 -> 2, and none with 1 -> 0 or 1 -> 4."""
    machine = custom_machine("mesh(5, 1GB/s)")
    everyone = tuple(range(5))

    def seconds(*pairs: tuple[int, int]) -> float:
        src, dst = zip(*pairs, strict=True)
        step = make_round(src, dst, 0, 1, reduce=False)
        one = build("permute", "direct", group_of(everyone, machine), pairs=pairs[:1])
        return time_schedule(dataclasses.replace(one, rounds=(step,)), machine, everyone, 10**6)

    assert seconds((4, 1), (3, 2)) == 2 * seconds((4, 1))
    assert seconds((4, 1), (1, 0)) == seconds((4, 1), (1, 4)) == seconds((4, 1))
