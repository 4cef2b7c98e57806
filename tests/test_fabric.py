"""Collectives in time: laws, the physical bound, published closed forms and measured points."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.collectives import ALGORITHMS, OPS, Group, Schedule, build, hierarchical, make_round
from emulator.fabric import all_to_all_v, bound_s, choose, collective, time_schedule
from emulator.machines import Machine, cite, cloudmatrix384, custom_machine, gb200_nvl72
from emulator.machines import build as build_record
from emulator.machines.fabric import Fabric, Tier, Transport

MACHINES = [cloudmatrix384(), cloudmatrix384(device="die"), gb200_nvl72()]
CASES = [(op, name) for op in OPS for name in ALGORITHMS[op]]


@st.composite
def situations(draw: st.DrawFn) -> tuple[Machine, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """A machine, some of its devices in any order, and a permutation of them."""
    machine = draw(st.sampled_from(MACHINES))
    numbers = st.integers(0, machine.num_devices - 1) | st.integers(0, 20)
    devices = tuple(draw(st.lists(numbers, min_size=1, max_size=14, unique=True)))
    return machine, devices, tuple(zip(devices, draw(st.permutations(devices)), strict=True))


def extra(op: str, pairs: tuple[tuple[int, int], ...]) -> dict:
    return {"pairs": pairs} if op == "permute" else {}


@pytest.mark.parametrize(("op", "name"), CASES)
@given(
    situation=situations(),
    nbytes=st.integers(1, 2**34),
    more=st.integers(0, 2**20) | st.integers(0, 2**33),
)
@settings(max_examples=12)
def test_laws(op: str, name: str, situation: tuple, nbytes: int, more: int) -> None:
    """Never below the bound, never faster for more bytes, nothing for one participant."""
    machine, devices, pairs = situation
    for algorithm in (name, None):
        answer = collective(op, nbytes, machine, devices, algorithm, **extra(op, pairs))
        assert answer.time_s >= answer.bound_s >= 0
        if len(devices) == 1:
            assert answer.time_s == answer.bound_s == answer.busbw == 0 and not answer.link_bytes
    small = collective(op, nbytes, machine, devices, name, **extra(op, pairs))
    large = collective(op, nbytes + more, machine, devices, name, **extra(op, pairs))
    assert small.time_s <= large.time_s
    kept = collective(
        op, nbytes + more, machine, devices, name, transport=small.transport, **extra(op, pairs)
    )
    assert small.time_s <= kept.time_s and large.time_s <= kept.time_s


@pytest.mark.parametrize(("op", "name"), CASES)
@given(situation=situations(), shift=st.integers(0, 47))
@settings(max_examples=5)
def test_moving_a_group_by_whole_nodes_changes_nothing(
    op: str, name: str, situation: tuple, shift: int
) -> None:
    machine, devices, pairs = situation
    offset = shift * machine.devices_per_node

    def moved(device: int) -> int:
        return (device + offset) % machine.num_devices

    other = tuple((moved(s), moved(d)) for s, d in pairs)
    a = collective(op, 2**20, machine, devices, name, **extra(op, pairs))
    b = collective(op, 2**20, machine, [moved(d) for d in devices], name, **extra(op, other))
    assert a.time_s == pytest.approx(b.time_s, rel=1e-12) and a.bound_s == pytest.approx(b.bound_s)


@pytest.mark.parametrize("op", [op for op in OPS if op != "permute"])
def test_the_whole_pod(op: str) -> None:
    answer = collective(op, 2**30, cloudmatrix384())
    assert len(answer.devices) == 384
    assert 0 < answer.bound_s < answer.time_s < 1000 * answer.bound_s  # 383 x for the direct forms
    assert answer.reason and answer.assumptions and answer.steps >= 1
    assert dict(answer.link_bytes)["pod"] > 0


def test_rounding_never_puts_a_time_below_its_bound() -> None:
    """Ideal links without latency: times are bounds, but for the order of their sums."""
    cases = [
        (
            "mesh(2, 2, 33.333GB/s) / full_mesh(2, 33.333GB/s)",
            "all_to_all",
            (7, 1, 5, 2, 3, 6, 0, 4),
        ),
        ("switch(4, 33.333GB/s, planes=3, taper=2.5)", "gather", (2, 3)),
        ("switch(4, 777GB/s, planes=5)", "all_gather", (0, 1, 2)),
    ]
    for fabric, op, devices in cases:
        machine = custom_machine(fabric)
        for nbytes in (989784, 67108864, 12345678):
            answer = collective(op, nbytes, machine, devices)
            assert answer.time_s >= answer.bound_s
            counts = [[nbytes + 7 * i + j for j in range(3)] for i in range(3)]
            ragged = all_to_all_v(counts, machine, devices=range(3))
            assert ragged.time_s >= ragged.bound_s


@pytest.mark.parametrize("op", [op for op in OPS if op != "permute"])
def test_thousands_of_devices(op: str) -> None:
    """No default is quadratic in them; quick enough to be asked for on a whim."""
    machine = custom_machine("switch(8, 100GB/s, 1us) / switch(512, 50GB/s, 1us, planes=2)")
    answer = collective(op, 2**30, machine)
    assert answer.time_s >= answer.bound_s > 0
    pods = cloudmatrix384("die", pods=6)
    chosen, _ = choose(op, 2**30, pods.devices, pods)
    assert chosen == answer.algorithm


def test_bounds_by_hand() -> None:
    """The cut each bound takes, on paper."""
    pod, die, rack = MACHINES
    everyone = tuple(range(384))
    size = 2**30
    port = 2 * 196e9  # a package's two dies
    assert bound_s("all_reduce", size, pod, everyone) == pytest.approx(2 * 383 / 384 * size / port)
    assert bound_s("all_gather", size, pod, everyone) == pytest.approx(383 / 384 * size / port)
    assert bound_s("broadcast", size, pod, everyone) == pytest.approx(size / port)
    assert bound_s("all_to_all", size, pod, everyone) == pytest.approx(383 / 384 * size / port)
    # Dies of one package reach each other through their own link as well as through the switches.
    assert bound_s("all_gather", size, die, (0, 1)) == pytest.approx(size / 2 / (270e9 + 196e9))
    # Four dies in two packages: a package must take in two blocks through 392 GB/s.
    assert bound_s("all_gather", size, die, (0, 1, 2, 3)) == pytest.approx(
        max(3 / 4 * size / (466e9), 2 / 4 * size / 392e9)
    )
    # A switch that can add halves what an all_reduce needs.
    assert bound_s("all_reduce", size, rack, tuple(range(72))) == pytest.approx(size / 900e9)
    assert bound_s("permute", size, pod, (0, 9), pairs=((0, 1), (1, 0))) == pytest.approx(
        size / port
    )
    assert bound_s("permute", size, pod, (0, 9), pairs=((0, 0),)) == 0


# --- closed forms published for 8 x 48 switches ---------------------------------------------------

RATE = 196 * 2**30  # the published cases use GiB


def switches(per_node: int, nodes: int, inner_s: float, outer_s: float) -> Machine:
    """An ideal two-tier machine: no start-up, full rates, the given latency per step."""

    def tier(name: str, latency_s: float) -> Tier:
        return Tier(
            name=name,
            link="port",
            bytes_per_s=RATE,
            read_bytes_per_s=RATE,
            write_bytes_per_s=RATE,
            read_latency_s=latency_s,
            write_latency_s=latency_s,
        )

    ideal = Transport(
        name="ideal",
        scope="pod",
        reads=False,
        startup_s=0.0,
        reduce_startup_s=0.0,
        step_s=0.0,
        overlap_s=0.0,
        rates_bytes_per_s=(("node", RATE), ("pod", RATE)),
        reduce_s_per_byte=0.0,
    )
    fabric = build_record(
        Fabric,
        cite(
            "assumed",
            "test",
            planes=1,
            lane_bytes_per_s=RATE,
            switches_per_plane=1,
            node_uplink_bytes_per_s=per_node * RATE,
        ),
        name="ideal switches",
        tiers=(tier("node", inner_s), tier("pod", outer_s)),
        transports=(ideal,),
        in_network_reduction=False,
    )
    n = per_node * nodes
    return dataclasses.replace(
        cloudmatrix384(),
        name=f"{per_node} x {nodes} switches",
        num_devices=n,
        dies_per_device=1,
        devices_per_node=per_node,
        packages=n,
        fabric=fabric,
    )


def rings(op: str):  # noqa: ANN201
    def algorithm(group: Group) -> Schedule:
        return getattr(hierarchical, op)(group, inner="ring", outer="ring")

    return algorithm


@pytest.mark.parametrize(
    ("size", "expected_ns"), [(2**30, 10_371_109), (2**20, 203_539)], ids=["1GiB", "1MiB"]
)
def test_hierarchical_ring_all_reduce_closed_form(size: int, expected_ns: int) -> None:
    machine = switches(8, 48, 400e-9, 2000e-9)  # a switch counts two hops of 200 and 1000 ns
    answer = collective("all_reduce", size, machine, algorithm=rings("all_reduce"), dtype="int8")
    assert answer.time_s * 1e9 == pytest.approx(expected_ns, rel=2e-4)  # slots are whole bytes


def test_hierarchical_ring_all_gather_closed_form() -> None:
    machine = switches(8, 48, 400e-9, 2000e-9)
    answer = collective("all_gather", 384 * 2**30, machine, algorithm=rings("all_gather"))
    assert answer.time_s * 1e9 == pytest.approx(1_954_178_433, rel=1e-6)


def test_flat_ring_all_reduce_closed_form() -> None:
    machine = switches(384, 1, 2000e-9, 2000e-9)
    answer = collective("all_reduce", 2**30, machine, algorithm="ring", dtype="int8")
    assert answer.time_s * 1e9 == pytest.approx(11_709_509, rel=1e-5)


def test_flat_direct_closed_form() -> None:
    """A full mesh sends (N - 1) / N of the bytes through one port: not N - 1 times faster."""
    machine = switches(384, 1, 2000e-9, 2000e-9)
    all_to_all = collective("all_to_all", 2**30, machine, algorithm="full_mesh", dtype="int8")
    assert all_to_all.time_s * 1e9 == pytest.approx(5_090_754, rel=1e-4)
    all_reduce = collective("all_reduce", 2**30, machine, algorithm="full_mesh", dtype="int8")
    assert all_reduce.time_s * 1e9 == pytest.approx(10_181_509, rel=1e-4)


def test_a_blocking_uplink_is_shared() -> None:
    machine = switches(8, 4, 0.0, 0.0)
    half = dataclasses.replace(
        machine,
        fabric=dataclasses.replace(machine.fabric, node_uplink_bytes_per_s=8 * RATE / 2),
    )
    pairs = [(d, (d + 8) % 32) for d in range(32)]
    free = collective("permute", 2**30, machine, pairs=pairs)
    shared = collective("permute", 2**30, half, pairs=pairs)
    assert shared.time_s == pytest.approx(2 * free.time_s)
    alone = collective("permute", 2**30, half, pairs=pairs[:1])
    assert alone.time_s == pytest.approx(free.time_s)


def test_a_shared_port_is_a_slowed_port() -> None:
    """Two messages into one device take twice as long as one."""
    machine = switches(8, 4, 0.0, 0.0)
    one = Schedule(
        op="all_gather",
        algorithm="x",
        ranks=3,
        slots=3,
        rounds=(make_round([1], [0], 1, 1, reduce=False),),
    )
    two = dataclasses.replace(
        one, rounds=(make_round([1, 2], [0, 0], [1, 2], [1, 2], reduce=False),)
    )
    apart = dataclasses.replace(
        one, rounds=(make_round([1, 0], [0, 1], [1, 0], [1, 0], reduce=False),)
    )
    size = 10**6
    base = time_schedule(one, machine, (0, 9, 17), size)
    assert time_schedule(two, machine, (0, 9, 17), size) == pytest.approx(2 * base)
    assert time_schedule(apart, machine, (0, 9, 17), size) == pytest.approx(base)


# --- arguments ------------------------------------------------------------------------------------


def test_packages_halve_between_their_dies() -> None:
    """Eight packages with S bytes take as long as eight dies, one in each, with S / 2."""
    whole = collective("all_reduce", 2**26, cloudmatrix384(), range(8), "ring")
    half = collective("all_reduce", 2**25, cloudmatrix384("die"), range(0, 16, 2), "ring")
    assert whole.time_s == half.time_s
    assert dict(whole.link_bytes) == {t: 2 * b for t, b in half.link_bytes}


def test_link_bytes_and_bandwidths() -> None:
    answer = collective("all_gather", 16 * 2**20, cloudmatrix384("die"), range(16), "full_mesh")
    assert dict(answer.link_bytes) == {"package": 16 * 2**20, "node": 16 * 14 * 2**20}
    assert answer.algbw == answer.nbytes / answer.time_s
    assert answer.busbw == pytest.approx(answer.algbw * 15 / 16)
    assert collective("all_reduce", 0, cloudmatrix384()).time_s == 0


def test_bad_arguments() -> None:
    machine = cloudmatrix384()
    with pytest.raises(
        ValueError, match="unknown collective operation 'allreduce'; known: all_reduce"
    ):
        collective("allreduce", 8, machine)
    with pytest.raises(ValueError, match="unknown algorithm 'nhr' for all_to_all; known: ring"):
        collective("all_to_all", 8, machine, algorithm="nhr")
    with pytest.raises(ValueError, match="nbytes must be at least 0; got -8"):
        collective("all_reduce", -8, machine)
    with pytest.raises(TypeError, match="nbytes must be a whole number; got 0.5"):
        collective("all_reduce", 0.5, machine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on must be a Machine"):
        collective("all_reduce", 8, "cloudmatrix384")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"devices \[3\] are listed more than once"):
        collective("all_reduce", 8, machine, [3, 3])
    with pytest.raises(ValueError, match=r"devices \[400\] are outside CloudMatrix 384"):
        collective("all_reduce", 8, machine, [3, 400])
    with pytest.raises(ValueError, match="broadcast: root 9 is not among devices"):
        collective("broadcast", 8, machine, range(4), root=9)
    with pytest.raises(ValueError, match="unknown dtype 'bf16'"):
        collective("all_reduce", 8, machine, dtype="bf16")
    with pytest.raises(ValueError, match="permute needs pairs="):
        collective("permute", 8, machine)
    with pytest.raises(ValueError, match=r"device 7 of pair \(0, 7\) is not among devices"):
        collective("permute", 8, machine, range(4), pairs=[(0, 7)])
    with pytest.raises(ValueError, match="pairs= belongs to permute"):
        collective("all_reduce", 8, machine, pairs=[(0, 1)])
    with pytest.raises(ValueError, match="'aiv_small' reaches only within one node"):
        collective("all_reduce", 8, machine, transport="aiv_small")
    with pytest.raises(ValueError, match="has no transport 'carrier pigeon'"):
        collective("all_reduce", 8, machine, transport="carrier pigeon")
    with pytest.raises(ValueError, match="has no transport ''"):
        collective("all_reduce", 8, machine, transport="")
    assert collective("broadcast", 8, machine, range(8, 16)).time_s > 0  # root: the first device


def test_users_algorithm_is_timed_and_checked() -> None:
    def backwards(group: Group) -> Schedule:
        return build("all_reduce", "ring", group)

    def lossy(group: Group) -> Schedule:
        ring = build("all_reduce", "ring", group)
        return dataclasses.replace(ring, rounds=ring.rounds[:1])

    machine = cloudmatrix384()
    assert (
        collective("all_reduce", 2**20, machine, range(8), backwards).time_s
        == collective("all_reduce", 2**20, machine, range(8), "ring").time_s
    )
    with pytest.raises(
        ValueError, match=r"all_reduce by 'ring'.*rank 0.*ranks 0, 1, ... are devices 8, 9, 10"
    ):
        collective("all_reduce", 2**20, machine, range(8, 16), lossy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": ["all_reduce"]}, "op must be a name"),
        ({"algorithm": ["ring"]}, "algorithm must be a name"),
        ({"nbytes": 16.0}, "nbytes must be a whole number"),
        ({"nbytes": True}, "nbytes must be a whole number"),
        ({"devices": 5}, "devices must be a sequence"),
        ({"devices": {0, 1}}, "devices must be a sequence .* in rank order"),
        ({"devices": {0: 1}}, "devices must be a sequence"),
        ({"devices": b"ab"}, "devices must be a sequence"),
        ({"on": []}, "on must be a Machine"),
        ({"devices": [0.0, 1.0]}, "every device must be a whole number"),
        ({"op": "permute", "pairs": [5]}, "pairs must be .source, destination. pairs"),
        ({"op": "permute", "pairs": [(0, 1, 2)]}, "pairs must be .source, destination. pairs"),
        ({"op": "broadcast", "root": [1]}, "root must be a whole number"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named_whatever_was_asked_before(arguments, message):
    good = {"op": "all_reduce", "nbytes": 16, "devices": [0, 1]}
    collective(**good, on=cloudmatrix384())
    with pytest.raises(TypeError, match=message):
        collective(**({"on": cloudmatrix384()} | good | arguments))


@pytest.mark.parametrize("op", ["broadcast", "reduce"])
@pytest.mark.parametrize("n", [4, 8, 16])
def test_steps_from_and_to_a_root(op: str, n: int) -> None:
    """Blocks of a full mesh go to (or come from) all ranks at once, others by halves."""
    on = cloudmatrix384("die")
    steps = {
        name: collective(op, 2**20, on, range(n), name, dtype="int8").steps
        for name in ("full_mesh", "nhr", "rhd")
    }
    halvings = n.bit_length() - 1
    assert steps == {"full_mesh": 2, "nhr": 2 * halvings, "rhd": 2 * halvings}
