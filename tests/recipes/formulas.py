"""Mixtures written out in plain torch, for the recipes to be held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cases import make_rows
from compare import relative_error
from moe_ext.nn import Experts

PLAIN = {
    "gelu": F.gelu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def mlp(experts: Experts, e: int, x: Tensor) -> Tensor:
    """Expert e of every row."""
    up_bias, down_bias = (None if b is None else b[e] for b in (experts.gate_up_bias, experts.down_bias))
    up = F.linear(x, experts.gate_up_weight[e], up_bias)
    if experts.activation == "swiglu":
        gate, up = up.chunk(2, dim=-1)
        up = F.silu(gate) * up
    else:
        up = PLAIN[experts.activation](up)
    return F.linear(up, experts.down_weight[e], down_bias)


def mixture(outputs: Tensor, weights: Tensor) -> Tensor:
    """outputs [num_experts, num_tokens, hidden_size], weights [num_tokens, num_experts], 0 where not picked."""
    return torch.einsum("eth,te->th", outputs, weights)


def all_outputs(experts: Experts, x: Tensor) -> Tensor:
    return torch.stack([mlp(experts, e, x) for e in range(experts.num_experts)])


def keep_topk(scores: Tensor, topk: int, *, renormalize: bool = False) -> Tensor:
    """[num_tokens, num_experts]: the best scores of every token, 0 elsewhere."""
    best = scores.topk(topk, dim=-1)
    values = best.values / best.values.sum(-1, keepdim=True) if renormalize else best.values
    return torch.zeros_like(scores).scatter(-1, best.indices, values)


def switch_loss(probabilities: Tensor, weights: Tensor, topk: int) -> Tensor:
    """``E / (K T) sum_e n_e P_e``."""
    load = (weights > 0).sum(0).double() * weights.shape[1] / (topk * weights.shape[0])
    return (load * probabilities.mean(0)).sum()


def rows(*sizes: int, seed: int = 2) -> Tensor:
    return make_rows(*sizes, dtype=torch.float64, seed=seed).requires_grad_()


def assert_same(
    ours: Sequence[Tensor], exact: Sequence[Tensor], inputs: Sequence[Tensor], bound: float = 1e-11
) -> None:
    """Values, and gradients of all inputs through all of them; where plain torch gives none, ours is none or zero."""
    grads = []
    for results in (ours, exact):
        loss = sum(
            (r * make_rows(r.numel(), dtype=torch.float64, seed=7 + i).view_as(r)).sum() for i, r in enumerate(results)
        )
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < bound
    for index, (a, b) in enumerate(zip(*grads, strict=True)):
        if b is None:
            assert a is None or not a.any(), f"input {index} gets a gradient"
        else:
            assert a is not None, f"input {index} gets no gradient"
            assert relative_error(a, b) < bound, f"gradient of input {index}"
