"""Reference twins of the gating family."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus", "identity"]
ScoreOrder = Literal["score_then_select", "select_then_score"]
WeightSource = Literal["scores", "ones", "external"]
Load = Literal["relative", "fraction", "count"]


def _gate_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _softmax_over(logits: Tensor, taking_part: Tensor) -> Tensor:
    """Softmax of each row over the entries that take part, 0 for the others; finite gradients for empty rows."""
    empty = ~taking_part.any(-1, keepdim=True)
    scores = torch.softmax(logits.masked_fill(~taking_part, float("-inf")).masked_fill(empty, 0.0), dim=-1)
    return scores.masked_fill(~taking_part, 0.0)


def scores_of(logits: Tensor, score_function: ScoreFunction, allowed: Tensor) -> Tensor:
    """The scores of all experts, [num_tokens, num_experts]; softmax runs over the allowed ones."""
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


def _picked_by_rank(
    keys: Tensor, logits: Tensor, allowed: Tensor, selection_bias: Tensor | None, num_groups: int, topk_groups: int
) -> tuple[Tensor, Tensor]:
    """All experts of each token in the order of selection, and which of these are candidates."""
    num_tokens, num_experts = logits.shape
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
    ids = _descending(logits if selection_bias is None else keys, candidates)
    return ids, candidates.gather(1, ids)


def _gathered_scores(scores: Tensor, ids: Tensor, here: Tensor, over_selected: bool) -> Tensor:
    """Scores of the slots, 0 where no expert is; with ``over_selected`` the softmax over the slots' logits."""
    values = scores.gather(1, ids)
    if over_selected:
        values = scores_of(values, "softmax", here)
    return torch.where(here, values, torch.zeros_like(values))


def topk_gating(
    logits: Tensor,
    topk: int,
    *,
    score_function: ScoreFunction = "softmax",
    score_order: ScoreOrder = "score_then_select",
    selection_bias: Tensor | None = None,
    expert_mask: Tensor | None = None,
    first_rank: int = 0,
    num_groups: int = 1,
    topk_groups: int = 1,
    forced_ids: Tensor | None = None,
    top_p: float | None = None,
    min_ratio: float | None = None,
    keep_tokens: Tensor | None = None,
    weight_source: WeightSource = "scores",
    external_weights: Tensor | None = None,
    zero_weight_experts: Tensor | None = None,
    renormalize: bool = False,
    renormalize_eps: float = 0.0,
    scale: float = 1.0,
    expert_gain: Tensor | None = None,
    return_next_logit: bool = False,
) -> tuple[Tensor, ...]:
    """See :func:`moe_ext.topk_gating`."""
    logits = _gate_precision(logits)
    num_experts = logits.shape[1]
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if expert_mask is not None:
        allowed = allowed & expert_mask
    over_selected = score_function == "softmax" and score_order == "select_then_score"
    scores = logits if over_selected else scores_of(logits, score_function, allowed)

    with torch.no_grad():
        keys = logits if score_order == "select_then_score" else scores
        order, candidates = _picked_by_rank(keys, logits, allowed, selection_bias, num_groups, topk_groups)
        end = first_rank + topk
        ids, here = order[:, first_rank:end], candidates[:, first_rank:end]
        forced_here = torch.zeros_like(here)
        if forced_ids is not None:
            forced = forced_ids.long()[:, None]
            valid = (forced >= 0) & (forced < num_experts)
            forced = torch.where(valid, forced, 0)
            valid = valid & allowed.gather(1, forced)
            absent = valid & ~((ids == forced) & here).any(1, keepdim=True)
            last = torch.arange(topk, device=ids.device) == topk - 1
            ids, here = torch.where(last & absent, forced, ids), here | (last & absent)
            forced_here = (ids == forced) & here & valid
        dropped = torch.zeros_like(here)
        rated = _gathered_scores(scores, ids, here, over_selected)
        if top_p is not None and top_p < 1:
            before = torch.cat([torch.zeros_like(rated[:, :1]), rated[:, :-1].cumsum(1)], dim=1)
            dropped = dropped | (before >= top_p)
        if min_ratio is not None:
            below = rated < min_ratio * rated[:, :1]
            dropped = dropped | (below & (torch.arange(topk, device=ids.device) > 0))
        here = here & (~dropped | forced_here)
        if keep_tokens is not None:
            here = here & keep_tokens[:, None]

    if weight_source == "external":
        assert external_weights is not None
        weights = _gathered_scores(external_weights, ids, here, False)
    else:
        weights = _gathered_scores(scores, ids, here, over_selected)
    if weight_source == "ones":
        # Ones that hang on the logits all the same: their gradient is zero, not None.
        weights = torch.where(here, torch.ones_like(weights), torch.zeros_like(weights)) + _no_gradient(logits)
    if weight_source == "external":
        weights = weights + _no_gradient(logits)
    if zero_weight_experts is not None:
        weights = torch.where(zero_weight_experts[ids], torch.zeros_like(weights), weights)
    if renormalize:
        total = weights.sum(-1, keepdim=True) + renormalize_eps
        weights = torch.where(total == 0, torch.zeros_like(weights), weights / torch.where(total == 0, 1.0, total))
    weights = weights * scale
    if expert_gain is not None:
        # where: a gain of infinity or NaN leaves an empty slot 0.
        weights = torch.where(here, weights * expert_gain.detach()[ids], weights)
    chosen = torch.where(here, ids, -1).int()
    if not return_next_logit:
        return weights, chosen
    if end == num_experts:
        return weights, chosen, logits.new_full((logits.shape[0],), float("-inf")) + _no_gradient(logits)[:, 0]
    next_logit = logits.gather(1, order[:, end : end + 1])
    return weights, chosen, torch.where(candidates[:, end : end + 1], next_logit, float("-inf"))[:, 0]


def _no_gradient(logits: Tensor) -> Tensor:
    """[num_tokens, 1] zeros with a gradient of zeros to the logits, whatever these hold."""
    return torch.where(torch.zeros_like(logits, dtype=torch.bool), logits, 0.0).sum(1, keepdim=True)


def router_losses(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    score_function: ScoreFunction = "softmax",
    token_mask: Tensor | None = None,
    expert_weights: Tensor | None = None,
    load: Load = "relative",
    num_sequences: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moe_ext.router_losses`."""
    logits = _gate_precision(logits)
    num_tokens, num_experts = logits.shape
    topk, sequence_length = topk_ids.shape[1], num_tokens // num_sequences
    counted = torch.ones_like(logits[:, 0], dtype=torch.bool) if token_mask is None else token_mask
    logits = logits.masked_fill(~counted[:, None], 0.0)  # whatever a masked token holds
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1)
    else:
        scores = scores_of(logits, score_function, torch.ones_like(logits, dtype=torch.bool))
        total = scores.sum(-1, keepdim=True)
        scores = torch.where(total == 0, torch.zeros_like(scores), scores / torch.where(total == 0, 1.0, total))
    scores = scores.masked_fill(~counted[:, None], 0.0)
    in_range = (topk_ids >= 0) & (topk_ids < num_experts) & counted[:, None]
    picks = torch.nn.functional.one_hot(torch.where(in_range, topk_ids.long(), num_experts), num_experts + 1)
    tokens_per_expert = picks[..., :-1].sum(1).view(num_sequences, sequence_length, num_experts).sum(1)

    num_counted = counted.view(num_sequences, sequence_length).sum(1, keepdim=True)
    lengths = num_counted.clamp(min=1)
    factor = {"relative": num_experts / (topk * lengths.to(logits.dtype)), "fraction": 1.0 / lengths.to(logits.dtype),
              "count": torch.ones_like(lengths, dtype=logits.dtype)}[load]  # fmt: skip
    loads = tokens_per_expert.to(logits.dtype) * factor
    if expert_weights is not None:
        loads = loads * expert_weights.detach()
    mean_scores = scores.view(num_sequences, sequence_length, num_experts).sum(1) / lengths
    balance_loss = (loads * mean_scores).sum() / (num_counted > 0).sum().clamp(min=1)
    squares = torch.logsumexp(logits, dim=-1).square().masked_fill(~counted, 0.0)
    return balance_loss, squares.sum() / num_counted.sum().clamp(min=1), tokens_per_expert.sum(0).int()


def expert_choice_gating(
    logits: Tensor, capacity: int, *, score_function: ScoreFunction = "softmax"
) -> tuple[Tensor, Tensor]:
    """See :func:`moe_ext.expert_choice_gating`."""
    logits = _gate_precision(logits)
    num_experts = logits.shape[1]
    everyone = torch.ones_like(logits, dtype=torch.bool)
    scores = scores_of(logits, score_function, everyone)
    tokens = _descending(scores.detach().T, everyone.T)[:, :capacity]
    chosen = torch.zeros_like(everyone.T).scatter(1, tokens, True).T
    ids = torch.where(chosen, torch.arange(num_experts, device=logits.device), -1).int()
    return torch.where(chosen, scores, torch.zeros_like(scores)), ids
