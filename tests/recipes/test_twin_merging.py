"""Twin-Merging: all singular values and a one-hot router give a fine-tune back; what fewer lose is the SVD's."""

from __future__ import annotations

import torch
from formulas import assert_same, rows
from lora_formulas import linear

from compare import relative_error
from moe_ext.recipes import TwinMerging


def make_parts():
    return linear(8, 6, bias=True), [linear(8, 6) for _ in range(3)]


def test_one_hot_router_is_the_fine_tune():
    pretrained, fine_tunes = make_parts()
    layer = TwinMerging(pretrained, fine_tunes, rank=6)
    hidden = rows(3, 5, 8)
    output = layer(hidden, torch.eye(3).double() * 1e4)
    expected = torch.stack([x @ f.weight.T + pretrained.bias for x, f in zip(hidden, fine_tunes, strict=True)])
    assert relative_error(output, expected) < 1e-12


def test_formula():
    pretrained, fine_tunes = make_parts()
    layer = TwinMerging(pretrained, fine_tunes, rank=2, merge_scale=0.4)
    hidden, logits = rows(3, 5, 8), rows(3, 3, seed=4)
    merged = pretrained.weight + 0.4 * sum(f.weight - pretrained.weight for f in fine_tunes)
    deltas = []
    for fine_tune in fine_tunes:
        left, values, right = torch.linalg.svd(fine_tune.weight - merged, full_matrices=False)
        deltas.append(left[:, :2] * values[:2] @ right[:2])
    weights = merged + torch.einsum("st,toi->soi", torch.softmax(logits, dim=-1), torch.stack(deltas))
    expected = hidden @ weights.detach().mT + pretrained.bias
    assert relative_error(layer(hidden, logits), expected) < 1e-12

    def plain(x, r):
        mixed = merged + torch.einsum("st,toi->soi", torch.softmax(r, dim=-1), torch.stack(deltas))
        return x @ mixed.mT + pretrained.bias

    assert_same([layer(hidden, logits)], [plain(hidden, logits)], [hidden, logits])
