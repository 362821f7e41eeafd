"""From router logits to expert ids and weights, and the losses that train a router."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.ops.autograd import call, register_autograd

_ops = torch.ops.moe_ext

NOT_DIFFERENTIABLE = (
    "moe_ext::topk_gating_backward",
    "moe_ext::topk_gating_general_backward",
    "moe_ext::router_losses_backward",
    "moe_ext::expert_choice_gating_backward",
)

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus", "identity"]
ScoreOrder = Literal["score_then_select", "select_then_score"]
WeightSource = Literal["scores", "ones", "external"]
Load = Literal["relative", "fraction", "count"]


def _router_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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
    """Pick each token's experts and their weights; computed in fp32 whatever the dtype of the logits.

    Covers the gates of Mixtral and OLMoE (softmax, with and without ``renormalize``), gpt-oss (``select_then_score``),
    DeepSeek-V2 and V3 (sigmoid, ``selection_bias`` without auxiliary loss, groups, ``scale``), and with the arguments
    that name them those of MoE++, MC-MoE, SCMoE, GLIDER, EMoE, LLaVA-MoLE, MoExtend and Post-MoE. The arguments act in
    the order in which they are listed:

    1. **Scores.** ``expert_mask`` leaves experts out, then ``score_function`` makes scores of logits.
    2. **Order.** Experts are ordered by score plus ``selection_bias`` (by logit plus ``selection_bias`` with
       ``select_then_score``), those of all but the best ``topk_groups`` groups fall out.
    3. **Slots.** A token's slots take the ranks ``first_rank .. first_rank + topk - 1`` of that order. Where candidates
       run out, a slot holds id -1 and weight 0. ``forced_ids`` then may replace the last slot.
    4. **Drops.** ``top_p``, ``min_ratio`` and ``keep_tokens`` each make slots empty: id -1, weight 0. All look at the
       slots of step 3, so that their order does not matter; a slot with its token's forced id falls to ``keep_tokens``
       alone.
    5. **Weights** of the remaining slots: score, one, or external weight; 0 for ``zero_weight_experts``; divided by
       their sum (``renormalize``); times ``scale``; times ``expert_gain``.

    Args:
        logits: [num_tokens, num_experts] float32, bfloat16 or float16 (float64 on the CPU).
        topk: slots per token, 1 to num_experts; on CUDA ``first_rank + topk`` up to 1023.
        score_function: softmax over all allowed experts, or sigmoid, sqrt(softplus(x)), or the logit itself.
        score_order: ``score_then_select`` picks by the (biased) score. ``select_then_score`` picks by the (biased) raw
            logit; its softmax runs over the token's slots only: for the drops over the slots of step 3, for the weights
            over those that remain. Without a bias and groups the order matters to the softmax alone: every score
            increases with its logit.
        selection_bias: [num_experts] float32 (float64 for float64 logits), added to the score, or to the logit with
            ``select_then_score``, for the selection only, never to the weight, and without gradient (loss-free
            balancing, DeepSeek-V3).
        expert_mask: bool, [num_experts] or [num_tokens, num_experts], True where an expert may be picked; the others
            take no part in the softmax either.
        first_rank: how many of the best experts to pass over (the weak gate of SCMoE: ``topk=1``).
        num_groups: experts are this many equal, consecutive groups; up to 1024 on CUDA.
        topk_groups: only the best groups stay; a group's score is the sum of the two highest values that its experts
            are picked by (DeepSeek-V3; V2 took the maximum), ties to the lower group.
        forced_ids: [num_tokens] int32 or int64, an expert that the token must have: it replaces the last slot if it is
            not among the slots, whatever its rank or group, and is weighted like any other (Post-MoE). An id that is
            out of range (-1 by custom) or that ``expert_mask`` leaves out forces nothing.
        top_p: in (0, 1]: keeps the shortest run of leading slots whose scores sum to ``top_p``, the whole run where
            they never do (GLIDER); 1 keeps every slot. Scores are summed as they are: they are probabilities with
            softmax, or with identity where the logits are.
        min_ratio: in [0, 1]: keeps a slot after the first only if its score is at least ``min_ratio`` times that of the
            first slot (MC-MoE).
        keep_tokens: [num_tokens] bool, False for tokens that get no expert at all.
        weight_source: ``scores``; ``ones`` (EMoE, LLaVA-MoLE), without any gradient to the logits but zeros;
            ``external``, from ``external_weights``, with the gradient there and zeros to the logits.
        external_weights: [num_tokens, num_experts] float32 (float64 for float64 logits): the weight of every expert,
            should it be picked (MoExtend). Given exactly with ``weight_source="external"``.
        zero_weight_experts: [num_experts] bool, True for experts whose weight is 0 already when the others are
            renormalised; their ids stay (the zero expert of MoE++).
        renormalize: divide a token's weights by their sum plus ``renormalize_eps``; a sum of 0 gives weights 0.
        scale: multiplies the weights, after renormalisation.
        expert_gain: [num_experts] float32 (float64 for float64 logits), multiplies the weights of each expert at the
            very end; a constant, without gradient.
        return_next_logit: return the logit behind the last rank as well (the threshold of the smooth load of noisy
            top-k gates, Shazeer et al. 2017).

    Returns:
        ``topk_weights`` [num_tokens, topk] float32 (float64 for float64 logits), differentiable in ``logits`` and
        ``external_weights``, and ``topk_ids`` [num_tokens, topk] int32 in descending order of selection, ties to the
        lower id. A NaN logit sorts last, takes no part in the softmax of others, and gives weight NaN if it is picked
        all the same: a token whose logits are all NaN gets ids ``0 .. topk - 1`` and NaN weights. Without a bias,
        scores that rounding makes equal keep the order of their logits. A -inf logit scores 0 (-inf with identity) and
        can be picked; a softmax over a +inf logit, or over nothing but -inf, is NaN, as in torch. Comparisons with NaN
        drop no slot.

        With ``return_next_logit`` also ``next_logit`` [num_tokens], of the dtype of ``topk_weights`` and differentiable
        in ``logits``: the logit of rank ``first_rank + topk`` in the order of step 2, -inf where there is none.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, range or device; the message names it.
    """
    if selection_bias is not None:
        selection_bias = selection_bias.detach()
    options = (
        logits, topk, score_function, score_order, selection_bias, expert_mask, num_groups, topk_groups, renormalize,
        renormalize_eps, scale,
    )  # fmt: skip
    tensors = (forced_ids, keep_tokens, external_weights, zero_weight_experts, expert_gain)
    plain = first_rank == 0 and top_p is None and min_ratio is None and not return_next_logit
    if plain and weight_source == "scores" and all(tensor is None for tensor in tensors):
        weights, ids = call(_ops.topk_gating, *options)
        return weights, ids
    if expert_gain is not None:
        expert_gain = expert_gain.detach()
    weights, ids, next_logit, _ = call(
        _ops.topk_gating_general,
        *options, first_rank, forced_ids, top_p, min_ratio, keep_tokens, weight_source, external_weights,
        zero_weight_experts, expert_gain, return_next_logit,
    )  # fmt: skip
    return (weights, ids, next_logit) if return_next_logit else (weights, ids)


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
    """The load-balancing loss and the z-loss of a router, and the load itself, in one pass.

    ``balance_loss`` is ``sum_e eta_e f_e P_e`` with ``P_e`` the mean score of expert e over the T counted tokens, and
    covers, up to the coefficient: Switch (Fedus et al. 2021), DeepSeekMoE and Megatron (``load="relative"``); GShard
    (``fraction``, with the first column of ``topk_ids``), MoE++ (``fraction`` and ``expert_weights``) and, times
    num_experts, MixLoRA and Mixtral in transformers; LLaVA-MoLE (``count``).

    Args:
        logits: [num_tokens, num_experts] float32, bfloat16 or float16 (float64 on the CPU).
        topk_ids: [num_tokens, topk] int32 or int64; ids out of range count for no expert.
        score_function: as in :func:`topk_gating`; scores are divided by their sum over the experts.
        token_mask: [num_tokens] bool, True for tokens that count; None counts all.
        expert_weights: [num_experts] float32 (float64 for float64 logits), ``eta_e`` of each expert; a constant,
            without gradient; None for ones.
        load: what ``f_e`` is, from the n_e slots of counted tokens that hold expert e: ``relative`` to uniform routing,
            ``num_experts / (topk * T) * n_e``, with which the loss of uniform routing is 1; the ``fraction`` of the
            tokens, ``n_e / T``; or the ``count`` n_e.
        num_sequences: tokens are this many consecutive sequences of equal length; ``balance_loss`` is then the mean of
            the losses of each sequence, over those with a counted token (DeepSeek's sequence-wise loss).

    Returns:
        ``balance_loss``. ``z_loss``: mean of ``logsumexp(logits)^2`` over all counted tokens (ST-MoE, Zoph et al.
        2022). ``tokens_per_expert``: [num_experts] int32, n_e over all sequences. The losses are float32 scalars
        (float64 for float64 logits), differentiable in ``logits``, 0 where no token counts; multiply them with their
        coefficients and add them.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, range or device; the message names it.
    """
    if expert_weights is not None:
        expert_weights = expert_weights.detach()
    balance_loss, z_loss, loads, _ = call(
        _ops.router_losses, logits, topk_ids, score_function, token_mask, expert_weights, load, num_sequences
    )
    return balance_loss, z_loss, loads[0] if num_sequences == 1 else loads.sum(0, dtype=torch.int32)


def expert_choice_gating(
    logits: Tensor, capacity: int, *, score_function: ScoreFunction = "softmax"
) -> tuple[Tensor, Tensor]:
    """Let every expert pick its best tokens (Expert Choice, Zhou et al. 2022).

    Args:
        logits: [num_tokens, num_experts] float32, bfloat16 or float16 (float64 on the CPU).
        capacity: tokens per expert, at least 0; more than num_tokens picks all.
        score_function: as in :func:`topk_gating`; the softmax runs over the experts.

    Returns:
        ``topk_weights`` [num_tokens, num_experts] float32 (float64 for float64 logits), the score where the expert
        picked the token and 0 elsewhere, differentiable in ``logits``, and ``topk_ids`` [num_tokens, num_experts]
        int32: e in column e where expert e picked the token, else -1. Both drop into :func:`moe_ext.routing_plan` and
        what follows with ``topk = num_experts``; give the plan the same ``capacity`` to keep its rows few. Ties go to
        the earlier token; NaN scores come last.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, range or device; the message names it.
    """
    weights, ids = call(_ops.expert_choice_gating, logits, capacity, score_function)
    return weights, ids


@torch.library.register_fake("moe_ext::topk_gating")
def _topk_gating_fake(logits: Tensor, topk: int, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape, dtype=_router_dtype(logits)), logits.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("moe_ext::topk_gating_backward")
def _topk_gating_backward_fake(grad_topk_weights: Tensor, logits: Tensor, topk_ids: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("moe_ext::topk_gating_general")
def _topk_gating_general_fake(logits: Tensor, topk: int, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_next, dtype = logits.shape[0] if options[-1] else 0, _router_dtype(logits)
    return (
        *_topk_gating_fake(logits, topk),
        logits.new_empty(num_next, dtype=dtype),
        logits.new_empty(num_next, dtype=torch.int32),
    )


@torch.library.register_fake("moe_ext::topk_gating_general_backward")
def _topk_gating_general_backward_fake(
    grad_topk_weights: Tensor, logits: Tensor, topk_ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    num_external = 0 if options[-3] is None else logits.shape[0]
    grad_external = logits.new_empty((num_external, logits.shape[1]), dtype=_router_dtype(logits))
    return _topk_gating_backward_fake(grad_topk_weights, logits, topk_ids), grad_external


@torch.library.register_fake("moe_ext::router_losses")
def _router_losses_fake(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, num_sequences = _router_dtype(logits), options[-1]
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((num_sequences, logits.shape[1]), dtype=torch.int32),
        logits.new_empty(num_sequences, dtype=torch.int32),
    )


@torch.library.register_fake("moe_ext::router_losses_backward")
def _router_losses_backward_fake(
    grad_balance_loss: Tensor, grad_z_loss: Tensor, logits: Tensor, *options: Any
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("moe_ext::expert_choice_gating")
def _expert_choice_gating_fake(logits: Tensor, capacity: int, score_function: str) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape, dtype=_router_dtype(logits)), logits.new_empty(
        logits.shape, dtype=torch.int32
    )


@torch.library.register_fake("moe_ext::expert_choice_gating_backward")
def _expert_choice_gating_backward_fake(
    grad_topk_weights: Tensor, logits: Tensor, topk_ids: Tensor, score_function: str
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _topk_gating_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, score_function, score_order, _, expert_mask, _, _, *ctx.normalization = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1], expert_mask)
    ctx.options = (score_function, score_order)


def _topk_gating_backward(ctx: Any, grad_weights: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits, topk_ids, expert_mask = ctx.saved_tensors
    grad = _ops.topk_gating_backward(grad_weights, logits, topk_ids, *ctx.options, expert_mask, *ctx.normalization)
    return grad, *[None] * 10


def _topk_gating_general_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, score_function, score_order, _, expert_mask, _, _, *ctx.normalization = inputs[:11]
    _, _, _, _, _, ctx.weight_source, external_weights, zero_weight_experts, expert_gain, has_next_logit = inputs[11:]
    _, topk_ids, _, next_id = output
    ctx.mark_non_differentiable(topk_ids, next_id)
    ctx.save_for_backward(
        logits, topk_ids, expert_mask, next_id if has_next_logit else None, external_weights, zero_weight_experts,
        expert_gain,
    )  # fmt: skip
    ctx.options = (score_function, score_order)


def _topk_gating_general_backward(
    ctx: Any, grad_weights: Tensor, _: None, grad_next_logit: Tensor, __: None
) -> tuple[Tensor | None, ...]:
    logits, topk_ids, expert_mask, next_id, external_weights, zero_weight_experts, expert_gain = ctx.saved_tensors
    grad_logits, grad_external = _ops.topk_gating_general_backward(
        grad_weights, logits, topk_ids, *ctx.options, expert_mask, *ctx.normalization,
        None if next_id is None else grad_next_logit, next_id, ctx.weight_source, external_weights, zero_weight_experts,
        expert_gain,
    )  # fmt: skip
    return grad_logits, *[None] * 16, None if external_weights is None else grad_external, *[None] * 3


def _router_losses_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, topk_ids, ctx.score_function, token_mask, expert_weights, ctx.load, _ = inputs
    ctx.topk = topk_ids.shape[1]
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(logits, output[2], output[3], token_mask, expert_weights)


def _router_losses_backward(ctx: Any, grad_balance: Tensor, grad_z: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    logits, loads, num_counted, token_mask, expert_weights = ctx.saved_tensors
    grad = _ops.router_losses_backward(
        grad_balance, grad_z, logits, loads, num_counted, ctx.score_function, token_mask, expert_weights, ctx.load,
        ctx.topk,
    )  # fmt: skip
    return grad, *[None] * 6


def _expert_choice_gating_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.score_function = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _expert_choice_gating_backward(ctx: Any, grad_weights: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits, topk_ids = ctx.saved_tensors
    return _ops.expert_choice_gating_backward(grad_weights, logits, topk_ids, ctx.score_function), None, None


register_autograd("moe_ext::topk_gating", _topk_gating_backward, setup_context=_topk_gating_setup)
register_autograd(
    "moe_ext::topk_gating_general", _topk_gating_general_backward, setup_context=_topk_gating_general_setup
)
register_autograd("moe_ext::router_losses", _router_losses_backward, setup_context=_router_losses_setup)
register_autograd(
    "moe_ext::expert_choice_gating", _expert_choice_gating_backward, setup_context=_expert_choice_gating_setup
)
