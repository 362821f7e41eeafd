"""Whole expert layers of other libraries: same weights, same routing, same result.

Weights are gate_up [E, 2I, H] and down [E, H, I]; for gpt-oss gate_up [E, H, 2I] interleaved, down [E, I, H], and a
bias of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LayerForward = Callable[[Tensor, Tensor, Tensor], Tensor]

# Names of transformers' parameters, in the order of the weights here.
PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


class _Sorted(NamedTuple):
    experts: Tensor  # of each row
    tokens: Tensor
    weights: Tensor
    ends: Tensor  # of each expert's rows


def _sort(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> _Sorted:
    flat = topk_ids.flatten()
    order = torch.argsort(flat, stable=True)
    # bincount would do, but waits for the device: a pipeline with it cannot be captured into a graph.
    ends = torch.histc(flat.float(), bins=num_experts, min=0, max=num_experts).cumsum(0).int()
    return _Sorted(flat[order], order // topk_ids.shape[1], topk_weights.flatten()[order], ends)


def _combine(rows: Tensor, by_expert: _Sorted, hidden: Tensor) -> Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    return out.index_add_(0, by_expert.tokens, rows.float() * by_expert.weights[:, None]).to(hidden.dtype)


def grouped_mm_layer(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The pipeline that people write around ``torch.nn.functional.grouped_mm``."""
    by_expert = _sort(topk_ids, topk_weights, gate_up.shape[0])
    gate, up = F.grouped_mm(hidden[by_expert.tokens], gate_up.transpose(1, 2), offs=by_expert.ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=by_expert.ends)
    return _combine(rows, by_expert, hidden)


def grouped_mm_gpt_oss_layer(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor,
    down_bias: Tensor,
) -> Tensor:  # fmt: skip
    """The same with gpt-oss's biases and clamped SwiGLU."""
    by_expert = _sort(topk_ids, topk_weights, gate_up.shape[0])
    both = F.grouped_mm(hidden[by_expert.tokens], gate_up, offs=by_expert.ends) + gate_up_bias[by_expert.experts]
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    rows = F.grouped_mm(gate * torch.sigmoid(1.702 * gate) * (up + 1), down, offs=by_expert.ends)
    return _combine(rows + down_bias[by_expert.experts], by_expert, hidden)


def dense_ceiling(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two products of the layer's FLOPs, with one expert's weights [in, out] and nothing around them."""
    return (rows @ up)[:, : down.shape[0]] @ down


def dense_training(rows: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """The six products of a forward and backward of these FLOPs; what they compute is of no account."""
    both = rows @ up
    activated = both[:, : down.shape[0]]
    output = activated @ down
    return output @ down.T, both @ up.T, rows.T @ both, activated.T @ output


def transformers_experts(gate_up: Tensor, down: Tensor, *biases: Tensor) -> dict[str, torch.nn.Module]:
    """Hugging Face's experts, by implementation: gpt-oss's with biases, else OLMoE's; {} without transformers 5."""
    try:
        from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    except ImportError:
        return {}
    num_experts = down.shape[0]
    intermediate_size, hidden_size = down.shape[1:] if biases else reversed(down.shape[1:])
    modules = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        config = (GptOssConfig if biases else OlmoeConfig)(
            hidden_size=hidden_size, intermediate_size=intermediate_size, num_local_experts=num_experts,
            hidden_act="silu",
        )  # fmt: skip
        config.num_local_experts = num_experts
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = (GptOssExperts if biases else OlmoeExperts)(config)
        for name, weight in zip(PARAMETERS, (gate_up, down, *biases), strict=False):
            setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
        modules[f"transformers {implementation}"] = experts
    return modules


def liger_layer(gate_up: Tensor, down: Tensor) -> dict[str, LayerForward]:
    """Liger's fused experts; a GPU and the package are needed."""
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError:
        return {}

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(hidden, gate_up, down, ids.int(), weights)

    return {"liger": forward}
