"""The steps that tests/gpu captures, on the CPU: they run, repeat themselves bit for bit, and follow their inputs."""

from __future__ import annotations

import pytest
import torch

from capture_steps import LAYERS, TOKENS, assert_same, make_inputs, make_layer_step, make_ops_step, one_hot_logits
from compare import relative_error
from delayed_exchange import DelayedExchange
from parallel_steps import PARALLEL, dense_twin, make_parallel_layer, make_parallel_step, step_of


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_steps_depend_on_their_inputs_alone(name, dtype):
    step = make_parallel_step(name, TOKENS["few"], dtype, "cpu", DelayedExchange)
    inputs = make_inputs(TOKENS["few"], dtype, "cpu")
    first = step(inputs)
    assert all(x.isfinite().all() for x in first)
    assert_same(step(inputs), first)
    for x, new in zip(inputs, make_inputs(TOKENS["few"], dtype, "cpu", seed=10), strict=True):
        x.copy_(new)
    second = step(inputs)
    assert_same(second, step([x.clone() for x in inputs]))
    assert [x.shape for x in second] == [x.shape for x in first] and not torch.equal(second[0], first[0])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [name for name, how in PARALLEL.items() if not {"payload", "overflow"} & {*how}])
def test_parallel_steps_equal_the_layer_in_one_process(name, ranks):
    """One rank, or several that are all one: expert e of the dense layer is the local expert e modulo their number."""
    layer = make_parallel_layer(name, TOKENS["few"], DelayedExchange if ranks > 1 else lambda _: DelayedExchange(1))
    layer = layer.double()
    inputs = make_inputs(TOKENS["few"], torch.float64, "cpu")
    ours, dense = step_of(layer)(inputs), step_of(dense_twin(layer))(inputs)
    for mine, exact in zip(ours[:2], dense[:2], strict=True):
        assert relative_error(mine, exact) <= 1e-12
    for place, (parameter, _) in enumerate(layer.named_parameters()):
        mine, exact = ours[2 + place], dense[2 + place]
        if parameter.startswith("experts."):
            exact = exact.unflatten(0, (-1, len(layer.local_experts))).sum(0)
        assert relative_error(mine, exact) <= 1e-12, parameter
