"""SCMoE: a mixture contrasted with its own second choices while decoding (Shi et al. 2024, "Unchosen Experts Can
Contribute Too: Unleashing MoE Models' Power by Self-Contrast", arXiv 2405.14507).

The model runs twice: as it is (strong) and with one expert of a later rank in the place of its top-k (weak). Tokens
within ``log alpha`` of the strong maximum stay, with ``(1 + beta) strong - beta weak``. Where the model renormalises
(Mixtral) the weak expert has weight 1, else its own score (DeepSeek). The paper uses the second rank, or a random
expert, alpha 0.1 and beta 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

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


def self_contrast(strong: Tensor, weak: Tensor, *, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """Contrasted logits [..., vocabulary], -inf where the strong model finds a token implausible."""
    plausible = strong >= strong.amax(-1, keepdim=True) + math.log(alpha)
    return ((1 + beta) * strong - beta * weak).masked_fill(~plausible, float("-inf"))
