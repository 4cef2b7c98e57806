"""One step: a jitted program that the script calls with concrete arrays."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import core as jax_core
from jax.sharding import Sharding

from emulator.machines import Machine
from emulator.program.auto_sharded import placed, trace_divided
from emulator.program.emulate import evaluate_with_counts
from emulator.program.trace import DIVIDED, Program, host_sites, walk
from emulator.report.answer import OutOfMemoryError, estimate_program
from emulator.report.result import Estimate
from emulator.script.clock import PodClock
from emulator.script.jax_calls import name_and_place
from emulator.script.notice import notice
from emulator.script.placement import (
    folded,
    on_one_set,
    put,
    result_shardings,
    single_device,
    taken,
    trimmed,
    weak_results,
)
from emulator.script.references import held, of_values, references, write
from emulator.script.same import same_program
from emulator.timeline import each

_SHARED = 8  # of them that a function may share
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
    host_calls: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """One program as it was read: for the shapes and shardings of one call."""

    program: Program
    shardings: tuple[Sharding | None, ...]
    weak: tuple[bool, ...]
    estimates: dict[str, Estimate]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """A program that was called before, or why it is outside the model."""

    jaxpr: Any  # kept alive: its identity is part of the key
    read: _Read | NotImplementedError


class Steps:
    """Computes steps as `on` does, and moves `clock` by their time."""

    def __init__(
        self,
        on: Machine,
        clock: PodClock,
        arithmetic: Any = None,
        algorithms: Mapping[str, Any] | None = None,
        fusion: str = "chains",
        overlap: bool = False,
        allow_oom: bool = False,
    ) -> None:
        self.on = on
        self.clock = clock
        self.arithmetic = arithmetic
        self.algorithms = algorithms
        self.how: dict[str, Any] = {"fusion": fusion, "overlap": overlap, "allow_oom": allow_oom}
        self.functions: dict[tuple[str, str], Function] = {}
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._undivided: dict[tuple[str, str], deque[Program]] = {}

    def __call__(
        self, args: tuple[Any, ...], params: dict[str, Any], on_host: Callable[[], list[Any]]
    ) -> list[Any]:
        """The results of the jitted program with `params` for flat arrays. What has no meaning or
        no cost here, or fails here, runs `on_host`, in no pod time, and is said at once and in the
        report.

        Raises:
            Exception: whatever JAX raises of a program that it refuses.
            OutOfMemoryError: the program does not fit the machine.
            FloatingPointError: a result is NaN, and `jax_debug_nans` is set.
        """
        key = name_and_place(params)
        function = self.functions.setdefault(key, Function(name=key[0], where=key[1]))
        function.calls += 1
        refs = references(args)
        with self.clock.emulating():
            try:
                given = of_values(params, refs) if refs else params
                with jax.transfer_guard("allow"):  # the script's is about its own transfers
                    outs, estimate = self._compute(held(args), given, function)
            except (OutOfMemoryError, FloatingPointError):  # `jax_debug_nans` asks for the latter
                raise
            except NotImplementedError as refusal:
                _say_outside(function, str(refusal))
                return on_host()
            except Exception as error:
                results = on_host()  # what JAX refuses, too, is the script's error
                text = str(error).strip().partition("\n")[0]
                _say_outside(
                    function,
                    f"the emulator failed on it ({type(error).__name__}: {text}), "
                    "which it should not",
                )
                return results
        function.time_s += estimate.time_s
        function.last = estimate
        self.clock.advance(estimate.time_s)
        for x in taken(args, params["donated_invars"], outs):
            x.delete()
        kept = len(outs) - len(refs)
        write(refs, outs[kept:])
        return outs[:kept]

    def longest(self) -> Estimate | None:
        """The last step of the function that took the most time."""
        timed = [f for f in self.functions.values() if f.last is not None]
        return max(timed, key=lambda f: f.time_s).last if timed else None

    def memory_stats(self, device: jax.Device) -> dict[str, int]:
        """What `device.memory_stats()` says on the machine: its capacity, the bytes of the script's
        arrays on it, and the most that one of the steps takes.
        """
        # A part of an array may be listed as an array, too; it has the same bytes.
        buffers = {
            part.data.unsafe_buffer_pointer(): part.data.nbytes
            for x in jax.live_arrays()
            if device in x.sharding.device_set
            for part in x.addressable_shards
            if part.device == device
        }
        in_use = sum(buffers.values())
        peaks = [f.last.memory.peak_bytes for f in self.functions.values() if f.last is not None]
        return {
            "bytes_in_use": in_use,
            "bytes_limit": self.on.memory_bytes_per_device,
            "peak_bytes_in_use": max((in_use, *peaks)),
        }

    def _compute(
        self, args: tuple[Any, ...], params: dict[str, Any], function: Function
    ) -> tuple[list[Any], Estimate]:
        args = on_one_set(args, params)
        key = (
            id(params["jaxpr"]),
            tuple(
                None if isinstance(asked, Sharding) else _where(x)
                for x, asked in zip(args, params["in_shardings"], strict=True)
            ),
            params["in_shardings"],
            params["out_shardings"],
            params["donated_invars"],
        )
        if (known := self._known.get(key)) is None:
            with notice(f"reading and compiling {function}"):
                return self._first(key, args, params, function)
        self._known.move_to_end(key)
        if isinstance(known.read, NotImplementedError):
            raise known.read.with_traceback(None)
        return self._again(known.read, args, function)

    def _first(
        self, key: Any, args: tuple[Any, ...], params: dict[str, Any], function: Function
    ) -> tuple[list[Any], Estimate]:
        """A program that was not called before; what is refused is not read again, either."""
        try:
            read = self._read(args, params, function)
            answer = self._again(read, args, function)
        except NotImplementedError as refusal:
            self._keep(key, params, refusal)
            raise
        self._keep(key, params, read)
        return answer

    def _keep(self, key: Any, params: dict[str, Any], read: _Read | NotImplementedError) -> None:
        self._known[key] = _Known(jaxpr=params["jaxpr"], read=read)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)

    def _again(
        self, read: _Read, args: tuple[Any, ...], function: Function
    ) -> tuple[list[Any], Estimate]:
        flat = [folded(x) for x in args]
        with _of_no_transformation(), jax.set_mesh(None):
            values, counts = evaluate_with_counts(
                read.program, flat, self.on, self.arithmetic, self.algorithms
            )
        estimate = self._estimate(read, args, function.name, counts)
        function.host_calls |= any(n for step, n in each(estimate.steps) if step.kind == "host")
        wishes = zip(values, read.shardings, read.weak, strict=True)
        return [put(x, sharding, weak) for x, sharding, weak in wishes], estimate

    def _read(self, args: tuple[Any, ...], params: dict[str, Any], function: Function) -> _Read:
        with _of_no_transformation():
            program = self._shared(function, trace_divided(_as_function(params), args))
        read = _Read(
            program=program,
            shardings=result_shardings(program, args, params),
            weak=weak_results(params),
            estimates={},
        )
        # What does not fit or has no cost is said before any value is computed.
        self._estimate(read, args, function.name, {})
        return read

    def _shared(self, function: Function, program: Program) -> Program:
        """The program that the function had before, where both are undivided and compute the same:
        one evaluation, compiled once, does for arguments from wherever.
        """
        if any(eqn.params.get("name") == DIVIDED for _, eqn in walk(program.jaxpr.jaxpr)):
            return program
        known = self._undivided.setdefault((function.name, function.where), deque(maxlen=_SHARED))
        for before in known:
            if same_program(before.jaxpr, program.jaxpr):
                return before
        known.append(program)
        return program

    def _estimate(
        self, read: _Read, args: Sequence[Any], name: str, counts: Mapping[str, Any]
    ) -> Estimate:
        """The step's time; loops and branches counted otherwise take another."""
        host = dict.fromkeys(host_sites(read.program.jaxpr).values(), 0.0)
        counts = {**host, **counts}
        key = repr(sorted((k, np.asarray(v).tolist()) for k, v in counts.items()))
        if key not in read.estimates:
            read.estimates[key] = estimate_program(
                read.program,
                args,
                name,
                on=self.on,
                algorithms=self.algorithms,
                counts=counts,
                **self.how,
            )
        return read.estimates[key]


@contextmanager
def _of_no_transformation() -> Iterator[None]:
    """As if the script's call stood alone: a `vmap` that it is under may have named mesh axes."""
    context = jax_core.trace_ctx
    before = context.axis_env
    with jax_core.eval_context():
        context.set_axis_env(jax_core.top_axis_env)
        try:
            yield
        finally:
            context.set_axis_env(before)


def _say_outside(function: Function, reason: str) -> None:
    """Once for each function at once; the report repeats it."""
    if not function.outside:
        print(f"cm384: {function} is outside the model: {reason}", file=sys.stderr)
    function.outside = reason


def _as_function(params: dict[str, Any]) -> Any:
    """The jitted program as a function of its flat arrays."""
    from jax._src.pjit import jit_p

    def call(*flat: Any) -> list[Any]:
        return jit_p.bind(*flat, **params)

    return call


def _where(x: Any) -> Any:
    """The sharding of an argument, written in one way, or the one device that it is bound to."""
    sharding = placed(x)
    if sharding is None:
        return single_device([x])
    return sharding.mesh, trimmed(sharding.spec)
