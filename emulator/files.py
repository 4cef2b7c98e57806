"""Files that are either written whole or left as they were."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Writes beside `path` first and then renames, so that a failure leaves no half file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check(option: str, path: Path | None) -> None:
    """Raises ValueError if there is no file to write at `path`, before any work is done for it."""
    if path is None:
        return
    if not path.name or path.is_dir():
        raise ValueError(f"{option} {path}: expected the name of a file; this is a folder")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
