"""Results that real GPUs gave, where `CM384_SILICON_DIR` holds them."""

import os
from pathlib import Path

import numpy as np
import pytest

import kernels
from tests.kernel_inputs import BF16, FP16, words

FOLDER = Path(os.environ.get("CM384_SILICON_DIR") or "missing")
# Each row is one hardware step.
FILES = [
    ("h100_bf16.npz", kernels.NVIDIA_HOPPER),
    ("h100_bf16_subnormal.npz", kernels.NVIDIA_HOPPER),
    ("a100_bf16.npz", kernels.NVIDIA_AMPERE),
    ("a100_fp16.npz", kernels.NVIDIA_AMPERE),
    ("v100_fp16.npz", kernels.NVIDIA_VOLTA),
]


@pytest.mark.parametrize("name,arithmetic", FILES, ids=[name for name, _ in FILES])
@pytest.mark.parametrize(
    "function", [kernels.reference.matmul, kernels.matmul], ids=["reference", "twin"]
)
def test_recorded_results(name, arithmetic, function):
    if not (FOLDER / name).is_file():
        pytest.skip(f"CM384_SILICON_DIR does not name a folder with {name}")
    with np.load(FOLDER / name) as data:
        a, b, c, d = (data[key] for key in "abcd")
    dtype = FP16 if "fp16" in name else BF16
    a, b = (x.view(np.float32).astype(dtype) for x in (a, b))
    got = function(
        a[:, None, :], b[:, :, None], c.view(np.float32)[:, None, None], arithmetic=arithmetic
    )
    assert np.count_nonzero(words(got)[:, 0, 0] != d) == 0


def test_recorded_results_tell_hopper_from_the_others():
    if not (FOLDER / "h100_bf16.npz").is_file():
        pytest.skip("CM384_SILICON_DIR does not name a folder with h100_bf16.npz")
    with np.load(FOLDER / "h100_bf16.npz") as data:
        a, b, c, d = (data[key][:1000] for key in "abcd")
    a, b = (x.view(np.float32).astype(BF16) for x in (a, b))
    for other in (kernels.ASCEND_910C, kernels.FP32_FMA_CHAIN):
        got = kernels.matmul(
            a[:, None], b[:, :, None], c.view(np.float32)[:, None, None], arithmetic=other
        )
        assert np.count_nonzero(words(got)[:, 0, 0] != d) > 100
