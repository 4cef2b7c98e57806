"""A machine: how many devices of what, joined how."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from emulator.machines.chip import Chip
from emulator.machines.fabric import Fabric
from emulator.machines.fact import (
    Citation,
    Fact,
    check_counts,
    check_parts,
    check_positive,
    facts_of,
)
from emulator.machines.faults import NONE, Faults, factors, numbers
from emulator.machines.power import Power
from emulator.machines.wiring import Link, check_names, links

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A pod of `num_devices` devices, numbered node by node; die number = dies_per_device x device
    + die.

    `headline_bf16_flops_per_s` is the figure the press quotes for the whole machine;
    `quoted_bf16_flops_per_s()` is the vendor's chip figure times the chips, `matmul_flops_per_s()`
    what the matrix units alone can do. `arithmetic` names the preset of `kernels` that its matrix
    unit follows.
    """

    name: str
    device_kind: str
    num_devices: int
    dies_per_device: int
    devices_per_node: int
    packages: int
    chip: Chip
    fabric: Fabric
    power: Power
    arithmetic: str
    headline_bf16_flops_per_s: float
    pods: int = 1
    faults: Faults = NONE
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, "num_devices", "dies_per_device", "devices_per_node", "packages", "pods")
        check_positive(self, "headline_bf16_flops_per_s")
        check_parts(
            self, name=str, chip=Chip, fabric=Fabric, power=Power, faults=Faults, arithmetic=str
        )
        if self.packages > self.num_dies:
            raise ValueError(
                f"Machine {self.name}: packages {self.packages:,} are more than the "
                f"{self.num_dies:,} dies of num_devices x dies_per_device; correct one of them"
            )

    def __hash__(self) -> int:
        # Equal machines agree on these; hashing every number and citation would cost more than a
        # cached answer.
        return hash((self.name, self.device_kind, self.num_devices, self.faults))

    @property
    def num_dies(self) -> int:
        """Dies of the whole machine."""
        return self.num_devices * self.dies_per_device

    @property
    def num_nodes(self) -> int:
        """Nodes of the whole machine."""
        return -(-self.num_devices // self.devices_per_node)

    @property
    def devices(self) -> Sequence[int]:
        """The device numbers that are there."""
        if not self.faults.missing:
            return range(self.num_devices)
        missing = set(self.faults.missing)
        return tuple(d for d in range(self.num_devices) if d not in missing)

    @property
    def memory_bytes_per_device(self) -> int:
        """HBM of one device."""
        return self.chip.memory_bytes * self.dies_per_device

    def quoted_bf16_flops_per_s(self) -> float:
        """Dense BF16 FLOP/s of the whole machine, as the vendor quotes the chip."""
        return self.chip.quoted_bf16_flops_per_s * self.num_dies

    def matmul_flops_per_s(self, dtype: str = "bfloat16") -> float:
        """Dense FLOP/s of the matrix units of the whole machine."""
        return self.chip.matmul_flops_per_s(dtype) * self.num_dies

    def node_of(self, device: int) -> int:
        """The node (for NVL72: the NVLink domain) that `device` sits in."""
        if not 0 <= device < self.num_devices:
            raise ValueError(
                f"device {device} is outside {self.name}, which has devices "
                f"0..{self.num_devices - 1}"
            )
        return device // self.devices_per_node

    def check_devices(self, devices: Sequence[int]) -> tuple[int, ...]:
        """`devices` as a tuple of plain ints.

        Raises:
            TypeError: a device number is no integer.
            ValueError: a number is repeated or outside the machine, or there is none.
        """
        try:
            numbers = tuple(operator.index(d) for d in devices)
        except TypeError as error:
            raise TypeError(
                f"devices must be integers (device numbers); got {devices!r}"
            ) from error
        if not numbers:
            raise ValueError("devices is empty; give at least one device number")
        outside = [d for d in numbers if not 0 <= d < self.num_devices]
        if outside:
            raise ValueError(
                f"devices {outside[:5]} are outside {self.name}, which has devices "
                f"0..{self.num_devices - 1}"
            )
        if gone := sorted(set(numbers) & set(self.faults.missing)):
            raise ValueError(
                f"devices {gone[:5]} are missing from this {self.name} (degrade was told so); "
                "leave them out"
            )
        if len(set(numbers)) != len(numbers):
            repeated = sorted({d for d in numbers if numbers.count(d) > 1})
            raise ValueError(
                f"devices {repeated[:5]} are listed more than once; each may take part once"
            )
        return numbers

    def mesh(
        self, *, axis_types: Any = None, devices: Sequence[int] | None = None, **axis_sizes: int
    ) -> AbstractMesh:
        """An abstract mesh over this machine: `machine.mesh(dp=48, tp=8)`.

        The last axis varies fastest over device numbers, so it sits inside a node. Axes are `Auto`
        unless `axis_types` says otherwise. A mesh smaller than the machine takes the lowest
        numbers that are there, or `devices` in row-major mesh order.

        Raises:
            TypeError: an axis size or device number is no integer.
            ValueError: the mesh does not fit the machine, or `devices` does not fit the mesh.
        """
        size = 1
        for axis, value in axis_sizes.items():
            try:
                count = operator.index(value)
            except TypeError as error:
                raise TypeError(
                    f"mesh axis {axis!r} must have an integer size; got {value!r}"
                ) from error
            if isinstance(value, bool) or count < 1:
                raise ValueError(
                    f"mesh axis {axis!r} must have a size of at least 1; got {value!r}"
                )
            size *= count
        if not axis_sizes:
            raise ValueError("mesh has no axes; name at least one, as in machine.mesh(dp=48, tp=8)")
        shape = " x ".join(f"{axis}={value}" for axis, value in axis_sizes.items())
        if size > len(self.devices):
            raise ValueError(
                f"mesh {shape} has {size} devices, but {self.name} has {len(self.devices)} "
                f"({self.device_kind}s); make an axis smaller"
            )
        numbers = tuple(self.devices[:size]) if self.faults.missing else None
        if devices is not None:
            numbers = self.check_devices(devices)
            if len(numbers) != size:
                raise ValueError(
                    f"mesh {shape} needs {size} devices; devices= lists {len(numbers)}"
                )
        from emulator.mesh import abstract_mesh  # imports JAX, which records must not need

        return abstract_mesh(
            {axis: int(value) for axis, value in axis_sizes.items()}, axis_types, numbers
        )

    def links(self) -> Iterator[Link]:
        """Every link of the machine, one direction each, with what it can carry after all
        faults.
        """
        return links(self)

    def degrade(
        self,
        *,
        devices: Any = None,
        links: Any = None,
        planes: Any = None,
        switches: Any = None,
        missing: Any = None,
        missing_nodes: Any = None,
    ) -> Machine:
        """This machine with something wrong. Collectives take what is left of the fabric.

        A factor is the part of the healthy rate that is left: 0.5 is half as fast, 0 dead. Where
        only names are given, they are dead.

        Args:
            devices: {device number: factor} of the rate of its kernels (compute and memory).
            links: {name: factor} or names, as `machine.links()` gives them; with parts left out,
                all that fit: "die5/plane3/up", "device5", "node2/plane3/switch7". Not those to
                hosts and of RDMA cards.
            planes: {number: factor} or numbers of whole switch planes.
            switches: {name: factor} or names: "node2/plane3" (first level), "plane3/switch7"
                (second level).
            missing: device numbers that are not there; using one raises.
            missing_nodes: nodes whose devices all are not there.

        Raises:
            TypeError, ValueError: a name, number or factor that the machine cannot have.
            NotImplementedError: a link to a host or of an RDMA card.
        """
        nodes = numbers("missing_nodes", missing_nodes)
        gone = list(numbers("missing", missing))
        for node in nodes:
            if not 0 <= node < self.num_nodes:
                raise ValueError(
                    f"degrade: {self.name} has no node {node}; it has nodes 0..{self.num_nodes - 1}"
                )
            first = node * self.devices_per_node
            gone += range(first, min(first + self.devices_per_node, self.num_devices))
        slow = factors("devices", devices, key=int, dead=False)
        faults = Faults(
            devices=slow,
            links=factors("links", links, key=str),
            planes=factors("planes", planes, key=int),
            switches=factors("switches", switches, key=str),
            missing=tuple(gone),
        )
        for device in (*gone, *(d for d, _ in slow)):
            self.node_of(device)  # raises for a number outside the machine
        degraded = dataclasses.replace(self, faults=self.faults.and_also(faults))
        if not degraded.devices:
            raise ValueError(f"degrade: no device of {self.name} would be left")
        check_names(degraded)
        return degraded

    def slowness(self, devices: Sequence[int]) -> tuple[float, ...]:
        """How many times longer kernels take on each of `devices` than on a healthy one."""
        slow = dict.fromkeys(devices, 1.0)
        for device, factor in self.faults.devices:
            if device in slow:
                slow[device] /= factor
        return tuple(slow.values())

    def facts(self) -> Iterator[Fact]:
        """Every number of the machine with its unit, source and evidence."""
        yield from facts_of(self, per="machine")
        yield from facts_of(self.chip, per="die", prefix="chip.")
        engines = facts_of(self.chip.engines, per="core", prefix="chip.engines.")
        # The tiles to choose from are a table of their own, too long to print.
        yield from (fact for fact in engines if isinstance(fact.value, int | float))
        yield from facts_of(self.chip.vector, per="vector core", prefix="chip.vector.")
        yield from facts_of(self.fabric, per="machine", prefix="fabric.")
        for tier in self.fabric.tiers:
            yield from facts_of(tier, per="die, one direction", prefix=f"fabric.{tier.name}.")
        for transport in self.fabric.transports:
            yield from facts_of(
                transport, per="die, one direction", prefix=f"fabric.{transport.name}."
            )
        for port in self.fabric.ports:
            yield from facts_of(port, per="one direction", prefix=f"fabric.{port.name}.")
        yield from facts_of(self.power, per="see field name", prefix="power.")
