"""Thin modules over the ops."""

from moe_ext.nn.experts import Experts
from moe_ext.nn.layer import LayerStatistics, MoELayer, MoEOutput, SharedExpert
from moe_ext.nn.losses import cv_squared, dense_weights, expert_importance, smooth_load, update_selection_bias
from moe_ext.nn.multi_gate import GateMaps, MultiGatePlan, multi_gate_combine, multi_gate_plan
from moe_ext.nn.noise import (
    NoisyRouting,
    NoisyTopKRouter,
    gaussian_noise,
    gumbel_noise,
    input_jitter,
    straight_through,
)
from moe_ext.nn.router import TopKRouter
from moe_ext.nn.soft import dense_mixture, dense_plan

__all__ = [
    "Experts",
    "GateMaps",
    "LayerStatistics",
    "MoELayer",
    "MoEOutput",
    "MultiGatePlan",
    "NoisyRouting",
    "NoisyTopKRouter",
    "SharedExpert",
    "TopKRouter",
    "cv_squared",
    "dense_mixture",
    "dense_plan",
    "dense_weights",
    "expert_importance",
    "gaussian_noise",
    "gumbel_noise",
    "input_jitter",
    "multi_gate_combine",
    "multi_gate_plan",
    "smooth_load",
    "straight_through",
    "update_selection_bias",
]
