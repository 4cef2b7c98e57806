"""Functions that a script compiles ahead of time: `step = jax.jit(f).lower(...).compile()`.

They are compiled as the script asks, for what it may read of them (`cost_analysis` and so on), and
take the arguments that they were compiled for and no others; called they are steps like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from jax._src import stages

#: What executes a jitted program: (flat arrays, parameters of the jit) -> flat results.
Execute = Callable[..., list[Any]]

_PARAMS = "cm384_params"  # an attribute of what JAX has lowered


def replacements(execute: Execute) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, new value): with these, compiled programs are executed by `execute`."""
    lower, compile_ = stages.Traced.lower, stages.Lowered.compile

    def lower_of_the_script(self: Any, **options: Any) -> Any:
        lowered = lower(self, **options)
        setattr(lowered._lowering, _PARAMS, self.lojax._params)
        return lowered

    def compile_of_the_script(self: Any, *args: Any, **options: Any) -> Any:
        compiled: Any = compile_(self, *args, **options)
        params = getattr(self._lowering, _PARAMS, None)
        if params is None:
            return compiled
        known = compiled._params
        constants = len(known.const_args)
        executable = copy.copy(known.executable)  # JAX runs its own elsewhere
        executable._unsafe_call = lambda *flat: execute(*flat[constants:], **params)
        call = known._replace(executable=executable)
        compiled._call = lambda *args, **kwargs: stages.Compiled.call(call, *args, **kwargs)[0]
        return compiled

    return [
        (stages.Traced, "lower", lower_of_the_script),
        (stages.Lowered, "compile", compile_of_the_script),
    ]
