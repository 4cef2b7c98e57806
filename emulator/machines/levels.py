"""A user's own fabric as levels, composed from the inside out.

Device numbers run level by level: the digit of the innermost level varies fastest. A `full_mesh`,
`ring`, `mesh` or `torus` level joins each device to the devices in the same place of the other
blocks; a `switch` level joins all devices of its blocks to one another.
"""

from __future__ import annotations

import dataclasses
import math
import re

from emulator.machines.fact import check_not_negative, check_positive

KINDS = ("full_mesh", "ring", "mesh", "torus", "switch")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level: `sizes` blocks of the level below, joined by links of `bytes_per_s` each way.

    `bytes_per_s` is one link's of a full_mesh, ring, mesh or torus, and a device's whole port into
    a switch; `latency_s` is that of one hop (a switch counts as one). `planes` switches share a
    port's lanes evenly. With `taper` above 1, what leaves a block through the switch shares
    uplinks of 1 / taper of its ports' sum.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    bytes_per_s: float
    latency_s: float
    planes: int = 1
    taper: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"level {self.name!r}: unknown kind {self.kind!r}; known: {', '.join(KINDS)}"
            )
        if not isinstance(self.name, str) or not re.fullmatch(r"\w+", self.name):
            raise ValueError(
                "Level.name must be made of letters, digits and _, as links are called by it; "
                f"got {self.name!r}"
            )
        if not isinstance(self.sizes, tuple):
            raise TypeError(f"level {self.name!r}: sizes must be a tuple; got {self.sizes!r}")
        grids = ("mesh", "torus")
        if not self.sizes or (len(self.sizes) > 1 and self.kind not in grids):
            wanted = "a size for each dimension" if self.kind in grids else "one size"
            raise ValueError(f"level {self.name!r}: {self.kind} takes {wanted}; got {self.sizes}")
        for what, count in (*(("a size", size) for size in self.sizes), ("planes", self.planes)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"level {self.name!r}: {what} must be a whole number of at least 1; "
                    f"got {count!r}"
                )
        check_positive(self, "bytes_per_s", "taper")
        check_not_negative(self, "latency_s")
        if self.taper < 1:
            raise ValueError(f"level {self.name!r}: taper must be at least 1; got {self.taper!r}")
        if self.kind != "switch" and (self.planes != 1 or self.taper != 1):
            raise ValueError(f"level {self.name!r}: planes and taper belong to a switch")

    @property
    def size(self) -> int:
        """Blocks of the level below that one block of this level has."""
        return math.prod(self.sizes)
