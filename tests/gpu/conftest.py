"""The CPU tests again, on a GPU: each module here re-exports the tests of its twin in tests/.

Dry runs, for machines without a GPU: MOE_EXT_GPU_TESTS_ON=cpu runs them on the CPU, graphs and all, with stand-ins for
torch.cuda (tests/cuda_stand_in.py); MOE_EXT_GPU_TESTS_ON=fake-cuda on tensors that say they are on a GPU, so that a
tensor left on the CPU shows (tests/fake_cuda.py). MOE_EXT_PER_FUNCTION=n keeps n parameters of each test.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import cuda_stand_in
import moe_ext
from fake_cuda import fake_cuda

# torch asks for it where algorithms must be deterministic, and looks when cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DRY_RUN = os.environ.get("MOE_EXT_GPU_TESTS_ON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = None
    if not DRY_RUN and not torch.cuda.is_available():
        reason = "no GPU: torch.cuda.is_available() is False"
    elif not DRY_RUN and not moe_ext.build_info()["cuda"]:
        reason = "moe_ext was built without CUDA"
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="marked cpu: runs in tests/"))
    if "MOE_EXT_PER_FUNCTION" in os.environ:
        kept = some_of_each(here, int(os.environ["MOE_EXT_PER_FUNCTION"]))
        dropped = set(here) - kept
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]
    # What compiles takes longest: last, where a time limit costs least.
    items.sort(key=lambda item: "compile" in item.path.name)


def some_of_each(items: list[pytest.Item], number: int) -> set[pytest.Item]:
    """Of every function that many, spread over its parameters from the first to the last."""
    functions = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("skip"):
            functions[item.nodeid.split("[")[0]].append(item)
    return {
        parameters[round(i * (len(parameters) - 1) / max(number - 1, 1))]
        for parameters in functions.values()
        for i in range(number)
    }


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    if DRY_RUN:
        cuda_stand_in.install(monkeypatch)
    return "cpu" if DRY_RUN == "cpu" else "cuda"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if DRY_RUN != "fake-cuda" or Path(__file__).parent not in pyfuncitem.path.parents:
        return None
    with pytest.MonkeyPatch.context() as monkeypatch, fake_cuda(monkeypatch):
        pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    return True
