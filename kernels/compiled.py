"""What numba compiles for a CPU, where that is possible."""

import sys
import threading
import warnings
from functools import cache
from typing import Any

#: The calls, as XLA knows them.
FUSED, CHAIN, SUMS = "cm384_fused_sums", "cm384_chains", "cm384_ordered_sums"
ALIGNED = "cm384_aligned_sums"

_COMPILING = threading.Lock()


@cache
def compiled(name: str) -> Any:
    """`kernels.custom_call`, with the call of that name ready for use; `None` where it cannot be
    compiled.
    """
    if sys.platform == "win32":  # not tried there
        return None
    try:
        from kernels import custom_call

        with _COMPILING:
            custom_call.register(name)
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"numba does not work here ({error}); XLA's operations take its place, which give the "
            "same bits in more time",
            stacklevel=2,
        )
        return None
    return custom_call
