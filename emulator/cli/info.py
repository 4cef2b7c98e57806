"""`cm384 info`: the machines side by side, where each number comes from, and the headlines."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from emulator import units
from emulator.cli.show import out
from emulator.machines import Fact, Machine, cloudmatrix384, gb200_nvl72


def info(
    notes: Annotated[bool, typer.Option("--notes", help="Add the remark on every number.")] = False,
) -> None:
    """Print both machines: every number, source and evidence."""
    machines = [cloudmatrix384(), gb200_nvl72()]
    facts = [{fact.name: fact for fact in machine.facts()} for machine in machines]
    sources: dict[str, int] = {}
    table = Table(title="Machines (numbers in brackets: sources below)", title_justify="left")
    table.add_column("quantity", overflow="fold")
    for machine in machines:
        table.add_column(f"{machine.name} ({machine.device_kind})", overflow="fold")
    for name in dict.fromkeys(name for column in facts for name in column):
        table.add_row(name, *(_cell(column.get(name), sources) for column in facts))
    out.print(table)
    out.print("\n[b]Evidence[/b]: documented by the maker or a publication; measured on hardware;")
    out.print("inferred from measurements; assumed, where nothing better is public.")
    out.print("\n[b]Sources[/b]")
    for source, number in sources.items():
        out.print(f"  \\[{number}] {source}", soft_wrap=True)
    if notes:
        out.print("\n[b]Notes[/b]")
        for machine, column in zip(machines, facts, strict=True):
            for fact in column.values():
                if fact.note:
                    out.print(f"  {machine.name} {fact.name}: {fact.note}", soft_wrap=True)
    _headlines(*machines)


def _cell(fact: Fact | None, sources: dict[str, int]) -> str:
    if fact is None:
        return "-"
    number = sources.setdefault(fact.source, len(sources) + 1)
    return f"{units.fact(fact.value, fact.unit)}  [dim]{fact.evidence} \\[{number}][/dim]"


def _headlines(cloud: Machine, rack: Machine) -> None:
    """The figures that are quoted, taken apart."""

    def peta(flops_per_s: float) -> str:
        return f"{flops_per_s / 1e15:.0f} PFLOPS"

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.2g} times"

    def per_watt(machine: Machine) -> tuple[float, float]:
        low, high = machine.power.system_w
        return machine.headline_bf16_flops_per_s / high, machine.headline_bf16_flops_per_s / low

    out.print("\n[b]How the headline figures come about[/b] (dense BF16)")
    for machine in (cloud, rack):
        each = machine.num_dies // machine.packages
        chips = f"{machine.packages} packages x {each} {'dies' if each > 1 else 'die'}"
        quoted, cube = (
            machine.chip.quoted_bf16_flops_per_s,
            machine.chip.matmul_flops_per_s("bfloat16"),
        )
        out.print(
            f"  {machine.name}: quoted as {peta(machine.headline_bf16_flops_per_s)}. {chips}: "
            f"x {quoted / 1e12:.0f} TFLOPS as the chip is quoted = "
            f"{peta(machine.quoted_bf16_flops_per_s())}; x {cube / 1e12:.0f} TFLOPS of its matrix "
            f"unit alone = {peta(machine.matmul_flops_per_s())}.",
            soft_wrap=True,
        )
    low, high = per_watt(cloud)
    rack_low, rack_high = per_watt(rack)
    lines = (
        f"Devices: {cloud.packages} / {rack.packages} = {ratio(cloud.packages, rack.packages)}.",
        f"Quoted BF16: {ratio(cloud.headline_bf16_flops_per_s, rack.headline_bf16_flops_per_s)}; "
        f"matrix units alone: {ratio(cloud.matmul_flops_per_s(), rack.matmul_flops_per_s())}.",
        f"Memory: {cloud.num_dies * cloud.chip.memory_bytes / 1e12:.0f} TB against "
        f"{rack.num_dies * rack.chip.memory_bytes / 1e12:.0f} TB.",
        f"Efficiency, quoted BF16 over the power of the system: {low / 1e12:.2f} to "
        f"{high / 1e12:.2f} TFLOPS/W against {rack_low / 1e12:.2f} to {rack_high / 1e12:.2f}: "
        f"{rack_low / high:.1f} to {rack_high / low:.1f} times lower.",
    )
    for line in lines:
        out.print(f"  {line}", soft_wrap=True)
