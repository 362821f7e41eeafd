"""GLIDER: PHATGOOSE's local scores and a global one per instruction ("Glider: Global and Local Instruction-Driven
Expert Router", arXiv 2410.07172).

The logit of an expert is PHATGOOSE's score of the token plus ``global_scale`` times the cosine between an embedding of
the sequence's instruction and one of the expert's task, both made by a language model beforehand. Top-k of the softmax,
renormalised, or the shortest run of experts whose probabilities reach ``top_p``. A scale of 0 is PHATGOOSE; the paper
tries 3, 100 and 1000.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import LoRAExperts, LoRALinear, MoEOutput
from moe_ext.recipes.phatgoose import GateVectorLogits


class GlobalLocalLogits(GateVectorLogits):
    """The local scores plus what the instruction of each row adds, [num_tokens, num_experts]."""

    def forward(self, hidden: Tensor, added: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden) + added


class GLIDER(LoRALinear):
    """One linear map over trained adapters.

    Args:
        base: stays as it is.
        experts: the adapters.
        gate_vectors: [num_experts, in_features], as in PHATGOOSE.
        expert_embeddings: [num_experts, embedding_size], of the experts' tasks.
        topk: experts per token, at most.
        global_scale: of the cosine.
        top_p: in (0, 1], or None for ``topk`` experts always.

    hidden [batch, sequence, in_features] and instructions [batch, embedding_size] -> MoEOutput.
    """

    expert_embeddings: Tensor

    def __init__(
        self,
        base: nn.Linear,
        experts: LoRAExperts,
        gate_vectors: Tensor,
        expert_embeddings: Tensor,
        topk: int = 2,
        *,
        global_scale: float = 100.0,
        top_p: float | None = None,
        **options: Any,
    ) -> None:
        gating = {"renormalize": True, "renormalize_eps": 1e-6, "top_p": top_p}
        super().__init__(base, experts, topk, logits=GlobalLocalLogits(gate_vectors), gating=gating, **options)
        self.global_scale = global_scale
        self.register_buffer("expert_embeddings", F.normalize(expert_embeddings, dim=-1))

    def forward(self, hidden: Tensor, instructions: Tensor) -> MoEOutput:
        affinity = F.linear(F.normalize(instructions, dim=-1), self.expert_embeddings)
        return super().forward(hidden, (self.global_scale * affinity).repeat_interleave(hidden.shape[1], dim=0))
