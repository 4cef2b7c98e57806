"""The interconnect as a record: tiers of links, the transports that drive them, and their measured
rates.

All rates are per die and for one direction.
"""

from __future__ import annotations

import dataclasses

from emulator.machines.fact import Citation, check_not_negative, check_positive
from emulator.machines.levels import Level

# The enclosures of a machine whose dies are joined by switch planes, from the inside out.
PLANE_TIERS = ("package", "node", "pod", "pods")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """What connects two dies whose closest common enclosure is `name`: "package", "node", "pod" or
    "pods" on machines of switch planes, the names of the levels on a user's own fabric.

    `link` names the port that carries it: tiers with the same link share one port's capacity per
    die (on CloudMatrix 384 both the node and the pod tier leave through the die's UB lanes).
    `bytes_per_s` is the physical limit; `read_` and `write_` are what point-to-point copies reach.
    """

    name: str
    link: str
    bytes_per_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    read_latency_s: float
    write_latency_s: float
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Tier.name must be a name; got {self.name!r}")
        check_positive(self, "bytes_per_s", "read_bytes_per_s", "write_bytes_per_s")
        check_not_negative(self, "read_latency_s", "write_latency_s")
        for name in ("read_bytes_per_s", "write_bytes_per_s"):
            if getattr(self, name) > self.bytes_per_s:
                raise ValueError(
                    f"Tier.{name} of {self.name!r} is {getattr(self, name):g} B/s, above the "
                    f"link's {self.bytes_per_s:g}"
                )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """One way to drive the links, with its own start-up and rate.

    A collective costs `startup_s` (+ `reduce_startup_s` if it reduces), and each of its steps
    `step_s` + the tier's latency + max(0, bytes on the busiest port / rate - `overlap_s`) +
    `reduce_s_per_byte` times the bytes that one die adds up. `rates_bytes_per_s` gives the port
    rate per tier. `reads` tells whose latency applies: pull or push. `scope` is the largest
    enclosure in which the transport may be used.

    `message_s` is, per tier, what each message of a die costs in a step besides its bytes: one
    engine starts them one after the other. In production, `production_offsets_s` (operation ->
    ranks -> seconds) are added to a benchmark's time, which is multiplied by `production_factor`.
    A transport with `on_request` is used only when it is asked for by name.
    """

    name: str
    scope: str
    reads: bool
    startup_s: float
    reduce_startup_s: float
    step_s: float
    overlap_s: float
    rates_bytes_per_s: tuple[tuple[str, float], ...]
    reduce_s_per_byte: float
    message_s: tuple[tuple[str, float], ...] = ()
    production_offsets_s: tuple[tuple[str, tuple[tuple[int, float], ...]], ...] = ()
    production_factor: float | None = None
    on_request: bool = False
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str) or not self.scope:
            raise ValueError(f"Transport.scope must be the name of a tier; got {self.scope!r}")
        check_not_negative(
            self, "startup_s", "reduce_startup_s", "step_s", "overlap_s", "reduce_s_per_byte"
        )
        if self.overlap_s > self.step_s:  # or a step would take less than its bytes need
            raise ValueError(
                f"Transport.overlap_s {self.overlap_s:g} exceeds step_s {self.step_s:g} of "
                f"{self.name!r}"
            )
        for tier, rate in self.rates_bytes_per_s:
            if not rate > 0:
                raise ValueError(
                    f"Transport.rates_bytes_per_s of {self.name!r}: bad entry {(tier, rate)!r}"
                )
        for tier, each_s in self.message_s:
            if not 0 <= each_s < float("inf"):
                raise ValueError(
                    f"Transport.message_s of {self.name!r}: bad entry {(tier, each_s)!r}"
                )
        if not 1.0 <= (self.production_factor or 1.0) < float("inf"):
            raise ValueError(
                f"Transport.production_factor of {self.name!r} must be at least 1; "
                f"got {self.production_factor!r}"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """Links beside the planes that no collective inside the pod uses: to host memory, to other
    pods.

    `per_node` of them are in each node; `to` says where they lead. `read_` and `write_bytes_per_s`
    are what a die's copies reach.
    """

    name: str
    to: str
    medium: str
    per_node: int
    bytes_per_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    latency_s: float
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        check_positive(
            self, "per_node", "bytes_per_s", "read_bytes_per_s", "write_bytes_per_s", "latency_s"
        )
        if max(self.read_bytes_per_s, self.write_bytes_per_s) > self.bytes_per_s:
            raise ValueError(f"Port {self.name!r} reaches more than its {self.bytes_per_s:g} B/s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """Tiers from the innermost outwards, the transports, and the switch planes behind the ports.

    `node_uplink_bytes_per_s` is what one node can send to all others, `planes` how many parallel
    switch planes a die's lanes are spread over. `in_network_reduction` says whether switches can
    add. `uplink_medium` is what joins the two switch levels. A user's own fabric has `levels`
    instead of planes: one tier each, of the same name. `exchange_s` is the fixed part of an expert
    exchange's phases.
    """

    name: str
    tiers: tuple[Tier, ...]
    transports: tuple[Transport, ...]
    planes: int
    lane_bytes_per_s: float
    switches_per_plane: int
    node_uplink_bytes_per_s: float
    in_network_reduction: bool
    uplink_medium: str = "electrical"
    ports: tuple[Port, ...] = ()
    levels: tuple[Level, ...] = ()
    overrides: tuple[tuple[str, float], ...] = ()
    exchange_s: tuple[tuple[str, float], ...] = ()
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        check_positive(
            self, "planes", "lane_bytes_per_s", "switches_per_plane", "node_uplink_bytes_per_s"
        )
        names = [tier.name for tier in self.tiers]
        expected = [level.name for level in self.levels] or [t for t in PLANE_TIERS if t in names]
        if not names or names != expected:
            raise ValueError(
                "Fabric.tiers must be distinct and run outwards "
                f"({', '.join(expected or PLANE_TIERS)}); got {names}"
            )
        ports = {tier.link for tier in self.tiers if tier.name in ("node", "pod")}
        if not self.levels and len(ports) != 1:
            raise ValueError(
                f"Fabric {self.name!r}: a die's lanes carry the tiers node and pod, so these have "
                f"one link; got {', '.join(sorted(ports)) or 'no such tier'}"
            )
        if not self.transports:
            raise ValueError(
                f"Fabric.transports of {self.name!r} is empty; give at least one Transport"
            )
        limits = {tier.name: tier.bytes_per_s for tier in self.tiers}
        for transport in self.transports:
            if transport.scope not in names:
                raise ValueError(
                    f"transport {transport.name!r} has the scope {transport.scope!r}, which is no "
                    f"tier of {self.name!r}; its tiers are {', '.join(names)}"
                )
            rates = dict(transport.rates_bytes_per_s)
            for tier_name, limit in limits.items():
                inside = names.index(tier_name) <= names.index(transport.scope)
                if inside and tier_name not in rates:
                    raise ValueError(
                        f"transport {transport.name!r} gives no rate for tier {tier_name!r}"
                    )
                if rates.get(tier_name, 0.0) > limit:
                    raise ValueError(
                        f"transport {transport.name!r} claims {rates[tier_name]:g} B/s on tier "
                        f"{tier_name!r}, "
                        f"above the link's {limit:g}"
                    )
        if not any(t.scope == names[-1] for t in self.transports):
            raise ValueError(
                f"Fabric {self.name!r} has no transport that reaches the whole {names[-1]}"
            )

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Names of the tiers, the innermost first."""
        return tuple(tier.name for tier in self.tiers)

    def tier(self, name: str) -> Tier:
        """The tier called `name`."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise ValueError(
            f"fabric {self.name!r} has no tier {name!r}; it has {[t.name for t in self.tiers]}"
        )

    def transport(self, name: str) -> Transport:
        """The transport called `name`."""
        for transport in self.transports:
            if transport.name == name:
                return transport
        known = ", ".join(t.name for t in self.transports)
        raise ValueError(f"fabric {self.name!r} has no transport {name!r}; known: {known}")
