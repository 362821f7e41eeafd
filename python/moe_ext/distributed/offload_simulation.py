"""Serving with few experts in device memory: tokens regrouped into batches that need fewer, and caches compared.

After ExpertFlow (He et al., "Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token
Scheduling", arXiv 2410.17954). Nothing here moves weights: it says what a policy would do on a recorded routing trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_ext import _host

CachePolicy = Literal["lru", "belady", "predicted"]


@dataclass(frozen=True)
class CacheCounts:
    """Needs of experts, over all batches and layers."""

    hits: int
    """The expert was in device memory."""
    misses: int
    """The layer waited for it."""
    prefetched: int
    """Loaded on a prediction. Experts moved in all: misses + prefetched."""

    @property
    def hit_rate(self) -> float:
        """1 if nothing was needed."""
        return self.hits / max(self.hits + self.misses, 1) if self.hits + self.misses else 1.0


def needed_experts(topk_ids: NDArray[Any], num_experts: int, batch_size: int) -> NDArray[np.bool_]:
    """[num_batches, num_layers, num_experts]: does a batch need an expert.

    Batches are ``batch_size`` consecutive tokens of topk_ids [num_layers, num_tokens, topk], the last may be smaller;
    ids outside [0, num_experts) are none. Raises ValueError if batch_size or num_experts is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    paths = _paths(topk_ids, num_experts)
    starts = np.arange(0, paths.shape[0], batch_size)
    needed: NDArray[np.bool_] = np.logical_or.reduceat(paths, starts, axis=0) if len(starts) else paths
    return needed


def simulate_expert_cache(
    needed: NDArray[np.bool_],
    capacity: int,
    policy: CachePolicy,
    *,
    predicted: NDArray[np.bool_] | None = None,
    prefetch_per_layer: int = 0,
) -> CacheCounts:
    """Hits of a cache of ``capacity`` experts, which all layers share; equal capacities are equal bytes.

    Args:
        needed: [num_batches, num_layers, num_experts], see :func:`needed_experts`; in this order, batch by batch.
        policy: which expert makes room. ``lru``: the one used longest ago. ``belady``: the one needed latest, known
            from the future; no policy without prefetching has more hits. ``predicted``: the one needed latest as far as
            the prediction of the running batch says; what it does not want counts as needed in the next batch. So
            layers share the slots by what is predicted of them, and those of early layers are free for later ones.
        predicted: of ``needed``'s shape, known before the first layer of a batch; needed by ``predicted``.
        prefetch_per_layer: experts that the link brings while a layer runs, and before the first; those predicted, next
            layers first, never in place of one that is wanted sooner.

    Raises ValueError for shapes that do not fit, or a prediction without the policy that uses it.
    """
    if (predicted is None) == (policy == "predicted"):
        raise ValueError("predicted: expected with policy predicted and with no other")
    if prefetch_per_layer and predicted is None:
        raise ValueError("prefetch_per_layer: expected 0 without a prediction")
    known = needed if predicted is None else predicted
    return CacheCounts(*_host.simulate_expert_cache(needed, known, capacity, policy, prefetch_per_layer))


def regroup_tokens(topk_ids: NDArray[Any], num_experts: int, *, max_rounds: int = 16) -> NDArray[np.int64]:
    """Parts the tokens of two batches into two of like-routed tokens, so that each needs fewer experts (ExpertFlow).

    A token's path is a bit for every expert of every layer. Starting from two far-apart tokens, tokens move to the
    group whose paths are nearer in mean Hamming distance, with groups of equal size, until none moves.

    Args:
        topk_ids: [num_layers, num_tokens, topk], predicted or recorded; ids outside [0, num_experts) are none.

    Returns:
        order: [num_tokens] int64; the first half (rounded up) is one batch, in the old order inside each. Outputs go
        back with ``restored[order] = outputs``. The order is that of the input if no grouping needs fewer experts.
    """
    paths = _paths(topk_ids, num_experts)
    tokens, half = len(paths), -(-len(paths) // 2)
    in_order = np.arange(tokens)
    if tokens < 3:
        return in_order
    bits = paths.reshape(tokens, -1).astype(np.float32)
    # The path farthest from an average one, and the one farthest from that.
    first = int(_distances(bits, bits.mean(0)).argmax())
    means = [bits[first], bits[int(_distances(bits, bits[first]).argmax())]]
    best, fewest = in_order, _experts_of_halves(paths, in_order, half)
    for _ in range(max_rounds):
        nearer = _distances(bits, means[0]) - _distances(bits, means[1])
        ranked = np.argsort(nearer, kind="stable")
        order = np.concatenate([np.sort(ranked[:half]), np.sort(ranked[half:])])
        count = _experts_of_halves(paths, order, half)
        if count < fewest:
            best, fewest = order, count
        next_means = [bits[order[:half]].mean(0), bits[order[half:]].mean(0)]
        if all(np.array_equal(new, old) for new, old in zip(next_means, means, strict=True)):
            break
        means = next_means
    return best


def _paths(topk_ids: NDArray[Any], num_experts: int) -> NDArray[np.bool_]:
    """[num_tokens, num_layers, num_experts]."""
    ids = np.asarray(topk_ids)
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or num_experts < 1:
        raise ValueError(
            "topk_ids: expected integers [num_layers, num_tokens, topk] of at least 1 expert, "
            f"got {ids.dtype} {list(ids.shape)} of {num_experts}"
        )
    layers, tokens, _ = ids.shape
    paths = np.zeros((tokens, layers, num_experts), dtype=np.bool_)
    layer, token, slot = np.nonzero((ids >= 0) & (ids < num_experts))
    paths[token, layer, ids[layer, token, slot]] = True
    return paths


def _distances(bits: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean Hamming distance of every path to those whose mean is given."""
    distances: NDArray[np.float32] = bits @ (1 - 2 * mean) + mean.sum()
    return distances


def _experts_of_halves(paths: NDArray[np.bool_], order: NDArray[np.int64], half: int) -> int:
    return int(paths[order[:half]].any(0).sum() + paths[order[half:]].any(0).sum())
