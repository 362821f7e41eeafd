"""The CPU tests again, on a GPU: each module here re-exports the tests of its twin in tests/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_ext


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = None
    if not torch.cuda.is_available():
        reason = "no GPU: torch.cuda.is_available() is False"
    elif not moe_ext.build_info()["cuda"]:
        reason = "moe_ext was built without CUDA"
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="marked cpu: runs in tests/"))


@pytest.fixture
def device() -> str:
    return "cuda"
