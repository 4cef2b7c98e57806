"""XLA's partitioner, asked for 384 devices that nobody has.

A CPU client can be made with any number of devices. The program is compiled for as many partitions
as its mesh has; XLA's partitioner divides it, and XLA writes down the module as it stands then,
with the dtypes the program has (what follows is the CPU's own: sums of BF16 in FP32, for one). A
call of a function that does not exist then ends the compilation before machine code is made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.interpreters import mlir
from jax._src.lax import linalg
from jax._src.random import threefry2x32
from jax._src.random.prng import iota_2x32_shape_p
from jax.extend import core
from jaxlib import _hlo, _jax, xla_client  # type: ignore[attr-defined]
from jaxlib.mlir import ir
from numpy.typing import NDArray

from emulator.program import callback_calls, linalg_calls
from emulator.program.hlo_channels import with_own_channels
from emulator.program.replica_groups import replica_groups
from emulator.program.stablehlo_rules import STOP

#: The partitioner's pass, as XLA names it.
_PASS = "spmd-partitioning"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Partitioned:
    """The program of one device. `ins` and `outs` are the tiles of each argument and result:
    partitions [*tiles of the dimensions, copies]; None where every device has the whole.
    `groups` are those of its collectives, by channel: partitions [group, rank]. `calls` are its
    factorisations and calls to the host, by the name of the call that stands for one.
    """

    module: Any
    ins: tuple[NDArray[np.int64] | None, ...]
    outs: tuple[NDArray[np.int64] | None, ...]
    groups: dict[int, NDArray[np.int64]]
    calls: linalg_calls.Calls


def partition(
    jaxpr: core.ClosedJaxpr,
    ins: Sequence[Any],
    outs: Sequence[Any],
    count: int,
) -> Partitioned:
    """`jaxpr` over `count` devices. Constants of the jaxpr are its first arguments here.

    `ins` (constants included) and `outs` are shardings, or None where XLA may choose.

    Raises:
        ValueError: XLA or JAX rejects the program.
    """
    calls: linalg_calls.Calls = {}
    lowered = _lower(jaxpr, ins, outs, calls)
    with tempfile.TemporaryDirectory(prefix="cm384-") as folder:
        module = lowered.compiler_ir("stablehlo")
        try:
            client = _client(count)
            devices = _jax.DeviceList(tuple(client.devices()[:count]))
            client.compile_and_load(module, devices, _options(folder, count, ins, outs), [])
        except Exception as error:  # always, because of the call that ends it
            failure = error
        found = sorted(Path(folder).glob(f"*.after_{_PASS}*.hlo.pb"))
        if not found:
            raise ValueError(f"XLA's partitioner refuses the program: {failure}") from failure
        data = with_own_channels(_first_field(found[-1].read_bytes()))
    hlo = _hlo.HloModule.from_serialized_hlo_module_proto(data)
    results = _parts(hlo.spmd_output_sharding, len(outs) + 1)
    parameters = hlo.spmd_parameters_shardings or [None] * len(ins)
    with mlir.make_ir_context():
        parsed = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(data))
        _drop_copies(parsed.operation)
    return Partitioned(
        module=parsed,
        ins=tuple(_tiles(s, count) for s in parameters),
        outs=tuple(_tiles(s, count) for s in results[: len(outs)]),
        groups=replica_groups(hlo.to_string()),
        calls=calls,
    )


def _lower(
    jaxpr: core.ClosedJaxpr, ins: Sequence[Any], outs: Sequence[Any], calls: linalg_calls.Calls
) -> Any:
    body = jaxpr.jaxpr
    n_consts = len(body.constvars)

    def program(*flat: Any) -> list[Any]:
        closed = core.ClosedJaxpr(body, list(flat[:n_consts]))
        results = core.jaxpr_as_fun(closed)(*flat[n_consts:])
        return [*results, jax.ffi.ffi_call(STOP, jax.ShapeDtypeStruct((), jnp.float32))()]

    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=s)
        for v, s in zip((*body.constvars, *body.invars), ins, strict=True)
    ]
    jitted = jax.jit(program, out_shardings=[*outs, None], keep_unused=True)
    own = (*linalg_calls.lowerings(calls), *callback_calls.lowerings(calls))
    rules: Any = (*_LOWERINGS, *own)
    with callback_calls.without_devices():
        return jitted.trace(*shapes).lower(
            lowering_platforms=("cpu",),
            _private_parameters=mlir.LoweringParameters(override_lowering_rules=rules),
        )


def _drop_copies(op: Any) -> None:
    """Takes what is copied for its copies, wherever in an operation: the partitioner makes some for
    types with meshes, among them of a loop's counter.
    """
    for block in (block for region in op.regions for block in region.blocks):
        for inner in [each.operation for each in block.operations]:
            if inner.name.endswith(".copy"):
                inner.results[0].replace_all_uses_with(inner.operands[0])
                inner.erase()
            else:
                _drop_copies(inner)


def _number(*, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The number of each element of an array, [*shape] in row-major order, as the upper and the
    lower half of 64 bits. JAX counts random bits so, in 64-bit words; here 32-bit words do.
    """
    high = low = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = math.prod(shape[dim + 1 :])
        index = lax.broadcasted_iota(jnp.uint32, shape, dim)
        part = index * jnp.uint32(stride & 0xFFFFFFFF)
        low = low + part
        if math.prod(shape) >= 2**32:
            high = high + _upper_half(index, stride) + (low < part).astype(jnp.uint32)
    return high, low


def _upper_half(x: Any, factor: int) -> Any:
    """Bits 32 and up of `x` (uint32) times a factor below 2^64, modulo 2^32."""
    below, above = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16 & 0xFFFF)
    x_low, x_high = x & 0xFFFF, x >> 16
    middle = x_high * below + (x_low * below >> 16)
    middle_2 = x_low * above + (middle & 0xFFFF)
    return (
        x_high * above
        + (middle >> 16)
        + (middle_2 >> 16)
        + x * jnp.uint32(factor >> 32 & 0xFFFFFFFF)
    )


#: Operations that JAX gives to libraries of the host, that need 64-bit words there, or that it
#: writes as loops to save the host's compiler work (an accelerator has the rounds in one kernel).
_LOWERINGS: Any = (
    (iota_2x32_shape_p, mlir.lower_fun(_number, multiple_results=True)),
    (threefry2x32.threefry2x32_p, threefry2x32._threefry2x32_lowering_rule),
    (linalg.cholesky_p, linalg._cholesky_lowering),
    (linalg.triangular_solve_p, linalg._triangular_solve_lowering),
)


def _options(folder: str, count: int, ins: Sequence[Any], outs: Sequence[Any]) -> Any:
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, count
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, count
    build.use_spmd_partitioning = True
    build.use_shardy_partitioner = bool(getattr(jax.config, "jax_use_shardy_partitioner", True))
    build.device_assignment = xla_client.DeviceAssignment.create(np.arange(count)[None])
    build.allow_spmd_sharding_propagation_to_parameters = [s is None for s in ins]
    build.allow_spmd_sharding_propagation_to_output = [s is None for s in outs] + [True]
    debug = build.debug_options
    debug.xla_dump_to = folder
    debug.xla_dump_hlo_pass_re = _PASS
    debug.xla_dump_hlo_as_proto = True
    return options


@functools.lru_cache(maxsize=4)
def _client(count: int) -> Any:
    return xla_client.make_cpu_client(num_devices=count)


def _first_field(message: bytes) -> bytes:
    """The module in a serialised HloProto: its first field, a length and as many bytes."""
    assert message[0] == 0x0A
    length = shift = 0
    for at in range(1, 12):
        length |= (message[at] & 0x7F) << shift
        shift += 7
        if message[at] < 0x80:
            return message[at + 1 : at + 1 + length]
    raise AssertionError("no length")


def _parts(sharding: Any, count: int) -> list[Any]:
    """The shardings of `count` results."""
    if sharding is None:
        return [None] * count
    parts = list(sharding.tuple_shardings)
    return parts if parts else [sharding]


def _tiles(sharding: Any, count: int) -> NDArray[np.int64] | None:
    if sharding is None:
        return None
    known = _hlo.HloSharding.from_proto(sharding)
    if "mesh[" in repr(known):  # JAX 0.11 names axes
        known = known.v3_to_v2_sharding()
    if known.is_replicated():
        return None
    if not known.is_tiled():
        raise NotImplementedError(
            f"the partitioner chose the sharding {known!r} for an argument or a result, which has "
            "no meaning here; give it a NamedSharding"
        )
    shape = list(known.tile_assignment_dimensions())
    if not known.replicate_on_last_tile_dim() and not known.subgroup_types():
        shape.append(1)
    elif len(known.subgroup_types()) > 1:
        raise NotImplementedError(f"the sharding {known!r} has no meaning here")
    return np.array(known.tile_assignment_devices(), np.int64).reshape(shape)
