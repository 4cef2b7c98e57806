"""How a matrix unit sums: one record, and the units that are known."""

from dataclasses import dataclass
from typing import Literal

Evidence = Literal["documented", "measured", "inferred", "assumed"]

_CHOICES = {
    "alignment": ("truncate", "floor", "nearest_even"),
    "addend": ("fused", "late"),
    "rounding": ("nearest_even", "toward_zero"),
    "operand_rounding": ("nearest_even", "toward_zero"),
    "subnormal_inputs": ("keep", "flush"),
    "subnormal_results": ("keep", "flush"),
    "overflow": ("inf", "saturate"),
    "zero": ("positive", "ieee"),
    "evidence": ("documented", "measured", "inferred", "assumed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """The arithmetic of one matrix unit: what one step does with `products` products and the
    accumulator C.

    A step decodes its operands exactly (a product of two significands is not renormalised), aligns
    the terms, adds them exactly and rounds the sum to FP32, which is the C of the next step. K
    ascends, C starts at the caller's `c` or at +0, and a last step that is short is filled up with
    products +0.

    Attributes:
        name: how the record is called in tables and errors.
        products: products per step, L.
        fraction_bits: F: every term is cut to a multiple of 2^(e_max - F), where e_max is the
            largest exponent among the products and C (a zero counts as `min_exponent`). `None`: the
            sum is exact.
        alignment: how a term is cut: toward zero, toward minus infinity (`floor`), or to nearest
            even.
        addend: `fused`: C is one of the aligned terms. `late`: the sum of the products alone is
            rounded to FP32 by `rounding`, then added to C by an FP32 addition (nearest even).
        rounding: how the sum of a step becomes FP32.
        min_exponent: a floor under e_max; needed when `fraction_bits` is set.
        operand_fraction_bits: FP32 operands are first cut to this many fraction bits by
            `operand_rounding` (TF32 10, HF32 11). `None`: used as they are.
        subnormal_inputs: `flush` reads subnormal operands and C as zeros of the same sign.
        subnormal_results: `flush` replaces a subnormal result of a step by a zero of its sign.
        overflow: a finite sum beyond FP32 becomes infinity or the largest finite value.
        nan: the FP32 word of every NaN result.
        zero: `positive`: every zero result is +0. `ieee`: -0 if all terms are -0 or a negative sum
            underflows. fp32: the arithmetic for FP32 operands; `None`: the unit takes none.
        dtypes: the operand types the record itself takes.
        evidence, source: where this comes from, and how sure it is.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    name: str
    products: int
    fraction_bits: int | None = None
    alignment: Literal["truncate", "floor", "nearest_even"] = "truncate"
    addend: Literal["fused", "late"] = "fused"
    rounding: Literal["nearest_even", "toward_zero"] = "nearest_even"
    min_exponent: int | None = None
    operand_fraction_bits: int | None = None
    operand_rounding: Literal["nearest_even", "toward_zero"] = "toward_zero"
    subnormal_inputs: Literal["keep", "flush"] = "keep"
    subnormal_results: Literal["keep", "flush"] = "keep"
    overflow: Literal["inf", "saturate"] = "inf"
    nan: int = 0x7FC00000
    zero: Literal["positive", "ieee"] = "positive"
    fp32: "Arithmetic | None" = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    evidence: Evidence = "assumed"
    source: str = ""

    def __post_init__(self) -> None:
        self._integer("products", self.products, 1, 64)
        if self.fraction_bits is not None:
            self._integer("fraction_bits", self.fraction_bits, 1, 48)
            self._integer("min_exponent", self.min_exponent, -400, -126)
        if self.operand_fraction_bits is not None:
            self._integer("operand_fraction_bits", self.operand_fraction_bits, 1, 23)
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"Arithmetic {self.name!r}: {field} must be one of {choices}, "
                    f"got {getattr(self, field)!r}"
                )
        if not (isinstance(self.nan, int) and 0x7F800000 < self.nan & 0x7FFFFFFF):
            raise ValueError(
                f"Arithmetic {self.name!r}: nan must be the FP32 word of a NaN, got {self.nan!r}"
            )
        unknown = set(self.dtypes) - {"bfloat16", "float16", "float32"}
        if unknown or not self.dtypes:
            raise ValueError(
                f"Arithmetic {self.name!r}: dtypes must name bfloat16, float16 or float32, "
                f"got {self.dtypes!r}"
            )
        if self.fp32 is not None and "float32" not in self.fp32.dtypes:
            raise ValueError(
                f"Arithmetic {self.name!r}: fp32 must take float32 operands, "
                f"got one for {self.fp32.dtypes}"
            )

    def _integer(self, field: str, value: int | None, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(
                f"Arithmetic {self.name!r}: {field} must be an integer from {low} to {high}, "
                f"got {value!r}"
            )


_ASCEND_FP32 = Arithmetic(
    name="ASCEND_910C FP32 mode",
    products=4,
    dtypes=("float32",),
    evidence="inferred",
    source=(
        "Huawei asc-devkit: FP32 k-step of 4; Jittor pull request 18025: effective bits 23.9 "
        "(K=64) and 24.4 fit an exact sum of 4 products and C with one rounding to nearest"
    ),
)

ASCEND_910C = Arithmetic(
    name="ASCEND_910C",
    products=16,
    fp32=_ASCEND_FP32,
    evidence="inferred",
    source=(
        "Huawei asc-devkit: 16x16x16 multiply-adds per cycle, FP32 accumulator; the exact sum and "
        "its single rounding are transferred from the FP32 mode. Specification level: not verified "
        "on hardware. Sign of zero and NaN word are assumed"
    ),
)

FP32_FMA_CHAIN = Arithmetic(
    name="FP32_FMA_CHAIN",
    products=1,
    zero="ieee",
    dtypes=("bfloat16", "float16", "float32"),
    evidence="documented",
    source="IEEE 754 fusedMultiplyAdd, ascending k, starting at C",
)

_HOPPER_TF32 = Arithmetic(
    name="NVIDIA_HOPPER TF32",
    products=8,
    fraction_bits=25,
    rounding="toward_zero",
    min_exponent=-133,
    operand_fraction_bits=10,
    nan=0x7FFFFFFF,
    dtypes=("float32",),
    evidence="measured",
    source="mmasim 2.1.1 parameter tables; MATLAB-tensor-core b12b5a7, arXiv 2512.07004",
)

NVIDIA_HOPPER = Arithmetic(
    name="NVIDIA_HOPPER",
    products=16,
    fraction_bits=25,
    rounding="toward_zero",
    min_exponent=-133,
    nan=0x7FFFFFFF,
    fp32=_HOPPER_TF32,
    evidence="measured",
    source="mmasim 2.1.1 parameter tables; MATLAB-tensor-core b12b5a7, arXiv 2512.07004",
)
