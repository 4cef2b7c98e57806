"""Least squares of relative errors: a few Gauss-Newton steps, which the model (straight lines with
a corner) needs no more of.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from emulator.machines import Machine
from emulator.validate.records import Calibration

_STEPS = 8
_ROUNDING = 5e-4  # half a unit of the fourth digit, at most


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A fit from scratch. `old` and `new` are the parameters' shipped and fitted values; `free` the
    fitted values of what no machine holds; residuals are model over measurement, less 1.
    """

    calibration: Calibration
    old: tuple[float, ...]
    new: tuple[float, ...]
    free: tuple[float, ...]
    old_residuals: tuple[float, ...]
    residuals: tuple[float, ...]

    @property
    def agrees(self) -> tuple[bool, ...]:
        """For each parameter, whether the shipped value is the fit, to its four digits."""
        pairs = zip(self.old, self.new, strict=True)
        return tuple(math.isclose(old, new, rel_tol=_ROUNDING) for old, new in pairs)


def refit(calibration: Calibration) -> Refit:
    """Fits the parameters to the rows, from a start 10 % below the shipped values."""
    shipped = np.array([p.get(calibration.machine) for p in calibration.parameters])
    guesses = np.array([guess for _, _, guess in calibration.free])
    at = np.concatenate([0.9 * shipped, guesses])
    for _ in range(_STEPS if at.size else 0):
        at = _step(calibration, at)
    count = len(shipped)
    free = tuple(at[count:].tolist())
    return Refit(
        calibration=calibration,
        old=tuple(shipped.tolist()),
        new=tuple(at[:count].tolist()),
        free=free,
        old_residuals=tuple(_residuals(calibration, calibration.machine, free).tolist()),
        residuals=tuple(_at(calibration, at).tolist()),
    )


def _step(calibration: Calibration, at: np.ndarray) -> np.ndarray:
    """One Gauss-Newton step, in shares of each value."""
    base = _at(calibration, at)
    slope = np.empty((base.size, at.size))
    for i in range(at.size):
        moved = at.copy()
        moved[i] *= 1 + 1e-6
        slope[:, i] = (_at(calibration, moved) - base) / 1e-6
    change = np.linalg.lstsq(slope, -base, rcond=None)[0]
    return at * (1 + np.clip(change, -0.5, 0.5))


def _at(calibration: Calibration, at: np.ndarray) -> np.ndarray:
    machine = calibration.machine
    values = at.tolist()
    for parameter, value in zip(calibration.parameters, values, strict=False):
        machine = parameter.put(machine, value)
    return _residuals(calibration, machine, tuple(values[len(calibration.parameters) :]))


def _residuals(calibration: Calibration, machine: Machine, free: tuple[float, ...]) -> np.ndarray:
    return np.array([row.model_s(machine, free) / row.measured_s - 1 for row in calibration.rows])
