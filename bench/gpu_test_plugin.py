"""Pytest plugin of bench/gpu_tests.py: leaves a line of JSON per event, runs what earlier processes left over.

A test that leaves a CUDA error behind ends the process at once: every later test in it would fail with that error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

RECORD = "MOE_EXT_GPU_RECORD"  # the file of the events
FAULT_STATUS = 70
FAULTS_PER_FUNCTION = 2  # then its other parameters are given up
TEXT = 2000  # characters kept of a failure


def write(event: str, **fields: Any) -> None:
    with Path(os.environ[RECORD]).open("a") as record:
        record.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The events so far; a line that is still being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def function_of(test: str) -> str:
    return test.split("[", 1)[0]


def in_turns(tests: list[str]) -> list[str]:
    """One parameter of every function, then another one of every function: time that runs out leaves none untried."""
    functions = defaultdict(list)
    for test in tests:
        functions[function_of(test)].append(test)
    for parameters in functions.values():
        random.Random(0).shuffle(parameters)
    rounds = max(map(len, functions.values()), default=0)
    return [parameters[i] for i in range(rounds) for parameters in functions.values() if i < len(parameters)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    events = read(Path(os.environ[RECORD]))
    if not any(event["event"] == "collected" for event in events):
        write("collected", count=len(items))
    started = {event["test"] for event in events if event["event"] == "start"}
    faults = Counter(function_of(event["test"]) for event in events if event["event"] in ("hang", "fault"))
    by_name = {item.nodeid: item for item in items}
    left = [
        test for test in by_name if test not in started and faults[function_of(test)] < FAULTS_PER_FUNCTION
    ]  # fmt: skip
    config.hook.pytest_deselected(items=[by_name[test] for test in by_name if test not in set(left)])
    items[:] = [by_name[test] for test in in_turns(left)]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write("broken", test=report.nodeid, text=report.longreprtext[-TEXT:])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test is over when the device is done with it: what faults or hangs later would be blamed on the next one."""
    yield
    synchronize()


def pytest_runtest_logstart(nodeid: str) -> None:
    write("start", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        error = cuda_error()
        text = f"{report.longreprtext[-TEXT:]}\n{error}".strip()
        write("fault" if error else "failed", test=report.nodeid, text=text)
        if error:
            os._exit(FAULT_STATUS)
    elif report.when == "call" or report.skipped:
        write(report.outcome, test=report.nodeid, seconds=round(report.duration, 3), **reason_of(report))


def pytest_sessionfinish() -> None:
    write("finished")


def reason_of(report: pytest.TestReport) -> dict[str, str]:
    """Why a test was skipped."""
    if not report.skipped:
        return {}
    where = report.longrepr
    return {"text": (where[2] if isinstance(where, tuple) else str(where)).removeprefix("Skipped: ")}


def synchronize() -> None:
    torch = sys.modules.get("torch")  # a test that fails before it imports torch has nothing to wait for
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cuda_error() -> str:
    """What the device reports, empty if it is well."""
    try:
        synchronize()
    except Exception as error:  # torch.AcceleratorError is a RuntimeError in some versions only
        return str(error).splitlines()[0]
    return ""
