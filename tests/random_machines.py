"""Machines and groups of devices that nobody chose: strategies for laws."""

from __future__ import annotations

import math

from hypothesis import assume
from hypothesis import strategies as st

import emulator as em
from emulator.machines import Machine

FAULTS = ({"planes": [2]}, {"links": {"node0/plane1": 0.5}}, {"links": {"device1": 0.5}})
POD = em.cloudmatrix384()


@st.composite
def fabrics(draw: st.DrawFn) -> Machine:
    """Levels of every kind, sometimes with a slow link."""
    parts, count = [], 1
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["full_mesh", "ring", "mesh", "torus", "switch", "switch"]))
        grid = kind in ("mesh", "torus")
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3 if grid else 1))
        rate, latency = draw(st.sampled_from([25, 50, 196])), draw(st.sampled_from([0.3, 1]))
        more = ""
        if kind == "switch":
            more = f", planes={draw(st.integers(1, 3))}, taper={draw(st.sampled_from([1, 2.5]))}"
        parts.append(f"{kind}({', '.join(map(str, sizes))}, {rate}GB/s, {latency}us{more})")
        count *= math.prod(sizes)
    assume(1 < count < 400)
    machine = em.custom_machine(" / ".join(parts), node_levels=draw(st.integers(1, len(parts))))
    if draw(st.integers(0, 4)) == 0:
        links = [link.name for link in machine.links()]
        assume(links)
        machine = machine.degrade(links={draw(st.sampled_from(links)): 0.4})
    return machine


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    if draw(st.booleans()):
        return draw(fabrics())
    pod = em.cloudmatrix384(
        draw(st.sampled_from(["package", "die"])), draw(st.sampled_from([1, 2]))
    )
    return draw(st.sampled_from([pod, em.gb200_nvl72(), *(POD.degrade(**f) for f in FAULTS)]))


@st.composite
def groups(draw: st.DrawFn, machine: Machine) -> list[int]:
    count = draw(st.integers(2, min(len(machine.devices), 40)))
    numbers = machine.devices
    if draw(st.booleans()):
        return [*numbers[:count]]
    near = st.sampled_from(numbers[: max(count, 60)])
    return draw(st.lists(near | st.sampled_from(numbers), min_size=2, max_size=count, unique=True))
