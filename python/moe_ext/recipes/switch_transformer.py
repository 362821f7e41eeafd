"""Switch Transformer: one expert per token (Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter
Models with Simple and Efficient Sparsity", arXiv 2101.03961).

``y = p_i E_i(x)`` with ``i = argmax p``, ``p = softmax(x W)``, in fp32. In training the router sees x times uniform
numbers in [1 - eps, 1 + eps). An expert takes at most ``capacity_factor * num_tokens / num_experts`` tokens; the others
get 0, for the residual connection. Balance loss ``E sum f_e P_e``, times 0.01.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from moe_ext.nn import Experts, MoE, Routing, TopKRouter, input_jitter


class SwitchRouter(TopKRouter):
    """A :class:`TopKRouter` of one expert per token, with jitter in training."""

    def __init__(self, hidden_size: int, num_experts: int, *, jitter: float = 1e-2, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, 1, **options)
        self.jitter = jitter

    def forward(self, hidden: Tensor, *, generator: Generator | None = None, **gating: Any) -> Routing:
        if self.training:
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = input_jitter(hidden, self.jitter, generator=generator)
        return super().forward(hidden, **gating)


class SwitchTransformer(MoE):
    """hidden [..., hidden_size] -> MoEOutput; ``generator`` may be given to the call."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        jitter: float = 1e-2,
        capacity_factor: float | None = 1.25,
        **options: Any,
    ) -> None:
        backend = {"backend": options.get("backend", "kernels")}
        super().__init__(
            SwitchRouter(hidden_size, num_experts, jitter=jitter, **backend),
            Experts(num_experts, hidden_size, intermediate_size, activation="relu", **backend),
            capacity_factor=capacity_factor,
            **options,
        )
