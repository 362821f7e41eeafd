"""Thin modules over the ops."""

from moe_ext.nn.experts import (
    ExpertGroups,
    Experts,
    LinearExperts,
    ModuleExperts,
    ProjectedExperts,
    ZeroComputationExperts,
)
from moe_ext.nn.layer import LayerStatistics, MoE, MoELayer, MoEOutput, SharedExpert
from moe_ext.nn.lora import LoRAExperts, LoRAMLPExperts
from moe_ext.nn.router import ExpertChoiceRouter, Router, Routing, TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "ExpertGroups",
    "Experts",
    "LayerStatistics",
    "LinearExperts",
    "LoRAExperts",
    "LoRAMLPExperts",
    "MoE",
    "MoELayer",
    "MoEOutput",
    "ModuleExperts",
    "ProjectedExperts",
    "Router",
    "Routing",
    "SharedExpert",
    "TopKRouter",
    "ZeroComputationExperts",
]
