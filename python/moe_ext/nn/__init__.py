"""Thin modules over the ops."""

from moe_ext.nn.expert_parallel import ExpertParallelMoE, ExpertParallelStatistics
from moe_ext.nn.experts import (
    ExpertGroups,
    Experts,
    LinearExperts,
    ModuleExperts,
    ProjectedExperts,
    ZeroComputationExperts,
)
from moe_ext.nn.layer import LayerStatistics, MoE, MoELayer, MoEOutput, SharedExpert
from moe_ext.nn.lora import LoRAExperts, LoRALinear, LoRAMLPExperts, RankOneExperts
from moe_ext.nn.losses import (
    cv_squared,
    dense_weights,
    device_balance_losses,
    expert_importance,
    smooth_load,
    update_selection_bias,
)
from moe_ext.nn.multi_gate import GateMaps, MultiGatePlan, multi_gate_combine, multi_gate_mixture, multi_gate_plan
from moe_ext.nn.noise import NoisyRouting, NoisyTopKRouter, gaussian_noise, gumbel_noise, input_jitter, straight_through
from moe_ext.nn.router import ExpertChoiceRouter, Router, Routing, TopKRouter
from moe_ext.nn.soft import dense_mixture, dense_outputs, dense_plan, expert_rows
from moe_ext.nn.steering import SteeredRouter
from moe_ext.nn.topology import InPlaceOfMLP, replace_modules

__all__ = [
    "ExpertChoiceRouter",
    "ExpertGroups",
    "ExpertParallelMoE",
    "ExpertParallelStatistics",
    "Experts",
    "GateMaps",
    "InPlaceOfMLP",
    "LayerStatistics",
    "LinearExperts",
    "LoRAExperts",
    "LoRALinear",
    "LoRAMLPExperts",
    "MoE",
    "MoELayer",
    "MoEOutput",
    "ModuleExperts",
    "MultiGatePlan",
    "NoisyRouting",
    "NoisyTopKRouter",
    "ProjectedExperts",
    "RankOneExperts",
    "Router",
    "Routing",
    "SharedExpert",
    "SteeredRouter",
    "TopKRouter",
    "ZeroComputationExperts",
    "cv_squared",
    "dense_mixture",
    "dense_outputs",
    "dense_plan",
    "dense_weights",
    "device_balance_losses",
    "expert_importance",
    "expert_rows",
    "gaussian_noise",
    "gumbel_noise",
    "input_jitter",
    "multi_gate_combine",
    "multi_gate_mixture",
    "multi_gate_plan",
    "replace_modules",
    "smooth_load",
    "straight_through",
    "update_selection_bias",
]
