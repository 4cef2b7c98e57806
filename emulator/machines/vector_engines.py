"""The paths around one vector core: what an element-wise kernel, a reduction or a copy waits for.

As with the matrix cores, the numbers belong to the core's architecture: they are in cycles and
follow the clock of the chip that they are used for. What is called UB is a vector core's own
buffer: the unified buffer of Ascend, registers and shared memory of an SM.
"""

from __future__ import annotations

import dataclasses

from emulator.machines.fact import Citation, build, check_not_negative, check_positive, cite

KiB = 1024
us = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VectorEngines:
    """Buffer, rates and fixed costs around one vector core.

    Attributes:
        lane_bytes: what one instruction works on per cycle (a repeat); FP32 has a lane per 4 bytes.
        startup_cycles: of a vector instruction, once for each tile.
        ub_bytes: the core's buffer. Half of it is worked on while the other half is moved.
        block_bytes: rows in the buffer start at multiples of it.
        load_wait_cycles: from the start of a load to its first bytes.
        load_bytes_per_cycle: memory to buffer per core, data not in the L2 cache.
        load_warm_bytes_per_cycle: the same for data that another core has just read.
        store_wait_cycles, store_bytes_per_cycle: buffer to memory per core.
        row_cycles: least cycles of each row of a load or store that has many.
        index_cycles: least cycles of each row whose address comes from an index.
        picks_per_cycle: elements that a gather inside the buffer picks.
        merged_per_cycle: elements that leave a merge of sorted lists.
        merge_lists: sorted lists that one merge takes; `sorted_elements` one instruction sorts.
        sync_s: all cores wait for one another inside a kernel, and partial results are combined.
        score_keys: keys of a tile of fused attention; its rows are the matrix core's base tile.
        mixed_s: start of a kernel of matrix and vector cores beyond that of one of them.
        scores_in_l2: whether matrix and vector cores meet in the L2 cache, not inside a core.
    """

    lane_bytes: int
    startup_cycles: float
    ub_bytes: int
    block_bytes: int
    load_wait_cycles: float
    load_bytes_per_cycle: float
    load_warm_bytes_per_cycle: float
    store_wait_cycles: float
    store_bytes_per_cycle: float
    row_cycles: float
    index_cycles: float
    picks_per_cycle: float
    merged_per_cycle: float
    merge_lists: int
    sorted_elements: int
    sync_s: float
    score_keys: int
    mixed_s: float
    scores_in_l2: bool
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        may_be_zero = {f.name for f in dataclasses.fields(self) if f.name.endswith("_cycles")}
        may_be_zero |= {"sync_s", "mixed_s"}
        check_not_negative(self, *sorted(may_be_zero))
        numbers = {f.name for f in dataclasses.fields(self) if f.type in ("int", "float")}
        check_positive(self, *sorted(numbers - may_be_zero))
        if self.merge_lists < 2:
            raise ValueError(
                f"VectorEngines.merge_lists must be at least 2; got {self.merge_lists!r}"
            )
        for name in ("lane_bytes", "block_bytes"):
            if 2 * getattr(self, name) > self.ub_bytes:
                raise ValueError(
                    f"VectorEngines.{name} {getattr(self, name):,}: two of them must fit ub_bytes, "
                    f"which is {self.ub_bytes:,}; correct one of them"
                )


_TABLES = "Ascend/mskpp 065b75c"
_GUIDE = "asc-devkit 0da921b best practices"
_ATTENTION = "cann-ops FlashAttentionScore"

ASCEND_AIV_C220 = build(
    VectorEngines,
    cite(
        "documented",
        _GUIDE,
        "256 bytes a repeat, 1 to 2 cycles; start-up 18 to 20",
        lane_bytes=256,
        startup_cycles=19.0,
    ),
    cite(
        "documented",
        "hicann/runtime 681ef76 platform_config",
        ub_bytes=192 * KiB,
        block_bytes=32,
    ),
    cite(
        "measured",
        _TABLES,
        "910B1, 242 + bytes / 46: taken for data that no cache holds",
        load_wait_cycles=242.0,
        load_bytes_per_cycle=46.0,
    ),
    cite("measured", _TABLES, "910B3, 216 + bytes / 115", load_warm_bytes_per_cycle=115.0),
    cite(
        "measured",
        _TABLES,
        "64 bytes a cycle, at least 150 to 200 cycles",
        store_wait_cycles=175.0,
        store_bytes_per_cycle=64.0,
    ),
    cite("inferred", "asc-devkit 0da921b", "as rows of loads for matmuls", row_cycles=3.6),
    cite(
        "assumed",
        "not published",
        "an index is read and a copy issued by the scalar unit",
        index_cycles=50.0,
    ),
    cite("assumed", "16 groups of banks", "half of them without a conflict", picks_per_cycle=8.0),
    cite("assumed", "not published", merged_per_cycle=1.0),
    cite(
        "documented",
        "Ascend C API: Sort32 and MrgSort",
        merge_lists=4,
        sorted_elements=32,
    ),
    cite("assumed", "as the start that adds the parts of a divided K", sync_s=2.0 * us),
    cite("documented", _ATTENTION, "keys are taken in parts of up to 1024", score_keys=1024),
    cite("measured", _GUIDE, "1 to 5 us", mixed_s=3.0 * us),
    scores_in_l2=True,  # no path from L0C to UB (asc-devkit 0da921b)
)

NVIDIA_SM = build(
    VectorEngines,
    cite("documented", "CUDA C++ Programming Guide", "four warps of 32 lanes", lane_bytes=512),
    cite("assumed", "hidden by other warps", startup_cycles=0.0),
    cite(
        "documented",
        "CUDA C++ Programming Guide",
        "shared memory; sectors of 32 bytes",
        ub_bytes=227 * KiB,
        block_bytes=32,
    ),
    cite(
        "assumed",
        "public depth only: 64 bytes a cycle and SM from L2",
        load_wait_cycles=700.0,
        load_bytes_per_cycle=64.0,
        load_warm_bytes_per_cycle=64.0,
        store_wait_cycles=0.0,
        store_bytes_per_cycle=64.0,
    ),
    cite("assumed", "a sector of 32 bytes", row_cycles=0.5, index_cycles=0.5),
    cite("documented", "CUDA C++ Programming Guide", "32 banks", picks_per_cycle=32.0),
    cite(
        "assumed",
        "public depth only",
        merged_per_cycle=1.0,
        merge_lists=4,
        sorted_elements=32,
        sync_s=2.0 * us,
    ),
    cite("assumed", "usual FlashAttention tile", score_keys=128),
    cite("assumed", "one kind of core", mixed_s=0.0),
    scores_in_l2=False,
)
