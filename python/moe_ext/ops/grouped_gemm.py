"""One matrix product per expert over contiguous rows, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.activation_names import activated_width
from moe_ext.ops.autocast import cast_for_product
from moe_ext.ops.autograd import call, register_autograd
from moe_ext.ops.permutation import unpermute

_ops = torch.ops.moe_ext

# (permuted_to_slot, slot_to_permuted, topk)
Gather = tuple[Tensor, Tensor, int]


def grouped_gemm(
    input: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    weight_layout: str,
    bias: Tensor | None = None,
    gather: Gather | None = None,
    activation: str = "none",
    gate_up_layout: str = "concatenated",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
) -> Tensor:
    """Multiply each expert's rows with its matrix: the dropless grouped GEMM of MegaBlocks (arXiv 2211.15841).

    Under ``torch.autocast`` input, weight and bias are cast to autocast's dtype, and so is the result.

    Args:
        input: [num_rows, in_features] in expert order; with ``gather`` [num_tokens, in_features] in token order.
            float32, bfloat16 or float16 (float64 on the CPU).
        weight: [num_experts, out_features, in_features] for layout ``"enk"`` (torch.nn.Linear's convention), or
            [num_experts, in_features, out_features] for ``"ekn"`` (gpt-oss's), in the dtype of ``input``. On the CPU
            any strides are multiplied in place.
        expert_offsets: [num_experts + 1] int32, on the device of ``input``: rows ``expert_offsets[e] :
            expert_offsets[e + 1]`` belong to expert e. Counts as clamped to ``[0, num_rows]``; a group that would end
            before it starts is empty. Where offsets run backwards the rows concerned are unspecified; no offset makes
            anything read or write out of bounds.
        weight_layout: ``"enk"`` or ``"ekn"``; never guessed from shapes.
        bias: [num_experts, out_features] in the dtype of ``input``, added before the activation.
        gather: ``(permuted_to_slot, slot_to_permuted, topk)`` of a routing plan, to read the rows where they lie: row m
            is ``input[permuted_to_slot[m] // topk]``, zeros where the map holds -1. Nothing permuted is kept for the
            backward.
        activation: ``"none"`` or one of ``moe_ext.activation_names.ACTIVATIONS``, applied to the product.
        gate_up_layout: how gate and up columns lie for a gated activation: ``"concatenated"`` or ``"interleaved"``.
        activation_alpha: the slope inside the sigmoid of ``"swiglu_clamped"``.
        activation_limit: the clamp of ``"swiglu_clamped"`` and ``"swiglu_limited"``, > 0.

    Returns:
        [num_rows, out_features] (half as wide under a gated activation) in the dtype of ``input``, accumulated in
        fp32. Rows of no expert are zero. Differentiable in ``input``, ``weight`` and ``bias``; without activation also
        twice.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, device or name; the message names it.
    """
    permuted_to_slot, slot_to_permuted, topk = gather or (None, None, 1)
    input, weight, bias = cast_for_product(input), cast_for_product(weight), cast_for_product(bias)
    arguments = (input, weight, bias)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
    output: Tensor = call(
        _ops.grouped_gemm,
        input,
        weight,
        expert_offsets,
        weight_layout,
        bias,
        permuted_to_slot,
        slot_to_permuted,
        topk,
        activation,
        gate_up_layout,
        activation_alpha,
        activation_limit,
        save and activation != "none",
    )[0]
    return output


def grouped_gemm_wgrad(
    input: Tensor,
    grad_output: Tensor,
    expert_offsets: Tensor,
    *,
    weight_layout: str,
    gather: Gather | None = None,
    out_dtype: torch.dtype | None = None,
    trainable_experts: Tensor | None = None,
) -> Tensor:
    """The gradient of :func:`grouped_gemm` (without activation) to its weight.

    Args:
        input: [num_rows, in_features], or [num_tokens, in_features] with ``gather``, as in :func:`grouped_gemm`.
        grad_output: [num_rows, out_features] in the dtype of ``input``.
        expert_offsets: [num_experts + 1] int32, as in :func:`grouped_gemm`.
        weight_layout: ``"enk"`` or ``"ekn"``, the layout of the result.
        gather: as in :func:`grouped_gemm`; it applies to ``input`` only.
        out_dtype: the dtype of ``input`` (None) or float32, for gradients that are accumulated further.
        trainable_experts: [num_experts] bool; an expert whose entry is False gets zeros and no product. None trains
            all.

    Returns:
        [num_experts, out_features, in_features] (``"enk"``) or [num_experts, in_features, out_features] (``"ekn"``),
        accumulated in fp32; zeros for an expert without rows. Differentiable in ``input`` and ``grad_output``.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, device or name; the message names it.
    """
    permuted_to_slot, slot_to_permuted, topk = gather or (None, None, 1)
    grad_weight: Tensor = call(
        _ops.grouped_gemm_wgrad,
        input, grad_output, expert_offsets, weight_layout, permuted_to_slot, slot_to_permuted, topk, out_dtype,
        trainable_experts,
    )  # fmt: skip
    return grad_weight


def grouped_bias_grad(grad_output: Tensor, expert_offsets: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of :func:`grouped_gemm` (without activation) to its bias: the sum of each expert's rows.

    Args:
        grad_output: [num_rows, out_features], float32, bfloat16 or float16 (float64 on the CPU).
        expert_offsets: [num_experts + 1] int32, as in :func:`grouped_gemm`.
        out_dtype: the dtype of ``grad_output`` (None) or float32.

    Returns:
        [num_experts, out_features], summed in fp32 in a fixed order; zeros for an expert without rows. Differentiable
        in ``grad_output``.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or device; the message names it.
    """
    grad_bias: Tensor = call(_ops.grouped_bias_grad, grad_output, expert_offsets, out_dtype)
    return grad_bias


@torch.library.register_fake("moe_ext::grouped_gemm")
def _grouped_gemm_fake(
    input: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    weight_layout: str,
    bias: Tensor | None,
    permuted_to_slot: Tensor | None,
    slot_to_permuted: Tensor | None,
    topk: int,
    activation: str,
    gate_up_layout: str,
    activation_alpha: float,
    activation_limit: float,
    save_pre_activation: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = input.shape[0] if permuted_to_slot is None else permuted_to_slot.shape[0]
    width = weight.shape[1] if weight_layout == "enk" else weight.shape[2]
    saved_rows = num_rows if save_pre_activation and activation != "none" else 0
    return input.new_empty(num_rows, activated_width(activation, width)), input.new_empty(saved_rows, width)


@torch.library.register_fake("moe_ext::grouped_gemm_wgrad")
def _grouped_gemm_wgrad_fake(
    input: Tensor,
    grad_output: Tensor,
    expert_offsets: Tensor,
    weight_layout: str,
    permuted_to_slot: Tensor | None,
    slot_to_permuted: Tensor | None,
    topk: int,
    out_dtype: torch.dtype | None,
    trainable_experts: Tensor | None,
) -> Tensor:
    out_features, in_features = grad_output.shape[1], input.shape[1]
    matrix = (out_features, in_features) if weight_layout == "enk" else (in_features, out_features)
    return input.new_empty(expert_offsets.shape[0] - 1, *matrix, dtype=out_dtype or input.dtype)


@torch.library.register_fake("moe_ext::grouped_bias_grad")
def _grouped_bias_grad_fake(grad_output: Tensor, expert_offsets: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return grad_output.new_empty(
        expert_offsets.shape[0] - 1, grad_output.shape[1], dtype=out_dtype or grad_output.dtype
    )


def _transposed(weight_layout: str) -> str:
    """The layout under which the same weights multiply gradients."""
    return "ekn" if weight_layout == "enk" else "enk"


def _multiply(
    rows: Tensor, weight: Tensor, expert_offsets: Tensor, weight_layout: str, maps: tuple[Any, ...] = (None, None, 1)
) -> Tensor:
    gather = None if maps[0] is None else maps
    return grouped_gemm(rows, weight, expert_offsets, weight_layout=weight_layout, gather=gather)


def _grouped_gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, expert_offsets, ctx.weight_layout, _, permuted_to_slot, slot_to_permuted, ctx.topk = inputs[:8]
    ctx.activation = inputs[8:12]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    pre_activation = output[1] if ctx.activation[0] != "none" else None
    if pre_activation is not None and pre_activation.shape[0] != output[0].shape[0]:
        raise RuntimeError("save_pre_activation: expected True, since a gradient through the activation is asked for")
    ctx.save_for_backward(
        input if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        expert_offsets,
        permuted_to_slot,
        slot_to_permuted,
        pre_activation,
    )


def _grouped_gemm_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 13
    if grad is None:
        return tuple(grads)
    input, weight, expert_offsets, permuted_to_slot, slot_to_permuted, pre_activation = ctx.saved_tensors
    if pre_activation is not None:
        grad = _ops.expert_activation_backward(grad, pre_activation, *ctx.activation)
    maps = (permuted_to_slot, slot_to_permuted, ctx.topk)
    if ctx.needs_input_grad[0]:
        rows = _multiply(grad, weight, expert_offsets, _transposed(ctx.weight_layout))
        grads[0] = rows if permuted_to_slot is None else unpermute(rows, *maps)
    if ctx.needs_input_grad[1]:
        grads[1] = call(_ops.grouped_gemm_wgrad, input, grad, expert_offsets, ctx.weight_layout, *maps, None, None)
    if ctx.needs_input_grad[4]:
        grads[4] = call(_ops.grouped_bias_grad, grad, expert_offsets, None)
    return tuple(grads)


def _grouped_gemm_wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, grad_output, expert_offsets, ctx.weight_layout, permuted_to_slot, slot_to_permuted, ctx.topk = inputs[:7]
    ctx.save_for_backward(
        input if ctx.needs_input_grad[1] else None,
        grad_output if ctx.needs_input_grad[0] else None,
        expert_offsets,
        permuted_to_slot,
        slot_to_permuted,
        inputs[8],
    )
    ctx.dtype = input.dtype


def _grouped_gemm_wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of a weight's gradient stands where the weight stands in the product.
    input, grad_output, expert_offsets, permuted_to_slot, slot_to_permuted, trainable_experts = ctx.saved_tensors
    maps = (permuted_to_slot, slot_to_permuted, ctx.topk)
    weight = grad.to(ctx.dtype)
    if trainable_experts is not None:
        weight = weight.masked_fill(~trainable_experts[:, None, None], 0)
    grad_input = grad_grad_output = None
    if ctx.needs_input_grad[0]:
        grad_input = _multiply(grad_output, weight, expert_offsets, _transposed(ctx.weight_layout))
        grad_input = grad_input if permuted_to_slot is None else unpermute(grad_input, *maps)
    if ctx.needs_input_grad[1]:
        grad_grad_output = _multiply(input, weight, expert_offsets, ctx.weight_layout, maps)
    return grad_input, grad_grad_output, *[None] * 7


def _grouped_bias_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, expert_offsets, _ = inputs
    ctx.save_for_backward(expert_offsets)
    ctx.num_rows, ctx.dtype = grad_output.shape[0], grad_output.dtype


def _grouped_bias_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (expert_offsets,) = ctx.saved_tensors
    boundaries = expert_offsets.clamp(0, ctx.num_rows).cummax(0).values
    rows = torch.arange(ctx.num_rows, dtype=torch.int32, device=grad.device)
    expert = torch.searchsorted(boundaries, rows, right=True) - 1
    held = (expert >= 0) & (expert < grad.shape[0])
    spread = grad.to(ctx.dtype)[torch.where(held, expert, 0)]
    return torch.where(held[:, None], spread, torch.zeros_like(spread)), None, None


register_autograd("moe_ext::grouped_gemm", _grouped_gemm_backward, setup_context=_grouped_gemm_setup)
register_autograd("moe_ext::grouped_gemm_wgrad", _grouped_gemm_wgrad_backward, setup_context=_grouped_gemm_wgrad_setup)
register_autograd("moe_ext::grouped_bias_grad", _grouped_bias_grad_backward, setup_context=_grouped_bias_grad_setup)
