"""Records of a calibration set.

A parameter is one number of a machine with two functions, to read it and to return the machine with
another value. A set whose rows a fit also needs to know something else for (the rate of the library
that was measured, say) has free parameters that no machine holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from emulator.machines import Machine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured point: `label` to print, seconds, and the model's seconds on a machine with the
    given values of the free parameters.
    """

    label: str
    measured_s: float
    source: str
    model_s: Callable[[Machine, tuple[float, ...]], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A fitted number of a machine: how to read it, and a machine with another value."""

    name: str
    unit: str
    get: Callable[[Machine], float]
    put: Callable[[Machine, float], Machine]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Rows and the parameters fitted to them; `free` are (name, unit, first guess)."""

    name: str
    machine: Machine
    rows: tuple[Row, ...]
    parameters: tuple[Parameter, ...]
    free: tuple[tuple[str, str, float], ...] = ()
    note: str = ""

    @property
    def degrees_of_freedom(self) -> int:
        """Rows less fitted numbers."""
        return len(self.rows) - len(self.parameters) - len(self.free)
