"""Ends a process whose device hangs.

Nothing interrupts a kernel that hangs: the host waits for it inside the driver, where no signal is handled. Waiting
releases Python's lock, though, so that another thread can still write down what hangs before it ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HANG_STATUS = 71


@contextmanager
def watch(label: str, seconds: float | None, hangs: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``hangs(line)`` is called after so many seconds and the process ends; None: no limit."""
    if not seconds:
        yield
        return

    def end() -> None:
        line = f"{label}: hang: not done after {seconds:.0f} s"
        try:
            hangs(line)
            faulthandler.dump_traceback(all_threads=True)
            print(line, file=sys.stderr, flush=True)
        finally:
            os._exit(HANG_STATUS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
