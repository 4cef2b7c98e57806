"""Expert exchange in time: the measured points, laws, skewed routing, bad arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulator as em
from emulator.machines.calibration import rows

DIES, PACKAGES, RACK = em.cloudmatrix384("die"), em.cloudmatrix384(), em.gb200_nvl72()
PHASES = ("dispatch", "combine")
DISPATCH, COMBINE = 7680, 14336  # bytes of a copy: INT8 with scales, BF16


@pytest.mark.parametrize("row", rows("expert_exchange"), ids=lambda r: r["phase"])
def test_measured_points(row: dict[str, str]) -> None:
    sizes = (int(row[name]) for name in ("tokens", "top_k", "token_bytes"))
    answer = em.expert_exchange(row["phase"], *sizes, on=DIES, devices=range(int(row["ranks"])))
    assert answer.time_s * 1e6 == pytest.approx(float(row["us"]), rel=1e-3)


def test_eight_dies_by_hand() -> None:
    """1,024 copies a die: an eighth stays, an eighth goes to the other die of the package."""
    answer = em.expert_exchange("dispatch", 128, 8, DISPATCH, on=DIES, devices=range(8))
    fixed_s = dict(DIES.fabric.exchange_s)["dispatch"]
    node, package = DIES.fabric.tier("node"), DIES.fabric.tier("package")
    waiting_s = (768 * node.write_latency_s + 128 * package.write_latency_s) / 48
    largest = 1024 + 1.434 * math.sqrt(1024 * 7 / 8)  # of 8 normal deviates, about
    wire_s = 6 / 8 * largest * DISPATCH / node.write_bytes_per_s
    assert answer.time_s == pytest.approx(fixed_s + waiting_s + wire_s, rel=1e-4)
    back = em.expert_exchange("combine", 128, 8, DISPATCH, on=DIES, devices=range(8))
    fixed_s = dict(DIES.fabric.exchange_s)["combine"]
    assert back.time_s == pytest.approx(fixed_s + wire_s, rel=1e-4)  # which hides the waiting
    small = em.expert_exchange("combine", 128, 8, 32, on=DIES, devices=range(8))
    assert small.time_s == pytest.approx(fixed_s + waiting_s * largest / 1024, rel=1e-4)
    assert dict(answer.link_bytes) == {"package": 8 * 128 * DISPATCH, "node": 8 * 768 * DISPATCH}
    assert answer.nbytes == 1024 * DISPATCH
    assert answer.busbw == pytest.approx(answer.algbw * 7 / 8)


@pytest.mark.parametrize(("phase", "token_bytes"), [("dispatch", DISPATCH), ("combine", COMBINE)])
def test_grows_with_the_number_of_dies_ever_more_slowly(phase: str, token_bytes: int) -> None:
    times = [
        em.expert_exchange(phase, 128, 8, token_bytes, on=DIES, devices=range(n)).time_s
        for n in (16, 32, 64, 128, 256, 512)
    ]
    steps = np.diff(times)
    assert (steps > 0).all() and (np.diff(steps) < 0).all()
    assert times[-1] < 1.6 * times[0]


@given(
    phase=st.sampled_from(PHASES),
    machine=st.sampled_from([DIES, PACKAGES, RACK]),
    sizes=st.tuples(st.integers(0, 4096), st.integers(0, 16), st.integers(0, 20_000)),
    more=st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(0, 999)),
    data=st.data(),
)
@settings(max_examples=60)
def test_laws(phase, machine, sizes, more, data) -> None:  # noqa: ANN001
    numbers = st.integers(0, machine.num_devices - 1) | st.integers(0, 20)
    devices = data.draw(st.lists(numbers, min_size=1, max_size=10, unique=True))
    small = em.expert_exchange(phase, *sizes, on=machine, devices=devices)
    larger = (a + b for a, b in zip(sizes, more, strict=True))
    large = em.expert_exchange(phase, *larger, on=machine, devices=devices)
    assert 0 <= small.bound_s <= small.time_s <= large.time_s
    if len(devices) == 1:
        assert small.time_s == large.time_s == 0
    moved = [(d + machine.devices_per_node) % machine.num_devices for d in devices]
    other = em.expert_exchange(phase, *sizes, on=machine, devices=moved)
    assert other.time_s == pytest.approx(small.time_s, rel=1e-9)


@given(data=st.data(), machine=st.sampled_from([DIES, PACKAGES]), phase=st.sampled_from(PHASES))
@settings(max_examples=40)
def test_counts(data, machine, phase) -> None:  # noqa: ANN001
    """Given loads obey the bound; an even spread is no slower than the expected one of chance."""
    n = data.draw(st.integers(2, 6))
    devices = data.draw(st.permutations(range(0, 60, 5)))[:n]
    splits = st.lists(st.integers(0, 24), min_size=n - 1, max_size=n - 1)
    cuts = [[0, *sorted(data.draw(splits)), 24] for _ in range(n)]
    counts = np.diff(np.array(cuts), axis=1).tolist()
    asked = (phase, 12, 2, 9000, machine, devices)
    answer = em.expert_exchange(*asked, counts=counts)
    assert answer.bound_s <= answer.time_s
    if 24 % n == 0:
        even = em.expert_exchange(*asked, counts=[[24 // n] * n] * n)
        assert even.time_s <= em.expert_exchange(*asked).time_s
        assert even.bound_s == pytest.approx(em.expert_exchange(*asked).bound_s)


def test_skew_costs() -> None:
    """All to one: its port takes in what seven others send."""
    counts = [[1024, 0, 0, 0, 0, 0, 0, 0]] * 8
    asked = ("dispatch", 128, 8, DISPATCH, DIES, range(0, 16, 2))
    skewed, even = em.expert_exchange(*asked, counts=counts), em.expert_exchange(*asked)
    assert skewed.time_s > 3 * even.time_s
    # Nothing comes from the die beside it, so all enters its package through the lanes of two dies.
    assert skewed.bound_s == pytest.approx(7 * 1024 * DISPATCH / (2 * 196e9))
    back = em.expert_exchange("combine", *asked[1:], counts=counts)  # the one sends to all
    # In the dispatch seven dies' cores wait at once, beside the one port that all want.
    fixed_s = dict(DIES.fabric.exchange_s)
    node = DIES.fabric.tier("node")
    wire_s = 7 * 1024 * DISPATCH / node.write_bytes_per_s
    waiting_s = 1024 * node.write_latency_s / 48
    assert skewed.time_s == pytest.approx(fixed_s["dispatch"] + waiting_s + wire_s)
    assert back.time_s == pytest.approx(fixed_s["combine"] + max(7 * waiting_s, wire_s))
    # Of small copies the one that sends them all back waits for longer than the link works.
    small = em.expert_exchange("combine", 128, 8, 512, *asked[4:], counts=counts)
    assert small.time_s == pytest.approx(fixed_s["combine"] + 7 * waiting_s)
    assert 7 * waiting_s > wire_s * 512 / DISPATCH
    assert back.bound_s == skewed.bound_s
    assert dict(back.link_bytes) == dict(skewed.link_bytes)


def test_two_dies_of_a_package_share_its_tokens() -> None:
    whole = em.expert_exchange("dispatch", 256, 8, DISPATCH, on=PACKAGES, devices=range(4))
    dies = em.expert_exchange("dispatch", 128, 8, DISPATCH, on=DIES, devices=range(8))
    assert whole.time_s == pytest.approx(dies.time_s, rel=0.01)


@pytest.mark.parametrize("machine", [DIES, PACKAGES], ids=["die", "package"])
def test_faults_never_help(machine) -> None:  # noqa: ANN001
    asked = ("dispatch", 256, 8, DISPATCH)
    healthy = em.expert_exchange(*asked, on=machine, devices=range(24))
    slow = {"planes": [0]}, {"links": {"device5": 0.5}}, {"switches": ["node0/plane1"]}
    for fault in slow:
        hurt = em.expert_exchange(*asked, on=machine.degrade(**fault), devices=range(24))
        assert healthy.time_s < hurt.time_s and healthy.bound_s <= hurt.bound_s <= hurt.time_s
    # The same machine, link by link instead of by bundles, takes as long.
    elsewhere = machine.degrade(links={f"device{machine.num_devices - 1}": 0.5})
    same = em.expert_exchange(*asked, on=elsewhere, devices=range(24))
    assert same.time_s == pytest.approx(healthy.time_s, rel=1e-9)
    assert dict(same.link_bytes) == pytest.approx(dict(healthy.link_bytes), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"phase": "scatter"}, ValueError, "phase must be one of dispatch, combine; got 'scatter'"),
        ({"tokens": -1}, ValueError, "tokens must be at least 0; got -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be a whole number; got 1.5"),
        ({"token_bytes": 2**60}, ValueError, "at most 2.60"),
        ({"on": "pod"}, TypeError, "on must be a Machine"),
        ({"devices": [3, 3]}, ValueError, "listed more than once"),
        ({"devices": 8}, TypeError, "devices must be a sequence"),
        ({"counts": [[8, 8]]}, ValueError, "counts must have 2 rows of 2 numbers"),
        ({"counts": [[8, 9], [8, 8]]}, ValueError, r"counts\[0\] sums to 17; each device sends"),
        ({"counts": [[17, -1], [8, 8]]}, ValueError, r"counts\[0\] has a negative number: -1"),
        ({"counts": [[8.0, 8], [8, 8]]}, TypeError, "counts must be rows of whole numbers"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    good = {"phase": "dispatch", "tokens": 8, "top_k": 2, "token_bytes": 64, "on": DIES}
    with pytest.raises(error, match=message):
        em.expert_exchange(**({"devices": [0, 1], **good} | changes))
