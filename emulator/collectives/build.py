"""Algorithms by name, and the groups they are built for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emulator.collectives import (
    bruck,
    direct,
    flat,
    full_mesh,
    grid,
    hierarchical,
    pairwise,
    pipeline,
    ring,
    tree,
)
from emulator.collectives.check import check
from emulator.collectives.flat import LEVELS
from emulator.collectives.schedule import OPS, Group, Schedule

if TYPE_CHECKING:
    from emulator.machines import Machine

Algorithm = Callable[..., Schedule]

_ROOTED = ("broadcast", "reduce", "scatter", "gather")
_LEVELLED = ("all_reduce", "reduce_scatter", "all_gather")
_BY_NODE = ("hierarchical", "pipeline")  # the others are the same wherever the ranks are


def _levelled(op: str) -> dict[str, Algorithm]:
    make = getattr(flat, op)
    return {name: functools.partial(make, algorithm=name) for name in LEVELS} | {
        "pipeline": getattr(pipeline, op),
        "hierarchical": getattr(hierarchical, op),
    }


def _two_phases(op: str) -> dict[str, Algorithm]:
    make = getattr(flat, op)
    names = ("full_mesh", "rhd", "nhr", "nb")
    return {name: functools.partial(make, algorithm=name) for name in names}


ALGORITHMS: Mapping[str, Mapping[str, Algorithm]] = {
    "all_reduce": _levelled("all_reduce")
    | {
        "binary_tree": tree.all_reduce,
        "double_binary_tree": functools.partial(tree.all_reduce, trees=2),
    },
    "reduce_scatter": _levelled("reduce_scatter"),
    "all_gather": _levelled("all_gather"),
    "all_to_all": {
        "ring": ring.all_to_all,
        "full_mesh": full_mesh.all_to_all,
        "pairwise": pairwise.all_to_all,
        "bruck": bruck.all_to_all,
        "grid": grid.all_to_all,
        "hierarchical": hierarchical.all_to_all,
    },
    "broadcast": _two_phases("broadcast")
    | {
        "direct": direct.broadcast,
        "ring": functools.partial(pipeline.broadcast, pieces=1),
        "pipeline": pipeline.broadcast,
        "binary_tree": tree.broadcast,
        "double_binary_tree": functools.partial(tree.broadcast, trees=2),
    },
    "reduce": _two_phases("reduce")
    | {
        "direct": direct.reduce,
        "ring": functools.partial(pipeline.reduce_to, pieces=1),
        "pipeline": pipeline.reduce_to,
        "binary_tree": tree.reduce_to,
        "double_binary_tree": functools.partial(tree.reduce_to, trees=2),
    },
    "scatter": {"direct": direct.scatter, "binary_tree": tree.scatter},
    "gather": {"direct": direct.gather, "binary_tree": tree.gather},
    "permute": {"direct": direct.permute},
}
"""Algorithms by operation and name. Any two levels compose: `inside/between` nodes, such as
`double_ring/nhr`, is an algorithm of all_reduce, reduce_scatter and all_gather too.
"""


def find(op: str, name: object) -> Algorithm | None:
    """The algorithm of this name; None if there is none."""
    if not isinstance(name, str):
        return None
    inner, slash, outer = name.partition("/")
    if slash and op in _LEVELLED and inner in LEVELS and outer in LEVELS:
        return functools.partial(getattr(hierarchical, op), inner=inner, outer=outer)
    return ALGORITHMS[op].get(name)


def known(op: str) -> str:
    """The names for error messages."""
    names = ", ".join(ALGORITHMS[op])
    pairs = ", two levels as in double_ring/nhr" if op in _LEVELLED else ""
    return f"{names}{pairs}, or a function group -> Schedule"


BEST = "best"  # not an algorithm: whichever `emulator.fabric` finds to be the fastest


def check_algorithms(algorithms: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`algorithms` (operation -> algorithm name, "best", or function group -> Schedule), or why
    not.

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
        if algorithm == BEST and op in ALGORITHMS:
            continue
        if op not in ALGORITHMS:
            raise ValueError(
                f"algorithms: unknown operation {op!r}; known: {', '.join(sorted(ALGORITHMS))}"
            )
        if not callable(algorithm) and find(op, algorithm) is None:
            raise ValueError(
                f"algorithms[{op!r}]: unknown algorithm {algorithm!r}; known: {known(op)}"
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
    if not callable(algorithm) and find(op, algorithm) is None:
        raise ValueError(f"unknown algorithm {algorithm!r} for {op}; known: {known(op)}")
    if op in _ROOTED and not 0 <= root < group.n:
        raise ValueError(f"{op}: root {root} is outside the group's ranks 0..{group.n - 1}")
    if isinstance(algorithm, str) and algorithm not in _BY_NODE and "/" not in algorithm:
        group = Group((0,) * group.n)
    return _build(
        op, algorithm, group, root if op in _ROOTED else 0, pairs if op == "permute" else ()
    )


@functools.lru_cache(maxsize=512)
def _build(
    op: str, algorithm: str | Algorithm, group: Group, root: int, pairs: tuple[tuple[int, int], ...]
) -> Schedule:
    if not callable(algorithm):
        make = find(op, algorithm)
        assert make is not None  # `build` has looked
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
