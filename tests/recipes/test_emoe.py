"""EMoE: a dense FFN as a mixture; all experts are the dense FFN, bitwise where sums are exact."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, mixture, rows

from moe_ext.nn import Experts
from moe_ext.recipes import EMoE

pytest.importorskip("scipy")


def make(topk: int, backend: str, activation: str = "relu", **options) -> tuple[Experts, EMoE]:
    dense = Experts(1, 10, 24, activation=activation, bias=True).double()
    return dense, EMoE(dense, 4, topk, generator=torch.Generator().manual_seed(1), backend=backend, **options)


def test_all_experts_are_the_dense_ffn_bitwise(backend):
    """With small integers as weights every order of summation is exact."""
    dense = Experts(1, 10, 24, activation="relu", bias=True).double()
    for weight in dense.parameters():
        weight.data.copy_(torch.randint(-4, 5, weight.shape))
    layer = EMoE(dense, 4, 4, backend=backend)
    hidden = torch.randint(-8, 9, (13, 10)).double()
    expected = all_outputs(dense, hidden)[0]
    assert expected.abs().sum() > 0 and torch.equal(layer(hidden).hidden, expected)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_formula(backend, activation):
    """Gate: mean of the keys; weights 1; output bias over k. No task gradient to the gate: zeros, not None."""
    dense, layer = make(2, backend, activation)
    hidden = rows(13, 10)
    keys = layer.experts.gate_up_weight[:, -6:].mean(1).detach()
    assert torch.equal(keys, layer.router.logits.weight)
    picked = (hidden @ keys.T).topk(2).indices
    weights = torch.zeros(13, 4, dtype=torch.float64).scatter(1, picked, 1.0)
    expected = mixture(all_outputs(layer.experts, hidden), weights)
    assert_same([layer(hidden).hidden], [expected], [hidden, *layer.experts.parameters()])
    (grad,) = torch.autograd.grad(layer(hidden).hidden.square().sum(), layer.router.logits.weight)
    assert not grad.any()
    assert torch.equal(layer.experts.down_bias[0], dense.down_bias[0] / 2)
