"""Published probes of matrix units: what to multiply, and the FP32 words that come back."""

import numpy as np
from numpy.typing import NDArray

from tests.kernel_inputs import BF16

COLUMNS = ("V100", "A100", "H100", "CDNA1", "CDNA2", "CDNA3", "chain", "VDP", "A16", "A4")

B = 2.0**7  # B * B = U
U, ULP = B * B, 2.0**-23
MAX = 255 * 2.0**120
FLT_MAX = float(np.finfo(np.float32).max)


def _at(places: dict[int, float], fill: float = 0.0) -> list[float]:
    return [places.get(i, fill) for i in range(16)]


_HUGE, _BIG = 2.0**15, 2.0**30

# name: (a, b, c, one word for each column); unnamed elements are 0.
# NVIDIA: agrees with hardware; AMD: mmasim 2.1.1; others: exact rational arithmetic.
PROBES: dict[str, tuple[list[float], list[float], float, str]] = {
    "U-U+c, c=U*2^-24": (
        [B, -B],
        [B, B],
        U * 2.0**-24,
        "0 3a800000 3a800000 3a800000 3a800000 3a800000 0 3a800000 3a800000 3a800000",
    ),
    "U-U+c, c=U*2^-25": (
        [B, -B],
        [B, B],
        U * 2.0**-25,
        "0 0 3a000000 3a000000 3a000000 0 0 0 3a000000 3a000000",
    ),
    "U-U+c, c=U*2^-26": (
        [B, -B],
        [B, B],
        U * 2.0**-26,
        "0 0 0 39800000 39800000 0 0 0 39800000 39800000",
    ),
    "U-U+p2, p2=U*2^-25": (
        [B, -B, B],
        [B, B, B * 2.0**-25],
        0,
        "0 0 3a000000 3a000000 3a000000 0 3a000000 3a000000 3a000000 3a000000",
    ),
    "U-U+p2, p2=U*2^-26": (
        [B, -B, B],
        [B, B, B * 2.0**-26],
        0,
        "0 0 0 39800000 39800000 0 39800000 39800000 39800000 39800000",
    ),
    "U, -U at 9, U*2^-24 at 1": (
        _at({0: B, 1: B, 9: -B}),
        _at({0: B, 1: B * 2.0**-24, 9: B}),
        0,
        "0 0 3a800000 0 0 0 0 0 3a800000 0",
    ),
    "U, -U at 5, U*2^-24 at 1": (
        _at({0: B, 1: B, 5: -B}),
        _at({0: B, 1: B * 2.0**-24, 5: B}),
        0,
        "? ? ? ? ? ? 0 0 3a800000 0",
    ),
    "1 + 0.75 ulp": (
        [1, 0.75],
        [1, ULP],
        0,
        "3f800000 3f800000 3f800000 3f800001 3f800001 3f800000 3f800001 3f800001 3f800001 3f800001",
    ),
    "1 + 1.5 ulp": (
        [1, 1.5],
        [1, ULP],
        0,
        "3f800001 3f800001 3f800001 3f800002 3f800002 3f800002 3f800002 3f800002 3f800002 3f800002",
    ),
    "2^30 - 2^30, 14 ones": (
        _at({0: _HUGE, 1: -_HUGE}, 1),
        _at({0: _HUGE, 1: _HUGE}, 1),
        0,
        "41400000 41000000 0 41600000 41600000 41000000 41600000 41600000 41600000 41600000",
    ),
    "2^30, 14 ones, -2^30": (
        _at({0: _HUGE, 15: -_HUGE}, 1),
        _at({0: _HUGE, 15: _HUGE}, 1),
        0,
        "0 0 0 3f800000 0 0 0 3f800000 41600000 40400000",
    ),
    "c=2^30, 15 ones, -2^30": (
        _at({15: -_HUGE}, 1),
        _at({15: _HUGE}, 1),
        _BIG,
        "0 0 0 3f800000 0 0 0 3f800000 41700000 40400000",
    ),
    "max*max - max*max": (
        [MAX, -MAX],
        [MAX, MAX],
        0,
        "0 0 0 0 7fc00000 7fc00000 7f800000 ff800000 0 0",
    ),
    "c=FLT_MAX, p0=2^103": (
        [2.0**100],
        [8],
        FLT_MAX,
        "7f7fffff 7f7fffff 7f7fffff 7f800000 7f800000 7f800000 7f800000 7f800000 7f800000 7f800000",
    ),
    "2^-133": ([2.0**-133], [1], 0, "10000 10000 10000 10000 0 10000 10000 0 10000 10000"),
    "c=2^-149": ([0], [0], 2.0**-149, "1 1 1 1 0 1 1 0 1 1"),
    "2^-149 - 2^-157": (
        [2.0**-75, -(2.0**-79)],
        [2.0**-74, 2.0**-78],
        0,
        "1 1 0 1 0 1 1 0 1 1",
    ),
    "2^-149 - 2^-159": (
        [2.0**-75, -(2.0**-80)],
        [2.0**-74, 2.0**-79],
        0,
        "1 1 1 1 0 1 1 0 1 1",
    ),
    "sixteen -0, c=-0": ([-0.0] * 16, [1] * 16, -0.0, "0 0 0 0 0 0 80000000 80000000 0 0"),
    "Inf*0": (
        [np.inf],
        [0],
        0,
        "7fffffff 7fffffff 7fffffff 7fc00000 7fc00000 7fc00000 7fc00000 ffc00000 7fc00000 7fc00000",
    ),
    "Inf-Inf": (
        [np.inf, -np.inf],
        [1, 1],
        0,
        "7fffffff 7fffffff 7fffffff 7fc00000 7fc00000 7fc00000 7fc00000 ffc00000 7fc00000 7fc00000",
    ),
    "NaN": (
        [np.nan],
        [1],
        0,
        "7fffffff 7fffffff 7fffffff 7fc00000 7fc00000 7fc00000 7fc00000 7fc00000 7fc00000 7fc00000",
    ),
    "-Inf": ([-np.inf], [1], 0, " ".join(["ff800000"] * 10)),
    "192^2 - 192^2 + U*2^-25": (
        [192, -192, B],
        [192, 192, B * 2.0**-25],
        0,
        "0 0 3a000000 3a000000 3a000000 0 3a000000 3a000000 3a000000 3a000000",
    ),
    "sixteen 1.9921875^2": (
        [1.9921875] * 16,
        [1.9921875] * 16,
        0,
        " ".join(["427e0100"] * 10),
    ),
}

CANDIDATE_COLUMNS = (
    "default",
    "products_4",
    "late_addend",
    "guard_2_truncate",
    "tree",
    "sequential",
)

# What tells the Ascend candidates apart, one word for each of CANDIDATE_COLUMNS.
CANDIDATE_PROBES: dict[str, tuple[list[float], list[float], float, str]] = {
    "U, -U at 3, U*2^-24 at 1": (
        _at({0: B, 1: B, 3: -B}),
        _at({0: B, 1: B * 2.0**-24, 3: B}),
        0,
        "3a800000 3a800000 3a800000 3a800000 0 0",
    ),
    "c=1, 2^-24, 2^-48": (
        [2.0**-24, 2.0**-48],
        [1, 1],
        1,
        "3f800001 3f800001 3f800000 3f800000 3f800000 3f800000",
    ),
    "c=1, sixteen 2^-25": (
        [2.0**-25] * 16,
        [1] * 16,
        1,
        "3f800004 3f800004 3f800004 3f800004 3f800004 3f800000",
    ),
    "U-U+c, c=U*2^-26": (
        [B, -B],
        [B, B],
        U * 2.0**-26,
        "39800000 39800000 39800000 0 39800000 0",
    ),
    "U-U+c, c=U*2^-30": (
        [B, -B],
        [B, B],
        U * 2.0**-30,
        "37800000 37800000 37800000 0 37800000 0",
    ),
}


def operands(
    probes: dict[str, tuple[list[float], list[float], float, str]], dtype: np.dtype = BF16
) -> tuple[NDArray, NDArray, NDArray]:
    """All probes as one batch: `a[rows, 1, 16]`, `b[rows, 16, 1]`, `c[rows, 1, 1]`."""
    a, b = (
        np.array([row[i] + [0.0] * (16 - len(row[i])) for row in probes.values()]).astype(dtype)
        for i in (0, 1)
    )
    c = np.array([row[2] for row in probes.values()], np.float32)
    return a[:, None, :], b[:, :, None], c[:, None, None]


def expected(
    probes: dict[str, tuple[list[float], list[float], float, str]], column: int
) -> list[str]:
    """The words of one column, as hexadecimal numbers; `?` where nothing is published."""
    return [row[3].split()[column] for row in probes.values()]
