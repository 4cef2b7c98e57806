"""Laws of timed collectives over random algorithms, groups, sizes and fabrics, broken ones too."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulator as em
from emulator.collectives import ALGORITHMS, OPS, flat
from tests.random_machines import groups, machines

ROOTED = ("broadcast", "reduce", "scatter", "gather")


def check_laws(data: st.DataObject) -> None:
    machine = data.draw(machines())
    devices = data.draw(groups(machine) | st.sampled_from(machine.devices).map(lambda d: [d]))
    op = data.draw(st.sampled_from(OPS))
    names = st.sampled_from([*ALGORITHMS[op]])
    if op in ("all_reduce", "reduce_scatter", "all_gather"):
        level = st.sampled_from([*flat.LEVELS])
        names |= st.tuples(level, level).map("/".join)
    asked: dict[str, Any] = {"op": op, "devices": devices, "algorithm": data.draw(names)}
    if op in ROOTED:
        asked["root"] = data.draw(st.sampled_from(devices))
    if op == "permute":
        asked["pairs"] = [*zip(devices, data.draw(st.permutations(devices)), strict=True)]
    nbytes = data.draw(st.integers(0, 2**12) | st.integers(0, 2**33))
    more = data.draw(st.integers(1, 2**12) | st.integers(1, 2**33))
    answer = em.collective(nbytes=nbytes, on=machine, **asked)
    assert answer.bound_s <= answer.time_s
    if len(devices) == 1:
        assert answer.time_s == 0
    asked["transport"] = answer.transport
    assert answer.time_s <= em.collective(nbytes=nbytes + more, on=machine, **asked).time_s
    if machine.faults:
        return
    link = data.draw(st.sampled_from([link.name for link in machine.links()][:400]))
    if "host" in link or "rdma" in link:  # beside the planes: no collective uses them
        return
    broken = machine.degrade(links={link: data.draw(st.sampled_from([0.0, 0.3]))})
    try:
        hurt = em.collective(nbytes=nbytes, on=broken, **asked)
    except ValueError as error:
        assert "cut off" in str(error)
        return
    assert hurt.bound_s <= hurt.time_s
    assert answer.time_s <= hurt.time_s * (1 + 1e-12) and answer.bound_s <= hurt.bound_s


@given(data=st.data())
@settings(max_examples=100)
def test_laws(data: st.DataObject) -> None:
    check_laws(data)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=4000)
def test_laws_at_length(data: st.DataObject) -> None:
    check_laws(data)
