"""No recipe looks at device data on the host: all of them run on tensors that have no data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import moe_ext
from moe_ext.nn import Experts, ModuleExperts, MoELayer
from moe_ext.recipes import (
    BAM,
    EWA,
    FEAMOE,
    MDCS,
    MENTOR,
    PMOE,
    TAME,
    AWMoE,
    BigMac,
    CLIPMoE,
    CMoE,
    DeepSeekMoE,
    DeepSeekV2MoE,
    DeepSeekV3MoE,
    FactorLLM,
    FSMoE,
    MoEPlusPlus,
    MoExtend,
    MoiraiMoE,
    MouSiFusion,
    PostMoE,
    RoutePredictor,
    SwitchDiTBlock,
    SwitchTransformer,
    TaskExpert,
    TaskLevelMoE,
)

SIZES = (16, 12, 8, 2)


def dense() -> Experts:
    return Experts(1, 16, 12)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BAM": lambda: BAM(*SIZES, num_heads=2),
    "BigMac": lambda: BigMac(*SIZES, bottleneck_size=4),
    "CLIPMoE": lambda: CLIPMoE([Experts(1, 16, 12, activation="quick_gelu", bias=True) for _ in range(4)]),
    "DeepSeekMoE": lambda: DeepSeekMoE(*SIZES, sequence_level=True),
    "DeepSeekV2MoE": lambda: DeepSeekV2MoE(*SIZES, num_groups=4, topk_groups=2),
    "DeepSeekV3MoE": lambda: DeepSeekV3MoE(*SIZES, num_groups=4, topk_groups=2),
    "EWA": lambda: EWA(16, 12, 8),
    "FactorLLM": lambda: FactorLLM(dense(), 4),
    "FSMoE": lambda: FSMoE(*SIZES, router="expert_choice"),
    "MENTOR": lambda: MENTOR(16, 12),
    "MoEPlusPlus": lambda: MoEPlusPlus(16, 12, 5, capacity_factor=1.1),
    "MoExtend": lambda: MoExtend(MoELayer(16, 12, 4, 2), 1),
    "MoiraiMoE": lambda: MoiraiMoE(torch.randn(8, 16), 12),
    "PostMoE": lambda: PostMoE(dense()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(name):
    layer = LAYERS[name]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.randn(3, 5, 16, requires_grad=True)
        context = (torch.zeros(3, 1, dtype=torch.int64),) if name == "PostMoE" else ()
        output = layer(hidden, *context)
        tensors = [output] if isinstance(output, torch.Tensor) else output[:2]
        grads = torch.autograd.grad(
            sum(t.sum() for t in tensors),
            [hidden, *(p for p in layer.parameters() if p.requires_grad)],
            allow_unused=True,
        )
    assert grads[0].shape == hidden.shape and any(g is not None for g in grads[1:])


def test_a_host_sync_would_show():
    """Experts that are Python wait for the device, as documented."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        experts = ModuleExperts([nn.Linear(16, 16) for _ in range(4)])
        experts(torch.randn(5, 16), moe_ext.routing_plan(torch.zeros(5, 2, dtype=torch.int32), 4), torch.ones(5, 2))


# Models that are no plain layer: how they are made, and the shapes of what they are called with.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "AWMoE": (lambda: AWMoE(16, 12, 4, behaviour_size=5), [(3, 16), (3, 7, 5), (3, 5)]),
    "CMoE": (lambda: CMoE(16, 9, residual=True), [(3, 16)]),
    "FEAMOE": (lambda: FEAMOE(16, 3), [(3, 16)]),
    "MDCS": (lambda: MDCS(16, torch.tensor([9, 5, 1])), [(3, 16)]),
    "MouSiFusion": (lambda: MouSiFusion((4, 6), 16), [(3, 10)]),
    "PMOE": (lambda: PMOE(16, 2), [(3, 16)]),
    "RoutePredictor": (lambda: RoutePredictor(16, 3, 8, 2), [(3, 16)]),
    "SwitchDiTBlock": (lambda: SwitchDiTBlock(nn.Linear(16, 16), 16), [(3, 5, 16), (3, 16)]),
    "SwitchTransformer": (lambda: SwitchTransformer(16, 12, 4), [(3, 5, 16)]),
    "TAME": (lambda: TAME(16, 2), [(3, 16)]),
    "TaskExpert": (lambda: TaskExpert(16, 12, 5, 3, topk=2), [(7, 16), (3, 7, 16)]),
    "TaskLevelMoE": (lambda: TaskLevelMoE(16, 12, 4, task_size=6), [(3, 5, 16), (3, 6)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_of_models(name):
    make, shapes = MODELS[name]
    model = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        output = model(inputs[0].split((4, 6), -1)) if name == "MouSiFusion" else model(*inputs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        grads = torch.autograd.grad(first.sum(), [*inputs, *model.parameters()], allow_unused=True)
    assert grads[0].shape == shapes[0]
