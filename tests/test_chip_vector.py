"""Vector kernels and fused attention on one device: terms, limits, laws, refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as S
from jax import lax

import emulator as em
from emulator.chip import Attention, Spread, attention_time, lane_factor, vector_time
from emulator.machines import Machine
from emulator.machines.chips import single
from emulator.machines.fact import facts_of
from emulator.program.cost_kernels import layout_runs
from emulator.timeline import Op, each

DIE, PACKAGE, NVL72 = em.cloudmatrix384("die"), em.cloudmatrix384(), em.gb200_nvl72()
CHIP, CORE = DIE.chip, DIE.chip.vector
HALF = dataclasses.replace(DIE, name="half the clock", chip=CHIP.at_clock(0.9e9))
MACHINES = {"die": DIE, "package": PACKAGE, "GB200": NVL72, "H100": single("H100")}
F32, BF16 = jnp.float32, jnp.bfloat16


def with_core(**changes: Any) -> Machine:
    """A die with other numbers around its vector cores."""
    chip = dataclasses.replace(CHIP, vector=dataclasses.replace(CORE, **changes))
    return dataclasses.replace(DIE, name=f"die with {changes}", chip=chip)


def cycles(count: float) -> float:
    return count / CHIP.clock_hz


def step(fun: Any, *args: Any, on: Machine = DIE, fusion: str = "chains") -> Op:
    (found,) = (s for s, _ in each(em.estimate(fun, *args, on=on, fusion=fusion).steps))
    assert isinstance(found, Op)
    return found


# -- one kernel


def test_a_large_kernel_is_memory_and_what_nothing_hides() -> None:
    n = 10**9
    time = vector_time(n // 8, n, DIE, 1, Spread(written=n // 2))
    assert time.limited_by == "memory" and time.cores == 48
    assert time.memory_s == n / CHIP.usable_memory_bytes_per_s
    half = CORE.ub_bytes // 2
    ends = half / CORE.load_bytes_per_cycle + half / CORE.store_bytes_per_cycle
    waits = CORE.load_wait_cycles + CORE.store_wait_cycles
    assert time.launch_s == pytest.approx(CHIP.launch_s + cycles(ends + waits))
    assert time.time_s == time.memory_s + time.launch_s


def test_a_small_kernel_is_one_line_on_one_core() -> None:
    time = vector_time(64, 512, DIE, 1, Spread(written=256))
    assert time.cores == 1 and time.limited_by == "launch"
    assert time.load_s == pytest.approx(cycles(256 / 46))
    assert time.store_s == pytest.approx(cycles(256 / 64))
    # One lane operation a cycle and lane, and in each of four tiles an instruction's start.
    assert time.compute_s == pytest.approx(cycles(64 / 64 + 4 * 19))


def test_compute_is_lanes_and_starts() -> None:
    ops = 48 * 64 * 10**4
    one = vector_time(ops, 48 * 512, DIE)
    many = vector_time(ops, 48 * 512, DIE, 1, Spread(instructions=10))
    assert one.limited_by == "vector"
    assert one.compute_s == pytest.approx(cycles(10**4 + 4 * 19))
    assert many.compute_s - one.compute_s == pytest.approx(cycles(9 * 4 * 19))


def test_nothing_takes_nothing() -> None:
    assert vector_time(0, 0, DIE, 0).time_s == 0
    assert vector_time(0, 0, DIE).time_s == CHIP.launch_s


def test_half_precision_lanes() -> None:
    assert lane_factor("float16", DIE) == 0.5
    assert lane_factor("bfloat16", DIE) == 1  # no BF16 lanes: widened
    with pytest.raises(NotImplementedError, match="float128"):
        lane_factor("float128", DIE)


@pytest.mark.parametrize("rows", (1, 5, 47, 48, 49, 96, 97))
def test_few_rows_few_cores(rows: int) -> None:
    row_ops = 6400
    time = vector_time(rows * row_ops, rows * 4096, DIE, 1, Spread(units=rows))
    busiest = math.ceil(rows / 48)
    assert time.cores == min(48, rows)
    assert time.compute_s == pytest.approx(cycles(busiest * row_ops / 64 + 4 * 19))
    assert time.load_s == pytest.approx(cycles(busiest * 4096 / 46))


def test_long_rows_are_divided_at_the_price_of_a_wait() -> None:
    whole = vector_time(10**9, 10**8, DIE, 1, Spread(units=2))
    divided = vector_time(10**9, 10**8, DIE, 1, Spread(units=2, syncs=1))
    assert whole.cores == 2 and divided.cores == 48
    assert divided.time_s < whole.time_s / 10
    short = Spread(units=2, syncs=1)
    assert vector_time(100, 800, DIE, 1, short).cores == 2  # not worth the wait
    slow = with_core(sync_s=1e-3)
    more = vector_time(10**9, 10**8, slow, 1, Spread(units=2, syncs=2))
    assert more.launch_s - divided.launch_s == pytest.approx(2e-3 - CORE.sync_s)


def test_rows_that_do_not_fit_are_read_again() -> None:
    nbytes = 10**8
    fits = Spread(units=48, row_bytes=CORE.ub_bytes, again=nbytes)
    does_not = dataclasses.replace(fits, row_bytes=CORE.ub_bytes + 1)
    once, twice = (vector_time(0, nbytes, DIE, 1, spread) for spread in (fits, does_not))
    assert (once.bytes, twice.bytes) == (nbytes, 2 * nbytes)
    assert twice.memory_s == 2 * once.memory_s
    assert twice.bound_s == once.bound_s  # physics does not ask for it
    # Divided among cores, a part of a row fits.
    parts = Spread(units=1, syncs=1, row_bytes=48 * CORE.ub_bytes, again=nbytes)
    assert vector_time(0, nbytes, DIE, 1, parts).bytes == nbytes


def test_what_every_core_reads_comes_once_from_memory_and_then_from_the_cache() -> None:
    divided, shared = 48 * 512 * 100, 46_000
    time = vector_time(0, divided + shared, DIE, 1, Spread(shared=shared))
    assert time.load_s == pytest.approx(cycles(512 * 100 / 46 + shared / 115))
    assert time.memory_s == (divided + shared) / CHIP.usable_memory_bytes_per_s


def test_rows_and_indices_take_their_cycles() -> None:
    nbytes, rows = 48 * 512, 48 * 1000
    near = vector_time(0, nbytes, DIE, 1, Spread(rows=rows))
    far = vector_time(0, nbytes, DIE, 1, Spread(indexed=rows))
    assert near.load_s == pytest.approx(cycles(1000 * CORE.row_cycles))
    assert far.load_s == pytest.approx(cycles(1000 * CORE.index_cycles))
    assert far.limited_by == "load"


# -- laws

counts = st.one_of(st.integers(0, 10**4), st.integers(0, 10**10))
spreads = st.builds(
    Spread,
    units=st.integers(0, 200),
    syncs=st.integers(0, 2),
    instructions=st.integers(0, 9),
    padding=st.floats(1, 8),
    rows=st.integers(0, 10**6),
    indexed=st.integers(0, 10**6),
    row_bytes=st.integers(0, 10**6),
    again=counts,
)


@settings(deadline=None, max_examples=200)
@given(
    ops=counts, read=counts, written=counts, spread=spreads, name=st.sampled_from(sorted(MACHINES))
)
def test_never_faster_than_physics(
    ops: int, read: int, written: int, spread: Spread, name: str
) -> None:
    machine = MACHINES[name]
    spread = dataclasses.replace(spread, written=written)
    time = vector_time(ops, read + written, machine, 1, spread)
    assert time.time_s >= time.bound_s
    assert time.time_s >= max(time.compute_s, time.load_s, time.store_s, time.memory_s)
    assert time.bound_s >= (read + written) / (
        machine.dies_per_device * machine.chip.memory_bytes_per_s
    )


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.tuples(counts, counts, counts),
    which=st.integers(0, 2),
    more=counts,
    spread=spreads,
    name=st.sampled_from(sorted(MACHINES)),
)
def test_time_never_falls_with_work(
    sizes: tuple[int, int, int], which: int, more: int, spread: Spread, name: str
) -> None:
    machine = MACHINES[name]
    larger = list(sizes)
    larger[which] += more
    before, after = (
        vector_time(ops, read + written, machine, 1, dataclasses.replace(spread, written=written))
        for ops, read, written in (sizes, larger)
    )
    assert after.time_s >= before.time_s * (1 - 1e-12)


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(1, 300), more=st.integers(1, 100), row=st.integers(1, 10**6))
def test_time_never_falls_with_rows(rows: int, more: int, row: int) -> None:
    before, after = (
        vector_time(n * row, 8 * n * row, PACKAGE, 1, Spread(written=4 * n * row, units=n, syncs=1))
        for n in (rows, rows + more)
    )
    assert after.time_s >= before.time_s * (1 - 1e-12)


@settings(deadline=None, max_examples=100)
@given(ops=counts, nbytes=counts, spread=spreads)
def test_half_the_clock_never_speeds_up(ops: int, nbytes: int, spread: Spread) -> None:
    slow, usual = (vector_time(ops, nbytes, on, 1, spread).time_s for on in (HALF, DIE))
    assert slow >= usual


BETTER = [
    {"load_bytes_per_cycle": 92.0},
    {"store_bytes_per_cycle": 128.0},
    {"startup_cycles": 0.0},
    {"row_cycles": 0.0},
    {"sync_s": 0.0},
    {"ub_bytes": 2 * CORE.ub_bytes},
]


@settings(deadline=None, max_examples=100)
@given(ops=counts, nbytes=counts, spread=spreads, changes=st.sampled_from(BETTER))
def test_a_better_core_is_never_slower(
    ops: int, nbytes: int, spread: Spread, changes: dict[str, float]
) -> None:
    better = with_core(**changes)
    times = [vector_time(ops, nbytes, on, 1, spread) for on in (DIE, better)]
    slack = 0.0
    if "ub_bytes" in changes:  # a longer first load and last store
        slack = cycles(CORE.ub_bytes / 2 * (1 / 46 + 1 / 64))
    assert times[1].time_s <= times[0].time_s + slack + 1e-15


def test_package_does_vector_work_twice_as_fast() -> None:
    one, two = vector_time(10**10, 10**10, DIE), vector_time(10**10, 10**10, PACKAGE)
    assert one.memory_s == pytest.approx(2 * two.memory_s)
    assert one.compute_s == pytest.approx(2 * two.compute_s, rel=1e-4)


# -- kernels of a program


def softmax(x: Any) -> Any:
    return jax.nn.softmax(x, -1)


def test_softmax_reads_a_row_once_if_it_fits() -> None:
    row = CORE.ub_bytes // 8  # its operand and what is made of it, FP32
    short, long = (step(softmax, S((96, n), F32)) for n in (row, row + 1))
    assert short.bytes == 2 * 4 * 96 * row
    assert long.bytes == (2 + 2) * 4 * 96 * (row + 1)  # for the sum and for the quotient
    assert long.memory_s == pytest.approx(short.memory_s, rel=1e-3)


def test_rows_that_waste_lanes_take_longer() -> None:
    def lots(x: Any) -> Any:
        for _ in range(40):
            x = jnp.tanh(x)
        return x.sum(-1)

    full, odd = (step(lots, S((48 * 512, n), F32)) for n in (64, 65))
    assert full.limited_by == odd.limited_by == "vector"
    assert odd.time_s / full.time_s == pytest.approx(72 / 64, rel=0.03)


def test_sum_of_everything_waits_once() -> None:
    x = S((4096, 4096), F32)
    whole, rows = step(lambda x: x.sum(), x), step(lambda x: x.sum(-1), x)
    assert whole.time_s - rows.time_s == pytest.approx(CORE.sync_s, rel=0.02)


def test_transposes_by_their_rows() -> None:
    assert layout_runs((8, 128, 64), (1, 0, 2), 2, 512) == ((128, 128), False)
    assert layout_runs((4096, 4096), (1, 0), 2, 512) == ((512, 512), True)
    assert layout_runs((4096, 1, 4096), (1, 0, 2), 2, 512) == ((2 * 4096**2,) * 2, False)
    # Two columns: 32768 rows of them lie together, and become two runs.
    assert layout_runs((10**6, 2), (1, 0), 2, 512) == ((4 * 32768, 2 * 32768), True)
    # Four rows of 512 lie together and become runs of four, or runs of four become rows.
    assert layout_runs((64, 4, 512), (2, 0, 1), 4, 512) == ((4 * 4 * 512, 4 * 4), True)
    assert layout_runs((512, 64, 4), (1, 2, 0), 4, 512) == ((4 * 4, 4 * 4 * 512), True)
    x = S((2**22, 16), BF16)
    rows = step(lambda x: x.transpose(1, 0, 2), S((2**11, 2**11, 16), BF16), fusion="eager")
    turned = step(lambda x: x.T, x, fusion="eager")
    assert rows.bytes == turned.bytes == 4 * x.size
    assert rows.limited_by == "load"  # 32 bytes at a time
    assert turned.time_s < rows.time_s


def test_gather_takes_rows_or_picks_from_a_table() -> None:
    def take(size: tuple[int, ...], count: int) -> Op:
        args = S(size, F32), S((count,), jnp.int32)
        answer = em.estimate(lambda t, i: jnp.take(t, i, 0, mode="clip"), *args, on=DIE)
        return next(s for s, _ in each(answer.steps) if s.name == "gather")  # type: ignore[return-value]

    rows = take((10**6, 256), 999)
    assert rows.bytes == 999 * 2 * 1024 + 999 * 4
    assert rows.bound_s < rows.time_s
    small, large = take((1024,), 10**7), take((10**6,), 10**7)
    assert large.time_s > 10 * small.time_s
    assert small.bytes == 2 * 4 * 10**7 + 4096
    # Rows that are picked again and again come from memory once.
    many = take((1000, 256), 10**5)
    moved = 1000 * 1024 + 10**5 * 4 + 10**5 * 1024
    assert many.memory_s == pytest.approx(moved / CHIP.memory_bytes_per_s)


def test_scatter_reads_changes_and_writes_whole_lines() -> None:
    """999 rows of 800 bytes, in two lines each, of an operand that is copied: it is not donated."""

    def add(table: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        return table.at[at].add(rows, mode="clip")

    args = S((10**5, 200), F32), S((999,), jnp.int32), S((999, 200), F32)
    steps = [s for s, _ in each(em.estimate(add, *args, on=DIE).steps)]
    (op,) = (s for s in steps if isinstance(s, Op) and s.name == "scatter-add")
    table, rows, lines = 10**5 * 800, 999 * 800, 999 * 1024
    assert op.bytes == rows + 2 * lines + 999 * 4 + 2 * table
    assert op.flops == 999 * 200


def test_cumulative_sums_read_long_rows_again_unless_a_core_keeps_them() -> None:
    """Divided among cores, a row of 4 bytes an element is kept with its sums, 8 bytes a piece: up
    to 192 KiB on each of 48 cores.
    """
    kept = 48 * 192 * 1024 // 8
    for n, read_again in ((kept, 0), (kept + 1, 4 * (kept + 1))):
        found = step(lambda x: jnp.cumsum(x, -1), S((1, n), F32))
        assert found.bytes == 8 * n + read_again


def test_sort_merges_four_lists_at_a_time() -> None:
    def merges(n: int) -> list[Op]:
        return [s for s, _ in each(em.estimate(lax.sort, S((n,), F32), on=DIE).steps)]  # type: ignore[misc]

    assert [len(merges(n)) for n in (100, 8192, 8193, 4 * 8192, 4 * 8192 + 1)] == [1, 1, 2, 2, 3]
    # The last merge is one core's: an element a cycle.
    last = merges(2**20)[-1]
    assert last.time_s == pytest.approx(cycles(2**20), rel=0.02)
    rows = [s for s, _ in each(em.estimate(lax.sort, S((48, 8192), F32), on=DIE).steps)]
    assert len(rows) == 1 and rows[0].time_s == pytest.approx(cycles(8192 * 5), rel=0.3)


def test_cumulative_sum_of_one_row_waits() -> None:
    one, many = (
        step(lambda x: jnp.cumsum(x, -1), S(shape, F32)) for shape in ((1, 2**20), (2**10, 2**10))
    )
    assert one.time_s > many.time_s


FILLS = ("softmax", "sum", "columns", "transpose")


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(2, 3000),  # the maximum of a single row is a number, which joins no kernels
    n=st.integers(1, 3000),
    more=st.integers(1, 500),
    which=st.integers(0, 1),
    kernel=st.sampled_from(("softmax", "sort", "cumsum", "gather", "sum", "columns", "transpose")),
)
def test_kernels_take_longer_for_more(m: int, n: int, more: int, which: int, kernel: str) -> None:
    functions = {
        "softmax": softmax,
        "sort": lambda x: jnp.sort(x, -1),
        "cumsum": lambda x: jnp.cumsum(x, -1),
        "gather": lambda x: jnp.take(x, jnp.zeros(500, int), 0, mode="clip"),
        "sum": lambda x: x.sum(-1),
        "columns": lambda x: x.sum(0),
        "transpose": lambda x: x.T,
    }
    large = (m + more, n) if which == 0 else (m, n + more)
    before, after = (
        em.estimate(functions[kernel], S(shape, F32), on=DIE).time_s for shape in ((m, n), large)
    )
    # Rows that no longer fill instructions, or fill them better, are another layout.
    slack = 0.35 * (before - CHIP.launch_s) if kernel in FILLS else 0.0
    assert after >= before - slack - 1e-12


# -- attention


def attention(**sizes: Any) -> Attention:
    usual = {"batch": 8, "rows": 1024, "keys": 1024, "depth": 128, "width": 128, "item": 2}
    sizes = usual | {"dtype": "bfloat16"} | sizes
    scores = sizes["batch"] * sizes["rows"] * sizes["keys"] * sizes.get("share", 1.0)
    size = sizes["batch"] * (
        sizes["rows"] * (sizes["depth"] + sizes["width"])
        + sizes["keys"] * (sizes["depth"] + sizes["width"])
    )
    return Attention(**{"lane_ops": int(13 * scores), "nbytes": 2 * size} | sizes)


BACKWARD = ("rdk", "rwk", "krw", "rkd", "krd")


def test_attention_counts_its_products() -> None:
    assert attention(width=64).flops == 2 * 8 * 1024 * 1024 * (128 + 64)
    assert attention(share=0.5).flops == attention().flops / 2
    whole = attention(products=BACKWARD, backward=True)
    assert whole.flops == 2.5 * attention().flops


def test_attention_is_limited_by_the_softmax_on_this_machine() -> None:
    work = attention(batch=32, rows=4096, keys=4096)
    time = attention_time(work, DIE)
    assert time.limited_by == "vector"
    lanes = work.lane_ops / (48 * 64 * CHIP.clock_hz)
    assert lanes < time.vector_s < 1.35 * lanes
    cube = work.flops / CHIP.matmul_flops_per_s("bfloat16")
    assert cube < time.cube_s < 1.05 * cube
    cheap = attention_time(dataclasses.replace(work, lane_ops=0), DIE)
    assert cheap.time_s < 0.95 * time.time_s


@pytest.mark.parametrize("backward", [False, True])
def test_engines_of_attention_by_hand(backward: bool) -> None:
    """12 heads of 32 tiles of 128 queries on 24 cores: 16 of them one after the other on one core,
    each with 4,096 keys; d = 192, w = 128, BF16.
    """
    sizes = {"batch": 12, "rows": 4096, "keys": 4096, "depth": 192, "width": 128}
    how: dict[str, Any] = {"products": BACKWARD, "backward": True} if backward else {}
    work = attention(**sizes, **how)
    time = attention_time(work, DIE)
    done, clock = 16 * 4096, CHIP.clock_hz
    # Of each key and 128 queries: multiply-adds, instructions of 128 x 256 x 64, L1 to L0.
    sums = {"rdk": 192, "rwk": 128, "rkw": 128, "krw": 128, "rkd": 192, "krd": 192}
    macs = sum(128 * sums[product] for product in work.products)
    instructions = macs / (128 * 256 * 64)
    cube = macs / 4096 + 9 * instructions
    assert time.cube_s == pytest.approx(done * cube / clock)
    # Keys and values once for each tile of queries, which is loaded itself; scores in FP32 go out
    # and weights in BF16 come back through the cache, and a part of the result each 1,024 keys.
    times, result = (2, 192) if backward else (1, 128)
    weights = times * 128 * 2
    load = (192 + 128) * 2 + weights
    store = times * 128 * 4 + 128 * result * 4 / 1024
    assert time.load_s == pytest.approx((done * load + 16 * 128 * 192 * 2) / (93.53 * clock))
    assert time.store_s == pytest.approx(done * store / (118 * clock))
    # Two vector cores of 64 lanes each: 13 operations a score, the rest of a result's 1,024th.
    operations = 128 * 13 + 2 * 128 * 128 / 1024
    moved = max(store / 115, weights / 64)
    vector = operations / 128 + moved / 2
    assert time.vector_s == pytest.approx(done * vector / clock)
    tiles_keys = 12 * 32 * 4096
    assert time.l2_s == pytest.approx(
        max(load + store, (store + weights) / 0.5) * tiles_keys / 5e12
    )
    assert time.l2_bytes == pytest.approx((load + 2 * store + weights) * tiles_keys)
    assert time.memory_s == pytest.approx(work.nbytes / (0.85 * 1.6e12))
    # Nothing hides a launch of both kinds of cores, the tiling and the first 256 keys.
    assert time.fixed_s == pytest.approx(4.2e-6 + 3e-6 + 3e-6 + 256 * (cube + vector) / clock)
    engines = ("cube_s", "load_s", "store_s", "vector_s", "l2_s", "memory_s")
    busy_s = sum(getattr(time, name) ** 8 for name in engines) ** (1 / 8)
    assert time.time_s == pytest.approx(busy_s + time.fixed_s)
    assert time.utilization == pytest.approx(work.flops / 353.8944e12 / time.time_s)


def test_masked_tiles_take_no_time() -> None:
    whole = attention_time(attention(batch=32, rows=4096, keys=4096), DIE)
    half = attention_time(attention(batch=32, rows=4096, keys=4096, share=0.5), DIE)
    for name in ("cube_s", "store_s", "vector_s", "l2_s"):
        assert getattr(half, name) == pytest.approx(getattr(whole, name) / 2)


def test_scores_pass_the_cache_where_cores_do_not_meet() -> None:
    work = attention(batch=32, rows=4096, keys=4096)
    inside = with_core(scores_in_l2=False)
    here, there = attention_time(work, DIE), attention_time(work, inside)
    assert there.store_s == 0 < here.store_s
    assert there.l2_s < here.l2_s / 3


def test_few_queries_divide_the_keys() -> None:
    """Decoding: one row of tiles for each head, and far more cores."""
    few = attention(batch=2, rows=8, keys=32768)
    time = attention_time(few, DIE)
    one_core = 32768 * 2 * 128 * 2 / (CHIP.engines.load_bytes_per_cycle * CHIP.clock_hz)
    assert time.load_s < one_core / 10
    assert time.fixed_s > CORE.sync_s + CORE.mixed_s + CHIP.launch_s


attentions = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 80),
        "rows": st.one_of(st.integers(1, 300), st.integers(1, 9000)),
        "keys": st.one_of(st.integers(1, 300), st.integers(1, 9000)),
        "depth": st.integers(1, 512),
        "width": st.integers(1, 512),
    }
)


@settings(deadline=None, max_examples=200)
@given(
    sizes=attentions,
    which=st.sampled_from(("batch", "rows", "keys", "depth", "width")),
    more=st.integers(1, 500),
    name=st.sampled_from(sorted(MACHINES)),
    backward=st.booleans(),
)
def test_attention_laws(
    sizes: dict[str, int], which: str, more: int, name: str, backward: bool
) -> None:
    machine = MACHINES[name]
    how: dict[str, Any] = {"products": BACKWARD, "backward": True} if backward else {}
    before = attention_time(attention(**sizes, **how), machine)
    after = attention_time(attention(**sizes | {which: sizes[which] + more}, **how), machine)
    assert after.time_s >= before.time_s * (1 - 1e-12)
    for time in (before, after):
        assert time.time_s >= time.bound_s > 0
        assert 0 < time.utilization <= 1
    half = attention_time(attention(**sizes, share=0.5, **how), machine)
    assert half.time_s <= before.time_s * (1 + 1e-12)


@settings(deadline=None, max_examples=50)
@given(sizes=attentions)
def test_attention_at_half_the_clock(sizes: dict[str, int]) -> None:
    assert (
        attention_time(attention(**sizes), HALF).time_s
        >= attention_time(attention(**sizes), DIE).time_s
    )


# -- numbers and refusals


@pytest.mark.parametrize("name", MACHINES)
def test_every_number_has_a_source(name: str) -> None:
    machine = MACHINES[name]
    facts = list(facts_of(machine.chip.vector, per="vector core"))
    assert len(facts) == len(dataclasses.fields(CORE)) - 2  # citations, and a plain yes or no
    assert all(fact.source != "no source given" for fact in facts)
    assert {f"chip.vector.{f.name}" for f in facts} <= {f.name for f in machine.facts()}


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"lane_bytes": 0}, "VectorEngines.lane_bytes must be a number above 0; got 0"),
        ({"load_bytes_per_cycle": -1.0}, "load_bytes_per_cycle must be a number above 0"),
        ({"sync_s": math.nan}, "sync_s must be a number, 0 or above; got nan"),
        ({"startup_cycles": None}, "startup_cycles must be a number, 0 or above; got None"),
        ({"merge_lists": 1}, "merge_lists must be at least 2; got 1"),
        ({"ub_bytes": 300}, "lane_bytes 256: two of them must fit ub_bytes, which is 300"),
    ),
)
def test_contradictory_vector_cores_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CORE, **changes)


def test_bad_work_is_refused() -> None:
    with pytest.raises(ValueError, match="lane_ops=-1"):
        vector_time(-1, 0, DIE)
    with pytest.raises(ValueError, match="nbytes=8.*10 are written"):
        vector_time(0, 8, DIE, 1, Spread(written=10))
    with pytest.raises(ValueError, match=r"Spread\(padding=0.5\): expected at least 1"):
        Spread(padding=0.5)
    with pytest.raises(ValueError, match=r"Spread\(rows=-1\): expected at least 0"):
        Spread(rows=-1)
    with pytest.raises(ValueError, match=r"Attention\(keys=0\): expected at least 1"):
        attention(keys=0)
    with pytest.raises(ValueError, match=r"Attention\(share=0.0\)"):
        attention(share=0.0, lane_ops=0)
    with pytest.raises(NotImplementedError, match="float64"):
        attention_time(attention(dtype="float64"), DIE)
