"""Peak memory of a device: programs whose peak is known by hand, laws, XLA's own plan beside it,
and what is said of a program that does not fit.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.memory import Buffer, Lifetimes, MemoryUse, Moment, communicator_bytes, peak

POD = em.cloudmatrix384()
MESH = POD.mesh(dp=48, tp=8)
S = jax.ShapeDtypeStruct
F32 = jnp.float32
ROWS = 512
X = S((ROWS, ROWS), F32)
ONE = 4 * ROWS * ROWS  # bytes of X


def used(fun: Any, *args: Any, **options: Any) -> MemoryUse:
    return em.estimate(fun, *args, on=POD, **options).memory


def chain(x: Any, a: Any, b: Any, c: Any) -> Any:
    return x @ a @ b @ c


@pytest.mark.parametrize(
    ("donated", "arrays"),
    [
        ((), 6),  # the four arguments, and each product beside the one it is made from
        ((0,), 5),  # x is gone after the first product
        ((0, 1, 2, 3), 5),  # the first product needs all arguments and room for itself
    ],
)
def test_chain_of_matmuls(donated: tuple[int, ...], arrays: int) -> None:
    assert used(jax.jit(chain, donate_argnums=donated), X, X, X, X).peak_bytes == arrays * ONE


def test_donation_seen_through_jit_and_used_once() -> None:
    """A donated argument that is read again later lives until then."""

    def f(x: Any) -> Any:
        return jax.jit(lambda x: x @ x, donate_argnums=0)(x) @ x

    assert used(f, X).peak_bytes == 3 * ONE
    inner = jax.jit(lambda x: x * 2, donate_argnums=0)
    assert used(lambda x: inner(x), X).peak_bytes == ONE


def test_divided_k_needs_room_for_its_partial_sums() -> None:
    """Few rows and columns, long K: the library divides K and adds FP32 parts up afterwards."""
    m, k, n = 128, 2**16, 128
    a, b = S((m, k), jnp.bfloat16), S((k, n), jnp.bfloat16)
    split = em.matmul_time(m, k, n, on=POD).split_k
    assert split > 1
    memory = used(jnp.matmul, a, b)
    assert memory.peak_bytes == 2 * (m * k + k * n + m * n) + 4 * split * m * n
    assert any(b.name.startswith("partial sums") for b in memory.alive)


def adam(p: Any, m: Any, v: Any, g: Any) -> Any:
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return p - 1e-3 * m / jnp.sqrt(v), m, v


def test_only_space_of_the_same_size_is_taken_over() -> None:
    """A sum is much smaller than what it sums up, which is there until it is done."""
    memory = used(jax.jit(lambda x: x.sum(axis=0), donate_argnums=0), X)
    assert memory.peak_bytes == ONE + 4 * ROWS


def test_optimizer_in_place() -> None:
    """Four arguments and three results; donated, the results take the arguments' places."""
    assert used(adam, X, X, X, X).peak_bytes == 7 * ONE
    donated = jax.jit(adam, donate_argnums=(0, 1, 2))
    assert used(donated, X, X, X, X).peak_bytes == 4 * ONE
    assert used(donated, X, X, X, X, fusion="eager").peak_bytes > 4 * ONE


LAYERS = 32


def layers(body: Any) -> Any:
    return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=LAYERS)[0].sum()


def test_scan_keeps_its_residuals() -> None:
    """The argument, one residual a layer, and in the last layer the carry beside its residual."""
    assert used(jax.grad(layers(jnp.sin)), X).peak_bytes == (1 + LAYERS + 2) * ONE


def test_remat_runs_the_body_again_and_keeps_only_its_input() -> None:
    def body(c: Any) -> Any:
        return jnp.sin(jnp.cos(jnp.tanh(c)))

    plain = used(jax.grad(layers(body)), X).peak_bytes
    remat = used(jax.grad(layers(jax.checkpoint(body))), X).peak_bytes
    assert plain >= 3 * LAYERS * ONE
    # The argument, each layer's input, and what one layer makes again.
    assert (1 + LAYERS + 1) * ONE <= remat <= (1 + LAYERS + 8) * ONE


def offloaded(name: str) -> Any:
    """`layers` that keep their inputs, named "x": on the host, or on the device."""
    policies = jax.checkpoint_policies
    policy = {
        "host": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["x"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "device": policies.save_only_these_names("x"),
    }[name]
    named = jax.checkpoint(lambda x: jnp.sin(checkpoint_name(x, "x")), policy=policy)
    return jax.grad(layers(named))


def test_what_is_offloaded_lies_on_the_host_and_takes_the_time_of_its_links() -> None:
    x, size = S((8 * ROWS, ROWS), F32), 8 * ONE
    there, here = (em.estimate(offloaded(name), x, on=POD) for name in ("host", "device"))
    assert here.memory.peak_bytes - there.memory.peak_bytes >= (LAYERS - 2) * size
    (port,) = (p for p in POD.fabric.ports if p.name == "host")
    copies = {row.name: row for row in there.rows() if "host" in row.name}
    for name, rate in (
        ("copy to host", port.write_bytes_per_s),
        ("copy from host", port.read_bytes_per_s),
    ):
        each_s = copies[name].time_s / copies[name].count
        assert each_s == pytest.approx(port.latency_s + size / (2 * rate))  # two dies
        assert copies[name].count == LAYERS and copies[name].limited_by == "host link"
    assert not any("host" in row.name for row in here.rows())


def test_the_devices_of_a_node_share_its_links_to_the_host() -> None:
    def kept(x: Any) -> Any:
        return jax.device_put(jax.device_put(x + 1, jax.memory.Space.Host), jax.memory.Space.Device)

    def copies_of(devices: Any, on: Any = POD) -> list[Any]:
        mesh = on.mesh(x=len(devices), devices=devices)
        sharded = jax.shard_map(kept, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        answer = em.estimate(sharded, S((len(devices) * ROWS, ROWS), F32), on=on)
        return [step for step in answer.steps if "host" in step.name]

    def time_s(devices: int) -> float:
        return sum(step.time_s for step in copies_of(range(devices)))

    (port,) = (p for p in POD.fabric.ports if p.name == "host")
    of_eight = ONE / (port.per_node * port.bytes_per_s / POD.devices_per_node)
    assert time_s(8) == time_s(16) == pytest.approx(2 * (port.latency_s + of_eight))
    assert time_s(1) < time_s(8)
    # Of nodes that are used unequally, the fullest is waited for; nothing is faster than its links.
    for step in copies_of([*range(8), 8]):
        assert step.time_s == pytest.approx(port.latency_s + of_eight)
        assert step.bound_s == pytest.approx(of_eight)
    # Links faster than the device's own memory leave that.
    fast = dataclasses.replace(
        port, bytes_per_s=1e15, read_bytes_per_s=1e15, write_bytes_per_s=1e15, latency_s=1e-12
    )
    fabric = dataclasses.replace(POD.fabric, ports=(fast,))
    for step in copies_of([0], dataclasses.replace(POD, fabric=fabric)):
        assert step.time_s > ONE / (2 * POD.chip.memory_bytes_per_s)
    rack = em.gb200_nvl72()
    grace = ONE / 225e9 + rack.fabric.ports[0].latency_s  # one for two GPUs, 450 GB/s each way
    of_rack = jax.shard_map(kept, mesh=rack.mesh(x=72), in_specs=P("x"), out_specs=P("x"))
    there = em.estimate(of_rack, S((72 * ROWS, ROWS), F32), on=rack)
    copies = sum(row.time_s for row in there.rows() if "host" in row.name)
    assert copies == pytest.approx(2 * grace)
    other = em.estimate(kept, X, on=em.custom_machine("ring(4, 50GB/s, 1us)"))
    assert any("no number for its links to the hosts" in text for text in other.assumptions)


@pytest.mark.parametrize("manual", [False, True])
def test_results_that_go_to_the_host_take_the_time_of_its_links(manual: bool) -> None:
    part = jax.NamedSharding(POD.mesh(x=8), P("x"))
    host = part.with_memory_kind("pinned_host")

    def program(x: Any) -> Any:
        return x * 2, x + 1

    step: Any = program
    if manual:
        step = jax.shard_map(program, mesh=part.mesh, in_specs=P("x"), out_specs=P("x"))
    plain, moved = (
        jax.jit(step, in_shardings=part, out_shardings=(where, part)) for where in (part, host)
    )
    x = S((8 * ROWS, ROWS), F32)
    here, there = (em.estimate(f, x, on=POD) for f in (plain, moved))
    (port,) = (p for p in POD.fabric.ports if p.name == "host")
    copy_s = port.latency_s + ONE / (port.per_node * port.bytes_per_s / POD.devices_per_node)
    assert there.time_s - here.time_s == pytest.approx(copy_s)
    ones = jnp.ones(x.shape)
    first, second = em.run(moved, ones, on=POD).value
    assert bool((first == 2).all()) and bool((second == 2).all())


def test_remat_costs_the_work_that_it_saves_the_memory_of() -> None:
    def body(c: Any) -> Any:
        return jnp.sin(c @ c)

    plain = em.estimate(jax.grad(layers(body)), X, on=POD)
    remat = em.estimate(jax.grad(layers(jax.checkpoint(body))), X, on=POD)
    assert plain.flops == 3 * LAYERS * 2 * ROWS**3
    assert remat.flops == 4 * LAYERS * 2 * ROWS**3


def test_carry_passes_through_a_loop() -> None:
    """The argument, the carry and its next value; a donated argument is the first carry. The
    counter's next value counts as well.
    """

    def f(x: Any) -> Any:
        return lax.fori_loop(0, 10, lambda i, c: c @ c, x)

    assert used(f, X).peak_bytes == 3 * ONE + 4
    assert used(jax.jit(f, donate_argnums=0), X).peak_bytes == 2 * ONE + 4


def test_stacked_results_do_not_take_the_place_of_what_is_scanned() -> None:
    def f(xs: Any) -> Any:
        return lax.scan(lambda c, x: (c, x @ x), 0.0, xs)[1]

    xs = S((4, ROWS, ROWS), F32)
    memory = used(jax.jit(f, donate_argnums=0), xs)
    assert memory.peak_bytes == pytest.approx(9 * ONE, abs=64)  # in, out, one trip's product
    assert any("stacked by scan" in b.name for b in memory.alive)


def test_branches_count_once() -> None:
    def f(flag: Any, x: Any) -> Any:
        return lax.cond(flag, lambda x: x @ x @ x, lambda x: x * 2, x)

    memory = used(f, S((), jnp.bool_), X, counts={"cond_0": (0.5, 0.5)})
    assert memory.peak_bytes == 3 * ONE + 1 + 4  # with the flag and the branch's number


# -- what several devices add


def over_mesh(fun: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(fun, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def local(memory: MemoryUse) -> int:
    return memory.peak_bytes - memory.communication_bytes


def test_gathered_array_stands_beside_its_parts() -> None:
    gather = over_mesh(lambda x: lax.all_gather(x, "tp", tiled=True), P(("dp", "tp")), P("dp"))
    assert local(used(gather, S((384 * ROWS, ROWS), F32))) == (1 + 8) * ONE


def test_reduction_may_work_in_place() -> None:
    def f(x: Any) -> Any:
        return lax.psum(x @ x, "tp")

    x = S((384 * ROWS, ROWS), F32)
    assert local(used(over_mesh(f, P(("dp", "tp")), P("dp")), x)) == 2 * ONE


def test_resharding_makes_a_copy() -> None:
    """What a shard_map left divided and the next one wants whole is gathered beside its part."""

    def f(x: Any) -> Any:
        y = over_mesh(lambda x: x * 2, P("tp"), P("tp"))(x)
        return over_mesh(lambda y: y.sum(), P(), P())(y)

    memory = used(f, S((8 * ROWS, ROWS), F32))
    assert local(memory) >= (1 + 1 + 8) * ONE
    assert any(b.bytes == 8 * ONE and b.name.startswith("resharded") for b in memory.alive)


def test_library_buffers_are_per_group_of_devices() -> None:
    f = over_mesh(lambda x: lax.psum(lax.psum(x, "tp"), "dp"), P(("dp", "tp")), P())
    memory = used(f, S((384, 64), F32))
    assert memory.communication_bytes == 2 * 2 * 2 * 200 * 10**6  # groups, buffers, dies
    # NCCL_BUFFSIZE of 4 MiB in 16 channels, both ways.
    assert communicator_bytes(em.gb200_nvl72()) == 2 * 16 * 4 * 2**20
    other = dataclasses.replace(POD, arithmetic="FP32_FMA_CHAIN")
    assert em.estimate(f, S((384, 64), F32), on=other).memory == memory  # how it adds is no matter


# -- laws


@pytest.mark.parametrize("seed", range(8))
def test_what_lives_adds_up(seed: int) -> None:
    """Peaks of random bodies equal a sum over intervals counted moment by moment, and what is named
    at the peak adds up to it.
    """
    rng = random.Random(seed)
    count = 30
    sizes = [rng.randrange(1, 100) for _ in range(count)]
    moments = []
    for v in range(3, count):
        reads = tuple({rng.randrange(v) for _ in range(rng.randrange(1, 4))})
        moments.append(Moment(name=f"step {v}", reads=reads, writes=(v,)))
    life = Lifetimes(
        buffers={
            v: Buffer(name=str(v), shape=(size,), dtype="uint8", bytes=size)
            for v, size in enumerate(sizes)
        },
        moments=tuple(moments),
        held=frozenset({0}),
        given=frozenset({1, 2}),
        results=frozenset({count - 1}),
    )
    most = 0
    for i in range(-1, len(moments)):
        total = 0
        for v, size in enumerate(sizes):
            born = -1 if v < 3 else v - 3
            dies = max([j for j, m in enumerate(moments) if v in m.reads], default=born)
            dies = len(moments) if v in (0, count - 1) else dies
            # Donated arguments are there at the start even if nobody reads them.
            total += size if born <= i <= dies else 0
        most = max(most, total)
    found = peak(life)
    assert found.bytes == most == sum(b.bytes for b in found.alive)


def grad_of_layers(n: int) -> Any:
    return jax.grad(
        lambda x: lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=n)[0].sum()
    )


def test_memory_is_monotone() -> None:
    def peaks(make: Any, sizes: Any) -> list[int]:
        return [make(n).peak_bytes for n in sizes]

    deep = peaks(lambda n: used(grad_of_layers(n), X), (1, 2, 8, 64))
    wide = peaks(lambda n: used(chain, *[S((n, n), F32)] * 4), (1, 16, 512, 4096))
    assert deep == sorted(set(deep)) and wide == sorted(set(wide))
    for f, args in ((chain, (X, X, X, X)), (adam, (X, X, X, X)), (grad_of_layers(4), (X,))):
        kept = used(f, *args).peak_bytes
        for i in range(len(args)):
            assert used(jax.jit(f, donate_argnums=i), *args).peak_bytes <= kept


def test_named_buffers_add_up_to_the_peak() -> None:
    for f, args in ((chain, (X, X, X, X)), (adam, (X, X, X, X)), (grad_of_layers(9), (X,))):
        memory = used(f, *args)
        assert sum(b.bytes for b in memory.alive) == memory.peak_bytes


SAME_AS_XLA = {
    "chain": (chain, (X, X, X, X)),
    "adam": (adam, (X, X, X, X)),
    "adam donated": (jax.jit(adam, donate_argnums=(0, 1, 2)), (X, X, X, X)),
    # Over the queries: over the keys it would be attention, whose scores a kernel keeps inside.
    "scores": (lambda q, k, v: jax.nn.softmax(q @ k.T, axis=0) @ v, (S((2048, 64), F32),) * 3),
    "loop": (lambda x: lax.fori_loop(0, 10, lambda i, c: c @ c, x), (X,)),
    "residuals": (grad_of_layers(16), (X,)),
}


@pytest.mark.parametrize("name", SAME_AS_XLA)
def test_close_to_what_xla_plans(name: str) -> None:
    """XLA's own buffer assignment on this host, within a tenth."""
    fun, args = SAME_AS_XLA[name]
    plan = jax.jit(fun) if name != "adam donated" else fun
    xla = plan.lower(*args).compile().memory_analysis()
    total = xla.argument_size_in_bytes + xla.output_size_in_bytes + xla.temp_size_in_bytes
    total -= xla.alias_size_in_bytes
    assert used(fun, *args).peak_bytes == pytest.approx(total, rel=0.1)


# -- what does not fit

LARGE = S((300_000, 300_000), jnp.bfloat16)


def test_out_of_memory_in_the_words_of_jax() -> None:
    needs = 2 * 2 * 300_000**2
    words = f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {needs} bytes"
    with pytest.raises(jax.errors.JaxRuntimeError, match=words) as caught:
        em.estimate(lambda a: a @ a, LARGE, on=POD)
    assert isinstance(caught.value, em.OutOfMemoryError)
    text = str(caught.value)
    for said in ("128.00 GiB", "args[0]", "bfloat16[300000,300000]", "test_memory.py", "allow_oom"):
        assert said in text, said
    assert caught.value.memory.alive[0].bytes == 2 * 300_000**2


def test_out_of_memory_can_be_allowed() -> None:
    answer = em.estimate(lambda a: a @ a, LARGE, on=POD, allow_oom=True)
    assert not answer.memory.fits and "RESOURCE_EXHAUSTED" in str(answer)


def test_run_refuses_before_it_computes() -> None:
    """The values would need the memory that the machine has not: they must never be asked for."""
    small = dataclasses.replace(POD.chip, memory_bytes=2**21, l2_bytes=2**20)
    machine = dataclasses.replace(POD, chip=small)
    seen: list[int] = []

    def f(x: Any) -> Any:
        jax.debug.callback(lambda: seen.append(1))
        return x @ x

    x = jnp.ones((1024, 1024), F32)
    with pytest.raises(em.OutOfMemoryError):
        em.run(f, x, on=machine)
    assert seen == []
    assert em.run(lambda x: x + 1, x, on=machine, allow_oom=True).value[0, 0] == 2


def test_a_buffer_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Buffer(name="b", shape=(), dtype="int8", bytes=-1)
