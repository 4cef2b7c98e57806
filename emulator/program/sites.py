"""What only values can tell about a program's time: what is counted where, and how it is said.

What is counted while values are computed, and how it is said in `counts=`:

- `while_0`: executions and trips; said as the mean trips of an execution.
- `cond_0`: how often each device took each branch; said as the share of each branch of the
  executions, one row for all devices alike or one for each.
- `ragged_dot_0`: executions, and the length of each group on each device; said as the lengths of
  the groups, one row for all devices alike or one row for each.
- `ragged_all_to_all_0`: executions, and rows from each rank to each rank; said as a table
  [source][destination], one for all groups of devices alike or one for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from emulator.program.collective_rules import collective_axes
from emulator.program.folded import FoldedMesh
from emulator.program.trace import is_dynamic, open_jaxpr, sub_jaxprs


def sites(jaxpr: Any, path: str, mesh: FoldedMesh) -> Iterator[tuple[str, Any, FoldedMesh]]:
    """(path, equation, mesh around it) of everything whose time only values can tell."""
    for i, eqn in enumerate(open_jaxpr(jaxpr).eqns):
        here = f"{path}/{i}"
        inside = mesh
        if is_dynamic(eqn):
            yield here, eqn, mesh
        elif eqn.primitive.name == "shard_map" and not mesh.names:
            own = eqn.params["mesh"]
            inside = FoldedMesh(names=tuple(own.axis_names), sizes=tuple(own.axis_sizes))
        for label, body in sub_jaxprs(eqn):
            yield from sites(body, here + label, inside)


def width(eqn: Any, mesh: FoldedMesh) -> int:
    """How many numbers are counted for a site."""
    name = eqn.primitive.name
    if name == "while":
        return 2
    if name == "cond":
        return math.prod(_shape(eqn, mesh))
    return 1 + math.prod(_shape(eqn, mesh))


def said(eqn: Any, mesh: FoldedMesh, counted: Any) -> Any:
    """What was counted at a site, as `counts` says it; None if it was never reached."""
    numbers = np.asarray(counted, dtype=np.float64)
    name = eqn.primitive.name
    if name == "cond":
        taken = numbers.reshape(_shape(eqn, mesh))
        executions = taken.sum(1).max()
        if executions <= 0:
            return None
        table = taken / executions
    elif numbers[0] <= 0:
        return None
    elif name == "while":
        return float(numbers[1] / numbers[0])
    else:
        table = (numbers[1:] / numbers[0]).reshape(_shape(eqn, mesh))
    if (table == table[0]).all():
        table = table[0]
    return _tuples(table)


def _shape(eqn: Any, mesh: FoldedMesh) -> tuple[int, ...]:
    """[devices, branches] of a cond, [devices, groups] of a ragged_dot; [parts, source,
    destination] of an exchange.
    """
    devices = math.prod(mesh.sizes)
    if eqn.primitive.name == "cond":
        return devices, len(eqn.params["branches"])
    if eqn.primitive.name == "ragged_dot_general":
        return devices, eqn.invars[2].aval.shape[-1]
    parts = eqn.params["axis_index_groups"]
    ranks = math.prod(mesh.shape(collective_axes(eqn))) if parts is None else len(parts[0])
    return devices // ranks, ranks, ranks


def _tuples(table: np.ndarray) -> Any:
    if table.ndim == 0:
        return float(table)
    return tuple(map(_tuples, table))
