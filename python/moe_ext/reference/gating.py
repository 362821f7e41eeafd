"""Reference twins of the gating family."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus", "identity"]
ScoreOrder = Literal["score_then_select", "select_then_score"]


def _gate_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _softmax_over(logits: Tensor, taking_part: Tensor) -> Tensor:
    """Softmax of each row over the entries that take part, 0 for the others; finite gradients for empty rows."""
    empty = ~taking_part.any(-1, keepdim=True)
    scores = torch.softmax(logits.masked_fill(~taking_part, float("-inf")).masked_fill(empty, 0.0), dim=-1)
    return scores.masked_fill(~taking_part, 0.0)


def _scores(logits: Tensor, score_function: ScoreFunction, allowed: Tensor) -> Tensor:
    if score_function == "softmax":
        # A NaN logit makes its own score NaN and takes no part in the softmax of the others.
        nan = logits.isnan()
        return _softmax_over(logits, allowed & ~nan).masked_fill(nan, float("nan"))
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    if score_function == "sqrt_softplus":
        # softplus(x) = log(e^x + e^0): exact in float64, and without overflow.
        return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    return logits


def _descending(keys: Tensor, allowed: Tensor) -> Tensor:
    """Expert ids by descending key: ties to the lower id, then NaN, then what is not allowed."""
    order = torch.sort(keys.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")), dim=-1,
                       descending=True, stable=True).indices  # fmt: skip
    last = torch.where(allowed, keys.isnan().int(), 2).gather(-1, order)
    return order.gather(-1, torch.sort(last, dim=-1, stable=True).indices)


def topk_gating(
    logits: Tensor,
    topk: int,
    *,
    score_function: ScoreFunction = "softmax",
    score_order: ScoreOrder = "score_then_select",
    selection_bias: Tensor | None = None,
    expert_mask: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = False,
    renormalize_eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`moe_ext.topk_gating`."""
    logits = _gate_precision(logits)
    num_tokens, num_experts = logits.shape
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if expert_mask is not None:
        allowed = allowed & expert_mask
    over_selected = score_function == "softmax" and score_order == "select_then_score"
    scores = logits if over_selected else _scores(logits, score_function, allowed)

    with torch.no_grad():
        keys = logits if score_order == "select_then_score" else scores
        if selection_bias is not None:
            keys = keys + selection_bias
        candidates = allowed
        if topk_groups < num_groups:
            usable = (allowed & ~keys.isnan()).view(num_tokens, num_groups, -1)
            members = keys.view(num_tokens, num_groups, -1).masked_fill(~usable, float("-inf"))
            two = members.topk(min(2, members.shape[-1]), dim=-1).values
            two[..., 1:] = two[..., 1:].masked_fill(two[..., 1:] == float("-inf"), 0.0)
            groups = torch.sort(two.sum(-1), dim=-1, descending=True, stable=True).indices[:, :topk_groups]
            kept = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=logits.device)
            kept = kept.scatter(1, groups, True)
            candidates = allowed & kept.repeat_interleave(num_experts // num_groups, dim=1)
        # Without a bias the order of the scores is the order of the logits, where rounding makes no ties.
        ids = _descending(logits if selection_bias is None else keys, candidates)[:, :topk]
        here = candidates.gather(1, ids)

    weights = _scores(logits.gather(1, ids), "softmax", here) if over_selected else scores.gather(1, ids)
    weights = torch.where(here, weights, torch.zeros_like(weights))
    if renormalize:
        total = weights.sum(-1, keepdim=True) + renormalize_eps
        weights = torch.where(total == 0, torch.zeros_like(weights), weights / torch.where(total == 0, 1.0, total))
    return weights * scale, torch.where(here, ids, -1).int()


def router_losses(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    score_function: ScoreFunction = "softmax",
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moe_ext.router_losses`."""
    logits = _gate_precision(logits)
    num_experts = logits.shape[1]
    counted = torch.ones_like(logits[:, 0], dtype=torch.bool) if token_mask is None else token_mask
    num_counted = counted.sum().clamp(min=1)
    logits, ids = logits[counted], topk_ids[counted].long()
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1)
    else:
        scores = _scores(logits, score_function, torch.ones_like(logits, dtype=torch.bool))
        total = scores.sum(-1, keepdim=True)
        scores = torch.where(total == 0, torch.zeros_like(scores), scores / torch.where(total == 0, 1.0, total))
    in_range = ids[(ids >= 0) & (ids < num_experts)]
    tokens_per_expert = torch.bincount(in_range, minlength=num_experts)
    fraction = tokens_per_expert.to(logits.dtype) * num_experts / (topk_ids.shape[1] * num_counted)
    balance_loss = (fraction * scores.sum(0) / num_counted).sum()
    z_loss = torch.logsumexp(logits, dim=-1).square().sum() / num_counted
    return balance_loss, z_loss, tokens_per_expert.int()


def expert_choice_gating(
    logits: Tensor, capacity: int, *, score_function: ScoreFunction = "softmax"
) -> tuple[Tensor, Tensor]:
    """See :func:`moe_ext.expert_choice_gating`."""
    logits = _gate_precision(logits)
    num_experts = logits.shape[1]
    everyone = torch.ones_like(logits, dtype=torch.bool)
    scores = _scores(logits, score_function, everyone)
    tokens = _descending(scores.detach().T, everyone.T)[:, :capacity]
    chosen = torch.zeros_like(everyone.T).scatter(1, tokens, True).T
    ids = torch.where(chosen, torch.arange(num_experts, device=logits.device), -1).int()
    return torch.where(chosen, scores, torch.zeros_like(scores)), ids
