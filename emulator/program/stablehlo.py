"""A partitioned StableHLO module as an ordinary JAX function of one device's arrays.

Every operation becomes the `jax.lax` operation of the same meaning (`stablehlo_rules`,
`stablehlo_collectives`), so that both readings take the result like any other program. Loops become
scans again where their trips are constant (`stablehlo_loops`). The line of the user's program that
an operation came from travels in its name stack, where `where` finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from emulator.program import callback_calls, stablehlo_collectives, stablehlo_rules
from emulator.program.linalg_calls import Calls
from emulator.program.partition_mesh import PartitionMesh
from emulator.program.stablehlo_constants import PerPartition, constant, fold
from emulator.program.stablehlo_loops import Loop, counted
from emulator.program.where import PLACE

#: An array of the traced function, or a value that is known already.
Value = Any
Env = MutableMapping[Any, Value]


@dataclasses.dataclass(frozen=True, slots=True)
class Translator:
    """Turns the functions of a module into calls of `jax.lax` on the devices of `mesh`. `groups`
    are the partitions [group, rank] of its collectives, by channel; `calls` its factorisations and
    calls to the host, by the name of the call that stands for one.
    """

    mesh: PartitionMesh
    functions: dict[str, Any]
    groups: dict[int, NDArray[np.int64]]
    calls: Calls

    def main(self, *args: Any) -> list[Any]:
        """The module's results for the arrays of one device, inside a `shard_map`."""
        (block,) = self.functions["main"].regions[0].blocks
        return [self.array(x) for x in self.block(block, args, {})]

    def block(self, block: Any, args: Sequence[Value], env: Env) -> list[Value]:
        """What a block returns for its arguments; results that `env` holds already are kept."""
        env.update(zip(block.arguments, args, strict=True))
        for each in block.operations:
            op = each.operation
            operands = [env.get(v) for v in op.operands]
            if op.name in ("stablehlo.return", "func.return", "mhlo.return"):
                return operands
            if any(r in env for r in op.results):
                continue
            with jax.named_scope(place(op.location)):
                results = self.operation(op, operands, env)
            env.update(zip(op.results, results, strict=True))
        raise AssertionError("a block without an end")

    def operation(self, op: Any, operands: list[Value], env: Env) -> list[Value]:
        name = op.name.split(".", 1)[1]
        if name == "custom_call":  # some collectives are written so
            target = op.attributes["call_target_name"].value
            name = target if target in stablehlo_collectives.RULES else name
        if name == "constant":
            return [constant(op)]
        if name == "partition_id":
            return [self._number]
        if all(isinstance(x, PerPartition | np.ndarray) for x in operands):
            known = fold(op, operands)
            if known is not None:
                return [known]
        if name in ("while", "case", "if", "call"):
            return getattr(self, f"{name}_")(op, operands, env)
        if name == "dynamic_slice":
            part = stablehlo_collectives.scattered(self, op, operands, env)
            if part is not None:
                return [part]
        arrays = [self.array(x) for x in operands]
        if name in stablehlo_collectives.RULES:
            return stablehlo_collectives.RULES[name](self, op, arrays)
        if name in stablehlo_rules.RULES:
            found = stablehlo_rules.RULES[name](self, op, *arrays)
            return list(found) if isinstance(found, list | tuple) else [found]
        raise NotImplementedError(
            f"the partitioner made the HLO operation {name!r} at {place(op.location)[1:]}, which "
            "has no translation here; write that part with shard_map"
        )

    @property
    def _number(self) -> PerPartition:
        return PerPartition(np.arange(self.mesh.count, dtype=np.uint32))

    @property
    def partition(self) -> Any:
        """The number of the partition, as the traced function may use it."""
        return self.array(self._number)

    def array(self, value: Value) -> Any:
        """A value as the traced function may use it."""
        if isinstance(value, PerPartition):
            return self.lookup(value)
        if isinstance(value, np.ndarray) and value.size > 1 and not any(value.strides):
            return lax.full(value.shape, value.flat[0])
        return value

    def lookup(self, value: PerPartition) -> Any:
        """A value known for all partitions, looked up by the mesh axes over which it varies."""
        axes = self.mesh.varying(value.values)
        rows = value.values[self.mesh.table(axes)[0]]
        if not axes:
            return rows[0]
        index = lax.axis_index(axes)
        if rows.ndim == 1 and rows.dtype.kind in "iu" and len(set(np.diff(rows))) == 1:
            return index.astype(rows.dtype) * (rows[1] - rows[0]) + rows[0]
        return lax.dynamic_index_in_dim(
            jnp.asarray(rows), index, keepdims=False, allow_negative_indices=False
        )

    def region(self, region: Any, env: Env) -> Callable[..., list[Any]]:
        """A region as a function of the values of its block arguments."""
        (block,) = region.blocks

        def call(*args: Any) -> list[Any]:
            return [self.array(x) for x in self.block(block, args, ChainMap({}, env))]

        return call

    def call_(self, op: Any, operands: list[Value], env: Env) -> list[Value]:
        (block,) = self.functions[op.attributes["callee"].value].regions[0].blocks
        return self.block(block, operands, {})

    def case_(self, op: Any, operands: list[Value], env: Env) -> list[Value]:
        branches = [self.region(r, env) for r in op.regions]
        index = self.array(operands[0])
        # XLA takes the last branch for an index that is out of range.
        outside = (index < 0) | (index >= len(branches))
        return lax.switch(jnp.where(outside, len(branches) - 1, index), branches)

    def if_(self, op: Any, operands: list[Value], env: Env) -> list[Value]:
        yes, no = (self.region(r, env) for r in op.regions)
        (block,) = op.regions[0].blocks
        test = self.array(operands[0])
        if any(callback_calls.is_of_the_first(each.operation) for each in block.operations):
            # Every device takes the first one's branch: the call knows whose it is.
            return [jnp.where(test, a, b) for a, b in zip(yes(), no(), strict=True)]
        return lax.cond(test, yes, no)

    def while_(self, op: Any, operands: list[Value], env: Env) -> list[Value]:
        loop = counted(op, operands)
        if loop is not None:
            return self.scan(loop, operands, env)
        test, body = op.regions
        init = tuple(self.array(x) for x in operands)
        return list(
            lax.while_loop(
                lambda state: self.region(test, env)(*state)[0],
                lambda state: tuple(self.region(body, env)(*state)),
                init,
            )
        )

    def scan(self, loop: Loop, operands: list[Value], env: Env) -> list[Value]:
        """A loop whose trips are known: slices of what it only reads come in by `xs`, rows that it
        only writes leave by `ys`.
        """
        arguments = list(loop.body.arguments)
        fixed = {arguments[j]: operands[j] for j in loop.constants}

        def step(carry: Sequence[Any], x: tuple[Any, Sequence[Any]]) -> Any:
            counter, rows = x
            inner: Env = ChainMap(dict(fixed), env)
            inner[arguments[loop.counter]] = counter
            inner.update(zip((arguments[j] for j in loop.carried), carry, strict=True))
            for j, row in zip(loop.read, rows, strict=True):
                for result in loop.read[j]:
                    inner[result] = lax.reshape(row, (1, *row.shape))
            for write in loop.written.values():
                inner[write.results[0]] = None
            given = [inner.get(a) for a in arguments]
            outs = self.block(loop.body, given, inner)
            ys = [lax.squeeze(self.array(inner[w.operands[1]]), [0]) for w in loop.written.values()]
            return [self.array(outs[j]) for j in loop.carried], ys

        init = [self.array(operands[j]) for j in loop.carried]
        counters = lax.iota(loop.first.dtype, loop.trips) * loop.step + loop.first
        counters = lax.rev(counters, [0]) if loop.reverse else counters
        xs = (counters, [self.array(operands[j]) for j in loop.read])
        carry, ys = lax.scan(step, init, xs, length=loop.trips, reverse=loop.reverse)
        results = list(operands)
        results[loop.counter] = loop.last
        for j, value in [
            *zip(loop.carried, carry, strict=True),
            *zip(loop.written, ys, strict=True),
        ]:
            results[j] = value
        return results


def module_functions(module: Any) -> dict[str, Any]:
    """The functions of a module by name."""
    operations = (each.operation for each in module.body.operations)
    return {o.attributes["sym_name"].value: o for o in operations if o.name == "func.func"}


def place(location: Any) -> str:
    """The line of the user's program at an operation's location: a name scope for `where`."""
    return _place(str(location))


@functools.lru_cache(maxsize=4096)
def _place(location: str) -> str:
    found = re.search(r'"([^"]*)"\("([^"]*)":(\d+)', location)
    if found is None:
        return PLACE
    function, file, line = found.groups()
    return f"{PLACE}{file.rsplit('/', 1)[-1]}:{line} ({function.split('.<locals>')[0]})"
