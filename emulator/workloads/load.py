"""A user's own program, named as `path/to/file.py:function`.

The file is ordinary Python. For a function `step` it may define

    step_args(machine) -> tuple        the arguments; shapes (`jax.ShapeDtypeStruct`) will do
                                       for an estimate. Without it `step` is called with none.
    step_mesh(machine) -> mesh         called only if `step` has a parameter `mesh`, which then
                                       receives it by name: `machine.mesh(dp=48, tp=8)`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from emulator.machines import Machine


def load(target: str, machine: Machine) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The program named by `target` and its arguments on `machine`.

    Raises:
        ValueError: there is no such file, function or mesh, or the arguments are no tuple.
    """
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ValueError(f"expected path/to/file.py:function, got {target!r}")
    module = _module(Path(path))
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if inspect.isfunction(v) and k[0] != "_"]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    if "mesh" in inspect.signature(function).parameters:
        mesh = getattr(module, f"{name}_mesh", None)
        if not callable(mesh):
            raise ValueError(
                f"{name} has a parameter 'mesh', so {path} must define {name}_mesh(machine), "
                f"for example returning machine.mesh(dp=48, tp=8)"
            )
        function = functools.partial(function, mesh=mesh(machine))
    make_args = getattr(module, f"{name}_args", None)
    args = make_args(machine) if make_args is not None else ()
    if not isinstance(args, tuple):
        raise ValueError(f"{name}_args must return a tuple, got {type(args).__name__}")
    return function, args


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(_free_name(path), path)
    if spec is None or spec.loader is None:
        raise ValueError(f"not a Python file: {path}; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # As if it were run: what it imports, also later inside its functions, is looked for beside it,
    # and its dataclasses and pickles find the module that they are of.
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _free_name(path: Path) -> str:
    """The file's own name as a module, unless another file has it."""
    other = sys.modules.get(path.stem)
    file = getattr(other, "__file__", None)
    if other is None or (file is not None and Path(file).resolve() == path.resolve()):
        return path.stem
    return f"program_{path.stem}"
