"""Compiled programs that are kept for the next run."""

from __future__ import annotations

import os
from pathlib import Path


def keep_compiled() -> None:
    """Turns JAX's compilation cache on, in `cm384` under the user's cache folder.

    Whoever has set JAX_COMPILATION_CACHE_DIR has decided otherwise, even if it is empty. Not for
    programs on several XLA:CPU devices: those that come from the cache may wait for each other for
    ever (jaxlib 0.10.2).
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "cm384"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # nothing is kept, and nothing else is different
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
