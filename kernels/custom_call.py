"""`kernels.native`, `kernels.native_aligned`, `kernels.native_chain` and `kernels.native_sums` as
custom calls of XLA:CPU, which XLA's own threads share among themselves.

XLA calls a function of C with one structure (`xla/ffi/api/c_api.h`, which jaxlib ships; its layout
is kept for as long as the version's first number is). Numba compiles such a function; the places of
what is read from the structure are named below.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array
from llvmlite import binding as llvm
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels import native, native_aligned, native_chain, native_sums
from kernels import operands as reading
from kernels.arithmetic import Arithmetic
from kernels.compiled import ALIGNED, CHAIN, FUSED, SUMS
from kernels.native_operands import BF16, FP16, FP32
from kernels.operands import FRACTION_BITS, LOWEST_EXPONENT
from kernels.vectors import COMPILED, INLINED, pointer

# Offsets in bytes. A call frame:
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 8, 16, 24, 72, 112, 160
# The frame of a call that asks for the version: type of its extension, and where to write.
_TYPE, _METADATA, _VERSION, _IS_METADATA = 8, 24, 24, 1
# A buffer:
_DATA, _DIMENSIONS = 24, 40
# An array among the attributes:
_ARRAY_DATA = 16
# The API's version and functions:
_API_VERSION, _DESTROY, _SCHEDULE, _THREADS = 32, 64, 136, 144
_SCHEDULE_SIZE, _THREADS_SIZE = 40, 32  # of their arguments

# A job, 64-bit words: the next tile, tiles done, threads that may still look at it, and the rest.
_NEXT, _DONE, _USERS, _TILES, _OPTIONS, _A, _B, _C, _OUT, _ROWS, _COLUMNS, _SIZE = range(12)
_ITEMS = _ROWS  # of a tile of sums

_OPTION_COUNT = 5  # after `form`; who has fewer is given zeros
_WORTH = 1 << 18  # multiply-adds that are worth another thread
_WORTH_OF_SUMS = 1 << 16  # numbers that are
_TILES_PER_THREAD = 4

_IS_LINUX, _LARGE_PAGE, _HUGE = sys.platform == "linux", 1 << 21, 14  # MADV_HUGEPAGE of <mman.h>


@intrinsic
def _load(context: Any, address: Any) -> Any:
    """The 64-bit word at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), emit


@intrinsic
def _save(context: Any, address: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[1], pointer)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def _add(context: Any, address: Any, value: Any) -> Any:
    """What the word at an address was before `value` was added, as one operation."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def _call(context: Any, function: Any, argument: Any) -> Any:
    """A function of C at an address, of one pointer."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

    return types.int64(types.int64, types.int64), emit


_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_pause = types.ExternalFunction("sched_yield", types.int32())
_advise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


@njit(**COMPILED)
def _size_of(buffer: int, dimension: int) -> int:
    size: int = _load(_load(buffer + _DIMENSIONS) + 8 * dimension)
    return size


@njit(**COMPILED)
def _shape(buffer: int) -> tuple[int, int, int]:
    return _size_of(buffer, 0), _size_of(buffer, 1), _size_of(buffer, 2)


@njit(**COMPILED)
def _words(buffer: int) -> Any:
    return carray(pointer(_load(buffer + _DATA)), _shape(buffer), np.uint32)


@njit(**COMPILED)
def _operands(job: int) -> Any:
    """What `compute` takes of a job but the options: k, two addresses, C and the result."""
    a, b = _load(job + 8 * _A), _load(job + 8 * _B)
    c, out = _words(_load(job + 8 * _C)), _words(_load(job + 8 * _OUT))
    return _load(a + _DATA), _load(b + _DATA), _shape(a)[2], c, out


def _worker(room: Any) -> Any:
    """Tiles of a job, as long as there are any that nobody has, by `kernels.native` or another."""
    buffers_for, compute = room.buffers_for, room.compute

    @njit(**INLINED)
    def work(job: int) -> None:
        tiles = _load(job + 8 * _TILES)
        number = _add(job + 8 * _NEXT, 1)
        if number >= tiles:
            return
        at = _load(job + 8 * _OPTIONS)
        form = _load(at), _load(at + 8), _load(at + 16)
        options = _load(at + 24), _load(at + 32), _load(at + 40), _load(at + 48), _load(at + 56)
        a, b, k, c, out = _operands(job)
        tile = _load(job + 8 * _ROWS), _load(job + 8 * _COLUMNS)
        buffers = buffers_for(tile, options[0])
        while number < tiles:
            compute(a, b, k, c, out, form, options, number, tile, buffers)
            _add(job + 8 * _DONE, 1)
            number = _add(job + 8 * _NEXT, 1)

    return work


_work, _work_on_chains, _work_on_aligned = map(_worker, (native, native_chain, native_aligned))


@njit(**COMPILED)
def _shape_of_sums(options: int) -> tuple[int, int, int, int]:
    """After kind, cuts and depth."""
    outer, rows = _load(options + 24), _load(options + 32)
    return outer, rows, _load(options + 40), _load(options + 48)


@njit(**COMPILED)
def _items(options: int, ends: int) -> int:
    outer, _, inner, count = _shape_of_sums(options)
    parts = native_sums.chunks(count, _load(options + 8))
    items: int = outer * inner * _size_of(ends, 0) * parts
    return items


@njit(**COMPILED)
def _work_on_sums(job: int) -> None:
    """As `_work`."""
    tiles = _load(job + 8 * _TILES)
    number = _add(job + 8 * _NEXT, 1)
    if number >= tiles:
        return
    at = _load(job + 8 * _OPTIONS)
    kind, cuts, depth = _load(at), _load(at + 8), _load(at + 16)
    values, ends = _load(job + 8 * _A), _load(job + 8 * _C)
    tokens, out = _load(_load(job + 8 * _B) + _DATA), _load(_load(job + 8 * _OUT) + _DATA)
    arrays = _load(values + _DATA), _shape_of_sums(at), tokens, _load(ends + _DATA)
    results, items = _size_of(ends, 0), _items(at, ends)
    per_tile, stack = _load(job + 8 * _ITEMS), native_sums.stack_for(depth)
    while number < tiles:
        first, last = number * per_tile, min(items, (number + 1) * per_tile)
        native_sums.compute(*arrays, results, out, kind, cuts, first, last, stack)
        _add(job + 8 * _DONE, 1)
        number = _add(job + 8 * _NEXT, 1)


@njit(**COMPILED)
def _leave(job: int) -> None:
    """The last one to leave puts the light out: a thread may come when all is done."""
    if _add(job + 8 * _USERS, -1) == 1:
        _free(job)


_TASKS = {name: f"{name}_task" for name in (FUSED, CHAIN, SUMS, ALIGNED)}


def _address_of(task: str) -> Any:
    """Where a task is in this process: a name is looked up when code comes from a cache."""

    @intrinsic
    def address(context: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
            function = cgutils.get_or_insert_function(builder.module, kind, task)
            return builder.ptrtoint(function, ir.IntType(64))

        return types.int64(), emit

    return address


_fused_task, _chain_task, _sums_task, _aligned_task = (
    _address_of(task) for task in _TASKS.values()
)


@njit(**COMPILED)
def _threads(api: int, context: int) -> int:
    """How many threads XLA has; 1 if it does not say."""
    arguments = np.zeros(5, np.int64)
    arguments[0], arguments[2] = _THREADS_SIZE, context
    arguments[3] = np.int64(arguments.ctypes.data) + 32
    error = _call(_load(api + _THREADS), np.int64(arguments.ctypes.data))
    return max(1, arguments[4]) if error == 0 else _forgotten(api, error)


@njit(**COMPILED)
def _forgotten(api: int, error: int) -> int:
    arguments = np.zeros(3, np.int64)
    arguments[0], arguments[2] = 24, error
    _call(_load(api + _DESTROY), np.int64(arguments.ctypes.data))
    return 1


@njit(**COMPILED)
def _schedule(api: int, context: int, task: int, job: int) -> None:
    arguments = np.zeros(5, np.int64)
    arguments[0], arguments[2], arguments[3], arguments[4] = _SCHEDULE_SIZE, context, task, job
    _add(job + 8 * _USERS, 1)
    error = _call(_load(api + _SCHEDULE), np.int64(arguments.ctypes.data))
    if error != 0:
        _forgotten(api, error)
        _leave(job)


@njit(**COMPILED)
def _in_large_pages(address: int, size: int) -> None:
    """Asks Linux for pages of 2 MiB where these bytes, all of which are written, have no memory
    yet: to get it page by page takes as long as a small product.
    """
    first = -(-address // _LARGE_PAGE) * _LARGE_PAGE
    whole = (address + size - first) // _LARGE_PAGE
    if _IS_LINUX and whole > 0:
        _advise(first, whole * _LARGE_PAGE, _HUGE)


@njit(**COMPILED)
def _asks_for_version(frame: int) -> bool:
    """Answers a call that is no work but asks for the API's version."""
    api, extension = _load(frame + _API), _load(frame + _EXTENSION)
    if extension == 0 or _load(extension + _TYPE) & 0xFFFFFFFF != _IS_METADATA:
        return False
    version = _load(api + _API_VERSION)  # its first number in the lower half
    _save(_load(extension + _METADATA) + _VERSION, version if version & 0xFFFFFFFF == 0 else 0)
    return True


@njit(**COMPILED)
def _job(frame: int) -> int:
    """A new job with three operands, a result and one attribute, an array of options."""
    operands, job = _load(frame + _ARGUMENTS), _malloc(8 * _SIZE)
    options = _load(_load(_load(frame + _ATTRIBUTES)) + _ARRAY_DATA)
    _save(job + 8 * _OPTIONS, options)
    _save(job + 8 * _A, _load(operands))
    _save(job + 8 * _B, _load(operands + 8))
    _save(job + 8 * _C, _load(operands + 16))
    _save(job + 8 * _OUT, _load(_load(frame + _RESULTS)))
    return int(job)


@njit(**COMPILED)
def _do(frame: int, task: int, job: int, threads: int, tiles: int) -> None:
    """A job's tiles, by so many threads at most; the job is gone then."""
    api, context = _load(frame + _API), _load(frame + _CONTEXT)
    _save(job + 8 * _NEXT, 0)
    _save(job + 8 * _DONE, 0)
    _save(job + 8 * _USERS, 1)
    _save(job + 8 * _TILES, tiles)
    for _ in range(min(threads, tiles) - 1):
        _schedule(api, context, task, job)
    _add(job + 8 * _USERS, 1)
    _call(task, job)
    while _add(job + 8 * _DONE, 0) < tiles:
        _pause()  # others are at their last tiles
    _leave(job)


@njit(**COMPILED)
def _handle(frame: int, task: int, group: tuple[int, int]) -> int:
    """A call by XLA, with operands a, b and c, for a task whose tiles are of whole groups; the
    attribute is `form` and `options` of `compute`.
    """
    if _asks_for_version(frame):
        return 0
    job = _job(frame)
    out = _load(job + 8 * _OUT)
    shape = _shape(out)
    work = shape[0] * shape[1] * shape[2] * _shape(_load(job + 8 * _A))[2]
    threads = min(_threads(_load(frame + _API), _load(frame + _CONTEXT)), 1 + work // _WORTH)
    tile = native.cut(shape, _TILES_PER_THREAD * threads if threads > 1 else 1, group)
    tiles = shape[0] * -(-shape[1] // tile[0]) * -(-shape[2] // tile[1])
    _in_large_pages(_load(out + _DATA), 4 * shape[0] * shape[1] * shape[2])
    _save(job + 8 * _ROWS, tile[0])
    _save(job + 8 * _COLUMNS, tile[1])
    _do(frame, task, job, threads, tiles)
    return 0


@njit(**COMPILED)
def _handle_sums(frame: int, task: int) -> int:
    """As `_handle`, with operands values, tokens and ends, and options kind, cuts, the depth of the
    stack, and the values' shape.
    """
    if _asks_for_version(frame):
        return 0
    job = _job(frame)
    options = _load(job + 8 * _OPTIONS)
    items = _items(options, _load(job + 8 * _C))
    outer, rows, inner, count = _shape_of_sums(options)
    work = 1 + outer * rows * inner * count // _WORTH_OF_SUMS
    threads = min(_threads(_load(frame + _API), _load(frame + _CONTEXT)), work)
    per_tile = -(-items // (_TILES_PER_THREAD * threads if threads > 1 else 1))
    _save(job + 8 * _ITEMS, per_tile)
    _do(frame, task, job, threads, -(-items // per_tile))
    return 0


def _sources() -> str:
    """A digest of what is compiled: numba's cache looks only at the file of a cached function."""
    operands = "native_operands", "native_extents"
    in_parts = "native_extraction", "native_elements", "native_fixed_point"
    fused = "native_steps", "native_bounds", *in_parts, "native_careful", "native"
    chains = "native_chain_steps", "native_chain"
    aligned = "native_aligned_steps", "native_aligned"
    names = ("vectors", *operands, *fused, *chains, *aligned, "native_sums", "custom_call")
    texts = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(texts).hexdigest()


def _fused_entries(sources: str) -> tuple[Any, Any]:
    """Functions of C for a thread that helps and for XLA; numba's cache has them by `sources`."""

    @numba.cfunc(types.void(types.int64), cache=True)
    def task(job: int) -> None:
        if sources:
            _work(job)
            _leave(job)

    llvm.add_symbol(_TASKS[FUSED], task.address)

    @numba.cfunc(types.int64(types.int64), cache=True)
    def handler(frame: int) -> int:
        group = native.ROWS, native.COLUMNS
        return _handle(frame, _fused_task(), group) if sources else 0

    return task, handler


def _chain_entries(sources: str) -> tuple[Any, Any]:
    """As `_fused_entries`."""

    @numba.cfunc(types.void(types.int64), cache=True)
    def task(job: int) -> None:
        if sources:
            _work_on_chains(job)
            _leave(job)

    llvm.add_symbol(_TASKS[CHAIN], task.address)

    @numba.cfunc(types.int64(types.int64), cache=True)
    def handler(frame: int) -> int:
        group = native_chain.ROWS, native_chain.COLUMNS
        return _handle(frame, _chain_task(), group) if sources else 0

    return task, handler


def _sums_entries(sources: str) -> tuple[Any, Any]:
    """As `_fused_entries`."""

    @numba.cfunc(types.void(types.int64), cache=True)
    def task(job: int) -> None:
        if sources:
            _work_on_sums(job)
            _leave(job)

    llvm.add_symbol(_TASKS[SUMS], task.address)

    @numba.cfunc(types.int64(types.int64), cache=True)
    def handler(frame: int) -> int:
        return _handle_sums(frame, _sums_task()) if sources else 0

    return task, handler


def _aligned_entries(sources: str) -> tuple[Any, Any]:
    """As `_fused_entries`."""

    @numba.cfunc(types.void(types.int64), cache=True)
    def task(job: int) -> None:
        if sources:
            _work_on_aligned(job)
            _leave(job)

    llvm.add_symbol(_TASKS[ALIGNED], task.address)

    @numba.cfunc(types.int64(types.int64), cache=True)
    def handler(frame: int) -> int:
        group = native_aligned.ROWS, native_chain.COLUMNS
        return _handle(frame, _aligned_task(), group) if sources else 0

    return task, handler


_ENTRIES = {
    FUSED: _fused_entries,
    CHAIN: _chain_entries,
    SUMS: _sums_entries,
    ALIGNED: _aligned_entries,
}


@functools.cache
def register(name: str) -> tuple[Any, Any]:
    """Compiles the entries, or finds them in numba's cache, and names them to XLA. They must stay
    alive.
    """
    entries = _ENTRIES[name](_sources())
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(entries[1].ctypes), platform="cpu")
    return entries


def columns(arithmetic: Arithmetic) -> int:
    """Columns that are computed together: so many at least take the time."""
    return native_chain.COLUMNS if arithmetic.is_chain else native.COLUMNS


_KINDS = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


def accumulate(
    a: Array, b: Array, c: Array | None, arithmetic: Arithmetic, turned: bool = False
) -> Array:
    """FP32 `a[batch, m, k] @ b[batch, k, n] + c[batch, m, n]` on a CPU, after `register`.

    Args:
        turned: the operands are transposed and have changed places.
    """
    shape = a.shape[0], a.shape[1], b.shape[2]
    kept = FRACTION_BITS[a.dtype.name]
    if a.dtype == jnp.float32 and arithmetic.operand_fraction_bits is not None:
        kept = arithmetic.operand_fraction_bits
    cut = FRACTION_BITS[a.dtype.name] - kept
    flushed = a.dtype == jnp.float16 and arithmetic.subnormal_inputs == "flush"  # normal in FP32
    if arithmetic.specials == "saturate" or flushed:
        a, b, cut = reading.read(a, arithmetic), reading.read(b, arithmetic), 0
    form = [_KINDS[a.dtype.name], cut, arithmetic.operand_rounding == "nearest_even"]
    if arithmetic.is_chain:
        unit = (
            native_chain.FLUSH * (arithmetic.subnormal_results == "flush")
            + native_chain.PROPAGATE * (arithmetic.nan_rule == "propagate")
            + native_chain.TURNED * turned
            + native_chain.POSITIVE_ZERO * (arithmetic.zero == "positive")
            + native_chain.NARROW * (kept + 1 <= 12)
            + native_chain.QUICK * native_chain.keeps_quickly()
        )
        name, options = CHAIN, [arithmetic.products, unit, arithmetic.nan]
    elif arithmetic.fraction_bits is not None:
        grid = [arithmetic.fraction_bits, arithmetic.min_exponent or 0]
        lowest = LOWEST_EXPONENT[a.dtype.name]
        name, options = ALIGNED, [arithmetic.products, lowest, *grid, arithmetic.nan]
    else:
        saturates = arithmetic.overflow == "saturate"
        name, options = FUSED, [arithmetic.products, kept + 1, saturates, arithmetic.nan]
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32))
    found: Array = call(
        a,
        b,
        jnp.zeros((0, 0, 0), jnp.float32) if c is None else c,
        options=np.array([*form, *options, *[0] * (_OPTION_COUNT - len(options))], np.int64),
    )
    return found


def ordered_sums(values: Array, tokens: Array, ends: Array, cuts: int, depth: int) -> Array:
    """FP32 or BF16 `[len(ends) / cuts, outer, inner, count]` of `values[outer, rows, inner, count]`
    on a CPU, after `register`; see `kernels.native_sums`.
    """
    outer, _, inner, count = values.shape
    shape = ends.shape[0] // cuts, outer, inner, count
    call = jax.ffi.ffi_call(SUMS, jax.ShapeDtypeStruct((math.prod(shape),), values.dtype))
    options = np.array([_KINDS[values.dtype.name], cuts, depth, *values.shape], np.int64)
    # Flat: XLA might copy an array only for the places of dimensions of size 1.
    found: Array = call(values.reshape(-1), tokens, ends, options=options)
    return found.reshape(shape)
