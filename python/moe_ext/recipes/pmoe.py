"""PMOE: a policy that is a mixture of Gaussians (Ren et al. 2021, "Probabilistic Mixture-of-Experts for Efficient Deep
Reinforcement Learning", arXiv 2104.09122).

``pi(a | s) = sum_i w_i(s) N(a; mu_i(s), sigma_i)``. All heads run: one action is drawn from every head, the Q-function
judges them, and the weights learn from ``MSE(w, onehot(argmax_i Q(s, a_i)))``, without a gradient through a choice.
Our reading: linear heads over the caller's trunk, and deviations that do not depend on the state.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import LinearExperts, dense_outputs


class PMOE(nn.Module):
    """Means, deviations and mixing weights for states [num_tokens, hidden_size]."""

    def __init__(self, hidden_size: int, num_actions: int, num_experts: int = 5) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.heads = LinearExperts(num_experts, hidden_size, num_actions, bias=True)
        self.log_std = nn.Parameter(torch.zeros(num_experts, num_actions))
        self.mixing = nn.Linear(hidden_size, num_experts)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """means [num_experts, num_tokens, num_actions], log_std [num_experts, 1, num_actions], weights [T, E]."""
        means = dense_outputs(self.heads, hidden, self.num_experts)
        return means, self.log_std[:, None], torch.softmax(self.mixing(hidden), dim=-1)

    def log_prob(self, hidden: Tensor, action: Tensor) -> Tensor:
        """log pi(action | hidden) [num_tokens] of actions [num_tokens, num_actions], under the whole mixture."""
        means, log_std, weights = self(hidden)
        deviations = (action - means) / log_std.exp()
        of_head = -(deviations.square() / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)
        return torch.logsumexp(of_head + weights.log().T, dim=0)

    def sample(self, hidden: Tensor, *, generator: Generator | None = None) -> Tensor:
        """One action of every head, [num_experts, num_tokens, num_actions], differentiable in the heads."""
        means, log_std, _ = self(hidden)
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        actions: Tensor = means + log_std.exp() * noise
        return actions

    @staticmethod
    def frequency_loss(weights: Tensor, q_values: Tensor) -> Tensor:
        """MSE between weights [num_tokens, num_experts] and the one-hot of the head with the best Q, same shape."""
        best = F.one_hot(q_values.argmax(-1), weights.shape[-1])
        return F.mse_loss(weights, best.to(weights.dtype))
