"""What users of torch do with modules and ops: checkpointing, torch.func, copies, meta tensors, autocast."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moe_ext
from cases import make_rows
from compare import relative_error
from moe_ext.nn import MoELayer
from op_calls import OPS, make_call

DIFFERENTIABLE = [name for name in OPS if name not in ("a2a_pack_rows", "a2a_plan", "a2a_unpack_rows", "routing_plan")]
CONFIGURATION = {"shared_intermediate_size": 20, "router": {"selection_bias": True}, "experts": {"bias": True}}


def make_layer(device: str, **configuration) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(16, 12, 8, 2, **{**CONFIGURATION, **configuration}).to(device)


def loss_of(output) -> torch.Tensor:
    return output[0].square().sum() + 0.1 * output[1] + 0.01 * output[2]


def grads_of(loss, layer, hidden) -> list[torch.Tensor]:
    leaves = [hidden, *layer.parameters()]
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in leaves]


def assert_equal(actual, expected):
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("variant", ["reentrant", "not reentrant", "selective"])
def test_activation_checkpointing(variant, device):
    layer = make_layer(device, capacity_factor=0.75)
    hidden = make_rows(30, 16, dtype=torch.float32, device=device).requires_grad_()
    expected = grads_of(loss_of(layer(hidden)), layer, hidden)

    def keep_expert_outputs(_, op, *args, **kwargs):
        kept = op == torch.ops.moe_ext.moe_mlp.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"use_reentrant": variant == "reentrant"}
    if variant == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_expert_outputs)
    output = checkpoint(lambda x: tuple(layer(x)), hidden, **options)
    assert_equal(grads_of(loss_of(output), layer, hidden), expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_without_gradients_of_every_op(name, device):
    call = make_call(name, 10, device)
    expected = call.run(*call.inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    with torch.no_grad():
        actual = call.run(*call.inputs)
        mapped = vmap(call.run)(*(x.unsqueeze(0) for x in call.inputs))
    actual, mapped = (x if isinstance(x, tuple) else (x,) for x in (actual, mapped))
    assert_equal(actual, expected)
    assert_equal((x[0] for x in mapped), expected)
    assert not any(x.requires_grad for x in actual)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call.run(*(forward_ad.make_dual(x, x) if x.is_floating_point() else x for x in call.inputs))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_reverse_transforms_of_every_op(name, device):
    """torch.func.grad equals autograd; forward mode says that there is none, where torch alone would return zeros."""
    call = make_call(name, 9, device)
    places = [i for i, x in enumerate(call.inputs) if x.requires_grad]
    leaves = [call.inputs[i].detach() for i in places]

    def total(*leaves):
        inputs = list(call.inputs)
        for place, leaf in zip(places, leaves, strict=True):
            inputs[place] = leaf
        outputs = call.run(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return sum((x.square().sum() for x in outputs if x.is_floating_point()), torch.zeros((), device=device))

    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(total(*tracked), tracked)
    assert_equal(grad(total, tuple(range(len(leaves))))(*leaves), expected)
    with pytest.raises(NotImplementedError, match=f"moe_ext::{name}: expected no tangents, got a dual tensor"):
        jvp(total, tuple(leaves), tuple(leaves))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        total(*(forward_ad.make_dual(leaf, leaf) for leaf in leaves))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_a_layer(device):
    """Gradients per sample, an ensemble and a Jacobian; vmap runs the ops once per sample, as torch warns."""
    layer = make_layer(device)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    samples = make_rows(3, 5, 16, dtype=torch.float32, device=device)

    def loss(p, x):
        return loss_of(functional_call(layer, (p, buffers), (x,)))

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)
    outputs = vmap(lambda x: functional_call(layer, (parameters, buffers), (x,))[0])(samples)
    for index, sample in enumerate(samples):
        layer.zero_grad()
        output = layer(sample)
        assert relative_error(outputs[index], output.hidden) < 1e-6
        loss_of(output).backward()
        for name, parameter in layer.named_parameters():
            assert relative_error(per_sample[name][index], parameter.grad) < 1e-5, name
    ensemble = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in parameters.items()}
    both = vmap(lambda p: functional_call(layer, (p, buffers), (samples[0],))[0])(ensemble)
    doubled = {name: 2 * p.detach() for name, p in parameters.items()}
    assert relative_error(both[1], functional_call(layer, (doubled, buffers), (samples[0],))[0]) < 1e-6
    jacobian = jacrev(lambda x: layer(x).hidden)(samples[0])
    row = torch.autograd.functional.jacobian(lambda x: layer(x).hidden, samples[0])
    assert relative_error(jacobian, row) < 1e-6


def test_deterministic_algorithms_ask_for_nothing_else(device):
    torch.use_deterministic_algorithms(True)  # an op without a deterministic form would raise
    layer = make_layer(device, capacity_factor=0.5)
    hidden = make_rows(50, 16, dtype=torch.float32, device=device).requires_grad_()
    assert_equal(
        grads_of(loss_of(layer(hidden)), layer, hidden),
        [g.clone() for g in grads_of(loss_of(layer(hidden)), layer, hidden)],
    )


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_compute_the_same(way, device):
    layer = make_layer(device)
    hidden = make_rows(9, 16, dtype=torch.float32, device=device)
    loss_of(layer(hidden)).backward()  # statistics and gradients are there when the copy is made
    if way == "deepcopy":
        copied = copy.deepcopy(layer)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = MoELayer(16, 12, 8, 2, **CONFIGURATION).to(device)
        copied.load_state_dict(layer.state_dict(), strict=True)
    assert_equal(copied(hidden), layer(hidden))
    assert copied.experts.down_weight is not layer.experts.down_weight


def test_meta_device(device):
    """Shapes without memory, then memory, then numbers: what loaders of large models do."""
    with torch.device("meta"):
        layer = MoELayer(16, 12, 8, 2, **CONFIGURATION)
        output = layer(torch.empty(3, 7, 16))
    assert output.hidden.is_meta and output.hidden.shape == (3, 7, 16)
    loss_of(output).backward()
    assert layer.experts.gate_up_weight.grad.shape == (8, 24, 16)
    layer.zero_grad()
    layer.to_empty(device=device)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(x.isfinite().all() for x in layer.state_dict().values())  # buffers too
    layer.load_state_dict(make_layer(device).state_dict())
    hidden = make_rows(9, 16, dtype=torch.float32, device=device)
    assert_equal(layer(hidden), make_layer(device)(hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_router_and_weights_alone(dtype, device):
    layer = make_layer(device)
    hidden = make_rows(40, 16, dtype=torch.float32, device=device).requires_grad_()
    exact = layer(hidden)
    ids = layer.statistics.topk_ids
    with torch.autocast(device, dtype):
        output = layer(hidden)
        nested = checkpoint(lambda x: tuple(layer(x)), hidden, use_reentrant=False)
    assert output.hidden.dtype == dtype and output.balance_loss.dtype == torch.float32
    assert torch.equal(layer.statistics.topk_ids, ids)
    assert relative_error(output.hidden, exact.hidden) < 2e-2
    plain = grads_of(loss_of([output.hidden.float(), *output[1:]]), layer, hidden)
    again = grads_of(loss_of([nested[0].float(), *nested[1:]]), layer, hidden)
    assert all(g.dtype == torch.float32 for g in plain)
    assert_equal(plain, again)


def test_which_devices_have_autocast_is_not_asked_by_ops(device, monkeypatch):
    """Dynamo of torch 2.11 cannot trace that question."""
    call = make_call("grouped_gemm", 9, device)
    with torch.autocast(device, torch.bfloat16):
        monkeypatch.delattr(torch.amp, "is_autocast_available")
        assert call.run(*call.inputs).dtype == torch.bfloat16
        monkeypatch.undo()


def test_every_op_has_a_call():
    missing = [name for name in moe_ext.__all__ if hasattr(torch.ops.moe_ext, name) and name not in OPS]
    assert not missing, f"tests/op_calls.py has no call of {missing}"
