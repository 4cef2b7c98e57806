"""Which room may import which, read from the source."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import emulator as em

ROOT = Path(__file__).resolve().parent.parent

# Each room may import itself and what stands before it; rooms on one line are independent.
ORDER: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    ("emulator.files", "emulator.mesh", "emulator.units"),
    ("emulator.machines",),
    ("emulator.collectives",),
    ("emulator.fabric",),
    ("emulator.chip",),
    ("emulator.validate", "emulator.timeline"),
    ("emulator.memory", "emulator.energy", "emulator.overlap"),
    ("emulator.program",),
    ("emulator.report",),
    ("emulator.workloads", "emulator.script"),
    ("emulator.cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

TIME_HALF = (
    "emulator.machines",
    "emulator.collectives",
    "emulator.fabric",
    "emulator.chip",
    "emulator.validate",
    "emulator.timeline",
    "emulator.overlap",
    "emulator.memory",
    "emulator.energy",
)
EXECUTES_ON_DATA = (
    "emulator.collectives.execute",
    "emulator.collectives.evaluate",
    "emulator.collectives.combine",
    "emulator.collectives.multiply",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for package in ("kernels", "emulator")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    for length in (1, 2):
        if ".".join(parts[:length]) in RANK:
            return ".".join(parts[:length])
    return None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(tree: ast.AST, *, in_functions: bool, type_only: bool) -> Iterator[ast.AST]:
    """Nodes below `tree`, without the bodies of functions or of `if TYPE_CHECKING` unless asked."""
    for node in ast.iter_child_nodes(tree):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if (function and not in_functions) or (is_type_checking(node) and not type_only):
            continue
        yield node
        yield from statements(node, in_functions=in_functions, type_only=type_only)


def imports(module: str, *, in_functions: bool = True, type_only: bool = True) -> set[str]:
    """Full names of the modules that `module` imports."""
    tree = ast.parse(SOURCES[module].read_text())
    found: set[str] = set()
    for node in statements(tree, in_functions=in_functions, type_only=type_only):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: import by full name"
            base = node.module or ""
            submodules = {f"{base}.{alias.name}" for alias in node.names} & SOURCES.keys()
            # `from package import submodule` needs the submodule, not what the package re-exports.
            whole = len(submodules) < len(node.names)
            found |= submodules | ({base} if whole or base not in SOURCES else set())
    return found - {"__future__"}


def violations(module: str, imported: set[str]) -> list[str]:
    """Imports of `module` that the order of rooms forbids."""
    room = room_of(module)
    bad = []
    for name in sorted(imported):
        other = room_of(name)
        if name == "emulator" and room not in (None, "emulator.cli"):
            bad.append(f"{module} imports the package root; name the room")
        elif other is not None and room is not None and other != room and RANK[other] >= RANK[room]:
            bad.append(f"{module} imports {name}")
    return bad


def test_every_file_is_in_a_room() -> None:
    homeless = [m for m in SOURCES if room_of(m) is None and m != "emulator"]
    assert not homeless


def test_rooms_say_what_each_of_their_files_is_for() -> None:
    """In the first words of their `__init__.py`, where a reader begins."""
    missing = []
    for module in SOURCES:
        room, _, name = module.rpartition(".")
        if room not in ("", "emulator", "emulator.workloads"):
            words = ast.get_docstring(ast.parse(SOURCES[room].read_text())) or ""
            if module not in RANK and not re.search(rf"\b{name}\b", words):
                missing.append(module)
    assert missing == []


def test_rooms_import_only_what_stands_before_them() -> None:
    assert [v for module in SOURCES for v in violations(module, imports(module))] == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("kernels.matmul", "emulator.machines"),
        ("emulator.machines.chip", "emulator.fabric"),
        ("emulator.timeline", "emulator.memory"),
        ("emulator.program.costs", "emulator.report.result"),
        ("emulator.workloads.transformer", "emulator.cli"),
        ("emulator.chip.matmul", "emulator"),
    ],
)
def test_the_order_forbids(module: str, imported: str) -> None:
    assert violations(module, {imported})


def test_the_time_half_has_no_jax() -> None:
    half = [m for m in SOURCES if room_of(m) in TIME_HALF and m not in EXECUTES_ON_DATA]
    assert len(half) > len(TIME_HALF)
    found = {m: imports(m, type_only=False) for m in half}
    assert [
        f"{m} imports {name}"
        for m, names in found.items()
        for name in names
        if name.split(".")[0] in ("jax", "jaxlib") or name in EXECUTES_ON_DATA
    ] == []


def test_workloads_know_nothing_of_the_emulator() -> None:
    for module in ("emulator.workloads.transformer", "emulator.workloads.matmul"):
        assert [n for n in imports(module) if n.split(".")[0] in ("emulator", "kernels")] == []


def test_no_cycles() -> None:
    graph = {
        m: imports(m, in_functions=False, type_only=False) & SOURCES.keys() - {m} for m in SOURCES
    }
    order = tuple(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == SOURCES.keys()


def test_asking_for_time_does_not_load_jax() -> None:
    code = (
        "import sys, emulator as em\n"
        "em.collective('all_reduce', 1 << 20, on=em.cloudmatrix384())\n"
        "em.matmul_time(256, 256, 256, on=em.cloudmatrix384())\n"
        "sys.argv = ['cm384', 'info']\n"
        "from emulator.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_public_names_exist() -> None:
    for name in em.__all__:
        assert getattr(em, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        em.no_such_name  # noqa: B018


def test_everything_public_says_what_it_is() -> None:
    for name in em.__all__:
        thing = getattr(em, name)
        assert thing.__doc__, name
        for part, value in vars(thing).items() if isinstance(thing, type) else ():
            if not part.startswith("_") and (callable(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{part}"
