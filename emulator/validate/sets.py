"""The calibration sets: measured rows, the model's answers, the numbers fitted to them."""

from __future__ import annotations

import dataclasses

from emulator.fabric import collective, expert_exchange
from emulator.machines import Machine, cloudmatrix384, gb200_nvl72
from emulator.machines.calibration import rows as read
from emulator.machines.fabric import Transport
from emulator.validate.matmuls import matmuls
from emulator.validate.records import Calibration, Parameter, Row


def with_transport(machine: Machine, name: str, **changes: object) -> Machine:
    """`machine` with other numbers in one of its transports."""
    fabric = machine.fabric
    new: tuple[Transport, ...] = tuple(
        dataclasses.replace(t, **changes) if t.name == name else t  # type: ignore[arg-type]
        for t in fabric.transports
    )
    return dataclasses.replace(machine, fabric=dataclasses.replace(fabric, transports=new))


def _of_transport(name: str, field: str, unit: str = "s") -> Parameter:
    return Parameter(
        name=f"{name}.{field}",
        unit=unit,
        get=lambda machine: getattr(machine.fabric.transport(name), field),
        put=lambda machine, value: with_transport(machine, name, **{field: value}),
    )


def _of_table(names: tuple[str, ...], field: str, tiers: tuple[str, ...], unit: str) -> Parameter:
    """One number that stands for all `tiers` in a table of one or several transports."""

    def get(machine: Machine) -> float:
        return dict(getattr(machine.fabric.transport(names[0]), field))[tiers[0]]

    def put(machine: Machine, value: float) -> Machine:
        for name in names:
            table = dict(getattr(machine.fabric.transport(name), field))
            changed = tuple((t, value if t in tiers else old) for t, old in table.items())
            machine = with_transport(machine, name, **{field: changed})
        return machine

    return Parameter(name=f"{names[0]}.{field} {'/'.join(tiers)}", unit=unit, get=get, put=put)


# --- one server -----------------------------------------------------------------------------------


def _exchange() -> Parameter:
    """One flag exchange: the small kernel's step, and with the latency each peer of the large."""

    def put(machine: Machine, value: float) -> Machine:
        machine = with_transport(machine, "aiv_small", step_s=value)
        each = value + machine.fabric.tier("node").read_latency_s
        return with_transport(machine, "aiv_large", message_s=(("package", each), ("node", each)))

    small = _of_transport("aiv_small", "step_s")
    return dataclasses.replace(small, name="aiv_small.step_s, aiv_large.message_s", put=put)


def _reduce_rate() -> Parameter:
    def put(machine: Machine, value: float) -> Machine:
        for transport in machine.fabric.transports:
            machine = with_transport(machine, transport.name, reduce_s_per_byte=value)
        return machine

    each = _of_transport("aiv_large", "reduce_s_per_byte", "s/B")
    return dataclasses.replace(each, name="reduce_s_per_byte", put=put)


def _sdma_startup() -> Parameter:
    def put(machine: Machine, value: float) -> Machine:
        for name in ("sdma", "sdma_write", "roce"):
            machine = with_transport(machine, name, startup_s=value)
        return machine

    return dataclasses.replace(_of_transport("sdma", "startup_s"), put=put)


def _collective_row(row: dict[str, str], column: str, launch: str) -> Row:
    op, ranks, shard = row["op"], int(row["ranks"]), int(row["shard_bytes"])
    nbytes = shard if op == "all_reduce" else shard * ranks

    def model_s(machine: Machine, free: tuple[float, ...]) -> float:
        return collective(op, nbytes, on=machine, devices=range(ranks), launch=launch).time_s

    return Row(
        label=f"{op}, {ranks} dies, {shard:,} B shard",
        measured_s=float(row[column]) * 1e-6,
        source=row["source"],
        model_s=model_s,
    )


def _one_server() -> Calibration:
    table = read("one_server_collectives")
    return Calibration(
        name="Collectives in one CloudMatrix 384 server, benchmark",
        machine=cloudmatrix384("die"),
        rows=tuple(_collective_row(row, "bench_us", "benchmark") for row in table),
        parameters=(
            _exchange(),
            _of_transport("aiv_small", "overlap_s"),
            _of_table(("aiv_small",), "rates_bytes_per_s", ("node", "package"), "B/s"),
            _of_transport("aiv_large", "reduce_startup_s"),
            _reduce_rate(),
            _sdma_startup(),
        ),
        note="sizes of the 1.3 and 40.0 MiB rows are rounded to 0.1 MiB in the source",
    )


def _production() -> Calibration:
    table = [row for row in read("one_server_collectives") if row["production_us"]]
    return Calibration(
        name='The same in production (launch="production")',
        machine=cloudmatrix384("die"),
        rows=tuple(_collective_row(row, "production_us", "production") for row in table),
        parameters=(),
        note="offsets of small messages as published, one factor for the large ones; not refitted",
    )


# --- point to point -------------------------------------------------------------------------------


def _point_to_point(engine: str, scope: str, direction: str) -> Calibration:
    """Blocks one after the other: seconds a block = message + bytes / rate."""
    chosen = [
        row
        for row in read("point_to_point")
        if (row["engine"], row["scope"], row["direction"]) == (engine, scope, direction)
    ]
    name = "sdma_write" if (engine, direction) == ("sdma", "write") else engine
    shares = {("sdma", "node"): ("node", "package")}.get((engine, scope), (scope,))
    names = ("sdma", "sdma_write") if scope == "node" else (name,)
    message = _of_table(names, "message_s", shares, "s")

    def block_row(row: dict[str, str]) -> Row:
        nbytes = int(row["block_bytes"])

        def model_s(machine: Machine, free: tuple[float, ...]) -> float:
            return message.get(machine) + nbytes / free[0]

        return Row(
            label=f"{engine} {direction}, {nbytes:,} B blocks",
            measured_s=nbytes / float(row["gb_per_s"]) / 1e9,
            source=row["source"],
            model_s=model_s,
        )

    where = "between nodes" if scope == "pod" else "inside a node"
    return Calibration(
        name=f"Blocks by {engine}, {direction} {where}",
        machine=cloudmatrix384("die"),
        rows=tuple(block_row(row) for row in chosen),
        parameters=(message,),
        free=(("rate of the library measured", "B/s", 150e9),),
        note="the rate that collectives use is Table 1's, not this library's",
    )


def _roce() -> Calibration:
    tiers = ("pod", "node", "package")
    message = _of_table(("roce",), "message_s", tiers, "s")
    rate = _of_table(("roce",), "rates_bytes_per_s", tiers, "B/s")

    def block_row(row: dict[str, str]) -> Row:
        nbytes = int(row["block_bytes"])
        return Row(
            label=f"roce {row['direction']}, {nbytes:,} B blocks",
            measured_s=nbytes / float(row["gb_per_s"]) / 1e9,
            source=row["source"],
            model_s=lambda machine, free: message.get(machine) + nbytes / rate.get(machine),
        )

    chosen = [row for row in read("point_to_point") if row["engine"] == "roce"]
    return Calibration(
        name="Blocks by RoCE between nodes",
        machine=cloudmatrix384("die"),
        rows=tuple(block_row(row) for row in chosen),
        parameters=(message, rate),
    )


# --- NVL72, expert exchange -----------------------------------------------------------------------


def _nvl72() -> Calibration:
    def size_row(row: dict[str, str]) -> Row:
        nbytes, ranks, dtype = int(row["bytes"]), int(row["ranks"]), row["dtype"]

        def model_s(machine: Machine, free: tuple[float, ...]) -> float:
            devices = range(ranks)
            return collective("all_reduce", nbytes, on=machine, devices=devices, dtype=dtype).time_s

        return Row(
            label=f"all_reduce, {ranks} GPUs, {nbytes:,} B, {row['placement']}",
            measured_s=float(row["us"]) * 1e-6,
            source=row["source"],
            model_s=model_s,
        )

    return Calibration(
        name="GB200 NVL72",
        machine=gb200_nvl72(),
        rows=tuple(size_row(row) for row in read("nvl72_all_reduce")),
        parameters=(
            _of_transport("nvlink", "step_s"),
            _of_table(("nvlink",), "rates_bytes_per_s", ("node",), "B/s"),
        ),
        note="two sizes, each in and out of place",
    )


def _expert_exchange() -> Calibration:
    def phase_row(row: dict[str, str]) -> Row:
        def model_s(machine: Machine, free: tuple[float, ...]) -> float:
            return expert_exchange(
                row["phase"],
                int(row["tokens"]),
                int(row["top_k"]),
                int(row["token_bytes"]),
                on=machine,
                devices=range(int(row["ranks"])),
            ).time_s

        return Row(
            label=f"{row['phase']}, {row['ranks']} dies, {row['tokens']} tokens x {row['top_k']}",
            measured_s=float(row["us"]) * 1e-6,
            source=row["source"],
            model_s=model_s,
        )

    def phase_parameter(phase: str) -> Parameter:
        def put(machine: Machine, value: float) -> Machine:
            table = {**dict(machine.fabric.exchange_s), phase: value}
            fabric = dataclasses.replace(machine.fabric, exchange_s=tuple(table.items()))
            return dataclasses.replace(machine, fabric=fabric)

        return Parameter(
            name=f"exchange_s {phase}",
            unit="s",
            get=lambda machine: dict(machine.fabric.exchange_s)[phase],
            put=put,
        )

    return Calibration(
        name="Expert exchange on CloudMatrix 384",
        machine=cloudmatrix384("die"),
        rows=tuple(phase_row(row) for row in read("expert_exchange")),
        parameters=(phase_parameter("dispatch"), phase_parameter("combine")),
        note="one point for each phase: the fixed part is what the rest leaves over",
    )


def calibrations() -> tuple[Calibration, ...]:
    """All calibration sets, in the order in which they are printed."""
    return (
        _one_server(),
        _production(),
        _point_to_point("sdma", "node", "read"),
        _point_to_point("sdma", "pod", "read"),
        _point_to_point("sdma", "pod", "write"),
        _roce(),
        _nvl72(),
        _expert_exchange(),
        matmuls(),
    )
