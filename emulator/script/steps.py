"""One step: a jitted program that the script calls with concrete arrays."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import core as jax_core
from jax.sharding import Sharding

from emulator.machines import Machine
from emulator.program.auto_sharded import placed, trace_divided
from emulator.program.emulate import evaluate_with_counts
from emulator.program.trace import Program
from emulator.report.answer import estimate_program
from emulator.report.result import Estimate
from emulator.script.clock import PodClock
from emulator.script.jax_calls import name_and_place
from emulator.script.placement import folded, put, result_shardings, trimmed

_KEPT = 256  # programs; a script has few, and each holds its compiled values


@dataclasses.dataclass(kw_only=True, slots=True)
class Function:
    """What is known of one jitted function: calls and pod seconds of all its steps."""

    name: str
    where: str
    calls: int = 0
    time_s: float = 0.0
    last: Estimate | None = None
    outside: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """One program as it was read: for the shapes and shardings of one call."""

    jaxpr: Any  # kept alive: its identity is the key
    program: Program
    shardings: tuple[Sharding | None, ...]
    estimates: dict[str, Estimate]


class Steps:
    """Computes steps as `on` does, and moves `clock` by their time."""

    def __init__(
        self, on: Machine, clock: PodClock, arithmetic: Any = None, allow_oom: bool = False
    ) -> None:
        self.on = on
        self.clock = clock
        self.arithmetic = arithmetic
        self.allow_oom = allow_oom
        self.functions: dict[tuple[str, str], Function] = {}
        self._known: OrderedDict[Any, _Read] = OrderedDict()

    def __call__(
        self, args: tuple[Any, ...], params: dict[str, Any], on_host: Callable[[], list[Any]]
    ) -> list[Any]:
        """The results of the jitted program with `params` for flat arrays. What has no meaning or
        no cost here runs `on_host`, in no pod time, and is said at once and in the report.

        Raises:
            OutOfMemoryError, ValueError: the program does not fit the machine.
        """
        key = name_and_place(params)
        function = self.functions.setdefault(key, Function(name=key[0], where=key[1]))
        function.calls += 1
        with self.clock.emulating():
            try:
                outs, estimate = self._compute(args, params, function.name)
            except NotImplementedError as error:
                if not function.outside:
                    print(
                        f"cm384: {key[0]} ({key[1]}) is outside the model: {error}", file=sys.stderr
                    )
                function.outside = str(error)
                return on_host()
        function.time_s += estimate.time_s
        function.last = estimate
        self.clock.advance(estimate.time_s)
        for x, gone in zip(args, params["donated_invars"], strict=True):
            if gone and isinstance(x, jax.Array) and not x.is_deleted():
                x.delete()
        return outs

    def longest(self) -> Estimate | None:
        """The last step of the function that took the most time."""
        timed = [f for f in self.functions.values() if f.last is not None]
        return max(timed, key=lambda f: f.time_s).last if timed else None

    def _compute(
        self, args: tuple[Any, ...], params: dict[str, Any], name: str
    ) -> tuple[list[Any], Estimate]:
        read = self._read(args, params, name)
        flat = [folded(x) for x in args]
        with jax_core.eval_context(), jax.set_mesh(None):
            values, counts = evaluate_with_counts(read.program, flat, self.on, self.arithmetic)
        estimate = self._estimate(read, args, name, counts)
        return [put(x, s) for x, s in zip(values, read.shardings, strict=True)], estimate

    def _read(self, args: tuple[Any, ...], params: dict[str, Any], name: str) -> _Read:
        jaxpr = params["jaxpr"]
        key = (
            id(jaxpr),
            tuple(_where(x) for x in args),
            params["in_shardings"],
            params["out_shardings"],
            params["donated_invars"],
        )
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        with jax_core.eval_context():
            program = trace_divided(_again(params), args)
        read = _Read(
            jaxpr=jaxpr,
            program=program,
            shardings=result_shardings(program, args, params),
            estimates={},
        )
        # What does not fit or has no cost is said before any value is computed.
        self._estimate(read, args, name, {})
        self._known[key] = read
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return read

    def _estimate(
        self, read: _Read, args: Sequence[Any], name: str, counts: Mapping[str, Any]
    ) -> Estimate:
        """The step's time; loops and branches counted otherwise take another."""
        key = repr(sorted((k, np.asarray(v).tolist()) for k, v in counts.items()))
        if key not in read.estimates:
            read.estimates[key] = estimate_program(
                read.program, args, name, on=self.on, counts=counts, allow_oom=self.allow_oom
            )
        return read.estimates[key]


def _again(params: dict[str, Any]) -> Any:
    """The jitted program as a function of its flat arrays."""
    from jax._src.pjit import jit_p

    def call(*flat: Any) -> list[Any]:
        return jit_p.bind(*flat, **params)

    return call


def _where(x: Any) -> Any:
    """The sharding of an argument, written in one way."""
    sharding = placed(x)
    return sharding and (sharding.mesh, trimmed(sharding.spec))
