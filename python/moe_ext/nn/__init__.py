"""Thin modules over the ops."""

from moe_ext.nn.expert_parallel import ExpertParallelMoE, ExpertParallelStatistics
from moe_ext.nn.experts import Experts
from moe_ext.nn.layer import LayerStatistics, MoELayer, MoEOutput, SharedExpert
from moe_ext.nn.router import TopKRouter

__all__ = [
    "ExpertParallelMoE",
    "ExpertParallelStatistics",
    "Experts",
    "LayerStatistics",
    "MoELayer",
    "MoEOutput",
    "SharedExpert",
    "TopKRouter",
]
