"""grouped_gemm, its weight gradient and its bias gradient against their reference twins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, ROUTINGS, SHAPES, make_rows, make_topk_ids, non_contiguous
from compare import assert_deterministic, assert_matches_reference, relative_error
from moe_ext import reference
from moe_ext.activation_names import ACTIVATIONS, GATED_ACTIVATIONS

LAYOUTS = ["enk", "ekn"]


class Case:
    """A plan and the tensors of one grouped GEMM; `rows` for `gather`, else in expert order."""

    def __init__(
        self, shape, routing="uniform", *, dtype=torch.float32, device="cpu", layout="enk", gather=False,
        bias=False, row_alignment=1, activation="none",
    ):  # fmt: skip
        num_tokens, in_features, out_features, num_experts, topk = shape
        width = 2 * out_features if activation in GATED_ACTIVATIONS else out_features
        plan = reference.routing_plan(
            make_topk_ids(num_tokens, num_experts, topk, routing), num_experts, row_alignment=row_alignment
        )
        self.offsets = plan.expert_offsets.to(device)
        maps = (plan.permuted_to_slot.to(device), plan.slot_to_permuted.to(device), topk)
        num_rows = maps[0].numel()
        matrix = (width, in_features) if layout == "enk" else (in_features, width)
        scale = max(1, in_features) ** -0.5
        self.input = make_rows(num_tokens if gather else num_rows, in_features, dtype=dtype, device=device)
        self.weight = make_rows(num_experts, *matrix, dtype=dtype, device=device, seed=3, scale=scale)
        self.bias = make_rows(num_experts, width, dtype=dtype, device=device, seed=4) if bias else None
        self.grad = make_rows(num_rows, out_features, dtype=dtype, device=device, seed=5)
        self.settings = {"weight_layout": layout, "gather": maps if gather else None}
        self.activation = {"activation": activation}
        self.args = (self.input, self.weight, self.bias)

    def forward(self, module):
        return lambda x, w, b: module.grouped_gemm(x, w, self.offsets, bias=b, **self.settings, **self.activation)

    def check(self):
        assert_matches_reference(self.forward(moe_ext), self.forward(reference), self.args, [self.grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout, gather, bias", [("enk", False, False), ("ekn", True, True)])
def test_grouped_gemm(shape, routing, dtype, layout, gather, bias, device):
    case = Case(shape, routing, dtype=dtype, device=device, layout=layout, gather=gather, bias=bias, row_alignment=8)
    case.check()
    assert_deterministic(case.forward(moe_ext), case.args, [case.grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, device):
    Case((33, 17, 13, 7, 2), dtype=dtype, device=device, layout="ekn", gather=True, activation=activation).check()
    Case((20, 64, 32, 3, 2), dtype=dtype, device=device, bias=True, activation=activation).check()


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_every_combination_in_float64(activation):
    layouts = ["concatenated", "interleaved"] if activation in GATED_ACTIVATIONS else ["concatenated"]
    for gate_up_layout, layout, gather, bias in itertools.product(layouts, LAYOUTS, [False, True], [False, True]):
        case = Case(
            (7, 5, 3, 4, 2), "half_empty", dtype=torch.float64, layout=layout, gather=gather, bias=bias,
            row_alignment=3, activation=activation,
        )  # fmt: skip
        case.activation |= {"gate_up_layout": gate_up_layout, "activation_alpha": 1.3, "activation_limit": 0.9}
        case.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(300, 72, 200, 1, 1), (257, 129, 515, 2, 2), (600, 40, 24, 40, 1), (1030, 16, 1100, 1, 1)]
)
def test_larger_than_a_tile(shape, layout, device):
    """One expert, groups of more rows than a tile holds, more columns than a tile holds, many small groups."""
    case = Case(shape, "zipf", device=device, layout=layout, gather=True, bias=True)
    case.check()
    assert_deterministic(case.forward(moe_ext), case.args, [case.grad])


# Aligned for tensor cores: several tiles in every direction; features that end inside a tile or a 64-deep stage; groups
# that end inside a tile; one row; more experts than rows.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(200, 136, 328, 3, 2), (1, 64, 8, 2, 1), (130, 328, 264, 1, 1), (40, 8, 72, 60, 2)])
def test_tensor_cores(shape, layout, dtype, device):
    case = Case(shape, "zipf", dtype=dtype, device=device, layout=layout)
    case.check()
    assert_deterministic(case.forward(moe_ext), case.args, [case.grad])
    wgrad = moe_ext.grouped_gemm_wgrad(
        case.input, case.grad, case.offsets, weight_layout=layout, out_dtype=torch.float32
    )
    exact = reference.grouped_gemm_wgrad(case.input.double(), case.grad.double(), case.offsets, weight_layout=layout)
    assert relative_error(wgrad, exact) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout, gather, bias", [("enk", True, True), ("ekn", True, False), ("enk", False, True)])
@pytest.mark.parametrize("activation, gate_up_layout", [
    ("none", "concatenated"), ("swiglu", "concatenated"), ("swiglu_clamped", "interleaved"), ("gelu", "concatenated"),
])  # fmt: skip
def test_tensor_cores_fused(activation, gate_up_layout, layout, gather, bias, dtype, device):
    """Gather, bias and activation around tiles that groups and features cut; rows without a slot."""
    for shape, routing in [((150, 136, 168, 3, 2), "zipf"), ((70, 72, 264, 5, 2), "dropped")]:
        case = Case(
            shape, routing, dtype=dtype, device=device, layout=layout, gather=gather, bias=bias, row_alignment=8,
            activation=activation,
        )  # fmt: skip
        case.activation["gate_up_layout"] = gate_up_layout
        case.check()
        assert_deterministic(case.forward(moe_ext), case.args, [case.grad])
        with torch.no_grad():  # no pre-activation is kept
            exact = case.forward(reference)(*(None if a is None else a.double() for a in case.args))
            assert relative_error(case.forward(moe_ext)(*case.args), exact) < 8e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("shape", [(33, 17, 13, 5, 2), (120, 136, 72, 5, 2)])
def test_experts_that_are_not_trained(shape, gather, layout, dtype, device):
    """Zeros, whatever their rows hold, since no product is made of them; the others bitwise as without."""
    case = Case(shape, "zipf", dtype=dtype, device=device, layout=layout, gather=gather)
    spoilt = case.grad.clone()
    spoilt[case.offsets[1] : case.offsets[2]] = float("nan")
    for trained in ([1, 0, 1, 0, 1], [0] * 5, [1, 0, 0, 0, 0]):
        trainable = torch.tensor(trained, dtype=torch.bool, device=device)
        for out_dtype in (None, torch.float32):
            full = moe_ext.grouped_gemm_wgrad(case.input, case.grad, case.offsets, **case.settings, out_dtype=out_dtype)
            found = moe_ext.grouped_gemm_wgrad(
                case.input, spoilt, case.offsets, **case.settings, out_dtype=out_dtype, trainable_experts=trainable
            )
            assert torch.equal(found, full.masked_fill(~trainable[:, None, None], 0))


@pytest.mark.cpu
@pytest.mark.parametrize("gather", [False, True])
def test_gradcheck_of_experts_that_are_not_trained(gather):
    case = Case((5, 4, 3, 3, 2), dtype=torch.float64, gather=gather)
    trainable = torch.tensor([True, False, True])

    def wgrad(module):
        return lambda x, g: module.grouped_gemm_wgrad(x, g, case.offsets, **case.settings, trainable_experts=trainable)

    args = (case.input.requires_grad_(), case.grad.requires_grad_())
    assert torch.autograd.gradcheck(wgrad(moe_ext), args)
    torch.testing.assert_close(wgrad(moe_ext)(*args), wgrad(reference)(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_stay_with_their_expert(bad, layout, dtype, device):
    """An infinity or NaN in the rows of one expert, or in its weight, reaches no other expert's results."""
    offsets = torch.tensor([3, 73, 73, 100, 230, 230], dtype=torch.int32, device=device)
    rows, grad = (make_rows(240, width, dtype=dtype, device=device, seed=s) for width, s in ((72, 2), (136, 5)))
    weight = make_rows(5, *((136, 72) if layout == "enk" else (72, 136)), dtype=dtype, device=device, seed=3)
    clean = (
        moe_ext.grouped_gemm(rows, weight, offsets, weight_layout=layout),
        moe_ext.grouped_gemm_wgrad(rows, grad, offsets, weight_layout=layout),
    )
    for x in (rows, grad):
        x[:3], x[73:100], x[230:] = bad, bad, bad
    weight[2] = bad
    output = moe_ext.grouped_gemm(rows, weight, offsets, weight_layout=layout)
    wgrad = moe_ext.grouped_gemm_wgrad(rows, grad, offsets, weight_layout=layout)
    others = [0, 1, 3, 4]
    assert torch.equal(wgrad[others], clean[1][others]) and (wgrad[[1, 4]] == 0).all()
    assert not wgrad[2].isfinite().any()
    kept = torch.cat([torch.arange(73), torch.arange(100, 240)]).to(device)
    assert torch.equal(output[kept], clean[0][kept]) and not output[73:100].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, device):
    case = Case((33, 17, 13, 7, 2), "zipf", device=device, layout=layout, bias=True)
    dense = case.forward(moe_ext)(*case.args)
    strided = [
        (non_contiguous(case.input), non_contiguous(case.weight), non_contiguous(case.bias)),
        (case.input.t().contiguous().t(), case.weight.mT.contiguous().mT, case.bias.t().contiguous().t()),
    ]
    for args in strided:
        assert relative_error(case.forward(moe_ext)(*args), dense) < 1e-6
        assert_matches_reference(case.forward(moe_ext), case.forward(reference), args, [non_contiguous(case.grad)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout, gather", [("enk", True), ("ekn", False)])
def test_wgrad(dtype, out_dtype, routing, layout, gather, device):
    for shape in SHAPES:
        case = Case(shape, routing, dtype=dtype, device=device, layout=layout, gather=gather, row_alignment=8)

        def wgrad(module, case=case):
            return lambda x, g: module.grouped_gemm_wgrad(x, g, case.offsets, **case.settings, out_dtype=out_dtype)

        args, grad = (case.input, case.grad), case.weight.to(out_dtype or dtype)
        assert_matches_reference(wgrad(moe_ext), wgrad(reference), args, [grad])
        assert_matches_reference(wgrad(moe_ext), wgrad(reference), [non_contiguous(a) for a in args], [grad])
        assert_deterministic(wgrad(moe_ext), args, [grad])
        result = wgrad(moe_ext)(*args)
        assert result.dtype == (out_dtype or dtype)
        counts = case.offsets.diff()
        assert (result[counts == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_wgrad_is_not_rounded_to_16_bits(dtype, device):
    case = Case((600, 24, 40, 2, 1), dtype=dtype, device=device)
    wide = moe_ext.grouped_gemm_wgrad(case.input, case.grad, case.offsets, weight_layout="enk", out_dtype=torch.float32)
    exact = reference.grouped_gemm_wgrad(case.input.double(), case.grad.double(), case.offsets, weight_layout="enk")
    assert relative_error(wide, exact) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bias_grad(dtype, out_dtype, routing, device):
    for shape in [*SHAPES, (700, 8, 1030, 2, 1)]:
        case = Case(shape, routing, dtype=dtype, device=device, row_alignment=8)

        def bias_grad(module, case=case):
            return lambda g: module.grouped_bias_grad(g, case.offsets, out_dtype=out_dtype)

        grad = make_rows(shape[3], shape[2], dtype=out_dtype or dtype, device=device, seed=6)
        assert_matches_reference(bias_grad(moe_ext), bias_grad(reference), (case.grad,), [grad])
        assert_matches_reference(bias_grad(moe_ext), bias_grad(reference), (non_contiguous(case.grad),), [grad])
        assert_deterministic(bias_grad(moe_ext), (case.grad,), [grad])


@pytest.mark.cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("routing", ["dropped", "half_empty"])
def test_gradcheck(layout, gather, routing):
    case = Case((6, 3, 4, 4, 2), routing, dtype=torch.float64, layout=layout, gather=gather, bias=True, row_alignment=2)
    args = [a.requires_grad_() for a in case.args]
    assert torch.autograd.gradcheck(case.forward(moe_ext), args)
    assert torch.autograd.gradgradcheck(case.forward(moe_ext), args)
    grad = case.grad.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, g: moe_ext.grouped_gemm_wgrad(x, g, case.offsets, **case.settings), (args[0], grad)
    )
    assert torch.autograd.gradcheck(lambda g: moe_ext.grouped_bias_grad(g, case.offsets), (grad,))


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_activation(activation):
    case = Case((5, 3, 2, 3, 2), dtype=torch.float64, gather=True, bias=True, activation=activation)
    assert torch.autograd.gradcheck(case.forward(moe_ext), [a.requires_grad_() for a in case.args])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_features, out_features", [(1, 9), (9, 1), (1, 1), (300, 1090)])
def test_narrow_and_wide(in_features, out_features, layout, device):
    """One column, whose rows and columns both look adjacent; a few rows whose columns fill many vectors."""
    case = Case((20, in_features, out_features, 3, 2), "zipf", device=device, layout=layout, gather=True, bias=True)
    case.check()
    Case((9, in_features, out_features, 4, 2), device=device, layout=layout, gather=True, activation="swiglu").check()


# Unaligned in fp32, and as tensor cores take them; with the relative error that is allowed.
KINDS = [(torch.float32, 5, 6, 1e-6), (torch.bfloat16, 8, 16, 4e-3), (torch.float16, 72, 264, 1e-3)]


def with_offsets(module, offsets, device, dtype, in_features, out_features):
    rows = make_rows(8, in_features, dtype=dtype, device=device)
    weight = make_rows(2, out_features, in_features, dtype=dtype, device=device)
    grad = make_rows(8, out_features, dtype=dtype, device=device)
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    return [
        module.grouped_gemm(rows, weight, offsets, weight_layout="enk"),
        module.grouped_gemm_wgrad(rows, grad, offsets, weight_layout="enk"),
        module.grouped_bias_grad(grad, offsets),
    ]


@pytest.mark.parametrize(
    "offsets", [[0, 4, 9], [0, 99, 120], [-7, 3, 8], [2, 5, 8], [2, 2, 5], [5, 5, 5], [-9, -3, -1]]
)
@pytest.mark.parametrize("dtype, in_features, out_features, allowed", KINDS)
def test_offsets_out_of_range(offsets, dtype, in_features, out_features, allowed, device):
    """Clamped to the rows; what no expert holds is zero."""
    found = with_offsets(moe_ext, offsets, device, dtype, in_features, out_features)
    expected = with_offsets(reference, offsets, "cpu", dtype, in_features, out_features)
    for got, exact in zip(found, expected, strict=True):
        assert relative_error(got, exact) < allowed


@pytest.mark.parametrize("offsets", [[0, 6, 3], [8, 0, 8], [7, 99, -4], [2**31 - 1, 0, -(2**31)]])
@pytest.mark.parametrize("dtype, in_features, out_features, _", KINDS)
def test_offsets_that_run_backwards(offsets, dtype, in_features, out_features, _, device):
    """Only memory safety is promised; the CPU takes the running maximum."""
    found = with_offsets(moe_ext, offsets, device, dtype, in_features, out_features)
    matrix = (out_features, in_features)
    assert [tuple(x.shape) for x in found] == [(8, out_features), (2, *matrix), (2, out_features)]


@pytest.mark.parametrize("dtype, in_features, out_features, allowed", KINDS)
def test_hostile_gather(dtype, in_features, out_features, allowed, device):
    """A slot out of range is a row of zeros."""
    tokens = make_rows(2, in_features, dtype=dtype, device=device)
    weight = make_rows(1, out_features, in_features, dtype=dtype, device=device)
    slots = torch.tensor([0, 99, -7, 3], dtype=torch.int32, device=device)
    rows = torch.tensor([0, -5, 400, 3], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    output = moe_ext.grouped_gemm(tokens, weight, offsets, weight_layout="enk", gather=(slots, rows, 2))
    expected = (
        torch.stack([tokens[0], tokens[0] * 0, tokens[0] * 0, tokens[1]]).cpu().double() @ weight[0].cpu().double().t()
    )
    assert relative_error(output, expected) < allowed
    wgrad = moe_ext.grouped_gemm_wgrad(tokens, output, offsets, weight_layout="ekn", gather=(slots, rows, 2))
    assert relative_error(wgrad[0], tokens.cpu().double().t() @ output[[0, 3]].cpu().double()) < allowed


@pytest.mark.parametrize("shape", [(6, 0, 4, 2, 2), (6, 3, 0, 2, 2), (0, 3, 4, 2, 2)])
def test_empty_axes(shape, device):
    for gather in (False, True):
        Case(shape, device=device, gather=gather, bias=True).check()


def test_only_the_gradients_asked_for(device):
    """A frozen weight costs no wgrad and keeps no input; a missing pre-activation is an error, not a wrong gradient."""
    case = Case((6, 8, 4, 3, 2), device=device, bias=True, activation="swiglu")
    x = case.input.requires_grad_()
    case.forward(moe_ext)(x, case.weight, None).sum().backward()
    assert x.grad is not None and case.weight.grad is None
    op = torch.ops.moe_ext.grouped_gemm.default
    arguments = (x, case.weight, case.offsets, "enk", None, None, None, 1, "swiglu", "concatenated", 1.0, 1.0)
    with pytest.raises(RuntimeError, match="save_pre_activation: expected True"):
        op(*arguments, False)
    assert op(*arguments, True)[1].shape == (12, 8)


def test_opcheck(device):
    ops = torch.ops.moe_ext
    for activation, save in (("none", False), ("swiglu", True), ("relu", True)):
        for gather in (False, True):
            case = Case((6, 8, 4, 3, 2), device=device, gather=gather, bias=True, activation=activation)
            maps = case.settings["gather"] or (None, None, 1)
            for grads in (False, True):
                x, w, b = (a.clone().requires_grad_(grads) for a in case.args)
                rest = (*maps, activation, "concatenated", 1.702, 7.0, save)
                torch.library.opcheck(ops.grouped_gemm.default, (x, w, case.offsets, "enk", b, *rest))
                g = case.grad.clone().requires_grad_(grads)
                for trainable in (None, torch.tensor([True, False, True], device=device)):
                    torch.library.opcheck(
                        ops.grouped_gemm_wgrad.default, (x, g, case.offsets, "ekn", *maps, None, trainable)
                    )
                torch.library.opcheck(ops.grouped_bias_grad.default, (g, case.offsets, torch.float32))
    torch.library.opcheck(ops.grouped_gemm.default, (x.detach(), w, case.offsets, "enk", None, *maps, "silu", "concatenated", 1.702, 7.0, True))  # fmt: skip


def make_call(d: str, op: str = "grouped_gemm", **changes: object) -> object:
    """A good call of `op` with 8 rows, 3 experts, 5 -> 6 features, but for `changes`."""
    arguments: dict[str, object] = {
        "input": make_rows(8, 5, dtype=torch.float32, device=d),
        "expert_offsets": torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=d),
        "weight_layout": "enk",
    }
    if op == "grouped_gemm":
        arguments["weight"] = make_rows(3, 6, 5, dtype=torch.float32, device=d)
    else:
        arguments["grad_output"] = make_rows(8, 6, dtype=torch.float32, device=d)
    if op == "grouped_bias_grad":
        del arguments["input"], arguments["weight_layout"]
    return getattr(moe_ext, op)(**(arguments | changes))


def gather_maps(d: str, num_tokens: int = 8, topk: int = 1) -> tuple[Tensor, Tensor, int]:
    slots = torch.arange(num_tokens * topk, dtype=torch.int32, device=d)
    return slots, slots.clone(), topk


def on(d: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*sizes, dtype=dtype, device=d)


BAD_CALLS = [
    ("integer input", lambda d: make_call(d, input=on(d, 8, 5, dtype=torch.int32)), r"input: expected float32, bfloat16, float16 or float64 \[num_rows, in_features\], got int32 \[8, 5\]"),
    ("3-d input", lambda d: make_call(d, input=on(d, 1, 8, 5)), r"input: expected .*got float32 \[1, 8, 5\]"),
    ("bf16 weight", lambda d: make_call(d, weight=on(d, 3, 6, 5, dtype=torch.bfloat16)), r"weight: expected float32 \[num_experts, out_features, in_features\], got bfloat16 \[3, 6, 5\]"),
    ("weight of the other layout", lambda d: make_call(d, weight=on(d, 3, 5, 6)), r"weight: expected size 5 \(in_features, as in input, for layout enk\) in dimension 2, got float32 \[3, 5, 6\]"),
    ("layout of the other weight", lambda d: make_call(d, weight_layout="ekn"), r"weight: expected size 5 \(in_features, as in input, for layout ekn\) in dimension 1"),
    ("unknown layout", lambda d: make_call(d, weight_layout="nek"), r"weight_layout: expected enk or ekn, got nek"),
    ("too many experts", lambda d: make_call(d, weight=on(d, 4, 6, 5)), r"weight: expected size 3 \(num_experts, the length of expert_offsets - 1\)"),
    ("int64 offsets", lambda d: make_call(d, expert_offsets=on(d, 4, dtype=torch.int64)), r"expert_offsets: expected int32 \[num_experts \+ 1\], got int64 \[4\]"),
    ("no experts", lambda d: make_call(d, expert_offsets=on(d, 1, dtype=torch.int32), weight=on(d, 0, 6, 5)), r"expert_offsets: expected at least 2 entries"),
    ("bias of one axis", lambda d: make_call(d, bias=on(d, 6)), r"bias: expected float32 \[num_experts, out_features\], got float32 \[6\]"),
    ("bias too wide", lambda d: make_call(d, bias=on(d, 3, 7)), r"bias: expected size 6 \(out_features, as in weight\)"),
    ("unknown activation", lambda d: make_call(d, activation="mish"), r"activation: expected one of none, silu, .*, reglu, got mish"),
    ("unknown gate layout", lambda d: make_call(d, gate_up_layout="stacked"), r"gate_up_layout: expected concatenated or interleaved, got stacked"),
    ("odd gated width", lambda d: make_call(d, weight=on(d, 3, 7, 5), activation="swiglu"), r"activation: swiglu needs an even number of gate and up columns, got 7"),
    ("negative limit", lambda d: make_call(d, activation="swiglu_clamped", activation_limit=-1.0), r"activation_limit: expected a number > 0, got -1"),
    ("gather of other tokens", lambda d: make_call(d, gather=gather_maps(d, 7)), r"input: expected size 7 \(num_tokens, "),
    ("gather with topk 0", lambda d: make_call(d, gather=(*gather_maps(d)[:2], 0)), r"topk: expected an integer >= 1, got 0"),
    ("gather with topk 3", lambda d: make_call(d, gather=(*gather_maps(d)[:2], 3)), r"slot_to_permuted: expected a length that is a multiple of topk = 3"),
    ("half a gather", lambda d: make_call(d, gather=(gather_maps(d)[0], None, 1)), r"gather: expected both"),
    ("wgrad rows", lambda d: make_call(d, "grouped_gemm_wgrad", grad_output=on(d, 7, 6)), r"grad_output: expected size 8 \(num_rows, as in input\) in dimension 0, got float32 \[7, 6\]"),
    ("wgrad dtypes", lambda d: make_call(d, "grouped_gemm_wgrad", grad_output=on(d, 8, 6, dtype=torch.float16)), r"grad_output: expected float32 \[num_rows, out_features\], got float16 \[8, 6\]"),
    ("wgrad to bf16", lambda d: make_call(d, "grouped_gemm_wgrad", out_dtype=torch.bfloat16), r"out_dtype: expected float32, the dtype of input, or float32, got bfloat16"),
    ("wgrad trainable", lambda d: make_call(d, "grouped_gemm_wgrad", trainable_experts=on(d, 4, dtype=torch.bool)), r"trainable_experts: expected size 3 \(num_experts, the length of expert_offsets - 1\)"),
    ("wgrad layout", lambda d: make_call(d, "grouped_gemm_wgrad", weight_layout=""), r"weight_layout: expected enk or ekn"),
    ("bias grad of one axis", lambda d: make_call(d, "grouped_bias_grad", grad_output=on(d, 8)), r"grad_output: expected .*\[num_rows, out_features\], got float32 \[8\]"),
    ("bias grad to int", lambda d: make_call(d, "grouped_bias_grad", out_dtype=torch.int32), r"out_dtype: expected float32"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_calls(call, message, device):
    make_call(device)
    with pytest.raises(RuntimeError, match=message):
        call(device)
