"""The gating family against its reference twins and against the published gates written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference
from moe_ext import reference

SCORE_FUNCTIONS = ["softmax", "sigmoid", "sqrt_softplus", "identity"]
SCORE_ORDERS = ["score_then_select", "select_then_score"]
# (num_tokens, num_experts, topk): every row layout of the CUDA kernels (aligned rows, rows of odd length) and beyond, E
# not a power of two, no tokens, tokens that leave a warp half empty.
SHAPES = [
    (0, 4, 2),
    (3, 1, 1),
    (17, 7, 7),
    (37, 16, 2),
    (9, 32, 5),
    (33, 60, 6),
    (20, 128, 8),
    (3, 101, 20),
    (9, 256, 8),
    (5, 384, 40),
    (2, 501, 3),
    (3, 1024, 8),
    (6, 1500, 33),
]


def make_logits(num_tokens: int, num_experts: int, dtype: torch.dtype, device: str) -> Tensor:
    """Distinct in every row even in bfloat16, where normal numbers would tie."""
    generator = torch.Generator().manual_seed(num_tokens)
    ranks = torch.stack(
        [torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)] or [torch.empty(0)]
    )
    values = ranks.reshape(num_tokens, num_experts).double()
    if num_experts <= 256:
        return ((values - num_experts / 2) / 32).to(dtype).to(device)  # at most 8 significant bits: exact
    return ((values - num_experts / 2) / 128).to(dtype).to(device)


def with_options(op, topk: int, **options):
    return lambda logits: op(logits, topk, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_order", SCORE_ORDERS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_gating(shape, score_function, score_order, dtype, device):
    num_tokens, num_experts, topk = shape
    if num_experts > 256 and dtype == torch.bfloat16:
        pytest.skip("bfloat16 cannot hold so many distinct logits")
    logits = make_logits(num_tokens, num_experts, dtype, device)
    grad = make_rows(num_tokens, topk, dtype=torch.float32, device=device)
    for renormalize in (False, True):
        options = dict(score_function=score_function, score_order=score_order, renormalize=renormalize, scale=2.5)
        if score_function == "identity" and renormalize:
            logits = logits.abs() + 0.25  # sums near zero would only measure cancellation
        op, twin = (with_options(family.topk_gating, topk, **options) for family in (moe_ext, reference))
        for source in (logits, non_contiguous(logits)):
            assert_matches_reference(op, twin, (source,), [grad])
        assert_deterministic(op, (logits,), [grad])


@pytest.mark.parametrize("score_order", SCORE_ORDERS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("shape", [(40, 64, 6), (7, 256, 8), (5, 48, 3), (3, 1104, 8)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("mask", [None, "per_expert", "per_token"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 4), (4, 1)])
def test_bias_mask_and_groups(shape, score_function, score_order, biased, mask, groups, device):
    num_tokens, num_experts, topk = shape
    logits = make_logits(num_tokens, num_experts, torch.float32, device)
    generator = torch.Generator().manual_seed(5)
    expert_mask = None
    if mask:
        size = (num_experts,) if mask == "per_expert" else (num_tokens, num_experts)
        expert_mask = (torch.rand(size, generator=generator) < 0.3).to(device)
    bias = torch.linspace(-1, 1, num_experts, device=device).flip(0) * 0.37 if biased else None
    options = dict(score_function=score_function, score_order=score_order, num_groups=groups[0], topk_groups=groups[1],
                   renormalize=True, renormalize_eps=1e-3, expert_mask=expert_mask)  # fmt: skip
    if score_function == "identity":
        logits = logits.abs() + 0.25

    def apply(family):
        def run(x):
            wide = bias if bias is None or x.dtype != torch.float64 else bias.double()
            here = {k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in options.items()}
            return family.topk_gating(x, topk, selection_bias=wide, **here)

        return run

    grad = make_rows(num_tokens, topk, dtype=torch.float32, device=device)
    assert_matches_reference(apply(moe_ext), apply(reference), (logits,), [grad])
    _, ids = apply(moe_ext)(logits)
    allowed = torch.ones_like(logits, dtype=torch.bool) if expert_mask is None else expert_mask.expand_as(logits)
    assert allowed.gather(1, ids.long().clamp(min=0))[ids >= 0].all()
    in_group = torch.where(ids >= 0, ids // (num_experts // groups[0]), ids[:, :1] // (num_experts // groups[0]))
    assert all(len(set(row.tolist()) - {-1}) <= groups[1] for row in in_group)


def test_many_slots_and_groups(device):
    """More of both than a warp has lanes."""
    logits = make_logits(5, 512, torch.float32, device)
    for options in (
        dict(topk=300),
        dict(topk=40, num_groups=128, topk_groups=50),
        dict(topk=9, num_groups=256, topk_groups=5),
    ):
        weights, ids = moe_ext.topk_gating(logits, **options)
        expected, same = reference.topk_gating(logits, **options)
        assert torch.equal(ids, same)
        torch.testing.assert_close(weights, expected)


def test_ties_across_lanes(device):
    """Equal logits everywhere: ids ascend, whichever lanes hold them."""
    for num_experts in (12, 30, 64, 128, 256, 384, 1000, 1500):
        _, ids = moe_ext.topk_gating(torch.zeros(3, num_experts, device=device), 12)
        assert (ids == torch.arange(12, device=device)).all(), num_experts
        late = torch.zeros(3, num_experts, device=device)
        late[:, -1] = late[:, 5] = 1.0
        _, ids = moe_ext.topk_gating(late, 4)
        assert (ids == torch.tensor([5, num_experts - 1, 0, 1], device=device)).all(), num_experts


def test_mixtral_gate(device):
    logits = make_logits(50, 8, torch.float32, device)
    probabilities = torch.softmax(logits, dim=-1)
    top, ids = probabilities.topk(2)
    weights, ours = moe_ext.topk_gating(logits, 2, renormalize=True)
    assert torch.equal(ours.long(), ids)
    torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True))


def test_gpt_oss_gate(device):
    logits = make_logits(50, 32, torch.float32, device)
    top, ids = logits.topk(4)
    weights, ours = moe_ext.topk_gating(logits, 4, score_order="select_then_score")
    assert torch.equal(ours.long(), ids)
    torch.testing.assert_close(weights, torch.softmax(top, dim=-1))


def test_deepseek_v3_gate(device):
    """As the model's own code has it: sigmoid, bias for the choice, two best of each group, 4 of 8 groups, x 2.5."""
    logits = make_rows(60, 256, dtype=torch.float32, device=device)
    bias = make_rows(256, dtype=torch.float32, device=device, seed=8, scale=0.1)
    scores = logits.sigmoid()
    biased = scores + bias
    group_scores = biased.view(60, 8, 32).topk(2, dim=-1)[0].sum(-1)
    group_ids = group_scores.topk(4, dim=-1)[1]
    group_mask = torch.zeros_like(group_scores).scatter_(1, group_ids, 1)
    candidates = biased.masked_fill(~group_mask.bool().repeat_interleave(32, dim=1), float("-inf"))
    ids = candidates.topk(8, dim=-1)[1]
    top = scores.gather(1, ids)
    weights, ours = moe_ext.topk_gating(
        logits, 8, score_function="sigmoid", selection_bias=bias, num_groups=8, topk_groups=4, renormalize=True,
        renormalize_eps=1e-20, scale=2.5,
    )  # fmt: skip
    assert torch.equal(ours.long().sort(1)[0], ids.sort(1)[0])
    order, mine = ids.argsort(1), ours.long().argsort(1)
    expected = top / (top.sum(-1, keepdim=True) + 1e-20) * 2.5
    torch.testing.assert_close(weights.gather(1, mine), expected.gather(1, order))


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_bias_is_added_to_what_is_selected_by(score_function, device):
    """To the score, or to the raw logit with select_then_score; never to the weight. The two choose differently here."""
    logits = torch.tensor([[4.0, 3.0, 2.9, -1.0]], device=device)
    bias = torch.tensor([-1.2, 0.0, 0.0, 0.3], device=device)
    scores = {
        "softmax": logits.softmax(-1),
        "sigmoid": logits.sigmoid(),
        "sqrt_softplus": torch.nn.functional.softplus(logits).sqrt(),
        "identity": logits,
    }[score_function]
    for score_order, values in (("score_then_select", scores), ("select_then_score", logits)):
        ids = (values + bias).topk(2).indices
        expected = scores.gather(1, ids)
        if score_function == "softmax" and score_order == "select_then_score":
            expected = logits.gather(1, ids).softmax(-1)
        weights, ours = moe_ext.topk_gating(
            logits, 2, score_function=score_function, score_order=score_order, selection_bias=bias
        )
        assert torch.equal(ours.long(), ids)
        torch.testing.assert_close(weights, expected)


def test_no_gradient_to_the_bias(device):
    logits = make_logits(4, 8, torch.float32, device).requires_grad_()
    bias = torch.zeros(8, device=device, requires_grad=True)
    weights, _ = moe_ext.topk_gating(logits, 2, selection_bias=bias)
    weights.sum().backward()
    assert bias.grad is None and logits.grad is not None


def test_ties_go_to_the_lower_id(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, -0.0, 0.0, -0.0, 0.0]], device=device)
    _, ids = moe_ext.topk_gating(logits, 4)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


NAN, INF = float("nan"), float("inf")
# Logits of one token -> the three experts of the choice.
SPECIAL_ROWS = [
    ([NAN, 1.0, 0.5, NAN], [1, 2, 0]),
    ([NAN, NAN, NAN, NAN], [0, 1, 2]),
    ([-INF, NAN, 2.0, 1.0], [2, 3, 0]),
    ([-INF, -INF, 0.0, -INF], [2, 0, 1]),
    ([-INF, -INF, -INF, -INF], [0, 1, 2]),
    ([0.0, INF, 1.0, NAN], [1, 2, 0]),
    ([INF, -INF, INF, 200.0], [0, 2, 3]),
    ([-120.0, 0.0, 120.0, -300.0], [2, 1, 0]),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score_order", SCORE_ORDERS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_nan_and_infinite_logits(score_function, score_order, renormalize, biased, device):
    logits = torch.tensor([row for row, _ in SPECIAL_ROWS], device=device)
    options = dict(score_function=score_function, score_order=score_order, renormalize=renormalize)
    # A bias of zeros takes the other way through the kernels; scores that are equal then tie.
    bias = torch.zeros(4, device=device) if biased else None
    weights, ids = moe_ext.topk_gating(logits, 3, selection_bias=bias, **options)
    expected, same = reference.topk_gating(logits, 3, selection_bias=bias, **options)
    assert torch.equal(same, ids)
    torch.testing.assert_close(weights, expected, equal_nan=True)
    if not biased:
        assert ids.tolist() == [choice for _, choice in SPECIAL_ROWS]
    if not renormalize:
        chosen_nan = logits.gather(1, ids.long()).isnan()
        by_softmax = score_function == "softmax"
        undefined = torch.tensor([by_softmax and (INF in row or row == [-INF] * 4) for row, _ in SPECIAL_ROWS])
        assert torch.equal(weights.isnan(), chosen_nan | undefined.to(device)[:, None])


def test_too_few_allowed(device):
    logits = make_logits(4, 6, torch.float32, device).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 0, 0, 1]] * 3 + [[0] * 6], dtype=torch.bool, device=device)
    weights, ids = moe_ext.topk_gating(logits, 3, expert_mask=mask, renormalize=True)
    assert (ids[:3, 2] == -1).all() and (weights[:3, 2] == 0).all() and (ids[3] == -1).all() and (weights[3] == 0).all()
    torch.testing.assert_close(weights[:3].sum(1), torch.ones(3, device=device))
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert grad.isfinite().all() and (grad[3] == 0).all() and (grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize(
    "num_tokens, num_experts, capacity",
    [(0, 4, 2), (40, 7, 5), (9, 33, 20), (700, 3, 90), (6, 4, 0), (70, 40, 70), (5, 1030, 3)],
)
def test_expert_choice_gating(num_tokens, num_experts, capacity, score_function, dtype, device):
    # Columns without ties: a different permutation of the tokens for every expert, small steps so that no score
    # saturates; softmax mixes experts, so its ties are tested in float32 only.
    if num_tokens > 256 and dtype != torch.float32:
        pytest.skip("16 bits cannot hold so many distinct logits")
    logits = make_logits(num_experts, max(num_tokens, 1), dtype, device)[:, :num_tokens].T.contiguous()
    if num_tokens > 256:
        logits = logits / 4
    if score_function == "softmax" and dtype != torch.float32:
        logits = make_rows(num_tokens, num_experts, dtype=dtype, device=device)
    grad = make_rows(num_tokens, num_experts, dtype=torch.float32, device=device)

    def apply(family):
        return lambda x: family.expert_choice_gating(x, capacity, score_function=score_function)

    assert_matches_reference(apply(moe_ext), apply(reference), (logits,), [grad])
    assert_deterministic(apply(moe_ext), (logits,), [grad])
    weights, ids = apply(moe_ext)(logits)
    assert ((ids >= 0).sum(0) == min(capacity, num_tokens)).all() and (weights[ids < 0] == 0).all()


def test_expert_choice_ties_and_nan(device):
    logits = torch.tensor([[1.0, float("nan")], [1.0, 2.0], [1.0, 2.0], [0.0, float("nan")]], device=device)
    _, ids = moe_ext.expert_choice_gating(logits, 3, score_function="sigmoid")
    assert ids.tolist() == [[0, 1], [0, 1], [0, 1], [-1, -1]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_scores_far_below_the_others_are_zero(score_function, device):
    """Exactly 0, not the smallest value of an exp that stops early: a sum over such scores must not count."""
    logits = make_rows(20, 24, dtype=torch.float32, device=device)
    nothing = torch.arange(24, device=device) % 5 == 2
    logits[:, nothing] = torch.tensor([-INF, -400.0, -130.0, -INF, -INF], device=device)
    logits.requires_grad_()
    weights, _ = moe_ext.expert_choice_gating(logits, 20, score_function=score_function)
    assert torch.equal(weights == 0, nothing.expand_as(weights))
    (grad,) = torch.autograd.grad(weights.square().sum(), logits)
    assert torch.equal(grad == 0, nothing.expand_as(grad))


@pytest.mark.parametrize("capacity", [1, 37, 599, 600])
def test_expert_choice_many_ties(capacity, device):
    """Far more ties than the choice admits: the earlier tokens win, above them everything better."""
    logits = torch.zeros(600, 3, device=device)
    logits[:, 1] = -0.0
    logits[::2, 2] = 1.0
    _, ids = moe_ext.expert_choice_gating(logits, capacity, score_function="identity")
    order = torch.arange(600, device=device)
    assert torch.equal(ids[:, 0] == 0, order < capacity) and torch.equal(ids[:, 1] == 1, order < capacity)
    rank = torch.where(order % 2 == 0, order // 2, 300 + order // 2)
    assert torch.equal(ids[:, 2] == 2, rank < capacity)


@pytest.mark.cpu
def test_the_number_of_threads_changes_nothing():
    logits, ids = make_rows(3000, 96, dtype=torch.float32), make_topk_ids(3000, 96, 6, "zipf")
    grad = make_rows(3000, 6, dtype=torch.float32)

    def everything():
        leaf = logits.clone().requires_grad_()
        weights, chosen = moe_ext.topk_gating(leaf, 6, renormalize=True)
        losses = moe_ext.router_losses(leaf, ids)
        dense, picked = moe_ext.expert_choice_gating(leaf, 200)
        total = (weights * grad).sum() + losses[0] + losses[1] + dense.square().sum()
        return [weights, chosen, *losses, dense, picked, torch.autograd.grad(total, leaf)[0]]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(4)
        together = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_expert_choice_drops_into_a_plan(device):
    logits = make_logits(24, 6, torch.float32, device)
    weights, ids = moe_ext.expert_choice_gating(logits, 5)
    plan = moe_ext.routing_plan(ids, 6, capacity=5)
    assert plan.tokens_per_expert.tolist() == [5] * 6 and plan.permuted_to_slot.numel() == 30
    hidden = make_rows(24, 8, dtype=torch.float32, device=device)
    rows = moe_ext.permute(hidden, plan.permuted_to_slot, plan.slot_to_permuted, 6)
    back = moe_ext.unpermute(rows, plan.permuted_to_slot, plan.slot_to_permuted, 6, weights)
    torch.testing.assert_close(back, hidden * weights.sum(1, keepdim=True))


@pytest.mark.cpu
@pytest.mark.parametrize(
    "renormalize, score_order, score_function", list(itertools.product([0, 1], SCORE_ORDERS, SCORE_FUNCTIONS))
)
def test_gradcheck_topk(score_function, score_order, renormalize):
    logits = (make_logits(4, 6, torch.float64, "cpu") + 4).requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    options = dict(score_function=score_function, score_order=score_order, renormalize=bool(renormalize), scale=1.5)
    assert torch.autograd.gradcheck(lambda x: moe_ext.topk_gating(x, 3, expert_mask=mask, **options)[0], (logits,))


@pytest.mark.cpu
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_gradcheck_expert_choice(score_function):
    logits = (make_rows(5, 4, dtype=torch.float64) + 4).requires_grad_()  # no ties inside a column
    options = dict(score_function=score_function)
    assert torch.autograd.gradcheck(lambda x: moe_ext.expert_choice_gating(x, 2, **options)[0], (logits,))


def test_opcheck(device):
    ops = torch.ops.moe_ext
    logits = make_logits(6, 8, torch.float32, device)
    bias, mask = torch.zeros(8, device=device), torch.ones(8, dtype=torch.bool, device=device)
    weights, ids, next_logit = moe_ext.topk_gating(logits, 2, return_next_logit=True)
    one = torch.tensor(1.0, device=device)
    tokens = torch.ones(6, dtype=torch.bool, device=device)
    common = ("softmax", "score_then_select", bias, mask, 4, 3, True, 0.0, 1.0)
    external = weights.new_ones(6, 8)
    knobs = (1, ids[:, 0], 0.9, 0.1, tokens, "external", external, mask, bias, True)
    no_knobs = (0, None, None, None, None, "scores", None, None, None, False)
    for x in (logits, logits.clone().requires_grad_()):
        torch.library.opcheck(ops.topk_gating.default, (x, 2, *common))
        for rest in (knobs, no_knobs):
            torch.library.opcheck(ops.topk_gating_general.default, (x, 2, *common, *rest))
        torch.library.opcheck(ops.router_losses.default, (x, ids, "sigmoid", tokens, bias, "fraction", 3))
        torch.library.opcheck(ops.expert_choice_gating.default, (x, 3, "softmax"))
    gradients = (weights, logits, ids, "softmax", "score_then_select", mask, True, 0.0, 1.0)
    torch.library.opcheck(ops.topk_gating_backward.default, gradients)
    for rest in ((None, None, "scores", None, None, None), (next_logit, ids[:, 1], "external", external, mask, bias)):
        torch.library.opcheck(ops.topk_gating_general_backward.default, (*gradients, *rest))
    _, _, counts, counted = ops.router_losses(logits, ids, "softmax", None, bias, "count", 2)
    torch.library.opcheck(
        ops.router_losses_backward.default, (one, one, logits, counts, counted, "softmax", None, bias, "count", 2)
    )
    dense, chosen = moe_ext.expert_choice_gating(logits, 3)
    torch.library.opcheck(ops.expert_choice_gating_backward.default, (dense, logits, chosen, "softmax"))


@pytest.mark.parametrize("routing", ["uniform", "dropped"])
def test_hostile_ids_in_the_backward(routing, device):
    """Ids out of range get no gradient and touch no memory."""
    logits = make_logits(20, 9, torch.float32, device)
    ids = make_topk_ids(20, 9, 3, routing, device)
    ids[0, 0] = 2**30
    grad = torch.ops.moe_ext.topk_gating_backward(
        make_topk_weights(20, 3, device), logits, ids, "sigmoid", "score_then_select", None, False, 0.0, 1.0
    )
    here = torch.zeros(20, 10, dtype=torch.bool, device=device)
    here.scatter_(1, torch.where((ids >= 0) & (ids < 9), ids, 9).long(), True)
    assert ((grad != 0) == here[:, :9]).all()


def logits_on(device: str) -> Tensor:
    return make_logits(5, 8, torch.float32, device)


BAD_CALLS = [
    ("integer logits", lambda d: moe_ext.topk_gating(logits_on(d).int(), 2), r"logits: expected float32, bfloat16, float16 or float64 \[num_tokens, num_experts\], got int32 \[5, 8\]"),
    ("flat logits", lambda d: moe_ext.topk_gating(logits_on(d)[0], 2), r"logits: expected .* got float32 \[8\]"),
    ("no experts", lambda d: moe_ext.topk_gating(logits_on(d)[:, :0], 1), r"logits: expected at least one expert"),
    ("topk 0", lambda d: moe_ext.topk_gating(logits_on(d), 0), r"topk: expected an integer >= 1, got 0"),
    ("topk above experts", lambda d: moe_ext.topk_gating(logits_on(d), 9), r"topk: expected at most num_experts = 8, got 9"),
    ("unknown score", lambda d: moe_ext.topk_gating(logits_on(d), 2, score_function="relu"), r"score_function: expected softmax, sigmoid, sqrt_softplus or identity, got relu"),
    ("unknown order", lambda d: moe_ext.topk_gating(logits_on(d), 2, score_order="both"), r"score_order: expected score_then_select or select_then_score, got both"),
    ("groups do not divide", lambda d: moe_ext.topk_gating(logits_on(d), 2, num_groups=3), r"num_groups: expected a divisor of num_experts = 8, got 3"),
    ("too many groups kept", lambda d: moe_ext.topk_gating(logits_on(d), 2, num_groups=2, topk_groups=3), r"topk_groups: expected 1 to num_groups = 2, got 3"),
    ("topk above kept groups", lambda d: moe_ext.topk_gating(logits_on(d), 3, num_groups=4, topk_groups=1), r"topk: expected at most 2, the experts of topk_groups groups, got 3"),
    ("negative eps", lambda d: moe_ext.topk_gating(logits_on(d), 2, renormalize_eps=-1.0), r"renormalize_eps: expected a number >= 0, got -1"),
    ("bias of another dtype", lambda d: moe_ext.topk_gating(logits_on(d), 2, selection_bias=torch.zeros(8, device=d).half()), r"selection_bias: expected float32 \[num_experts\], got float16 \[8\]"),
    ("bias of another size", lambda d: moe_ext.topk_gating(logits_on(d), 2, selection_bias=torch.zeros(7, device=d)), r"selection_bias: expected size 8 \(num_experts, as in logits\)"),
    ("float mask", lambda d: moe_ext.topk_gating(logits_on(d), 2, expert_mask=torch.ones(8, device=d)), r"expert_mask: expected bool \[num_experts\] or \[num_tokens, num_experts\], got float32 \[8\]"),
    ("mask of other tokens", lambda d: moe_ext.topk_gating(logits_on(d), 2, expert_mask=torch.ones(4, 8, device=d).bool()), r"expert_mask: expected size 5 \(num_tokens, as in logits\)"),
    ("expert choice: negative capacity", lambda d: moe_ext.expert_choice_gating(logits_on(d), -1), r"capacity: expected an integer >= 0, got -1"),
    ("expert choice: unknown score", lambda d: moe_ext.expert_choice_gating(logits_on(d), 1, score_function="tanh"), r"score_function: expected softmax"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)
