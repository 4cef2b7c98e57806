"""`cm384 validate`: the model beside every measured point that it was fitted to."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from emulator import units
from emulator.cli.show import out, whole
from emulator.validate import Calibration, Refit, calibrations, refit


def validate(
    again: Annotated[
        bool, typer.Option("--refit", help="Fit the numbers again, and compare with the shipped.")
    ] = False,
) -> None:
    """Print the model beside the measured points behind it.

    Errors, sources, degrees of freedom. With --refit the fitted numbers are found again from
    these points; the exit status is 1 if one of them is not what is shipped.
    """
    began = time.perf_counter()
    sets = calibrations()
    fits = [refit(calibration) for calibration in sets]
    for fit in fits:
        _points(fit, again)
        if again and fit.old:
            _parameters(fit)
        if fit.calibration.note:
            out.print(f"Note: {fit.calibration.note}.", soft_wrap=True)
        out.print()
    _sources(sets)
    if not again:
        return
    differing = [
        parameter.name
        for fit in fits
        for parameter, same in zip(fit.calibration.parameters, fit.agrees, strict=True)
        if not same
    ]
    wall_s = time.perf_counter() - began
    count = sum(len(fit.old) for fit in fits)
    if differing:
        out.print(f"{len(differing)} of {count} shipped numbers are not the fit: {differing}")
        raise typer.Exit(1)
    out.print(f"All {count} shipped numbers are the fit (found again in {wall_s:.1f} s).")


def _points(fit: Refit, again: bool) -> None:
    calibration = fit.calibration
    table = Table(title=f"[b]{calibration.name}[/b]", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("point", "measured", "model", "error", *(["refitted"] if again else [])):
        table.add_column(column, justify="left" if column == "point" else "right")
    for row, old, new in zip(calibration.rows, fit.old_residuals, fit.residuals, strict=True):
        cells = [
            row.label,
            _microseconds(row.measured_s),
            _microseconds(row.measured_s * (1 + old)),
            f"{100 * old:+.1f} %",
        ]
        table.add_row(*cells, *([f"{100 * new:+.1f} %"] if again else []))
    whole(table)
    fitted = len(calibration.parameters) + len(calibration.free)
    size = math.sqrt(sum(r * r for r in fit.old_residuals) / len(calibration.rows))
    largest = max(abs(r) for r in fit.old_residuals)
    out.print(
        f"Measured points: {len(calibration.rows)}, fitted numbers: {fitted}, degrees of freedom: "
        f"{calibration.degrees_of_freedom}; error {100 * size:.1f} % root mean square, "
        f"{100 * largest:.1f} % at most.",
        soft_wrap=True,
    )


def _parameters(fit: Refit) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("fitted number", "shipped", "found again", ""):
        table.add_column(column, justify="left" if column == "fitted number" else "right")
    rows = zip(fit.calibration.parameters, fit.old, fit.new, fit.agrees, strict=True)
    for parameter, old, new, same in rows:
        shown = (units.fact(value, parameter.unit) for value in (old, new))
        table.add_row(parameter.name, *shown, "same" if same else "[b]differs[/b]")
    for (name, unit, _), value in zip(fit.calibration.free, fit.free, strict=True):
        table.add_row(name, "-", units.fact(value, unit), "not used elsewhere")
    whole(table)


def _microseconds(value_s: float) -> str:
    return f"{value_s * 1e6:,.1f} us"


def _sources(sets: tuple[Calibration, ...]) -> None:
    out.print("[b]Sources[/b] (measured, all published; fitted numbers count as inferred)")
    sources = dict.fromkeys(row.source for calibration in sets for row in calibration.rows)
    for source in sources:
        out.print(f"  {source}", soft_wrap=True)
