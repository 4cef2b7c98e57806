"""Vectors of doubles in functions that numba compiles: expressions that emit LLVM's operations.

Numba itself has no vector types, and whether its loops become vectors is LLVM's choice. A function
marked `inline` is written in terms of `Vector` and runs once, when it is compiled; what it computes
is strict IEEE arithmetic in FP64, in which LLVM contracts and reorders nothing. Vectors are as long
as the registers of the processor that numba compiles for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_PROCESSOR, _, _FEATURES = cpu_target.target_context.codegen().magic_tuple()  # in LLVM's words
_IS_X86, _IS_ARM = _PROCESSOR.startswith("x86_64"), _PROCESSOR.startswith(("aarch64", "arm64"))
_HAS_512_BITS = "+avx512f" in _FEATURES

LANES = 8 if _HAS_512_BITS else 4 if _IS_X86 else 2  # doubles of a register
# Rows of elements that are computed together. With two sums each, they take half of 32 registers,
# or three quarters of the 16 that an x86 without AVX-512 has.
ROWS = 6 if _IS_X86 and not _HAS_512_BITS else 8

ROUNDS_BY_INSTRUCTION = _HAS_512_BITS
"""Whether an instruction can say that it rounds up or down."""

TOWARD_ZERO = 0x6000 if _IS_X86 else 0xC00000  # bits of the control word: how it rounds

COMPILED: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""How numba compiles the functions that use them: arithmetic as in C, no exceptions, and for each
other alone. Python must not call them: the wrappers by which it could would take a fifth of the
time to compile.
"""

INLINED: dict[str, Any] = {**COMPILED, "inline": "always"}
"""The same for a function that is called at one place and calls nearly all the others: as a
function of its own, all of them would be optimised once more.
"""

_I64 = ir.IntType(64)
_F64 = ir.DoubleType()
_F32 = ir.FloatType()
_DOUBLES = ir.VectorType(_F64, LANES)
_FLOATS = ir.VectorType(_F32, LANES)
_I32 = ir.IntType(32)
_PLACES = ir.VectorType(_I32, LANES)


# How an instruction of AVX-512 rounds (Intel 64 manual, volume 1, 15.6.4); no exceptions.
_DOWN, _UP = 0x9, 0xA


class Vector:
    """`LANES` numbers: doubles, their words, or the answers of a comparison; or twice as many
    floats.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value)

    def __add__(self, other: Vector) -> Vector:
        return self._new(self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Vector) -> Vector:
        return self._new(self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Vector) -> Vector:
        return self._new(self.builder.fmul(self.value, other.value))

    def __neg__(self) -> Vector:
        return self._new(self.builder.fneg(self.value))

    def __lt__(self, other: Vector) -> Vector:
        return self._new(self.builder.fcmp_ordered("<", self.value, other.value))

    def __ge__(self, other: Vector) -> Vector:
        return self._new(self.builder.fcmp_ordered(">=", self.value, other.value))

    def equals(self, other: Vector) -> Vector:
        return self._new(self.builder.fcmp_ordered("==", self.value, other.value))

    def no_number(self, other: Vector) -> Vector:
        """Whether this or the other one is none."""
        return self._new(self.builder.fcmp_unordered("uno", self.value, other.value))

    def __and__(self, other: Vector) -> Vector:
        return self._new(self.builder.and_(self.value, other.value))

    def __or__(self, other: Vector) -> Vector:
        return self._new(self.builder.or_(self.value, other.value))

    def __xor__(self, other: Vector) -> Vector:
        return self._new(self.builder.xor(self.value, other.value))

    def __invert__(self) -> Vector:
        return self._new(self.builder.not_(self.value))

    def size(self) -> Vector:
        return self._call("llvm.fabs", self)

    def times_plus(self, factor: Vector, addend: Vector) -> Vector:
        """Rounded once."""
        return self._call("llvm.fma", self, factor, addend)

    def _call(self, name: str, *operands: Vector) -> Vector:
        vector = self.value.type
        bits = 64 if vector.element == _F64 else 32
        kind = ir.FunctionType(vector, [vector] * len(operands))
        name = f"{name}.v{vector.count}f{bits}"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self._new(self.builder.call(function, [x.value for x in operands]))

    def where(self, yes: Vector, no: Vector) -> Vector:
        """Of an answer: the lanes of `yes` where it holds."""
        return self._new(self.builder.select(self.value, yes.value, no.value))

    def larger(self, other: Vector) -> Vector:
        """This one if either is no number; so written, one operation does it."""
        above = self._new(self.builder.fcmp_ordered(">", other.value, self.value))
        return above.where(other, self)

    def smaller(self, other: Vector) -> Vector:
        """`other` where this is no number."""
        return (self < other).where(self, other)

    def floats(self) -> Vector:
        """Of doubles."""
        return self._new(self.builder.fptrunc(self.value, _FLOATS))

    def sum_and_rest(self, other: Vector) -> tuple[Vector, Vector]:
        """Knuth's sum of two numbers and what its rounding dropped."""
        total = self + other
        part = total - self
        return total, (self - (total - part)) + (other - part)

    def to_float32(self) -> Vector:
        """Rounded to FP32's 24 bits; for numbers in its normal range."""
        return self._new(self.builder.fpext(self.builder.fptrunc(self.value, _FLOATS), _DOUBLES))

    def words(self) -> Vector:
        kind = self.value.type
        word = _I64 if kind.element == _F64 else _I32
        return self._new(self.builder.bitcast(self.value, ir.VectorType(word, kind.count)))

    def numbers(self) -> Vector:
        """Of words."""
        kind = self._number_type()
        return self._new(self.builder.bitcast(self.value, kind))

    def counted(self) -> Vector:
        """Of words: the numbers that they count."""
        return self._new(self.builder.uitofp(self.value, self._number_type()))

    def counted_with_sign(self) -> Vector:
        """As `counted`, of words with sign."""
        return self._new(self.builder.sitofp(self.value, self._number_type()))

    def integers(self) -> Vector:
        """Of floats: words with sign, rounded toward zero."""
        words = ir.VectorType(_I32, self.value.type.count)
        return self._new(self.builder.fptosi(self.value, words))

    def with_sign_of(self, words: Vector) -> Vector:
        """Of words that are not negative: their negatives where another word is less than 0."""
        sign = words.signs()
        return (self ^ sign).minus_words(sign)

    def _number_type(self) -> ir.VectorType:
        words = self.value.type
        return ir.VectorType(_F64 if words.element == _I64 else _F32, words.count)

    def plus_words(self, other: Vector) -> Vector:
        return self._new(self.builder.add(self.value, other.value))

    def minus_words(self, other: Vector) -> Vector:
        return self._new(self.builder.sub(self.value, other.value))

    def shifted_up(self, by: Vector) -> Vector:
        return self._new(self.builder.shl(self.value, by.value))

    def shifted_down(self, by: Vector) -> Vector:
        return self._new(self.builder.lshr(self.value, by.value))

    def shifted_out(self, by: Vector) -> Vector:
        """As `shifted_down`, by any number of places without sign."""
        words = self.value.type
        bits = Vector(self.builder, ir.Constant(words, [words.element.width] * words.count))
        zero = Vector(self.builder, ir.Constant(words, [0] * words.count))
        return by.less_word(bits).where(self.shifted_down(by), zero)

    def signs(self) -> Vector:
        """Of words: all bits of those whose first one is set."""
        last = ir.Constant(
            self.value.type, [self.value.type.element.width - 1] * self.value.type.count
        )
        return self._new(self.builder.ashr(self.value, last))

    def same_words(self, other: Vector) -> Vector:
        return self._new(self.builder.icmp_unsigned("==", self.value, other.value))

    def less_word(self, other: Vector) -> Vector:
        """Of words without sign."""
        return self._new(self.builder.icmp_unsigned("<", self.value, other.value))

    def larger_word(self, other: Vector) -> Vector:
        return self.less_word(other).where(other, self)

    def less_integer(self, other: Vector) -> Vector:
        """Of words with sign."""
        return self._new(self.builder.icmp_signed("<", self.value, other.value))

    def larger_integer(self, other: Vector) -> Vector:
        return self.less_integer(other).where(other, self)

    def smaller_integer(self, other: Vector) -> Vector:
        return self.less_integer(other).where(self, other)

    def largest_word(self) -> ir.Value:
        """Of words without sign."""
        return self._one("umax")

    def least_word(self) -> ir.Value:
        return self._one("umin")

    def _one(self, name: str) -> ir.Value:
        words = self.value.type
        kind = ir.FunctionType(words.element, [words])
        name = f"llvm.vector.reduce.{name}.v{words.count}i{words.element.width}"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [self.value])

    def smaller_word(self, other: Vector) -> Vector:
        return self.less_word(other).where(self, other)

    def to_floats(self, upper: Vector) -> Vector:
        """This vector of doubles and another, as one of floats."""
        halves = [self.builder.fptrunc(x.value, _FLOATS) for x in (self, upper)]
        both = ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), list(range(2 * LANES)))
        return self._new(self.builder.shuffle_vector(*halves, both))

    def doubles(self) -> Vector:
        """Of `LANES` floats."""
        return self._new(self.builder.fpext(self.value, _DOUBLES))

    def halves(self) -> Vector:
        """Of words of 32 bits: twice as many of 16."""
        short = ir.VectorType(ir.IntType(16), 2 * self.value.type.count)
        return self._new(self.builder.bitcast(self.value, short))

    def to_integers(self) -> tuple[Vector, Vector]:
        """Of a vector of 16-bit integers, the first half and the second as integers of 32."""
        none, count = ir.Constant(self.value.type, ir.Undefined), self.value.type.count // 2
        places = ir.VectorType(_I32, count)
        starts = [ir.Constant(places, list(range(i, i + count))) for i in (0, count)]
        halves = [self.builder.shuffle_vector(self.value, none, start) for start in starts]
        low, high = (self._new(self.builder.sext(half, places)) for half in halves)
        return low, high

    def to_doubles(self) -> tuple[Vector, Vector]:
        """Of a vector of floats, the first half and the second."""
        none = ir.Constant(self.value.type, ir.Undefined)
        places = [ir.Constant(_PLACES, list(range(i, i + LANES))) for i in (0, LANES)]
        halves = [self.builder.shuffle_vector(self.value, none, place) for place in places]
        low, high = (self._new(self.builder.fpext(half, _DOUBLES)) for half in halves)
        return low, high

    def bits(self) -> ir.Value:
        """Of an answer: an integer with a bit for each lane, the first one the lowest."""
        short = self.builder.bitcast(self.value, ir.IntType(self.value.type.count))
        return self.builder.zext(short, _I64)


class Emitter:
    """What an inlined function has in its hands: constants, memory and loops. Its numbers are
    doubles; those of `floats` are FP32, twice as many to a vector.
    """

    def __init__(self, builder: ir.IRBuilder, element: ir.Type = _F64, lanes: int = LANES) -> None:
        self.builder, self.element = builder, element
        self.vector = ir.VectorType(element, lanes)

    def floats(self, lanes: int = 2 * LANES) -> Emitter:
        return Emitter(self.builder, _F32, lanes)

    def bound(self, up: bool, x: Vector, y: Vector, z: Vector) -> Vector:
        """`x y + z` rounded to that side, where a processor `ROUNDS_BY_INSTRUCTION`."""
        kind = ir.FunctionType(_DOUBLES, [_DOUBLES] * 3 + [_I32])
        function = cgutils.get_or_insert_function(
            self.builder.module, kind, "llvm.x86.avx512.vfmadd.pd.512"
        )
        mode = ir.Constant(_I32, _UP if up else _DOWN)
        return Vector(self.builder, self.builder.call(function, [x.value, y.value, z.value, mode]))

    def control(self) -> ir.Value:
        """The processor's control word: MXCSR (Intel 64 manual, volume 1, 10.2.3) or FPCR (Arm
        Architecture Reference Manual, C5.2).
        """
        if _IS_X86:
            return self._mxcsr("llvm.x86.sse.stmxcsr", self.integer(0))
        return self.call("llvm.aarch64.get.fpcr", _I64)

    def set_control(self, word: ir.Value) -> None:
        if _IS_X86:
            self._mxcsr("llvm.x86.sse.ldmxcsr", word)
        else:
            self.call("llvm.aarch64.set.fpcr", ir.VoidType(), word)

    def _mxcsr(self, name: str, word: ir.Value) -> ir.Value:
        """Set or read by way of memory."""
        place = cgutils.alloca_once(self.builder, _I32)  # as long as the word, for it is forwarded
        self.builder.store(self.builder.trunc(word, _I32), place)
        byte = ir.IntType(8).as_pointer()
        self.call(name, ir.VoidType(), self.builder.bitcast(place, byte))
        return self.builder.zext(self.builder.load(place), _I64)

    def number(self, value: float) -> Vector:
        return Vector(self.builder, ir.Constant(self.vector, [value] * self.vector.count))

    def word(self, value: int) -> Vector:
        words = ir.VectorType(_I64 if self.element == _F64 else _I32, self.vector.count)
        return Vector(self.builder, ir.Constant(words, [value] * words.count))

    def all_words_equal(self, scalar: ir.Value) -> Vector:
        return self.all_equal(self.builder.bitcast(scalar, self.element)).words()

    def all_equal(self, scalar: ir.Value) -> Vector:
        none = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(none, scalar, ir.Constant(ir.IntType(32), 0))
        lanes = self.vector.count
        same = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return Vector(self.builder, self.builder.shuffle_vector(one, none, same))

    def integer(self, value: int) -> ir.Value:
        return ir.Constant(_I64, value)

    def at(self, address: ir.Value) -> ir.Value:
        return self.builder.inttoptr(address, self.element.as_pointer())

    def place(self, pointer: ir.Value, *terms: ir.Value | int) -> ir.Value:
        """`pointer` further by so many numbers."""
        for term in terms:
            offset = self.integer(term) if isinstance(term, int) else term
            pointer = self.builder.gep(pointer, [offset])
        return pointer

    def times(self, x: ir.Value, y: ir.Value | int) -> ir.Value:
        return self.builder.mul(x, self.integer(y) if isinstance(y, int) else y)

    def load(self, pointer: ir.Value) -> Vector:
        value = self.builder.load(self.builder.bitcast(pointer, self.vector.as_pointer()))
        value.align = 8 if self.element == _F64 else 4
        return Vector(self.builder, value)

    def load_short(self, pointer: ir.Value) -> Vector:
        """16-bit words, as the upper halves of words of 32."""
        short = ir.VectorType(ir.IntType(16), self.vector.count)
        value = self.builder.load(self.builder.bitcast(pointer, short.as_pointer()))
        value.align = 2
        upper = self.word(16).value
        return Vector(self.builder, self.builder.shl(self.builder.zext(value, upper.type), upper))

    def store_short(self, words: Vector, pointer: ir.Value) -> None:
        """The upper halves of words of 32 bits."""
        short = ir.VectorType(ir.IntType(16), self.vector.count)
        upper = self.builder.trunc(words.shifted_down(self.word(16)).value, short)
        where = self.builder.bitcast(pointer, short.as_pointer())
        self.builder.store(upper, where).align = 2

    def load_all_equal(self, pointer: ir.Value) -> Vector:
        return self.all_equal(self.builder.load(pointer))

    def store(self, vector: Vector, pointer: ir.Value) -> None:
        where = self.builder.bitcast(pointer, self.vector.as_pointer())
        self.builder.store(vector.value, where).align = 8 if self.element == _F64 else 4

    def variable(self, start: Vector) -> ir.Value:
        """A place whose value LLVM keeps in a register."""
        place = cgutils.alloca_once(self.builder, start.value.type)
        self.builder.store(start.value, place)
        return place

    def integer_variable(self, start: int) -> ir.Value:
        place = cgutils.alloca_once(self.builder, _I64)
        self.builder.store(self.integer(start), place)
        return place

    def get(self, place: ir.Value) -> Vector:
        return Vector(self.builder, self.builder.load(place))

    def put(self, place: ir.Value, vector: Vector) -> None:
        self.builder.store(vector.value, place)

    def loop(self, count: ir.Value) -> Any:
        """`with emitter.loop(count) as index:`"""
        return _Loop(cgutils.for_range(self.builder, count))

    @contextmanager
    def loop_with_end(self, count: ir.Value) -> Iterator[tuple[ir.Value, Callable[[], None]]]:
        """As `loop`; the function ends it."""
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index, loop.do_break

    def when(self, condition: ir.Value) -> Any:
        """`with emitter.when(bits):` what is done if the integer is not zero."""
        return self.builder.if_then(
            self.builder.icmp_unsigned("!=", condition, self.integer(0)), likely=False
        )

    def unless(self, condition: ir.Value) -> Any:
        """`with emitter.unless(bits):` what is done if the integer is zero."""
        return self.builder.if_then(
            self.builder.icmp_unsigned("==", condition, self.integer(0)), likely=True
        )

    def call(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(result, [x.type for x in operands])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, operands)


class _Loop:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> ir.Value:
        return self.inner.__enter__().index

    def __exit__(self, *error: Any) -> Any:
        return self.inner.__exit__(*error)


def inline(result: bool) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `function(emitter, *operands)` becomes `function((*operands,))` in compiled
    code, where operands are 64-bit integers, addresses among them (`array.ctypes.data`), and so is
    the result, if there is one.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @intrinsic
        def compiled(context: Any, operands: Any) -> Any:
            def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                values = cgutils.unpack_tuple(builder, arguments[0], len(operands))
                found = function(Emitter(builder), *values)
                return found if result else context.get_dummy_value()

            return (types.int64 if result else types.void)(operands), emit

        return compiled

    return decorate


@inline(result=False)
def align_stack(emit: Emitter) -> None:
    """Let the stack of this function begin at a line of the cache: vectors for which there are no
    registers are then not across two lines, which takes longer, let alone two pages.
    """
    builder = emit.builder
    with builder.goto_entry_block():
        place = builder.alloca(_I64)
    place.align = 64
    builder.asm(ir.FunctionType(ir.VoidType(), [place.type]), "", "r", [place], True)


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """Of an address, what `numba.carray` takes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), emit
