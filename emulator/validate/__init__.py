"""The model beside the measured points it was fitted to, and the fit itself.

`sets` are the calibration sets, read as `records`; `matmuls` are those of the cube; `fit` finds
their numbers again.
"""

from emulator.validate.fit import Refit, refit
from emulator.validate.records import Calibration, Row
from emulator.validate.sets import calibrations

__all__ = ["Calibration", "Refit", "Row", "calibrations", "refit"]
