"""CLIP-MoE: identical copies are the dense model; the last layers of a CLIP tower of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows, switch_loss

from compare import relative_error
from moe_ext.nn import Experts
from moe_ext.recipes import CLIPMoE, upcycle_clip


def make_ffn() -> Experts:
    return Experts(1, 10, 16, activation="quick_gelu", bias=True).double()


def test_formula(backend):
    ffns = [make_ffn() for _ in range(4)]
    layer = CLIPMoE(ffns, backend=backend)
    hidden = rows(13, 10)
    scores = torch.softmax(hidden @ layer.router.logits.weight.T, dim=-1)
    weights = keep_topk(scores, 2, renormalize=True)
    expected = mixture(all_outputs(layer.experts, hidden), weights)
    assert relative_error(all_outputs(layer.experts, hidden)[2], all_outputs(ffns[2], hidden)[0]) == 0
    output = layer(hidden)
    assert_same(
        [output.hidden, output.balance_loss], [expected, switch_loss(scores, weights, 2)], [hidden, *layer.parameters()]
    )


def test_last_layers_of_a_clip_tower():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    dense = transformers.CLIPVisionModel(config).double().eval()
    pixels = rows(2, 3, 8, 8).detach()
    expected = dense(pixels).last_hidden_state
    model = copy.deepcopy(dense)
    layers = upcycle_clip(model, [dense] * 3, last=2)
    assert len(layers) == 2 and all(layer.experts.num_experts == 4 for layer in layers)
    assert relative_error(model(pixels).last_hidden_state, expected) < 1e-12
    mlps = [block.mlp for name, block in model.named_modules() if name.count(".") and hasattr(block, "mlp")]
    assert [type(m).__name__ for m in mlps] == ["CLIPMLP", "InPlaceOfMLP", "InPlaceOfMLP"]
    assert all(m.output.balance_loss > 0 for m in mlps[1:])
    other = copy.deepcopy(dense)
    torch.nn.init.normal_(
        dict(other.named_parameters())[next(n for n, _ in other.named_parameters() if n.endswith("2.mlp.fc1.weight"))]
    )
    model = copy.deepcopy(dense)
    upcycle_clip(model, [other] * 3, last=1)
    assert relative_error(model(pixels).last_hidden_state, expected) > 1e-3
    with pytest.raises(ValueError, match="pattern: expected 4 modules that match"):
        upcycle_clip(copy.deepcopy(dense), [dense], last=4)
