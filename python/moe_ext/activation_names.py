"""The names of the activations, once for the ops and their twins; csrc/experts/activation.h has the same list."""

from __future__ import annotations

PLAIN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared")
"""y = f(x): the output is as wide as the pre-activation."""

GATED_ACTIVATIONS = ("swiglu", "swiglu_clamped", "swiglu_limited", "geglu", "geglu_tanh", "reglu")
"""y = f(gate) * up: the output is half as wide as the pre-activation."""

LIMITED_ACTIVATIONS = ("swiglu_clamped", "swiglu_limited")
"""Gated, with ``activation_limit`` on gate and up."""

ACTIVATIONS = PLAIN_ACTIVATIONS + GATED_ACTIVATIONS


def activated_width(activation: str, width: int) -> int:
    """The width of an activation's output for a pre-activation of ``width`` columns."""
    return width // 2 if activation in GATED_ACTIVATIONS else width
