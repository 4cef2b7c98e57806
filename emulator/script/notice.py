"""A line on standard error when the host takes long, and another when it is done."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Host seconds of silence: most small steps are ready by then.
PATIENCE_S = 3.0


@contextmanager
def notice(what: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Says `what` (such as "compiling step (train.py:12)") after `patience_s` on the host, and how
    long it took.
    """
    began_s = time.perf_counter()
    said = threading.Event()

    def say() -> None:
        said.set()
        print(f"cm384: {what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(patience_s, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            wall_s = time.perf_counter() - began_s
            print(f"cm384: {what} took {wall_s:.0f} s on this host", file=sys.stderr, flush=True)
