"""Seconds of one matmul on one device: tiles over cores, and the slowest of the engines that feed
them.

Mechanism, per die. The output is cut in base tiles; each core computes whole tiles (or a share of K
of one tile, when there are fewer tiles than cores), one after another:

- cube: ceil(K / base_k) matrix instructions per tile, each its multiply-adds plus a head;
- load: each tile reads its rows of A and columns of B over the whole K. A core has a rate of its
  own, all cores share the last-level cache's, and every byte comes from memory once;
- store: the tile leaves through the fixpipe; only the last one is not hidden behind the next tile's
  work.

Cube and load overlap, so the busiest core takes the longer of the two; launch, first load and last
store add to it. Among the tiles and K splits that the library knows, the quickest is taken. Each
candidate's time is monotone in m, k and n, hence so is the minimum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

from emulator.chip.engines import Engines, engines_of
from emulator.machines import Chip, Machine

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "int8": 1, "float32": 4, "hf32": 4, "tf32": 4}
_LARGEST = 2**40
OUT_BYTES = {"bfloat16": 2, "float16": 2, "int8": 4, "float32": 4, "hf32": 4, "tf32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulTime:
    """One matmul's duration on one device and where it goes.

    `cube_s`, `load_s` and `store_s` are those of the busiest core; they overlap. `fixed_s` is what
    nothing hides. `utilization` is against the cube-only peak, `quoted_utilization` against the
    advertised figure.
    """

    m: int
    k: int
    n: int
    batch: int
    dtype: str
    time_s: float
    bound_s: float
    limited_by: str
    flops: int
    bytes: int
    peak_flops_per_s: float
    quoted_flops_per_s: float
    tile: tuple[int, int]
    split_k: int
    tiles: int
    cores: int
    cube_s: float
    load_s: float
    store_s: float
    fixed_s: float

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations (two per multiply-add) per second on this device."""
        return self.flops / self.time_s if self.time_s else 0.0

    @property
    def utilization(self) -> float:
        return self.flops_per_s / self.peak_flops_per_s

    @property
    def quoted_utilization(self) -> float:
        return self.flops_per_s / self.quoted_flops_per_s

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds per engine of the busiest core; cube, load and store overlap."""
        return {
            "cube_s": self.cube_s,
            "load_s": self.load_s,
            "store_s": self.store_s,
            "fixed_s": self.fixed_s,
        }


def matmul_time(
    m: int,
    k: int,
    n: int,
    on: Machine,
    dtype: str = "bfloat16",
    b_layout: str = "nd",
    batch: int = 1,
    out_dtype: str | None = None,
) -> MatmulTime:
    """Time in seconds of `batch` products a (m, k) @ b (k, n) on one device of `on`.

    `b_layout` is "nd" (row-major) or "nz" (fractals); `out_dtype` defaults to the operands' (INT32
    for INT8). A device of two dies divides the batch, M or N between them, never K; the quickest
    division is taken.

    Raises:
        ValueError: a size below one, an unknown layout or `out_dtype`.
        NotImplementedError: a dtype that the matrix unit does not have.
        TypeError: `on` is not a machine, or a size is no integer.
    """
    name = dtype_name(dtype)
    out_name = name if out_dtype is None else dtype_name(out_dtype)
    if out_dtype is not None and out_name not in OUT_BYTES and out_name != "int32":
        raise ValueError(
            f"matmul_time(out_dtype={out_dtype!r}): expected one of {', '.join(OUT_BYTES)}, int32"
        )
    sizes = {"m": m, "k": k, "n": n, "batch": batch}
    m, k, n, batch = (_size(what, size) for what, size in sizes.items())
    if not isinstance(b_layout, str):
        raise TypeError(f"matmul_time(b_layout={b_layout!r}): expected 'nd' or 'nz'")
    return _matmul_time(m, k, n, on, name, b_layout, batch, OUT_BYTES.get(out_name, 4))


def die_share(
    m: int,
    k: int,
    n: int,
    on: Machine,
    dtype: str = "bfloat16",
    batch: int = 1,
    out_dtype: str | None = None,
) -> tuple[int, int, int]:
    """How `matmul_time` divides a product over a device's dies: the (m, n, batch) of the first die.
    At most one of them is smaller than the device's; the last die has what remains.

    Raises:
        ValueError, TypeError, NotImplementedError: as `matmul_time`.
    """
    time = matmul_time(m, k, n, on, dtype, batch=batch, out_dtype=out_dtype)
    out = OUT_BYTES.get(time.dtype if out_dtype is None else dtype_name(out_dtype), 4)
    die = _busiest_die(m, k, n, on, time.dtype, "nd", batch, out)
    return die.m, die.n, die.batch


def _size(name: str, value: int) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise TypeError(f"matmul_time({name}={value!r}): expected an int") from error
    if isinstance(value, bool):
        raise TypeError(f"matmul_time({name}={value!r}): expected an int")
    if not 1 <= size <= _LARGEST:
        raise ValueError(
            f"matmul_time({name}={size}): expected a size of at least 1 and at most 2^40"
        )
    return size


def dtype_name(dtype: object) -> str:
    """The name of a dtype given as a name, a NumPy dtype or a scalar type."""
    return str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype))


@functools.lru_cache(maxsize=65536)
def _matmul_time(
    m: int, k: int, n: int, on: Machine, dtype: str, b_layout: str, batch: int, out: int
) -> MatmulTime:
    _check(on, dtype, b_layout)
    chip, dies = on.chip, on.dies_per_device
    die = _busiest_die(m, k, n, on, dtype, b_layout, batch, out)
    item = ITEM_BYTES[dtype]
    flops = 2 * batch * m * k * n
    nbytes = batch * ((m * k + k * n) * item + m * n * out)
    peak = dies * chip.matmul_flops_per_s(dtype)
    bound = max(flops / peak, nbytes / (dies * chip.memory_bytes_per_s))
    quoted = (
        dies * chip.quoted_bf16_flops_per_s * peak / (dies * chip.matmul_flops_per_s("bfloat16"))
    )
    return dataclasses.replace(
        die,
        m=m,
        n=n,
        batch=batch,
        flops=flops,
        bytes=nbytes,
        peak_flops_per_s=peak,
        quoted_flops_per_s=quoted,
        time_s=max(die.time_s, bound),
        bound_s=bound,
    )


def _busiest_die(
    m: int, k: int, n: int, on: Machine, dtype: str, b_layout: str, batch: int, out: int
) -> MatmulTime:
    """The first die's share under the quickest division of batch, M or N (the first of equals)."""
    dies = on.dies_per_device
    shares = {  # a dict, unlike a set, has an order
        (m, n, -(-batch // dies)): None,
        (-(-m // dies), n, batch): None,
        (m, -(-n // dies), batch): None,
    }
    engines = engines_of(on.chip)
    return min(
        (_die_time(mm, k, nn, bb, on.chip, engines, dtype, b_layout, out) for mm, nn, bb in shares),
        key=lambda t: t.time_s,
    )


def _check(on: Machine, dtype: str, b_layout: str) -> None:
    if not isinstance(on, Machine):
        raise TypeError(f"matmul_time(on={on!r}): expected a Machine, such as em.cloudmatrix384()")
    if b_layout not in ("nd", "nz"):
        raise ValueError(
            f"matmul_time(b_layout={b_layout!r}): expected 'nd' (row-major) or 'nz' (fractals)"
        )
    if dtype not in ITEM_BYTES:
        raise NotImplementedError(
            f"matmul_time(dtype={dtype!r}): the matrix unit of {on.chip.name} has "
            f"{', '.join(name for name, _ in on.chip.matmul_peaks_flops_per_s)}"
        )


def _die_time(
    m: int,
    k: int,
    n: int,
    batch: int,
    chip: Chip,
    engines: Engines,
    dtype: str,
    b_layout: str,
    out: int,
) -> MatmulTime:
    """The quickest tile and K split on one die."""
    best: MatmulTime | None = None
    for tile in _tiles(m, n, chip, engines, dtype):
        for split in (1, 2, 4, 8, 16):
            if split > 1 and (k < split or not _starved(m, n, batch, tile, chip)):
                break
            time = _candidate(m, k, n, batch, tile, split, chip, engines, dtype, b_layout, out)
            if best is None or time.time_s < best.time_s:
                best = time
    assert best is not None
    return best


def _tiles(m: int, n: int, chip: Chip, engines: Engines, dtype: str) -> tuple[tuple[int, int], ...]:
    """Base tiles: the library's, cut down to what the matrix has, and, if there are few rows, every
    narrower one that gives each core at most one (so that a smaller N has all tiles of a larger).
    """
    tiles: dict[tuple[int, int], None] = {}
    for bm, bn in engines.tiles:
        bm = min(bm, _up(m, chip.cube_m))
        tiles[bm, min(bn, _up(n, chip.cube_n))] = None
        even = _up(-(-n // chip.cube_cores), chip.cube_n)
        if m <= 128:
            tiles.update(((bm, width), None) for width in range(even, bn + 1, chip.cube_n))
    return tuple(tiles)


def _starved(m: int, n: int, batch: int, tile: tuple[int, int], chip: Chip) -> bool:
    return batch * -(-m // tile[0]) * -(-n // tile[1]) < chip.cube_cores


def _candidate(
    m: int,
    k: int,
    n: int,
    batch: int,
    tile: tuple[int, int],
    split: int,
    chip: Chip,
    engines: Engines,
    dtype: str,
    b_layout: str,
    out: int,
) -> MatmulTime:
    """One tile and K split, all engines. Sizes are those of one die."""
    item = ITEM_BYTES[dtype]
    bm, bn = tile
    kk = -(-k // split)
    tiles = batch * -(-m // bm) * -(-n // bn)
    work = tiles * split
    rounds = -(-work // chip.cube_cores)  # of the busiest core
    cores = min(work, chip.cube_cores)
    cycle_s = 1.0 / chip.clock_hz

    macs_per_cycle = chip.matmul_flops_per_s(dtype) / (2 * chip.cube_cores * chip.clock_hz)
    k_step = max(1, engines.k_step_bytes // item)
    k_padded = _up(kk, max(1, 32 // item))
    mmads = -(-k_padded // k_step)
    mmad_cycles = bm * bn * k_padded / macs_per_cycle + mmads * engines.head_cycles
    cube_s = rounds * mmad_cycles * cycle_s

    load_a, load_b = bm * kk * item, bn * kk * item
    b_rate = (
        engines.load_nz_bytes_per_cycle if b_layout == "nz" else engines.load_nd_bytes_per_cycle
    )
    own_s = rounds * (load_a / engines.load_nd_bytes_per_cycle + load_b / b_rate) * cycle_s
    cold = batch * (m * k + k * n) * item
    hot = max(0, work * (load_a + load_b) - cold)
    memory_rate = chip.usable_memory_bytes_per_s
    shared_s = hot / (chip.l2_bytes_per_s * engines.l2_efficiency) + cold / memory_rate
    # No core loads from memory faster than its own rate: its first tile, or an even share of all.
    cold_core = max(load_a + load_b, cold / chip.cube_cores)
    cold_core_s = cold_core / engines.cold_bytes_per_cycle * cycle_s
    load_s = max(own_s, shared_s, cold_core_s)

    store_tile_s = bm * bn * out / engines.store_bytes_per_cycle * cycle_s
    written = batch * m * n * out
    store_s = max(rounds * store_tile_s, written / memory_rate)
    fixed_s = chip.launch_s + engines.first_load_s + store_tile_s
    if split > 1:  # partial sums in FP32 through the last-level cache
        fixed_s += engines.split_k_s + 2 * split * batch * m * n * 4 / chip.l2_bytes_per_s

    # What is read and what is written share the memory, so the write adds to the loads, not to the
    # cube.
    feed_s = load_s + written / memory_rate
    limits = {"cube": cube_s, "memory": feed_s, "store": store_s}
    limit = max(limits, key=lambda name: limits[name])
    if limit == "memory" and hot / (chip.l2_bytes_per_s * engines.l2_efficiency) > load_s / 2:
        limit = "l2"
    if fixed_s > max(limits.values()):
        limit = "launch"
    return MatmulTime(
        m=m,
        k=k,
        n=n,
        batch=batch,
        dtype=dtype,
        time_s=max(limits.values()) + fixed_s,
        bound_s=0.0,
        limited_by=limit,
        flops=0,
        bytes=0,
        peak_flops_per_s=1.0,
        quoted_flops_per_s=1.0,
        tile=tile,
        split_k=split,
        tiles=tiles,
        cores=cores,
        cube_s=cube_s,
        load_s=load_s,
        store_s=store_s,
        fixed_s=fixed_s,
    )


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
