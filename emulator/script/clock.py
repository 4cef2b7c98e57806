"""The pod's clock, as a script reads it.

It stands still while the host works and moves by the time of a step when the script calls one, so
that the difference of two readings is the time of the steps between them. Python's own library and
JAX keep the host's clock: their timeouts are about this process.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HOST_S = time.perf_counter
_CLOCKS = ("perf_counter", "time", "monotonic")
#: Packages whose clock stays the host's.
_OF_THE_HOST = frozenset({"jax", "jaxlib", "emulator", "kernels"}) | (
    sys.stdlib_module_names - {"timeit"}
)

#: Functions with `timeit.default_timer`, as it was when the module was imported, as a default.
_TIMEIT: tuple[Any, ...] = (timeit.Timer.__init__, timeit.timeit, timeit.repeat)


class PodClock:
    """Seconds on the pod since the script began; with `host_time`, the host's seconds outside of
    steps are added.
    """

    def __init__(self, host_time: bool = False) -> None:
        self.host_time = host_time
        self.steps_s = 0.0
        self.slept_s = 0.0
        self.began_s = _HOST_S()
        self.emulating_s = 0.0

    @property
    def time_s(self) -> float:
        between_s = self.slept_s
        if self.host_time:
            between_s = _HOST_S() - self.began_s - self.emulating_s
        return self.steps_s + between_s

    def advance(self, step_s: float) -> None:
        """A step of the pod has taken this long."""
        self.steps_s += step_s

    @contextmanager
    def emulating(self) -> Iterator[None]:
        """The host works for the emulator, not for the script."""
        began_s = _HOST_S()
        try:
            yield
        finally:
            self.emulating_s += _HOST_S() - began_s

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Python's clocks show this one to whoever is not the host's own library."""
        own = {name: getattr(time, name) for name in (*_CLOCKS, *(f"{c}_ns" for c in _CLOCKS))}
        sleep, timer = time.sleep, timeit.default_timer
        timed = {function: function.__defaults__ for function in _TIMEIT}
        for name, clock in own.items():
            setattr(time, name, self._reading(clock, name.endswith("_ns")))
        time.sleep = self._sleeping(sleep)
        timeit.default_timer = time.perf_counter
        for function, values in timed.items():
            function.__defaults__ = tuple(timeit.default_timer if v is timer else v for v in values)
        try:
            yield
        finally:
            for name, clock in own.items():
                setattr(time, name, clock)
            time.sleep, timeit.default_timer = sleep, timer
            for function, values in timed.items():
                function.__defaults__ = values

    def _reading(self, host: Callable[[], Any], whole_ns: bool) -> Callable[[], Any]:
        base = host()

        def read() -> Any:
            if _caller() in _OF_THE_HOST:
                return host()
            return base + (round(self.time_s * 1e9) if whole_ns else self.time_s)

        read.__name__ = host.__name__
        return read

    def _sleeping(self, host: Callable[[float], None]) -> Callable[[Any], None]:
        def sleep(seconds: Any) -> None:
            host(seconds)
            if _caller() not in _OF_THE_HOST:
                self.slept_s += seconds

        return sleep


def _caller() -> str:
    """The package of the code that called the function that asks."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0]
