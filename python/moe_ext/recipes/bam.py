"""BAM: attention experts beside FFN experts ("BAM! Just Like That: Simple and Efficient Parameter Upcycling for
Mixture of Experts", arXiv 2408.08274).

``y = x + sum_e g_e(x) A_e(norm x) + sum_topk h_e(x) F_e(norm x)``: parallel blocks; every token runs through all
attention experts (soft, ``g = softmax``) and through the top-k FFN experts. Attention experts have keys and values of
their own, or share one set, with which the cache is that of one dense layer. Our reading (of the abstract): softmax
gates on the normed rows, FFN weights renormalised, LayerNorm, causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import MoELayer, MoEOutput


class SoftAttentionExperts(nn.Module):
    """All experts' heads in one attention call; gates scale the heads before one output projection of all experts."""

    def __init__(self, hidden_size: int, num_heads: int, num_experts: int, *, shared_kv: bool) -> None:
        super().__init__()
        self.num_heads, self.num_experts = num_heads, num_experts
        self.kv_experts = 1 if shared_kv else num_experts
        self.query = nn.Linear(hidden_size, num_experts * hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * self.kv_experts * hidden_size, bias=False)
        self.output = nn.Linear(num_experts * hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """hidden [batch, length, hidden_size], gates [batch, length, num_experts] -> [batch, length, hidden_size]."""
        batch, length, _ = hidden.shape
        query = self.query(hidden).view(batch, length, self.num_experts * self.num_heads, -1).transpose(1, 2)
        key, value = (
            x.reshape(batch, length, self.kv_experts, self.num_heads, -1)
            .expand(-1, -1, self.num_experts, -1, -1)
            .flatten(2, 3)
            .transpose(1, 2)
            for x in self.key_value(hidden).chunk(2, dim=-1)
        )
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        heads = heads.reshape(batch, length, self.num_experts, -1) * gates[..., None].to(hidden.dtype)
        output: Tensor = self.output(heads.flatten(2))
        return output


class BAM(nn.Module):
    """hidden [batch, length, hidden_size] -> MoEOutput of the whole block."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        *,
        num_heads: int,
        shared_kv: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.attention_gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.attention = SoftAttentionExperts(hidden_size, num_heads, num_experts, shared_kv=shared_kv)
        options.setdefault("router", {"renormalize": True})
        self.moe = MoELayer(hidden_size, intermediate_size, num_experts, topk, **options)

    def forward(self, hidden: Tensor) -> MoEOutput:
        normed = self.norm(hidden)
        gates = torch.softmax(
            self.attention_gate(normed), dim=-1, dtype=torch.promote_types(normed.dtype, torch.float32)
        )
        output: MoEOutput = self.moe(normed)
        return output._replace(hidden=hidden + self.attention(normed, gates) + output.hidden)
