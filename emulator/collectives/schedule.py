"""`Schedule`: one collective algorithm as steps of (source, destination, slot, reduce or copy).

Every rank has `slots` numbered places, each holding one equal piece of the payload. In a step all
transfers read the state from before the step. A copy overwrites its destination slot; a reduction
replaces it by `destination + incoming`, and several reductions into one slot are added in the order
in which they are listed.

What the slots mean, by operation (n ranks; a *block* is a rank's part of the whole):

| op | before | after |
|---|---|---|
| all_reduce | slot c of every rank: piece c of its buffer | slot c of every rank: the sum |
| reduce_scatter | slot d: the block for rank d | slot r of rank r: the sum |
| all_gather | slot r of rank r: its block | slot s of every rank: the block of s |
| all_to_all | slot d: the block for rank d | slot n + s: the block from rank s |
| broadcast | slot c of the root | slot c of every rank |
| reduce | slot c: piece c | slot c of the root: the sum |
| scatter | slot d of the root: the block for d | slot r of rank r |
| gather | slot r of rank r: its block | slot s of the root |
| permute | slot 0: the message | slot 1 of each destination |

An all_to_all with `counts` is ragged: rank r starts with counts[r][d] slots for each rank d, one
destination after the other, and ends with counts[s][r] slots of each source s, one after the other
from slot `ragged_start` on, which is the largest number of slots that any rank sends.

Slots beyond these are scratch. A reduce_scatter or all_gather may cut each block into `cuts` equal
pieces: block d then is slots d * cuts to d * cuts + cuts - 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from emulator.collectives.traffic import Sends, Traffic

OPS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
    "reduce",
    "scatter",
    "gather",
    "permute",
)
REDUCING_OPS = ("all_reduce", "reduce_scatter", "reduce")

IntArray = np.ndarray
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The ranks of a collective: the node of each, numbered in order of first appearance."""

    nodes: tuple[int, ...]

    def __post_init__(self) -> None:
        seen: dict[int, int] = {}
        renumbered = tuple(seen.setdefault(node, len(seen)) for node in self.nodes)
        if not renumbered:
            raise ValueError("Group.nodes is empty; a collective needs at least one rank")
        object.__setattr__(self, "nodes", renumbered)

    @property
    def n(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def members(self) -> list[IntArray]:
        """The ranks of each node, ascending."""
        nodes = np.asarray(self.nodes)
        return [np.flatnonzero(nodes == g) for g in range(nodes.max() + 1)]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One step, or `repeat` alike ones: at each repetition slot s becomes slot `turn[s]`.

    Arrays run over the transfers: `width` slots from `src_slot` of rank `src` on, `stride` apart,
    go to as many from `dst_slot` of rank `dst` on, as far apart; `reduce` says whether they are
    added there. A transfer to oneself is a local copy.
    """

    src: IntArray
    dst: IntArray
    src_slot: IntArray
    dst_slot: IntArray
    width: IntArray
    reduce: IntArray
    repeat: int = 1
    turn: IntArray | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("src", "dst", "src_slot", "dst_slot", "width", "reduce"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"Round.{name} must be a NumPy array (make_round makes it); got {array!r}"
                )
            array.flags.writeable = False

    def steps(self) -> Iterator[Round]:
        """The repetitions, each as a plain round."""
        src_slot, dst_slot = self.src_slot, self.dst_slot
        for _ in range(self.repeat):
            yield Round(
                self.src, self.dst, src_slot, dst_slot, self.width, self.reduce, stride=self.stride
            )
            if self.turn is not None:
                src_slot, dst_slot = self.turn[src_slot], self.turn[dst_slot]

    def single_slots(self) -> Round:
        """The same with a transfer for each slot."""
        if (self.width == 1).all():
            return self
        row, nth = unrolled(self.width)
        within = (nth * self.stride).astype(np.int32)
        return Round(
            self.src[row],
            self.dst[row],
            self.src_slot[row] + within,
            self.dst_slot[row] + within,
            np.ones(len(row), np.int32),
            self.reduce[row],
            self.repeat,
            self.turn,
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Wide:
    """A step of so many transfers that they are listed only to be executed: `listed` makes the
    round, its definition, and `traffic` says the same to the time reading.

    Local copies, which take no time, are left out of `traffic`.
    """

    traffic: tuple[Traffic, ...]
    listed: Callable[[], Round]

    @property
    def repeat(self) -> int:
        """Wide steps are made one by one."""
        return 1

    def steps(self) -> Iterator[Round]:
        """The step as a plain round."""
        yield from self.listed().steps()


Step = Round | Wide


def make_round(
    src: Sequence[int] | IntArray,
    dst: Sequence[int] | IntArray,
    src_slot: Sequence[int] | IntArray | int,
    dst_slot: Sequence[int] | IntArray | int,
    *,
    reduce: bool | Sequence[bool] | IntArray,
    width: int | Sequence[int] | IntArray = 1,
    repeat: int = 1,
    turn: IntArray | None = None,
    stride: int = 1,
) -> Round:
    """A Round from sequences or scalars that broadcast against `src`."""
    src_array = np.array(_whole("src", src), dtype=np.int32).reshape(-1)

    def like_src(name: str, values: IntArray, dtype: type) -> IntArray:
        try:
            return np.array(np.broadcast_to(values, src_array.shape), dtype=dtype)
        except ValueError as error:
            raise ValueError(
                f"make_round: {name} must be one number or as many as src; got {values.shape} "
                f"beside {src_array.shape}"
            ) from error

    return Round(
        src_array,
        like_src("dst", _whole("dst", dst), np.int32),
        like_src("src_slot", _whole("src_slot", src_slot), np.int32),
        like_src("dst_slot", _whole("dst_slot", dst_slot), np.int32),
        like_src("width", _whole("width", width), np.int32),
        like_src("reduce", np.asarray(reduce), np.bool_),
        repeat,
        turn,
        stride,
    )


def _whole(name: str, values: object) -> IntArray:
    """`values` as an array of whole numbers that fit into 32 bits."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"make_round: {name} must be whole numbers; got {values!r}")
    if array.size and array.dtype.itemsize > 4 and np.abs(array).max() > _LARGEST:
        raise ValueError(f"make_round: {name} must be below 2^31; got {values!r}")
    return array


def unrolled(count: IntArray) -> tuple[IntArray, IntArray]:
    """Rows repeated `count` times each: the row, and which time it is, from 0 on."""
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)


def join_steps(parts: Sequence[Step], repeat: int = 1, turn: IntArray | None = None) -> Step:
    """One step with the transfers of all `parts` in their order."""
    rounds = [part for part in parts if isinstance(part, Round)]
    if len(rounds) == len(parts):
        return join_rounds(rounds, repeat, turn)
    traffic: list[Traffic] = []
    for part in parts:
        if isinstance(part, Wide):
            traffic += part.traffic
        else:
            traffic.append(Sends(part.src, part.dst, part.width, part.reduce))
    return Wide(
        tuple(traffic),
        lambda: join_rounds([p.listed() if isinstance(p, Wide) else p for p in parts]),
    )


def join_rounds(parts: Sequence[Round], repeat: int = 1, turn: IntArray | None = None) -> Round:
    """One round with the transfers of all `parts` in their order."""
    strides = {part.stride for part in parts if (part.width > 1).any()} or {1}
    if len(strides) > 1:  # a round has one
        parts = [part.single_slots() for part in parts]
        strides = {1}

    def joined(name: str) -> IntArray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Round(
        joined("src"),
        joined("dst"),
        joined("src_slot"),
        joined("dst_slot"),
        joined("width"),
        joined("reduce"),
        repeat,
        turn,
        strides.pop(),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """One collective algorithm for `ranks` participants.

    `root` matters for broadcast, reduce, scatter and gather, `pairs` (source, destination) for
    permute, `counts` (slots [source][destination]) for a ragged all_to_all.
    """

    op: str
    algorithm: str
    ranks: int
    slots: int
    rounds: tuple[Step, ...]
    root: int = 0
    pairs: tuple[tuple[int, int], ...] = ()
    cuts: int = 1
    counts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("ranks", "slots", "root", "cuts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"Schedule.{name} must be a whole number; got {value!r}")
        if not isinstance(self.rounds, Sequence) or not all(
            isinstance(part, Round | Wide) for part in self.rounds
        ):
            raise TypeError(f"Schedule.rounds must be a sequence of Rounds; got {self.rounds!r}")
        if self.op not in OPS:
            raise ValueError(f"Schedule.op must be one of {', '.join(OPS)}; got {self.op!r}")
        if self.cuts < 1 or (self.cuts > 1 and self.op not in ("reduce_scatter", "all_gather")):
            raise ValueError(
                "Schedule.cuts must be at least 1, and is 1 but for reduce_scatter and all_gather; "
                f"got {self.cuts} for {self.op}"
            )
        if self.counts:
            self._check_counts()
            received = max(sum(column) for column in zip(*self.counts, strict=True))
            needed = self.ragged_start + received
        else:
            needed = min_slots(self.op, self.ranks) * self.cuts
        if self.ranks < 1 or self.slots < needed:
            raise ValueError(
                f"Schedule of {self.op} over {self.ranks} ranks needs at least 1 rank and "
                f"{needed} slots; got {self.slots} slots"
            )
        if not 0 <= self.root < self.ranks:
            raise ValueError(f"Schedule.root {self.root} is outside its {self.ranks} ranks")
        step = 0
        for part in self.rounds:
            if isinstance(part, Round):  # the others are our own, and tested when they are listed
                self._check_round(part, step)
            step += part.repeat

    @property
    def ragged_start(self) -> int:
        """The slot from which on a ragged all_to_all leaves what it delivers."""
        return max(sum(row) for row in self.counts)

    def _check_counts(self) -> None:
        sizes = {len(self.counts), *(len(row) for row in self.counts)}
        if self.op != "all_to_all" or sizes != {self.ranks}:
            raise ValueError(
                f"Schedule.counts must be {self.ranks} rows of {self.ranks}, for an all_to_all; "
                f"got sizes {sorted(sizes)} for {self.op}"
            )
        if min(min(row) for row in self.counts) < 0:
            raise ValueError("Schedule.counts must be at least 0")

    def _check_round(self, part: Round, step: int) -> None:
        arrays = (part.src, part.dst, part.src_slot, part.dst_slot, part.width, part.reduce)
        if len({a.shape for a in arrays}) != 1 or part.src.ndim != 1:
            raise ValueError(
                f"step {step} of {self.algorithm!r}: the arrays of a Round must have one length"
            )
        if isinstance(part.repeat, bool) or not isinstance(part.repeat, int) or part.repeat < 1:
            raise ValueError(
                f"step {step} of {self.algorithm!r}: repeat must be a whole number of at least 1; "
                f"got {part.repeat!r}"
            )
        if not part.src.size:
            return
        for name, array in (("src", part.src), ("dst", part.dst)):
            if array.min() < 0 or array.max() >= self.ranks:
                raise ValueError(
                    f"step {step} of {self.algorithm!r}: {name} must be a rank "
                    f"0..{self.ranks - 1}; "
                    f"got {array.min()}..{array.max()}"
                )
        if part.width.min() < 1 or part.stride < 1:
            raise ValueError(
                f"step {step} of {self.algorithm!r}: width and stride must be at least 1"
            )
        reach = (part.width - 1) * part.stride
        for name, array in (("src_slot", part.src_slot), ("dst_slot", part.dst_slot)):
            last = (array + reach).max()
            if array.min() < 0 or last >= self.slots:
                raise ValueError(
                    f"step {step} of {self.algorithm!r}: {name} must stay within "
                    f"0..{self.slots - 1}; "
                    f"got {array.min()}..{last}"
                )
        if part.turn is not None:
            if not np.array_equal(np.sort(part.turn), np.arange(self.slots)):
                raise ValueError(
                    f"step {step} of {self.algorithm!r}: turn must be a permutation of the slots"
                )

            if part.width.max() > 1 and not _turns_runs(part, part.turn):
                raise ValueError(
                    f"step {step} of {self.algorithm!r}: a turn must move each run of slots as "
                    "one, to where a run as wide begins; or use width 1"
                )

    @property
    def num_steps(self) -> int:
        """Steps, repetitions counted."""
        return sum(part.repeat for part in self.rounds)

    def steps(self) -> Iterator[Round]:
        """All steps in order, each as a plain round."""
        for part in self.rounds:
            yield from part.steps()

    @property
    def pieces(self) -> int:
        """Into how many slots the payload of one rank (in the sense of nccl-tests' size) is cut."""
        if self.op in ("all_reduce", "broadcast", "reduce"):
            return self.slots
        return 1 if self.op == "permute" else self.ranks * self.cuts


def _turns_runs(part: Round, turn: IntArray) -> bool:
    """Whether `turn` moves the runs of a round to one another."""
    for slots in (part.src_slot, part.dst_slot):
        run = np.unique(slots.astype(np.int64) << 32 | part.width)
        first, width = run >> 32, run & _LARGEST
        row, nth = unrolled(width)
        within = nth * part.stride
        if not np.array_equal(turn[first[row] + within], turn[first][row] + within):
            return False
        if not np.array_equal(np.unique(turn[first].astype(np.int64) << 32 | width), run):
            return False
    return True


def min_slots(op: str, ranks: int) -> int:
    """The fewest slots that an operation's meaning needs."""
    if op in ("all_reduce", "broadcast", "reduce"):
        return 1
    if op == "permute":
        return 2
    return 2 * ranks if op == "all_to_all" else ranks
