"""Reference twins of the grouped_gemm family: a loop over experts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moe_ext.reference.activation import activate
from moe_ext.reference.permutation import permute


def group_boundaries(expert_offsets: Tensor, num_rows: int) -> list[int]:
    """Where groups begin and end: offsets clamped to [0, num_rows], made monotone by their running maximum."""
    boundaries: list[int] = expert_offsets.clamp(0, num_rows).cummax(0).values.tolist()
    return boundaries


def grouped_gemm(
    input: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    weight_layout: str,
    bias: Tensor | None = None,
    gather: tuple[Tensor, Tensor, int] | None = None,
    activation: str = "none",
    gate_up_layout: str = "concatenated",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
) -> Tensor:
    """See :func:`moe_ext.grouped_gemm`."""
    rows = input if gather is None else permute(input, *gather)
    boundaries = group_boundaries(expert_offsets, rows.shape[0])
    out_features = weight.shape[1] if weight_layout == "enk" else weight.shape[2]
    products = [rows.new_zeros(boundaries[0], out_features)]
    for expert in range(weight.shape[0]):
        matrix = weight[expert].t() if weight_layout == "enk" else weight[expert]
        product = rows[boundaries[expert] : boundaries[expert + 1]] @ matrix
        products.append(product if bias is None else product + bias[expert])
    products.append(rows.new_zeros(rows.shape[0] - boundaries[-1], out_features))
    return activate(torch.cat(products), activation, gate_up_layout, activation_alpha, activation_limit)


def grouped_gemm_wgrad(
    input: Tensor,
    grad_output: Tensor,
    expert_offsets: Tensor,
    *,
    weight_layout: str,
    gather: tuple[Tensor, Tensor, int] | None = None,
    out_dtype: torch.dtype | None = None,
    trainable_experts: Tensor | None = None,
) -> Tensor:
    """See :func:`moe_ext.grouped_gemm_wgrad`."""
    rows = input if gather is None else permute(input, *gather)
    boundaries = group_boundaries(expert_offsets, rows.shape[0])
    dtype = out_dtype or input.dtype
    gradients = []
    for begin, end in pairwise(boundaries):
        x, grad = rows[begin:end].to(dtype), grad_output[begin:end].to(dtype)
        gradients.append(grad.t() @ x if weight_layout == "enk" else x.t() @ grad)
    stacked = torch.stack(gradients)
    return stacked if trainable_experts is None else stacked.masked_fill(~trainable_experts[:, None, None], 0)


def grouped_bias_grad(grad_output: Tensor, expert_offsets: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`moe_ext.grouped_bias_grad`."""
    boundaries = group_boundaries(expert_offsets, grad_output.shape[0])
    accumulate = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    sums = [grad_output[begin:end].to(accumulate).sum(0) for begin, end in pairwise(boundaries)]
    return torch.stack(sums).to(out_dtype or grad_output.dtype)
