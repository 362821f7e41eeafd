"""The arguments of topk_gating that single gates ask for: against the twin, and against those gates written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, make_rows, non_contiguous
from compare import assert_deterministic, assert_matches_reference
from moe_ext import reference
from test_gating import SCORE_FUNCTIONS, SCORE_ORDERS, make_logits

# (num_tokens, num_experts, topk): few and many experts per lane, rows of odd length, rows in memory, no tokens.
SHAPES = [(0, 4, 2), (17, 7, 5), (37, 16, 2), (20, 128, 6), (3, 501, 3), (3, 1500, 33)]


def expert_values(num_experts: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(num_experts, device=device) % 5 + 1).to(dtype) / 4


def some_ids(num_tokens: int, num_experts: int, device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """Ids of experts, and ids that are none."""
    ids = torch.arange(num_tokens, device=device) * 7 % (num_experts + 2) - 1
    return ids.to(dtype)


# Name -> options from (num_tokens, num_experts, topk, device). "external" stands for a second differentiable argument.
KNOBS = {
    "window": lambda t, e, k, d: dict(first_rank=min(2, e - k), renormalize=True),
    "forced": lambda t, e, k, d: dict(forced_ids=some_ids(t, e, d), renormalize=True),
    "forced int64": lambda t, e, k, d: dict(
        forced_ids=some_ids(t, e, d, torch.int64) + 2**33 * (torch.arange(t, device=d) % 2)
    ),
    "top_p": lambda t, e, k, d: dict(top_p=0.37, scale=1.5),
    "min_ratio": lambda t, e, k, d: dict(min_ratio=0.9, renormalize=True),
    "keep": lambda t, e, k, d: dict(keep_tokens=torch.arange(t, device=d) % 3 != 1, renormalize=True),
    "ones": lambda t, e, k, d: dict(weight_source="ones", renormalize=True, scale=2.0),
    "external": lambda t, e, k, d: dict(weight_source="external", renormalize=True, renormalize_eps=0.1),
    "zero": lambda t, e, k, d: dict(zero_weight_experts=torch.arange(e, device=d) % 3 == 0, renormalize=True),
    "gain": lambda t, e, k, d: dict(expert_gain=expert_values(e, d), scale=0.5),
    "next": lambda t, e, k, d: dict(return_next_logit=True, renormalize=True),
    "all of scores": lambda t, e, k, d: dict(
        first_rank=min(1, e - k), forced_ids=some_ids(t, e, d), top_p=0.5, min_ratio=0.3, renormalize=True,
        keep_tokens=torch.arange(t, device=d) % 5 != 1, zero_weight_experts=torch.arange(e, device=d) % 4 == 1,
        expert_gain=expert_values(e, d), return_next_logit=True, renormalize_eps=1e-3, scale=1.5,
    ),
    "all of external": lambda t, e, k, d: dict(
        forced_ids=some_ids(t, e, d), top_p=0.6, keep_tokens=torch.arange(t, device=d) % 5 != 1,
        zero_weight_experts=torch.arange(e, device=d) % 4 == 1, expert_gain=expert_values(e, d),
        weight_source="external", renormalize=True, return_next_logit=True,
    ),
}  # fmt: skip


def run_gate(family, topk: int, options: dict):
    """A function of the logits and, with external weights, of these; options follow its dtype."""

    def run(logits: Tensor, external: Tensor | None = None):
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        here = {k: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
        return family.topk_gating(logits, topk, external_weights=external, **here)

    return run


def assert_gate_matches(logits: Tensor, topk: int, options: dict) -> None:
    num_tokens, num_experts = logits.shape
    args: tuple[Tensor, ...] = (logits,)
    if options.get("weight_source") == "external":
        args += (make_rows(num_tokens, num_experts, dtype=torch.float32, device=logits.device, seed=4).abs() + 0.1,)
    grads = [make_rows(num_tokens, topk, dtype=torch.float32, device=logits.device)]
    if options.get("return_next_logit"):
        grads.append(make_rows(num_tokens, dtype=torch.float32, device=logits.device, seed=6))
    op, twin = (run_gate(family, topk, options) for family in (moe_ext, reference))
    assert_matches_reference(op, twin, args, grads)
    assert_matches_reference(op, twin, [non_contiguous(a) for a in args], grads)
    assert_deterministic(op, args, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("knob", KNOBS)
def test_knob(knob, shape, dtype, device):
    num_tokens, num_experts, topk = shape
    if num_experts > 256 and dtype != torch.float32:
        pytest.skip("16 bits cannot hold so many distinct logits")
    logits = make_logits(num_tokens, num_experts, dtype, device)
    assert_gate_matches(logits, topk, KNOBS[knob](*shape, device))


@pytest.mark.parametrize("score_order", SCORE_ORDERS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("knob", ["window", "top_p", "min_ratio", "ones", "zero", "all of scores", "all of external"])
def test_knob_with_every_score(knob, score_function, score_order, device):
    """Together with a bias, masks and groups."""
    num_tokens, num_experts, topk = shape = (25, 24, 4)
    logits = make_logits(num_tokens, num_experts, torch.float32, device)
    if score_function == "identity":
        logits = logits.abs() + 0.25
    mask = torch.arange(num_tokens * num_experts, device=device).view(num_tokens, num_experts) * 5 % 7 != 2
    options = dict(score_function=score_function, score_order=score_order)
    assert_gate_matches(logits, topk, options | KNOBS[knob](*shape, device))
    options |= dict(expert_mask=mask, num_groups=4, topk_groups=2,
                    selection_bias=expert_values(num_experts, device).flip(0))  # fmt: skip
    assert_gate_matches(logits, topk, options | KNOBS[knob](*shape, device))


# ---- the gates, as their papers or code have them


def test_scmoe_weak_gate(device):
    """Rank k alone, whose weight renormalises to 1; the window from 0 is the ordinary choice."""
    logits = make_logits(30, 8, torch.float32, device)
    order = logits.argsort(dim=-1, descending=True)
    weights, ids = moe_ext.topk_gating(logits, 1, first_rank=2, renormalize=True)
    assert torch.equal(ids[:, 0].long(), order[:, 2]) and (weights == 1).all()
    weights, ids = moe_ext.topk_gating(logits, 3, first_rank=1)
    assert torch.equal(ids.long(), order[:, 1:4])
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, order[:, 1:4]))


def test_post_moe_language_expert(device):
    """The language's expert replaces the last of two where it is absent, weighted by the softmax."""
    logits = make_logits(40, 7, torch.float32, device)
    language = torch.arange(40, device=device) % 7
    probabilities = logits.softmax(-1)
    expected = probabilities.topk(2).indices
    absent = ~(expected == language[:, None]).any(1)
    assert absent.any() and not absent.all()
    expected[absent, 1] = language[absent]
    weights, ids = moe_ext.topk_gating(logits, 2, forced_ids=language)
    assert torch.equal(ids.long(), expected)
    torch.testing.assert_close(weights, probabilities.gather(1, expected))


def test_forced_ids_at_the_borders(device):
    """None, out of range and masked ids force nothing; a forced slot falls to keep_tokens alone; an empty one fills."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device).repeat(7, 1)
    mask = torch.ones(7, 4, dtype=torch.bool, device=device)
    mask[3, 3] = False
    mask[4, 1:3] = False  # the forced one is among the slots, which are fewer than topk
    keep = torch.arange(7, device=device) != 5
    forced = torch.tensor([-1, 4, -(2**31), 3, 3, 3, 3], dtype=torch.int32, device=device)
    weights, ids = moe_ext.topk_gating(
        logits, 3, forced_ids=forced, expert_mask=mask, keep_tokens=keep, top_p=0.5, min_ratio=1.0
    )
    assert ids.tolist() == [[0, -1, -1]] * 4 + [[0, 3, -1], [-1, -1, -1], [0, -1, 3]]
    assert torch.equal(weights == 0, ids < 0)
    _, ids = moe_ext.topk_gating(logits, 2, forced_ids=forced, expert_mask=mask[4], num_groups=2, topk_groups=1)
    assert ids.tolist() == [[0, -1]] * 3 + [[0, 3]] * 4  # from a group that fell out, into an empty slot
    far = forced.long() * 2**32 + torch.where(forced < 0, -1, 0)  # ids that 32 bits would take for 0
    assert (moe_ext.topk_gating(logits, 3, forced_ids=torch.where(forced == 0, 0, far))[1] < 3).all()


def test_glider_top_p(device):
    """The shortest prefix whose probabilities reach p, as nucleus sampling has it."""
    logits = make_logits(50, 12, torch.float32, device)
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    for top_p in (0.05, 0.6, 0.95, 1.0):
        weights, ids = moe_ext.topk_gating(logits, 12, top_p=top_p)
        kept = before < top_p
        assert torch.equal(ids, torch.where(kept, order, -1).int())
        torch.testing.assert_close(weights, probabilities * kept)
    assert kept.all()


def test_mc_moe_pruning(device):
    """The second expert goes where its weight is below half of the first; tokens without any expert weigh 0, not NaN."""
    logits = make_logits(40, 8, torch.float32, device)
    probabilities, order = logits.softmax(-1).topk(2)
    drop = probabilities[:, 1] < 0.99 * probabilities[:, 0]
    assert drop.any()
    keep = torch.arange(40, device=device) % 4 != 0
    logits.requires_grad_()
    weights, ids = moe_ext.topk_gating(logits, 2, min_ratio=0.99, keep_tokens=keep, renormalize=True)
    order[drop, 1] = -1
    order[~keep] = -1
    assert torch.equal(ids.long(), order)
    torch.testing.assert_close(weights.sum(1), keep.float())
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert grad.isfinite().all() and (grad[~keep] == 0).all()


def test_weights_of_one_give_the_logits_zeros(device):
    """Zero, not None: the router of LLaVA-MoLE and EMoE learns nothing from the task."""
    logits = make_logits(9, 6, torch.float32, device).requires_grad_()
    weights, ids = moe_ext.topk_gating(logits, 3, weight_source="ones")
    assert (weights == 1).all() and torch.equal(ids.long(), logits.topk(3).indices)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert (grad == 0).all()


def test_moextend_external_weights(device):
    """Picked by p, weighted by p + MLP(p): the gradient goes where the weights come from."""
    logits = make_logits(20, 8, torch.float32, device).requires_grad_()
    external = (logits.softmax(-1) + make_rows(20, 8, dtype=torch.float32, device=device) * 0.1).detach()
    external.requires_grad_()
    weights, ids = moe_ext.topk_gating(logits, 2, weight_source="external", external_weights=external, renormalize=True)
    order = logits.topk(2).indices
    expected = external.gather(1, order)
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(ids.long(), order)
    torch.testing.assert_close(weights, expected)
    upstream = make_rows(20, 2, dtype=torch.float32, device=device)
    ours = torch.autograd.grad(weights, (external, logits), upstream)
    torch.testing.assert_close(ours[0], torch.autograd.grad(expected, external, upstream)[0])
    assert (ours[1] == 0).all()


def test_moe_plus_plus_zero_expert(device):
    """The zero expert keeps its slot; the weight of the other is 1. Two zero experts weigh nothing at all."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 3.0, 0.0, 2.0], [0.0, 1.0, 2.0, 3.0]], device=device)
    zero = torch.tensor([False, False, True, True], device=device)
    weights, ids = moe_ext.topk_gating(logits, 2, zero_weight_experts=zero, renormalize=True)
    assert ids.tolist() == [[0, 1], [1, 3], [3, 2]]
    both = logits[0, :2].softmax(-1).tolist()
    torch.testing.assert_close(weights, torch.tensor([both, [1.0, 0.0], [0.0, 0.0]], device=device))


def test_expert_gain_is_last_and_constant(device):
    logits = make_logits(9, 6, torch.float32, device).requires_grad_()
    gain = expert_values(6, device).requires_grad_()
    plain, ids = moe_ext.topk_gating(logits, 2, renormalize=True, scale=3.0)
    weights, same = moe_ext.topk_gating(logits, 2, renormalize=True, scale=3.0, expert_gain=gain)
    assert torch.equal(ids, same)
    torch.testing.assert_close(weights, plain * gain.detach()[ids.long()])
    weights.sum().backward()
    assert gain.grad is None and logits.grad is not None


@pytest.mark.parametrize("topk", [3, 6])
def test_next_logit(topk, device):
    """The threshold of noisy top-k: the (k + 1)th logit, with its gradient; -inf where all experts are chosen."""
    logits = make_logits(9, 6, torch.float32, device).requires_grad_()
    forced = logits.argsort(dim=-1, descending=True)[:, min(topk, 5)]  # may be the next expert: its gradients add up
    weights, _, next_logit = moe_ext.topk_gating(logits, topk, forced_ids=forced, return_next_logit=True)
    (grad,) = torch.autograd.grad(next_logit.sum() + 0 * weights.sum(), logits)
    if topk == 6:
        assert (next_logit == -float("inf")).all() and (grad == 0).all()
        return
    values, order = logits.topk(topk + 1)
    assert torch.equal(next_logit, values[:, topk])
    assert torch.equal(grad, torch.zeros_like(grad).scatter(1, order[:, topk:], 1.0))


def test_knobs_on_nan_and_infinite_logits(device):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[nan, 1.0, 0.5, nan], [nan] * 4, [-inf, nan, 2.0, 1.0], [-inf] * 4, [0.0, inf, 1.0, nan]], device=device
    )
    for knob in ("top_p", "min_ratio", "forced", "ones", "zero", "next"):
        for score_order in SCORE_ORDERS:
            options = KNOBS[knob](5, 4, 3, device) | dict(score_order=score_order)
            ours, twin = (family.topk_gating(logits, 3, **options) for family in (moe_ext, reference))
            assert torch.equal(ours[1], twin[1]), knob
            for got, expected in zip(ours, twin, strict=True):
                torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.cpu
@pytest.mark.parametrize("score_order", SCORE_ORDERS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("knob", ["top_p", "zero", "gain", "next", "all of scores", "all of external"])
def test_gradcheck(knob, score_function, score_order):
    logits = (make_logits(4, 6, torch.float64, "cpu") + 4).requires_grad_()
    external = make_rows(4, 6, dtype=torch.float64).abs().add(0.1).requires_grad_()
    options = dict(score_function=score_function, score_order=score_order) | KNOBS[knob](4, 6, 3, "cpu")
    args = (logits, external) if options.get("weight_source") == "external" else (logits,)
    gate = run_gate(moe_ext, 3, options)

    def differentiable(*inputs):
        outputs = gate(*inputs)
        return outputs[0], *outputs[2:]

    assert torch.autograd.gradcheck(differentiable, args)


def test_hostile_ids_in_the_backward(device):
    """Ids out of range, next ids too, get no gradient and touch no memory."""
    logits = make_logits(6, 9, torch.float32, device)
    ids = torch.tensor([[0, 2**30, -7]] * 6, dtype=torch.int32, device=device)
    next_id = torch.tensor([1, -1, 9, 2**30, -(2**31), 8], dtype=torch.int32, device=device)
    ones = torch.ones(6, device=device)
    external = torch.ones(6, 9, device=device)
    grad, grad_external = torch.ops.moe_ext.topk_gating_general_backward(
        torch.ones(6, 3, device=device), logits, ids, "sigmoid", "score_then_select", None, False, 0.0, 1.0, ones,
        next_id, "external", external, None, ones.new_ones(9),
    )  # fmt: skip
    expected = torch.zeros(6, 9, device=device)
    expected[0, 1] = expected[5, 8] = 1
    assert torch.equal(grad, expected)
    assert (grad_external[:, 0] == 1).all() and (grad_external[:, 1:] == 0).all()


def logits_on(device: str) -> Tensor:
    return make_logits(5, 8, torch.float32, device)


def call(**options):
    """Options may be functions of the device."""
    return lambda d: moe_ext.topk_gating(logits_on(d), 2, **{k: v(d) if callable(v) else v for k, v in options.items()})


BAD_CALLS = [
    ("rank too far", call(first_rank=7), r"first_rank: expected 0 to 6, the experts to choose from less topk, got 7"),
    ("rank beyond the groups", call(first_rank=3, num_groups=2), r"first_rank: expected 0 to 2, .* got 3"),
    ("negative rank", call(first_rank=-1), r"first_rank: expected 0 to 6, .* got -1"),
    ("top_p 0", call(top_p=0.0), r"top_p: expected a number above 0 and at most 1, got 0"),
    ("top_p NaN", call(top_p=float("nan")), r"top_p: expected a number above 0 and at most 1, got nan"),
    ("ratio above 1", call(min_ratio=1.5), r"min_ratio: expected a number from 0 to 1, got 1.5"),
    ("float forced ids", call(forced_ids=lambda d: torch.zeros(5, device=d)), r"forced_ids: expected int32 or int64 \[num_tokens\], got float32 \[5\]"),
    ("forced ids of other tokens", call(forced_ids=lambda d: torch.zeros(4, device=d).int()), r"forced_ids: expected size 5 \(num_tokens, as in logits\)"),
    ("float keep", call(keep_tokens=lambda d: torch.zeros(5, device=d)), r"keep_tokens: expected bool \[num_tokens\], got float32 \[5\]"),
    ("unknown source", call(weight_source="logits"), r"weight_source: expected scores, ones or external, got logits"),
    ("external without weights", call(weight_source="external"), r"external_weights: expected a tensor with weight_source external, got none"),
    ("weights without external", call(external_weights=logits_on), r"external_weights: expected none with weight_source scores"),
    ("half external weights", call(weight_source="external", external_weights=lambda d: logits_on(d).half()), r"external_weights: expected float32 \[num_tokens, num_experts\], got float16 \[5, 8\]"),
    ("external weights of other tokens", call(weight_source="external", external_weights=lambda d: logits_on(d)[:3]), r"external_weights: expected size 5 \(num_tokens, as in logits\)"),
    ("float zero experts", call(zero_weight_experts=lambda d: torch.zeros(8, device=d)), r"zero_weight_experts: expected bool \[num_experts\], got float32 \[8\]"),
    ("zero experts of another size", call(zero_weight_experts=lambda d: torch.zeros(7, device=d).bool()), r"zero_weight_experts: expected size 8 \(num_experts, as in logits\)"),
    ("half gain", call(expert_gain=lambda d: torch.zeros(8, device=d).half()), r"expert_gain: expected float32 \[num_experts\], got float16 \[8\]"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)
