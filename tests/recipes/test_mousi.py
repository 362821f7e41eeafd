"""MouSi: one product over features side by side is the sum of each encoder's own projection."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, rows
from torch.nn import functional as F

from moe_ext.recipes import MouSiFusion


def test_fusion_is_the_sum_of_projections():
    fusion = MouSiFusion((4, 6, 3), 5).double()
    features = [rows(2, 7, size, seed=size) for size in (4, 6, 3)]
    projected = [f @ w.T for f, w in zip(features, fusion.first.weight.split((4, 6, 3), dim=1), strict=True)]
    expected = F.gelu(sum(projected) + fusion.first.bias) @ fusion.second.weight.T + fusion.second.bias
    assert expected.shape == (2, 7, 5)
    assert_same([fusion(features)], [expected], [*features, *fusion.parameters()])


def test_features_of_other_encoders_are_refused():
    with pytest.raises(ValueError, match=r"features: expected last sizes \(4, 6\), got \(4, 5\)"):
        MouSiFusion((4, 6), 5)([torch.zeros(1, 1, 4), torch.zeros(1, 1, 5)])
