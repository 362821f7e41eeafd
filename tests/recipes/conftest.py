"""Recipes run on the kernels and on their twins."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["kernels", "reference"])
def backend(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
