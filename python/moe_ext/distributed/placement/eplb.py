"""Load balancing by replication and packing, as DeepSeek's EPLB does it, and in small steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moe_ext import _host
from moe_ext.distributed.placement.layout import ExpertPlacement


def balance_experts(
    loads: ArrayLike, num_slots: int, *, num_ranks: int, num_nodes: int = 1, num_groups: int = 1
) -> ExpertPlacement:
    """A placement whose ranks are loaded evenly (EPLB).

    Every slot beyond one per expert goes to the expert with the largest load per replica; replicas, heaviest first, go
    to the lightest rank with room. If num_nodes divides num_groups, whole groups of experts go to nodes first and are
    replicated inside their node, which keeps group-limited routing (DeepSeek-V3) local; otherwise groups are ignored.

    Args:
        loads: [num_layers, num_experts] tokens of every expert, such as ``RoutingTrace.counts``.
        num_slots: physical experts over all ranks; num_slots - num_experts of them are redundant.
        num_ranks, num_nodes, num_groups: divisors of num_slots, num_ranks, num_experts.

    Raises ValueError for sizes that do not divide and for loads that are negative or not finite.
    """
    array = np.asarray(loads, dtype=np.float64)
    if num_nodes < 1 or num_groups < 1:
        raise ValueError(f"num_nodes, num_groups: expected at least 1, got {num_nodes} and {num_groups}")
    groups, nodes = (num_groups, num_nodes) if num_groups % num_nodes == 0 else (1, 1)
    phy2log = _host.balance_experts(array, num_slots, groups, nodes, num_ranks)
    return ExpertPlacement.from_phy2log(phy2log, array.shape[1], num_ranks)


def rebalance_experts(
    loads: ArrayLike, placement: ExpertPlacement, *, max_moves: int, num_nodes: int = 1
) -> ExpertPlacement:
    """``placement`` improved for new ``loads`` by changing at most ``max_moves`` slots of each layer.

    A local search: the hottest rank gives a replica of an expert to a slot whose expert has another replica, gives up a
    replica of its own, or swaps an expert with another rank (two moves), whatever helps most, until no such step helps.
    No rank gets hotter than the hottest was. With num_nodes > 1 nothing crosses nodes.

    Args:
        loads: [num_layers, num_experts].
        max_moves: weights to load per layer; the others stay where they are, so that serving need not stop.

    Raises ValueError for shapes that do not fit and for loads that are negative or not finite.
    """
    array = np.asarray(loads, dtype=np.float64)
    phy2log = _host.rebalance_experts(array, placement.phy2log, num_nodes, placement.num_ranks, max_moves)
    return ExpertPlacement.from_phy2log(phy2log, placement.num_experts, placement.num_ranks)
