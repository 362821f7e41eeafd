"""The losses of a router against their reference twin, and against the published formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, make_rows, make_topk_ids, non_contiguous
from compare import assert_deterministic, assert_matches_reference
from moe_ext import reference
from test_gating import NAN, SCORE_FUNCTIONS, SHAPES, make_logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_router_losses(shape, score_function, dtype, masked, device):
    num_tokens, num_experts, topk = shape
    logits = make_rows(num_tokens, num_experts, dtype=dtype, device=device)
    if score_function == "identity":
        logits = logits.abs() + 0.25
    ids = make_topk_ids(num_tokens, num_experts, topk, "dropped", device)
    mask = (torch.arange(num_tokens) % 3 != 1).to(device) if masked else None

    def apply(family):
        def run(x, choice, counted):
            counted = None if counted is None else counted.to(x.device)
            return family.router_losses(x, choice.to(x.device), score_function=score_function, token_mask=counted)

        return run

    grads = [torch.tensor(0.7), torch.tensor(-0.3)]
    for source in (logits, non_contiguous(logits)):
        assert_matches_reference(apply(moe_ext), apply(reference), (source, ids, mask), grads)
    assert_deterministic(apply(moe_ext), (logits, ids, mask), [g.to(device) for g in grads])


def test_router_losses_count_int64_ids(device):
    ids = make_topk_ids(30, 6, 2, "dropped", device)
    logits = make_rows(30, 6, dtype=torch.float32, device=device)
    far = torch.where(ids < 0, -(2**40), ids.long())
    for narrow, wide in zip(moe_ext.router_losses(logits, ids), moe_ext.router_losses(logits, far), strict=True):
        assert torch.equal(narrow, wide)


def test_one_of_the_losses_alone(device):
    """The gradient that autograd leaves out counts as zero; a masked token gets none, whatever it holds."""
    logits = make_rows(9, 5, dtype=torch.float32, device=device)
    logits[4] = NAN
    counted = torch.arange(9, device=device) != 4
    ids = make_topk_ids(9, 5, 2, "uniform", device)
    total = torch.zeros_like(logits)
    leaf = logits.clone().requires_grad_()
    losses = moe_ext.router_losses(leaf, ids, token_mask=counted)[:2]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert loss.isfinite() and grad.isfinite().all() and (grad[4] == 0).all() and (grad != 0).any()
        total += grad
    (both,) = torch.autograd.grad(losses[0] + losses[1], leaf)
    torch.testing.assert_close(both, total)


def test_balance_loss_of_uniform_routing_is_one(device):
    logits = torch.zeros(64, 8, device=device)
    ids = torch.arange(128, device=device).remainder(8).view(64, 2)
    balance, z, counts = moe_ext.router_losses(logits, ids)
    torch.testing.assert_close(balance.item(), 1.0)
    torch.testing.assert_close(z.item(), torch.tensor(8.0).log().square().item())
    assert (counts == 16).all()
    nobody = torch.zeros(64, dtype=torch.bool, device=device)
    assert [x.sum().item() for x in moe_ext.router_losses(logits, ids, token_mask=nobody)] == [0, 0, 0]


def run_losses(family, options: dict):
    def run(logits: Tensor, topk_ids: Tensor):
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = options.get("expert_weights")
        return family.router_losses(
            logits, topk_ids, **options | dict(expert_weights=None if weights is None else weights.to(wide))
        )

    return run


@pytest.mark.parametrize("load", ["relative", "fraction", "count"])
@pytest.mark.parametrize("num_sequences", [1, 3, 60])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score_function, num_experts", [("softmax", 64), ("sigmoid", 7), ("softmax", 1100)])
def test_load_weights_and_sequences(score_function, num_experts, masked, num_sequences, load, device):
    """Some sequences count no token at all; 60 of one token each are more than the kernel has blocks of its own for."""
    num_tokens, topk = 60, 3
    options = dict(
        score_function=score_function, load=load, num_sequences=num_sequences,
        expert_weights=torch.linspace(0.2, 2.0, num_experts, device=device),
    )  # fmt: skip
    if masked:
        place = torch.arange(num_tokens, device=device)
        options["token_mask"] = (place % 3 != 1) & (place // 20 != 1)
    logits = make_rows(num_tokens, num_experts, dtype=torch.float32, device=device)
    ids = make_topk_ids(num_tokens, num_experts, topk, "zipf", device)
    grads = [torch.tensor(0.7), torch.tensor(-0.3)]
    ours, twin = run_losses(moe_ext, options), run_losses(reference, options)
    for source in (logits, non_contiguous(logits)):
        assert_matches_reference(ours, twin, (source, ids), grads)
    assert_deterministic(ours, (logits, ids), [g.to(device) for g in grads])


@pytest.mark.parametrize("num_sequences", [1, 5])
def test_no_tokens(num_sequences, device):
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    losses = moe_ext.router_losses(
        logits, torch.zeros(0, 2, dtype=torch.int32, device=device), num_sequences=num_sequences
    )
    assert [x.sum().item() for x in losses] == [0, 0, 0]
    assert torch.autograd.grad(losses[0] + losses[1], logits)[0].shape == (0, 4)


def make_routing(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, probabilities, the two best, and how many tokens each expert got."""
    logits = make_logits(48, 8, torch.float32, device)
    probabilities, ids = logits.softmax(-1), logits.topk(2).indices
    return logits, probabilities, ids, torch.nn.functional.one_hot(ids, 8).sum(1).float()


def test_switch_loss(device):
    """N sum_i f_i P_i, f_i the fraction of tokens whose first expert is i."""
    logits, probabilities, ids, _ = make_routing(device)
    first = torch.nn.functional.one_hot(ids[:, 0], 8).float()
    expected = 8 * (first.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(moe_ext.router_losses(logits, ids[:, :1])[0], expected)


def test_mixtral_loss_of_transformers(device):
    """Also that of MixLoRA: E sum over slots and experts of f P, with f a fraction of the tokens."""
    logits, probabilities, ids, _ = make_routing(device)
    picks = torch.nn.functional.one_hot(ids, 8).float()
    expected = (picks.mean(0) * probabilities.mean(0)).sum() * 8
    torch.testing.assert_close(8 * moe_ext.router_losses(logits, ids, load="fraction")[0], expected)


def test_deepseek_sequence_loss(device):
    """f_i = N / (K T) sum_t 1(i picked), P_i = 1 / T sum_t s_it, per sequence; the mean over the sequences."""
    logits, probabilities, ids, picks = make_routing(device)
    load = picks.view(4, 12, 8).sum(1) * 8 / (2 * 12)
    expected = (load * probabilities.view(4, 12, 8).mean(1)).sum(1).mean()
    balance, _, counts = moe_ext.router_losses(logits, ids, num_sequences=4)
    torch.testing.assert_close(balance, expected)
    assert torch.equal(counts, picks.sum(0).int())


def test_moe_plus_plus_loss(device):
    """sum_i eta_i f_i P_i with f a fraction of the tokens and eta = tau for the experts that compute nothing."""
    logits, probabilities, ids, picks = make_routing(device)
    eta = torch.tensor([1.0] * 5 + [0.75] * 3, device=device)
    expected = (eta * picks.mean(0) * probabilities.mean(0)).sum()
    balance, _, _ = moe_ext.router_losses(logits, ids, load="fraction", expert_weights=eta)
    torch.testing.assert_close(balance, expected)


def test_count_loss(device):
    """sum_j c_j p_j with c_j tokens of expert j (LLaVA-MoLE)."""
    logits, probabilities, ids, picks = make_routing(device)
    expected = (picks.sum(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(moe_ext.router_losses(logits, ids, load="count")[0], expected)


def test_no_gradient_to_the_expert_weights(device):
    logits, _, ids, _ = make_routing(device)
    weights = torch.ones(8, device=device, requires_grad=True)
    moe_ext.router_losses(logits.requires_grad_(), ids, expert_weights=weights)[0].backward()
    assert weights.grad is None and logits.grad is not None


@pytest.mark.cpu
@pytest.mark.parametrize("load", ["relative", "fraction", "count"])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_gradcheck_losses(score_function, load):
    logits = (make_rows(6, 4, dtype=torch.float64) + 4).requires_grad_()
    ids = make_topk_ids(6, 4, 2, "zipf")
    options = dict(
        score_function=score_function, load=load, num_sequences=3, token_mask=torch.tensor([1, 1, 0, 1, 0, 0]).bool(),
        expert_weights=torch.linspace(0.5, 2, 4, dtype=torch.float64),
    )  # fmt: skip
    assert torch.autograd.gradcheck(lambda x: moe_ext.router_losses(x, ids, **options)[:2], (logits,))


def losses_of(d: str, ids: Tensor | None = None, **options):
    logits = make_logits(5, 8, torch.float32, d)
    return moe_ext.router_losses(logits, torch.zeros(5, 2, device=d).int() if ids is None else ids, **options)


BAD_CALLS = [
    ("float ids", lambda d: losses_of(d, torch.zeros(5, 8, device=d)), r"topk_ids: expected int32 or int64 \[num_tokens, topk\], got float32 \[5, 8\]"),
    ("ids of other tokens", lambda d: losses_of(d, torch.zeros(4, 2, device=d).int()), r"topk_ids: expected size 5 \(num_tokens, as in logits\)"),
    ("no ids", lambda d: losses_of(d, torch.zeros(5, 0, device=d).int()), r"topk, the columns of topk_ids: expected an integer >= 1, got 0"),
    ("too many ids", lambda d: losses_of(d, torch.zeros(5, 1, device=d).int().expand(5, 2**29)), r"topk_ids, number of slots: expected at most 2\^31 - 1, got 2684354560"),
    ("float mask", lambda d: losses_of(d, token_mask=torch.ones(5, device=d)), r"token_mask: expected bool \[num_tokens\], got float32 \[5\]"),
    ("half weights", lambda d: losses_of(d, expert_weights=torch.ones(8, device=d).half()), r"expert_weights: expected float32 \[num_experts\], got float16 \[8\]"),
    ("weights of other experts", lambda d: losses_of(d, expert_weights=torch.ones(7, device=d)), r"expert_weights: expected size 8 \(num_experts, as in logits\)"),
    ("unknown load", lambda d: losses_of(d, load="mean"), r"load: expected relative, fraction or count, got mean"),
    ("sequences do not divide", lambda d: losses_of(d, num_sequences=2), r"num_sequences: expected a divisor of num_tokens = 5, got 2"),
    ("no sequences", lambda d: losses_of(d, num_sequences=0), r"num_sequences: expected an integer >= 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)
