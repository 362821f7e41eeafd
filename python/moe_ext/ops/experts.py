"""Activations, and the whole expert MLP as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext import _library  # noqa: F401  (the schemas must be loaded first)
from moe_ext.activation_names import activated_width
from moe_ext.ops.autocast import cast_for_product
from moe_ext.ops.autograd import call, register_autograd
from moe_ext.plan_types import RoutingPlan

_ops = torch.ops.moe_ext

NOT_DIFFERENTIABLE = ("moe_ext::expert_activation_backward", "moe_ext::moe_mlp_backward")


def expert_activation(
    pre_activation: Tensor,
    activation: str = "swiglu",
    *,
    gate_up_layout: str = "concatenated",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
) -> Tensor:
    """Apply an expert's activation to every row, computing 16-bit data in fp32.

    Args:
        pre_activation: [num_rows, width], float32, bfloat16 or float16 (float64 on the CPU); of even width for a gated
            activation.
        activation: plain, output as wide as the input: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``quick_gelu``
            (x sigmoid(1.702 x), CLIP), ``relu``, ``relu_squared`` (Primer). Gated, output half as wide: ``swiglu``
            (silu(gate) up), ``geglu`` (gelu(gate) up), ``geglu_tanh``, ``reglu`` (relu(gate) up), all from "GLU
            variants improve transformer" (arXiv 2002.05202); and with gate clamped to <= limit and up to
            [-limit, limit], ``swiglu_clamped`` (gpt-oss: gate sigmoid(alpha gate) (up + 1)) and ``swiglu_limited``
            (DeepSeek-V4: silu(gate) up).
        gate_up_layout: ``"concatenated"`` for rows [gate | up], ``"interleaved"`` for gate0, up0, gate1, up1, ...
        activation_alpha: alpha of ``swiglu_clamped``.
        activation_limit: limit of ``swiglu_clamped`` and ``swiglu_limited``, > 0.

    Returns:
        [num_rows, width] or [num_rows, width / 2] in the dtype of ``pre_activation``. Differentiable once.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size or name; the message names it.
    """
    activated: Tensor = call(
        _ops.expert_activation, pre_activation, activation, gate_up_layout, activation_alpha, activation_limit
    )
    return activated


def moe_mlp(
    input: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    plan: RoutingPlan,
    topk_weights: Tensor | None = None,
    *,
    weight_layout: str,
    activation: str = "swiglu",
    gate_up_layout: str = "concatenated",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
    trainable_experts: Tensor | None = None,
) -> Tensor:
    """Run every token through its experts: gather, up projection, activation, down projection, weighted sum.

    Under ``torch.autocast`` everything but ``topk_weights`` is cast to autocast's dtype, and so is the result.

    For the backward only ``input`` and the pre-activation [num_rows, gate and up columns] are kept: the gradient of a
    router weight is taken as ``<dO W2, activation>``, so that neither expert outputs nor gathered copies of rows are
    stored (SonicMoE).

    Args:
        input: [num_tokens, hidden_size], float32, bfloat16 or float16 (float64 on the CPU).
        gate_up_weight: layout ``"enk"``: [num_experts, 2 * intermediate_size, hidden_size] (torch.nn.Linear's
            convention); ``"ekn"``: [num_experts, hidden_size, 2 * intermediate_size] (gpt-oss's). Without a gate
            ``intermediate_size`` stands in the place of ``2 * intermediate_size``.
        down_weight: ``"enk"``: [num_experts, hidden_size, intermediate_size]; ``"ekn"``: [num_experts,
            intermediate_size, hidden_size].
        plan: from :func:`moe_ext.routing_plan`, for the experts of these weights.
        topk_weights: [num_tokens, topk] float32 (float64 for float64 input); None for a plain sum.
        weight_layout: ``"enk"`` or ``"ekn"``, of both weights; never guessed from shapes.
        activation: a name of :func:`expert_activation`.
        gate_up_layout: how gate and up columns lie for a gated activation, as in :func:`expert_activation`.
        gate_up_bias: [num_experts, columns of the up projection] in the dtype of ``input``.
        down_bias: [num_experts, hidden_size] in the dtype of ``input``; it is weighted like the rest of the output.
        activation_alpha: alpha of ``swiglu_clamped``.
        activation_limit: limit of ``swiglu_clamped`` and ``swiglu_limited``, > 0.
        trainable_experts: [num_experts] bool; weights and biases of an expert whose entry is False get gradient zero,
            and no product is spent on it (the frozen experts of MoExtend). None trains all.

    Returns:
        [num_tokens, hidden_size] in the dtype of ``input``; the sum over a token's slots is taken in fp32 and rounded
        once. A token whose slots were all dropped gets zeros. Differentiable once in every floating argument; a dropped
        slot's weight gets gradient zero. Arguments that need no gradient, frozen weights say, cost the backward no
        product and no memory.

    Raises:
        RuntimeError: an argument has the wrong dtype, number of axes, size, device or name, or the plan is that of
            another number of tokens or topk; the message names it.
        TypeError: ``plan`` is no :class:`RoutingPlan`.
    """
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan: expected a RoutingPlan, as moe_ext.routing_plan returns, got {type(plan).__name__}")
    input, gate_up_weight = cast_for_product(input), cast_for_product(gate_up_weight)
    down_weight = cast_for_product(down_weight)
    gate_up_bias, down_bias = cast_for_product(gate_up_bias), cast_for_product(down_bias)
    arguments = (input, gate_up_weight, down_weight, topk_weights, gate_up_bias, down_bias)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
    output: Tensor = call(
        _ops.moe_mlp,
        input,
        gate_up_weight,
        down_weight,
        plan.expert_offsets,
        plan.permuted_to_slot,
        plan.slot_to_permuted,
        topk_weights,
        gate_up_bias,
        down_bias,
        plan.topk_of(input.shape[0], topk_weights),
        weight_layout,
        activation,
        gate_up_layout,
        activation_alpha,
        activation_limit,
        save,
        trainable_experts,
    )[0]
    return output


@torch.library.register_fake("moe_ext::expert_activation")
def _expert_activation_fake(
    pre_activation: Tensor, activation: str, gate_up_layout: str, activation_alpha: float, activation_limit: float
) -> Tensor:
    return pre_activation.new_empty(pre_activation.shape[0], activated_width(activation, pre_activation.shape[1]))


@torch.library.register_fake("moe_ext::expert_activation_backward")
def _expert_activation_backward_fake(
    grad_output: Tensor,
    pre_activation: Tensor,
    activation: str,
    gate_up_layout: str,
    activation_alpha: float,
    activation_limit: float,
) -> Tensor:
    return torch.empty_like(pre_activation, memory_format=torch.contiguous_format)


@torch.library.register_fake("moe_ext::moe_mlp")
def _moe_mlp_fake(
    input: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    expert_offsets: Tensor,
    permuted_to_slot: Tensor,
    slot_to_permuted: Tensor,
    topk_weights: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk: int,
    weight_layout: str,
    activation: str,
    gate_up_layout: str,
    activation_alpha: float,
    activation_limit: float,
    save_pre_activation: bool,
    trainable_experts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    width = gate_up_weight.shape[1] if weight_layout == "enk" else gate_up_weight.shape[2]
    saved_rows = permuted_to_slot.shape[0] if save_pre_activation else 0
    return torch.empty_like(input, memory_format=torch.contiguous_format), input.new_empty(saved_rows, width)


@torch.library.register_fake("moe_ext::moe_mlp_backward")
def _moe_mlp_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    expert_offsets: Tensor,
    permuted_to_slot: Tensor,
    slot_to_permuted: Tensor,
    topk_weights: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre_activation: Tensor,
    topk: int,
    weight_layout: str,
    activation: str,
    gate_up_layout: str,
    activation_alpha: float,
    activation_limit: float,
    output_mask: list[bool],
    trainable_experts: Tensor | None,
) -> tuple[Tensor, ...]:
    router_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    arguments = (input, gate_up_weight, down_weight, topk_weights, gate_up_bias, down_bias)
    matrices = [x.shape[1:] for x in (input, gate_up_weight, down_weight)]
    widths = (*matrices, (topk,), pre_activation.shape[1:], input.shape[1:])
    return tuple(
        input.new_empty(
            argument.shape[0] if argument is not None and wanted else 0, *width,
            dtype=router_dtype if place == 3 else input.dtype,
        )
        for place, (argument, width, wanted) in enumerate(zip(arguments, widths, output_mask, strict=True))
    )  # fmt: skip


def _expert_activation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pre_activation, *ctx.activation = inputs
    ctx.save_for_backward(pre_activation)


def _expert_activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (pre_activation,) = ctx.saved_tensors
    return _ops.expert_activation_backward(grad, pre_activation, *ctx.activation), None, None, None, None


# Places of the floating arguments of moe_mlp, in the order of moe_mlp_backward's results.
_FLOATING_ARGUMENTS = (0, 1, 2, 6, 7, 8)
_BIASES = (7, 8)


def _moe_mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, settings, (save_pre_activation, trainable_experts) = inputs[:9], inputs[9:15], inputs[15:]
    if not save_pre_activation:
        raise RuntimeError("save_pre_activation: expected True, since a gradient is asked for")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1], trainable_experts)
    ctx.settings = settings


def _moe_mlp_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 17
    if grad is not None:
        wanted = [ctx.needs_input_grad[place] for place in _FLOATING_ARGUMENTS]
        *tensors, trainable_experts = ctx.saved_tensors
        results = _ops.moe_mlp_backward(grad, *tensors, *ctx.settings, wanted, trainable_experts)
        for place, result, asked_for in zip(_FLOATING_ARGUMENTS, results, wanted, strict=True):
            grads[place] = result if asked_for else None
        for place in _BIASES if trainable_experts is not None else ():
            bias = grads[place]
            grads[place] = None if bias is None else bias.masked_fill(~trainable_experts[:, None], 0)
    return tuple(grads)


register_autograd("moe_ext::expert_activation", _expert_activation_backward, setup_context=_expert_activation_setup)
register_autograd("moe_ext::moe_mlp", _moe_mlp_backward, setup_context=_moe_mlp_setup)
