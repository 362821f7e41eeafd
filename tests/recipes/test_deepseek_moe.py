"""DeepSeekMoE V1 against the formula, V2 and V3 against the blocks of transformers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows, switch_loss

from compare import relative_error
from moe_ext.recipes import DeepSeekMoE, DeepSeekV2MoE, DeepSeekV3MoE

SIZES = (16, 12, 8, 3)


@pytest.mark.parametrize("sequence_level", [False, True])
def test_v1(backend, sequence_level):
    layer = DeepSeekMoE(*SIZES, sequence_level=sequence_level, backend=backend).double()
    hidden = rows(4, 5, 16)
    x = hidden.view(20, 16)
    scores = torch.softmax(x @ layer.router.logits.weight.T, dim=-1)
    weights = keep_topk(scores, 3)
    expected = mixture(all_outputs(layer.experts, x), weights) + layer.shared(x)
    parts = [(scores, weights)] if not sequence_level else zip(scores.split(5), weights.split(5), strict=True)
    loss = torch.stack([switch_loss(p, w, 3) for p, w in parts]).mean()
    output = layer(hidden)
    assert_same([output.hidden, output.balance_loss], [expected.view(4, 5, 16), loss], [hidden, *layer.parameters()])
    assert layer.shared.down.in_features == 2 * 12


def copy_weights(layer, block) -> None:
    pairs = [
        (layer.router.logits.weight, block.gate.weight),
        (layer.experts.gate_up_weight, block.experts.gate_up_proj),
        (layer.experts.down_weight, block.experts.down_proj),
    ]
    for ours, theirs in pairs:
        theirs.data.copy_(ours.data)
    gate, up = layer.shared.gate_up.weight.data.chunk(2)
    block.shared_experts.gate_proj.weight.data.copy_(gate)
    block.shared_experts.up_proj.weight.data.copy_(up)
    block.shared_experts.down_proj.weight.data.copy_(layer.shared.down.weight.data)


def compare_with_transformers(layer, block) -> None:
    """Their routers compute in float32, so ours does in float64 what they do within its precision."""
    hidden = rows(4, 5, 16)
    ours, theirs = layer(hidden).hidden, block(hidden)
    for a, b in zip(
        [ours, *torch.autograd.grad(ours.sin().sum(), [hidden, layer.router.logits.weight, layer.experts.down_weight])],
        [theirs, *torch.autograd.grad(theirs.sin().sum(), [hidden, block.gate.weight, block.experts.down_proj])],
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


def test_v2_is_the_block_of_transformers(backend):
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = modeling.DeepseekV2Config(
        hidden_size=16, num_attention_heads=2, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, experts_implementation="eager",
    )  # fmt: skip
    layer = DeepSeekV2MoE(*SIZES, num_groups=4, topk_groups=2, backend=backend).double()
    block = modeling.DeepseekV2Moe(config).double()
    copy_weights(layer, block)
    compare_with_transformers(layer, block)


def test_v2_losses_over_devices():
    """A token goes to two groups at most: sent evenly, every device gets 2 / 4 of the tokens."""
    layer = DeepSeekV2MoE(*SIZES, num_groups=4, topk_groups=2).double()
    hidden = rows(40, 16)
    output = layer(hidden)
    scores = torch.softmax(hidden @ layer.router.logits.weight.T, dim=-1)
    here = torch.nn.functional.one_hot(output.topk_ids.long() // 2, 4).sum(1).double()
    assert here.gt(0).sum(1).max() == 2
    probability = scores.view(40, 4, 2).sum(-1).mean(0)
    computation = (8 / (3 * 40) * here.sum(0) / 2 * probability).sum()
    communication = (4 / (2 * 40) * here.gt(0).double().sum(0) * probability).sum()
    assert_same(layer.device_losses(output), [computation, communication], [hidden, layer.router.logits.weight])


def test_v3_is_the_block_of_transformers(backend):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=16, num_attention_heads=2, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True, experts_implementation="eager",
    )  # fmt: skip
    layer = DeepSeekV3MoE(*SIZES, num_groups=4, topk_groups=2, backend=backend).double()
    layer.router.selection_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    block = modeling.DeepseekV3MoE(config).double()
    block.gate.e_score_correction_bias.copy_(layer.router.selection_bias)
    copy_weights(layer, block)
    compare_with_transformers(layer, block)


def test_v3_balances_without_a_loss():
    """A bias that every token's best experts bring down, until the load is even to within a few tokens."""
    layer = DeepSeekV3MoE(*SIZES, num_groups=1, topk_groups=1)
    hidden = rows(64, 16).detach().float() + 1
    layer(hidden)
    before = layer.statistics.tokens_per_expert
    for _ in range(200):
        layer.balance(0.005)
        layer(hidden)
    assert before.max() > 40 and layer.statistics.tokens_per_expert.max() <= 27 and before.sum() == 64 * 3
