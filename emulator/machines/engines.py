"""The paths around one matrix core: what a data sheet does not list and a matmul waits for.

They belong to the core's architecture rather than to one product, so they are in cycles and follow
the clock of the chip that they are used for.
"""

from __future__ import annotations

import dataclasses

from emulator.machines.fact import Citation, build, check_not_negative, check_positive, cite

KiB = 1024
us = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """Buffers, rates and fixed costs around one matrix core.

    Attributes:
        tiles: output tiles (rows, columns) that the library chooses from.
        narrow: further tiles for products whose rows are one tile.
        splits: tiles for which K may also be divided among cores.
        l0a_bytes, l0b_bytes, l0c_bytes, l1_bytes: the core's buffers. A and B use half of theirs at
            a time, the other half is being filled.
        k_chunk_bytes: bytes of each row that one matrix instruction takes at most.
        gemv_rows: rows of A that a product of a single row moves to L0A.
        step_k: matrix instructions of the base tile per load into L1.
        head_cycles: cycles of a matrix instruction beyond its multiply-adds.
        l0a_bytes_per_cycle, l0b_bytes_per_cycle, l0_head_cycles: L1 to L0A and to L0B, one after
            the other, with a head for each instruction.
        load_bytes_per_cycle: memory to L1 per core while all cores load, data in the L2 cache.
        load_nd_bytes_per_cycle, load_row_cycles: the same for a single core and row-major data,
            where each row takes at least so many cycles.
        load_nz_bytes_per_cycle: the same for fractals, which come in one piece.
        load_cold_bytes_per_cycle: memory to L1 per core, data not in the L2 cache.
        store_bytes_per_cycle: L0C to memory per core.
        store_share: results of all cores go to the L2 cache at this share of its read rate.
        overlap: exponent of the norm that joins engines which work at the same time: 1 would be
            one after the other, infinity a perfect overlap.
        line_bytes: a row longer than this is moved in whole lines of it.
        request_bytes: what the L2 cache hands out at once: a piece of a row that does not start at
            a multiple of it touches more of them.
        tiling_s: scalar work before the first load of a kernel that loops over tiles.
        split_k_s: fixed cost of adding the partial sums of a divided K.
        int8_s: what an INT8 kernel that also scales its result costs beyond a plain one.
        sustained_clock: share of the nominal clock that long matmuls keep.
        fit: how far the model lies from published measurements, to print.
    """

    tiles: tuple[tuple[int, int], ...]
    narrow: tuple[tuple[int, int], ...]
    splits: tuple[tuple[int, int], ...]
    l0a_bytes: int
    l0b_bytes: int
    l0c_bytes: int
    l1_bytes: int
    k_chunk_bytes: int
    gemv_rows: int
    step_k: int
    head_cycles: float
    l0a_bytes_per_cycle: float
    l0b_bytes_per_cycle: float
    l0_head_cycles: float
    load_bytes_per_cycle: float
    load_nd_bytes_per_cycle: float
    load_row_cycles: float
    load_nz_bytes_per_cycle: float
    load_cold_bytes_per_cycle: float
    store_bytes_per_cycle: float
    store_share: float
    overlap: float
    line_bytes: int
    request_bytes: int
    tiling_s: float
    split_k_s: float
    int8_s: float
    sustained_clock: float
    fit: str
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        may_be_zero = {"head_cycles", "l0_head_cycles", "load_row_cycles"}
        may_be_zero |= {"tiling_s", "split_k_s", "int8_s"}
        check_not_negative(self, *sorted(may_be_zero))
        numbers = {f.name for f in dataclasses.fields(self) if f.type in ("int", "float")}
        check_positive(self, *sorted(numbers - may_be_zero))
        for name in ("store_share", "sustained_clock"):
            if getattr(self, name) > 1:
                raise ValueError(
                    f"Engines.{name} must be a share in (0, 1]; got {getattr(self, name)!r}"
                )
        if self.overlap < 1:
            raise ValueError(f"Engines.overlap must be at least 1; got {self.overlap!r}")
        for name, least in (("tiles", 1), ("splits", 1), ("narrow", 0)):
            tiles = getattr(self, name)
            pairs = all(len(tile) == 2 and min(tile) >= 1 for tile in tiles)
            if len(tiles) < least or not pairs:
                raise ValueError(
                    f"Engines.{name} must be pairs (rows, columns) above 0, at least {least}; got "
                    f"{tiles!r}"
                )
        if self.k_chunk_bytes % 32:
            raise ValueError(
                f"Engines.k_chunk_bytes must be a multiple of 32; got {self.k_chunk_bytes!r}"
            )
        for tile in (*self.tiles, *self.narrow):
            self.check_tile(*tile)

    def check_tile(
        self, base_m: int, base_n: int, chunk_bytes: int | None = None, step_k: int = 1
    ) -> None:
        """Refuses an output tile whose operands or sums do not fit their buffers.

        Raises:
            ValueError: which buffer is too small, and by how much.
        """
        chunk = self.chunk_bytes(base_m, base_n) if chunk_bytes is None else chunk_bytes
        needs = {
            "L0C": (base_m * base_n * 4, self.l0c_bytes, "FP32 sums"),
            "L0A": (base_m * chunk, self.l0a_bytes, "rows of A"),
            "L0B": (base_n * chunk, self.l0b_bytes, "columns of B"),
            "L1": (
                min(base_m, base_n) * step_k * chunk + max(base_m, base_n) * chunk,
                self.l1_bytes,
                "steps of A and B",
            ),
        }
        for buffer, (need, has, what) in needs.items():
            if need > has:
                raise ValueError(
                    f"a tile of {base_m} x {base_n} does not fit {buffer}: its {what} need "
                    f"{need:,} bytes, {need - has:,} more than the {has:,} there are; take a "
                    "smaller tile"
                )

    def row_bytes(self, rows: int) -> int:
        """Bytes of each of `rows` rows that L1 takes at a time: A and B have a half each, one part
        of it being filled; in whole requests of the cache.
        """
        fits = self.l1_bytes // (4 * rows)
        unit = self.request_bytes if fits >= self.request_bytes else 32
        return fits // unit * unit

    def chunk_bytes(self, base_m: int, base_n: int) -> int:
        """Bytes of K that one matrix instruction takes of each row: what half of L0A and L0B hold,
        in steps of 32.
        """
        fits = min(self.l0a_bytes // (2 * base_m), self.l0b_bytes // (2 * base_n))
        return min(self.k_chunk_bytes, fits // 32 * 32)


_ROWS = tuple(range(16, 129, 16))
_TABLES = "Ascend/mskpp 065b75c"
_LADDER = "cannmirror/asc-devkit 0da921b, 8192^3 on a 910B1"

ASCEND_DAV_C220 = build(
    Engines,
    cite(
        "documented",
        "ops-nn e5c3fa9 mat_mul_v3, catlass 0dfcf9d",
        "base tile 128 x 256, or fewer rows, for some shapes 256 x 128, 128 x 128 or 64 x 512; "
        "narrow tiles for up to 64 rows are inferred; K of an instruction fills half of L0, up to "
        "the 512 bytes of 64 x 64 tiles",
        tiles=(
            *((rows, columns) for rows in _ROWS for columns in (128, 256)),
            *((rows, columns) for rows in _ROWS[:4] for columns in range(16, 256, 16)),
            *((256, 128), (64, 512), (32, 512), (16, 512)),
        ),
        splits=tuple((rows, columns) for rows in _ROWS for columns in (64, 128, 256)),
        k_chunk_bytes=512,
        step_k=4,
    ),
    cite(
        "assumed",
        "as for up to 64 rows",
        "columns divided evenly among cores",
        narrow=tuple((rows, columns) for rows in _ROWS[4:] for columns in range(32, 256, 32)),
    ),
    cite(
        "documented",
        "asc-devkit 0da921b Mmad",
        "with a single row it switches to a matrix-vector mode; that the row alone goes to L0A, "
        "and that the mode is no slower, is assumed",
        gemv_rows=1,
    ),
    cite(
        "documented",
        "hicann/runtime 681ef76 platform_config",
        l0a_bytes=64 * KiB,
        l0b_bytes=64 * KiB,
        l0c_bytes=128 * KiB,
        l1_bytes=512 * KiB,
    ),
    cite("inferred", _LADDER, "matrix instructions of the tuned kernel", head_cycles=9.0),
    cite(
        "measured",
        _TABLES,
        "2r + 1 and 4r + 1 cycles for r x 512 bytes",
        l0a_bytes_per_cycle=256.0,
        l0b_bytes_per_cycle=128.0,
    ),
    cite("inferred", _LADDER, "one core, 64^3 and 128x256x64 tiles alike", l0_head_cycles=47.0),
    cite(
        "inferred",
        "fit to published matmuls; 84.5 in " + _LADDER,
        "all cores loading; below the 119 to 160 of one",
        load_bytes_per_cycle=93.53,
    ),
    cite(
        "measured",
        _TABLES,
        "one core",
        load_nd_bytes_per_cycle=119.0,
        load_nz_bytes_per_cycle=160.0,
    ),
    cite("inferred", _LADDER, "rows of 128 bytes at 35.6 bytes a cycle", load_row_cycles=3.6),
    cite("inferred", "fit", "about 100 GB/s", load_cold_bytes_per_cycle=54.0),
    cite("measured", _TABLES, store_bytes_per_cycle=118.0),
    cite("assumed", "not measured; matmuls that store much agree", store_share=0.5),
    cite(
        "inferred",
        _LADDER,
        "cube 3076, loads 3436, together 3559 us; its later steps alike",
        overlap=8.0,
    ),
    cite("documented", "msopprof d6c29df", line_bytes=512),
    cite(
        "inferred",
        "catlass 0dfcf9d",
        "its selector takes 80 GB/s per core, half the usual rate, for rows that are no multiple "
        "of 512 bytes: pieces of 512 bytes that touch two lines",
        request_bytes=512,
    ),
    cite(
        "measured",
        "asc-devkit best practices",
        "2 to 4 us",
        tiling_s=3.0 * us,
    ),
    cite("assumed", "a start of the vector cores", split_k_s=2.0 * us),
    cite(
        "measured",
        "published INT8 matmuls with scaled results",
        "intercept of 15 us, less a launch",
        int8_s=10.8 * us,
    ),
    cite("assumed", "the 8192^3 ladder needs no slower clock", sustained_clock=1.0),
    fit=(
        "matmul times: one number fitted to 9 published library kernels (8 degrees of freedom): "
        "median error 3 %, largest 9 % (1024^3 in a host loop); see cm384 validate"
    ),
)

_WIDE = ((256, 256), (128, 256), (256, 128), (128, 128), (64, 256), (64, 128), (64, 64))

NVIDIA_TENSOR_CORE = build(
    Engines,
    cite(
        "documented",
        "CUTLASS",
        "256 x 256 is what a pair of SMs shares",
        tiles=(*_WIDE, *((64, columns) for columns in (16, 32))),
        narrow=(),
        splits=_WIDE,
    ),
    cite(
        "assumed",
        "public depth only: tiles, peak and memory limit, the paths inside an SM do not",
        l0a_bytes=128 * KiB,
        l0b_bytes=128 * KiB,
        l0c_bytes=256 * KiB,
        l1_bytes=227 * KiB,
        k_chunk_bytes=128,
        gemv_rows=16,
        step_k=4,
        head_cycles=0.0,
        l0a_bytes_per_cycle=1024.0,
        l0b_bytes_per_cycle=1024.0,
        l0_head_cycles=0.0,
    ),
    cite(
        "assumed",
        "64 bytes a cycle and SM from L2",
        load_bytes_per_cycle=64.0,
        load_nd_bytes_per_cycle=64.0,
        load_nz_bytes_per_cycle=64.0,
        load_row_cycles=0.0,
        load_cold_bytes_per_cycle=64.0,
        store_bytes_per_cycle=64.0,
        store_share=0.5,
    ),
    cite("assumed", "as on Ascend", overlap=8.0),
    cite("documented", "CUDA C++ Programming Guide", line_bytes=128, request_bytes=32),
    cite("assumed", "tiles are computed on the host", tiling_s=1.0 * us),
    cite("assumed", "a start of a second kernel", split_k_s=2.0 * us),
    cite("assumed", "scaled in the same kernel", int8_s=0.0),
    cite("assumed", "the clock of the quoted peak", sustained_clock=1.0),
    fit="matmul times: tiles, peak and memory at public depth, fitted to no measurement",
)
