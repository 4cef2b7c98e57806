"""Asking a callable that multiplies matrices."""

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.arithmetic import Arithmetic
from kernels.probe import inputs, shapes
from kernels.probe.answers import RESULTS, Answers, float_of, words_of
from kernels.probe.inputs import Tile
from kernels.probe.report import Report, UnknownArithmetic, judge

Matmul = Callable[..., Any]

_MULTIPLES = (1, 16, 32, 64, 128, 256)  # of which a unit may want every size to be one
_PATIENCE_S = 10.0  # for one product of another shape, but those that a record needs
_AGAIN_S = 2.5  # a long product that took no longer is asked twice


def identify(
    matmul: Matmul, *, dtype: str | None = None, takes_c: bool | None = None
) -> Arithmetic:
    """The `Arithmetic` as which `matmul` behaves; what stayed ambiguous stands in its `source`.

    Args:
        matmul: `f(a[m, k], b[k, n])`, or `f(a, b, c[m, n])` with an FP32 accumulator to start at,
            over NumPy arrays (BF16 from ml_dtypes, or FP16); returns an FP32 array. Narrower
            results are taken as FP32 sums rounded once to nearest even.
        dtype: of the operands, "bfloat16" or "float16"; None is BF16, or FP16 if `matmul` refuses
            that.
        takes_c: whether it takes a C; None asks its signature (a parameter called `c`, or a third
            one without a default).

    Raises:
        UnknownArithmetic: none of the known families; its `report` has the failing probes.
        TypeError, ValueError: results that are no float array of the right shape.
    """
    report = investigate(matmul, dtype=dtype, takes_c=takes_c)
    if report.arithmetic is None:
        raise UnknownArithmetic(report)
    return report.arithmetic


def investigate(matmul: Matmul, *, dtype: str | None = None, takes_c: bool | None = None) -> Report:
    """As `identify`, with the evidence for each parameter; says so if no known family fits."""
    if not callable(matmul):
        raise TypeError(f"identify: matmul must be callable, got {type(matmul).__name__}")
    if dtype is not None and dtype not in inputs.DTYPES:
        raise ValueError(f"identify: dtype must be bfloat16 or float16, got {dtype!r}")
    with_c = _takes_c(matmul) if takes_c is None else takes_c
    return judge(ask(matmul, dtype, with_c))


def ask(matmul: Matmul, dtype: str | None, with_c: bool) -> Answers:
    """The answers of `matmul` to all probes; operands of the first type that it takes."""
    dtype, multiple = _accepted(matmul, dtype, with_c)
    tiles = [_padded(tile, multiple) for tile in inputs.tiles(dtype, with_c)]
    asked, words, results, refused = [], [], set(), []
    timed: list[tuple[int, float]] = []
    for tile in tiles:
        start = time.perf_counter()
        try:
            result, found = _words(matmul, tile, multiple, with_c)
        except ValueError as error:
            if error.__cause__ is None or tile.group != "specials":
                raise  # only infinities and NaNs may be refused
            refused.append(f"{tile.name} ({error.__cause__})")
            continue
        timed.append((_size(tile, multiple), time.perf_counter() - start))
        results.add(result)
        asked.append(tile)
        words.append(found)
    if len(results) > 1:
        raise TypeError(f"identify: results of several types: {', '.join(sorted(results))}")
    answers = Answers(dtype, results.pop(), asked, words, not_asked=tuple(refused))
    for tile, found in zip(asked, words, strict=True):
        if tile.group == "dense" and (_words(matmul, tile, multiple, with_c)[1] != found).any():
            answers.unsteady = tile.name
            return answers
    _ask_other_shapes(matmul, answers, multiple, with_c, timed)
    return answers


def _ask_other_shapes(
    matmul: Matmul, answers: Answers, multiple: int, with_c: bool, timed: list[tuple[int, float]]
) -> None:
    """Adds products of other shapes, but those that are refused, or would take long by the sizes
    and seconds of other calls.
    """
    not_asked = list(answers.not_asked)
    if multiple > 1:
        not_asked.append(f"sizes that are no multiples of {multiple} (they are refused)")
    for tile in shapes.tiles(answers.dtype):
        if tile.group == "odd" and multiple > 1:
            continue
        needed = _seconds(timed, _size(tile, multiple))
        if needed > _PATIENCE_S and tile.a.shape[1] not in shapes.NEEDED:
            not_asked.append(f"{tile.name} (it would take some {needed:.0f} s)")
            continue
        tile = _padded(tile, multiple)
        start = time.perf_counter()
        try:
            result, found = _words(matmul, tile, multiple, with_c)
            if result != answers.result:
                raise ValueError(f"its results are {result}, others {answers.result}")
        except ValueError as error:
            not_asked.append(f"{tile.name} ({error.__cause__ or error})")
            continue
        answers.tiles = [*answers.tiles, tile]
        answers.words.append(found)
        if tile.group == "long" and time.perf_counter() - start < _AGAIN_S:
            if (_words(matmul, tile, multiple, with_c)[1] != found).any():
                answers.unsteady = tile.name
    answers.not_asked = tuple(not_asked)


def _seconds(timed: list[tuple[int, float]], size: int) -> float:
    """How long a product of this size takes: every call a part of it, the rest by its size."""
    call = min(seconds for _, seconds in timed)
    each = sum(seconds - call for _, seconds in timed) / sum(done for done, _ in timed)
    return call + each * size


def _words(matmul: Matmul, tile: Tile, multiple: int, with_c: bool) -> tuple[str, NDArray]:
    """The type and the words of one product."""
    m, n = tile.a.shape[0], tile.b.shape[1]
    where = f"identify: probe {tile.name!r}"
    a, b = (_filled(x, multiple) for x in (tile.a, tile.b))
    # A unit that can start at a C is given +0 where the probe has none.
    c = np.zeros((m, n), np.float32) if tile.c is None else tile.c
    start = (_filled(c, multiple),) if with_c else ()
    try:
        with np.errstate(all="ignore"):
            answer = _call(matmul, a, b, *start)
    except Exception as error:
        raise ValueError(
            f"{where}: the callable raised {type(error).__name__} for a{list(a.shape)} @ "
            f"b{list(b.shape)}: {error}"
        ) from error
    result, found = words_of(answer, (a.shape[0], b.shape[1]), where)
    return result, found[:m, :n]


def _padded(tile: Tile, multiple: int) -> Tile:
    """The tile with K filled up with +0, as the unit is asked. Rows and columns are filled up only
    for the call.
    """
    if multiple == 1:
        return tile
    k = _up(tile.a.shape[1], multiple) - tile.a.shape[1]
    return replace(tile, a=np.pad(tile.a, ((0, 0), (0, k))), b=np.pad(tile.b, ((0, k), (0, 0))))


def _filled(x: NDArray, multiple: int) -> NDArray:
    m, n = x.shape
    return np.pad(x, ((0, _up(m, multiple) - m), (0, _up(n, multiple) - n)))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _size(tile: Tile, multiple: int) -> int:
    m, k, n = (_up(x, multiple) for x in (*tile.a.shape, tile.b.shape[1]))
    return m * k * n


def _accepted(matmul: Matmul, dtype: str | None, with_c: bool) -> tuple[str, int]:
    """The first type of operands that is taken, and the number of which sizes must be multiples.

    Raises:
        ValueError: everything is refused, or small integers are not multiplied as A @ B.
    """
    refusal: Exception | None = None
    for kind in [dtype] if dtype else list(inputs.DTYPES):
        for multiple in _MULTIPLES:
            # Small integers: every arithmetic gives these sums exactly, even in BF16.
            rng = np.random.default_rng(1)
            sizes = [_up(size, multiple) for size in (inputs.M, inputs.K, 2 * inputs.N)]
            a, b = rng.integers(-1, 2, sizes[:2]), rng.integers(-1, 2, sizes[1:])
            c = rng.integers(-9, 9, sizes[::2]) * with_c
            tile = Tile(
                name="small integers",
                group="integers",
                a=a.astype(inputs.DTYPES[kind]),
                b=b.astype(inputs.DTYPES[kind]),
                c=c.astype(np.float32),
            )
            try:
                result, found = _words(matmul, tile, 1, with_c)
            except ValueError as error:
                if error.__cause__ is None:
                    raise
                refusal = refusal or error
                continue
            sums = words_of((a @ b + c).astype(RESULTS[result]), found.shape, "")[1]
            _check_integers(found, sums, result, "A @ B + C" if with_c else "A @ B")
            return kind, multiple
    assert refusal is not None
    raise ValueError(
        f"{refusal} (also refused: sizes that are multiples of "
        f"{', '.join(str(x) for x in _MULTIPLES[1:])})"
    ) from refusal.__cause__


def _check_integers(found: NDArray, expected: NDArray, result: str, what: str) -> None:
    # Zeros of either sign are fine.
    zero = 1 << (31 if result == "float32" else 15)
    wrong = np.argwhere((found != expected) & ~((expected == 0) & (found == zero)))
    if len(wrong):
        i, j = wrong[0].tolist()
        got, wanted = (_shown(int(words[i, j]), result) for words in (found, expected))
        raise ValueError(
            f"identify: the callable does not compute {what}: {len(wrong)} of {found.size} sums of "
            f"small integers are wrong, such as [{i}, {j}]: expected {wanted}, got {got}"
        )


def _shown(word: int, result: str) -> str:
    """A result's value with all its digits."""
    return f"{float_of(word, result):.9g}"


def _takes_c(matmul: Matmul) -> bool:
    try:
        parameters = inspect.signature(matmul).parameters
    except (TypeError, ValueError):  # built-in functions have none
        return False
    if "c" in parameters:
        return True
    plain = [
        p
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(plain) == 3


def _call(matmul: Matmul, a: Any, b: Any, *c: Any) -> Any:
    if not c:
        return matmul(a, b)
    try:
        parameter = inspect.signature(matmul).parameters.get("c")
    except (TypeError, ValueError):
        parameter = None
    by_name = parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY
    return matmul(a, b, c=c[0]) if by_name else matmul(a, b, *c)
