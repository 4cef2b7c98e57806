"""Asking a callable that multiplies matrices."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.arithmetic import Arithmetic
from kernels.probe import inputs
from kernels.probe.answers import Answers, words_of
from kernels.probe.report import Report, UnknownArithmetic, judge

Matmul = Callable[..., Any]


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
    return judge(ask(matmul, dtype or _accepted(matmul), with_c))


def ask(matmul: Matmul, dtype: str, with_c: bool) -> Answers:
    """The answers of `matmul` to all probes."""
    tiles = inputs.tiles(dtype, with_c)
    words, results = [], set()
    for tile in tiles:
        shape = tile.a.shape[0], tile.b.shape[1]
        # A unit that can start at a C is given +0 where the probe has none.
        c = () if not with_c else (np.zeros(shape, np.float32) if tile.c is None else tile.c,)
        with np.errstate(all="ignore"):
            answer = _call(matmul, tile.a, tile.b, *c)
        result, found = words_of(answer, shape, f"identify: probe {tile.name!r}")
        results.add(result)
        words.append(found)
    if len(results) > 1:
        raise TypeError(f"identify: results of several types: {', '.join(sorted(results))}")
    return Answers(dtype, results.pop(), tiles, words)


def _accepted(matmul: Matmul) -> str:
    """BF16, or FP16 if only that is taken."""
    error: Exception | None = None
    for dtype, kind in inputs.DTYPES.items():
        ones = np.ones((16, 16), kind)
        try:
            _call(matmul, ones, ones, *([np.zeros((16, 16), np.float32)] * _takes_c(matmul)))
        except (TypeError, ValueError, NotImplementedError) as refusal:
            error = error or refusal
        else:
            return dtype
    assert error is not None
    raise error


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
