"""Branch-Train-Merge: posterior, prior, ensemble and parameter average by hand."""

from __future__ import annotations

import torch

from cases import make_rows
from compare import relative_error
from moe_ext.recipes import btm_average, btm_ensemble, btm_log_prior, btm_posterior

E, B, S, V = 3, 2, 4, 5


def make_models() -> tuple[torch.Tensor, torch.Tensor]:
    """log p [E, B, S, V] of three models and the tokens that came [B, S]."""
    log_probs = torch.log_softmax(make_rows(E, B, S, V, dtype=torch.float64), dim=-1)
    return log_probs, torch.randint(V, (B, S), generator=torch.Generator().manual_seed(1))


def of_tokens(log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(-1, tokens.expand(E, B, S)[..., None]).squeeze(-1)


def test_posterior_and_ensemble_are_bayes_rule():
    log_probs, tokens = make_models()
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_posterior = btm_posterior(of_tokens(log_probs, tokens), prior.log())
    mixed = btm_ensemble(log_probs, log_posterior[..., :-1])
    for b in range(B):
        joint = prior.clone()
        for t in range(S):
            posterior = joint / joint.sum()
            assert relative_error(log_posterior[:, b, t].exp(), posterior) < 1e-12
            assert relative_error(mixed[b, t].exp(), posterior @ log_probs[:, b, t].exp()) < 1e-12
            joint = joint * log_probs[:, b, t, tokens[b, t]].exp()
        assert relative_error(log_posterior[:, b, S].exp(), joint / joint.sum()) < 1e-12


def test_topk_keeps_the_likeliest_and_their_gradients():
    log_probs, tokens = make_models()
    log_probs.requires_grad_()
    log_posterior = btm_posterior(of_tokens(log_probs, tokens), torch.zeros(E, dtype=torch.float64))[..., :-1]
    everyone = btm_ensemble(log_probs, log_posterior, topk=E)
    assert relative_error(everyone, btm_ensemble(log_probs, log_posterior)) < 1e-12
    best_two = btm_ensemble(log_probs, log_posterior, topk=2)
    # At t = 0 nothing has been seen: the posteriors tie, and the lower ids win.
    assert relative_error(best_two[:, 0].exp(), log_probs[:2, :, 0].exp().mean(0)) < 1e-12
    posterior, best_two = log_posterior[..., 1:].exp(), best_two[:, 1:]
    kept = torch.where(posterior > posterior.min(0).values, posterior, 0.0)
    expected = ((kept / kept.sum(0))[..., None] * log_probs[:, :, 1:].exp()).sum(0)
    assert relative_error(best_two.exp(), expected) < 1e-12
    coefficients = make_rows(B, S - 1, V, dtype=torch.float64, seed=4)
    grads = [
        torch.autograd.grad((x * coefficients).sum(), log_probs, retain_graph=True)[0]
        for x in (best_two, expected.log())
    ]
    assert relative_error(*grads) < 1e-10 and (grads[0] == 0).any()


def test_cached_prior_moves_to_the_model_that_explains_the_text():
    sequences = torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-1.5, -1.5]])[:, :, None].double()
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    for i in range(2):
        posterior = prior * sequences[:, i, 0].exp()
        prior = 0.3 * posterior / posterior.sum() + 0.7 * prior
    assert relative_error(btm_log_prior(sequences).exp(), prior) < 1e-12
    many = btm_log_prior(sequences[:, :1].expand(3, 100, 1))
    assert many.argmax() == 0 and many.exp()[0] > 0.9


def test_parameters_are_averaged_by_weight():
    models = [torch.nn.BatchNorm1d(3) for _ in range(2)]
    for value, model in enumerate(models):
        model.weight.data.fill_(1.0 + 2 * value)
        model.num_batches_tracked.fill_(7)
    merged = btm_average([m.state_dict() for m in models], torch.tensor([0.25, 0.75]))
    assert merged["weight"].tolist() == [2.5] * 3 and merged["num_batches_tracked"] == 7
    torch.nn.BatchNorm1d(3).load_state_dict(merged)
