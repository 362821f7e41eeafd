"""The activations of an expert in plain torch, for the twins of grouped_gemm and of the experts family."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.activation_names import GATED_ACTIVATIONS, LIMITED_ACTIVATIONS

# A gated activation is one of these of the gate, times up.
SCALAR_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}


def activate(
    pre_activation: Tensor, activation: str, gate_up_layout: str, activation_alpha: float, activation_limit: float
) -> Tensor:
    if activation == "none":
        return pre_activation
    if activation not in GATED_ACTIVATIONS:
        return SCALAR_FUNCTIONS[activation](pre_activation)
    if gate_up_layout == "interleaved":
        gate, up = pre_activation[:, ::2], pre_activation[:, 1::2]
    else:
        gate, up = pre_activation.chunk(2, dim=1)
    if activation in LIMITED_ACTIVATIONS:
        # Not torch.clamp: whether a gradient passes at the limit itself depends on torch's version. Here none does.
        gate = torch.where(gate >= activation_limit, activation_limit, gate)
        up = torch.where(up >= activation_limit, activation_limit, up)
        up = torch.where(up <= -activation_limit, -activation_limit, up)
        if activation == "swiglu_limited":
            return F.silu(gate) * up
        return gate * torch.sigmoid(activation_alpha * gate) * (up + 1)
    return SCALAR_FUNCTIONS[activation](gate) * up
