"""Whole expert layers of other libraries: same weights, same routing, same result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LayerForward = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_mm_layer(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The pipeline that people write around ``torch.nn.functional.grouped_mm``."""
    num_tokens, topk = topk_ids.shape
    flat = topk_ids.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).int()
    tokens = order // topk
    gate, up = F.grouped_mm(hidden[tokens], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows.float() * topk_weights.flatten()[order, None]
    out = torch.zeros(num_tokens, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    return out.index_add_(0, tokens, rows).to(hidden.dtype)


def dense_ceiling(hidden: Tensor, topk: int, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two products of the layer's FLOPs, with one expert's weights and nothing around them."""
    rows = hidden.repeat(topk, 1)
    return (rows @ gate_up[0].T)[:, : down.shape[2]] @ down[0].T


def transformers_layers(gate_up: Tensor, down: Tensor) -> dict[str, LayerForward]:
    """Hugging Face's experts, by implementation; empty where transformers 5 is not installed."""
    try:
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    except ImportError:
        return {}
    num_experts, hidden_size, intermediate_size = down.shape
    layers = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        config = OlmoeConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_local_experts=num_experts,
            hidden_act="silu",
        )
        config.num_local_experts = num_experts
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(down, requires_grad=False)

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor, experts: torch.nn.Module = experts) -> Tensor:
            return experts(hidden, ids, weights.to(hidden.dtype))

        forward.module = experts  # type: ignore[attr-defined]
        layers[f"transformers {implementation}"] = forward
    return layers


def liger_layer(gate_up: Tensor, down: Tensor) -> dict[str, LayerForward]:
    """Liger's fused experts; a GPU and the package are needed."""
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError:
        return {}

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(hidden, gate_up, down, ids.int(), weights)

    return {"liger": forward}
