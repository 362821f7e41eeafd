"""MC-MoE: experts of 1, 2 and 3 bits, tokens of 0, 1 and 2 experts (Huang et al. 2024, "Mixture Compressor for
Mixture-of-Experts LLMs Gains More", arXiv 2410.06270).

Bits: minimise ``sum_e freq_e w_e^1.5 err_e(bits_e)`` with freq how often and w how heavily an expert is picked and err
its output's error at that width, under ``sum bits <= budget``, at least one expert of 3 and one of 2 bits. Pruning: the
second expert goes if its weight is below half of the first's, except for the most important tokens, the top tenth by
attention received times L1 norm; the least important tenth get no expert at all. Our reading: weights are rounded to
the range of each group of 128 inputs, 1 bit to their sign; rounded here, not packed.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

import moe_ext
from moe_ext.nn import Experts, Routing, TopKRouter, expert_importance, expert_rows

BITS = (1, 2, 3)


def round_weight(weight: Tensor, bits: int, group: int = 128) -> Tensor:
    """weight [..., inputs] as ``bits`` bits would hold it, in groups of inputs (one group if they do not divide)."""
    inputs = weight.shape[-1]
    rows = weight.reshape(*weight.shape[:-1], -1, group if inputs % group == 0 else inputs)
    if bits == 1:
        rounded = torch.where(rows >= 0, 1.0, -1.0).to(rows) * rows.abs().mean(-1, keepdim=True)
    else:
        low, high = rows.aminmax(dim=-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(rows.dtype).tiny)
        rounded = ((rows - low) / step).round() * step + low
    return rounded.reshape(weight.shape)


@torch.no_grad()
def compress_experts(experts: Experts, bits: Tensor) -> Experts:
    """Experts whose weights are rounded to ``bits`` [num_experts], each of 1, 2 or 3; layout ``enk``."""
    rounded = copy.deepcopy(experts)
    for new, old in ((rounded.gate_up_weight, experts.gate_up_weight), (rounded.down_weight, experts.down_weight)):
        for width in BITS:
            new.copy_(torch.where((bits == width)[:, None, None], round_weight(old, width), new))
    return rounded


@torch.no_grad()
def compression_costs(experts: Experts, hidden: Tensor, routing: Routing) -> Tensor:
    """[num_experts, 3]: ``freq w^1.5 err`` of each width on calibration rows hidden [num_tokens, hidden_size]."""
    num_experts, topk = experts.num_experts, routing.topk_ids.shape[1]
    plan = moe_ext.routing_plan(routing.topk_ids, num_experts)
    exact = expert_rows(experts, hidden, plan, topk)
    errors = []
    for width in BITS:
        narrow = compress_experts(experts, torch.full((num_experts,), width, device=hidden.device))
        squares = (expert_rows(narrow, hidden, plan, topk) - exact).square()
        errors.append(moe_ext.grouped_bias_grad(squares, plan.expert_offsets).sum(1).sqrt())
    load = plan.tokens_per_expert.to(exact.dtype)
    weight = expert_importance(routing.topk_weights, routing.topk_ids, num_experts) / load.clamp(min=1)
    return (load / load.sum() * weight**1.5)[:, None] * torch.stack(errors, dim=1)


def allocate_bits(costs: Tensor, budget: int) -> Tensor:
    """The bits [num_experts] of least cost within ``budget``, by integer programming on the host (scipy)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_experts = costs.shape[0]
    one_each = np.kron(np.eye(num_experts), np.ones(3))
    used, of_two, of_three = (np.tile(row, num_experts) for row in (BITS, (0, 1, 0), (0, 0, 1)))
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(used, -np.inf, budget),
        LinearConstraint(np.stack([of_two, of_three]), 1, np.inf),
    ]
    # Costs may be tiny; the solver's tolerances are absolute.
    scaled = (costs / costs.max().clamp(min=torch.finfo(costs.dtype).tiny)).double().flatten().cpu().numpy()
    found = milp(scaled, constraints=limits, integrality=1, bounds=Bounds(0, 1))
    if found.x is None:
        raise ValueError(f"budget: expected at least {num_experts + 3} bits for {num_experts} experts, got {budget}")
    return torch.as_tensor(found.x.reshape(num_experts, 3).argmax(1) + 1, device=costs.device)


def prune_routing(
    router: TopKRouter, hidden: Tensor, attention: Tensor, *, ratio: float = 0.5, share: float = 0.1
) -> Routing:
    """Route hidden [num_tokens, hidden_size] with fewer experts; ``attention`` [num_tokens] is what each received."""
    logits = router.compute_logits(hidden)
    order = (attention * hidden.abs().sum(-1)).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    few = int(share * len(order))
    second = router.gate(logits).topk_ids[:, 1]
    # A forced expert is exempt from the ratio.
    protected = torch.where(rank >= len(order) - few, second, -1)
    return router.gate(logits, forced_ids=protected, min_ratio=ratio, keep_tokens=rank >= few)
