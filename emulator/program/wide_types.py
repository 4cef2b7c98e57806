"""Programs with 64-bit types in a process that does not use them: `jax.enable_x64` around a part of
a program makes such types, and whatever reads the program again must keep them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.extend import core

from emulator.program.contents import contents


def as_wide_as(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> AbstractContextManager[Any]:
    """JAX's 64-bit types, where the program has any."""
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return jax.enable_x64(True) if contents(opened).wide else nullcontext()
