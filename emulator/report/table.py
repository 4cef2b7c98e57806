"""An estimate as tables in a terminal."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from emulator.report.literal import LiteralTable
from emulator.report.result import Estimate, collective_rows, groups_of
from emulator.units import capacity, count, interval, quantity, seconds, several
from emulator.units import fact as units_fact

TOP = 12

_PLACE = 18  # letters of a place that stay on one line


class Tables:
    """A rich renderable; `str()` of it is the same in plain text, 110 columns wide."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate = estimate

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _body(self.estimate)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, no_color=True, highlight=False).print(_body(self.estimate))
        return out.getvalue()


def _body(e: Estimate) -> Group:
    parts: list[Table | Text | Group] = [_headline(e), _summary(e), _kinds(e), _top(e)]
    if e.collectives:
        parts.append(_collectives(e))
    parts += [_memory(e), _energy(e), _efficiency(e), _evidence(e), _assumptions(e)]
    return Group(*(piece for part in parts for piece in (part, Text(""))))


def _headline(e: Estimate) -> Text:
    text = Text()
    text.append(f"{e.name}", style="bold")
    devices = several(len(e.devices), e.machine.device_kind)
    text.append(f" on {e.machine.name}, mesh {e.mesh} ({devices})")
    if not e.memory.fits:
        text.append(f"\n{e.memory.message}", style="bold red")
    return text


def _grid(title: str, *columns: tuple[str, bool]) -> Table:
    table = LiteralTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def _summary(e: Estimate) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("time", f"{seconds(e.time_s)} until the last device has finished")
    share = f"{e.bound_s / e.time_s:.2g}" if e.time_s else "1"
    table.add_row(
        "bound",
        f"{seconds(e.bound_s)} at best ({share} of the time), limited by {e.bound.limited_by}",
    )
    table.add_row(
        "matmul",
        f"{quantity(e.flops, 'FLOP')} per device, {e.utilization:.1%} of the BF16 matrix peak",
    )
    table.add_row("memory", e.memory.share)
    low, high = e.energy.power_w
    table.add_row(
        "energy",
        f"{interval(e.energy.low_j, e.energy.high_j, 'J')} ({interval(low, high, 'W')} mean)",
    )
    return table


def _kinds(e: Estimate) -> Table:
    table = _grid("Where the time goes", ("kind", False), ("per device", True), ("share", True))
    kinds = e.by_kind()
    for kind, time_s in kinds.items():
        table.add_row(kind, seconds(time_s), f"{time_s / e.time_s:.1%}" if e.time_s else "")
    idle = e.time_s - sum(kinds.values())
    if idle > 1e-3 * e.time_s:
        table.add_row("waiting", seconds(idle), f"{idle / e.time_s:.1%}")
    if e.hidden_s:
        table.add_row(
            "hidden by overlap", f"-{seconds(e.hidden_s)}", f"-{e.hidden_s / e.time_s:.1%}"
        )
    return table


def _top(e: Estimate) -> Table:
    rows = e.rows()
    title = f"Longest operations ({min(TOP, len(rows))} of {len(rows)})"
    table = _grid(
        title,
        ("operation", False),
        ("times", True),
        ("time", True),
        ("bound", True),
        ("limited by", False),
        ("where", False),
    )
    for column in table.columns[1:-1]:  # on a narrow terminal only names fold
        column.no_wrap = True
    table.columns[-1].min_width = _PLACE
    for row in rows[:TOP]:
        table.add_row(
            row.name,
            count(row.count),
            seconds(row.time_s),
            seconds(row.bound_s),
            row.limited_by,
            row.where.split(" (")[0],
        )
    return table


def _collectives(e: Estimate) -> Group:
    table = _grid(
        "Collectives",
        ("operation", False),
        ("bytes", True),
        ("times", True),
        ("each", True),
        ("groups", True),
        ("algorithm", False),
        ("why", False),
    )
    rows = collective_rows(e)
    reasons: dict[str, int] = {}
    for step, times in rows[:TOP]:
        table.add_row(
            f"{step.name} ({step.op})" if step.op not in step.name else step.name,
            quantity(step.nbytes, "B"),
            count(times),
            seconds(step.time_s),
            groups_of(step),
            step.algorithm,
            f"[{reasons.setdefault(step.reason, len(reasons) + 1)}]",
        )
    if len(rows) > TOP:
        table.caption = f"and {len(rows) - TOP} more"
    why = "\n".join(f"  [{number}] {reason}" for reason, number in reasons.items())
    return Group(table, Text(why))


def _memory(e: Estimate) -> Table:
    m = e.memory
    table = _grid(
        f"Memory of one device at its fullest, in {m.at}",
        ("what lives", False),
        ("shape", False),
        ("bytes", True),
    )
    for buffer in m.alive[:TOP]:
        shape = f"{buffer.dtype}[{','.join(map(str, buffer.shape))}]"
        table.add_row(buffer.name, shape, capacity(buffer.bytes))
    rest = m.alive[TOP:]
    if rest:
        table.add_row(f"{len(rest)} smaller ones", "", capacity(sum(b.bytes for b in rest)))
    if m.communication_bytes:
        table.add_row("collective library's buffers", "", capacity(m.communication_bytes))
    return table


def _energy(e: Estimate) -> Table:
    table = _grid(
        f"Energy of {several(len(e.devices), 'device')}",
        ("part", False),
        ("low", True),
        ("high", True),
        ("why", False),
    )
    for part in e.energy.parts:
        table.add_row(part.name, quantity(part.low_j, "J"), quantity(part.high_j, "J"), part.why)
    low, high = e.energy.device_w
    table.caption = f"one {e.machine.device_kind} by itself: {interval(low, high, 'W')} mean"
    table.caption_justify = "left"
    return table


def _efficiency(e: Estimate) -> Table:
    table = _grid("Performance per watt", ("what", False), ("FLOP/s per W", True), ("why", False))
    rows = [("this program", e.energy.flops_per_j, "its matmuls over all of its energy")]
    rows += [(m.name, m.flops_per_j, m.why) for m in e.energy.nominal]
    for name, (low, high), why in rows:
        table.add_row(name, interval(low, high, "FLOP/s/W"), why)
    return table


def _evidence(e: Estimate) -> Table:
    table = _grid(
        "Numbers behind it (cm384 info lists all)",
        ("number", False),
        ("value", True),
        ("evidence", False),
        ("source", False),
    )
    for fact in e.evidence():
        table.add_row(fact.name, units_fact(fact.value, fact.unit), fact.evidence, fact.source)
    return table


def _assumptions(e: Estimate) -> Table:
    table = _grid("What this rests on", ("", False))
    table.show_header = False
    for text in e.assumptions:
        table.add_row(f"- {text}")
    return table
