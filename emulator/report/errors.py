"""How far computed values are from the same program's values in FP64."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

QUANTILES = (0.5, 0.9, 0.99, 1.0)

#: Upper ends of the classes of `ulp_histogram`; beyond the last there is one more.
ULP_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """One output against FP64: |got - exact| over the `count` elements where both are finite.

    `max_rel` is the largest error over |exact| where exact is not 0, `rel_rms` the root mean square
    error over exact's root mean square. A ULP is the spacing of the output's own type at the exact
    value: 0.5 is what rounding the exact value may cost. `ulp_quantiles` are those of `QUANTILES`,
    `ulp_histogram` counts elements up to each of `ULP_EDGES` and beyond. `nonfinite` elements are
    infinite or NaN on one side alone, or differently.

    Outputs that are no floats count an element that differs as an error of the difference.
    """

    leaf: str
    dtype: str
    floating: bool
    shape: tuple[int, ...]
    count: int
    nonfinite: int
    max_abs: float
    max_rel: float
    rms: float
    rel_rms: float
    ulp_quantiles: tuple[float, ...]
    ulp_histogram: tuple[int, ...]


def errors(leaf: str, got: np.ndarray, exact: np.ndarray) -> Errors:
    """Statistics of `got` against `exact`, its values in FP64 (or of the same integers)."""
    if got.shape != exact.shape:
        raise ValueError(f"output {leaf}: shapes {got.shape} and {exact.shape} differ")
    value, reference = _numbers(got), _numbers(exact)
    both = np.isfinite(value) & np.isfinite(reference)
    same = (value == reference) | (np.isnan(value) & np.isnan(reference))
    v, r = value[both], reference[both]
    error, size = np.abs(v - r), np.abs(r)
    ulps = error / _spacing(size, got.dtype)
    nonzero = size > 0
    rms, exact_rms = _rms(error), _rms(size)
    edges = [-np.inf, *ULP_EDGES, np.inf]
    histogram = np.diff([np.count_nonzero(ulps <= edge) for edge in edges])
    return Errors(
        leaf=leaf,
        dtype=got.dtype.name,
        floating=_is_floating(got.dtype),
        shape=got.shape,
        count=int(both.sum()),
        nonfinite=int((~both & ~same).sum()),
        max_abs=float(error.max(initial=0.0)),
        max_rel=float((error[nonzero] / size[nonzero]).max(initial=0.0)),
        rms=rms,
        rel_rms=rms / exact_rms if exact_rms else (np.inf if rms else 0.0),
        ulp_quantiles=tuple(float(q) for q in np.quantile(ulps, QUANTILES, method="higher"))
        if ulps.size
        else (0.0,) * len(QUANTILES),
        ulp_histogram=tuple(int(n) for n in histogram),
    )


def differing(a: np.ndarray, b: np.ndarray) -> int | None:
    """How many elements have different bits; None if the arrays are of different shape or type."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return None
    if not a.size:
        return 0
    width = a.dtype.itemsize
    words = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(-1, width) for x in (a, b)]
    return int((words[0] != words[1]).any(axis=1).sum())


def _numbers(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _rms(x: np.ndarray) -> float:
    if not x.size or not (top := float(x.max())):
        return 0.0
    return top * float(np.sqrt(np.mean((x / top) ** 2)))  # squares of FP64 may overflow


def _is_floating(dtype: np.dtype) -> bool:
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


def _spacing(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance of neighbours of `dtype` at each magnitude; 1 for integers."""
    if not _is_floating(dtype):
        return np.ones_like(size)
    info = ml_dtypes.finfo(dtype)
    exponent = np.maximum(np.frexp(size)[1] - 1, int(info.minexp))
    return np.ldexp(1.0, exponent - int(info.nmant))
