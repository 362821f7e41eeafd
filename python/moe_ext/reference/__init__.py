"""Pure-Python twins of every op: same name, same arguments, plain torch, differentiable by autograd.

They are the specification: tests compare each kernel with its twin.
"""

from moe_ext.reference.all_to_all import (
    a2a_combine,
    a2a_pack,
    a2a_pack_rows,
    a2a_plan,
    a2a_unpack,
    a2a_unpack_rows,
)
from moe_ext.reference.experts import expert_activation, moe_mlp
from moe_ext.reference.gating import expert_choice_gating, router_losses, topk_gating
from moe_ext.reference.grouped_gemm import grouped_bias_grad, grouped_gemm, grouped_gemm_wgrad
from moe_ext.reference.lora import low_rank_experts
from moe_ext.reference.permutation import permute, unpermute
from moe_ext.reference.plan import routing_plan

__all__ = [
    "a2a_combine",
    "a2a_pack",
    "a2a_pack_rows",
    "a2a_plan",
    "a2a_unpack",
    "a2a_unpack_rows",
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
