"""TaskExpert: shared experts, one gate per task, a memory of each task as one expert more (Ye and Xu 2023, "TaskExpert:
Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts", arXiv 2307.15324).

``f_n = sum_e g_ne E_e(x) + g_nM memory_n`` with ``g_n = softmax(gate_n(x))`` over the experts and the memory, and
``memory_n <- memory_n + W_n f_n`` for the next layer. The experts run once for all tasks. Our reading: gates per token,
experts are MLPs, and the update of the memory is linear.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.nn import Experts, LinearExperts, dense_plan, multi_gate_mixture


class TaskExpert(nn.Module):
    """hidden [num_tokens, hidden_size] and memory [num_tasks, num_tokens, hidden_size] -> features and memory, both
    [num_tasks, num_tokens, hidden_size]. ``topk`` experts per task and token (the memory apart); all of them if None.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_tasks: int,
        *,
        topk: int | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_tasks, self.topk = num_experts, num_tasks, topk or num_experts
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation="gelu", bias=True)
        self.gate = nn.Linear(hidden_size, num_tasks * (num_experts + 1))
        self.write = LinearExperts(num_tasks, hidden_size, hidden_size, bias=True)

    def gates(self, hidden: Tensor) -> Tensor:
        """[num_tasks, num_tokens, num_experts + 1], the memory last; each a softmax."""
        logits = self.gate(hidden).unflatten(-1, (self.num_tasks, self.num_experts + 1))
        return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).transpose(0, 1)

    def forward(self, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.gates(hidden)
        scores = gates[..., :-1].flatten(0, 1)
        picks = moe_ext.topk_gating(scores, self.topk, score_function="identity")
        weights, ids = (x.view(*gates.shape[:2], self.topk).unbind() for x in picks)
        features = torch.stack(multi_gate_mixture(self.experts, hidden, ids, weights, self.num_experts))
        features = features + gates[..., -1:].to(memory.dtype) * memory
        # Task by task is expert order already.
        offsets = dense_plan(hidden.shape[0], self.num_tasks, device=hidden.device).expert_offsets
        written = moe_ext.grouped_gemm(
            features.flatten(0, 1), self.write.weight, offsets, weight_layout="enk", bias=self.write.bias
        )
        return features, memory + written.view_as(memory)
