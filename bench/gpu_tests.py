"""Runs test files on a GPU that has not run them yet: ``python -m bench.gpu_tests OUT [FILE...]``.

Each file has processes of its own, several files at once. A test that hangs is killed, one that faults ends its
process, and the rest of the file goes on in a new one; OUT/tests.jsonl is complete at every moment, OUT/tests.txt is
some seconds old at most. At the end what went wrong runs once more alone, with launches that block, a fault under
compute-sanitizer where there is one.

A kernel family that hangs holds the processes that run it: files without products come first, have processes that
no other file gets, and a file is given up after a few hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import gpu_test_plugin as plugin
from .gpu_names import TILE_VARIABLE, TILES
from .gpu_processes import find_tool, kill, sanitized

PYTEST = (sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
ENDINGS = ("passed", "failed", "skipped", "hang", "fault")
WRONG = ("failed", "hang", "fault", "broken")
STARTUP_SECONDS = 10.0  # more for the first test of a process, which loads the kernels
SLOW_FILES = {"test_gpu_compile": 3.0}  # times as long, since each test compiles
RERUN_SECONDS = 40.0
MAX_PROCESSES = 12  # of one file
MAX_HANGS = 3  # of one file, which is then given up
RESERVED = 4  # of the processes at once, for files without products
SUMMARY_SECONDS = 5.0  # between two writings
MAX_RERUNS = 8
MAX_QUESTIONS = 2  # to cuda-gdb, which takes its time
# Left to itself a small product takes one tile or none: these files run again on every tile, each n-th test of them.
TILED_FILES = ("test_gpu_grouped_gemm.py", "test_gpu_experts.py")
WITHOUT_PRODUCTS = ("test_gpu_gating.py", "test_gpu_gating_knobs.py", "test_gpu_router_losses.py", "test_gpu_plan.py",
                    "test_gpu_permutation.py", "test_gpu_all_to_all.py")  # fmt: skip
UNTILED = "test_gpu_small_rows.py"  # a forced tile would take the kernel's place that it tests
TILE_SAMPLE = "3"
LOG_TAIL = 3000  # characters
SHOWN_LINES = 12  # of what went wrong, in the summary


@dataclass
class File:
    """One test file on its way."""

    path: Path
    record: Path  # events of this file alone
    log: Path
    journal: Path  # events of all files
    hang_seconds: float
    tile: str = ""  # forced on every product, see tune_tiles.py
    process: subprocess.Popen[bytes] | None = None
    processes: int = 0
    done: bool = False
    first: str = ""  # test of the present process
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, event: str, **fields: Any) -> None:
        os.environ[plugin.RECORD] = str(self.record)
        plugin.write(event, **fields)

    def read(self) -> None:
        known = len(self.events)
        self.events = plugin.read(self.record)
        mark = {"tile": self.tile} if self.tile else {}
        with self.journal.open("a") as journal:
            journal.writelines(json.dumps({**event, **mark}) + "\n" for event in self.events[known:])

    def running(self) -> dict[str, Any] | None:
        """The start of the test that has not ended."""
        last = next((e for e in reversed(self.events) if e["event"] in ("start", *ENDINGS)), None)
        return last if last and last["event"] == "start" else None

    def start(self) -> None:
        self.processes += 1
        self.first = ""
        watch = f"faulthandler_timeout={max(self.hang_seconds - 3, self.hang_seconds / 2)}"
        command = [*PYTEST, "-p", plugin.__name__, "-o", watch, str(self.path)]
        variables = {**environment(self.tile, self.path), plugin.RECORD: str(self.record)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)

    @property
    def has_products(self) -> bool:
        return self.path.name not in WITHOUT_PRODUCTS

    def go_on(self) -> None:
        """With what is left, in a new process."""
        self.read()
        if self.processes < MAX_PROCESSES and sum(e["event"] == "hang" for e in self.events) < MAX_HANGS:
            self.start()
        else:
            self.done = True

    def kill(self) -> None:
        if self.process:
            kill([self.process])

    def stack(self) -> str:
        """What faulthandler wrote last, from the innermost call on; else the end of the log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        stacks = [match.start() for match in re.finditer(r"^.*most recent call first", text, re.MULTILINE)]
        return text[stacks[-1] :][:LOG_TAIL] if stacks else text[-LOG_TAIL:]

    def look(self) -> None:
        """Reads what has happened; deals with a hang, a death and the end."""
        assert self.process
        ended = self.process.poll() is not None  # before the record is read, which is then complete
        self.read()
        running = self.running()
        if running and not self.first:
            self.first = running["test"]
        if ended:
            if running:
                self.add("fault", test=running["test"], text=f"status {self.process.returncode}\n{self.stack()}")
            if self.events and self.events[-1]["event"] == "finished":
                self.done = True
            elif not any(e["event"] == "start" for e in self.events):
                self.add("broken", test=str(self.path), text=self.stack())
                self.done = True
            else:
                self.go_on()
            return
        if running:
            limit = self.hang_seconds + (STARTUP_SECONDS if running["test"] == self.first else 0)
            if time.time() - running["time"] > limit:
                where = stuck_kernels(self.process.pid)
                self.kill()
                self.add("hang", test=running["test"], text=f"{self.stack()}\n{where}")
                self.go_on()


asked: list[int] = []  # processes that cuda-gdb looked into


def environment(tile: str, path: Path) -> dict[str, str]:
    # Many processes at once: each with all cores would wait for the others.
    variables = {"OMP_NUM_THREADS": "2", **os.environ}
    if path.name == UNTILED:
        variables.pop(TILE_VARIABLE, None)
    return variables | ({TILE_VARIABLE: tile, "MOE_EXT_SAMPLE": TILE_SAMPLE} if tile else {})


def stuck_kernels(pid: int) -> str:
    """Which kernel a process waits for and where its warps stand, if cuda-gdb is there to tell."""
    debugger = find_tool("cuda-gdb")
    if debugger is None or len(asked) >= MAX_QUESTIONS:
        return ""
    asked.append(pid)
    questions = ["info cuda kernels", "info cuda blocks", "info cuda warps", "x/4i $pc"]
    command = [debugger, "-batch", "-p", str(pid), *(word for q in questions for word in ("-ex", q))]
    try:
        seen = subprocess.run(command, capture_output=True, text=True, timeout=25, start_new_session=True)
    except subprocess.TimeoutExpired:
        return "cuda-gdb did not answer"
    return seen.stdout[-LOG_TAIL:]


def following(waiting: list[File], active: list[File], jobs: int) -> File | None:
    """Which file starts now; those with products leave some processes to the others."""
    busy = sum(file.has_products for file in active)
    free = len(active) < jobs
    return next((f for f in waiting if free and not (f.has_products and busy >= max(1, jobs - RESERVED))), None)


def wrong_events(files: list[File]) -> list[dict[str, Any]]:
    return [e for file in files for e in file.events if e["event"] in WRONG]


def run_files(files: list[File], jobs: int, deadline: float, show: Callable[[], None] = lambda: None) -> None:
    """Until all are done or the deadline comes, before which there is time for what went wrong to run again. ``show``
    is called every few seconds."""
    waiting, active, shown_at = list(files), [], time.time()
    try:
        while (waiting or active) and time.time() < deadline - (RERUN_SECONDS if wrong_events(files) else 0):
            while file := following(waiting, active, jobs):
                waiting.remove(file)
                active.append(file)
                file.start()
            time.sleep(0.2)
            for file in active:
                file.look()
            active = [file for file in active if not file.done]
            if time.time() > shown_at + SUMMARY_SECONDS:
                show()
                shown_at = time.time()
    finally:
        kill(file.process for file in active if file.process)
    for file in active:
        file.read()
        if running := file.running():
            file.add("cut", test=running["test"])


def rerun(tests: list[tuple[str, str, str]], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """(test, what happened to it, tile) once more, each alone and all at once."""
    started = []
    results = []
    end = time.time() + seconds
    try:
        for index, (test, event, tile) in enumerate(tests):
            command = [*PYTEST, "-o", f"faulthandler_timeout={max(seconds - 5, 1)}", test]
            if event == "fault":
                command = sanitized("memcheck", command) or command
            log = folder / f"rerun-{index}.log"
            variables = {**environment(tile, Path(test.split("::")[0])), "MOE_EXT_SAMPLE": "1",
                         "CUDA_LAUNCH_BLOCKING": "1"}  # fmt: skip
            with log.open("wb") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=variables)
            started.append((test, process, log))
        for test, process, log in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.time(), 0.1))
            status = "hangs" if process.poll() is None else str(process.returncode)
            results.append({"event": "rerun", "test": test, "status": status,
                            "text": log.read_text(errors="replace")[-LOG_TAIL:]})  # fmt: skip
    finally:
        kill(process for _, process, _ in started)
    return results


def worst_first(files: list[File]) -> list[tuple[str, str, str]]:
    """One test of every function that went wrong: faults, then hangs, then wrong results."""
    found: dict[str, tuple[str, str, str]] = {}
    for event in ("fault", "hang", "failed"):
        for file in files:
            for e in file.events:
                if e["event"] == event:
                    test = f"{file.path}::{e['test'].split('::', 1)[1]}"
                    found.setdefault(plugin.function_of(test), (test, event, file.tile))
    return list(found.values())


def shown(event: dict[str, Any]) -> list[str]:
    """The end of a failure, the innermost calls of a stack."""
    lines = event.get("text", "").splitlines()
    return lines[-SHOWN_LINES:] if event["event"] in ("failed", "broken") else lines[:SHOWN_LINES]


def on_tile(file: File) -> str:
    return f" on {file.tile}" if file.tile else ""


def summary(files: list[File]) -> list[str]:
    """A line for each file and each function that went wrong."""
    lines = []
    for file in files:
        counts = Counter(e["event"] for e in file.events if e["event"] in ENDINGS)
        collected = next((e["count"] for e in file.events if e["event"] == "collected"), 0)
        words = [f"{counts[ending]} {ending}" for ending in ENDINGS if counts[ending]]
        left = collected - sum(counts.values())
        words += [f"{left} not reached"] if left > 0 else []
        words += ["BROKEN"] if any(e["event"] == "broken" for e in file.events) else []
        lines.append(f"{file.path.name}{on_tile(file)}: {', '.join(words) or 'nothing ran'}")
    skips: dict[str, list[str]] = {}
    for e in (e for file in files for e in file.events if e["event"] == "skipped"):
        skips.setdefault(e["text"], []).append(e["test"])
    lines += [f"{len(tests)} skipped: {reason}; first {tests[0]}" for reason, tests in skips.items()]
    wrong: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for e in file.events:
            if e["event"] in WRONG:
                wrong.setdefault(plugin.function_of(e["test"]) + on_tile(file), []).append(e)
    for function, events in wrong.items():
        kinds = Counter(e["event"] for e in events)
        lines += [
            "",
            f"{function}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}; first {events[0]['test']}",
            *(f"    {line}" for line in shown(events[0])),
        ]
    return lines


def in_order(paths: list[Path], tiles: list[str]) -> list[tuple[Path, str]]:
    """Files and the tile they run on, "" for the model's choice: what no tile can hold up first, then what takes
    longest and matters most, the tiles one by one last."""
    first = {*TILED_FILES, *(f"{stem}.py" for stem in SLOW_FILES)}
    plain = sorted(paths, key=lambda p: (p.name not in WITHOUT_PRODUCTS, p.name not in first, p.name))
    return [(path, "") for path in plain] + [(p, tile) for tile in tiles for p in plain if p.name in TILED_FILES]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tests", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for tests.jsonl and tests.txt")
    parser.add_argument("files", type=Path, nargs="*", help="default: tests/gpu/test_*.py")
    parser.add_argument("--seconds", type=float, default=170.0, help="for everything (default: 170)")
    parser.add_argument("--hang", type=float, default=25.0, help="a test that takes longer hangs (default: 25)")
    parser.add_argument("--jobs", type=int, default=16, help="files at once (default: 16)")
    parser.add_argument("--tiles", default=",".join(TILES), help="on which the files of products run again, "
                        "comma-separated (default: all)")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.time() + options.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started ends with it
    options.out.mkdir(parents=True, exist_ok=True)
    journal = options.out / "tests.jsonl"
    journal.write_text("")
    paths = options.files or list(Path("tests/gpu").glob("test_*.py"))
    tiles = [tile for tile in options.tiles.split(",") if tile]

    def write(lines: list[str]) -> None:
        (options.out / "tests.txt").write_text("\n".join(lines) + "\n")

    with tempfile.TemporaryDirectory() as name:
        logs = Path(name)
        files = [
            File(path, logs / f"{path.stem}-{tile}.jsonl", logs / f"{path.stem}-{tile}.log", journal,
                 options.hang * SLOW_FILES.get(path.stem, 1.0), tile)
            for path, tile in in_order(paths, tiles)
        ]  # fmt: skip
        run_files(files, options.jobs, deadline, lambda: write(summary(files)))
        for file in files:
            file.read()
        lines = summary(files)
        write(lines)
        left = min(deadline - time.time(), RERUN_SECONDS)
        again = worst_first(files)[:MAX_RERUNS]
        results = rerun(again, logs, left) if again and left > 5 else []
    for result in results:
        lines += ["", f"again, alone: {result['test']}: status {result['status']}",
                  *(f"    {line}" for line in result["text"].splitlines()[-12:])]  # fmt: skip
    write(lines)
    print("\n".join(lines))
    wrong, passed = wrong_events(files), sum(e["event"] == "passed" for file in files for e in file.events)
    print(f"{passed} passed, {len(wrong)} went wrong")
    return 1 if wrong or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
