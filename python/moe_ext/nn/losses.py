"""What trains or steers a router beside :func:`moe_ext.router_losses`: losses over devices, CV^2 losses, smooth load,
loss-free bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ext.ops.gating import ScoreFunction, router_losses
from moe_ext.reference.gating import scores_of


def device_balance_losses(
    logits: Tensor,
    topk_ids: Tensor,
    num_devices: int,
    *,
    devices_per_token: int | None = None,
    score_function: ScoreFunction = "softmax",
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DeepSeek's losses over devices: of their computation, and of the tokens that are sent to them.

    Experts stand on ``num_devices`` devices, in order and equally many on each. With P' the sum of a device's P, the
    device loss (DeepSeekMoE, arXiv 2401.06066) is ``sum_d f'_d P'_d``, f' the mean of ``num_experts / (topk T) n_e``
    over the device's experts; the communication loss (DeepSeek-V2, arXiv 2405.04434) is ``sum_d f''_d P'_d`` with
    ``f'' = num_devices / (M T)`` times the number of tokens sent to the device, once each. Both are 1 where all is
    even. They are :func:`moe_ext.router_losses` over devices in the place of experts.

    Args:
        logits: [num_tokens, num_experts] floating.
        topk_ids: [num_tokens, topk] int32 or int64; ids out of range count for no device.
        num_devices: a divisor of num_experts.
        devices_per_token: M, the most devices that a token may go to; None for ``min(topk, num_devices)``.
        score_function, token_mask: as in :func:`moe_ext.router_losses`.

    Returns:
        Two scalars, float32 (float64 for float64 logits), differentiable in ``logits``.

    Raises:
        ValueError: num_devices is no divisor of the number of experts.
        RuntimeError: as :func:`moe_ext.router_losses`.
    """
    num_experts = logits.shape[1]
    if num_devices < 1 or num_experts % num_devices:
        raise ValueError(f"num_devices: expected a divisor of {num_experts} experts, got {num_devices}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if token_mask is not None:
        logits = logits.masked_fill(~token_mask[:, None], 0.0)  # whatever a masked token holds
    scores = scores_of(logits, score_function, torch.ones_like(logits, dtype=torch.bool))
    scores = scores.view(logits.shape[0], num_devices, num_experts // num_devices).sum(-1)
    devices = torch.div(topk_ids, num_experts // num_devices, rounding_mode="floor")
    of_computation, _, _ = router_losses(scores, devices, score_function="identity", token_mask=token_mask)
    # A token counts once for each of its devices.
    ordered = devices.sort(dim=1).values
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    sent, _, _ = router_losses(
        scores, ordered.masked_fill(again, -1), score_function="identity", token_mask=token_mask, load="fraction"
    )
    most = devices_per_token or min(topk_ids.shape[1], num_devices)
    return of_computation, sent * (num_devices / most)


def cv_squared(values: Tensor, *, correction: int = 1, eps: float = 1e-10) -> Tensor:
    """The squared coefficient of variation ``var / (mean^2 + eps)``: 0 when all values are equal.

    Of importance and of smooth load it is the balance loss of Shazeer et al. 2017; of importance weighted by a matrix
    of preferences it is LoRAMoE's localised loss.

    Args:
        values: any shape, floating or integer; integers are taken as float32.
        correction: 1 for the sample variance (Shazeer's code), 0 for that of the population.
        eps: keeps the quotient finite where the mean is 0.

    Returns:
        A scalar in the dtype of ``values``, float32 for 16-bit values and integers; 0 for fewer than two values.
        Differentiable.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.numel() < 2:
        return values.sum() * 0
    return values.var(correction=correction) / (values.mean().square() + eps)


def expert_importance(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """The weight that each expert is given by all tokens (Shazeer et al. 2017).

    Args:
        topk_weights: [num_tokens, topk] floating.
        topk_ids: [num_tokens, topk] int32 or int64; weights of ids out of range count for no expert.
        num_experts: E.

    Returns:
        [num_experts] in the dtype of ``topk_weights``, differentiable in it.
    """
    return dense_weights(topk_weights, topk_ids, num_experts).sum(0)


def dense_weights(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Weights of chosen experts as a matrix [num_tokens, num_experts], 0 where an expert was not chosen.

    Args:
        topk_weights: [num_tokens, topk] floating.
        topk_ids: [num_tokens, topk] int32 or int64; ids out of range are left out, repeated ones add up.
        num_experts: E.
    """
    if topk_weights.shape != topk_ids.shape or topk_ids.dim() != 2:
        raise ValueError(
            "topk_weights, topk_ids: expected [num_tokens, topk] of both, "
            f"got {list(topk_weights.shape)} and {list(topk_ids.shape)}"
        )
    here = (topk_ids >= 0) & (topk_ids < num_experts)
    columns = torch.where(here, topk_ids, num_experts).long()
    matrix = topk_weights.new_zeros(topk_ids.shape[0], num_experts + 1)
    return matrix.scatter_add(1, columns, topk_weights)[:, :num_experts]


def smooth_load(
    clean_logits: Tensor, noisy_logits: Tensor, noise_std: Tensor, topk_ids: Tensor, next_logit: Tensor
) -> Tensor:
    """The number of tokens that each expert would be picked by, in expectation over its own noise.

    A count of picked tokens has no gradient; the probability that expert e of token t stays among the ``topk`` if its
    noise alone is drawn again has one: ``Phi((clean - threshold) / std)``, where the threshold is the ``topk``-th
    highest noisy logit of the other experts (Shazeer et al. 2017, appendix A).

    Args:
        clean_logits, noisy_logits, noise_std: [num_tokens, num_experts] floating; ``noise_std`` > 0.
        topk_ids: [num_tokens, topk], the experts of the highest noisy logits in descending order, none left out, with
            topk < num_experts: of all experts the load is constant.
        next_logit: [num_tokens], the noisy logit after those. Both from :func:`moe_ext.topk_gating` with
            ``return_next_logit``.

    Returns:
        [num_experts] float32 (float64 for float64 logits), differentiable in all but the ids, thresholds included.

    Raises:
        ValueError: shapes do not fit, or topk is num_experts.
    """
    if not clean_logits.shape == noisy_logits.shape == noise_std.shape or clean_logits.dim() != 2:
        raise ValueError(
            "clean_logits, noisy_logits, noise_std: expected [num_tokens, num_experts] of all, "
            f"got {list(clean_logits.shape)}, {list(noisy_logits.shape)} and {list(noise_std.shape)}"
        )
    num_tokens, num_experts = clean_logits.shape
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens or not 0 < topk_ids.shape[1] < num_experts:
        raise ValueError(
            f"topk_ids: expected [num_tokens, topk] = [{num_tokens}, 1 to {num_experts - 1}], "
            f"got {list(topk_ids.shape)}"
        )
    if next_logit.shape != (num_tokens,):
        raise ValueError(f"next_logit: expected [num_tokens] = [{num_tokens}], got {list(next_logit.shape)}")
    precision = torch.promote_types(clean_logits.dtype, torch.float32)
    clean, noisy, std = (x.to(precision) for x in (clean_logits, noisy_logits, noise_std))
    first_out = next_logit[:, None].to(precision)
    last_in = noisy.gather(1, topk_ids[:, -1:].long())
    # The others' topk-th logit: the next one down for an expert that is itself among the topk.
    threshold = torch.where(noisy > first_out, first_out, last_in)
    load: Tensor = torch.special.ndtr((clean - threshold) / std).sum(0)
    return load


@torch.no_grad()
def update_selection_bias(selection_bias: Tensor, tokens_per_expert: Tensor, *, rate: float = 1e-3) -> None:
    """Balancing without a loss: ``bias += rate * sign(mean load - load)``, in place, without a host sync.

    Call it after each optimiser step with the load of that step, summed over all ranks first (DeepSeek-V3; Wang et al.
    2024, arXiv 2408.15664). The bias is that of :class:`moe_ext.nn.TopKRouter`.

    Args:
        selection_bias: [num_experts] floating.
        tokens_per_expert: [num_experts], integer or floating.
        rate: how far a bias moves in one step.

    Raises:
        ValueError: shapes differ.
    """
    if selection_bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"tokens_per_expert: expected the shape of selection_bias, {list(selection_bias.shape)}, "
            f"got {list(tokens_per_expert.shape)}"
        )
    load = tokens_per_expert.to(torch.promote_types(selection_bias.dtype, torch.float32))
    selection_bias.add_(torch.sign(load.mean() - load), alpha=rate)
