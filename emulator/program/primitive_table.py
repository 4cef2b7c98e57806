"""The table of primitives: what becomes of each in values and in time.

`python -m emulator.program.primitive_table` writes it beside this file as PRIMITIVES.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from emulator.program import collective_rules, costs, functions, values, vector
from emulator.program.calls import ENTERED
from emulator.program.partitioned_reductions import KINDS
from emulator.program.primitives import (
    HOST,
    IDENTITIES,
    LINEAR_ALGEBRA,
    PER_DEVICE,
    REFERENCES,
    REFUSED,
)
from emulator.program.trace import OF_THE_HOST
from emulator.program.walker import FUSIBLE, RESHARDS
from emulator.program.weights import ALIASES

PATH = Path(__file__).with_name("PRIMITIVES.md")

COLLECTIVES = frozenset({*collective_rules.RULES, "axis_index", "ragged_all_to_all"} - {*KINDS})

_OWN = {
    "dot_general": "matrix unit",
    "conv_general_dilated": "matrix unit",
    "ragged_dot_general": "matrix unit, group by group",
    "scan": "loop",
    "while": "loop; leaves when the last device does",
    "cond": "branch; where devices differ, each keeps its own",
    "shard_map": "entered; manual axes are folded",
    "dce_sink": "nothing",
    "platform_index": "the default branch, else this process's",
    "reduce_sum": "floats: blocks of eight in a stated order",
    "reduce_prod": "floats: blocks of eight in a stated order",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One primitive; `works` if it has values."""

    name: str
    values: str
    time: str
    works: bool


def rows() -> list[Row]:
    """All rows, by name."""
    names = {
        *_OWN,
        *values.RULES,
        *COLLECTIVES,
        *vector.ELEMENTWISE,
        *PER_DEVICE,
        *LINEAR_ALGEBRA,
        *IDENTITIES,
        *HOST,
        *REFERENCES,
        *ENTERED,
        *REFUSED,
    }
    return [_row(name) for name in sorted(names)]


def _row(name: str) -> Row:
    if name in REFUSED:
        return Row(name=name, values=f"refused: {REFUSED[name]}", time="refused", works=False)
    return Row(name=name, values=_values(name), time=_time(name), works=True)


def _values(name: str) -> str:
    if name in _OWN:
        return _OWN[name]
    if name in COLLECTIVES:
        return _collective(name)
    if name in ENTERED:
        return "entered"
    if name in IDENTITIES:
        return "the operand"
    if name in HOST:
        return "the host, device after device"
    if name in REFERENCES:
        return "rewritten as values"
    if name in vector.EXACT:
        return "element-wise, exact"
    if name in functions.OWN:
        return "element-wise, nearest to the true value"
    if name in vector.TRANSCENDENTAL:
        return "element-wise, XLA's function"
    if name in vector.ELEMENTWISE:
        return "element-wise, rounded once"
    return "XLA (LAPACK) per device" if name in LINEAR_ALGEBRA else "XLA per device"


def _collective(name: str) -> str:
    if name in collective_rules.REDUCTIONS:
        return "reduction in its algorithm's order"
    return "the coordinate" if name == "axis_index" else "moved as it is"


def _time(name: str) -> str:
    if name in ENTERED:
        return "its body"
    if name in REFERENCES:
        return "as values"
    if name in ALIASES or name in RESHARDS:
        return "nothing"
    if name in FUSIBLE:
        return "vector kernel, fused"
    if name in COLLECTIVES and name != "axis_index":
        return "collective"
    if name in ("scan", "while", "cond", "shard_map"):
        return "its bodies"
    if name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        return "matmul"
    if name in OF_THE_HOST:
        return "the seconds that `counts` gives"
    if name in costs.FREE:
        return "nothing"
    return "kernel" if name in costs.RULES else "refused"


def text() -> str:
    """The whole document."""
    head = """# Primitives

Every primitive that JAX 0.10 to 0.12 can put into a program, and what becomes of it when values are
computed (`em.emulate`, `em.run`) and when time is told (`em.estimate`, `em.run`). What is refused
raises `NotImplementedError` with its name. Written by `python -m emulator.program.primitive_table`.

| primitive | values | time |
|---|---|---|
"""
    return head + "".join(f"| `{r.name}` | {r.values} | {r.time} |\n" for r in rows())


if __name__ == "__main__":
    PATH.write_text(text())
