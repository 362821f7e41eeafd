"""Branch-Train-Merge: language models trained apart, mixed by how well each explains the text so far (Li et al. 2022,
"Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models", arXiv 2208.03306).

``p(x_t | x_<t) = sum_j p_j(x_t | x_<t) p(j | x_<t)`` with the posterior ``p(j | x_<t) ~ p_j(x_<t) p(j)``. The prior is
cached from development text; the paper takes an exponential moving average of posteriors with decay 0.3 over 100
sequences. Our reading of it: ``prior <- 0.3 posterior + 0.7 prior``, from uniform. Or the parameters are averaged, with
the same weights, to one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import moe_ext
from moe_ext.nn import dense_weights


def btm_posterior(token_log_probs: Tensor, log_prior: Tensor) -> Tensor:
    """log p(expert | x_<t) for every position.

    Args:
        token_log_probs: [num_experts, batch, length], each expert's log p of the tokens that came.
        log_prior: [num_experts].

    Returns:
        [num_experts, batch, length + 1], normalised over experts: position t has seen the tokens before t.
    """
    seen = torch.nn.functional.pad(token_log_probs.cumsum(-1), (1, 0))
    return torch.log_softmax(seen + log_prior[:, None, None], dim=0)


def btm_log_prior(token_log_probs: Tensor, *, decay: float = 0.3) -> Tensor:
    """The prior [num_experts] after the sequences of token_log_probs [num_experts, num_sequences, length], in order."""
    num_experts, num_sequences, _ = token_log_probs.shape
    prior = token_log_probs.new_full((num_experts,), 1 / num_experts)
    for sequence in range(num_sequences):
        posterior = btm_posterior(token_log_probs[:, sequence : sequence + 1], prior.log())[:, 0, -1].exp()
        prior = decay * posterior + (1 - decay) * prior
    return prior.log()


def btm_ensemble(log_probs: Tensor, log_posterior: Tensor, topk: int | None = None) -> Tensor:
    """log p(x_t | x_<t) of the mixture.

    Args:
        log_probs: [num_experts, batch, length, vocabulary].
        log_posterior: [num_experts, batch, length].
        topk: keep the likeliest experts only, renormalised; the others need not have run, their log_probs are not used.
    """
    if topk is not None:
        num_experts = log_posterior.shape[0]
        logits = log_posterior.flatten(1).T
        weights, ids = moe_ext.topk_gating(logits, topk, renormalize=True)
        kept = dense_weights(weights, ids, num_experts).T.view_as(log_posterior)
        dropped = kept == 0
        # Ones under the logarithm and zeros beside it, so that no gradient meets an infinity.
        log_posterior = kept.masked_fill(dropped, 1.0).log().masked_fill(dropped, float("-inf"))
        log_probs = log_probs.masked_fill(dropped[..., None], 0.0)
    return torch.logsumexp(log_probs + log_posterior[..., None], dim=0)


def btm_average(experts: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """One model of all experts: the mean of their state dicts, weighted [num_experts]; integers are the first's."""
    return {
        name: torch.einsum("e,e...->...", weights.to(first.dtype), torch.stack([e[name] for e in experts]))
        if first.is_floating_point()
        else first.clone()
        for name, first in experts[0].items()
    }
