"""MoTE: which experts answer to a kind of prompt, and what the model does without them (Dahlke et al. 2025, "Mixture of
Tunable Experts - Behavior Modification of DeepSeek-R1 at Inference Time", arXiv 2502.11096).

The share of tokens that pick an expert is taken on two sets of prompts; those whose shares differ most stand for what
tells the sets apart, and are switched off, or forced, while the model runs. Our reading: shares are of all tokens of a
set, experts of all layers compete in one ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_ext.nn import SteeredRouter


def activation_difference(counts: Tensor, other_counts: Tensor) -> Tensor:
    """How much more often experts are picked on one set of prompts than on another.

    Args:
        counts, other_counts: [num_layers, num_experts] tokens per expert: ``statistics.tokens_per_expert`` of the
            layers, summed over a set, or the counts of a routing trace.

    Returns:
        [num_layers, num_experts] float64: the difference of the shares of a layer's slots.
    """
    first, second = (x.double() / x.sum(1, keepdim=True).clamp(min=1) for x in (counts, other_counts))
    return first - second


def suppress_experts(
    routers: Sequence[SteeredRouter], difference: Tensor, count: int, *, force: bool = False
) -> list[tuple[int, int]]:
    """Switch the ``count`` experts of highest difference off, or force them on.

    ``routers`` are those of the layers of ``difference`` [num_layers, num_experts], steered anew.

    Returns:
        (layer, expert) of each, highest first.
    """
    num_experts = difference.shape[1]
    found = [divmod(int(i), num_experts) for i in difference.flatten().topk(count).indices.tolist()]
    for layer, router in enumerate(routers):
        ids = [expert for at, expert in found if at == layer]
        router.steer(on=ids) if force else router.steer(off=ids)
    return found
