"""Clusters of equal size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def balanced_kmeans(
    points: Tensor, num_clusters: int, *, iterations: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """[num_points] int64: clusters of equal size of points taken by direction; scipy assigns, optimally, in each round.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("balanced k-means needs scipy: pip install 'moe_ext[recipes]'") from error
    points = F.normalize(points.double().cpu(), dim=-1)
    size = points.shape[0] // num_clusters
    centres = points[torch.randperm(points.shape[0], generator=generator)[:num_clusters]]
    clusters = torch.full(points.shape[:1], -1)
    for _ in range(iterations):
        # Each cluster stands as often as it has places.
        _, place = linear_sum_assignment((-points @ centres.T).repeat_interleave(size, dim=1).numpy())
        found = torch.from_numpy(place) // size
        if torch.equal(found, clusters):
            break
        clusters = found
        centres = torch.zeros_like(centres).index_add_(0, clusters, points) / size
    return clusters
