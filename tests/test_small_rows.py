"""Few rows per expert, as in decoding: what CUDA gives to csrc/grouped_gemm/small_rows."""

from __future__ import annotations

import ctypes
import itertools
import os

import pytest
import torch
from torch import Tensor

import moe_ext
from cases import DTYPES, ROUTINGS, make_rows, non_contiguous
from compare import assert_deterministic, assert_matches_reference, relative_error
from moe_ext import reference
from moe_ext.activation_names import ACTIVATIONS, GATED_ACTIVATIONS
from test_experts import GATE_UP_LAYOUTS, LAYOUTS
from test_experts import Case as MlpCase
from test_grouped_gemm import Case

# (num_tokens, in_features, out_features, num_experts, topk); in_features in whole 16-byte vectors.
SHAPES = [
    (1, 136, 40, 4, 1),  # fewer items than multiprocessors
    (1, 64, 200, 8, 2),
    (2, 40, 24, 256, 8),  # most experts empty
    (3, 16, 24, 1000, 4),  # several experts per thread of the scan
    (3, 16, 24, 1025, 4),  # too many for it: another kernel
    (3, 712, 72, 4, 2),  # longer than the ring of copies, not a multiple of a step
    (7, 8, 8, 16, 3),  # less than one step
    (16, 104, 136, 12, 6),
    (64, 72, 40, 64, 8),
]


def assert_forward_matches(case: Case | MlpCase) -> None:
    assert_matches_reference(case.forward(moe_ext), case.forward(reference), case.args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_gemm(shape, layout, dtype, device):
    for routing, (gather, bias) in zip(ROUTINGS, itertools.cycle([(True, False), (False, True), (True, True)])):
        case = Case(shape, routing, dtype=dtype, device=device, layout=layout, gather=gather, bias=bias)
        assert_forward_matches(case)
    assert_deterministic(case.forward(moe_ext), case.args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32, 33, 100])
def test_all_rows_in_one_expert(rows, layout, dtype, device):
    """Shapes choose the kernel, so an expert may hold any number of rows."""
    assert_forward_matches(Case((rows, 72, 72, 8, 1), "one_hot", dtype=dtype, device=device, layout=layout, bias=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, layout, device):
    for dtype, gate_up_layout in itertools.product(DTYPES, GATE_UP_LAYOUTS):
        if activation not in GATED_ACTIVATIONS and gate_up_layout == "interleaved":
            continue
        # 13 and 20 columns: no whole vectors, which only rules out some of ekn.
        for out_features, bias in ((40, True), (72, False), (13, True), (20, False)):
            case = Case((5, 40, out_features, 6, 2), dtype=dtype, device=device, layout=layout, gather=True, bias=bias,
                        activation=activation)  # fmt: skip
            case.activation |= {"gate_up_layout": gate_up_layout, "activation_alpha": 1.3, "activation_limit": 0.9}
            assert_forward_matches(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_up_layout", GATE_UP_LAYOUTS)
def test_pre_activation(gate_up_layout, layout, dtype, device):
    """Kept where asked for, with the bias, zero where no expert holds a row."""
    case = Case((6, 40, 40, 5, 2), "dropped", dtype=dtype, device=device, layout=layout, gather=True, bias=True,
                activation="swiglu")  # fmt: skip
    maps = case.settings["gather"]

    def pre_activation(module):
        if module is reference:
            return lambda x, w, b: reference.grouped_gemm(x, w, case.offsets, bias=b, **case.settings)
        rest = (*maps, "swiglu", gate_up_layout, 1.702, 7.0, True)
        return lambda x, w, b: torch.ops.moe_ext.grouped_gemm(x, w, case.offsets, layout, b, *rest)[1]

    assert_matches_reference(pre_activation(moe_ext), pre_activation(reference), case.args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout, dtype, device):
    """The gradient of the rows is the same product under the other layout."""
    for shape, routing in (((3, 40, 24, 8, 2), "uniform"), ((20, 24, 72, 8, 4), "dropped")):
        case = Case(shape, routing, dtype=dtype, device=device, layout=layout, gather=True, bias=True,
                    activation="swiglu")  # fmt: skip
        case.check()
        assert_deterministic(case.forward(moe_ext), case.args, [case.grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens, num_experts", [(1, 16), (2, 256), (3, 16), (7, 16), (16, 16), (64, 64)])
def test_moe_mlp(num_tokens, num_experts, layout, dtype, device):
    for routing, activation, gate_up_layout in (
        ("uniform", "swiglu", "concatenated"),
        ("one_hot", "swiglu_clamped", "interleaved"),
        ("dropped", "relu_squared", "concatenated"),
    ):
        case = MlpCase((num_tokens, 40, 24, num_experts, 4), routing, dtype=dtype, device=device, layout=layout,
                       bias=routing != "uniform", activation=activation, gate_up_layout=gate_up_layout)  # fmt: skip
        assert_forward_matches(case)
    assert_deterministic(case.forward(moe_ext), case.args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moe_mlp_gradients(layout, dtype, device):
    MlpCase((7, 40, 24, 16, 4), "zipf", dtype=dtype, device=device, layout=layout, bias=True).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_used_is_not_read(layout, dtype, device):
    """NaN in the weights and biases of unused experts, in rows of no expert and in tokens of no slot."""
    case = Case((4, 40, 72, 32, 2), "dropped", dtype=dtype, device=device, layout=layout, gather=True, bias=True)
    clean = case.forward(moe_ext)(*case.args)
    unused = case.offsets.diff() == 0
    assert unused.any() and not unused.all()
    case.weight[unused] = float("nan")
    case.bias[unused] = float("nan")
    assert torch.equal(case.forward(moe_ext)(*case.args), clean)

    rows = make_rows(9, 40, dtype=dtype, device=device)
    offsets = torch.tensor([2, 2, 5, 7], dtype=torch.int32, device=device)
    weight = case.weight.new_ones(3, 72, 40)
    clean = moe_ext.grouped_gemm(rows, weight, offsets, weight_layout="enk")
    weight[0] = rows[:2] = rows[7:] = float("nan")
    found = moe_ext.grouped_gemm(rows, weight, offsets, weight_layout="enk")
    assert torch.equal(found, clean) and (found[:2] == 0).all() and (found[7:] == 0).all()


@pytest.mark.skipif("emulated" not in os.environ.get("MOE_EXT_LIBRARY", ""), reason="counts what the emulator copies")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_weights_are_read_once(activation, layout, dtype, device):
    """Every weight of a used expert once, every row once per tile of 64 columns, nothing else."""
    copied_bytes = ctypes.CDLL(os.environ["MOE_EXT_LIBRARY"]).moe_emulator_copied_bytes
    copied_bytes.restype = ctypes.c_uint64
    for shape in ((1, 136, 40, 4, 1), (5, 72, 136, 64, 2), (8, 712, 24, 3, 1)):
        case = Case(shape, "dropped", dtype=dtype, device=device, layout=layout, gather=True, activation=activation)
        before = copied_bytes()
        case.forward(moe_ext)(*case.args)
        used, rows = int((case.offsets.diff() > 0).sum()), int(case.offsets[-1])
        tiles = -(-(2 if activation == "swiglu" else 1) * shape[2] // 64)
        values = used * case.weight[0].numel() + rows * shape[1] * tiles
        assert copied_bytes() - before == values * case.input.element_size()


def with_offsets(module, offsets: list[int], device: str) -> Tensor:
    rows = make_rows(8, 16, dtype=torch.float32, device=device)
    weight = make_rows(4, 24, 16, dtype=torch.float32, device=device, seed=3)
    return module.grouped_gemm(
        rows, weight, torch.tensor(offsets, dtype=torch.int32, device=device), weight_layout="enk"
    )


@pytest.mark.parametrize(
    "offsets", [[0, 4, 4, 9, 9], [0, 99, 120, 120, 120], [-7, 3, 3, 8, 8], [2, 5, 8, 8, 8], [5] * 5, [-9, -3, -1, -1, -1]]
)  # fmt: skip
def test_offsets_out_of_range(offsets, device):
    assert relative_error(with_offsets(moe_ext, offsets, device), with_offsets(reference, offsets, "cpu")) < 1e-6


@pytest.mark.parametrize(
    "offsets", [[0, 6, 3, 8, 1], [8, 0, 8, 0, 8], [7, 99, -4, 5, 0], [2**31 - 1, 0, -(2**31), 8, 0]]
)
def test_offsets_that_run_backwards(offsets, device):
    """Only memory safety is promised."""
    assert with_offsets(moe_ext, offsets, device).shape == (8, 24)


def test_hostile_gather(device):
    """A slot out of range is a row of zeros."""
    tokens = make_rows(2, 16, dtype=torch.float32, device=device)
    weight = make_rows(1, 24, 16, dtype=torch.float32, device=device, seed=3)
    slots = torch.tensor([0, 99, -7, 3], dtype=torch.int32, device=device)
    rows = torch.tensor([0, -5, 400, 3], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    output = moe_ext.grouped_gemm(tokens, weight, offsets, weight_layout="enk", gather=(slots, rows, 2))
    gathered = torch.stack([tokens[0], tokens[0] * 0, tokens[0] * 0, tokens[1]])
    assert relative_error(output, gathered.cpu().double() @ weight[0].cpu().double().t()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, device):
    case = Case((6, 40, 24, 8, 2), "zipf", dtype=torch.bfloat16, device=device, layout=layout, bias=True)
    dense = case.forward(moe_ext)(*case.args)
    for args in (
        [non_contiguous(a) for a in case.args],
        [a.mT.contiguous().mT for a in case.args],  # read under the other layout
    ):
        assert relative_error(case.forward(moe_ext)(*args), dense) < 4e-3
