"""Costs of matmuls and convolutions: their sizes on one device, given to the chip model."""

from __future__ import annotations

import dataclasses
import math

from emulator.chip import MatmulTime, lane_factor, matmul_time
from emulator.chip.arguments import dtype_name
from emulator.memory import Buffer
from emulator.program.graph import Node
from emulator.program.walker import Frame, Walker
from emulator.program.where import at, where
from emulator.timeline import Op


def dot(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    walker.note_replicated(frame, node.outs)
    out = node.outs[0]
    contracted, (batch, _) = node.params["dimension_numbers"]
    contract = contracted[0]
    shape = global_shape(node, 0)
    divided = walker.groups.size_of(walker.contracted(frame, node)) if frame.layouts else 1
    k = -(-math.prod(shape[d] for d in contract) // divided)
    out_shape = walker.shape(frame, out)
    b = math.prod(out_shape[: len(batch)])
    m = math.prod(out_shape[len(batch) : len(shape) - len(contract)])
    n = math.prod(out_shape[len(shape) - len(contract) :])
    types = [str(node.eqn.invars[0].aval.dtype), str(node.eqn.invars[1].aval.dtype)]
    along_k = [_innermost(frame, node, i) in dims for i, dims in enumerate(contracted)]
    layouts = ("nd" if along_k[0] else "nd_t", "nd_t" if along_k[1] else "nd")
    matmul(walker, frame, node, b, m, k, n, types, layouts)


def _innermost(frame: Frame, node: Node, operand: int) -> int:
    """The dimension of an operand along which neighbours lie side by side in memory."""
    last = len(global_shape(node, operand)) - 1
    v = node.ins[operand]
    return last if v is None else frame.plan.innermost.get(v, last)


def conv(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """A convolution is a matmul over kernel height x kernel width x channels in."""
    numbers, params = node.params["dimension_numbers"], node.params
    kernel = [global_shape(node, 1)[d] for d in numbers.rhs_spec]
    out = [walker.shape(frame, node.outs[0])[d] for d in numbers.out_spec]
    groups = params["feature_group_count"] * params["batch_group_count"]
    dilation = math.prod(params["lhs_dilation"] or (1,))
    k = -(-math.prod(kernel[2:]) * kernel[1] // dilation)
    m = out[0] * math.prod(out[2:])
    n = -(-out[1] // groups)
    types = [str(v.aval.dtype) for v in node.eqn.invars]
    matmul(walker, frame, node, groups, m, k, n, types)


def matmul(
    walker: Walker,
    frame: Frame,
    node: Node,
    b: int,
    m: int,
    k: int,
    n: int,
    types: list[str],
    layouts: tuple[str, str] = ("nd", "nd"),
) -> None:
    out = node.outs[0]
    label = f"{node.name} {m}x{k}x{n}" + (f" x{b}" if b > 1 else "")
    if not b * m * n * k:
        traffic = walker.write_bytes(frame, node)
        return walker.emit(frame, walker.kernel(label, "vector", 0, traffic, node), node)
    unit = unit_dtype(walker, types, node)
    if unit is None:  # integers of other widths have no matrix unit
        walker.assume(f"matmuls of {types[0]} x {types[1]} run on the vector units")
        ops = 2 * b * m * k * n * lane_factor(types[0], walker.on)
        traffic = walker.read_bytes(frame, node) + walker.write_bytes(frame, node)
        step = walker.kernel(label, "matmul", ops, traffic, node)
        return walker.emit(frame, dataclasses.replace(step, flops=2 * b * m * k * n), node)
    a_layout, b_layout = layouts
    time = matmul_time(
        *(m, k, n, walker.on, unit, b_layout, b, str(walker.dtype(frame, out))), a_layout=a_layout
    )
    walker.has_matmuls = True
    step = Op(
        name=label,
        kind="matmul",
        time_s=time.time_s,
        bound_s=time.bound_s,
        limited_by=time.limited_by,
        flops=time.flops,
        bytes=time.moved_bytes,
        matmul_s=time.flops / time.peak_flops_per_s,
        memory_s=time.bytes / walker.memory_rate,
        l2_bytes=time.l2_bytes,
        where=where(node.eqn),
        detail=f"{unit}, {time.utilization:.0%} of the matrix peak",
    )
    note_copies(walker, time)
    walker.emit(frame, step, node, scratch=partial_sums(time, at(label, node)))


def note_copies(walker: Walker, time: MatmulTime) -> None:
    if time.padded:
        walker.assume(
            "operands of matmuls whose rows are no whole lines are copied into padded ones, in "
            "memory that is free, where that is quicker"
        )


def partial_sums(time: MatmulTime, label: str) -> tuple[Buffer, ...]:
    """The workspace of a product whose K is divided among cores: FP32 sums of each part."""
    if time.split_k == 1:
        return ()
    shape = (time.split_k, time.batch, time.m, time.n)
    name = f"partial sums of {label}"
    return (Buffer(name=name, shape=shape, dtype="float32", bytes=4 * math.prod(shape)),)


def unit_dtype(walker: Walker, types: list[str], node: Node) -> str | None:
    """The matrix unit's mode for these operands; None for integers that it does not have."""
    precision = str(node.params.get("precision")).upper()
    rates = dict(walker.on.chip.matmul_peaks_flops_per_s)
    floats = set(types) <= {"bfloat16", "float16", "float32"}
    if floats and precision.endswith("BF16_BF16_F32"):
        return "bfloat16"
    if floats and precision.endswith(".F16_F16_F32"):
        return "float16"
    if set(types) <= {"bfloat16", "float16"}:
        return "bfloat16" if "bfloat16" in types else "float16"
    if len(set(types)) == 1 and types[0] in ("int8", "uint8"):
        return "int8"
    if len(set(types)) == 1 and types[0] in ("int4", "uint4"):
        if "int4" not in rates:
            return None
        walker.assume(
            "INT4 matmuls: as INT8 ones, with half the bytes and twice the rate (assumed: no times "
            "of INT4 kernels are public)"
        )
        return "int4"
    if floats:
        if precision.endswith("TF32_TF32_F32"):  # HF32 and TF32 are the units' reduced modes
            return next(mode for mode in ("hf32", "tf32", "float32") if mode in rates)
        exact = "HIGHEST" in precision or precision.endswith(".F32_F32_F32")
        return "float32" if exact else walker.on.chip.fp32_mode
    narrow = {dtype_name(t) for t in types}
    if narrow in ({"float8"}, {"float4"}) and narrow <= set(rates):
        (mode,) = narrow
        walker.assume(
            f"{mode} matmuls: as BF16 ones, with fewer bytes and the rate of the data sheet "
            "(assumed: none was measured)"
        )
        return mode
    if all(t.startswith(("int", "uint", "bool")) for t in types):
        return None
    raise NotImplementedError(
        f"{node.name} of {types[0]} x {types[1]} at {where(node.eqn) or node.path}: the matrix "
        f"unit of {walker.on.chip.name} has no such mode"
    )


def global_shape(node: Node, operand: int) -> tuple[int, ...]:
    return tuple(node.eqn.invars[operand].aval.shape)
