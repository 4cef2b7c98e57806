"""A virtual pod of accelerators: run an unmodified JAX program for its values and its seconds.

The names below are the public ones. They are imported on first use, so that asking only about time
(`cm384 info`, `collective`, `matmul_time`) never loads JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emulator.chip import MatmulTime as MatmulTime
    from emulator.chip import matmul_time as matmul_time
    from emulator.fabric import Collective as Collective
    from emulator.fabric import all_to_all_v as all_to_all_v
    from emulator.fabric import collective as collective
    from emulator.fabric import concurrent as concurrent
    from emulator.fabric import expert_exchange as expert_exchange
    from emulator.machines import Level as Level
    from emulator.machines import Machine as Machine
    from emulator.machines import cloudmatrix384 as cloudmatrix384
    from emulator.machines import custom_machine as custom_machine
    from emulator.machines import gb200_nvl72 as gb200_nvl72
    from emulator.program.emulate import emulate as emulate
    from emulator.program.pmap import pmap as pmap
    from emulator.report.answer import Estimate as Estimate
    from emulator.report.answer import OutOfMemoryError as OutOfMemoryError
    from emulator.report.answer import Run as Run
    from emulator.report.answer import estimate as estimate
    from emulator.report.answer import run as run
    from emulator.report.compare import Comparison as Comparison
    from emulator.report.compare import compare as compare

_ROOM_OF = {
    "Machine": "emulator.machines",
    "Level": "emulator.machines",
    "cloudmatrix384": "emulator.machines",
    "custom_machine": "emulator.machines",
    "gb200_nvl72": "emulator.machines",
    "all_to_all_v": "emulator.fabric",
    "collective": "emulator.fabric",
    "Collective": "emulator.fabric",
    "concurrent": "emulator.fabric",
    "expert_exchange": "emulator.fabric",
    "matmul_time": "emulator.chip",
    "MatmulTime": "emulator.chip",
    "emulate": "emulator.program.emulate",
    "pmap": "emulator.program.pmap",
    "estimate": "emulator.report.answer",
    "run": "emulator.report.answer",
    "Estimate": "emulator.report.answer",
    "OutOfMemoryError": "emulator.report.answer",
    "Run": "emulator.report.answer",
    "compare": "emulator.report.compare",
    "Comparison": "emulator.report.compare",
}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'emulator' has no attribute {name!r}")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_ROOM_OF]
