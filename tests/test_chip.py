"""One device's time: matmuls against published kernels, laws, and clear errors."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from emulator.chip import MatmulTime, matmul_time, pipeline
from emulator.chip.arguments import product_of
from emulator.chip.tilings import shares_of
from emulator.chip.vector import copy_time
from emulator.machines import Machine, cloudmatrix384, gb200_nvl72
from emulator.machines.calibration import rows as read
from emulator.machines.chips import chip, chip_names, single
from emulator.validate import Row, refit
from emulator.validate.matmuls import matmuls, with_engines

DIE = cloudmatrix384("die")
PACKAGE = cloudmatrix384()
NVL72 = gb200_nvl72()

ROWS = {row.label: row for row in matmuls().rows}
FAMILIES = sorted({row["family"] for row in read("matmuls")})


def error(row: Row, machine: Machine = DIE) -> float:
    """Model over measurement, less one."""
    return row.model_s(machine, ()) / row.measured_s - 1


@pytest.mark.parametrize("label", ROWS)
def test_matmul_is_near_each_published_kernel(label: str) -> None:
    found = error(ROWS[label])
    print(f"{label}: {found:+.1%}")
    assert abs(found) < 0.10


def test_matmul_median_error_is_small() -> None:
    errors = sorted(abs(error(row)) for row in ROWS.values())
    assert errors[len(errors) // 2] < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_the_fit_has_not_seen(family: str) -> None:
    """Left out of the fit, each family of measurements is still predicted."""
    part = matmuls(without=family)
    (rate,) = refit(part).new
    seen = {row.label for row in part.rows}
    left = [row for label, row in ROWS.items() if label not in seen]
    assert left and len(left) + len(seen) == len(ROWS)
    for row in left:
        print(
            f"{family}: {row.label} {error(row, with_engines(DIE, load_bytes_per_cycle=rate)):+.1%}"
        )
        assert abs(error(row, with_engines(DIE, load_bytes_per_cycle=rate))) < 0.12


@pytest.mark.parametrize("family", FAMILIES)
def test_better_than_peak_times_efficiency(family: str) -> None:
    """The efficiency is the median of all rows, so it suits most of them."""
    shares, errors = [], []
    for point, row in zip(read("matmuls"), ROWS.values(), strict=True):
        m, k, n, groups = (int(point[name]) for name in ("m", "k", "n", "groups"))
        peak = chip(point["chip"]).matmul_flops_per_s(point["dtype"])
        shares.append(2 * groups * m * k * n / peak / row.measured_s)
        if point["family"] == family:
            errors.append((shares[-1], abs(error(row))))
    usual = statistics.median(shares)
    naive = statistics.mean(abs(share / usual - 1) for share, _ in errors)
    assert statistics.mean(mine for _, mine in errors) < naive


@pytest.mark.parametrize(("k", "n"), [(5120, 3200), (1600, 5120), (5120, 768), (512, 5120)])
def test_sixteen_rows_follow_the_published_line(k: int, n: int) -> None:
    """Horacehxw/msModeling 39df672, 910C die: 4.2 us + bytes of the weights / 1.20 TB/s."""
    line = 4.2e-6 + 2 * k * n / 1.2e12
    assert matmul_time(16, k, n, DIE, b_layout="nz").time_s == pytest.approx(line, rel=0.07)


def test_bound_is_below_every_measurement() -> None:
    for point in read("matmuls"):
        m, k, n, groups = (int(point[name]) for name in ("m", "k", "n", "groups"))
        time = matmul_time(m, k, n, single(point["chip"]), point["dtype"], batch=groups)
        assert time.bound_s < float(point["us"]) * 1e-6


def test_terms_of_a_large_matmul() -> None:
    """8192^3 on a die from named terms: the busiest core has 86 of 2048 tiles of 128x256."""
    time = matmul_time(8192, 8192, 8192, DIE)
    assert (time.tiles, time.tile, time.cores, time.rounds) == (2048, (128, 256), 24, 86)
    mmads = 8192 // 64
    cube_s = 86 * mmads * (128 * 256 * 64 / 4096 + 9) / 1.8e9
    assert time.cube_s == pytest.approx(cube_s)
    l0_cycles = 128 * 128 / 256 + 256 * 128 / 128 + 47
    assert time.l0_s == pytest.approx(86 * mmads * l0_cycles / 1.8e9)
    rate = DIE.chip.engines.load_bytes_per_cycle * 1.8e9
    matrix = 8192 * 8192 * 2
    cold = matrix + matrix * matrix / (96 * 2**20)  # a block of half the cache at a time
    assert time.l2_s == pytest.approx(86 * (128 + 256) * 8192 * 2 / rate - cold / (24 * rate))
    assert time.memory_s == pytest.approx(cold / (1.6e12 * 0.85))
    one_store_s = 128 * 256 * 2 / 118 / 1.8e9
    assert time.store_s == pytest.approx(matrix / 2.5e12 + 86 * one_store_s)
    assert time.fixed_s == pytest.approx(4.2e-6 + 3e-6)
    load_s = time.l2_s + time.memory_s + matrix / 2.5e12
    fill_s = 4 * 128 * (128 + 256) / rate
    drain_s = 4 * 521 / 1.8e9
    joined = ((cube_s + 85 * one_store_s + fill_s) ** 8 + (load_s + drain_s) ** 8) ** (1 / 8)
    assert time.time_s == pytest.approx(joined + one_store_s + time.fixed_s)
    assert time.limited_by == "l2"


def test_small_matmul_is_limited_by_its_launch() -> None:
    time = matmul_time(16, 16, 16, DIE)
    assert time.limited_by == "launch"
    assert DIE.chip.launch_s < time.time_s < 2 * DIE.chip.launch_s


def test_few_rows_are_limited_by_memory() -> None:
    time = matmul_time(16, 5120, 3200, DIE, b_layout="nz")
    weights = 5120 * 3200 * 2
    assert time.limited_by == "memory"
    assert time.time_s > weights / DIE.chip.usable_memory_bytes_per_s


@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (8192, 16), (16, 8192)])
def test_package_divides_m_or_n_between_its_dies(m: int, n: int) -> None:
    whole = matmul_time(m, 4096, n, PACKAGE)
    half = matmul_time(m // 2, 4096, n, DIE)
    other = matmul_time(m, 4096, n // 2, DIE)
    assert whole.time_s == min(half.time_s, other.time_s)
    if m != n:  # whichever is long
        assert (half.time_s < other.time_s) == (m > n)
    assert whole.flops == 2 * m * 4096 * n


def test_package_never_divides_k() -> None:
    """One row and one column leave nothing to divide: one die does it all."""
    assert matmul_time(1, 8192, 1, PACKAGE).time_s == matmul_time(1, 8192, 1, DIE).time_s


def test_batches_are_divided_between_dies() -> None:
    assert (
        matmul_time(1, 64, 1, PACKAGE, batch=64).time_s
        == matmul_time(1, 64, 1, DIE, batch=32).time_s
    )


def test_peak_is_cube_only() -> None:
    time = matmul_time(8192, 8192, 8192, DIE)
    assert time.peak_flops_per_s == pytest.approx(353.9e12, rel=1e-3)
    assert time.quoted_flops_per_s == pytest.approx(376e12)
    assert time.quoted_utilization < time.utilization < 1
    assert time.flops_per_s == pytest.approx(time.utilization * time.peak_flops_per_s)
    engines = ("cube_s", "l0_s", "l2_s", "memory_s", "store_s", "pad_s", "fixed_s")
    assert tuple(time.breakdown) == engines


def test_dtypes_order_as_their_peaks() -> None:
    ordered = ("int4", "int8", "bfloat16", "hf32")
    times = {d: matmul_time(4096, 4096, 4096, DIE, d).time_s for d in ordered}
    assert times["int4"] < times["int8"] < times["bfloat16"] < times["hf32"]
    assert times["hf32"] < matmul_time(4096, 4096, 4096, DIE, "float32").time_s


def test_gb200_is_faster_per_device() -> None:
    assert (
        matmul_time(8192, 8192, 8192, NVL72).time_s < matmul_time(8192, 8192, 8192, PACKAGE).time_s
    )


def test_groups_add_their_tiles_and_share_the_weights() -> None:
    """Two experts with 100 and 28 rows are two row tiles; one with none costs nothing."""
    together = matmul_time(128, 4096, 4096, DIE, groups=[100, 28])
    fixed = matmul_time(128, 4096, 4096, DIE, groups=[100, 28], tiling=TILE)
    assert fixed.tiles == 2 * 16 and fixed.rounds == 2
    assert matmul_time(128, 4096, 4096, DIE, groups=[100, 0, 28]).time_s == together.time_s
    assert together.flops == 2 * 128 * 4096 * 4096
    assert together.bytes == 2 * (128 * 4096 + 2 * 4096 * 4096 + 128 * 4096)
    assert matmul_time(128, 4096, 4096, DIE).time_s < together.time_s
    skewed = matmul_time(4096, 4096, 4096, DIE, groups=[4096 - 7, *[1] * 7])
    assert skewed.time_s > matmul_time(4096, 4096, 4096, DIE, groups=[512] * 8).time_s


def test_equal_groups_are_a_batch() -> None:
    batch = matmul_time(256, 1024, 1024, PACKAGE, batch=6)
    assert matmul_time(1536, 1024, 1024, PACKAGE, groups=[256] * 6).time_s == batch.time_s


def test_package_deals_groups_to_its_dies() -> None:
    """Five experts: the first die has three of them, the largest among these."""
    whole = matmul_time(1500, 512, 64, PACKAGE, groups=[300] * 5)
    die = matmul_time(900, 512, 64, DIE, groups=[300] * 3)
    assert whole.time_s <= die.time_s


def test_operands_in_the_cache_need_no_memory() -> None:
    cold, warm = (matmul_time(1024, 1024, 1024, DIE, l2=l2) for l2 in ("cold", "warm"))
    assert warm.memory_s == 0 < cold.memory_s
    assert warm.bound_s <= warm.time_s < cold.time_s
    assert matmul_time(32768, 8192, 32768, DIE, l2="warm").memory_s > 0


def test_rows_that_are_no_whole_lines_cost_the_next_line() -> None:
    """1601 BF16 values are 3202 bytes, seven lines of 512; fractals of b have no rows."""
    time = matmul_time(3072, 1601, 5120, DIE, b_layout="nz", tiling=TILE)
    rate = DIE.chip.engines.load_bytes_per_cycle * 1.8e9
    cold = 3072 * 7 * 512 + 5120 * 3202
    assert time.rounds == 20
    loaded = 20 * (256 * 3202 + 128 * 7 * 512)
    assert time.l2_s == pytest.approx(loaded / rate - cold / (24 * rate))


def test_the_library_rule_is_not_quicker_than_the_best() -> None:
    for m, k, n in ((1024, 1024, 1024), (3072, 5120, 3200), (4096, 4096, 4096)):
        rule = matmul_time(m, k, n, DIE, tiling="library", rows="padded").time_s
        best = matmul_time(m, k, n, DIE, rows="padded").time_s
        assert best <= rule < 1.05 * best
        assert (
            matmul_time(m, k, n, DIE).time_s <= matmul_time(m, k, n, DIE, tiling="library").time_s
        )


@pytest.mark.parametrize("name", chip_names())
def test_named_chips(name: str) -> None:
    on = single(name)
    time = matmul_time(4096, 4096, 4096, on)
    assert 0.5 < time.utilization < 1
    assert time.cores <= on.chip.cube_cores and on.dies_per_device == 1
    assert matmul_time(1, 1, 1, on).limited_by == "launch"


def test_fewer_cores_take_longer() -> None:
    three, two = (matmul_time(8192, 8192, 8192, single(name)) for name in ("910B3", "910B2"))
    assert three.time_s / two.time_s == pytest.approx(24 / 20, rel=0.03)


sizes = st.one_of(st.integers(1, 300), st.integers(1, 20000))
TILE = kernels.Tiling(base_m=128, base_n=256, base_k=64, step_k=4)
TILINGS = [
    None,
    TILE,
    kernels.Tiling(base_m=16, base_n=128, base_k=64, step_k=4, split_k=4),
    kernels.Tiling(base_m=50, base_n=100, base_k=48, step_k=1, cores=7),
]
ROWS_LIE = ("packed", "padded")
machines = st.sampled_from([DIE, PACKAGE, NVL72, single("H100")])


@settings(deadline=None, max_examples=100)
@given(m=sizes, k=sizes, n=sizes, batch=st.integers(1, 3))
def test_int4_takes_at_most_as_long_as_int8(m: int, k: int, n: int, batch: int) -> None:
    """Half the bytes, and twice the products in a cycle."""
    half, whole = (
        matmul_time(m, k, n, DIE, d, batch=batch, rows="padded") for d in ("int4", "int8")
    )
    assert half.bound_s <= half.time_s <= whole.time_s
    assert half.bytes == math.ceil(batch * (m * k + k * n) / 2) + 2 * batch * m * n


@settings(deadline=None, max_examples=150)
@given(m=sizes, k=sizes, n=sizes, machine=machines, tiling=st.sampled_from(TILINGS))
def test_never_faster_than_physics(
    m: int, k: int, n: int, machine: Machine, tiling: kernels.Tiling | None
) -> None:
    time = matmul_time(m, k, n, machine, tiling=tiling)
    assert time.time_s >= time.bound_s
    assert time.bound_s >= 2 * m * k * n / time.peak_flops_per_s


def grown(
    sizes: list[int],
    which: int,
    more: int,
    machine: Machine,
    layouts: tuple[str, str],
    **options: Any,
) -> MatmulTime:
    """The time when one size is larger, which is not shorter."""
    large = list(sizes)
    large[which] += more
    a, b = layouts
    before, after = (
        matmul_time(*s, machine, a_layout=a, b_layout=b, **options) for s in (sizes, large)
    )
    assert after.time_s >= before.time_s * (1 - 1e-12)
    return after


@settings(deadline=None, max_examples=300)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    more=st.integers(1, 3000),
    which=st.integers(0, 2),
    machine=machines,
    tiling=st.sampled_from(TILINGS),
    layouts=st.tuples(*2 * [st.sampled_from(["nd", "nd_t", "nz"])]),
    l2=st.sampled_from(["cold", "warm"]),
)
def test_time_never_falls_with_size(
    m: int,
    k: int,
    n: int,
    more: int,
    which: int,
    machine: Machine,
    tiling: kernels.Tiling | None,
    layouts: tuple[str, str],
    l2: str,
) -> None:
    """More work takes longer for a tiling, and for the quickest of all that the library has, if
    each row takes whole lines."""
    grown([m, k, n], which, more, machine, layouts, tiling=tiling, l2=l2, rows="padded")


@settings(deadline=None, max_examples=300)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    more=st.integers(1, 20),
    which=st.integers(0, 2),
    machine=machines,
    tiling=st.sampled_from(TILINGS),
    dtype=st.sampled_from(["bfloat16", "int8", "float32"]),
    layouts=st.tuples(*2 * [st.sampled_from(["nd", "nd_t", "nz"])]),
)
def test_time_of_packed_rows_never_falls_while_they_start_alike(
    m: int,
    k: int,
    n: int,
    more: int,
    which: int,
    machine: Machine,
    tiling: kernels.Tiling | None,
    dtype: str,
    layouts: tuple[str, str],
) -> None:
    """Rows that grow by whole requests of 512 bytes keep their alignment."""
    dtype = (
        "tf32" if dtype == "float32" and machine is not DIE and machine is not PACKAGE else dtype
    )
    options = {"dtype": dtype, "tiling": tiling, "rows": "packed"}
    after = grown([m, k, n], which, 512 * more, machine, layouts, **options)
    assert after.time_s >= after.bound_s


@settings(deadline=None, max_examples=60)
@given(groups=st.lists(st.integers(0, 600), min_size=1, max_size=9), which=st.integers(0, 8))
def test_time_never_falls_with_a_group(groups: list[int], which: int) -> None:
    groups[0] += 1
    more = list(groups)
    more[which % len(groups)] += 37
    before, after = (matmul_time(sum(g), 2048, 1024, PACKAGE, groups=g) for g in (groups, more))
    assert after.time_s >= before.time_s * (1 - 1e-12)


@settings(deadline=None, max_examples=100)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    changes=st.sampled_from(
        [
            {"memory_bytes_per_s": 3.2e12},
            {"l2_bytes_per_s": 10e12},
            {"l2_bytes": 384 * 2**20},
            {"clock_hz": 3.6e9},
            {"launch_s": 1e-6},
        ]
    ),
    l2=st.sampled_from(["cold", "warm"]),
)
def test_a_better_chip_is_never_slower(
    m: int, k: int, n: int, changes: dict[str, float], l2: str
) -> None:
    better = dataclasses.replace(
        DIE, name=f"better {changes}", chip=dataclasses.replace(DIE.chip, **changes)
    )
    usual = matmul_time(m, k, n, DIE, l2=l2).time_s
    assert matmul_time(m, k, n, better, l2=l2).time_s <= usual * (1 + 1e-12)


HALF = dataclasses.replace(DIE, name="half the clock", chip=DIE.chip.at_clock(0.9e9))


@settings(deadline=None, max_examples=60)
@given(m=sizes, k=sizes, n=sizes)
def test_half_the_clock_never_speeds_up(m: int, k: int, n: int) -> None:
    assert matmul_time(m, k, n, HALF).time_s >= matmul_time(m, k, n, DIE).time_s


def tile(base_m: int, base_n: int, base_k: int = 16, step_k: int = 1) -> kernels.Tiling:
    return kernels.Tiling(base_m=base_m, base_n=base_n, base_k=base_k, step_k=step_k)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"m": 0}, ValueError, "m=0"),
        ({"k": -3}, ValueError, "k=-3"),
        ({"n": 1.5}, TypeError, "n=1.5"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"b_layout": "zz"}, ValueError, "nd.*nd_t.*nz"),
        ({"a_layout": "zz"}, ValueError, "a_layout='zz'.*nd.*nd_t.*nz"),
        ({"a_layout": 1}, TypeError, "a_layout=1"),
        ({"m": [1]}, TypeError, r"\[1\].*expected ints"),
        ({"dtype": ["bfloat16"]}, TypeError, "expected ints as sizes and names"),
        ({"groups": 16}, TypeError, "groups=16.*rows of each group"),
        ({"dtype": "float64"}, NotImplementedError, "float64"),
        ({"dtype": "tf32"}, NotImplementedError, "tf32"),
        ({"out_dtype": "complex64"}, ValueError, "complex64"),
        ({"l2": "hot"}, ValueError, "hot.*cold.*warm"),
        ({"rows": "loose"}, ValueError, "rows='loose'.*packed.*one after the other.*padded"),
        ({"rows": 512}, TypeError, "rows=512"),
        ({"groups": [10, 7]}, ValueError, "m=16.*17 rows"),
        ({"groups": [16], "batch": 2}, ValueError, "batch=2"),
        ({"groups": [17, -1]}, ValueError, "groups=-1"),
        ({"tiling": "best"}, TypeError, "best.*kernels.Tiling"),
        ({"tiling": tile(512, 256)}, ValueError, "512 x 256.*L0C.*524,288.*393,216 more"),
        ({"tiling": tile(256, 128, 256)}, ValueError, "L0A.*131,072.*65,536 more"),
        ({"tiling": tile(16, 512, 128)}, ValueError, "L0B.*131,072.*65,536 more"),
        ({"tiling": tile(128, 256, 64, 60)}, ValueError, "L1.*491,520 more"),
        ({"on": "pod"}, TypeError, "Machine"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        matmul_time(**({"m": 16, "k": 16, "n": 16, "on": DIE} | arguments))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cube_cores": 1}, "says 3.539e.14 FLOP/s.*clock_hz is 1.475e.13.*correct"),
        ({"l2_bytes": 2**40}, "l2_bytes 1,099,511,627,776 is more than memory_bytes"),
        ({"base_m": 256}, "256 x 256 does not fit L0C.*131,072 more"),
        ({"clock_hz": 0}, "clock_hz must be a number above 0; got 0"),
        ({"memory_bytes_per_s": None}, "memory_bytes_per_s must be a number above 0; got None"),
        ({"clock_hz": None}, "clock_hz must be a number above 0; got None"),
        ({"cube_cores": 2.5}, "cube_cores must be a whole number above 0; got 2.5"),
        ({"memory_bytes": 0}, "memory_bytes must be a number above 0; got 0"),
        ({"memory_efficiency": -0.5}, "memory_efficiency must be a number above 0; got -0.5"),
        ({"matmul_peaks_flops_per_s": None}, "matmul_peaks_flops_per_s must be pairs.*got None"),
        ({"matmul_peaks_flops_per_s": ()}, "matmul_peaks_flops_per_s has no entry for 'bfloat16'"),
        ({"vector_peaks_flops_per_s": ()}, "vector_peaks_flops_per_s has no entry for 'float32'"),
        (
            {"matmul_peaks_flops_per_s": (("bfloat16", "fast"),)},
            r"\['bfloat16'\] must be above 0; got 'fast'",
        ),
        ({"fp32_mode": "tf32"}, "fp32_mode 'tf32' has no entry"),
        ({"engines": None}, "engines must be of type Engines; got None"),
        ({"vector": None}, "vector must be of type VectorEngines; got None"),
    ],
)
def test_contradictory_chips_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(DIE.chip, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overlap": 0.5}, "overlap must be at least 1; got 0.5"),
        ({"store_share": 1.5}, "store_share must be a share"),
        ({"load_bytes_per_cycle": -1.0}, "load_bytes_per_cycle must be a number above 0"),
        ({"tiles": ((256, 256),)}, "256 x 256 does not fit L0C"),
        ({"tiles": ()}, "tiles must be pairs .* at least 1"),
        ({"splits": ((0, 16),)}, "splits must be pairs"),
        ({"narrow": ((3,),)}, "narrow must be pairs"),
        ({"narrow": ((512, 512),)}, "512 x 512 does not fit L0C"),
        ({"k_chunk_bytes": 5}, "k_chunk_bytes must be a multiple of 32; got 5"),
    ],
)
def test_contradictory_engines_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(DIE.chip.engines, **changes)


def test_unknown_chip() -> None:
    with pytest.raises(ValueError, match="unknown chip '910Z'; known: 910B1"):
        single("910Z")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_devices": 0}, "num_devices must be a whole number above 0; got 0"),
        ({"num_devices": 3.5}, "num_devices must be a whole number above 0; got 3.5"),
        ({"dies_per_device": None}, "dies_per_device must be a whole number above 0; got None"),
        ({"pods": 0}, "pods must be a whole number"),
        ({"chip": None}, "chip must be of type Chip; got None"),
        ({"fabric": "torus"}, "fabric must be of type Fabric; got 'torus'"),
        ({"power": None}, "power must be of type Power; got None"),
        ({"arithmetic": None}, "arithmetic must be of type str; got None"),
        ({"headline_bf16_flops_per_s": -1}, "headline_bf16_flops_per_s must be a number above 0"),
        ({"packages": 1000}, "packages 1,000 are more than the 768 dies"),
    ],
)
def test_contradictory_machines_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(cloudmatrix384(), **changes)


# -- layouts


@pytest.mark.parametrize("a_layout", ["nd", "nd_t", "nz"])
@pytest.mark.parametrize("b_layout", ["nd", "nd_t", "nz"])
def test_rows_that_lie_across_the_tile_are_loaded_as_such(a_layout: str, b_layout: str) -> None:
    """One core, a 128 x 64 tile, 256 bytes of K at a time: rows along K come by 256 bytes in 3.6
    cycles, rows across it are as long as the tile is wide, fractals come at 160 bytes a cycle.
    """
    k, k_bytes = 65536, 65536 * 2
    along, across, fractals = 3.6 / 256, 3.6, 1 / 160  # across: 256 or 128 bytes take less
    a_cycles = {"nd": 128 * k_bytes * along, "nd_t": k * across, "nz": 128 * k_bytes * fractals}
    b_cycles = {"nd": k * across, "nd_t": 64 * k_bytes * along, "nz": 64 * k_bytes * fractals}
    product = product_of(
        ((128, 1),), k, 64, "bfloat16", a_layout, b_layout, None, "cold", "padded", 512
    )
    tilings = pipeline.tilings_of([(128, 64, 1)], [256], [1], 1, DIE.chip)
    own_s = pipeline._times([(((128, 1),), 64)], product, tilings, DIE.chip, 1).own
    assert own_s[0] == pytest.approx((a_cycles[a_layout] + b_cycles[b_layout]) / 1.8e9)


@pytest.mark.parametrize("layout", ["nd", "nd_t"])
def test_rows_longer_than_a_row_s_cost_are_loaded_at_their_rate(layout: str) -> None:
    """One core, a 256 x 256 tile, 512 bytes of K at a time: at 119 bytes a cycle a row of 512
    bytes, along K or across it, takes more than its least 3.6 cycles.
    """
    k = 65536
    product = product_of(
        ((256, 1),), k, 256, "bfloat16", layout, layout, None, "cold", "padded", 512
    )
    tilings = pipeline.tilings_of([(256, 256, 1)], [512], [1], 1, DIE.chip)
    own_s = pipeline._times([(((256, 1),), 256)], product, tilings, DIE.chip, 1).own
    assert 512 / 119 > 3.6
    assert own_s[0] == pytest.approx(2 * 256 * k * 2 / 119 / 1.8e9)


def test_a_transposed_operand_pads_the_rows_that_it_has() -> None:
    """Rows of 513 elements take three lines of 512 bytes each; as columns nothing is padded."""
    rows = matmul_time(1024, 513, 1024, DIE, a_layout="nd", tiling=TILE)
    columns = matmul_time(1024, 513, 1024, DIE, a_layout="nd_t", tiling=TILE)
    rate = DIE.chip.usable_memory_bytes_per_s
    assert rows.memory_s - columns.memory_s == pytest.approx(1024 * (1536 - 1026) / rate)


# -- unaligned rows


@pytest.mark.parametrize("request_bytes", [512, 32])
def test_pieces_of_unaligned_rows_touch_what_counting_says(request_bytes: int) -> None:
    """Over all places where such a row may start, the mean number of requests that hold a part of
    a piece; of a piece that fits one, each counts as much as the piece."""
    start = 1
    while start < request_bytes:
        for piece in (1, 7, 64, 100, 256, 511, 512, 513, 640, 1024, 8000):
            first = np.arange(0, request_bytes, start)
            touched = (first + piece - 1) // request_bytes - first // request_bytes + 1
            expected = touched.mean() * min(piece, request_bytes) / piece
            found = pipeline._touched(np.array([float(piece)]), start, request_bytes)[0]
            assert found == pytest.approx(expected, rel=1e-12)
            assert 1 <= found < 2
        start *= 2


LONG = kernels.Tiling(base_m=128, base_n=256, base_k=64, step_k=8)
NO_COPIES = dataclasses.replace(
    DIE,
    name="slow vector cores",
    chip=dataclasses.replace(DIE.chip, vector=dataclasses.replace(DIE.chip.vector, mixed_s=1.0)),
)


@pytest.mark.parametrize(
    ("tiling", "a_layout", "b_layout", "a", "b"),
    [
        # Rows of 3200 bytes start at every 128 bytes; L1 takes 1024 bytes of 128, 512 of 256.
        (LONG, "nd", "nz", (1024 + 384) / 1024, 1),
        (TILE, "nd", "nz", (512 + 384) / 512, 1),
        (LONG, "nd", "nd_t", (1024 + 384) / 1024, (512 + 384) / 512),
        # Rows of 97 or 161 x 64 bytes; pieces are as long as the tile is wide.
        (LONG, "nd_t", "nd", 1 + 3 * 64 / 512, (512 + 448) / 512),
    ],
)
def test_unaligned_rows_take_more_of_the_cache(
    tiling: kernels.Tiling, a_layout: str, b_layout: str, a: float, b: float
) -> None:
    """Of each byte of a and b, what the cache hands out; memory hands out each of them once."""
    m, k, n = (3072, 1600, 5120) if a_layout == "nd" else (3104, 1600, 5152)
    found = matmul_time(
        *(m, k, n, NO_COPIES), a_layout=a_layout, b_layout=b_layout, tiling=tiling, rows="packed"
    )
    assert found.padded == () and found.pad_s == found.pad_bytes == 0
    rate = DIE.chip.engines.load_bytes_per_cycle * DIE.chip.clock_hz
    loaded = found.rounds * (128 * a + 256 * b) * k * 2 / rate
    cold = 2 * k * (m + n)
    assert found.memory_s == pytest.approx(cold / DIE.chip.usable_memory_bytes_per_s)
    assert found.l2_s == pytest.approx(loaded - cold / (24 * rate))


def test_a_row_shorter_than_a_load_is_one_piece() -> None:
    """100 BF16 values, starting at every 8 bytes, touch 1 + 24 x 8 / 512 requests."""
    short = matmul_time(4096, 100, 4096, NO_COPIES, b_layout="nz", tiling=LONG, rows="packed")
    rate = DIE.chip.engines.load_bytes_per_cycle * DIE.chip.clock_hz
    loaded = short.rounds * (128 * 1.375 + 256) * 200 / rate
    assert short.l2_s == pytest.approx(loaded - 200 * 8192 / (24 * rate))


@pytest.mark.parametrize(("a_layout", "b_layout"), [("nd", "nd"), ("nd_t", "nd_t")])
def test_copies_are_of_all_groups_that_have_rows(a_layout: str, b_layout: str) -> None:
    groups, k, n = ((100, 2), (50, 1), (0, 4)), 1001, 9
    product = product_of(
        *(groups, k, n, "bfloat16", a_layout, b_layout, None, "cold", "packed", 512)
    )
    a_rows, b_rows = (250, 3 * k) if a_layout == "nd" else (3 * k, 3 * n)
    a_s = copy_time(a_rows, 250 * k * 2, DIE.chip)
    b_s = copy_time(b_rows, 3 * n * k * 2, DIE.chip)
    assert pipeline._pads(groups, n, product, DIE.chip) == [0.0, b_s, a_s, a_s + b_s]


def test_short_rows_are_copied_row_by_row() -> None:
    """3.6 cycles of one of 48 vector cores for each; long ones at memory's rate, there and back."""
    start_s = copy_time(0, 0, DIE.chip)
    short_s, long_s = (copy_time(10**6, 10**6 * each, DIE.chip) - start_s for each in (16, 1024))
    assert short_s == pytest.approx(10**6 * 3.6 / 48 / DIE.chip.clock_hz)
    assert long_s == pytest.approx(2 * 10**6 * 1024 / DIE.chip.usable_memory_bytes_per_s)
    assert start_s == pytest.approx(3e-6 + 2e-6 + (242 + 175) / DIE.chip.clock_hz)


def test_rows_of_whole_lines_cost_the_same_packed_or_padded() -> None:
    for layout in ("nd", "nd_t", "nz"):
        for size in (256, 1024, 5120):
            times = {
                matmul_time(
                    *(size, size, size, DIE), b_layout=layout, a_layout=layout, rows=rows
                ).time_s
                for rows in ("packed", "padded", None)
            }
            assert len(times) == 1


def test_fractals_are_never_unaligned() -> None:
    for size in (100, 1001, 3210):
        times = [
            matmul_time(size, size, size, DIE, a_layout="nz", b_layout="nz", rows=rows).time_s
            for rows in ("packed", "padded")
        ]
        assert times[0] == times[1]


def test_rows_are_packed_where_the_library_chooses() -> None:
    one = (1000, 1001, 1003, DIE)
    assert matmul_time(*one).rows == matmul_time(*one, tiling="library").rows == "packed"
    assert matmul_time(*one, tiling=TILE).rows == "padded"
    assert matmul_time(*one, tiling=TILE, rows="packed").rows == "packed"
    assert matmul_time(*one) == matmul_time(*one, rows="packed")


def test_a_copy_into_padded_rows_is_taken_where_it_pays() -> None:
    """B of 4097 columns is read and written once by the vector cores, then read as aligned."""
    m, k, n = 4096, 4096, 4097
    time = matmul_time(m, k, n, DIE, tiling=TILE, rows="packed")
    core = DIE.chip.vector
    waits_s = (core.load_wait_cycles + core.store_wait_cycles) / DIE.chip.clock_hz
    moved_s = (2 * k * n * 2) / DIE.chip.usable_memory_bytes_per_s
    assert time.padded == ("b",)
    assert time.pad_s == pytest.approx(core.mixed_s + waits_s + core.sync_s + moved_s)
    assert time.pad_bytes == k * 17 * 512
    assert time.moved_bytes == time.bytes + 2 * k * 17 * 512
    aligned = matmul_time(m, k, n, DIE, tiling=TILE).time_s
    assert time.time_s == pytest.approx(aligned + time.pad_s, rel=0.01)
    assert matmul_time(64, k, n, DIE).padded == ()  # too few rows read it
    # Rows along K: of A and of a transposed B, 2 x 4097 bytes in 17 lines.
    both = matmul_time(m, 4097, m, DIE, b_layout="nd_t", tiling=TILE, rows="packed")
    assert both.padded == ("a", "b")
    assert both.pad_bytes == 2 * m * 17 * 512


@settings(deadline=None, max_examples=150)
@given(m=sizes, k=sizes, n=sizes, machine=machines, l2=st.sampled_from(["cold", "warm"]))
def test_unaligned_rows_cost_at_most_twice_the_loads(
    m: int, k: int, n: int, machine: Machine, l2: str
) -> None:
    """Twice what the caches hand out, which is no more than all of the time."""
    packed, padded = (matmul_time(m, k, n, machine, rows=rows, l2=l2) for rows in ROWS_LIE)
    assert packed.time_s <= 2 * padded.time_s
    assert packed.time_s >= packed.bound_s == padded.bound_s


# -- kernels without large packets


@pytest.mark.parametrize(
    ("tiling", "measured_s", "within"),
    [
        ({"base_m": 64, "base_n": 64, "cores": 1}, 759363e-6, 0.11),
        ({"base_m": 128, "base_n": 256, "cores": 1}, 249467e-6, 0.02),
        ({"base_m": 128, "base_n": 256}, 12538e-6, 0.18),
        ({"base_m": 128, "base_n": 256}, 10871e-6, 0.06),
    ],
)
def test_kernels_without_large_packets(tiling: dict, measured_s: float, within: float) -> None:
    """The first four of asc-devkit 0da921b matmul_high_performance on a 910B1, time of the average
    core: 2 x 12 and 4 x 6 cores differ only in which columns they share."""
    tiling = kernels.Tiling(base_k=64, step_k=1, **tiling)
    time = matmul_time(
        *(8192, 8192, 8192, single("910B1"), "float16"), b_layout="nd_t", tiling=tiling
    )
    average = time.tiles / (time.rounds * time.cores)
    assert average * time.time_s == pytest.approx(measured_s, rel=within)


def test_loads_and_l1_to_l0_take_turns_without_large_packets() -> None:
    one, two = (
        matmul_time(
            *(4096, 4096, 4096, DIE),
            b_layout="nd_t",
            tiling=kernels.Tiling(base_m=128, base_n=256, base_k=64, step_k=steps),
        )
        for steps in (1, 2)
    )
    assert one.l0_s == two.l0_s
    assert one.l2_s == pytest.approx(22 * 64 * 384 * 3.6 / DIE.chip.clock_hz)  # rows of 128 bytes
    assert one.time_s == pytest.approx(one.l2_s + one.l0_s + one.store_s + one.fixed_s, rel=0.02)
    assert two.time_s < 0.6 * one.time_s


# -- integers


def test_integers_are_scaled_unless_the_result_is_int32() -> None:
    scaled = matmul_time(64, 128, 64, DIE, "int8", out_dtype="float32")
    plain = matmul_time(64, 128, 64, DIE, "int8", out_dtype="int32")
    assert scaled.time_s - plain.time_s == pytest.approx(DIE.chip.engines.int8_s)
    assert matmul_time(64, 128, 64, DIE, "int8").fixed_s == scaled.fixed_s


# -- one row, one column


def test_a_row_alone_goes_to_l0a() -> None:
    """In the mode for a single row, L0A takes 2 bytes of each K instead of a fractal's 32."""
    two, one = (matmul_time(m, 4096, 128, DIE, tiling=TILE) for m in (2, 1))
    k_bytes = 4096 * 2
    assert two.l0_s - one.l0_s == pytest.approx(15 * k_bytes / 256 / 1.8e9)
    assert two.cube_s == one.cube_s


def test_narrow_tiles_are_for_rows_of_one_tile() -> None:
    """128 rows divide their columns evenly among cores; more rows take the documented tiles."""
    assert matmul_time(128, 5120, 3072, DIE, b_layout="nz").tile == (128, 128)
    assert matmul_time(128, 5120, 3840, DIE, b_layout="nz").tile == (128, 160)
    few, many = (matmul_time(m, 5120, 3840, DIE, b_layout="nz") for m in (64, 128))
    assert few.time_s < many.time_s < 1.3 * few.time_s
    for m in (129, 256, 1024):
        assert matmul_time(m, 5120, 3840, DIE, b_layout="nz").tile[1] not in (160, 192, 224)


@settings(deadline=None, max_examples=12)
@given(
    m=st.sampled_from((2, 16, 100, 128, 129, 500, 3072)),
    k=sizes,
    n=st.integers(2, 20000),
    batch=st.sampled_from((1, 2, 5)),
    machine=machines,
    rows=st.sampled_from(("packed", "padded")),
)
def test_the_quickest_tiling_is_the_quickest_of_all(
    m: int, k: int, n: int, batch: int, machine: Machine, rows: str
) -> None:
    """Leaving out what cannot win changes nothing: each tiling alone is no quicker."""
    chip, cores = machine.chip, machine.chip.cube_cores
    request = chip.engines.request_bytes
    product = product_of(((m, batch),), k, n, "bfloat16", "nd", "nd", None, "cold", rows, request)
    shares = shares_of(((m, batch),), n, machine.dies_per_device)
    every = pipeline._family(chip, 1, True, True)
    best_s = math.inf
    for share in shares:
        for at in range(len(every.chunk)):
            parts = int(every.parts[at])
            base_m, base_n = every.base[:2, at]
            m_tiles = sum(math.ceil(r / base_m) * c for r, c in share[0])
            if parts and 2 * m_tiles * math.ceil(share[1] / base_n) > cores:
                continue
            if every.narrow[at] and m_tiles > 1:
                continue
            one = pipeline.tilings_of(
                [(int(base_m), int(base_n), parts or 1)],
                [int(every.chunk[at])],
                [chip.engines.l1_bytes // int(every.chunk[at])],
                1,
                chip,
            )
            one = dataclasses.replace(one, narrow=np.zeros(1, bool))
            found = pipeline.best([share], product, one, chip, cores)
            best_s = min(best_s, found.seconds["time_s"])
    found = matmul_time(m, k, n, machine, batch=batch, rows=rows)
    assert found.time_s == pytest.approx(max(best_s, found.bound_s), rel=1e-12)


@pytest.mark.parametrize(("k", "n"), [(7168, 7168), (256, 7168), (7168, 256), (5120, 25600)])
@pytest.mark.parametrize("layout", ["nd", "nz"])
def test_one_row_is_the_least_of_few_rows(k: int, n: int, layout: str) -> None:
    """A row reads all weights, so that it costs what 16 rows cost or little less (with 256 columns,
    16 rows of a are as much for a core to load as its columns of b)."""
    times = [matmul_time(m, k, n, DIE, b_layout=layout) for m in (1, 2, 4, 8, 16)]
    seconds = [t.time_s for t in times]
    assert seconds == sorted(seconds) and seconds[-1] < (1.2 if n == 256 else 1.1) * seconds[0]
    assert all(t.time_s >= t.bound_s for t in times)
    assert times[0].bound_s >= k * n * 2 / DIE.chip.memory_bytes_per_s


def test_one_row_follows_the_published_line() -> None:
    """4.2 us and the weights at 1.20 TB/s, fitted to 16 rows on this die, from 20 MB of weights."""
    for k, n in ((7168, 7168), (5120, 25600), (3200, 5120), (16384, 53248)):
        line = 4.2e-6 + k * n * 2 / 1.2e12
        assert matmul_time(16, k, n, DIE, b_layout="nz").time_s == pytest.approx(line, rel=0.12)
        assert matmul_time(1, k, n, DIE, b_layout="nz").time_s == pytest.approx(line, rel=0.12)


@pytest.mark.parametrize(("m", "k"), [(4096, 4096), (53248, 16384), (7168, 256), (1, 10**6)])
def test_one_column_is_like_one_row(m: int, k: int) -> None:
    """A x needs what x^T A^T needs; a column is one piece in either layout."""
    column = matmul_time(m, k, 1, DIE)
    assert column.time_s == matmul_time(m, k, 1, DIE, b_layout="nz").time_s
    row = matmul_time(1, k, m, DIE, b_layout="nz")
    assert column.time_s == pytest.approx(row.time_s, rel=0.35)
    assert column.bound_s == pytest.approx(row.bound_s)
    assert column.time_s <= matmul_time(m, k, 2, DIE).time_s


def test_batches_of_vectors() -> None:
    one = matmul_time(1, 128, 4096, DIE)
    before = one.time_s
    for batch in (2, 3, 8, 64, 512):
        many = matmul_time(1, 128, 4096, DIE, batch=batch)
        assert before <= many.time_s <= batch * one.time_s
        assert many.bound_s == pytest.approx(batch * one.bound_s) and many.time_s >= many.bound_s
        before = many.time_s
