"""`custom_machine`: chips that are known on a fabric that is the user's own."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from emulator.machines import fabric_text
from emulator.machines.cloudmatrix384 import cloudmatrix384
from emulator.machines.fabric import Fabric, Tier, Transport
from emulator.machines.fact import build, cite
from emulator.machines.levels import Level
from emulator.machines.machine import Machine
from emulator.machines.power import Power
from emulator.machines.wiring import check_names

_LARGEST_LINKS = 2**25
_WANTED = (
    "custom_machine: fabric must be a line of text, the path of a TOML file or a sequence of at "
    "least one Level"
)
_GIVEN = "the user's description"


def custom_machine(
    fabric: str | os.PathLike[str] | Sequence[Level],
    *,
    like: Machine | None = None,
    name: str | None = None,
    links: Mapping[str, Any] | None = None,
    node_levels: int = 1,
) -> Machine:
    """A machine with a fabric of the user's own: `custom_machine("ring(4, 50GB/s, 300ns)")`.

    Every device is one die of `like` and has its own links on every level. Collectives use the
    links at their full rates, without any start-up, by the shortest way in the order of the levels.

    Args:
        fabric: levels from the inside out, as one line of text
            ("full_mesh(8, 56GB/s, 0.2us) / switch(48, 196GB/s, 1us)"), the path of a TOML file
            (ending in .toml), or `Level` records; see `emulator.machines.fabric_text`.
        like: the machine whose chip, power and arithmetic are taken (default: CloudMatrix 384).
        name: what reports call it.
        links: {link name: rate} of single links that differ, in bytes per second or as "25GB/s".
        node_levels: how many of the inner levels make a node, in the sense of hierarchical
            algorithms.

    Raises:
        TypeError, ValueError: a description that cannot be built, and where.
    """
    base = cloudmatrix384("die") if like is None else like
    if not isinstance(base, Machine):
        raise TypeError(f"custom_machine: like must be a Machine; got {like!r}")
    if not isinstance(fabric, str | os.PathLike | Sequence):
        raise TypeError(f"{_WANTED}; got {fabric!r}")
    rates: dict[str, float] = {}
    if isinstance(fabric, os.PathLike) or (isinstance(fabric, str) and fabric.endswith(".toml")):
        levels, rates, given_name = fabric_text.read(fabric)
        name = name or given_name
    elif isinstance(fabric, str):
        levels = fabric_text.parse(fabric)
    else:
        levels = tuple(fabric)
    if not isinstance(links, Mapping | None) or not all(
        isinstance(link, str) for link in links or ()
    ):
        raise TypeError(
            "custom_machine: links must map link names to rates, as in "
            f'{{"ring1/0-1": "25GB/s"}}; got {links!r}'
        )
    if not isinstance(name, str | None):
        raise TypeError(f"custom_machine: name must be a text; got {name!r}")
    for link, value in (links or {}).items():
        rates[link] = fabric_text.rate(f"custom_machine: links[{link!r}]", value)
    _check(levels, node_levels)
    count = math.prod(level.size for level in levels)
    node = math.prod(level.size for level in levels[:node_levels])
    title = " / ".join(f"{v.kind}({', '.join(map(str, v.sizes))})" for v in levels)
    machine = build(
        Machine,
        cite(
            "assumed",
            _GIVEN,
            num_devices=count,
            dies_per_device=1,
            devices_per_node=node,
            packages=count,
            pods=1,
        ),
        cite(
            "assumed",
            f"in proportion to the dies of {base.name}",
            headline_bf16_flops_per_s=base.headline_bf16_flops_per_s * count / base.num_dies,
        ),
        name=name or title,
        device_kind="device",
        chip=base.chip,
        fabric=_fabric(levels, rates, title, node),
        power=_power(levels, base, count),
        arithmetic=base.arithmetic,
    )
    check_names(machine)
    return machine


def _check(levels: tuple[Level, ...], node_levels: int) -> None:
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise TypeError(f"{_WANTED}; got {levels!r}")
    names = [level.name for level in levels]
    if len(set(names)) != len(names):
        raise ValueError(f"custom_machine: the levels need different names; got {names}")
    whole = isinstance(node_levels, int) and not isinstance(node_levels, bool)
    if not whole or not 1 <= node_levels <= len(levels):
        raise ValueError(
            f"custom_machine: node_levels must be 1..{len(levels)}; got {node_levels!r}"
        )
    count = math.prod(level.size for level in levels)
    most = max(level.size if level.kind == "full_mesh" else level.planes for level in levels)
    if count * most > _LARGEST_LINKS:
        raise ValueError(
            f"custom_machine: {count} devices with up to {most} links on a level are more than the "
            f"{_LARGEST_LINKS} that are modelled; a switch stands for a large full mesh"
        )


def _fabric(levels: tuple[Level, ...], rates: Mapping[str, float], title: str, node: int) -> Fabric:
    tiers = tuple(
        build(
            Tier,
            cite(
                "assumed",
                _GIVEN,
                bytes_per_s=level.bytes_per_s,
                read_bytes_per_s=level.bytes_per_s,
                write_bytes_per_s=level.bytes_per_s,
                read_latency_s=level.latency_s,
                write_latency_s=level.latency_s,
            ),
            name=level.name,
            link=level.name,
        )
        for level in levels
    )
    ideal = build(
        Transport,
        cite(
            "assumed",
            "ideal: links at their rate, nothing else costs time",
            startup_s=0.0,
            reduce_startup_s=0.0,
            step_s=0.0,
            overlap_s=0.0,
            rates_bytes_per_s=tuple((level.name, level.bytes_per_s) for level in levels),
            reduce_s_per_byte=0.0,
        ),
        name="ideal",
        scope=levels[-1].name,
        reads=False,
    )
    planes = max(level.planes for level in levels)
    return build(
        Fabric,
        cite(
            "assumed",
            _GIVEN,
            planes=planes,
            lane_bytes_per_s=levels[-1].bytes_per_s / levels[-1].planes,
            switches_per_plane=1,
            node_uplink_bytes_per_s=levels[-1].bytes_per_s * node / levels[-1].taper,
        ),
        name=title,
        tiers=tiers,
        transports=(ideal,),
        in_network_reduction=False,
        levels=levels,
        overrides=tuple(sorted(rates.items())),
    )


def _power(levels: tuple[Level, ...], base: Machine, count: int) -> Power:
    """That of `base`, a die's part of each package; any link may cost what the base's cheapest or
    dearest does.
    """
    power, part = base.power, count / base.num_dies
    why = f"a die's part of {base.name}"

    def scaled(interval: tuple[float, float], factor: float) -> tuple[float, float]:
        return interval[0] * factor, interval[1] * factor

    energies = [interval for _, interval in power.link_j_per_byte]
    hull = (min(low for low, _ in energies), max(high for _, high in energies))
    return build(
        Power,
        cite(
            "assumed",
            why,
            idle_device_w=scaled(power.idle_device_w, base.packages / base.num_dies),
            active_device_w=scaled(power.active_device_w, base.packages / base.num_dies),
            peak_device_w=scaled(power.peak_device_w, base.packages / base.num_dies),
            optics_w=scaled(power.optics_w, part),
            cpu_w=scaled(power.cpu_w, part),
            switch_w=scaled(power.switch_w, part),
            system_w=scaled(power.system_w, part),
            cooling_share=power.cooling_share,
            matmul_j_per_flop=power.matmul_j_per_flop,
            vector_j_per_flop=power.vector_j_per_flop,
            memory_j_per_byte=power.memory_j_per_byte,
            l2_j_per_byte=power.l2_j_per_byte,
        ),
        cite(
            "assumed",
            f"between the least and the most of {base.name}'s tiers",
            link_j_per_byte=tuple((level.name, hull) for level in levels),
        ),
    )
