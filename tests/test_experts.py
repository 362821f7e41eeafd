"""Expert activations and moe_mlp against their reference twins."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ext
from cases import DTYPES, ROUTINGS, SHAPES, make_rows, make_topk_ids, make_topk_weights, non_contiguous
from compare import assert_deterministic, assert_matches_reference
from moe_ext import reference
from moe_ext.activation_names import ACTIVATIONS, GATED_ACTIVATIONS

LAYOUTS = ["enk", "ekn"]
GATE_UP_LAYOUTS = ["concatenated", "interleaved"]


def make_activation_args(activation, width, dtype, device, num_rows=9):
    columns = 2 * width if activation in GATED_ACTIVATIONS else width
    rows = make_rows(num_rows, columns, dtype=dtype, device=device, scale=4.0)
    return rows, make_rows(num_rows, width, dtype=dtype, device=device, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_up_layout", GATE_UP_LAYOUTS)
def test_expert_activation(activation, gate_up_layout, dtype, device):
    def op(module):
        return lambda x: module.expert_activation(x, activation, gate_up_layout=gate_up_layout)

    for width, num_rows in ((1, 3), (13, 9), (64, 9), (1032, 5), (16, 0)):
        rows, grad = make_activation_args(activation, width, dtype, device, num_rows)
        for x in (rows, non_contiguous(rows)):
            assert_matches_reference(op(moe_ext), op(reference), (x,), [non_contiguous(grad)])
        assert_deterministic(op(moe_ext), (rows,), [grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation, dtype, device):
    """Saturation gives limits, not NaN; NaN stays NaN; infinity of the gate is torch's."""
    columns = torch.tensor([-1e4, -100.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 100.0, 200.0], dtype=dtype)
    for up in (1.0, -3.0):
        rows = columns[None].to(device)
        if activation in GATED_ACTIVATIONS:
            rows = torch.cat([rows, torch.full_like(rows, up)], dim=1)
        assert_matches_reference(
            lambda x: moe_ext.expert_activation(x, activation),
            lambda x: reference.expert_activation(x, activation),
            (rows,),
            [torch.ones(1, columns.numel(), dtype=dtype, device=device)],
        )
    nan = torch.full((1, 8), float("nan"), dtype=dtype, device=device)
    assert moe_ext.expert_activation(nan, activation).isnan().all()


@pytest.mark.cpu
def test_every_activation_in_float64():
    """The formulas to the last bits, at the clamps as well; the fp32 exponential of the CPU to its bound."""
    for activation, gate_up_layout in itertools.product(ACTIVATIONS, GATE_UP_LAYOUTS):
        rows, grad = make_activation_args(activation, 21, torch.float64, "cpu", 30)
        rows[0] = 7.0
        rows[1] = -7.0
        settings = {"gate_up_layout": gate_up_layout, "activation_alpha": 1.1, "activation_limit": 7.0}
        assert_matches_reference(
            lambda x, a=activation, s=settings: moe_ext.expert_activation(x, a, **s),
            lambda x, a=activation, s=settings: reference.expert_activation(x, a, **s),
            (rows,),
            [grad],
        )
    x = torch.linspace(-86, -1, 200_001)
    exponential = x / moe_ext.expert_activation(x[None], "silu")[0] - 1  # exp(-x)
    assert (exponential / (-x).double().exp() - 1).abs().max() < 1e-6


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_up_layout", GATE_UP_LAYOUTS)
def test_gradcheck_activation(activation, gate_up_layout):
    rows, _ = make_activation_args(activation, 5, torch.float64, "cpu")
    settings = {"gate_up_layout": gate_up_layout, "activation_limit": 3.0}
    assert torch.autograd.gradcheck(
        lambda x: moe_ext.expert_activation(x, activation, **settings), (rows.requires_grad_(),)
    )


class Case:
    """The tensors of one moe_mlp; `shape` is (num_tokens, hidden_size, intermediate_size, num_experts, topk)."""

    def __init__(
        self, shape, routing="uniform", *, dtype=torch.float32, device="cpu", layout="enk", bias=False, weighted=True,
        row_alignment=1, activation="swiglu", gate_up_layout="concatenated", **settings,
    ):  # fmt: skip
        num_tokens, hidden_size, intermediate_size, num_experts, topk = shape
        columns = 2 * intermediate_size if activation in GATED_ACTIVATIONS else intermediate_size
        plan = reference.routing_plan(
            make_topk_ids(num_tokens, num_experts, topk, routing), num_experts, row_alignment=row_alignment
        )
        self.plan = moe_ext.RoutingPlan(*(x.to(device) for x in plan))

        def weight(rows: int, columns: int, seed: int) -> Tensor:
            matrix = (rows, columns) if layout == "enk" else (columns, rows)
            scale = max(1, columns) ** -0.5
            return make_rows(num_experts, *matrix, dtype=dtype, device=device, seed=seed, scale=scale)

        router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.args = (
            make_rows(num_tokens, hidden_size, dtype=dtype, device=device),
            weight(columns, hidden_size, 3),
            weight(hidden_size, intermediate_size, 4),
            make_topk_weights(num_tokens, topk, device, dtype=router_dtype) if weighted else None,
            make_rows(num_experts, columns, dtype=dtype, device=device, seed=5) if bias else None,
            make_rows(num_experts, hidden_size, dtype=dtype, device=device, seed=6) if bias else None,
        )
        self.grad = make_rows(num_tokens, hidden_size, dtype=dtype, device=device, seed=7)
        self.settings = {
            "weight_layout": layout, "activation": activation, "gate_up_layout": gate_up_layout, **settings
        }  # fmt: skip

    def forward(self, module):
        def call(x, gate_up, down, weights, gate_up_bias, down_bias):
            return module.moe_mlp(
                x, gate_up, down, self.plan, weights, gate_up_bias=gate_up_bias, down_bias=down_bias, **self.settings
            )

        return call

    def check(self, args=None):
        assert_matches_reference(self.forward(moe_ext), self.forward(reference), args or self.args, [self.grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout, bias", [("enk", False), ("ekn", True)])
def test_moe_mlp(shape, routing, dtype, layout, bias, device):
    gate_up_layout = "interleaved" if bias else "concatenated"
    case = Case(
        shape, routing, dtype=dtype, device=device, layout=layout, bias=bias, row_alignment=8 if bias else 1,
        gate_up_layout=gate_up_layout, activation="swiglu_clamped" if bias else "swiglu",
    )  # fmt: skip
    case.check()
    assert_deterministic(case.forward(moe_ext), case.args, [case.grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_up_layout", GATE_UP_LAYOUTS)
def test_activations(activation, gate_up_layout, dtype, device):
    for shape in ((20, 24, 16, 3, 2), (11, 17, 13, 4, 2)):
        case = Case(
            shape, "zipf", dtype=dtype, device=device, activation=activation, gate_up_layout=gate_up_layout, bias=True
        )
        case.check()


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination_in_float64(activation):
    layouts = GATE_UP_LAYOUTS if activation in GATED_ACTIVATIONS else ["concatenated"]
    for gate_up_layout, layout, bias, weighted in itertools.product(layouts, LAYOUTS, [False, True], [False, True]):
        case = Case(
            (7, 5, 3, 4, 2), "dropped", dtype=torch.float64, layout=layout, bias=bias, weighted=weighted,
            row_alignment=3, activation=activation, gate_up_layout=gate_up_layout, activation_alpha=1.3,
            activation_limit=0.9,
        )  # fmt: skip
        case.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_unweighted_and_one_bias(weighted, dtype, device):
    for kept in (4, 5):
        case = Case((20, 24, 16, 3, 2), dtype=dtype, device=device, bias=True, weighted=weighted)
        case.args = tuple(a if i < 4 or i == kept else None for i, a in enumerate(case.args))
        case.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_larger_than_a_tile(layout, device):
    """One expert with all the tokens; many experts with few; wide rows."""
    for shape in ((600, 40, 136, 1, 1), (130, 72, 264, 2, 2), (300, 16, 24, 64, 2)):
        Case(shape, "zipf", device=device, layout=layout, bias=True).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation, gate_up_layout", [
    ("swiglu", "concatenated"), ("swiglu_clamped", "interleaved"), ("relu_squared", "concatenated"),
])  # fmt: skip
def test_tensor_cores(activation, gate_up_layout, layout, dtype, device):
    """Aligned for tensor cores; more than one tile of rows and of columns, padding rows, dropped slots, idle experts."""
    for shape, routing, bias in [((90, 72, 136, 3, 2), "dropped", True), ((150, 136, 72, 4, 1), "one_hot", False)]:
        case = Case(
            shape, routing, dtype=dtype, device=device, layout=layout, bias=bias, row_alignment=8, weighted=not bias,
            activation=activation, gate_up_layout=gate_up_layout,
        )  # fmt: skip
        case.check()
        assert_deterministic(case.forward(moe_ext), case.args, [case.grad])
        case.args = (*case.args[:3], make_topk_weights(shape[0], shape[4], device), *case.args[4:])
        case.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, device):
    case = Case((20, 24, 16, 3, 2), "dropped", device=device, layout=layout, bias=True)
    case.check([non_contiguous(a) for a in case.args])
    case.check([a.mT.contiguous().mT for a in case.args])


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "swiglu_limited", "relu_squared", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, activation):
    case = Case(
        (5, 4, 3, 3, 2),
        "dropped",
        dtype=torch.float64,
        layout=layout,
        bias=True,
        row_alignment=2,
        activation=activation,
    )
    assert torch.autograd.gradcheck(case.forward(moe_ext), [a.requires_grad_() for a in case.args])


def mixtral_experts(hidden: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The eager experts of Hugging Face's Mixtral, Qwen3-MoE and OLMoE, as published."""
    final = torch.zeros_like(hidden)
    expert_mask = F.one_hot(ids.long(), num_classes=gate_up.shape[0]).permute(2, 1, 0)
    for expert in range(gate_up.shape[0]):
        position, token = torch.where(expert_mask[expert])
        gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, dim=-1)
        current = F.linear(F.silu(gate) * up, down[expert]) * weights[token, position, None].to(hidden.dtype)
        final = final.index_add(0, token, current.to(hidden.dtype))
    return final


def gpt_oss_experts(
    hidden: Tensor, gate_up: Tensor, gate_up_bias: Tensor, down: Tensor, down_bias: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """The dense experts of Hugging Face's gpt-oss: every expert on every token, most of them with weight zero."""
    spread = torch.zeros(hidden.shape[0], gate_up.shape[0], dtype=weights.dtype, device=hidden.device)
    spread = spread.scatter(1, ids.long(), weights)
    gate_up_rows = torch.einsum("th,ehn->etn", hidden, gate_up) + gate_up_bias[:, None]
    gate, up = gate_up_rows[..., ::2], gate_up_rows[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    activated = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    rows = torch.einsum("eti,eih->eth", activated, down) + down_bias[:, None]
    return (rows * spread.t()[..., None].to(rows.dtype)).sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_the_field(dtype, device):
    """moe_mlp with the plan of routing_plan against the formulas that the models publish, forward and backward."""
    num_tokens, num_experts, topk = 40, 6, 2
    ids = make_topk_ids(num_tokens, num_experts, topk, "zipf", device)
    plan = moe_ext.routing_plan(ids, num_experts)
    case = Case((num_tokens, 32, 24, num_experts, topk), "zipf", dtype=dtype, device=device, bias=True)
    x, gate_up, down, weights, gate_up_bias, down_bias = case.args
    assert_matches_reference(
        lambda x, a, b, w: moe_ext.moe_mlp(x, a, b, plan, w, weight_layout="enk"),
        lambda x, a, b, w: mixtral_experts(x, a, b, ids.to(x.device), w),
        (x, gate_up, down, weights),
        [case.grad],
    )
    assert_matches_reference(
        lambda x, a, ab, b, bb, w: moe_ext.moe_mlp(
            x, a, b, plan, w, weight_layout="ekn", activation="swiglu_clamped", gate_up_layout="interleaved",
            gate_up_bias=ab, down_bias=bb,
        ),
        lambda x, a, ab, b, bb, w: gpt_oss_experts(x, a, ab, b, bb, ids.to(x.device), w),
        (x, gate_up.mT.contiguous(), gate_up_bias, down.mT.contiguous(), down_bias, weights),
        [case.grad],
    )  # fmt: skip


def test_what_the_backward_keeps(device):
    """Of all tensors with a row per slot, the pre-activation alone is kept."""
    case = Case((50, 24, 40, 3, 2), device=device, bias=True)
    num_rows, kept = case.plan.permuted_to_slot.numel(), []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = case.forward(moe_ext)(*(a.clone().requires_grad_() for a in case.args))
    assert output.requires_grad
    assert [tuple(x.shape) for x in kept if x.dim() == 2 and x.shape[0] == num_rows] == [(num_rows, 80)]
    with torch.no_grad():
        pre_activation = torch.ops.moe_ext.moe_mlp(
            *case.args[:3], *case.plan[:1], *case.plan[2:], *case.args[3:], 2, "enk", "swiglu", "concatenated", 1.7, 7.0,
            False, None,
        )[1]  # fmt: skip
    assert pre_activation.shape == (0, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 24, 40, 3, 2), (90, 72, 136, 3, 2), (0, 8, 16, 3, 2)])
def test_gradients_that_are_not_asked_for(shape, dtype, device):
    """Come back empty, and leave the others bitwise as they are."""
    case = Case(shape, "dropped", dtype=dtype, device=device, bias=True, row_alignment=8)
    offsets, _, slots, rows = case.plan
    tensors = (*case.args[:3], offsets, slots, rows, *case.args[3:])
    settings = (shape[4], "enk", "swiglu", "concatenated", 1.702, 7.0)
    _, pre_activation = torch.ops.moe_ext.moe_mlp(*tensors, *settings, True, None)

    def run(mask: list[bool]) -> list[Tensor]:
        return torch.ops.moe_ext.moe_mlp_backward(case.grad, *tensors, pre_activation, *settings, mask, None)

    everything = run([True] * 6)
    masks = [[place == one for place in range(6)] for one in range(6)]
    for mask in [*masks, *([not x for x in mask] for mask in masks), [False] * 6]:
        for got, full, asked_for in zip(run(mask), everything, mask, strict=True):
            assert torch.equal(got, full) if asked_for else got.shape == (0, *full.shape[1:])


def test_frozen_arguments_get_no_gradient(device):
    """As for a low-rank adapter over a frozen base: input and router weights alone."""
    case = Case((20, 16, 24, 3, 2), device=device, bias=True)
    args = [a.detach().requires_grad_(place in (0, 3)) for place, a in enumerate(case.args)]
    output = case.forward(moe_ext)(*args)
    output.backward(case.grad)
    everything = [a.detach().requires_grad_() for a in case.args]
    full = torch.autograd.grad(case.forward(moe_ext)(*everything), everything, case.grad)
    for place, (leaf, expected) in enumerate(zip(args, full, strict=True)):
        assert torch.equal(leaf.grad, expected) if place in (0, 3) else leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_that_are_not_trained(layout, dtype, device):
    """Zeros for their weights and biases; every other gradient is bitwise what it is without."""
    for shape in ((33, 17, 13, 5, 2), (90, 72, 136, 5, 2)):
        case = Case(shape, "zipf", dtype=dtype, device=device, layout=layout, bias=True, row_alignment=8)
        for trained in ([1, 0, 0, 1, 0], [0] * 5):
            trainable = torch.tensor(trained, dtype=torch.bool, device=device)
            args = [a.detach().requires_grad_() for a in case.args]
            full = torch.autograd.grad(case.forward(moe_ext)(*args), args, case.grad)
            case.settings["trainable_experts"] = trainable
            found = torch.autograd.grad(case.forward(moe_ext)(*args), args, case.grad)
            twin = torch.autograd.grad(case.forward(reference)(*args), args, case.grad)
            del case.settings["trainable_experts"]
            for place, (got, everyone, expected) in enumerate(zip(found, full, twin, strict=True)):
                if place not in (0, 3):
                    frozen = ~trainable.view(-1, *[1] * (got.dim() - 1))
                    everyone = everyone.masked_fill(frozen, 0)
                    assert (expected.masked_select(frozen.expand_as(expected)) == 0).all()
                assert torch.equal(got, everyone), (shape, place)


def test_dropped_tokens_give_zeros_and_no_gradient(device):
    case = Case((6, 8, 4, 3, 2), device=device, bias=True)
    ids = torch.full((6, 2), -1, dtype=torch.int32, device=device)
    ids[0, 0] = 1
    case.plan = moe_ext.routing_plan(ids, 3)
    args = [a.requires_grad_() for a in case.args]
    output = case.forward(moe_ext)(*args)
    assert (output[1:] == 0).all() and (output[0] != 0).any()
    grads = torch.autograd.grad(output, args, case.grad)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][1:] == 0).all() and (grads[3].reshape(-1)[1:] == 0).all() and grads[3][0, 0] != 0
    for g in (grads[1], grads[2], grads[4], grads[5]):
        assert (g[[0, 2]] == 0).all() and (g[1] != 0).any()


def test_hostile_plan(device):
    """Entries outside their range touch no memory and give finite numbers."""
    case = Case((4, 8, 4, 2, 2), device=device, bias=True)

    def make(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    for offsets in (make(-5, 3, 900), make(0, 8, 8), make(6, 6, 7)):
        case.plan = moe_ext.RoutingPlan(
            offsets, make(3, 5), make(0, 99, -7, 3, 4, 2**31 - 1, 6, 7), make(0, -5, 400, 3, 4, -(2**31), 6, 7)
        )
        args = [a.detach().requires_grad_() for a in case.args]
        output = case.forward(moe_ext)(*args)
        found = [output, *torch.autograd.grad(output, args, case.grad)]
        assert all(x.isfinite().all() for x in found)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_same_bits_for_any_number_of_threads(dtype):
    case = Case((300, 96, 200, 3, 2), "zipf", dtype=dtype, bias=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            args = [a.detach().requires_grad_() for a in case.args]
            output = case.forward(moe_ext)(*args)
            results.append([output, *torch.autograd.grad(output, args, case.grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck(device):
    ops = torch.ops.moe_ext
    for activation, bias, weighted in (("swiglu", False, True), ("relu", True, True), ("swiglu", True, False)):
        case = Case((6, 8, 4, 3, 2), "dropped", device=device, activation=activation, bias=bias, weighted=weighted)
        offsets, _, slots, rows = case.plan
        trainable = torch.tensor([True, False, True], device=device) if bias else None
        for grads in (False, True):
            x, gate_up, down, weights, gate_up_bias, down_bias = (
                None if a is None else a.clone().requires_grad_(grads) for a in case.args
            )
            tensors = (x, gate_up, down, offsets, slots, rows, weights, gate_up_bias, down_bias)
            settings = (2, "enk", activation, "concatenated", 1.702, 7.0)
            torch.library.opcheck(ops.moe_mlp.default, (*tensors, *settings, True, trainable))
        tensors = tuple(None if t is None else t.detach() for t in tensors)
        pre_activation = ops.moe_mlp.default(*tensors, *settings, True, trainable)[1]
        for mask in ([True] * 6, [False] * 6):
            torch.library.opcheck(
                ops.moe_mlp_backward.default, (case.grad, *tensors, pre_activation, *settings, mask, trainable)
            )
        torch.library.opcheck(ops.moe_mlp.default, (*tensors, *settings, False, trainable))
        activated = (activation, "interleaved", 1.702, 7.0)
        torch.library.opcheck(ops.expert_activation.default, (pre_activation.clone().requires_grad_(), *activated))
        half = make_rows(12, 4, dtype=torch.float32, device=device)
        torch.library.opcheck(ops.expert_activation_backward.default, (half, pre_activation, *activated))


def test_gradient_without_pre_activation_is_an_error(device):
    case = Case((6, 8, 4, 3, 2), device=device)
    x, gate_up, down, weights = (a.clone().requires_grad_() for a in case.args[:4])
    offsets, _, slots, rows = case.plan
    with pytest.raises(RuntimeError, match="save_pre_activation: expected True"):
        torch.ops.moe_ext.moe_mlp(
            x, gate_up, down, offsets, slots, rows, weights, None, None, 2, "enk", "swiglu", "concatenated", 1.7, 7.0,
            False, None,
        )  # fmt: skip


def make_call(d: str, **changes: object) -> Tensor:
    """A good call of moe_mlp with 4 tokens, topk 2, 3 experts, hidden size 8, intermediate size 4, but for `changes`."""
    plan = moe_ext.routing_plan(make_topk_ids(4, 3, 2, "uniform", d), 3)
    arguments: dict[str, object] = {
        "input": on(d, 4, 8), "gate_up_weight": on(d, 3, 8, 8), "down_weight": on(d, 3, 8, 4), "plan": plan,
        "topk_weights": on(d, 4, 2), "weight_layout": "enk", "gate_up_bias": on(d, 3, 8), "down_bias": on(d, 3, 8),
    }  # fmt: skip
    return moe_ext.moe_mlp(**(arguments | changes))


def on(d: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*sizes, dtype=dtype, device=d)


def make_backward_call(d: str, output_mask: list[bool]) -> Tensor:
    offsets, _, slots, rows = moe_ext.routing_plan(make_topk_ids(4, 3, 2, "uniform", d), 3)
    return torch.ops.moe_ext.moe_mlp_backward(
        on(d, 4, 8), on(d, 4, 8), on(d, 3, 8, 8), on(d, 3, 8, 4), offsets, slots, rows, None, None, None, on(d, 8, 8), 2,
        "enk", "swiglu", "concatenated", 1.7, 7.0, output_mask, None,
    )  # fmt: skip


BAD_CALLS = [
    ("integer rows", lambda d: moe_ext.expert_activation(on(d, 2, 4, dtype=torch.int32)), r"pre_activation: expected float32, bfloat16, float16 or float64 \[num_rows, width\], got int32 \[2, 4\]"),
    ("rows of one axis", lambda d: moe_ext.expert_activation(on(d, 4)), r"pre_activation: expected .*got float32 \[4\]"),
    ("odd width", lambda d: moe_ext.expert_activation(on(d, 2, 5), "geglu"), r"activation: geglu needs an even number of gate and up columns, got 5"),
    ("no activation", lambda d: moe_ext.expert_activation(on(d, 2, 4), "none"), "activation: expected one of " + ", ".join(ACTIVATIONS) + ", got none"),
    ("unknown gate layout", lambda d: moe_ext.expert_activation(on(d, 2, 4), gate_up_layout=""), r"gate_up_layout: expected concatenated or interleaved, got "),
    ("zero limit", lambda d: moe_ext.expert_activation(on(d, 2, 4), "swiglu_clamped", activation_limit=0.0), r"activation_limit: expected a number > 0, got 0"),
    ("negative limit", lambda d: moe_ext.expert_activation(on(d, 2, 4), "swiglu_limited", activation_limit=-1.0), r"activation_limit: expected a number > 0, got -1"),
    ("short output mask", lambda d: make_backward_call(d, [True]), r"output_mask: expected 6 entries, one for each gradient, got 1"),
    ("float trainable", lambda d: make_call(d, trainable_experts=on(d, 3)), r"trainable_experts: expected bool \[num_experts\], got float32 \[3\]"),
    ("trainable of another size", lambda d: make_call(d, trainable_experts=on(d, 2, dtype=torch.bool)), r"trainable_experts: expected size 3 \(num_experts"),
    ("integer input", lambda d: make_call(d, input=on(d, 4, 8, dtype=torch.int64)), r"input: expected float32, .* \[num_tokens, hidden_size\], got int64 \[4, 8\]"),
    ("other tokens", lambda d: make_call(d, input=on(d, 3, 8)), r"plan: expected a plan of 3 tokens, as input, got one of 8 slots"),
    ("other tokens and weights", lambda d: make_call(d, input=on(d, 2, 8), topk_weights=on(d, 2, 2)), r"plan: expected a plan of 2 tokens with topk 2, as input and topk_weights, got one of 8 slots"),
    ("no tokens", lambda d: make_call(d, input=on(d, 0, 8)), r"input: expected size 4 \(num_tokens, "),
    ("bf16 gate_up", lambda d: make_call(d, gate_up_weight=on(d, 3, 8, 8, dtype=torch.bfloat16)), r"gate_up_weight: expected float32 \[num_experts, gate and up columns, hidden_size\], got bfloat16 \[3, 8, 8\]"),
    ("gate_up of another hidden size", lambda d: make_call(d, gate_up_weight=on(d, 3, 8, 9)), r"gate_up_weight: expected size 8 \(hidden_size, as in input, for layout enk\) in dimension 2"),
    ("gate_up of other experts", lambda d: make_call(d, gate_up_weight=on(d, 2, 8, 8)), r"gate_up_weight: expected size 3 \(num_experts, "),
    ("odd gate_up", lambda d: make_call(d, gate_up_weight=on(d, 3, 7, 8)), r"activation: swiglu needs an even number"),
    ("down of the other layout", lambda d: make_call(d, down_weight=on(d, 3, 4, 8)), r"down_weight: expected size 8 \(hidden_size, as in input, for layout enk\) in dimension 1, got float32 \[3, 4, 8\]"),
    ("down of another width", lambda d: make_call(d, down_weight=on(d, 3, 8, 5)), r"down_weight: expected size 4 \(intermediate_size, "),
    ("down without gate", lambda d: make_call(d, activation="relu"), r"down_weight: expected size 8 \(intermediate_size, "),
    ("weights of another topk", lambda d: make_call(d, topk_weights=on(d, 4, 3)), r"plan: expected a plan of 4 tokens with topk 3, as input and topk_weights, got one of 8 slots"),
    ("bf16 weights", lambda d: make_call(d, topk_weights=on(d, 4, 2, dtype=torch.bfloat16)), r"topk_weights: expected float32"),
    ("gate_up_bias", lambda d: make_call(d, gate_up_bias=on(d, 3, 4)), r"gate_up_bias: expected size 8 \(the gate and up columns"),
    ("down_bias", lambda d: make_call(d, down_bias=on(d, 2, 8)), r"down_bias: expected size 3 \(num_experts\)"),
    ("layout", lambda d: make_call(d, weight_layout="nk"), r"weight_layout: expected enk or ekn, got nk"),
    ("activation", lambda d: make_call(d, activation="SwiGLU"), r"activation: expected one of silu, .*, got SwiGLU"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    make_call(device)
    with pytest.raises(RuntimeError, match=message):
        call(device)
