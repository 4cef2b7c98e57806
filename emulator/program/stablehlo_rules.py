"""StableHLO operations as those of `jax.lax`; what is in no table here has no translation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from emulator.program import callback_calls
from emulator.program.stablehlo_constants import direction, dtype_of, shape_of

_Rule = Callable[..., Any]


def ints(op: Any, name: str) -> list[int]:
    """An attribute that lists integers, in either of the ways MLIR keeps them."""
    attribute = op.attributes[name]
    if isinstance(attribute, ir.DenseIntElementsAttr):
        return [int(x) for x in np.array(ir.DenseIntElementsAttr(attribute)).reshape(-1)]
    return [int(x) for x in attribute]


def _optional(op: Any, name: str, default: list[int]) -> list[int]:
    return ints(op, name) if name in op.attributes else default


def _flag(op: Any, name: str) -> bool:
    return name in op.attributes and bool(op.attributes[name].value)


# Element by element.

_SAME: dict[str, _Rule] = {
    "abs": lax.abs,
    "add": lax.add,
    "and": lax.bitwise_and,
    "atan2": lax.atan2,
    "cbrt": lax.cbrt,
    "ceil": lax.ceil,
    "clamp": lax.clamp,
    "complex": lax.complex,
    "cosine": lax.cos,
    "count_leading_zeros": lax.clz,
    "divide": lax.div,
    "erf": lax.erf,
    "erf_inv": lax.erf_inv,
    "exponential": lax.exp,
    "exponential_minus_one": lax.expm1,
    "floor": lax.floor,
    "imag": lax.imag,
    "is_finite": lax.is_finite,
    "log": lax.log,
    "log_plus_one": lax.log1p,
    "logistic": lax.logistic,
    "maximum": lax.max,
    "minimum": lax.min,
    "multiply": lax.mul,
    "negate": lax.neg,
    "not": lax.bitwise_not,
    "or": lax.bitwise_or,
    "popcnt": lax.population_count,
    "power": lax.pow,
    "real": lax.real,
    "remainder": lax.rem,
    "round_nearest_even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "round_nearest_afz": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "rsqrt": lax.rsqrt,
    "select": lax.select,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
    "sign": lax.sign,
    "sine": lax.sin,
    "sqrt": lax.sqrt,
    "subtract": lax.sub,
    "tan": lax.tan,
    "tanh": lax.tanh,
    "xor": lax.bitwise_xor,
    # An inverse that XLA keeps as one operation.
    "acos": lax.acos,
    "acosh": lax.acosh,
    "asin": lax.asin,
    "asinh": lax.asinh,
    "atanh": lax.atanh,
    "cosh": lax.cosh,
    "sinh": lax.sinh,
}
_COMPARE: dict[str, _Rule] = {
    "EQ": lax.eq,
    "NE": lax.ne,
    "LT": lax.lt,
    "LE": lax.le,
    "GT": lax.gt,
    "GE": lax.ge,
}


def _compare(t: Any, op: Any, a: Any, b: Any) -> Any:
    if "TOTALORDER" in str(op.attributes.get("compare_type", "")):
        way = direction(op)
        if way in ("GT", "GE"):
            a, b, way = b, a, {"GT": "LT", "GE": "LE"}[way]
        primitives = {"LT": lax.lt_to_p, "LE": lax.le_to_p, "EQ": lax.eq_to_p}
        if way not in primitives:
            raise NotImplementedError(f"a compare {way} in total order has no rule here")
        return primitives[way].bind(a, b)
    return _COMPARE[direction(op)](a, b)


def _convert(t: Any, op: Any, x: Any) -> Any:
    return lax.convert_element_type(x, dtype_of(op.results[0].type))


def _reduce_precision(t: Any, op: Any, x: Any) -> Any:
    return lax.reduce_precision(
        x, op.attributes["exponent_bits"].value, op.attributes["mantissa_bits"].value
    )


# Shape and place.


def _broadcast_in_dim(t: Any, op: Any, x: Any) -> Any:
    shape = shape_of(op.results[0].type)
    return lax.broadcast_in_dim(x, shape, ints(op, "broadcast_dimensions"))


def _iota(t: Any, op: Any) -> Any:
    kind = op.results[0].type
    return lax.broadcasted_iota(
        dtype_of(kind), shape_of(kind), op.attributes["iota_dimension"].value
    )


def _slice(t: Any, op: Any, x: Any) -> Any:
    return lax.slice(x, *(ints(op, k) for k in ("start_indices", "limit_indices", "strides")))


def _pad(t: Any, op: Any, x: Any, fill: Any) -> Any:
    low, high, inner = (
        ints(op, k) for k in ("edge_padding_low", "edge_padding_high", "interior_padding")
    )
    return lax.pad(x, fill, list(zip(low, high, inner, strict=True)))


def _gather(t: Any, op: Any, x: Any, indices: Any) -> Any:
    numbers = stablehlo.GatherDimensionNumbers(op.attributes["dimension_numbers"])
    indices = _index_vector_last(indices, numbers.index_vector_dim)
    return lax.gather(
        x,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(numbers.offset_dims),
            collapsed_slice_dims=tuple(numbers.collapsed_slice_dims),
            start_index_map=tuple(numbers.start_index_map),
            operand_batching_dims=tuple(numbers.operand_batching_dims),
            start_indices_batching_dims=tuple(numbers.start_indices_batching_dims),
        ),
        slice_sizes=ints(op, "slice_sizes"),
        indices_are_sorted=_flag(op, "indices_are_sorted"),
        mode=lax.GatherScatterMode.CLIP,  # XLA moves starts into range
    )


def _index_vector_last(indices: Any, at: int) -> Any:
    if at == indices.ndim:
        return lax.expand_dims(indices, [at])
    return jnp.moveaxis(indices, at, -1)


_SCATTERS: dict[str, _Rule] = {
    "add": lax.scatter_add,
    "multiply": lax.scatter_mul,
    "minimum": lax.scatter_min,
    "maximum": lax.scatter_max,
    "": lax.scatter,
}


def _scatter(t: Any, op: Any, x: Any, indices: Any, updates: Any, *more: Any) -> Any:
    how = combiner(op)
    if more or how not in _SCATTERS:
        raise NotImplementedError(f"a scatter that combines values by {how!r} has no rule here")
    numbers = stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])
    indices = _index_vector_last(indices, numbers.index_vector_dim)
    return _SCATTERS[how](
        x,
        indices,
        updates,
        lax.ScatterDimensionNumbers(
            update_window_dims=tuple(numbers.update_window_dims),
            inserted_window_dims=tuple(numbers.inserted_window_dims),
            scatter_dims_to_operand_dims=tuple(numbers.scattered_dims_to_operand_dims),
            operand_batching_dims=tuple(numbers.input_batching_dims),
            scatter_indices_batching_dims=tuple(numbers.scatter_indices_batching_dims),
        ),
        indices_are_sorted=_flag(op, "indices_are_sorted"),
        unique_indices=_flag(op, "unique_indices"),
        mode=lax.GatherScatterMode.FILL_OR_DROP,  # XLA drops what is out of range
    )


# Matrix products.


def _precision(op: Any) -> Any:
    if "precision_config" not in op.attributes:
        return None
    names = re.findall(r"precision (\w+)", str(op.attributes["precision_config"]))
    if not names or set(names) == {"DEFAULT"}:
        return None
    return tuple(lax.Precision[name] for name in names)


def _algorithm(op: Any) -> lax.DotAlgorithmPreset | None:
    """The algorithm that a dot_general asks for by name."""
    if "algorithm" not in op.attributes:
        return None
    fields = dict(re.findall(r"(\w+) = (\w+)", str(op.attributes["algorithm"])))
    kinds = ("lhs_precision_type", "rhs_precision_type", "accumulation_type")
    name = "_".join(fields[kind].upper() for kind in kinds)
    once = {fields[f"{side}_component_count"] for side in ("lhs", "rhs")} == {"1"}
    if not once or name not in lax.DotAlgorithmPreset.__members__:
        raise NotImplementedError(
            f"a dot_general with {op.attributes['algorithm']} has no rule here; "
            "choose its arithmetic with em.emulate(arithmetic=...)"
        )
    return lax.DotAlgorithmPreset[name]


def _dot_general(t: Any, op: Any, a: Any, b: Any) -> Any:
    numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    contract = tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)
    batch = tuple(numbers.lhs_batching_dimensions), tuple(numbers.rhs_batching_dimensions)
    return lax.dot_general(
        a,
        b,
        (contract, batch),
        precision=_algorithm(op) or _precision(op),
        preferred_element_type=dtype_of(op.results[0].type),
    )


def _dot(t: Any, op: Any, a: Any, b: Any) -> Any:
    return lax.dot_general(
        a,
        b,
        (((a.ndim - 1,), (0,)), ((), ())),
        precision=_precision(op),
        preferred_element_type=dtype_of(op.results[0].type),
    )


def _convolution(t: Any, op: Any, x: Any, kernel: Any) -> Any:
    n = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    space = x.ndim - 2
    spatial = list(n.kernel_spatial_dimensions)
    turned = _optional(op, "window_reversal", [0] * space)
    if any(turned):
        kernel = lax.rev(kernel, [d for d, r in zip(spatial, turned, strict=True) if r])
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=_optional(op, "window_strides", [1] * space),
        padding=_pairs(op, "padding", space),
        lhs_dilation=_optional(op, "lhs_dilation", [1] * space),
        rhs_dilation=_optional(op, "rhs_dilation", [1] * space),
        dimension_numbers=lax.ConvDimensionNumbers(
            (n.input_batch_dimension, n.input_feature_dimension, *n.input_spatial_dimensions),
            (n.kernel_output_feature_dimension, n.kernel_input_feature_dimension, *spatial),
            (n.output_batch_dimension, n.output_feature_dimension, *n.output_spatial_dimensions),
        ),
        feature_group_count=op.attributes["feature_group_count"].value,
        batch_group_count=op.attributes["batch_group_count"].value,
        precision=_precision(op),
        preferred_element_type=dtype_of(op.results[0].type),
    )


# Reductions, windows, sorting.


def combiner(op: Any, region: int = 0) -> str:
    """The operation with which a region combines its two arguments, "" if it keeps the second, and
    "?" for anything else.
    """
    (block,) = op.regions[region].blocks
    *inner, end = (o.operation for o in block.operations)
    given = list(block.arguments)
    if not inner and list(end.operands) == given[1:]:
        return ""
    if len(inner) != 1 or len(given) != 2 or set(inner[0].operands) != set(given):
        return "?"
    return inner[0].name.removeprefix("stablehlo.")


_MONOIDS: dict[str, _Rule] = {
    "add": lax.add,
    "multiply": lax.mul,
    "maximum": lax.max,
    "minimum": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
}


def _reduce(t: Any, op: Any, *operands: Any) -> Any:
    dims = tuple(ints(op, "dimensions"))
    half = len(operands) // 2
    if half == 1 and (how := combiner(op)) in _MONOIDS:
        return lax.reduce(operands[0], operands[1], _MONOIDS[how], dims)
    combine = t.region(op.regions[0], {})
    return lax.reduce(operands[:half], operands[half:], lambda a, b: combine(*a, *b), dims)


def _window(op: Any, rank: int) -> dict[str, Any]:
    one = [1] * rank
    return {
        "window_dimensions": ints(op, "window_dimensions"),
        "window_strides": _optional(op, "window_strides", one),
        "padding": _pairs(op, "padding", rank),
    }


def _pairs(op: Any, name: str, rank: int) -> list[tuple[int, int]]:
    flat = _optional(op, name, [0] * 2 * rank)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _reduce_window(t: Any, op: Any, x: Any, init: Any, *more: Any) -> Any:
    if more:
        raise NotImplementedError("a reduce_window over several arrays has no rule here")
    combine = t.region(op.regions[0], {})
    one = [1] * x.ndim
    return lax.reduce_window(
        x,
        init,
        _MONOIDS.get(combiner(op), lambda a, b: combine(a, b)[0]),
        **_window(op, x.ndim),
        base_dilation=_optional(op, "base_dilations", one),
        window_dilation=_optional(op, "window_dilations", one),
    )


def _select_and_scatter(t: Any, op: Any, x: Any, source: Any, init: Any) -> Any:
    select, scatter = op.regions
    first = select.blocks[0].operations[0].operation
    if combiner(op, 1) != "add" or first.name != "stablehlo.compare" or np.any(init):
        raise NotImplementedError("a select_and_scatter that does not add has no rule here")
    ways = {"GE": lax.ge_p, "LE": lax.le_p}
    return lax.select_and_scatter_add_p.bind(
        source,
        x,
        select_prim=ways[direction(first)],
        **{k: tuple(v) for k, v in _window(op, x.ndim).items()},
    )


def _sort(t: Any, op: Any, *arrays: Any) -> Any:
    """A sort by JAX's own order: ascending by the first keys, or descending by one integer key."""
    (block,) = op.regions[0].blocks
    used = [i // 2 for i, a in enumerate(block.arguments) if len(list(a.uses))]
    keys = max(used) + 1
    last = [o.operation for o in block.operations if o.operation.name == "stablehlo.compare"]
    ways = {direction(o) for o in last} - {"EQ", "NE"}
    if not ways <= {"LT"}:
        raise NotImplementedError(
            f"a sort by {', '.join(sorted(ways))} has no rule here; sort ascending and reverse"
        )
    found = lax.sort(
        arrays,
        dimension=op.attributes["dimension"].value,
        is_stable=_flag(op, "is_stable"),
        num_keys=keys,
    )
    return list(found)


def _top_k(t: Any, op: Any, x: Any) -> Any:
    return lax.top_k(x, op.attributes["k"].value)


# The rest.


def _fft(t: Any, op: Any, x: Any) -> Any:
    kind = re.search(r"I?R?FFT", str(op.attributes["fft_type"]))
    assert kind is not None
    return lax.fft(x, kind[0], tuple(ints(op, "fft_length")))


def _triangular_solve(t: Any, op: Any, a: Any, b: Any) -> Any:
    turned = str(op.attributes["transpose_a"])
    return jax.lax.linalg.triangular_solve(
        a,
        b,
        left_side=_flag(op, "left_side"),
        lower=_flag(op, "lower"),
        transpose_a="NO_TRANSPOSE" not in turned,
        conjugate_a="ADJOINT" in turned,
        unit_diagonal=_flag(op, "unit_diagonal"),
    )


def _custom_call(t: Any, op: Any, *arrays: Any) -> Any:
    target = op.attributes["call_target_name"].value
    if target == STOP:  # its result is not one of the program's
        return np.zeros((), np.float32)
    if target in ("Sharding", "annotate_device_placement"):
        return list(arrays)
    if target in t.calls:
        primitive, params = t.calls[target]
        found = primitive.bind(*arrays, **params)
        # Several results are one here, a tuple that `get_tuple_element` takes apart.
        return [tuple(found)] if isinstance(op.results[0].type, ir.TupleType) else found
    if callback_calls.is_call(op):
        found = callback_calls.call(t, op, arrays)
        return [tuple(found)] if isinstance(op.results[0].type, ir.TupleType) else found
    raise NotImplementedError(
        f"the operation {target!r}, which XLA does on the host, has no rule in an auto-sharded "
        "program; write that part with shard_map"
    )


#: A call of nothing, which ends XLA's compilation once the program is partitioned.
STOP = "cm384_stop"

RULES: Mapping[str, _Rule] = {
    **{name: lambda t, op, *xs, f=fun: f(*xs) for name, fun in _SAME.items()},
    "bitcast_convert": lambda t, op, x: lax.bitcast_convert_type(x, dtype_of(op.results[0].type)),
    "broadcast_in_dim": _broadcast_in_dim,
    "cholesky": lambda t, op, x: jax.lax.linalg.cholesky(x, symmetrize_input=False),
    "compare": _compare,
    "concatenate": lambda t, op, *xs: lax.concatenate(xs, op.attributes["dimension"].value),
    "convert": _convert,
    "convolution": _convolution,
    "custom_call": _custom_call,
    "dot": _dot,
    "dot_general": _dot_general,
    "dynamic_slice": lambda t, op, x, *at: lax.dynamic_slice(
        x, at, shape_of(op.results[0].type), allow_negative_indices=False
    ),
    "dynamic_update_slice": lambda t, op, x, part, *at: lax.dynamic_update_slice(
        x, part, at, allow_negative_indices=False
    ),
    "fft": _fft,
    "gather": _gather,
    "get_tuple_element": lambda t, op, xs: xs[op.attributes["index"].value],
    "iota": _iota,
    "optimization_barrier": lambda t, op, *xs: lax.optimization_barrier(list(xs)),
    "pad": _pad,
    "reduce": _reduce,
    "reduce_precision": _reduce_precision,
    "reduce_window": _reduce_window,
    "reshape": lambda t, op, x: lax.reshape(x, shape_of(op.results[0].type)),
    "reverse": lambda t, op, x: lax.rev(x, ints(op, "dimensions")),
    "scatter": _scatter,
    "select_and_scatter": _select_and_scatter,
    "slice": _slice,
    "sort": _sort,
    "top_k": _top_k,
    "topk": _top_k,
    "transpose": lambda t, op, x: lax.transpose(x, ints(op, "permutation")),
    "triangular_solve": _triangular_solve,
    "tuple": lambda t, op, *xs: [xs],
}
