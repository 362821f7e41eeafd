"""Fixtures of the CPU tests; tests/gpu overrides `device`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from expert_parallel_cases import make_two_levels
from rank_pool import RankPool

# Read by the op libraries when they first allocate; torch's own filling does not reach that memory on the CPU.
os.environ["MOE_EXT_POISON"] = "1"


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Uninitialised memory is filled with NaN (integers: the largest), so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks over gloo, started once."""
    with RankPool(4, tmp_path_factory.mktemp("ranks")) as pool:
        pool.run(4, make_two_levels, [(n, m) for n in (2, 3, 4) for m in range(1, n + 1) if n % m == 0])
        yield pool


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """MOE_EXT_SAMPLE=n keeps every n-th test; the emulated kernels are slow, and parameters repeat themselves."""
    keep_every = int(os.environ.get("MOE_EXT_SAMPLE", "1"))
    dropped = [item for index, item in enumerate(items) if index % keep_every]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = items[::keep_every]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: needs float64 or the CPU library; not repeated on the GPU")
