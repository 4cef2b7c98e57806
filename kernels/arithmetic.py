"""How a matrix unit sums: one record for units of today and of tomorrow."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Evidence = Literal["documented", "measured", "inferred", "assumed"]

INTEGERS = ("int8", "int4")
DTYPES = ("bfloat16", "float16", "float32", *INTEGERS)

CHOICES = {
    "summation": ("fused", "chain", "tree"),
    "alignment": ("truncate", "floor", "nearest_even"),
    "addend": ("fused", "late", "joined"),
    "rounding": ("nearest_even", "toward_zero"),
    "operand_rounding": ("nearest_even", "toward_zero"),
    "subnormal_inputs": ("keep", "flush", "plus_zero"),
    "subnormal_results": ("keep", "flush"),
    "specials": ("ieee", "saturate"),
    "product_overflow": ("keep", "inf"),
    "overflow": ("inf", "saturate"),
    "nan_rule": ("word", "propagate"),
    "zero": ("positive", "ieee"),
    "evidence": ("documented", "measured", "inferred", "assumed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """The arithmetic of one matrix unit: what one step does with `products` products and the
    accumulator C.

    Operands are decoded exactly, and a product of two significands is exact and not renormalised.
    The result of a step is an FP32 number and the C of the next one. K ascends from step to step,
    C starts at the caller's `c` or at +0, and a last step that is short is filled up with products
    +0.

    Attributes:
        name: how the record is called in tables and errors.
        products: products per step, L.
        summation: how a step sums. `fused`: all at once; its terms are aligned, added exactly and
            rounded once. `chain`: each product is added to C by a fused multiply-add that rounds,
            the last product of the step first. `tree`: each product is rounded to FP32, neighbours
            are added two by two until one number is left, every addition rounds, and C is added
            to it at last (`addend="late"`).
        fraction_bits: F: every term is cut to a multiple of 2^(e_max - F), where e_max is the
            largest exponent among the terms (a zero counts as `min_exponent`, and so does not
            count above it). `None`: the sum is exact.
        alignment: how a term is cut: toward zero, toward minus infinity (`floor`), or to nearest
            even.
        addend: `fused`: C is one of the terms. `late`: the sum of the products alone is rounded to
            FP32, then added to C by an FP32 addition that rounds again. `joined`: the
            products are aligned and added among themselves; their sum is then cut to a multiple of
            2^(E - sum_fraction_bits) and C to one of 2^(E - addend_fraction_bits), where E is the
            larger of the products' e_max and C's exponent (-126 for a zero); both are added, and
            the total is cut to `result_fraction_bits` bits after its leading one (after the place
            of 2^-126 if that is higher) before it is rounded. These three cuts go toward minus
            infinity.
        rounding: how a sum becomes FP32.
        min_exponent: a floor under e_max; needed when `fraction_bits` is set.
        sum_fraction_bits, addend_fraction_bits, result_fraction_bits: see `addend="joined"`.
        operand_fraction_bits: FP32 operands are first cut to this many fraction bits by
            `operand_rounding` (TF32 10, HF32 11). Cut toward zero, a NaN whose bits are all below
            becomes an infinity; rounded to nearest, NaNs stay NaNs. `None`: used as they are.
        subnormal_inputs: `flush` reads subnormal operands and C as zeros of the same sign;
            `plus_zero` reads them, and zeros of either sign, as +0.
        subnormal_results: `flush` replaces every rounded sum (and in a tree every product) that is
            tiny by a zero of its sign. Tiny: still below 2^-126 when it is rounded as if exponents
            had no limit.
        specials: `saturate` reads an infinite operand or C as the largest finite number of its type
            (an operand's without the bits that it is cut by) and sign, and a NaN as +0.
        product_overflow: `inf`: a finite product of magnitude 2^128 or more becomes infinite. (In
            a tree every product is rounded to FP32 in any case.)
        overflow: a finite sum beyond FP32, or one beyond the narrower type that it is cast to,
            becomes infinity or the largest finite value.
        nan: the FP32 word of a NaN result.
        nan_rule: `word`: every NaN result is `nan`. `propagate`, for chains: a NaN operand of a
            fused multiply-add (a before b before C) is the result, made quiet; an invalid operation
            gives `nan`.
        zero: `positive`: every zero result is +0. `ieee`: -0 if all terms are -0 or a negative sum
            underflows.
        fp32: the arithmetic for FP32 operands; `None`: the unit takes none.
        fp32_reduced: the same when reduced precision is asked for (HF32, TF32, XF32), and
        fp32_full: the same when full precision is; `None`: as `fp32`.
        fp16: the arithmetic for FP16 operands where it is another; `None`: the record itself.
        dtypes: the operand types the record itself takes. Products of integers are summed in INT32,
            which wraps around; nothing else of the record applies to them.
        evidence, source: where this comes from, and how sure it is.

    Raises:
        ValueError: a field is outside its range, or contradicts another; the message names it.
    """

    name: str
    products: int
    summation: Literal["fused", "chain", "tree"] = "fused"
    fraction_bits: int | None = None
    alignment: Literal["truncate", "floor", "nearest_even"] = "truncate"
    addend: Literal["fused", "late", "joined"] = "fused"
    rounding: Literal["nearest_even", "toward_zero"] = "nearest_even"
    min_exponent: int | None = None
    sum_fraction_bits: int | None = None
    addend_fraction_bits: int | None = None
    result_fraction_bits: int | None = None
    operand_fraction_bits: int | None = None
    operand_rounding: Literal["nearest_even", "toward_zero"] = "toward_zero"
    subnormal_inputs: Literal["keep", "flush", "plus_zero"] = "keep"
    subnormal_results: Literal["keep", "flush"] = "keep"
    specials: Literal["ieee", "saturate"] = "ieee"
    product_overflow: Literal["keep", "inf"] = "keep"
    overflow: Literal["inf", "saturate"] = "inf"
    nan: int = 0x7FC00000
    nan_rule: Literal["word", "propagate"] = "word"
    zero: Literal["positive", "ieee"] = "positive"
    fp32: "Arithmetic | None" = None
    fp32_reduced: "Arithmetic | None" = None
    fp32_full: "Arithmetic | None" = None
    fp16: "Arithmetic | None" = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    evidence: Evidence = "assumed"
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"Arithmetic: name must be a string, got {self.name!r}")
        self._integer("products", self.products, 1, 64)
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise self._error(f"{field} must be one of {choices}, got {getattr(self, field)!r}")
        if self.fraction_bits is not None:
            self._integer("fraction_bits", self.fraction_bits, 1, 48)
            self._integer("min_exponent", self.min_exponent, -400, -126)
        if self.operand_fraction_bits is not None:
            self._integer("operand_fraction_bits", self.operand_fraction_bits, 1, 23)
        for field, without, needed in (
            ("alignment", "truncate", "fraction_bits"),
            ("min_exponent", None, "fraction_bits"),
            ("operand_rounding", "toward_zero", "operand_fraction_bits"),
        ):
            if getattr(self, needed) is None and getattr(self, field) != without:
                raise self._error(f"{field} does nothing without {needed}; give both or none")
        word = self.nan if isinstance(self.nan, int) else 0
        if not (0 < word < 1 << 32 and word & 0x7FFFFFFF > 0x7F800000):
            raise self._error(f"nan must be the FP32 word of a NaN, got {self.nan!r}")
        named = isinstance(self.dtypes, tuple) and set(self.dtypes) <= set(DTYPES)
        if not named or not set(self.dtypes) - set(INTEGERS):
            raise self._error(f"dtypes must be a tuple of some of {DTYPES}, got {self.dtypes!r}")
        self._check_sums()
        for field, dtype in (
            ("fp32", "float32"),
            ("fp32_reduced", "float32"),
            ("fp32_full", "float32"),
            ("fp16", "float16"),
        ):
            mode = getattr(self, field)
            if mode is not None and not isinstance(mode, Arithmetic):
                raise self._error(f"{field} must be an Arithmetic or None, got {mode!r}")
            if mode is not None and dtype not in mode.dtypes:
                raise self._error(f"{field} must take {dtype} operands, got one for {mode.dtypes}")

    def mode(
        self, a: str, b: str, precision: Literal["default", "reduced", "full"] = "default"
    ) -> "Arithmetic":
        """The arithmetic that multiplies operands of these dtypes: the record or one of its modes.

        `precision` chooses among the modes for FP32 operands.

        Raises:
            TypeError: dtypes that no mode takes, or two different ones of which none is float32.
            NotImplementedError: FP32 operands on a unit without an FP32 mode.
        """
        for dtype in (a, b):
            if dtype not in DTYPES:
                raise TypeError(
                    f"matmul: expected operands in {DTYPES}, got {a} and {b}; cast them first"
                )
        if "float32" in (a, b) and not {a, b} & set(INTEGERS):
            special = {"reduced": self.fp32_reduced, "full": self.fp32_full}.get(precision)
            mode = special or (self if "float32" in self.dtypes else self.fp32)
            if mode is None:
                raise NotImplementedError(
                    f"matmul: {self.name} has no FP32 mode; cast the operands to {self.dtypes[0]}"
                )
            return mode
        if a != b:
            raise TypeError(
                f"matmul: expected operands of one dtype, got {a} and {b}; cast one of them, or "
                "one to float32 for FP32 mode"
            )
        if a == "float16" and self.fp16 is not None:
            return self.fp16
        if a not in self.dtypes:
            raise TypeError(f"matmul: {self.name} takes {self.dtypes}, got {a}; cast the operands")
        return self

    @property
    def is_chain(self) -> bool:
        """Whether every product is added to C by itself and rounded, with no cut before."""
        single = self.products == 1 and self.summation == "fused" and self.fraction_bits is None
        return (self.summation == "chain" or single) and self.addend == "fused"

    def _check_sums(self) -> None:
        joined = ("sum_fraction_bits", "addend_fraction_bits", "result_fraction_bits")
        for field in joined:
            if self.addend == "joined":
                self._integer(field, getattr(self, field), 1, 48)
            elif getattr(self, field) is not None:
                raise self._error(f'{field} is for addend="joined", got addend={self.addend!r}')
        if self.addend == "joined" and self.fraction_bits is None:
            raise self._error('addend="joined" needs fraction_bits, got None')
        if self.summation != "fused" and self.fraction_bits is not None:
            raise self._error(
                f"fraction_bits is for fused sums, got {self.fraction_bits} with "
                f"summation={self.summation!r}"
            )
        if self.summation == "chain" and self.addend != "fused":
            raise self._error(f'summation="chain" needs addend="fused", got {self.addend!r}')
        if self.summation == "tree":
            if self.addend != "late":
                raise self._error(f'summation="tree" needs addend="late", got {self.addend!r}')
            if self.products & (self.products - 1):
                raise self._error(f"products of a tree must be a power of 2, got {self.products}")
        if self.specials == "saturate" and self.overflow != "saturate":
            raise self._error(
                f'specials="saturate" needs overflow="saturate", got {self.overflow!r}'
            )
        if self.nan_rule == "propagate" and self.summation != "chain":
            raise self._error(
                f'nan_rule="propagate" needs summation="chain", got {self.summation!r}'
            )

    def _integer(self, field: str, value: int | None, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(f"{field} must be an integer from {low} to {high}, got {value!r}")

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"Arithmetic {self.name!r}: {problem}")


# Any processor's ordinary cores.

FP32_FMA_CHAIN = Arithmetic(
    name="FP32_FMA_CHAIN",
    products=1,
    zero="ieee",
    dtypes=("bfloat16", "float16", "float32"),
    evidence="documented",
    source="IEEE 754 fusedMultiplyAdd, ascending k, starting at C",
)


def _ordinary_cores(unit: str) -> Arithmetic:
    """FP32 operands on a unit without a known mode for them."""
    return dataclasses.replace(
        FP32_FMA_CHAIN,
        name=f"{unit} FP32",
        dtypes=("float32",),
        evidence="assumed",
        source="FP32 fused multiply-adds in ascending order; the library's order is not known",
    )


# Huawei Ascend.

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

_ASCEND_HF32 = Arithmetic(
    name="ASCEND_910C HF32 mode",
    products=8,
    operand_fraction_bits=11,
    operand_rounding="nearest_even",
    dtypes=("float32",),
    evidence="inferred",
    source=(
        "Huawei asc-devkit: HF32 k-step of 8, mode 0 rounds operands to nearest even; 11 fraction "
        "bits from Jittor pull request 18025 (12.7 effective bits) and the 2^-11 accuracy "
        "threshold; the sum is transferred from the FP32 mode"
    ),
)

ASCEND_910C = Arithmetic(
    name="ASCEND_910C",
    products=16,
    fp32=_ASCEND_FP32,
    fp32_reduced=_ASCEND_HF32,
    dtypes=("bfloat16", "float16", *INTEGERS),
    evidence="inferred",
    source=(
        "Huawei asc-devkit: 16x16x16 multiply-adds per cycle, FP32 accumulator; the exact sum and "
        "its single rounding are transferred from the FP32 mode. Specification level: not verified "
        "on hardware. Sign of zero and NaN word are assumed"
    ),
)

ASCEND_910C_HF32 = dataclasses.replace(
    ASCEND_910C,
    name="ASCEND_910C_HF32",
    fp32=_ASCEND_HF32,
    fp32_full=_ASCEND_FP32,
    source=ASCEND_910C.source + ". FP32 operands run as HF32, as when the library is told to",
)


def _candidate(key: str, what: str, **changes: object) -> Arithmetic:
    return dataclasses.replace(
        ASCEND_910C,
        name=f"ASCEND_910C/{key}",
        evidence="assumed",
        source=f"An alternative to ASCEND_910C that no public measurement excludes: {what}",
        **changes,  # type: ignore[arg-type]
    )


def _guard(bits: int, alignment: str) -> Arithmetic:
    return _candidate(
        f"guard_{bits}_{alignment}",
        f"terms are cut to 24 + {bits} bits ({alignment}) before they are added",
        fraction_bits=23 + bits,
        alignment=alignment,
        min_exponent=-400,
    )


ASCEND_910C_CANDIDATES: dict[str, Arithmetic] = {
    "default": ASCEND_910C,
    "products_8": _candidate(
        "products_8", "two groups of 8 products, one after the other", products=8
    ),
    "products_4": _candidate(
        "products_4", "four groups of 4 products, as in FP32 mode", products=4
    ),
    "sequential": _candidate("sequential", "one fused multiply-add after the other", products=1),
    **{
        f"guard_{bits}_{alignment}": _guard(bits, alignment)
        for bits in (2, 3, 4)
        for alignment in ("truncate", "floor")
    },
    "late_addend": _candidate(
        "late_addend", "the sum of 16 products is rounded, then added to C", addend="late"
    ),
    "tree": _candidate(
        "tree",
        "products are added two by two, each sum rounded, C last",
        summation="tree",
        addend="late",
    ),
    "toward_zero": _candidate(
        "toward_zero", "sums are rounded toward zero", rounding="toward_zero"
    ),
    "flush_inputs": _candidate(
        "flush_inputs", "subnormal operands are read as zeros", subnormal_inputs="flush"
    ),
    "saturation": _candidate(
        "saturation",
        "saturation mode (CTRL[48]=0): infinite operands become the largest finite number, NaNs "
        "zero, and sums saturate; documented for FP16 and BF16, for FP32 accumulators assumed",
        specials="saturate",
        overflow="saturate",
    ),
}

# NVIDIA.

_NVIDIA_SOURCE = "mmasim 2.1.1 parameter tables; MATLAB-tensor-core b12b5a7, arXiv 2512.07004"
_CHECKED = _NVIDIA_SOURCE + "; 5000 recorded results without a difference"


def _nvidia(
    name: str,
    products: int,
    fraction_bits: int,
    min_exponent: int,
    *,
    tf32_products: int | None,
    dtypes: tuple[str, ...] = ("bfloat16", "float16"),
    evidence: Evidence = "measured",
    source: str = _CHECKED,
) -> Arithmetic:
    """Terms are cut toward zero to `fraction_bits`; the sum is rounded toward zero."""
    unit = Arithmetic(
        name=name,
        products=products,
        fraction_bits=fraction_bits,
        rounding="toward_zero",
        min_exponent=min_exponent,
        nan=0x7FFFFFFF,
        dtypes=dtypes,
        evidence=evidence,
        source=source,
    )
    if tf32_products is None:
        return dataclasses.replace(unit, fp32=_ordinary_cores(name))
    tf32 = dataclasses.replace(
        unit,
        name=f"{name} TF32",
        products=tf32_products,
        operand_fraction_bits=10,
        dtypes=("float32",),
    )
    return dataclasses.replace(unit, fp32=tf32, fp32_full=_ordinary_cores(name))


NVIDIA_VOLTA = _nvidia("NVIDIA_VOLTA", 4, 23, -131, tf32_products=None, dtypes=("float16",))
NVIDIA_TURING = _nvidia(
    "NVIDIA_TURING",
    8,
    24,
    -132,
    tf32_products=None,
    dtypes=("float16",),
    evidence="documented",
    source=_NVIDIA_SOURCE + "; not compared with recorded results",
)
NVIDIA_AMPERE = _nvidia("NVIDIA_AMPERE", 8, 24, -132, tf32_products=4)
NVIDIA_ADA = _nvidia("NVIDIA_ADA", 8, 24, -132, tf32_products=4)
NVIDIA_HOPPER = _nvidia("NVIDIA_HOPPER", 16, 25, -133, tf32_products=8)
NVIDIA_BLACKWELL = _nvidia("NVIDIA_BLACKWELL", 16, 25, -133, tf32_products=8)

# AMD.

_AMD_SOURCE = (
    "mmasim 2.1.1; MATLAB-tensor-core b12b5a7, arXiv 2512.07004; not compared with recorded "
    "results. NaN word and sign of zero are assumed, for AMD specifies neither: zeros are +0, also "
    "those of sums that underflow from below, whose sign mmasim keeps (CDNA2 keeps it here too)"
)


def _mfma_fp32(unit: str) -> Arithmetic:
    return dataclasses.replace(
        _ordinary_cores(unit), evidence="documented", source=f"{_AMD_SOURCE}. An FMA chain"
    )


_CDNA1_FP16 = Arithmetic(
    name="AMD_CDNA1 FP16",
    products=4,
    fp32=_mfma_fp32("AMD_CDNA1"),
    dtypes=("float16",),
    evidence="documented",
    source=_AMD_SOURCE,
)

AMD_CDNA1 = dataclasses.replace(
    _CDNA1_FP16,
    name="AMD_CDNA1",
    products=2,
    fp16=_CDNA1_FP16,
    dtypes=("bfloat16",),
)

AMD_CDNA2 = Arithmetic(
    name="AMD_CDNA2",
    products=4,
    summation="tree",
    addend="late",
    subnormal_inputs="plus_zero",
    subnormal_results="flush",
    zero="ieee",
    fp32=_mfma_fp32("AMD_CDNA2"),
    evidence="documented",
    source=_AMD_SOURCE + ". The opcodes that end in _1k; older ones add 2 products",
)

_CDNA3_XF32 = Arithmetic(
    name="AMD_CDNA3 XF32",
    products=4,
    fraction_bits=24,
    addend="joined",
    min_exponent=-400,
    sum_fraction_bits=32,
    addend_fraction_bits=24,
    result_fraction_bits=31,
    operand_fraction_bits=10,
    product_overflow="inf",
    dtypes=("float32",),
    evidence="documented",
    source=_AMD_SOURCE,
)

AMD_CDNA3 = dataclasses.replace(
    _CDNA3_XF32,
    name="AMD_CDNA3",
    products=8,
    operand_fraction_bits=None,
    fp32=_mfma_fp32("AMD_CDNA3"),
    fp32_reduced=_CDNA3_XF32,
    dtypes=("bfloat16", "float16"),
)

# x86.

X86_AVX512_BF16 = Arithmetic(
    name="X86_AVX512_BF16",
    products=2,
    summation="chain",
    subnormal_inputs="flush",
    subnormal_results="flush",
    nan=0xFFC00000,
    nan_rule="propagate",
    zero="ieee",
    fp32=dataclasses.replace(_ordinary_cores("X86_AVX512_BF16"), nan=0xFFC00000),
    dtypes=("bfloat16",),
    evidence="measured",
    source="VDPBF16PS on a Xeon with AVX512_BF16: 192 million lanes without a difference",
)

PRESETS: dict[str, Arithmetic] = {
    preset.name: preset
    for preset in (
        ASCEND_910C,
        ASCEND_910C_HF32,
        NVIDIA_VOLTA,
        NVIDIA_TURING,
        NVIDIA_AMPERE,
        NVIDIA_ADA,
        NVIDIA_HOPPER,
        NVIDIA_BLACKWELL,
        AMD_CDNA1,
        AMD_CDNA2,
        AMD_CDNA3,
        X86_AVX512_BF16,
        FP32_FMA_CHAIN,
    )
}
"""Every named unit, by its name."""
