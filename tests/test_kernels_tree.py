"""Trees of rounded additions: the twin against the definition, on each of its ways."""

from dataclasses import replace

import numpy as np
import pytest

import kernels
from kernels import AMD_CDNA2, extents
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw_matrices
from tests.test_kernels_chain import check, inputs, near, ways_of

_TREE = kernels.ASCEND_910C_CANDIDATES["tree"]
_ODD = replace(
    _TREE,
    name="toward zero, saturating, infinite products",
    products=4,
    rounding="toward_zero",
    subnormal_inputs="flush",
    specials="saturate",
    product_overflow="inf",
    overflow="saturate",
    zero="ieee",
)
_WIDE = replace(
    AMD_CDNA2,
    name="FP32 products",
    products=2,
    dtypes=("float32",),
    subnormal_results="keep",
    fp32=None,
    fp16=None,
)

CASES = [
    (AMD_CDNA2, BF16),
    (AMD_CDNA2, FP16),
    (_TREE, BF16),
    (replace(_TREE, name="ieee", products=8, zero="ieee"), BF16),
    (_ODD, BF16),
    (_WIDE, FP32),
]
case = pytest.mark.parametrize("arithmetic, dtype", CASES, ids=lambda x: x.name)


@case
def test_single_dots(arithmetic, dtype):
    for name, a, b, c in inputs(64, 35, dtype):
        check(name, a, b, c, arithmetic)


def test_matrices_without_c():
    for name in GENERATORS:
        a, b, _ = draw_matrices(name, 2, 9, 37, 11, BF16)
        check(name, a, b, None, AMD_CDNA2)


@pytest.mark.parametrize(
    "exponents, way",
    [
        ((-6, 6), extents.PLAIN),
        ((-56, -52), extents.SCALED),
        ((-80, -70), extents.LOW),
        ((58, 66), extents.HIGH),
        ((-126, 127), extents.WIDE),
    ],
)
def test_every_way_is_taken_and_right(exponents, way):
    a, b, _ = near(exponents, np.random.default_rng(5), 16, 32, BF16)
    a, b = a[:, 0, :], b[:, :, 0].T.copy()
    assert ways_of(a, b, None, _TREE) == {way}
    check(exponents, a, b, None, _TREE)
    check(exponents, a, b, None, AMD_CDNA2)


def test_products_are_rounded_and_added_in_pairs():
    """(p0 + p1) + (p2 + p3): 2^-24 is lost beside 1 but not beside -1 + 2^-24."""
    a = np.ones((1, 4), np.float32)
    b = np.array([[1.0], [2.0**-24], [-1.0], [2.0**-24]], np.float32)
    tree = replace(_WIDE, products=4)
    assert kernels.matmul(a, b, arithmetic=tree)[0, 0] == 2.0**-24
    check("pairs", a, b, None, tree)
    assert kernels.matmul(a, b, arithmetic=kernels.FP32_FMA_CHAIN)[0, 0] == 2.0**-24
    order = [0, 2, 1, 3]
    assert kernels.matmul(a, b[order], arithmetic=tree)[0, 0] == 2.0**-23
