"""The models that are no plain layer: without tokens, and in 16 bits."""

from __future__ import annotations

import pytest
import torch
from test_no_host_sync import MODELS


def run(name: str, dtype: torch.dtype, empty: bool) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    make, shapes = MODELS[name]
    model = make().to(dtype)
    if empty:
        shapes = [(3, 0, 16) if shape == (3, 7, 16) else (0, *shape[1:]) for shape in shapes]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    output = model(inputs[0].split((4, 6), -1)) if name == "MouSiFusion" else model(*inputs)
    first = output if isinstance(output, torch.Tensor) else output[0]
    return first, list(torch.autograd.grad(first.sum(), [*inputs, *model.parameters()], allow_unused=True))


@pytest.mark.parametrize("name", MODELS)
def test_no_tokens(name):
    output, grads = run(name, torch.float32, empty=True)
    assert output.numel() == 0 and all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_16_bits(name, dtype):
    output, grads = run(name, dtype, empty=False)
    assert output.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)
    assert output.dtype in (dtype, torch.float32) and all(g is None or g.dtype == dtype for g in grads)
