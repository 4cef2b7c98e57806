"""What a script computes outside of its steps: counted by operation and line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax._src import source_info_util

#: Eager operations that move or make arrays rather than compute.
_MOVES = frozenset({"device_put", "copy", "copy_p"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EagerOperation:
    """One operation at one line of the script; `devices` is the most that its arrays were on."""

    name: str
    where: str
    count: int
    devices: int


class Eager:
    """Counts eager operations; moves of arrays between host and devices are apart."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], EagerOperation] = {}
        self.moves = 0

    def note(self, name: str, args: Iterable[Any]) -> None:
        if name in _MOVES:
            self.moves += 1
            return
        key = name, line()
        devices = max((_devices(x) for x in args), default=1)
        old = self._found.get(key)
        self._found[key] = EagerOperation(
            name=name,
            where=key[1],
            count=1 + (old.count if old else 0),
            devices=max(devices, old.devices if old else 1),
        )

    @property
    def operations(self) -> Sequence[EagerOperation]:
        """Those on several devices first, then the most frequent."""
        return sorted(self._found.values(), key=lambda o: (-(o.devices > 1), -o.count))


def _devices(x: Any) -> int:
    return len(x.devices()) if isinstance(x, jax.Array) else 1


def line() -> str:
    """The line of the script that is being executed."""
    frame = source_info_util.user_frame(source_info_util.current().traceback)
    return f"{os.path.basename(frame.file_name)}:{frame.start_line}" if frame else ""
