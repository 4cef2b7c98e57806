"""Ragged all_to_all: delivered as its counts say, in time, and how it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulator as em
from emulator.collectives import check, ragged_all_to_all
from emulator.collectives.ragged import RAGGED
from emulator.collectives.symbolic import trace

DIES, PACKAGES, RACK = em.cloudmatrix384("die"), em.cloudmatrix384(), em.gb200_nvl72()


def tables(n: int) -> st.SearchStrategy:
    row = st.lists(st.integers(0, 5), min_size=n, max_size=n)
    return st.lists(row, min_size=n, max_size=n)


@given(table=st.integers(1, 7).flatmap(tables), algorithm=st.sampled_from(RAGGED))
def test_every_piece_arrives_where_the_counts_say(table: list, algorithm: str) -> None:
    """Against NumPy's split and concatenate; the checker agrees."""
    schedule = ragged_all_to_all(table, algorithm)
    check(schedule)
    n, slots = len(table), schedule.slots
    final = trace(schedule).final
    sent = [np.split(r * slots + np.arange(sum(row)), np.cumsum(row)[:-1])
            for r, row in enumerate(table)]  # fmt: skip
    for rank in range(n):
        arrived = np.concatenate([sent[source][rank] for source in range(n)])
        start = schedule.ragged_start
        assert final[rank, start : start + len(arrived)].tolist() == arrived.tolist()


def test_the_checker_finds_what_is_lost_or_misplaced() -> None:
    schedule = ragged_all_to_all([[1, 2], [3, 0]])
    (step,) = schedule.rounds
    lost = dataclasses.replace(step, **{
        name: getattr(step, name)[1:]
        for name in ("src", "dst", "src_slot", "dst_slot", "width", "reduce")
    })  # fmt: skip
    with pytest.raises(ValueError, match="rank 0 should end with slot 0 of rank 0 in its slot 3"):
        check(dataclasses.replace(schedule, rounds=(lost,)))
    moved = dataclasses.replace(step, src_slot=step.src_slot[[1, 0, 2]])
    with pytest.raises(ValueError, match="should end with slot"):
        check(dataclasses.replace(schedule, rounds=(moved,)))


@given(data=st.data(), machine=st.sampled_from([DIES, PACKAGES, RACK]))
@settings(max_examples=50)
def test_laws(data: st.DataObject, machine: em.Machine) -> None:
    n = data.draw(st.integers(1, 6))
    devices = data.draw(st.permutations(range(0, 60, 5)))[:n]
    table = np.array(data.draw(tables(n))) * data.draw(st.sampled_from([1, 1000, 10**6]))
    more = table + np.array(data.draw(tables(n)))
    for name in (*RAGGED, None):
        small = em.all_to_all_v(table.tolist(), machine, devices, name)
        assert 0 <= small.bound_s <= small.time_s
        assert (small.time_s == 0) == (not (table - np.diag(np.diag(table))).any())
        if name:
            kept = {"algorithm": name, "transport": small.transport}
            assert small.time_s <= em.all_to_all_v(more.tolist(), machine, devices, **kept).time_s


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("machine", [DIES, PACKAGES, RACK], ids=lambda m: m.device_kind)
def test_even_counts_are_an_all_to_all(machine: em.Machine, name: str) -> None:
    n, each = 12, 4096
    ragged = em.all_to_all_v([[each] * n] * n, machine, range(n), name)
    even = em.collective("all_to_all", 2 * n * each, machine, range(n), name)
    for field in ("nbytes", "link_bytes", "steps", "transport"):
        assert getattr(ragged, field) == getattr(even, field)
    assert ragged.time_s == pytest.approx(even.time_s, rel=1e-12)
    assert ragged.bound_s == pytest.approx(even.bound_s, rel=1e-12)
    assert ragged.busbw == pytest.approx(even.busbw, rel=1e-12)


def test_choice() -> None:
    def chosen(count: int, machine: em.Machine, devices: range) -> tuple[str, str]:
        answer = em.all_to_all_v([[0, count], [1, 0]], machine, devices)
        assert answer.reason
        return answer.algorithm, answer.transport

    assert chosen(2**19, DIES, range(2)) == ("full_mesh", "aiv_small")  # 1 MiB of bfloat16
    assert chosen(2**19 + 1, DIES, range(2)) == ("full_mesh", "sdma")
    assert chosen(1, DIES, range(0, 32, 16)) == ("full_mesh", "sdma")
    assert chosen(1, RACK, range(2)) == ("full_mesh", "nvlink_ll")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"counts": [[1]]}, ValueError, "counts must have 2 rows of 2 numbers"),
        ({"counts": [[1, 2], [3]]}, ValueError, "counts must have 2 rows of 2 numbers"),
        ({"counts": 7}, TypeError, "counts must be rows of whole numbers"),
        ({"counts": [[1, 0.5], [1, 1]]}, TypeError, "every count must be a whole number; got 0.5"),
        ({"counts": [[1, -3], [1, 1]]}, ValueError, r"counts\[0\] has a negative number: -3"),
        ({"counts": [[1, 2**30], [1, 1]]}, ValueError, "at most 2.29 are modelled"),
        ({"algorithm": "ring"}, ValueError, "unknown algorithm 'ring' for a ragged all_to_all"),
        ({"dtype": "bf16"}, ValueError, "unknown dtype 'bf16'"),
        ({"on": None}, TypeError, "on must be a Machine"),
        ({"transport": "pigeon"}, ValueError, "has no transport 'pigeon'"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        em.all_to_all_v(**({"counts": [[1, 1], [1, 1]], "on": DIES, "devices": [0, 1]} | changes))
