"""The model beside the measured points it was fitted to, and the fit itself."""

from emulator.validate.fit import Refit, refit
from emulator.validate.records import Calibration, Row
from emulator.validate.sets import calibrations

__all__ = ["Calibration", "Refit", "Row", "calibrations", "refit"]
