"""What is wrong with a machine: slow devices, slow or dead links, planes and switches, missing
devices.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Factors of the healthy rate that are left, by what they befall; 0 is dead.

    `devices`: device number -> rate of its kernels. `links`: link name -> capacity; `planes`: plane
    number; `switches`: switch name. `missing`: device numbers that are not there. Factors of one
    thing that is named several times multiply.
    """

    devices: tuple[tuple[int, float], ...] = ()
    links: tuple[tuple[str, float], ...] = ()
    planes: tuple[tuple[int, float], ...] = ()
    switches: tuple[tuple[str, float], ...] = ()
    missing: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self != NONE

    @property
    def in_fabric(self) -> bool:
        """Whether any link is slower than it should be."""
        return bool(self.links or self.planes or self.switches)

    def and_also(self, other: Faults) -> Faults:
        """Both sets of faults, in an order that does not depend on which came first."""
        return Faults(
            devices=tuple(sorted(self.devices + other.devices)),
            links=tuple(sorted(self.links + other.links)),
            planes=tuple(sorted(self.planes + other.planes)),
            switches=tuple(sorted(self.switches + other.switches)),
            missing=tuple(sorted({*self.missing, *other.missing})),
        )

    def describe(self) -> tuple[str, ...]:
        """One line for each fault, as an assumption to print."""
        lines = []
        for what, entries in (
            ("device", self.devices),
            ("link", self.links),
            ("plane", self.planes),
            ("switch", self.switches),
        ):
            lines += [
                f"{what} {name} is dead" if factor == 0 else f"{what} {name} at {factor:g} x"
                for name, factor in entries
            ]
        if self.missing:
            first = ", ".join(map(str, self.missing[:8]))
            more = f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
            lines.append(f"devices {first}{more} are missing")
        return tuple(lines)


NONE = Faults()


def factors(
    what: str, given: Any, *, key: type, dead: bool = True
) -> tuple[tuple[Any, float], ...]:
    """`given` ({name: factor}, or names that are dead) as sorted (name, factor) pairs.

    Raises:
        TypeError, ValueError: a name or factor that cannot be one; the message names the argument.
    """
    if given is None:
        return ()
    if isinstance(given, str | int):
        given = (given,)
    if not isinstance(given, Mapping):
        if not dead or not isinstance(given, Iterable):
            raise TypeError(
                f"degrade: {what} must map names to the factor that is left, as in "
                f"{what}={{{'5' if key is int else repr('name')}: 0.5}}; got {given!r}"
            )
        given = dict.fromkeys(given, 0.0)
    pairs = []
    for name, factor in given.items():
        if key is int:
            name = _number(what, name)
        elif not isinstance(name, str):
            raise TypeError(f"degrade: {what} are named by strings; got {name!r}")
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"degrade: {what}[{name!r}] must be a number; got {factor!r}")
        if not (0 <= factor <= 1) or (factor == 0 and not dead):
            low = "0 (dead)" if dead else "above 0 (a device without any rate is missing=)"
            raise ValueError(
                f"degrade: {what}[{name!r}] is the factor of the healthy rate that is left, {low} "
                f"to 1; got {factor!r}"
            )
        pairs.append((name, float(factor)))
    return tuple(sorted(pairs))


def numbers(what: str, given: Any) -> tuple[int, ...]:
    """`given` (one number or several) as sorted plain ints."""
    if given is None:
        return ()
    if isinstance(given, int) or not isinstance(given, Iterable):
        given = (given,)
    return tuple(sorted({_number(what, value) for value in given}))


def _number(what: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"degrade: {what} are numbers; got {value!r}") from error
