"""Words of the command line -> machines, device numbers, byte counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from emulator.collectives import check_algorithms
from emulator.machines import Machine, cloudmatrix384, custom_machine, gb200_nvl72

MACHINES: dict[str, Callable[[], Machine]] = {
    "cloudmatrix384": cloudmatrix384,
    "cloudmatrix384-die": lambda: cloudmatrix384(device="die"),
    "gb200_nvl72": gb200_nvl72,
}

MACHINE_HELP = (
    f"One of {', '.join(MACHINES)}, or a fabric of your own: a line such as "
    '"ring(4, 50GB/s, 300ns) / switch(8, 100GB/s, 1us)" or a .toml file.'
)

ALGORITHMS_HELP = (
    "Algorithms of collectives by operation, as in all_reduce=ring,all_gather=double_ring/nhr. "
    "Default: the machine's choice."
)


def algorithms(text: str | None) -> dict[str, str] | None:
    """ "all_reduce=ring,all_gather=nhr" -> operation -> algorithm.

    Raises:
        ValueError: not of that form, or an unknown operation or algorithm; the known are listed.
    """
    if text is None:
        return None
    chosen: dict[str, str] = {}
    for part in names("--algorithms", text, "all_reduce=ring,all_gather=nhr"):
        op, given, algorithm = part.partition("=")
        if not given or op in chosen:
            raise ValueError(
                f"--algorithms {text!r}: {part!r} is not operation=algorithm, each operation once; "
                "write it like all_reduce=ring,all_gather=nhr"
            )
        chosen[op] = algorithm
    check_algorithms(chosen)
    return chosen


def machine(name: str) -> Machine:
    if "(" in name or name.endswith(".toml"):
        return custom_machine(name)
    if name not in MACHINES:
        raise ValueError(f"unknown machine {name!r}; known: {', '.join(MACHINES)}")
    return MACHINES[name]()


def check_belongs(program: str, transformer: Mapping[str, int | None], size: str | None) -> None:
    """Raises ValueError if options are given that `program` has no use for."""
    given = [option for option, value in transformer.items() if value is not None]
    if program != "transformer" and given:
        raise ValueError(f"{', '.join(given)}: of the program transformer; leave it out")
    if size is not None and ":" in program:
        raise ValueError(f"--size {size}: of the programs transformer and matmul; leave it out")


def byte_count(text: str) -> int:
    """ "1K", "64MiB", "1000" -> bytes; letters are powers of 1024, as in nccl-tests."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"not a size in bytes: {text!r}; write it like 4096, 64K, 1M or 1G")
    return int(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")


def devices(text: str | None, on: Machine) -> tuple[int, ...]:
    """A count ("16": the first sixteen), or numbers and ranges ("0,8,16", "0-7,64", "0:384:8").

    "a-b" includes b; "a:b" and "a:b:step" do not, as in Python.
    """
    if text is None:
        return tuple(range(on.num_devices))
    if text.strip().isdecimal():
        count = int(text)
        if not 1 <= count <= on.num_devices:
            raise ValueError(
                f"--devices {count}: a count, and {on.name} has 1 to {on.num_devices} devices; one "
                "by its number is written as in 0-0"
            )
        return tuple(range(count))
    numbers: list[int] = []
    for part in text.split(","):
        if sliced := re.fullmatch(r"\s*(\d+):(\d+)(?::(\d+))?\s*", part):
            low, high, step = int(sliced[1]), int(sliced[2]), int(sliced[3] or 1)
            _check_range(text, part, low < high and step > 0)
            numbers += range(low, min(high, low + step * (on.num_devices + 1)), step)
            continue
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(
                f"--devices {text!r}: write a count, or numbers and ranges: 0,8,16-23 or 0:384:8"
            )
        low, high = int(match[1]), int(match[2] or match[1])
        _check_range(text, part, low <= high)
        numbers += range(low, min(high, low + on.num_devices) + 1)
    return on.check_devices(numbers)


def _check_range(text: str, part: str, fine: bool) -> None:
    if not fine:
        raise ValueError(f"--devices {text!r}: {part.strip()!r} is an empty range")


def names(option: str, text: str, example: str) -> list[str]:
    """A list of names such as `example`: "ring,nhr,best"."""
    listed = [name.strip() for name in text.split(",")]
    if not all(listed) or len(set(listed)) != len(listed):
        raise ValueError(f"{option} {text!r}: write different names with commas: {example}")
    return listed


def arithmetic(name: str | None) -> None:
    """Raises ValueError for a wrong name before anything starts."""
    if name not in (None, "native"):
        import kernels

        kernels.arithmetic_file.named(name)
