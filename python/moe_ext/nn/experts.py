"""The routed experts: their weights, and :func:`moe_ext.moe_mlp` over a plan."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_ext.activation_names import GATED_ACTIVATIONS
from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.plan_types import RoutingPlan


class Experts(BackendModule):
    """``num_experts`` MLPs of one shape, as two weight tensors.

    Args:
        num_experts, hidden_size, intermediate_size: sizes.
        activation, gate_up_layout, weight_layout: as in :func:`moe_ext.moe_mlp`.
        bias: give every expert biases.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    The parameters are ``gate_up_weight`` and ``down_weight`` in the shapes that :func:`moe_ext.moe_mlp` documents, and
    ``gate_up_bias`` [num_experts, gate and up columns] and ``down_bias`` [num_experts, hidden_size] or None.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        gate_up_layout: str = "concatenated",
        weight_layout: str = "enk",
        bias: bool = False,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.gate_up_layout, self.weight_layout = activation, gate_up_layout, weight_layout
        up_columns = intermediate_size * (2 if activation in GATED_ACTIVATIONS else 1)
        self.gate_up_weight = nn.Parameter(torch.empty(self._shape(up_columns, hidden_size)))
        self.down_weight = nn.Parameter(torch.empty(self._shape(hidden_size, intermediate_size)))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, up_columns)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None
        self.reset_parameters()

    def _shape(self, outputs: int, inputs: int) -> tuple[int, int, int]:
        return (
            (self.num_experts, outputs, inputs) if self.weight_layout == "enk" else (self.num_experts, inputs, outputs)
        )

    def reset_parameters(self) -> None:
        """Every expert starts as torch.nn.Linear would."""
        for weight, bias, inputs in (
            (self.gate_up_weight, self.gate_up_bias, self.hidden_size),
            (self.down_weight, self.down_bias, self.intermediate_size),
        ):
            bound = 1 / math.sqrt(inputs)
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        """hidden [num_tokens, hidden_size] -> [num_tokens, hidden_size], experts summed with the weights.

        Weights of another dtype than the ops take (FSDP2's mixed precision casts every floating input of a module that
        it wraps, unless ``cast_forward_inputs=False``) are cast back; what that rounding took is lost.
        """
        if topk_weights is not None:
            topk_weights = topk_weights.to(torch.promote_types(hidden.dtype, torch.float32))
        output: Tensor = self.ops.moe_mlp(
            hidden,
            self.gate_up_weight,
            self.down_weight,
            plan,
            topk_weights,
            weight_layout=self.weight_layout,
            activation=self.activation,
            gate_up_layout=self.gate_up_layout,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )
        return output

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {self.activation}"
        )
