"""Switch-DiT: a diffusion transformer whose blocks see masked tokens, the mask made by experts that the timestep picks
(Park et al. 2024, "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts", arXiv
2403.09176, checked against the authors' code).

Per sample, from its timestep embedding t: ``g = softmax(W silu(t) + b)``, top 2 of 3, not renormalised; per token
``m = 1 + sum g_e E_e(x)`` with E_e one linear map that starts at 0; ``out = block(x m) + (1 - m) x``. The prior is a
window of experts that slides over the timesteps; the loss is the Jensen-Shannon divergence of the gates of all layers
to it, after its columns were matched to the gates' (Hungarian algorithm).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.nn import LinearExperts, Routing, TopKRouter, dense_weights


class SwitchDiTBlock(nn.Module):
    """Any transformer block behind a mask: ``block`` maps [batch, length, hidden_size] (and conditions) to the same."""

    def __init__(self, block: Callable[..., Tensor], hidden_size: int, num_experts: int = 3, topk: int = 2) -> None:
        super().__init__()
        self.block = block
        logits = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_experts))
        self.router = TopKRouter(hidden_size, num_experts, topk, logits=logits)
        self.experts = LinearExperts(num_experts, hidden_size, hidden_size, bias=True)
        for parameter in self.experts.parameters():
            nn.init.zeros_(parameter)

    def mask(self, hidden: Tensor, routing: Routing) -> Tensor:
        """m [batch, length, hidden_size]: one token's experts are those of its sample."""
        length = hidden.shape[1]
        weights, ids = (x.repeat_interleave(length, dim=0) for x in (routing.topk_weights, routing.topk_ids))
        plan = moe_ext.routing_plan(ids, self.router.num_experts)
        update: Tensor = self.experts(hidden.flatten(0, 1), plan, weights)
        return 1 + update.view_as(hidden)

    def forward(self, hidden: Tensor, timestep: Tensor, *conditions: Any) -> tuple[Tensor, Routing]:
        """hidden [batch, length, hidden_size], timestep embeddings [batch, hidden_size]."""
        routing = self.router(timestep)
        mask = self.mask(hidden, routing)
        return self.block(hidden * mask, *conditions) + (1 - mask) * hidden, routing


def diffusion_prior(num_timesteps: int, num_layers: int, num_experts: int, topk: int, *, alpha: float = 4.0) -> Tensor:
    """[num_timesteps, num_layers * num_experts] of 0 and 1: a window of ``num_layers * topk`` experts that moves from
    the first to the last as ``(t / (num_timesteps - 1)) ** alpha``."""
    columns, width = num_layers * num_experts, num_layers * topk
    fraction = torch.linspace(0, 1, num_timesteps, dtype=torch.float64) ** alpha
    start = (fraction * (columns - width)).round()[:, None]
    column = torch.arange(columns)
    return ((column >= start) & (column < start + width)).float()


def diffusion_prior_loss(
    routings: Sequence[Routing], timesteps: Tensor, all_routings: Sequence[Routing], prior: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Divergence of the gates from the prior.

    The matching runs on the host (scipy; a host sync per step), as in the authors' code.

    Args:
        routings: of every layer, for the samples of the batch.
        timesteps: [batch] int64, the timestep of every sample.
        all_routings: of every layer, for the embeddings of all timesteps; they only decide the matching.
        prior: from :func:`diffusion_prior`.
    """
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        ones = [(torch.ones_like(r.topk_weights), r.topk_ids, r.logits.shape[1]) for r in all_routings]
        picked = torch.cat([dense_weights(*layer) for layer in ones], dim=1)
        cost = torch.cdist(picked.T.float(), prior.T.to(picked.device), p=1)
        _, columns = linear_sum_assignment(cost.cpu().numpy())
    gates = torch.cat([torch.softmax(r.logits, dim=-1) for r in routings], dim=1) / len(routings)
    wanted = prior.to(gates)[timesteps][:, torch.as_tensor(columns, device=gates.device)]
    wanted = wanted / wanted.sum(1, keepdim=True)
    middle = torch.log((gates + wanted) / 2 + eps)
    divergence = gates * (torch.log(gates + eps) - middle) + wanted * (torch.log(wanted + eps) - middle)
    return divergence.sum(1).mean() / 2
