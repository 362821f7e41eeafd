"""MouSi: one product over features side by side is the sum of each encoder's own projection."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import MouSiFusion


def test_fusion_is_the_sum_of_projections():
    fusion = MouSiFusion((4, 6, 3), 5).double()
    features = [make_rows(2, 7, size, dtype=torch.float64, seed=size).requires_grad_() for size in (4, 6, 3)]
    projected = [f @ w.T for f, w in zip(features, fusion.first.weight.split((4, 6, 3), dim=1), strict=True)]
    expected = F.gelu(sum(projected) + fusion.first.bias) @ fusion.second.weight.T + fusion.second.bias
    output = fusion(features)
    assert output.shape == (2, 7, 5) and relative_error(output, expected) < 1e-12
    inputs = [*features, *fusion.parameters()]
    for a, b in zip(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-12


def test_features_of_other_encoders_are_refused():
    with pytest.raises(ValueError, match=r"features: expected last sizes \(4, 6\), got \(4, 5\)"):
        MouSiFusion((4, 6), 5)([torch.zeros(1, 1, 4), torch.zeros(1, 1, 5)])
