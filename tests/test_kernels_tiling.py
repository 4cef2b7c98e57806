"""K in the order of a tiling: the order itself, the twin beside the definition, and the machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import emulator as em
import kernels
from emulator import chip
from kernels import Tiling, tiling
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw_matrices, words

SMALL = Tiling(base_m=4, base_n=3, base_k=16, cores=5)
SHIFTED = dataclasses.replace(SMALL, k_shift=True)
SPLIT = dataclasses.replace(SMALL, split_k=3, accumulate_in="gm")

# Units with exact sums, chains (where a zero's sign shows filled steps) and cut sums.
UNITS = [
    kernels.ASCEND_910C,
    kernels.FP32_FMA_CHAIN,
    kernels.NVIDIA_HOPPER,
    kernels.ASCEND_910C_CANDIDATES["flush_inputs"],
]

TILINGS = st.builds(
    lambda split, shift, **rest: (
        Tiling(k_shift=shift and split == (1, "l0c"), **rest)
        if shift
        else Tiling(split_k=split[0], accumulate_in=split[1], **rest)
    ),
    split=st.tuples(st.integers(1, 5), st.sampled_from(["l0c", "gm"])),
    shift=st.booleans(),
    base_m=st.integers(1, 8),
    base_n=st.integers(1, 8),
    base_k=st.sampled_from([3, 8, 16, 20, 32]),
    step_k=st.integers(1, 3),
    cores=st.integers(1, 9),
    tile_order=st.sampled_from(["diagonal", "row"]),
)
SIZES = st.integers(1, 12), st.integers(1, 90), st.integers(1, 12)


# The order.


@settings(max_examples=200)
@given(TILINGS, *SIZES, st.data())
def test_every_order_covers_k_once_in_pieces_of_the_base_tile(plan, m, k, n, data):
    m_tiles, n_tiles, k_tiles = plan.grid(m, k, n)
    tile = data.draw(st.integers(0, m_tiles - 1)), data.draw(st.integers(0, n_tiles - 1))
    order = tiling.k_order(plan, m, k, n, *tile)
    found = [piece for part in order for chain in part for piece in chain]
    assert sorted(i for start, stop in found for i in range(start, stop)) == list(range(k))
    assert all(
        stop - start == plan.base_k or stop % plan.outer_k == 0 or stop == k
        for start, stop in found
    )
    assert all(start % plan.base_k == 0 for start, _ in found[:1])
    assert len(order) == min(plan.split_k, k_tiles)
    chains = sum(len(part) for part in order)
    assert chains == (k_tiles if plan.accumulate_in == "gm" else len(order))


@settings(max_examples=100)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["diagonal", "row"]))
def test_every_core_gets_its_share_of_tiles(m_tiles, n_tiles, order):
    plan = dataclasses.replace(SMALL, cores=7, tile_order=order)
    cores = np.array(tiling.blocks(plan, m_tiles, n_tiles)).ravel()
    counts = np.bincount(cores, minlength=7)
    assert counts.sum() == m_tiles * n_tiles and counts.max() - counts.min() <= 1


def test_an_order_spelled_out():
    # 3 x 2 tiles along diagonals: tile t lies in row t mod 3, column t mod 2.
    assert tiling.blocks(SMALL, 3, 2) == [[0, 3], [4, 1], [2, 0]]
    # 2 x 2 tiles: after 2 tiles the diagonal would repeat, so the next one is shifted.
    assert tiling.blocks(SMALL, 2, 2) == [[0, 2], [3, 1]]
    assert tiling.blocks(dataclasses.replace(SMALL, tile_order="row"), 3, 2) == [
        [0, 1],
        [2, 3],
        [4, 0],
    ]
    plan = dataclasses.replace(SHIFTED, step_k=2)
    # 70 = outer tiles 0-32, 32-64, 64-70; core 4 starts at tile 4 mod 3 = 1.
    pieces = ((32, 48), (48, 64), (64, 70), (0, 16), (16, 32))
    assert tiling.k_order(plan, 12, 70, 6, 1, 0) == ((pieces,),)
    first, second, third = tiling.k_order(SPLIT, 12, 70, 6, 1, 0)
    assert first == (((0, 16),), ((16, 32),))
    assert second == (((32, 48),), ((48, 64),)) and third == (((64, 70),),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_k": 0}, "base_k must be an integer of at least 1, got 0"),
        ({"cores": True}, "cores must be an integer"),
        ({"tile_order": "z"}, "tile_order must be one of"),
        ({"accumulate_in": "ub"}, "accumulate_in must be one of"),
        ({"k_shift": True, "split_k": 2}, "no kernel of the library does both"),
        ({"k_shift": True, "accumulate_in": "gm"}, "no kernel of the library does both"),
    ],
)
def test_impossible_tilings(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)


def test_the_library():
    default = Tiling(base_m=128, base_n=256, base_k=64, step_k=8, k_shift=True)
    assert tiling.library(8192, 8192, 8192) == default
    fp32 = dataclasses.replace(default, base_k=32)
    assert tiling.library(8192, 8192, 8192, "float32") == fp32
    assert tiling.library(8192, 8192, 8192, k_shift=False) == dataclasses.replace(
        default, k_shift=False
    )
    # Half the load for sizes that are multiples of 256 and no power of 2.
    assert tiling.library(7168, 7168, 7168) == dataclasses.replace(default, step_k=4)
    # 8 x 4 tiles on 24 cores take two rounds; 11 x 4 do as well, with 96 rows each.
    assert tiling.library(1024, 1024, 1024) == dataclasses.replace(default, base_m=96)
    # Few tiles and K of 384 for each core; a small FP32 output; a very long K.
    split = Tiling(base_m=128, base_n=128, base_k=128, step_k=3, split_k=24, accumulate_in="gm")
    assert tiling.library(128, 9216, 256) == split
    assert tiling.library(128, 9215, 256).split_k == 1
    assert tiling.library(64, 6144, 64, "float32") == dataclasses.replace(
        split, base_k=64, split_k=16
    )
    assert tiling.library(4096, 32768, 4096) == dataclasses.replace(split, split_k=1)
    for field in ("m", "k", "n", "cores"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
            tiling.library(**{"m": 1, "k": 1, "n": 1, field: 0})
    with pytest.raises(TypeError, match="float64"):
        tiling.library(1, 1, 1, "float64")


def test_where_the_library_starts_to_divide_k():
    """From 384 of it for each of 24 cores with at most 11 tiles of 128 x 128; from 27,392 always,
    but for outputs of 384 x 1,024 for each core, of which one core walks all of K.
    """

    def way(m, k, n):
        plan = tiling.library(m, k, n)
        return plan.split_k, plan.accumulate_in

    assert way(11 * 128, 384 * 24, 128) == way(128, 384 * 24, 11 * 128) == (24, "gm")
    assert way(11 * 128 + 1, 384 * 24, 128) == way(128, 384 * 24, 11 * 128 + 1) == (1, "l0c")
    assert 3072**2 == 384 * 1024 * 24
    assert way(3072, 27392, 3072) == (1, "gm")
    assert way(3072, 27392, 3071) == (24, "gm")
    assert way(3072, 27391, 3072) == (1, "l0c")


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ((5120, 13788, 5000), (5120, 13787, 5000)),
        ((5120, 19304, 5000), (5120, 19305, 5000)),
        ((5120, 14000, 5000), (5121, 14000, 5000)),
        ((5000, 14000, 5120), (5000, 14000, 5121)),
        ((1280, 14000, 5120), (1279, 14000, 5120)),
        ((5120, 14000, 1280), (5120, 14000, 1279)),
    ],
)
def test_middling_outputs_of_a_long_k_load_half_as_much_at_a_time(inside, outside):
    """13,788 to 19,304 of K and 1,280 to 5,120 rows and columns."""
    assert tiling.library(*inside).step_k == 4
    assert tiling.library(*outside).step_k == 8


@pytest.mark.parametrize(
    ("sizes", "base", "step_k"),
    [
        ((8192, 8192, 8192), (128, 256, 64), 8),
        ((16384, 5121, 1709), (128, 256, 64), 8),
        ((150, 1024, 131328), (128, 128, 64), 8),
        ((32, 1280, 10240), (32, 512, 32), 64),
        ((1024, 30720, 1024), (128, 128, 128), 3),
        ((30720, 101376, 122880), (128, 128, 128), 3),
    ],
)
def test_tiles_that_the_library_expects_of_itself(sizes, base, step_k):
    """Row-major FP16 cases of the tests of ops-nn (mat_mul_v3, 24 cores)."""
    plan = tiling.library(*sizes)
    assert (plan.base_m, plan.base_n, plan.base_k, plan.step_k) == (*base, step_k)


@settings(max_examples=300)
@given(*[st.integers(1, 40000)] * 3, st.sampled_from([20, 24]))
def test_the_library_fills_no_buffer_twice(m, k, n, cores):
    for dtype, item in tiling.ITEM_BYTES.items():
        plan = tiling.library(m, k, n, dtype, cores=cores)
        assert max(plan.base_m, plan.base_n) * plan.base_k * item * 2 <= 64 * 1024
        assert plan.base_m * plan.base_n * 4 <= 128 * 1024
        assert plan.base_m % 16 == plan.base_n % 16 == 0


# The bits.


def check(a, b, c, arithmetic, plan):
    expected = words(kernels.reference.matmul(a, b, c, arithmetic=arithmetic, tiling=plan))
    got = words(kernels.matmul(a, b, c, arithmetic=arithmetic, tiling=plan))
    wrong = np.argwhere(expected != got)
    assert not len(wrong), f"{len(wrong)} of {got.size} differ, first at {wrong[0]}"


DRAWN = (
    TILINGS,
    st.tuples(*SIZES),
    st.sampled_from(UNITS),
    st.sampled_from(sorted(GENERATORS)),
    st.sampled_from([BF16, FP16, FP32]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=2)
@given(*DRAWN)
def test_any_tiling(plan, shape, arithmetic, name, dtype, seed):
    check(*draw_matrices(name, seed, *shape, dtype), arithmetic, plan)


@pytest.mark.slow
@settings(max_examples=100)
@given(*DRAWN)
def test_many_tilings(plan, shape, arithmetic, name, dtype, seed):
    check(*draw_matrices(name, seed, *shape, dtype), arithmetic, plan)


@pytest.mark.parametrize(
    ("plan", "arithmetic"),
    [
        (dataclasses.replace(SHIFTED, step_k=2), UNITS[0]),  # a short outer tile amid the others
        (dataclasses.replace(SHIFTED, step_k=2), UNITS[2]),
        (dataclasses.replace(SHIFTED, base_k=10), UNITS[3]),  # every piece is filled up
        (dataclasses.replace(SPLIT, base_k=20), UNITS[2]),
        (SPLIT, UNITS[1]),
    ],
    ids=["shift", "shift, cut sums", "filled up", "filled up in parts", "parts"],
)
def test_tilings_on_every_kind_of_input(plan, arithmetic):
    kinds = ("wide", "cancelling", "tiny_with_zeros", "specials", "zeros", "raw")
    drawn = [draw_matrices(kind, 1, 11, 70, 7, BF16) for kind in kinds]
    check(*(np.stack(operand) for operand in zip(*drawn, strict=True)), arithmetic, plan)


HOPPER = kernels.NVIDIA_HOPPER  # its twin compiles fastest


def test_a_row_depends_on_its_place_only_if_k_is_shifted():
    a, b, _ = draw_matrices("normal", 2, 1, 96, 30, BF16)
    rows = np.repeat(a, 12, axis=0)

    def matmul(plan):
        return words(kernels.matmul(rows, b, arithmetic=HOPPER, tiling=plan))

    plain = matmul(SMALL)
    assert (plain == plain[0]).all()
    assert (plain == matmul(None)).all()  # pieces and outer tiles alone change nothing
    shifted = matmul(dataclasses.replace(SHIFTED, base_n=30))
    assert (shifted[:4] == plain[:4]).all()  # core 0 starts at 0
    for tile in (1, 2):
        assert (shifted[4 * tile : 4 * tile + 4] == shifted[4 * tile]).all()
        assert (shifted[4 * tile] != plain[0]).any()


def test_split_k_is_another_sum():
    a, b, c = draw_matrices("normal", 3, 6, 96, 20, BF16)

    def matmul(plan):
        return words(kernels.matmul(a, b, c, arithmetic=HOPPER, tiling=plan))

    in_l0c, in_memory = matmul(dataclasses.replace(SMALL, split_k=3)), matmul(SPLIT)
    assert (in_l0c != matmul(None)).any()
    assert (in_l0c != in_memory).any()
    parts = [
        kernels.reference.matmul(a[:, i : i + 32], b[i : i + 32], start, arithmetic=HOPPER)
        for i, start in ((0, c), (32, None), (64, None))
    ]
    assert (in_l0c == words(parts[0] + parts[1] + parts[2])).all()


@pytest.mark.parametrize("plan", [SHIFTED, SPLIT], ids=["shift", "split"])
def test_jit_vmap_and_batches_keep_bits(plan):
    a, b, c = draw_matrices("wide", 4, 3 * 9, 50, 7, BF16)
    a, c = a.reshape(3, 9, 50), c.reshape(3, 9, 7)

    def product(x, z):
        return kernels.matmul(x, b, z, arithmetic=HOPPER, tiling=plan)

    single = [
        words(kernels.reference.matmul(x, b, z, arithmetic=HOPPER, tiling=plan))
        for x, z in zip(a, c, strict=True)
    ]
    assert (words(product(a, c)) == np.stack(single)).all()
    assert (words(jax.jit(jax.vmap(product))(a, c)) == np.stack(single)).all()


def test_derivatives_are_products_with_the_same_tiling():
    unit = kernels.FP32_FMA_CHAIN
    a, b, _ = draw_matrices("normal", 5, 40, 40, 5, FP32)
    weight = draw_matrices("normal", 6, 40, 2, 5, FP32)[2]

    def loss(a, b):
        return jnp.sum(kernels.matmul(a, b, arithmetic=unit, tiling=SHIFTED) * weight)

    def expected(x, y, plan=SHIFTED):
        return words(kernels.reference.matmul(x, y, arithmetic=unit, tiling=plan))

    to_a, to_b = jax.jit(jax.grad(loss, (0, 1)))(a, b)
    assert (words(to_a) == expected(weight, b.T)).all()
    assert (words(to_b) == expected(a.T, weight)).all()
    assert (words(to_b) != expected(a.T, weight, None)).any()


def test_empty_products_and_integers():
    for m, k, n in ((0, 3, 2), (2, 0, 3), (2, 3, 0)):
        a, b = np.ones((m, k), BF16), np.ones((k, n), BF16)
        for plan in ("library", SPLIT, SHIFTED):
            assert not np.asarray(kernels.matmul(a, b, tiling=plan)).any()
            assert not kernels.reference.matmul(
                a, b, arithmetic=kernels.ASCEND_910C, tiling=plan
            ).any()
    x = np.arange(-60, 60, dtype=np.int8).reshape(4, 30)
    assert (np.asarray(kernels.matmul(x, x.T, tiling=SPLIT)) == x.astype(int) @ x.T).all()


def test_what_is_no_tiling():
    x = np.ones((4, 4), BF16)
    for function in (kernels.matmul, kernels.reference.matmul):
        with pytest.raises(TypeError, match="must be None .* got 'lib'"):
            function(x, x, arithmetic=kernels.ASCEND_910C, tiling="lib")


# The machine.

MESH = {"x": 2, "y": 2}


def product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def on_mesh(machine):
    """Rows over x, columns over y: without a tiling one matmul serves all devices."""
    specs = {"in_specs": (P("x", None), P(None, "y")), "out_specs": P("x", "y")}
    return jax.shard_map(product, mesh=machine.mesh(**MESH), **specs)


def of_devices(a, b, function):
    """`function` of every device's own rows and columns."""
    rows, columns = np.split(a, 2), np.split(b, 2, axis=1)
    return words(np.block([[np.asarray(function(x, y)) for y in columns] for x in rows]))


def test_each_device_has_the_library_tile_its_own_product():
    # 64 x 6144 x 64 is split over 16 cores; the product of all devices, 128 rows high, is not.
    machine = em.cloudmatrix384(device="die")
    a, b, _ = draw_matrices("normal", 7, 2 * 64, 6144, 2 * 64, FP32)
    fun = on_mesh(machine)
    expected = of_devices(a, b, lambda x, y: kernels.matmul(x, y, tiling="library"))
    got = words(em.run(fun, a, b, on=machine, tiling="library").value)
    assert (got == expected).all()
    whole = tiling.library(128, 6144, 128, "float32")
    assert (whole.split_k, tiling.library(64, 6144, 64, "float32").split_k) == (1, 16)


def test_each_die_of_a_package_has_its_own_tiles(cloud):
    a, b, _ = draw_matrices("normal", 8, 2 * 10, 96, 2 * 22, BF16)
    share = chip.die_share(10, 96, 22, cloud, out_dtype="float32")
    assert share in ((5, 22, 1), (10, 11, 1))

    def divided(x, y):
        parts = [(x[:5], y), (x[5:], y)] if share[0] == 5 else [(x, y[:, :11]), (x, y[:, 11:])]
        found = [
            kernels.reference.matmul(*part, arithmetic=HOPPER, tiling=SHIFTED) for part in parts
        ]
        return np.concatenate(found, axis=0 if share[0] == 5 else 1)

    emulated = em.emulate(on_mesh(cloud), on=cloud, arithmetic=HOPPER, tiling=SHIFTED)
    got = words(emulated(a, b))
    assert (got == of_devices(a, b, divided)).all()
    whole = kernels.reference.matmul(a, b, arithmetic=HOPPER, tiling=SHIFTED)
    assert (got != words(whole)).any()
    mapped = em.pmap(product, on=cloud, in_axes=(0, None), arithmetic=HOPPER, tiling=SHIFTED)
    rows = a.reshape(2, 10, 96)
    assert (words(mapped(rows, b[:, :22])).reshape(20, 22) == got[:, :22]).all()


def test_any_dot_general_keeps_its_shape_under_a_tiling(cloud):
    """Batch dimensions, several free and contracted ones, and an operand that does not vary."""
    mesh = cloud.mesh(x=2)
    numbers = (((3, 1), (0, 3)), ((0,), (2,)))
    x = np.random.default_rng(9).normal(size=(2, 6, 3, 10)).astype(BF16)
    y = np.random.default_rng(10).normal(size=(10, 4, 2, 6)).astype(BF16)

    def dot(x, y):
        return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)

    specs = {"in_specs": (P(None, None, None, None), P(None, "x", None, None))}
    fun = jax.shard_map(dot, mesh=mesh, out_specs=P(None, None, "x"), **specs)
    alone = Tiling(base_m=8, base_n=8, base_k=64)  # ascending K
    got = words(em.emulate(fun, on=cloud, arithmetic=HOPPER, tiling=alone)(x, y))
    assert (got == words(em.emulate(fun, on=cloud, arithmetic=HOPPER)(x, y))).all()


def test_tilings_that_a_machine_refuses(cloud, rack):
    with pytest.raises(ValueError, match='tiling=.*arithmetic="native"'):
        em.emulate(product, on=cloud, arithmetic="native", tiling="library")
    with pytest.raises(NotImplementedError, match="is not modelled; pass a kernels.Tiling"):
        em.emulate(product, on=rack, tiling="library")
    with pytest.raises(TypeError, match="got 3"):
        em.emulate(product, on=cloud, tiling=3)
