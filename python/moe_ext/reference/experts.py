"""Reference twins of the experts family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext.plan_types import RoutingPlan
from moe_ext.reference.activation import activate
from moe_ext.reference.grouped_gemm import grouped_gemm
from moe_ext.reference.permutation import unpermute


def expert_activation(
    pre_activation: Tensor,
    activation: str = "swiglu",
    *,
    gate_up_layout: str = "concatenated",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
) -> Tensor:
    """See :func:`moe_ext.expert_activation`."""
    return activate(pre_activation, activation, gate_up_layout, activation_alpha, activation_limit)


def _frozen(parameter: Tensor | None, trainable_experts: Tensor | None) -> Any:
    """The same values, with gradient zero where an expert is not trained."""
    if parameter is None or trainable_experts is None:
        return parameter
    return torch.where(trainable_experts.view(-1, *[1] * (parameter.dim() - 1)), parameter, parameter.detach())


def moe_mlp(
    input: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    plan: RoutingPlan,
    topk_weights: Tensor | None = None,
    *,
    weight_layout: str,
    activation: str = "swiglu",
    gate_up_layout: str = "concatenated",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
    trainable_experts: Tensor | None = None,
) -> Tensor:
    """See :func:`moe_ext.moe_mlp`."""
    gate_up_weight, down_weight, gate_up_bias, down_bias = (
        _frozen(x, trainable_experts) for x in (gate_up_weight, down_weight, gate_up_bias, down_bias)
    )
    topk = plan.topk_of(input.shape[0], topk_weights)
    pre_activation = grouped_gemm(
        input,
        gate_up_weight,
        plan.expert_offsets,
        weight_layout=weight_layout,
        bias=gate_up_bias,
        gather=(plan.permuted_to_slot, plan.slot_to_permuted, topk),
    )
    activated = expert_activation(
        pre_activation,
        activation,
        gate_up_layout=gate_up_layout,
        activation_alpha=activation_alpha,
        activation_limit=activation_limit,
    )
    rows = grouped_gemm(activated, down_weight, plan.expert_offsets, weight_layout=weight_layout, bias=down_bias)
    return unpermute(rows, plan.permuted_to_slot, plan.slot_to_permuted, topk, topk_weights)
