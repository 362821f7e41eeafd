"""Randomness in routing: Gaussian noise with a learned deviation, Gumbel noise, straight-through weights, jitter.

Every function takes the ``torch.Generator`` that it draws from, on the device of its input; None is torch's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from moe_ext.nn.backend import Backend
from moe_ext.nn.losses import cv_squared, expert_importance, smooth_load
from moe_ext.nn.router import Router
from moe_ext.ops.gating import ScoreFunction


def gaussian_noise(
    logits: Tensor, noise_logits: Tensor, *, epsilon: float = 1e-2, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Noisy logits ``logits + N(0, 1) * std`` and ``std = softplus(noise_logits) + epsilon`` (Shazeer et al. 2017).

    Args:
        logits, noise_logits: [num_tokens, num_experts] floating, of one dtype.
        epsilon: the least deviation.
        generator: where the normal numbers are drawn from.

    Returns:
        Noisy logits and deviations, shaped as ``logits``, both differentiable.
    """
    if logits.shape != noise_logits.shape:
        raise ValueError(
            f"noise_logits: expected the shape of logits, {list(logits.shape)}, got {list(noise_logits.shape)}"
        )
    std = F.softplus(noise_logits) + epsilon
    normal = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    return logits + normal * std, std


def gumbel_noise(logits: Tensor, *, temperature: float = 1.0, generator: Generator | None = None) -> Tensor:
    """``(logits + Gumbel(0, 1)) / temperature``: their top-k is a sample without replacement from softmax(logits).

    Args:
        logits: [num_tokens, num_experts] floating.
        temperature: > 0, sharpens the softmax over the result and changes no order.
        generator: where the uniform numbers are drawn from.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float32, device=logits.device)
    # rand may give 0, whose Gumbel number would be -inf.
    gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float32).tiny)))
    return (logits + gumbel.to(logits.dtype)) / temperature


def straight_through(topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Weight 1 for every picked expert in the forward, the gradient of ``topk_weights`` in the backward.

    Args:
        topk_weights: [num_tokens, topk] floating.
        topk_ids: [num_tokens, topk]; slots with a negative id weigh 0.
    """
    # w - w is 0 exactly, so the forward is 1 exactly.
    return (topk_ids >= 0).to(topk_weights.dtype) + (topk_weights - topk_weights.detach())


def input_jitter(hidden: Tensor, epsilon: float = 1e-2, *, generator: Generator | None = None) -> Tensor:
    """``hidden`` times uniform numbers in [1 - epsilon, 1 + epsilon): what Switch feeds its router in training.

    Args:
        hidden: any shape, floating.
        epsilon: >= 0; 0 gives ``hidden`` itself.
        generator: where the uniform numbers are drawn from.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon: expected >= 0, got {epsilon}")
    if epsilon == 0:
        return hidden
    uniform = torch.rand(hidden.shape, generator=generator, dtype=torch.float32, device=hidden.device)
    return hidden * (1 + epsilon * (2 * uniform - 1)).to(hidden.dtype)


class NoisyRouting(NamedTuple):
    """A :class:`moe_ext.nn.Routing` with a loss of its own."""

    topk_weights: Tensor
    """[num_tokens, topk], a softmax over the picked noisy logits."""
    topk_ids: Tensor
    """[num_tokens, topk] int32."""
    logits: Tensor
    """[num_tokens, num_experts], with the noise."""
    balance_loss: Tensor
    """Scalar: CV^2 of importance plus CV^2 of load, to be multiplied with a coefficient (0.1 in the paper)."""


class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al. 2017): logits plus noise of a learned deviation, softmax over the top k.

    In evaluation there is no noise. Both linear maps start at 0, as in the paper: the first picks are pure noise.

    Args:
        hidden_size, num_experts, topk: sizes.
        epsilon: the least deviation of the noise.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, topk: int, *, epsilon: float = 1e-2, backend: Backend = "kernels"
    ) -> None:
        clean, noise = (nn.Linear(hidden_size, num_experts, bias=False) for _ in range(2))
        nn.init.zeros_(clean.weight)
        nn.init.zeros_(noise.weight)
        super().__init__(hidden_size, num_experts, topk, clean, backend)
        self.epsilon, self.noise = epsilon, noise

    @property
    def score_function(self) -> ScoreFunction:
        return "softmax"

    def forward(self, hidden: Tensor, *, generator: Generator | None = None) -> NoisyRouting:
        """hidden [num_tokens, hidden_size] -> :class:`NoisyRouting`; the load is smooth while there is noise."""
        logits = clean = self.compute_logits(hidden)
        if self.training:
            with torch.autocast(hidden.device.type, enabled=False):
                noise_logits = F.linear(hidden.to(clean.dtype), self.noise.weight.to(clean.dtype))
            logits, std = gaussian_noise(clean, noise_logits, epsilon=self.epsilon, generator=generator)
        weights, ids, next_logit = self.ops.topk_gating(
            logits, self.topk, score_order="select_then_score", return_next_logit=True
        )
        if self.training and self.topk < self.num_experts:
            load = smooth_load(clean, logits, std, ids, next_logit)
        else:
            load = expert_importance(torch.ones_like(weights), ids, self.num_experts)
        loss = cv_squared(expert_importance(weights, ids, self.num_experts)) + cv_squared(load)
        return NoisyRouting(weights, ids, logits, loss)
