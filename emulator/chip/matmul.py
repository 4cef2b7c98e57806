"""Seconds of one matmul on one device of a machine: how dies divide it, which tiling, what limits.

The model of one die is in `emulator.chip.pipeline`. Among the tilings that the library has, the
quickest is taken; a tiling of the caller's own, or the one that the published rules of the library
for row-major operands give, can be asked for instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emulator.chip import pipeline
from emulator.chip.arguments import (
    ITEM_BYTES,
    check,
    dtype_name,
    grouped,
    product_of,
    rows_of,
    size_of,
)
from emulator.chip.pipeline import Product, Share
from emulator.chip.tilings import shares_of, tilings_for
from emulator.machines import Machine

if TYPE_CHECKING:
    from kernels.tiling import Tiling

_ENGINES = ("cube_s", "l0_s", "l2_s", "memory_s", "store_s", "pad_s", "fixed_s")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulTime:
    """One matmul's duration on one device and where it goes.

    `cube_s`, `l0_s` (L1 to L0), `l2_s` and `memory_s` (to L1, from where the data are) and
    `store_s` are those of the busiest core of the busiest die; they overlap. `pad_s`, a copy of
    the operands named in `padded` into `pad_bytes` of padded rows, and `fixed_s` are what nothing
    hides. `rows` is how rows were taken to lie, "packed" or "padded". `utilization` is against the
    matrix unit's peak alone, `quoted_utilization` against the advertised figure. `groups` are the
    rows of each group, if there are groups; `share` is what the first die does: its groups, as
    (rows, how many have so many), and its n.
    """

    m: int
    k: int
    n: int
    batch: int
    groups: tuple[int, ...] | None
    dtype: str
    rows: str
    padded: tuple[str, ...]
    pad_bytes: int
    time_s: float
    bound_s: float
    limited_by: str
    flops: int
    bytes: int
    peak_flops_per_s: float
    quoted_flops_per_s: float
    memory_bytes_per_s: float
    tile: tuple[int, int]
    share: Share
    split_k: int
    tiles: int
    rounds: int
    cores: int
    cube_s: float
    l0_s: float
    l2_s: float
    memory_s: float
    store_s: float
    pad_s: float
    fixed_s: float

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations (two per multiply-add) per second on this device."""
        return self.flops / self.time_s

    @property
    def utilization(self) -> float:
        """`flops_per_s` over the matrix unit's peak."""
        return self.flops_per_s / self.peak_flops_per_s

    @property
    def quoted_utilization(self) -> float:
        """`flops_per_s` over the advertised figure."""
        return self.flops_per_s / self.quoted_flops_per_s

    @property
    def moved_bytes(self) -> int:
        """`bytes`, and what copies into padded rows read and write."""
        return self.bytes + 2 * self.pad_bytes

    @property
    def l2_bytes(self) -> int:
        """What the cores read from the L2 cache, tile by tile, and write to it."""
        (base_m, base_n), item = self.tile, ITEM_BYTES[self.dtype]
        rows, columns = -(-self.m // base_m), -(-self.n // base_n)
        read = self.k * (self.m * columns + self.n * rows) * item
        return max(self.bytes, self.batch * math.ceil(read + self.m * self.n * item))

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds per engine of the busiest core; all but `pad_s` and `fixed_s` overlap."""
        return {name: getattr(self, name) for name in _ENGINES}


def matmul_time(
    m: int,
    k: int,
    n: int,
    on: Machine,
    dtype: str = "bfloat16",
    b_layout: str = "nd",
    batch: int = 1,
    out_dtype: str | None = None,
    *,
    a_layout: str = "nd",
    groups: Sequence[int] | None = None,
    tiling: Tiling | str | None = None,
    l2: str = "cold",
    rows: str | None = None,
) -> MatmulTime:
    """Time in seconds of `batch` products a (m, k) @ b (k, n) on one device of `on`.

    Args:
        a_layout, b_layout: how they lie in memory: "nd" (row-major), "nd_t" (the transpose is
            row-major) or "nz" (fractals).
        out_dtype: of the result; the operands' by default. Products of integers are scaled, to
            BF16 by default, at a fixed cost (measured of INT8); as "int32" they are not.
        groups: rows of a for each of several b (experts): the m rows are those of all groups.
        tiling: a `kernels.Tiling` (`step_k` 1 is a kernel without large packets, whose loads and
            L1 to L0 take turns); "library" for the published rules of the library (row-major BF16,
            FP16, FP32); None for the quickest tiling that the library has.
        l2: "cold", operands come from memory; or "warm", from the L2 cache as far as it holds them.
        rows: "packed", rows of row-major operands lie one after the other, as arrays have them;
            unless they are multiples of 512 bytes (NVIDIA: 32), pieces of them touch up to twice as
            many lines as they fill, or the vector cores copy the operand into padded rows first:
            the quicker of both. "padded", each row takes whole lines. Default: packed where the
            library chooses the tiling, padded for a tiling of the caller's own.

    A device of two dies divides batch or groups, M or N between them, never K; the quickest
    division is taken. For a given tiling and padded rows, time never falls as m, k, n or the batch
    grow; packed rows that reach an aligned length are quicker than shorter ones.

    Raises:
        ValueError: a size below one, an unknown name, groups that do not add up to m, or a tiling
            that does not fit the core's buffers.
        NotImplementedError: a dtype that the matrix unit does not have.
        TypeError: `on` is not a machine, or a size is no integer.
    """
    if not isinstance(on, Machine):
        raise TypeError(f"matmul_time(on={on!r}): expected a Machine, such as em.cloudmatrix384()")
    asked = (m, k, n, on, dtype, a_layout, b_layout, batch, out_dtype, rows)
    if groups is not None:
        groups = rows_of(groups)
    try:
        return _answer(*asked, groups, tiling, l2)
    except TypeError as error:
        if not str(error).startswith("unhashable"):
            raise
        raise TypeError(
            f"matmul_time({m!r}, {k!r}, {n!r}, dtype={dtype!r}, ...): expected ints as sizes and "
            f"names as dtypes and layouts; got something that can change ({error})"
        ) from None


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
    (((rows, count),), columns) = matmul_time(
        m, k, n, on, dtype, batch=batch, out_dtype=out_dtype
    ).share
    return rows, columns, count


@functools.lru_cache(maxsize=65536, typed=True)
def _answer(
    m: int,
    k: int,
    n: int,
    on: Machine,
    dtype: str,
    a_layout: str,
    b_layout: str,
    batch: int,
    out_dtype: str | None,
    rows: str | None,
    groups: tuple[int, ...] | None,
    tiling: Any,
    l2: str,
) -> MatmulTime:
    m, k, n, batch = (
        size_of(name, size) for name, size in (("m", m), ("k", k), ("n", n), ("batch", batch))
    )
    name = dtype_name(dtype)
    check(on, name, a_layout, b_layout, out_dtype, l2, rows)
    sizes = ((m, batch),) if groups is None else grouped(groups, m, batch)
    chip, dies = on.chip, on.dies_per_device
    shares = shares_of(sizes, n, dies)
    most = max(r for r, _ in sizes)
    if rows is None:
        rows = "packed" if tiling is None or isinstance(tiling, str) else "padded"
    request = chip.engines.request_bytes
    product = product_of(sizes, k, n, name, a_layout, b_layout, out_dtype, l2, rows, request)
    tilings, cores = tilings_for(tiling, most, n, product, shares, chip)
    which, at, padded, part = pipeline.best(shares, product, tilings, chip, cores)
    total = sum(r * c for r, c in sizes)
    used = sum(c for r, c in sizes if r)
    read = math.ceil((total * k + used * k * n) * product.item)
    nbytes = read + math.ceil(total * n * product.out)
    flops = 2 * total * k * n
    peak = dies * chip.matmul_flops_per_s(name)
    compulsory = max(0, read - dies * chip.l2_bytes) if product.warm else nbytes
    bound = max(flops / peak, compulsory / (dies * chip.memory_bytes_per_s))
    part_rows, part_n = shares[which]
    split, tiles = int(tilings.split_k[at]), int(part["tiles"])
    return MatmulTime(
        m=m,
        k=k,
        n=n,
        batch=batch,
        groups=groups,
        dtype=name,
        rows=rows,
        padded=padded,
        pad_bytes=_pad_bytes(padded, shares[which], product, chip.engines.line_bytes) * dies,
        time_s=max(part["time_s"], bound),
        bound_s=bound,
        limited_by=_limit(part),
        flops=flops,
        bytes=nbytes,
        peak_flops_per_s=peak,
        quoted_flops_per_s=dies
        * chip.quoted_bf16_flops_per_s
        * (chip.matmul_flops_per_s(name) / chip.matmul_flops_per_s("bfloat16")),
        memory_bytes_per_s=dies * chip.memory_bytes_per_s,
        tile=(
            min(int(tilings.base[0, at]), _up(part_rows[0][0], chip.cube_m)),
            min(int(tilings.base[1, at]), _up(part_n, chip.cube_n)),
        ),
        share=shares[which],
        split_k=split,
        tiles=tiles,
        rounds=int(part["rounds"]),
        cores=min(tiles * split, cores),
        **{name: part[name] for name in _ENGINES},
    )


def _pad_bytes(padded: tuple[str, ...], share: Share, product: Product, line: int) -> int:
    """Bytes that copies of a share's operands take in padded rows."""
    (groups, n), k, item = share, product.k, product.item
    nbytes = 0
    if "a" in padded:
        along = product.a_layout == "rows"
        nbytes += sum(
            c * (r * _up(k * item, line) if along else k * _up(r * item, line)) for r, c in groups
        )
    if "b" in padded:
        along = product.b_layout == "rows"
        one = n * _up(k * item, line) if along else k * _up(n * item, line)
        nbytes += one * sum(c for r, c in groups if r)
    return nbytes


def _limit(part: dict[str, float]) -> str:
    """The engine that the busiest core waits for."""
    if part["fixed_s"] > max(part["load_s"], part["cube_s"], part["l0_s"]):
        return "launch"
    if part["pad_s"] > max(part["load_s"], part["cube_s"], part["l0_s"]):
        return "pad"
    if max(part["cube_s"], part["l0_s"]) >= part["load_s"]:
        return "cube" if part["cube_s"] >= part["l0_s"] else "l0"
    return max(("l2", "memory", "store"), key=lambda name: part[f"{name}_s"])


def _up(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
