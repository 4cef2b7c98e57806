"""Published matmuls of library kernels, and the numbers of the cube's engines fitted to them."""

from __future__ import annotations

import dataclasses

from emulator.chip import matmul_time
from emulator.machines import Machine, cloudmatrix384
from emulator.machines.calibration import rows as read
from emulator.machines.chips import chip, on_chip
from emulator.validate.records import Calibration, Parameter, Row

FITTED = ("load_bytes_per_cycle",)


def with_engines(machine: Machine, **changes: float) -> Machine:
    """`machine` with other numbers in its cores' engines."""
    engines = dataclasses.replace(machine.chip.engines, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, engines=engines))


def matmul_rows(without: str | None = None) -> tuple[Row, ...]:
    """The measured matmuls, all or without one family, each on the chip that it was measured on."""
    return tuple(_row(row) for row in read("matmuls") if row["family"] != without)


def matmuls(without: str | None = None) -> Calibration:
    """The calibration set of matmuls, all or without one family of measurements."""
    return Calibration(
        name="Matmuls of library kernels on 910B and 910C dies",
        machine=cloudmatrix384("die"),
        rows=matmul_rows(without),
        parameters=tuple(_parameter(name) for name in FITTED),
        note=(
            "store_share, tiling_s and the tiles to choose from were settled with these rows in "
            "sight: no blind test; most other numbers come from tables of single instructions. The "
            "910B1's time is its average core's: the kernel took 4,012.4 us, as its grid of 4 x 6 "
            "gives the busiest core 1.125 times as much as the average one"
        ),
    )


def _row(row: dict[str, str]) -> Row:
    groups, m, k, n = (int(row[name]) for name in ("groups", "m", "k", "n"))
    dtype, out = row["dtype"], row["out_dtype"]

    def model_s(machine: Machine, free: tuple[float, ...]) -> float:
        die = dataclasses.replace(chip(row["chip"]), engines=machine.chip.engines)
        on = on_chip(machine, die)
        return matmul_time(m, k, n, on, dtype, row["b_layout"], groups, out).time_s

    times = f"{groups} x " if groups > 1 else ""
    return Row(
        label=f"{row['chip']}: {times}{m} x {k} x {n}, {dtype}, {row['b_layout']}",
        measured_s=float(row["us"]) * 1e-6,
        source=row["source"],
        model_s=model_s,
    )


def _parameter(name: str) -> Parameter:
    return Parameter(
        name=f"engines.{name}",
        unit="B/cycle" if name.endswith("per_cycle") else "",
        get=lambda machine: getattr(machine.chip.engines, name),
        put=lambda machine, value: with_engines(machine, **{name: value}),
    )
