"""Lines of the user's program, to name what is costly or what cannot be costed."""

from __future__ import annotations

import functools
from typing import Any

from jax._src import source_info_util

from emulator.program.graph import Node

#: How a name scope begins that says a line of the user's program, where there is no traceback.
PLACE = "@"


def at(label: str, node: Node) -> str:
    place = where(node.eqn)
    return f"{label} at {place}" if place else label


def where(eqn: Any) -> str:
    """The line of the user's program that an equation comes from: "file.py:12 (function)"."""
    scopes = getattr(eqn.source_info.name_stack, "stack", ())
    if scopes and (name := getattr(scopes[-1], "name", "")).startswith(PLACE):
        return name.removeprefix(PLACE)
    traceback = getattr(eqn.source_info, "traceback", None)
    return "" if traceback is None else _where(traceback)


@functools.lru_cache(maxsize=65536)
def _where(traceback: Any) -> str:
    frame = source_info_util.user_frame(traceback)
    if frame is None:
        return ""
    function = frame.function_name.split(".<locals>")[0]  # Python 3.11 gives the nested name
    return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.start_line} ({function})"
