"""Records that nobody has thought of: drawn over every parameter, the twin against the definition
on every generator at once.
"""

import numpy as np
import pytest

import kernels
from kernels import Arithmetic, reference
from kernels.arithmetic import CHOICES
from tests.kernel_inputs import BF16, FP16, FP32, GENERATORS, draw_matrices, words

SHAPES = [(5, 18), (19, 3), (4, 4)]  # (m, n): one is computed transposed
DEPTHS = [1, 3, 8, 17, 33]
JOINED = ("sum_fraction_bits", "addend_fraction_bits", "result_fraction_bits")


def drawn_record(rng: np.random.Generator) -> Arithmetic:
    """Any parameters that make a record."""
    while True:
        fields = {
            name: str(rng.choice(choices))
            for name, choices in CHOICES.items()
            if name != "evidence"
        }
        joined = JOINED if fields["addend"] == "joined" else ()
        cut = rng.random() < 0.6
        try:
            return Arithmetic(
                name="drawn",
                products=int(rng.choice([1, 2, 3, 4, 5, 8, 16, 32, rng.integers(1, 65)])),
                fraction_bits=int(rng.integers(1, 49)) if cut else None,
                min_exponent=int(rng.choice([-400, -133, rng.integers(-400, -125)]))
                if cut
                else None,
                operand_fraction_bits=int(rng.integers(1, 24)) if rng.random() < 0.4 else None,
                nan=int(rng.choice([0x7FC00000, 0x7FFFFFFF, 0xFFC00000])),
                dtypes=("bfloat16", "float16", "float32"),
                **{name: int(rng.integers(1, 49)) for name in joined},  # type: ignore[arg-type]
                **fields,  # type: ignore[arg-type]
            )
        except ValueError:
            continue


def compare(seed: int) -> None:
    rng = np.random.default_rng(seed)
    record = drawn_record(rng)
    dtype = [BF16, BF16, FP16, FP32][rng.integers(4)]
    m, n = SHAPES[rng.integers(len(SHAPES))]
    k = int(rng.choice(DEPTHS))
    parts = [draw_matrices(name, seed, m, k, n, dtype) for name in GENERATORS]
    a, b = (np.stack([part[i] for part in parts]) for i in (0, 1))
    c = np.stack([np.zeros((m, n), np.float32) if x[2] is None else x[2] for x in parts])
    got = words(kernels.matmul(a, b, c, arithmetic=record))
    expected = words(reference.matmul(a, b, c, arithmetic=record))
    wrong = [name for name, x, y in zip(GENERATORS, got, expected, strict=True) if (x != y).any()]
    assert not wrong, f"{dtype.name} [{m}, {k}] x [{k}, {n}] of {record}: {wrong}"


@pytest.mark.parametrize("seed", range(6))
def test_drawn_records(seed):
    compare(seed)


@pytest.mark.slow  # a compilation for each of them
@pytest.mark.parametrize("seed", range(100, 400))
def test_many_drawn_records(seed):
    compare(seed)
