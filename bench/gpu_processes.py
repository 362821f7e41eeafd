"""Processes on a GPU that may hang, and where the programs are that look into them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

Process = subprocess.Popen[bytes]
KILL_SECONDS = 5.0  # a process that the driver does not let go may stay for longer: it is left behind


def kill(processes: Iterable[Process], signals: Sequence[signal.Signals] = (signal.SIGKILL,)) -> None:
    """All at once, each with everything that it started; a signal is sent where the one before it has not helped."""
    listed = list(processes)
    for kind in signals:
        alive = [process for process in listed if process.poll() is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
        end = time.monotonic() + KILL_SECONDS
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))


def find_tool(name: str, root: Path = Path("/usr/local")) -> str | None:
    """A program of CUDA's toolkit, which is not always on the PATH."""
    places = [path for folder in ("bin", "compute-sanitizer") for path in root.glob(f"cuda*/{folder}/{name}")]
    return shutil.which(name) or next((str(path) for path in sorted(places) if path.is_file()), None)


def sanitized(tool: str, command: Sequence[str]) -> list[str] | None:
    """The command under a tool of compute-sanitizer; None where that is missing."""
    program = find_tool("compute-sanitizer")
    if program is None:
        return None
    # torch asks the driver for what may not be there: such errors are none of ours.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [program, "--tool", tool, *quiet, "--error-exitcode", "9", *command]
