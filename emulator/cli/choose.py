"""Words of the command line -> machines, device numbers, byte counts."""

from __future__ import annotations

import re
from collections.abc import Callable

from emulator.machines import Machine, cloudmatrix384, gb200_nvl72

MACHINES: dict[str, Callable[[], Machine]] = {
    "cloudmatrix384": cloudmatrix384,
    "cloudmatrix384-die": lambda: cloudmatrix384(device="die"),
    "gb200_nvl72": gb200_nvl72,
}

MACHINE_HELP = f"One of {', '.join(MACHINES)}."


def machine(name: str) -> Machine:
    if name not in MACHINES:
        raise ValueError(f"unknown machine {name!r}; known: {', '.join(MACHINES)}")
    return MACHINES[name]()


def byte_count(text: str) -> int:
    """ "1K", "64MiB", "1000" -> bytes; letters are powers of 1024, as in nccl-tests."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"not a size in bytes: {text!r}; write it like 4096, 64K, 1M or 1G")
    return int(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")


def devices(text: str | None, on: Machine) -> tuple[int, ...]:
    """A count ("16": the first sixteen), or numbers and ranges ("0,8,16", "0-7,64")."""
    if text is None:
        return tuple(range(on.num_devices))
    if text.strip().isdecimal():
        count = int(text)
        if not 1 <= count <= on.num_devices:
            raise ValueError(f"--devices {count}: {on.name} has 1 to {on.num_devices} devices")
        return tuple(range(count))
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"--devices {text!r}: write a count, or numbers and ranges: 0,8,16-23")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return on.check_devices(numbers)
