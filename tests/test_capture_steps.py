"""The steps that tests/gpu captures, on the CPU: they run, repeat themselves bit for bit, and follow their inputs."""

from __future__ import annotations

import pytest
import torch

from capture_steps import LAYERS, TOKENS, assert_same, make_inputs, make_layer_step, make_ops_step, one_hot_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LAYERS, "ops"])
def test_steps_depend_on_their_inputs_alone(name, dtype, device):
    step = make_ops_step(dtype, device) if name == "ops" else make_layer_step(name, dtype, device)
    inputs = make_inputs(TOKENS["few"], dtype, device)
    first = step(inputs)
    assert all(x.isfinite().all() for x in first)
    assert_same(step(inputs), first)
    # A replay keeps the tensors and changes what is in them.
    for x, new in zip(inputs, make_inputs(TOKENS["few"], dtype, device, seed=10), strict=True):
        x.copy_(new)
    one_hot_logits(inputs)
    second = step(inputs)
    assert_same(second, step([x.clone() for x in inputs]))
    assert [x.shape for x in second] == [x.shape for x in first]
    assert not torch.equal(second[0], first[0])
