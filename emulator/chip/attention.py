"""Seconds of attention as one fused kernel on one device: scores, softmax and the product with the
values, tile by tile, the scores never in memory.

Rows of queries are cut in tiles, of the base tile's rows or half as many, that cores take one after
the other, each over all its keys. Where there are fewer tiles than cores, keys may be divided too
and the parts combined. In a core (on
Ascend a matrix core and its vector cores, which meet in the L2 cache) these work at the same time:

- cube: the products of a tile, each instruction with its head; L1 to L0 beside it;
- load: queries once, keys and values, and the weights that the vector cores made;
- store: raw scores and parts of the result, to the L2 cache;
- vector: the softmax of a tile, and for each part of the keys the rescaling of what is summed up.

The first block of scores and its softmax overlap with nothing. All cores are held to the rates of
the L2 cache and, for what must come from memory at least once, of memory. Backward, scores are
computed again and five products take the place of two.

Source: the structure is that of FlashAttention and of cann-ops' FlashAttentionScore. No
measurement is fitted.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from emulator.machines import Machine


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """What one device computes: `batch` times `rows` queries against `keys` keys.

    Attributes:
        depth: what a score sums over; width: columns of the values.
        item: bytes of an element of queries, keys and values, and `dtype` the matrix unit's mode.
        products: of one batch, (m, k, n) each, "r", "k", "d", "w" naming the four sizes.
        share: of the scores, those in tiles that are not wholly masked.
        lane_ops: vector lane operations in all, masked tiles left out.
        nbytes: least bytes from and to memory.
        backward: whether scores are only computed again, and gradients are the result.
    """

    batch: int
    rows: int
    keys: int
    depth: int
    width: int
    item: int
    dtype: str
    products: tuple[str, ...] = ("rdk", "rkw")
    share: float = 1.0
    lane_ops: int = 0
    nbytes: int = 0
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "rows", "keys", "depth", "width", "item"):
            if getattr(self, name) < 1:
                raise ValueError(f"Attention({name}={getattr(self, name)}): expected at least 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"Attention(share={self.share}): expected more than 0, at most 1")
        if min(self.lane_ops, self.nbytes) < 0:
            raise ValueError(
                f"Attention(lane_ops={self.lane_ops}, nbytes={self.nbytes}): expected counts of at "
                "least 0"
            )

    @property
    def flops(self) -> int:
        """Two per multiply-add of the products, in tiles that are not wholly masked."""
        size = {"r": self.rows, "k": self.keys, "d": self.depth, "w": self.width}
        macs = sum(math.prod(size[axis] for axis in product) for product in self.products)
        return int(2 * self.batch * macs * self.share)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTime:
    """One kernel's duration and where it goes: the engines of the busiest core, `l2_s` and
    `memory_s` of all cores. They overlap; `fixed_s` does not.
    """

    time_s: float
    bound_s: float
    limited_by: str
    l2_bytes: int
    utilization: float
    cube_s: float
    load_s: float
    store_s: float
    vector_s: float
    l2_s: float
    memory_s: float
    fixed_s: float


@functools.lru_cache(maxsize=65536)
def attention_time(work: Attention, on: Machine) -> AttentionTime:
    """Time in seconds of one fused attention kernel on one device of `on`.

    Raises:
        NotImplementedError: a dtype that the matrix unit does not have.
    """
    cores = on.dies_per_device * on.chip.cube_cores
    ways = []
    for tile in (on.chip.base_m, on.chip.base_m // 2):
        units = work.batch * -(-work.rows // tile)
        ways += [_time(work, on, tile, units, parts) for parts in {1, max(1, cores // units)}]
    return min(ways, key=lambda time: time.time_s)


def _time(work: Attention, on: Machine, most: int, units: int, parts: int) -> AttentionTime:
    """With `units` tiles of `most` rows, and the keys of each divided among `parts` cores."""
    chip, e, v, dies = on.chip, on.chip.engines, on.chip.vector, on.dies_per_device
    clock = chip.clock_hz * e.sustained_clock
    cores = dies * chip.cube_cores
    rounds = -(-units // cores)
    keys = -(-work.keys // parts)
    done = rounds * keys * work.share  # keys that the busiest core works through
    first = min(done, chip.base_n)  # of them, those that nothing overlaps with
    tile = min(most, work.rows)

    per_key = _per_key(work, on, tile)
    scores = work.batch * work.rows * work.keys * work.share
    lanes_per_s = min(
        clock * v.lane_bytes / 4,
        chip.vector_flops_per_s("float32") / 2 / chip.vector_cores,
    )
    helpers = chip.vector_cores / chip.cube_cores
    score_ops = work.lane_ops / scores
    rescale_ops = 2 * tile * work.width / v.score_keys
    vector_s = (tile * score_ops + rescale_ops) / (helpers * lanes_per_s)
    vector_s += per_key["moved_cycles"] / (helpers * clock)

    engines = {
        "cube": done * per_key["cube_cycles"] / clock,
        "load": (done * per_key["load_bytes"] + rounds * tile * work.depth * work.item)
        / (e.load_bytes_per_cycle * clock),
        "store": done * per_key["store_bytes"] / (e.store_bytes_per_cycle * clock),
        "vector": done * vector_s,
        "l2": max(per_key["l2_read_bytes"], per_key["l2_written_bytes"] / e.store_share)
        * (scores / tile)
        / (dies * chip.l2_bytes_per_s),
        "memory": work.nbytes / (dies * chip.usable_memory_bytes_per_s),
    }
    limit = max(engines, key=lambda name: engines[name])
    longest = engines[limit]
    busy_s = longest
    if longest:
        busy_s *= sum((t / longest) ** e.overlap for t in engines.values()) ** (1 / e.overlap)
    fixed_s = chip.launch_s + v.mixed_s + (e.tiling_s if rounds > 1 else 0.0)
    fixed_s += first * (per_key["cube_cycles"] / clock + vector_s)
    fixed_s += v.sync_s if parts > 1 else 0.0

    flops, peak = work.flops, dies * chip.matmul_flops_per_s(work.dtype)
    bound_s = max(
        flops / peak,
        work.lane_ops / (dies * chip.vector_flops_per_s("float32")),
        work.nbytes / (dies * chip.memory_bytes_per_s),
    )
    time_s = max(busy_s + fixed_s, bound_s)
    return AttentionTime(
        time_s=time_s,
        bound_s=bound_s,
        limited_by=limit if longest > fixed_s else "launch",
        l2_bytes=int((per_key["l2_read_bytes"] + per_key["l2_written_bytes"]) * scores / tile),
        utilization=flops / (peak * time_s),
        **{f"{name}_s": seconds for name, seconds in engines.items()},
        fixed_s=fixed_s,
    )


def _per_key(work: Attention, on: Machine, tile: int) -> dict[str, float]:
    """What a core does for each key and `tile` queries, in cycles and bytes."""
    chip, e, v, item = on.chip, on.chip.engines, on.chip.vector, work.item
    rows = -(-tile // chip.cube_m) * chip.cube_m
    size = {
        "d": float(-(-work.depth // chip.cube_n) * chip.cube_n),
        "w": float(-(-work.width // chip.cube_n) * chip.cube_n),
    }
    macs_per_cycle = chip.cube_macs_per_cycle(work.dtype)
    mac = l0 = 0.0
    chunk = e.chunk_bytes(chip.base_m, chip.base_n)
    for product in work.products:
        other = size["d" if "d" in product else "w"]
        mac += rows * other / macs_per_cycle
        # A matrix instruction takes rows of A, 256 columns of B, and 128 bytes of what is summed.
        m, k, n = (rows if axis == "r" else 1.0 if axis == "k" else other for axis in product)
        instructions = max(m / chip.base_m, 1 / chip.base_m) * (k * item / chunk)
        instructions *= n / chip.base_n
        mac += instructions * e.head_cycles
        l0 += m * k * item * (n / chip.base_n) / e.l0a_bytes_per_cycle
        l0 += k * n * item * (m / chip.base_m) / e.l0b_bytes_per_cycle
        l0 += instructions * e.l0_head_cycles
    # Raw scores go out and weights come back, once forward and twice backward, and with them parts
    # of the result in FP32, once for each tile of keys.
    crossings = (2 if work.backward else 1) if v.scores_in_l2 else 0
    sums = 4 * tile * (work.depth if work.backward else work.width) / v.score_keys
    store = crossings * 4 * tile + (sums if crossings else 0)
    weights = crossings * tile * item
    load = (work.depth + work.width) * item + weights
    return {
        "cube_cycles": max(mac, l0),
        "load_bytes": load,
        "store_bytes": store,
        "l2_read_bytes": load + store,
        "l2_written_bytes": store + weights,
        "moved_cycles": max(store / v.load_warm_bytes_per_cycle, weights / v.store_bytes_per_cycle),
    }
