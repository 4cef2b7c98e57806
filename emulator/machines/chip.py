"""One die: its matrix and vector rates, memory and fixed costs."""

from __future__ import annotations

import dataclasses

from emulator.machines.engines import Engines
from emulator.machines.fact import (
    Citation,
    check_counts,
    check_parts,
    check_positive,
    check_rates,
    cite,
)
from emulator.machines.vector_engines import VectorEngines

_SLACK = 4.0  # of a peak from cores x clock: a changed clock must not be refused


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One compute die as software sees it. Rates are per die; FLOP/s count a multiply-add as two.

    `matmul_peaks_flops_per_s` holds the matrix unit alone; `quoted_bf16_flops_per_s` is what is
    advertised (on Ascend matrix plus vector units), kept apart because utilisation must be taken of
    the former. `fp32_mode` is the entry of the peak table that a plain FP32 matmul uses: "float32",
    or "tf32" on NVIDIA. `base_*` is the tile one core computes by default, `cube_*` what its matrix
    unit multiplies per cycle in BF16; `engines` are the paths around it, `vector` those around a
    vector core.
    """

    name: str
    cube_cores: int
    vector_cores: int
    clock_hz: float
    matmul_peaks_flops_per_s: tuple[tuple[str, float], ...]
    quoted_bf16_flops_per_s: float
    vector_peaks_flops_per_s: tuple[tuple[str, float], ...]
    fp32_mode: str
    memory_bytes: int
    memory_bytes_per_s: float
    memory_efficiency: float
    l2_bytes: int
    l2_bytes_per_s: float
    launch_s: float
    base_m: int
    base_n: int
    base_k: int
    cube_m: int
    cube_n: int
    cube_k: int
    engines: Engines
    vector: VectorEngines
    citations: tuple[Citation, ...] = ()

    def __post_init__(self) -> None:
        numbers = [f.name for f in dataclasses.fields(self) if f.type in ("int", "float")]
        check_positive(self, *numbers)
        check_counts(self, *[f.name for f in dataclasses.fields(self) if f.type == "int"])
        check_rates(self, "matmul_peaks_flops_per_s", needs="bfloat16")
        check_rates(self, "vector_peaks_flops_per_s", needs="float32")
        check_parts(self, engines=Engines, vector=VectorEngines)
        if self.memory_efficiency > 1:
            raise ValueError(
                f"Chip.memory_efficiency must be at most 1; got {self.memory_efficiency!r}"
            )
        if self.fp32_mode not in dict(self.matmul_peaks_flops_per_s):
            raise ValueError(
                f"Chip.fp32_mode {self.fp32_mode!r} has no entry in matmul_peaks_flops_per_s"
            )
        self._check_sense()

    def __hash__(self) -> int:
        # Equal chips agree on these; hashing every number would cost more than a cached answer.
        return hash((self.name, self.cube_cores, self.clock_hz))

    def _check_sense(self) -> None:
        """Numbers that cannot be true together. The clock may be varied alone, within reason."""
        peak = self.matmul_flops_per_s("bfloat16")
        cores = 2 * self.cube_macs_per_cycle("bfloat16") * self.cube_cores * self.clock_hz
        if not _SLACK >= peak / cores >= 1 / _SLACK:
            raise ValueError(
                f"Chip {self.name}: matmul_peaks_flops_per_s says {peak:.4g} FLOP/s in bfloat16, "
                f"but cube_cores x 2 x cube_m x cube_n x cube_k x clock_hz is {cores:.4g}; correct "
                "one of them (`at_clock` changes clock and peaks together)"
            )
        if self.l2_bytes > self.memory_bytes:
            raise ValueError(
                f"Chip {self.name}: l2_bytes {self.l2_bytes:,} is more than memory_bytes "
                f"{self.memory_bytes:,}; correct one of them"
            )
        self.engines.check_tile(self.base_m, self.base_n)

    def at_clock(self, clock_hz: float) -> Chip:
        """This chip at another clock; the peaks of its cores follow, memory and cache do not."""
        scale = clock_hz / self.clock_hz
        changed = cite(
            "assumed",
            f"{self.name} at another clock",
            clock_hz=clock_hz,
            matmul_peaks_flops_per_s=_scaled(self.matmul_peaks_flops_per_s, scale),
            quoted_bf16_flops_per_s=self.quoted_bf16_flops_per_s * scale,
            vector_peaks_flops_per_s=_scaled(self.vector_peaks_flops_per_s, scale),
        )
        return dataclasses.replace(
            self, citations=(*self.citations, changed), **dict(changed.values)
        )

    def cube_macs_per_cycle(self, dtype: str = "bfloat16") -> float:
        """Multiply-adds of one matrix core in a cycle for operands of `dtype`.

        Raises:
            NotImplementedError: the matrix unit has no (known) rate for `dtype`.
        """
        ratio = self.matmul_flops_per_s(dtype) / self.matmul_flops_per_s("bfloat16")
        return self.cube_m * self.cube_n * self.cube_k * ratio

    def matmul_flops_per_s(self, dtype: str = "bfloat16") -> float:
        """Peak of the matrix unit alone for operands of `dtype` (a name or a dtype), in FLOP/s per
        die.

        Raises:
            NotImplementedError: the matrix unit has no (known) rate for `dtype`.
        """
        return _rate(self, "matmul", self.matmul_peaks_flops_per_s, dtype)

    def vector_flops_per_s(self, dtype: str = "float32") -> float:
        """Peak of the vector units for elements of `dtype`, in FLOP/s per die (a multiply-add
        counts as two).

        Raises:
            NotImplementedError: the vector units have no (known) rate for `dtype`.
        """
        return _rate(self, "vector", self.vector_peaks_flops_per_s, dtype)

    @property
    def usable_memory_bytes_per_s(self) -> float:
        """Memory bandwidth that kernels reach, per die, reads and writes together."""
        return self.memory_bytes_per_s * self.memory_efficiency


def _scaled(table: tuple[tuple[str, float], ...], scale: float) -> tuple[tuple[str, float], ...]:
    return tuple((dtype, rate * scale) for dtype, rate in table)


def _rate(chip: Chip, unit: str, table: tuple[tuple[str, float], ...], dtype: object) -> float:
    name = str(getattr(dtype, "name", dtype))
    for known, rate in table:
        if known == name:
            return rate
    known_names = ", ".join(entry for entry, _ in table)
    raise NotImplementedError(
        f"{chip.name} has no {unit} rate for dtype {name}; known: {known_names}"
    )
