"""moe_ext: mixture-of-experts kernels for PyTorch."""

from moe_ext._library import build_info
from moe_ext.ops.all_to_all import (
    a2a_combine,
    a2a_pack,
    a2a_pack_rows,
    a2a_plan,
    a2a_unpack,
    a2a_unpack_rows,
    even_rank_expert_offsets,
)
from moe_ext.ops.experts import expert_activation, moe_mlp
from moe_ext.ops.gating import expert_choice_gating, router_losses, topk_gating
from moe_ext.ops.grouped_gemm import grouped_bias_grad, grouped_gemm, grouped_gemm_wgrad
from moe_ext.ops.lora import low_rank_experts
from moe_ext.ops.permutation import permute, unpermute
from moe_ext.ops.plan import routing_plan
from moe_ext.plan_types import A2APlan, RoutingPlan

__version__ = "0.1.0"

__all__ = [
    "A2APlan",
    "RoutingPlan",
    "a2a_combine",
    "a2a_pack",
    "a2a_pack_rows",
    "a2a_plan",
    "a2a_unpack",
    "a2a_unpack_rows",
    "build_info",
    "even_rank_expert_offsets",
    "expert_activation",
    "expert_choice_gating",
    "grouped_bias_grad",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "low_rank_experts",
    "moe_mlp",
    "permute",
    "router_losses",
    "routing_plan",
    "topk_gating",
    "unpermute",
]
