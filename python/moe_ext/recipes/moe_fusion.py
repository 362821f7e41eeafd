"""Mixtures of convolutions and of detection heads under a noisy top-k gate, combined in log space.

MoE-Fusion (Cao et al. 2023, "Multi-modal Gated Mixture of Local-to-Global Experts for Dynamic Image Fusion", arXiv
2302.01392): top 2 of 4 per image, half of the experts see the visible image and half the infrared one,
``y = log sum_e g_e exp(E_e(x))``. MoE-VRD (Shaabana et al. 2023, "Video Relationship Detection Using Mixture of
Experts", arXiv 2403.03994): whole detection heads as experts, ``y = log sum_{picked e} exp(E_e(x))``, unweighted; more
experts in training than in testing, or fewer. Both were checked against the authors' code; both add 0.01 times
``CV^2(importance) + CV^2(smooth load)``, which is ``routing.balance_loss`` here. Where a token has no expert, or every
exponential underflows, the sum is 2.2e-16, as there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn

import moe_ext
from moe_ext.nn import ModuleExperts, NoisyRouting, NoisyTopKRouter

_LEAST = torch.finfo(torch.float64).eps


class _Exponential(nn.Module):
    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, rows: Tensor) -> Tensor:
        # In fp32 at least, since exp spreads what a 16-bit type cannot hold.
        output: Tensor = self.expert(rows)
        return output.to(torch.promote_types(output.dtype, torch.float32)).exp()


class _LogSpaceMixture(nn.Module):
    """``log sum w exp(E(x))`` over the experts that the router picks; ``weighted`` by the gates, or w = 1."""

    def __init__(
        self, router: NoisyTopKRouter, experts: Iterable[nn.Module], row_shape: tuple[int, ...], weighted: bool
    ) -> None:
        super().__init__()
        self.router, self.weighted = router, weighted
        self.experts = ModuleExperts(map(_Exponential, experts), row_shape=row_shape)

    def forward(
        self, hidden: Tensor, gate_input: Tensor | None = None, *, generator: Generator | None = None
    ) -> tuple[Tensor, NoisyRouting]:
        """hidden [num_tokens, *row_shape] -> [num_tokens, outputs of an expert, flattened]; the gate sees
        ``gate_input`` [num_tokens, hidden_size], or hidden itself."""
        rows = hidden.flatten(1)
        routing = self.router(rows if gate_input is None else gate_input, generator=generator)
        plan = moe_ext.routing_plan(routing.topk_ids, self.router.num_experts)
        total = self.experts(rows, plan, routing.topk_weights if self.weighted else None)
        return torch.where(total == 0, _LEAST, total).log().to(hidden.dtype), routing


class _OfModality(nn.Module):
    def __init__(self, index: int, expert: nn.Module) -> None:
        super().__init__()
        self.index, self.expert = index, expert

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.expert(images[:, self.index])
        return output


class MoEFusion(_LogSpaceMixture):
    """Local experts of MoE-Fusion: ``experts`` map [n, channels, height, width] to images of one shape.

    The first half of them see modality 0, the second half modality 1, of hidden [batch, 2, channels, height, width];
    the gate sees [batch, gate_size].
    """

    def __init__(
        self, experts: Iterable[nn.Module], image_shape: tuple[int, int, int], gate_size: int, topk: int = 2
    ) -> None:
        experts = list(experts)
        of_modality = [_OfModality(2 * e // len(experts), expert) for e, expert in enumerate(experts)]
        super().__init__(NoisyTopKRouter(gate_size, len(experts), topk), of_modality, (2, *image_shape), True)


class MoEVRD(_LogSpaceMixture):
    """MoE-VRD: ``experts`` map features [n, hidden_size] to log scores; topk in training, test_topk in evaluation."""

    def __init__(self, experts: Iterable[nn.Module], hidden_size: int, topk: int, test_topk: int) -> None:
        experts = list(experts)
        super().__init__(NoisyTopKRouter(hidden_size, len(experts), topk), experts, (), False)
        self.train_topk, self.test_topk = topk, test_topk

    def train(self, mode: bool = True) -> MoEVRD:
        super().train(mode)
        self.router.topk = self.train_topk if mode else self.test_topk
        return self
