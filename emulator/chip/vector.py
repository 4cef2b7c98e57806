"""Seconds of vector-unit kernels on one device: element-wise chains, reductions, layout changes,
gathers, sorts.

A kernel's work is divided over the vector cores, by lines of memory or by whole rows where results
need a row together; the busiest core decides. It moves tiles of half its buffer in and out while it
works on the other half, so loads, instructions and stores overlap; the first load and the last
store overlap with nothing. All cores together are held to memory's rate, and data come from memory:
what the L2 cache might still hold from the kernel before is not counted on.
"""

from __future__ import annotations

import dataclasses
import functools

from emulator.machines import Chip, Machine

_TILES = 4  # a core's share is taken in at least so many tiles, so that something overlaps


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a kernel's work lies in memory and how cores can divide it. The default is an
    element-wise kernel over contiguous arrays.

    Attributes:
        written: of the kernel's bytes those that are written; the others are read.
        shared: of the bytes read those that every core needs.
        row_bytes: what a row takes of the buffer, and `again` the bytes that are read once more if
            it does not fit.
        units: rows that a core takes whole; 0 if lines of memory may be divided.
        syncs: with `units`, how often all cores wait for one another if rows are divided among
            them after all; 0 if rows cannot be divided.
        instructions: vector instructions for each tile.
        padding: lanes used over lanes needed; rows that do not fill an instruction waste lanes.
        rows: rows of loads and stores that are not contiguous; `indexed` those among them whose
            address comes from an index.
        instruction_cycles: cycles of instructions that do not work on whole lanes.
    """

    written: int = 0
    shared: int = 0
    row_bytes: int = 0
    again: int = 0
    units: int = 0
    syncs: int = 0
    instructions: int = 1
    padding: float = 1.0
    rows: int = 0
    indexed: int = 0
    instruction_cycles: float = 0.0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_0:
            if not getattr(self, name) >= 0:
                raise ValueError(f"Spread({name}={getattr(self, name)!r}): expected at least 0")
        if not self.padding >= 1:
            raise ValueError(f"Spread(padding={self.padding!r}): expected at least 1")


_AT_LEAST_0 = tuple(f.name for f in dataclasses.fields(Spread) if f.name != "padding")

PLAIN = Spread()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VectorTime:
    """One kernel's duration and where it goes.

    `compute_s`, `load_s` and `store_s` are those of the busiest core, `memory_s` all bytes at
    memory's rate; these overlap. `launch_s` is what nothing hides: starts, the first load's wait,
    the last store, waits of cores for one another. `bytes` are those asked for and those read
    again.
    """

    time_s: float
    bound_s: float
    limited_by: str
    compute_s: float
    load_s: float
    store_s: float
    memory_s: float
    launch_s: float
    bytes: int
    cores: int


@functools.lru_cache(maxsize=65536)
def vector_time(
    lane_ops: int, nbytes: int, on: Machine, launches: int = 1, spread: Spread = PLAIN
) -> VectorTime:
    """Time in seconds of one kernel on one device of `on`.

    Args:
        lane_ops: FP32 operations, each one lane for one cycle (see `lane_factor` for other types).
        nbytes: memory traffic, reads and writes together.
        launches: kernel starts; 0 for work that rides along with another kernel.
        spread: how the work lies in memory and divides over cores.

    A device of several dies divides evenly. The peak counts a multiply-add as two, so single
    operations run at half of it; the bound is taken at the full one, and at memory's full rate.

    Raises:
        ValueError: negative work.
    """
    if lane_ops < 0 or nbytes < 0 or launches < 0:
        raise ValueError(
            f"vector_time(lane_ops={lane_ops}, nbytes={nbytes}, launches={launches}): expected "
            "counts of at least 0"
        )
    if spread.written + spread.shared > nbytes:
        raise ValueError(
            f"vector_time(nbytes={nbytes}): of these, {spread.written} are written and "
            f"{spread.shared} shared; together they must not be more"
        )
    cores = _rates(on)[0]
    best = _time(lane_ops, nbytes, on, launches, spread, spread.units, 0)
    if 0 < spread.units < cores and spread.syncs:
        divided = _time(lane_ops, nbytes, on, launches, spread, 0, spread.syncs)
        best = min(best, divided, key=lambda time: time.time_s)
    return best


def _time(
    lane_ops: int, nbytes: int, on: Machine, launches: int, spread: Spread, units: int, syncs: int
) -> VectorTime:
    """The kernel with `units` of whole rows, or with any division if 0."""
    chip, v = on.chip, on.chip.vector
    clock, line = chip.clock_hz, chip.engines.line_bytes
    cores, peak, memory = _rates(on)
    whole = units > 0

    def busiest(amount: float, grain: int) -> float:
        """What the busiest core has of an amount: its rows' share, or so many grains."""
        if whole:
            return amount * -(-units // cores) / units
        return min(amount, -(-amount // (grain * cores)) * grain)

    lanes = v.lane_bytes // 4
    lanes_per_s = min(clock * lanes, peak / 2 / cores)
    kept = spread.row_bytes * (1 if whole else spread.units / cores)
    again = 0 if 0 < kept <= v.ub_bytes else spread.again
    read = busiest(nbytes - spread.shared - spread.written + again, line)
    written = busiest(spread.written, line)
    tiles = max(_TILES, -(-(read + written) // (v.ub_bytes // 2))) if lane_ops else 0
    compute_s = busiest(lane_ops * spread.padding, lanes) / lanes_per_s
    compute_s += tiles * spread.instructions * v.startup_cycles / clock
    compute_s += busiest(spread.instruction_cycles, 1) / clock
    rows = busiest(spread.rows, 1) * v.row_cycles + busiest(spread.indexed, 1) * v.index_cycles
    shared = min(spread.shared, read + written) / v.load_warm_bytes_per_cycle
    load = max(read / v.load_bytes_per_cycle, rows) + shared
    store = written / v.store_bytes_per_cycle
    memory_s = (nbytes + again) / (memory * chip.memory_efficiency)

    # What nothing hides: starts, waits, the first tile's load and the last one's store.
    tile = v.ub_bytes // 2
    first = min(read / _TILES, tile) / v.load_bytes_per_cycle
    last = min(written / _TILES, tile) / v.store_bytes_per_cycle
    waits = v.load_wait_cycles * (read + shared > 0) + v.store_wait_cycles * (written > 0)
    launch_s = launches * chip.launch_s + (waits + first + last) / clock + syncs * v.sync_s

    bound_s = max(lane_ops / peak, nbytes / memory)
    limits = {
        "vector": compute_s,
        "memory": memory_s,
        "load": load / clock,
        "store": store / clock,
    }
    limit = max(limits, key=lambda name: limits[name])
    busy_s = limits[limit]
    return VectorTime(
        time_s=max(busy_s + launch_s, bound_s),
        bound_s=bound_s,
        limited_by=limit if busy_s > launch_s else "launch",
        compute_s=compute_s,
        load_s=load / clock,
        store_s=store / clock,
        memory_s=memory_s,
        launch_s=launch_s,
        bytes=nbytes + again,
        cores=min(cores, units or max(1, -(-nbytes // line), lane_ops // lanes)),
    )


def copy_time(rows: int, nbytes: int, chip: Chip) -> float:
    """Seconds in which the vector cores of a die copy `nbytes` of rows to another place in memory,
    as the first part of a kernel of the matrix cores, which wait for it.
    """
    v = chip.vector
    own = max(nbytes / v.load_bytes_per_cycle, nbytes / v.store_bytes_per_cycle)
    own_s = max(own, rows * v.row_cycles) / (chip.vector_cores * chip.clock_hz)
    waits_s = (v.load_wait_cycles + v.store_wait_cycles) / chip.clock_hz
    busy_s = max(own_s, 2 * nbytes / chip.usable_memory_bytes_per_s)
    return v.mixed_s + waits_s + busy_s + v.sync_s


@functools.lru_cache(maxsize=64)
def _rates(on: Machine) -> tuple[int, float, float]:
    """Of a device: vector cores, their FP32 FLOP/s, and memory's bytes per second."""
    chip, dies = on.chip, on.dies_per_device
    peak = dies * chip.vector_flops_per_s("float32")
    return dies * chip.vector_cores, peak, dies * chip.memory_bytes_per_s


@functools.lru_cache(maxsize=1024)
def lane_factor(dtype: str, on: Machine) -> float:
    """FP32 lane operations that one operation on an element of `dtype` costs.

    Raises:
        NotImplementedError: the vector units have no rate for `dtype`.
    """
    chip = on.chip
    if dtype.startswith("key<"):  # pairs of 32-bit words
        return 2 * lane_factor("uint32", on)
    if dtype == "complex64":  # real and imaginary part; a product takes four
        return 4.0
    if dtype.startswith(("float8", "float4", "float6", "int4", "uint4", "int2", "uint2")):
        return lane_factor("int8", on)  # only conversions exist for these
    return chip.vector_flops_per_s("float32") / chip.vector_flops_per_s(dtype)
