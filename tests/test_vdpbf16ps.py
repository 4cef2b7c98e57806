"""`X86_AVX512_BF16` against the instruction of the machine that runs the tests."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import kernels
from kernels import X86_AVX512_BF16
from tests.kernel_inputs import BF16, FP32, GENERATORS, draw, from_bits, words

LANES = 1 << 14


@pytest.fixture(scope="module")
def instruction(tmp_path_factory):
    """`f(a, b, c)`: the instruction applied along K to one dot product per lane."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx512_bf16" not in flags.read_text():
        pytest.skip("this processor has no VDPBF16PS")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang)")
    library = tmp_path_factory.mktemp("vdpbf16ps") / "vdpbf16ps.so"
    source = Path(__file__).with_name("vdpbf16ps.c")
    options = ["-O1", "-shared", "-fPIC", "-mavx512f", "-mavx512bf16", "-o", str(library)]
    built = subprocess.run([compiler, *options, str(source)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{compiler} does not compile VDPBF16PS: {built.stderr.strip()[-200:]}")
    vdpbf16ps = ctypes.CDLL(str(library)).vdpbf16ps
    vdpbf16ps.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64]
    vdpbf16ps.restype = None

    def dots(a, b, c):
        lanes, k = a.shape
        total = np.zeros(lanes, np.uint32) if c is None else c.view(np.uint32).copy()
        assert lanes % 16 == 0 and k % 2 == 0
        for first in range(0, k, 2):
            x, y = (np.ascontiguousarray(v[:, first : first + 2]) for v in (a, b))
            vdpbf16ps(x.ctypes.data, y.ctypes.data, total.ctypes.data, lanes)
        return total

    return dots


def twin(a, b, c):
    c = None if c is None else c[:, None, None]
    found = kernels.matmul(a[:, None, :], b[:, :, None], c, arithmetic=X86_AVX512_BF16)
    return words(found).reshape(-1)


def reference(a, b, c):
    c = None if c is None else c[:, None, None]
    found = kernels.reference.matmul(a[:, None, :], b[:, :, None], c, arithmetic=X86_AVX512_BF16)
    return words(found).reshape(-1)


def flat(operands):
    a, b, c = operands
    return a[:, 0, :], b[:, :, 0], None if c is None else c[:, 0, 0]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(instruction, name):
    a, b, c = flat(draw(name, 1, LANES, 8, BF16))
    silicon = instruction(a, b, c)
    assert (twin(a, b, c) == silicon).all()
    few = slice(0, 256)
    c = None if c is None else c[few]
    assert (reference(a[few], b[few], c) == silicon[few]).all()


def test_raw_words(instruction):
    rng = np.random.default_rng(2)
    for _ in range(4):
        a, b = from_bits(rng, (2, LANES, 8), BF16)
        c = from_bits(rng, (LANES,), FP32)
        assert (twin(a, b, c) == instruction(a, b, c)).all()


def test_special_words_in_every_place(instruction):
    """NaNs with payloads of both kinds and signs, infinities, zeros, subnormals and largest
    numbers.
    """
    rng = np.random.default_rng(3)
    values = [0x7F81, 0xFF85, 0x7FC0, 0xFFD3, 0x7F80, 0xFF80, 0, 0x8000, 1, 0x807F, 0x7F7F, 0x3F80]
    a, b = rng.choice(np.array(values, np.uint16), (2, LANES, 8)).view(BF16)
    wide = [x << 16 for x in values] + [0x7F800001, 0xFFBFFFFF, 1, 0x80000001, 0x00800000]
    c = rng.choice(np.array(wide, np.uint32), LANES).view(np.float32)
    silicon = instruction(a, b, c)
    assert (twin(a, b, c) == silicon).all()
    few = slice(0, 1024)
    assert (reference(a[few], b[few], c[few]) == silicon[few]).all()


def test_every_bf16_code(instruction):
    """All codes as one operand, in either place, beside others and C of all sizes."""
    rng = np.random.default_rng(4)
    codes = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    for place in (0, 1):
        a, b = from_bits(rng, (2, 1 << 16, 2), BF16)
        a[:, place] = codes
        c = from_bits(rng, (1 << 16,), FP32)
        assert (twin(a, b, c) == instruction(a, b, c)).all()


def test_tininess_is_seen_after_rounding(instruction):
    """2^-126 - 0.5 * 2^-150 stays 2^-126, and 0.75 in place of 0.5 makes it zero."""
    a = np.zeros((16, 2), BF16)
    b = np.zeros((16, 2), BF16)
    a[:8, 1], a[8:, 1], b[:, 1] = 2.0**-76, 1.5 * 2.0**-76, -(2.0**-75)
    c = np.full(16, 2.0**-126, np.float32)
    silicon = instruction(a, b, c)
    assert (silicon[:8] == 0x00800000).all() and (silicon[8:] == 0).all()
    assert (twin(a, b, c) == silicon).all() and (reference(a, b, c) == silicon).all()


def test_another_order_is_another_arithmetic(instruction):
    a, b, c = flat(draw("wide", 5, LANES, 8, BF16))
    order = np.arange(8).reshape(-1, 2)[:, ::-1].reshape(-1)
    assert (twin(a[:, order], b[:, order], c) != instruction(a, b, c)).mean() > 0.05
