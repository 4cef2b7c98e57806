"""What is printed after a script."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from emulator.machines import Machine
from emulator.report.literal import LiteralTable
from emulator.script.eager import Eager
from emulator.script.steps import Steps
from emulator.units import seconds, several

TOP = 12
_WIDEST = 160  # columns


def report(on: Machine, devices: int, steps: Steps, eager: Eager, wall_s: float) -> RenderableType:
    """Steps by function, and what was outside the model."""
    clock = steps.clock
    head = Text()
    head.append("pod time", style="bold")
    slept = f" ({seconds(clock.slept_s)} of them asleep)" if clock.slept_s else ""
    head.append(f"  {seconds(clock.time_s)}{slept} on {on.name}, ")
    head.append(f"{several(devices, on.device_kind)}; ")
    head.append(f"{seconds(wall_s)} of wall time on this host")
    timed = any(function.last for function in steps.functions.values())
    table = (_steps(steps), Text("")) if timed else ()
    return Group(head, Text(""), *table, _outside(steps, eager))


def show(answer: RenderableType) -> None:
    """Prints at full width, even if the terminal is narrower: a number cut short is no number."""
    out = Console(highlight=False)
    wanted = Measurement.get(out, out.options.update(max_width=_WIDEST), answer).maximum
    Console(highlight=False, width=max(out.width, min(wanted, _WIDEST))).print(answer)


def _table(title: str, *columns: tuple[str, bool]) -> Table:
    table = LiteralTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    return table


def _steps(steps: Steps) -> Table:
    table = _table(
        "Steps (compilation takes no pod time)",
        ("function", False),
        ("where", False),
        ("calls", True),
        ("pod time", True),
        ("each", True),
        ("bound of one", True),
        ("limited by", False),
        ("mesh", False),
    )
    table.columns[-1].no_wrap = False  # of many axes, it is what may take several lines
    for function in sorted(steps.functions.values(), key=lambda f: -f.time_s):
        last = function.last
        if last is None:
            continue
        table.add_row(
            function.name,
            function.where,
            str(function.calls),
            seconds(function.time_s),
            seconds(function.time_s / function.calls),
            seconds(last.bound_s),
            last.bound.limited_by,
            last.mesh,
        )
    return table


def _outside(steps: Steps, eager: Eager) -> RenderableType:
    lines = [
        Text(
            f"Outside the model: {f.name} ({f.where}) ran on this host in no pod time: {f.outside}"
        )
        for f in steps.functions.values()
        if f.outside
    ]
    lines += [
        Text(f"Outside the model: the calls of {f.name} ({f.where}) to the host, in no pod time")
        for f in steps.functions.values()
        if f.host_calls and not f.outside
    ]
    found = eager.operations
    if not found:
        lines.append(Text("Nothing was computed outside of steps."))
        return Group(*lines)
    total = sum(o.count for o in found)
    table = _table(
        f"Outside the model: {total} eager operations, run by XLA on this host in no pod time",
        ("operation", False),
        ("where", False),
        ("times", True),
        ("devices", True),
    )
    table.min_width = 90  # of the title
    for operation in found[:TOP]:
        row = operation.name, operation.where, str(operation.count), str(operation.devices)
        table.add_row(*row)
    if len(found) > TOP:
        rest = sum(o.count for o in found[TOP:])
        table.add_row(f"and {len(found) - TOP} more", "", str(rest), "")
    return Group(*lines, table)


def no_steps(script: str, eager: Eager) -> str:
    """What is said of a script that never called a jitted function."""
    total = sum(o.count for o in eager.operations)
    what = f"{total} eager operations ran on this host" if total else "it computed nothing with JAX"
    return (
        f"cm384: {script} called no function made by jax.jit, jax.pmap or jax.shard_map, so there "
        f"is no step to time ({what}); decorate its step with @jax.jit"
    )
