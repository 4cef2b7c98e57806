"""One device's time: matmuls against published kernels, laws, and clear errors."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.chip import lane_factor, matmul_time, vector_time
from emulator.machines import Machine, cloudmatrix384, gb200_nvl72

DIE = cloudmatrix384("die")
PACKAGE = cloudmatrix384()
NVL72 = gb200_nvl72()

# Library kernels on one die: (clock in Hz, m, k, n, layout of b, measured microseconds).
# C rows: zzc0721/torch-performance-test-data issue #109, 910B2, torch loop.
# P rows: Horacehxw/msModeling 39df672, 910C die, kernel mean inside a model.
MEASURED = {
    "C1": (1.80e9, 1024, 1024, 1024, "nd", 21.5),
    "C4": (1.80e9, 8192, 8192, 8192, "nd", 3650.1),
    "P9": (1.85e9, 3072, 5120, 3200, "nz", 351.36),
    "P10": (1.85e9, 3072, 1600, 5120, "nz", 203.96),
    "P11": (1.85e9, 3072, 5120, 768, "nz", 97.20),
    "P12": (1.85e9, 3072, 512, 5120, "nz", 69.50),
    "P21": (1.85e9, 16, 5120, 3200, "nz", 31.37),
}


def at_clock(machine: Machine, clock_hz: float) -> Machine:
    """The machine with another clock; the matrix unit's peaks follow it."""
    chip = machine.chip
    scale = clock_hz / chip.clock_hz
    peaks = tuple((d, rate * scale) for d, rate in chip.matmul_peaks_flops_per_s)
    chip = dataclasses.replace(chip, clock_hz=clock_hz, matmul_peaks_flops_per_s=peaks)
    return dataclasses.replace(machine, name=f"{machine.name} at {clock_hz:g} Hz", chip=chip)


def residual(row: str) -> float:
    """Model over measurement, less one."""
    clock_hz, m, k, n, layout, measured_us = MEASURED[row]
    time = matmul_time(m, k, n, at_clock(DIE, clock_hz), "bfloat16", layout)
    return time.time_s / (measured_us * 1e-6) - 1


@pytest.mark.parametrize("row", MEASURED)
def test_matmul_is_near_each_published_kernel(row: str) -> None:
    error = residual(row)
    print(f"{row}: {error:+.1%}")
    # The 1024^3 row includes the host's loop, which the model does not; the others are kernels.
    assert abs(error) < (0.30 if row == "C1" else 0.20)


def test_matmul_median_error_is_small() -> None:
    errors = sorted(abs(residual(row)) for row in MEASURED)
    assert errors[len(errors) // 2] < 0.08


@pytest.mark.parametrize("row", MEASURED)
def test_bound_is_below_the_measurement(row: str) -> None:
    clock_hz, m, k, n, layout, measured_us = MEASURED[row]
    assert (
        matmul_time(m, k, n, at_clock(DIE, clock_hz), b_layout=layout).bound_s < measured_us * 1e-6
    )


def test_terms_of_a_large_matmul() -> None:
    """8192^3 on a die from named terms: the busiest core has 86 of 2048 tiles of 128x256."""
    time = matmul_time(8192, 8192, 8192, DIE)
    assert time.tiles == 2048 and time.tile in ((128, 256), (256, 128)) and time.cores == 24
    tiles_of_busiest = -(-2048 // 24)
    mmads = 8192 // 64
    cycles_per_mmad = 128 * 256 * 64 / 4096 + 9
    assert time.cube_s == pytest.approx(tiles_of_busiest * mmads * cycles_per_mmad / 1.8e9)
    loaded = 2048 * (128 + 256) * 8192 * 2
    cold = 2 * 8192 * 8192 * 2
    by_cache = (loaded - cold) / (5e12 * 0.78) + cold / (1.6e12 * 0.85)
    assert time.load_s == pytest.approx(by_cache)
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


def test_package_divides_m_or_n_between_its_dies() -> None:
    whole = matmul_time(4096, 4096, 4096, PACKAGE)
    half = matmul_time(2048, 4096, 4096, DIE)
    other = matmul_time(4096, 4096, 2048, DIE)
    assert whole.time_s == min(half.time_s, other.time_s)
    assert whole.flops == 2 * 4096**3


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
    assert set(time.breakdown) == {"cube_s", "load_s", "store_s", "fixed_s"}


def test_dtypes_order_as_their_peaks() -> None:
    times = {d: matmul_time(4096, 4096, 4096, DIE, d).time_s for d in ("int8", "bfloat16", "hf32")}
    assert times["int8"] < times["bfloat16"] < times["hf32"]
    assert times["hf32"] < matmul_time(4096, 4096, 4096, DIE, "float32").time_s


def test_gb200_is_faster_per_device() -> None:
    assert (
        matmul_time(8192, 8192, 8192, NVL72).time_s < matmul_time(8192, 8192, 8192, PACKAGE).time_s
    )


sizes = st.one_of(st.integers(1, 300), st.integers(1, 20000))


@settings(deadline=None, max_examples=150)
@given(m=sizes, k=sizes, n=sizes, machine=st.sampled_from([DIE, PACKAGE, NVL72]))
def test_never_faster_than_physics(m: int, k: int, n: int, machine: Machine) -> None:
    time = matmul_time(m, k, n, machine)
    assert time.time_s >= time.bound_s
    assert time.bound_s >= 2 * m * k * n / time.peak_flops_per_s


@settings(deadline=None, max_examples=150)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    more=st.integers(1, 3000),
    which=st.integers(0, 2),
    machine=st.sampled_from([DIE, PACKAGE, NVL72]),
)
def test_time_never_falls_with_size(
    m: int, k: int, n: int, more: int, which: int, machine: Machine
) -> None:
    """More work takes longer, although the library may choose another tile or K split for it."""
    small = [m, k, n]
    large = list(small)
    large[which] += more
    before, after = matmul_time(*small, machine), matmul_time(*large, machine)
    assert after.time_s >= before.time_s * (1 - 1e-12)


@settings(deadline=None, max_examples=60)
@given(m=sizes, k=sizes, n=sizes)
def test_half_the_clock_never_speeds_up(m: int, k: int, n: int) -> None:
    assert matmul_time(m, k, n, at_clock(DIE, 0.9e9)).time_s >= matmul_time(m, k, n, DIE).time_s


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"m": 0}, ValueError, "m=0"),
        ({"k": -3}, ValueError, "k=-3"),
        ({"n": 1.5}, TypeError, "n=1.5"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"b_layout": "zz"}, ValueError, "nd.*nz"),
        ({"dtype": "float64"}, NotImplementedError, "float64"),
        ({"dtype": "tf32"}, NotImplementedError, "tf32"),
        ({"on": "pod"}, TypeError, "Machine"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        matmul_time(**({"m": 16, "k": 16, "n": 16, "on": DIE} | arguments))


def test_vector_terms() -> None:
    ops, traffic = 10**9, 10**6
    time = vector_time(ops, traffic, DIE)
    assert time.compute_s == pytest.approx(ops / (DIE.chip.vector_flops_per_s("float32") / 2))
    assert time.memory_s == pytest.approx(traffic / (1.6e12 * 0.85))
    assert time.time_s == max(time.compute_s, time.memory_s) + DIE.chip.launch_s
    assert time.limited_by == "vector"
    assert vector_time(0, 10**9, DIE).limited_by == "memory"
    assert vector_time(1, 1, DIE).limited_by == "launch"
    assert vector_time(0, 0, DIE, 0).time_s == 0


def test_package_does_vector_work_twice_as_fast() -> None:
    one, two = vector_time(10**10, 10**10, DIE), vector_time(10**10, 10**10, PACKAGE)
    assert one.time_s - one.launch_s == pytest.approx(2 * (two.time_s - two.launch_s))


def test_half_precision_lanes() -> None:
    assert lane_factor("float16", DIE) == 0.5
    assert lane_factor("bfloat16", DIE) == 1  # no BF16 lanes: widened
    with pytest.raises(NotImplementedError, match="float128"):
        lane_factor("float128", DIE)


def test_negative_work_is_refused() -> None:
    with pytest.raises(ValueError, match="lane_ops=-1"):
        vector_time(-1, 0, DIE)
