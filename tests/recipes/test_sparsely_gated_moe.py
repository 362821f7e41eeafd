"""The sparsely-gated mixture of 2017 written out: noise, gates, both balance losses."""

from __future__ import annotations

import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows
from torch.nn import functional as F

from cases import make_rows
from moe_ext.recipes import SparselyGatedMoE


def cv_squared(x: torch.Tensor) -> torch.Tensor:
    return ((x - x.mean()) ** 2).sum() / (len(x) - 1) / x.mean() ** 2


def test_formula(backend):
    layer = SparselyGatedMoE(16, 12, 6, 2, backend=backend).double()
    gate, noise = layer.router.logits.weight, layer.router.noise.weight
    for seed, weight in enumerate((gate, noise)):
        weight.data.copy_(make_rows(6, 16, dtype=torch.float64, seed=seed, scale=0.3))
    hidden = rows(3, 7, 16)
    x = hidden.view(21, 16)
    std = F.softplus(x @ noise.T) + 0.01
    logits = x @ gate.T + torch.randn(21, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * std
    kept = keep_topk(logits - logits.detach().min() + 1, 2) > 0
    gates = torch.softmax(logits.masked_fill(~kept, float("-inf")), dim=1)
    load = []
    for e in range(6):
        others = logits[:, torch.arange(6) != e].topk(2, dim=1).values[:, 1]
        load.append(torch.special.ndtr(((x @ gate.T)[:, e] - others) / std[:, e]).sum())
    output = layer(hidden, generator=torch.Generator().manual_seed(5))
    assert_same(
        [output.hidden, output.balance_loss],
        [
            mixture(all_outputs(layer.experts, x), gates).view(3, 7, 16),
            cv_squared(gates.sum(0)) + cv_squared(torch.stack(load)),
        ],
        [hidden, *layer.parameters()],
        bound=1e-9,
    )


def test_evaluation_has_no_noise():
    layer = SparselyGatedMoE(16, 12, 6, 2).eval()
    hidden = rows(21, 16).detach().float()
    assert torch.equal(layer(hidden).hidden, layer(hidden).hidden)
