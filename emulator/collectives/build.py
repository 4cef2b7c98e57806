"""Algorithms by name, and the groups they are built for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emulator.collectives import direct, full_mesh, hierarchical, ring
from emulator.collectives.check import check
from emulator.collectives.schedule import OPS, Group, Schedule

if TYPE_CHECKING:
    from emulator.machines import Machine

Algorithm = Callable[..., Schedule]

_PLACELESS = ("ring", "full_mesh", "direct")  # the same schedule wherever the ranks are
_ROOTED = ("broadcast", "reduce", "scatter", "gather")

ALGORITHMS: Mapping[str, Mapping[str, Algorithm]] = {
    **{
        op: {name: getattr(module, op) for name, module in modules.items()}
        for modules in [{"ring": ring, "full_mesh": full_mesh, "hierarchical": hierarchical}]
        for op in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
    },
    **{op: {"direct": getattr(direct, op)} for op in (*_ROOTED, "permute")},
}


def check_algorithms(algorithms: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`algorithms` (operation -> algorithm name, or function group -> Schedule), or why not.

    Raises:
        TypeError: it is no mapping.
        ValueError: an unknown operation or algorithm; the known ones are listed.
    """
    if algorithms is None:
        return {}
    if not isinstance(algorithms, Mapping):
        raise TypeError(
            f'algorithms must map operations to algorithms, as in {{"all_reduce": "ring"}}; '
            f"got {algorithms!r}"
        )
    for op, algorithm in algorithms.items():
        if op not in ALGORITHMS:
            raise ValueError(
                f"algorithms: unknown operation {op!r}; known: {', '.join(sorted(ALGORITHMS))}"
            )
        if not callable(algorithm) and algorithm not in ALGORITHMS[op]:
            raise ValueError(
                f"algorithms[{op!r}]: unknown algorithm {algorithm!r}; known: "
                f"{', '.join(sorted(ALGORITHMS[op]))}, or a function group -> Schedule"
            )
    return algorithms


def group_of(devices: Sequence[int], machine: Machine) -> Group:
    """The group of these device numbers, in rank order, on `machine`."""
    per_node = machine.devices_per_node
    return Group(tuple(device // per_node for device in devices))


def build(
    op: str,
    algorithm: str | Algorithm,
    group: Group,
    *,
    root: int = 0,
    pairs: tuple[tuple[int, int], ...] = (),
) -> Schedule:
    """The Schedule of `op` by `algorithm` (a name, or a function of the group that returns one) for
    `group`.

    Equal calls return the same object. A user's function is called once for each group and its
    result is checked.

    Raises:
        ValueError: unknown operation or algorithm, bad root or pairs, or a user's Schedule that is
        wrong.
    """
    if op not in OPS:
        raise ValueError(f"unknown collective operation {op!r}; known: {', '.join(OPS)}")
    if not callable(algorithm) and algorithm not in ALGORITHMS[op]:
        known = ", ".join(ALGORITHMS[op])
        raise ValueError(
            f"unknown algorithm {algorithm!r} for {op}; known: {known}, or a function group -> "
            "Schedule"
        )
    if op in _ROOTED and not 0 <= root < group.n:
        raise ValueError(f"{op}: root {root} is outside the group's ranks 0..{group.n - 1}")
    if algorithm in _PLACELESS:
        group = Group((0,) * group.n)
    return _build(
        op, algorithm, group, root if op in _ROOTED else 0, pairs if op == "permute" else ()
    )


@functools.lru_cache(maxsize=512)
def _build(
    op: str, algorithm: str | Algorithm, group: Group, root: int, pairs: tuple[tuple[int, int], ...]
) -> Schedule:
    if not callable(algorithm):
        make = ALGORITHMS[op][algorithm]
        if op in _ROOTED:
            return make(group, root)
        return make(group, pairs) if op == "permute" else make(group)
    schedule = algorithm(group)
    name = getattr(algorithm, "__name__", repr(algorithm))
    if not isinstance(schedule, Schedule):
        raise TypeError(f"algorithm {name} must return a Schedule; got {type(schedule).__name__}")
    meant = (op, group.n, root, pairs)
    given = (schedule.op, schedule.ranks, schedule.root, schedule.pairs)
    if given != meant:
        raise ValueError(
            f"algorithm {name} returned (op, ranks, root, pairs) = {given}; expected {meant}"
        )
    check(schedule)
    return schedule
