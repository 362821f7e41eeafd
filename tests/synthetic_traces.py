"""Routing traces with a structure that a planner can find."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_ext.distributed.traces import RoutingTrace


def zipf(num_experts: int, exponent: float = 1.0) -> NDArray[np.float64]:
    """Shares that fall as 1 / rank."""
    shares = 1.0 / np.arange(1, num_experts + 1) ** exponent
    return shares / shares.sum()


def planted_trace(
    num_layers: int,
    num_tokens: int,
    num_experts: int,
    topk: int,
    *,
    num_topics: int = 4,
    loyalty: float = 0.9,
    exponent: float = 0.0,
    seed: int = 0,
    token_seed: int = 0,
) -> RoutingTrace:
    """Every token has a topic; a topic owns num_experts / num_topics experts of every layer, scattered at random.

    A slot stays among the topic's experts with probability ``loyalty``. ``exponent`` skews the experts' popularity.
    ``seed`` draws the structure, ``token_seed`` the tokens: two traces that share ``seed`` come from one model.
    """
    structure, generator = np.random.default_rng(seed), np.random.default_rng((seed, token_seed))
    owner = np.array([structure.permutation(num_experts) % num_topics for _ in range(num_layers)])
    shares = np.array([structure.permutation(zipf(num_experts, exponent)) for _ in range(num_layers)])
    topics = generator.integers(0, num_topics, num_tokens)
    ids = np.empty((num_layers, num_tokens, topk), dtype=np.int32)
    for layer in range(num_layers):
        # The topk largest of Gumbel-perturbed log weights are a draw without replacement.
        same = owner[layer][None, :] == topics[:, None]
        weights = shares[layer] * np.where(same, loyalty * num_topics, (1 - loyalty) * num_topics / (num_topics - 1))
        keys = np.log(weights + 1e-30) + generator.gumbel(size=weights.shape)
        ids[layer] = np.argsort(-keys, axis=1)[:, :topk]
    return RoutingTrace.from_topk_ids(ids, num_experts)
