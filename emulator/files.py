"""Files that are either written whole or left as they were."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """As `kernels.files.write`, whose package takes a second to import.

    Raises:
        OSError: why `path` cannot be written, which it names.
    """
    from kernels import files

    try:
        files.write(path, content)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def print_all_names() -> None:
    """From now on standard output shows letters that its encoding lacks as escapes, as standard
    error does, where they would end an answer half way.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def check(option: str, path: Path | None, suffix: str = "") -> None:
    """Raises ValueError if there is no file to write at `path`, or its name has another suffix,
    before any work is done for it.
    """
    if path is None:
        return
    if not path.name or path.is_dir():
        raise ValueError(f"{option} {path}: expected the name of a file; this is a folder")
    is_file = path.is_file() or not path.exists()
    if suffix and is_file and path.suffix.lower() not in ("", suffix):
        raise ValueError(f"{option} {path}: expected a name that ends in {suffix}")
    check_folder(option, path)


def check_apart(*given: tuple[str, Path | None]) -> None:
    """Raises ValueError if two options would write the same file, so that one were lost."""
    options: dict[Path, str] = {}
    for option, path in given:
        if path is None or (path.exists() and not path.is_file()):  # /dev/stdout takes both
            continue
        if (first := options.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{first} {path}, {option} {path}: one file for two; name another")


def check_folder(option: str, path: Path) -> None:
    """Raises ValueError if the folder that `path` is to be in is not there or not to be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: the folder {path.parent} may not be written to")
