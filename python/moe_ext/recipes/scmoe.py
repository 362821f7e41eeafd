"""SCMoE: a mixture contrasted with its own second choices while decoding (Shi et al. 2024, "Unchosen Experts Can
Contribute Too: Unleashing MoE Models' Power by Self-Contrast", arXiv 2405.14507).

The model runs twice: as it is (strong) and with one expert of a later rank in the place of its top-k (weak). Tokens
within ``log alpha`` of the strong maximum stay, with ``(1 + beta) strong - beta weak``. Where the model renormalises
(Mixtral) the weak expert has weight 1, else its own score (DeepSeek). The paper uses the second rank, or a random
expert, which has weight 1 always, alpha 0.1 and beta 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor

from moe_ext.nn import TopKRouter


@contextmanager
def weak_routing(routers: Sequence[TopKRouter], rank: int = 1, width: int = 1) -> Iterator[None]:
    """Inside, ``routers`` pick the experts of ranks ``rank .. rank + width - 1``, counted from 0.

    ``weak_routing(routers, 0, topk)`` is the strong model.
    """
    strong = [(router.topk, dict(router.gating.options)) for router in routers]
    try:
        for router in routers:
            router.topk = width
            router.gating.options["first_rank"] = rank
        yield
    finally:
        for router, (topk, options) in zip(routers, strong, strict=True):
            router.topk, router.gating.options = topk, options


@contextmanager
def random_routing(routers: Sequence[TopKRouter], generator: Generator | None = None) -> Iterator[None]:
    """Inside, ``routers`` send every token to one expert, drawn evenly, with weight 1."""

    def draw(router: TopKRouter, args: tuple[Any, ...], gating: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows: Tensor = args[0]
        ids = torch.randint(router.num_experts, rows.shape[:1], generator=generator, device=rows.device)
        return args, {**gating, "forced_ids": ids, "weight_source": "ones"}

    hooks = [router.register_forward_pre_hook(draw, with_kwargs=True) for router in routers]
    try:
        with weak_routing(routers, 0):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def self_contrast(strong: Tensor, weak: Tensor, *, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """Contrasted logits [..., vocabulary], -inf where the strong model finds a token implausible."""
    plausible = strong >= strong.amax(-1, keepdim=True) + math.log(alpha)
    return ((1 + beta) * strong - beta * weak).masked_fill(~plausible, float("-inf"))
