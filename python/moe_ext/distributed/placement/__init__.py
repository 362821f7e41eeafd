"""Expert placement: planners, and a simulator to judge their plans with."""

from moe_ext.distributed.placement.eplb import balance_experts, rebalance_experts
from moe_ext.distributed.placement.layout import ExpertPlacement
from moe_ext.distributed.placement.moetuner import (
    assign_clusters,
    balanced_clusters,
    cluster_transitions,
    moetuner_placement,
    transition_cost,
)
from moe_ext.distributed.placement.shadowing import shadowed_experts
from moe_ext.distributed.placement.simulation import Cluster, Link, SimulatedStep, simulate_step

__all__ = [
    "Cluster",
    "ExpertPlacement",
    "Link",
    "SimulatedStep",
    "assign_clusters",
    "balance_experts",
    "balanced_clusters",
    "cluster_transitions",
    "moetuner_placement",
    "rebalance_experts",
    "shadowed_experts",
    "simulate_step",
    "transition_cost",
]
