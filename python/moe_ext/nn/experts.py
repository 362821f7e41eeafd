"""Kinds of experts. All are called with rows, a plan and the weights, and return the weighted sum for every token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.activation_names import ACTIVATIONS, GATED_ACTIVATIONS
from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.plan_types import RoutingPlan


class Experts(BackendModule):
    """``num_experts`` MLPs of one shape, as two weight tensors.

    Args:
        num_experts, hidden_size, intermediate_size: sizes.
        activation, gate_up_layout, weight_layout: as in :func:`moe_ext.moe_mlp`.
        bias: give every expert biases.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    The parameters are ``gate_up_weight`` and ``down_weight`` in the shapes that :func:`moe_ext.moe_mlp` documents, and
    ``gate_up_bias`` [num_experts, gate and up columns] and ``down_bias`` [num_experts, hidden_size] or None.

    Raises:
        ValueError: an activation or a layout of that name does not exist.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        gate_up_layout: str = "concatenated",
        weight_layout: str = "enk",
        bias: bool = False,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if weight_layout not in ("enk", "ekn"):
            raise ValueError(f"weight_layout: expected enk or ekn, got {weight_layout!r}")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.gate_up_layout, self.weight_layout = activation, gate_up_layout, weight_layout
        up_columns = intermediate_size * (2 if activation in GATED_ACTIVATIONS else 1)
        self.gate_up_weight = nn.Parameter(torch.empty(self._shape(up_columns, hidden_size)))
        self.down_weight = nn.Parameter(torch.empty(self._shape(hidden_size, intermediate_size)))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, up_columns)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None
        self.register_buffer("trainable_experts", None, persistent=False)
        self.reset_parameters()

    def freeze_experts(self, ids: Sequence[int]) -> None:
        """From now on experts ``ids`` get gradient zero, for which no product is spent; () trains all again.

        Zero is still a gradient: an optimizer with weight decay or momentum moves them. Experts that must stay bitwise
        as they are belong into a group of their own (:class:`ExpertGroups`) without ``requires_grad``.
        """
        if wrong := [e for e in ids if not 0 <= e < self.num_experts]:
            raise ValueError(f"ids: expected ids of {self.num_experts} experts, got {wrong[0]}")
        trained = torch.tensor([e not in ids for e in range(self.num_experts)], device=self.down_weight.device)
        self.trainable_experts = trained if ids else None

    def _shape(self, outputs: int, inputs: int) -> tuple[int, int, int]:
        return (
            (self.num_experts, outputs, inputs) if self.weight_layout == "enk" else (self.num_experts, inputs, outputs)
        )

    def reset_parameters(self) -> None:
        """Every expert starts as torch.nn.Linear would."""
        _reset_linear(self.gate_up_weight, self.gate_up_bias, self.hidden_size)
        _reset_linear(self.down_weight, self.down_bias, self.intermediate_size)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        """hidden [num_tokens, hidden_size] -> [num_tokens, hidden_size], experts summed with the weights.

        Weights of another dtype than the ops take (FSDP2's mixed precision casts every floating input of a module that
        it wraps, unless ``cast_forward_inputs=False``) are cast back; what that rounding took is lost.
        """
        if topk_weights is not None:
            topk_weights = topk_weights.to(torch.promote_types(hidden.dtype, torch.float32))
        output: Tensor = self.ops.moe_mlp(
            hidden,
            self.gate_up_weight,
            self.down_weight,
            plan,
            topk_weights,
            weight_layout=self.weight_layout,
            activation=self.activation,
            gate_up_layout=self.gate_up_layout,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            trainable_experts=self.trainable_experts,
        )
        return output

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {self.activation}"
        )


class LinearExperts(BackendModule):
    """``num_experts`` linear maps: ``weight`` [num_experts, out_features, in_features], ``bias`` or None.

    Args:
        num_experts, in_features, out_features: sizes.
        bias: give every expert a bias; it is weighted like the rest of the output.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, *, bias: bool = False, backend: Backend = "kernels"
    ) -> None:
        super().__init__(backend)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert starts as torch.nn.Linear would."""
        _reset_linear(self.weight, self.bias, self.in_features)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        """hidden [num_tokens, in_features] -> [num_tokens, out_features], experts summed with the weights."""
        maps = (plan.permuted_to_slot, plan.slot_to_permuted, plan.topk_of(hidden.shape[0], topk_weights))
        rows = self.ops.grouped_gemm(
            hidden, self.weight, plan.expert_offsets, weight_layout="enk", bias=self.bias, gather=maps
        )
        output: Tensor = self.ops.unpermute(rows, *maps, topk_weights)
        return output

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class ZeroComputationExperts(nn.Module):
    """Experts that multiply no rows: constant, copy and zero ones, in this order of ids (MoE++, arXiv 2410.07348).

    A zero expert gives 0, a copy expert x, constant expert k gives ``a1 x + a2 v_k`` with ``[a1, a2] =
    softmax(W_k x)``. All of them together are elementwise work over the tokens and one product with
    ``2 * num_constant`` columns; nothing is gathered.

    Args:
        hidden_size: of the rows.
        num_constant, num_copy, num_zero: how many of each kind, together at least one.
    """

    def __init__(self, hidden_size: int, *, num_constant: int = 2, num_copy: int = 1, num_zero: int = 1) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_constant, self.num_copy, self.num_zero = num_constant, num_copy, num_zero
        self.num_experts = num_constant + num_copy + num_zero
        self.mixing_weight = nn.Parameter(torch.empty(num_constant, 2, hidden_size))
        self.constants = nn.Parameter(torch.empty(num_constant, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset_linear(self.mixing_weight, None, self.hidden_size)
        nn.init.normal_(self.constants)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor) -> Tensor:
        """hidden [num_tokens, hidden_size] -> the same shape; of the plan only which slots it holds is used."""
        expert = plan.topk_ids(hidden.shape[0], topk_weights)
        copies = (expert >= self.num_constant) & (expert < self.num_constant + self.num_copy)
        scale = torch.where(copies, topk_weights, 0.0).sum(-1)
        # [num_tokens, num_constant]: the weight of each constant expert.
        ids = torch.arange(self.num_constant, device=hidden.device)
        weights = torch.where(expert[..., None] == ids, topk_weights[..., None], 0.0).sum(1)
        mixing = F.linear(hidden, self.mixing_weight.flatten(0, 1)).view(hidden.shape[0], self.num_constant, 2)
        of_copy, of_constant = torch.softmax(mixing, dim=-1, dtype=scale.dtype).unbind(-1)
        scale = scale + (weights * of_copy).sum(-1)
        kept = hidden * scale.to(hidden.dtype)[:, None]
        return torch.addmm(kept, (weights * of_constant).to(hidden.dtype), self.constants.to(hidden.dtype))

    def extra_repr(self) -> str:
        return f"num_constant={self.num_constant}, num_copy={self.num_copy}, num_zero={self.num_zero}"


class ModuleExperts(BackendModule):
    """Any modules as experts: convolutions, attention, heads of different insides.

    The experts are Python, and so is the loop over them: every expert is called once, with its contiguous rows, an
    expert without rows too. The row counts are copied to the host, which waits for the device; the other kinds of
    experts do neither.

    Args:
        experts: from ``[num_rows, *row_shape]`` to ``[num_rows, ...]``, the same for all.
        row_shape: the shape in which an expert sees a row of ``hidden``; () for [num_rows, hidden_size].
        backend: ``kernels``, or ``reference`` for the ops in plain torch.
    """

    def __init__(
        self, experts: Iterable[nn.Module], *, row_shape: Sequence[int] = (), backend: Backend = "kernels"
    ) -> None:
        super().__init__(backend)
        self.experts = nn.ModuleList(experts)
        self.num_experts, self.row_shape = len(self.experts), tuple(row_shape) or (-1,)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        """hidden [num_tokens, hidden_size] -> [num_tokens, outputs of an expert, flattened]."""
        maps = (plan.permuted_to_slot, plan.slot_to_permuted, plan.topk_of(hidden.shape[0], topk_weights))
        rows = self.ops.permute(hidden, *maps)
        counts = plan.expert_offsets.diff().tolist()
        slices = rows[: sum(counts)].split(counts)
        row_shape = (hidden.shape[1],) if self.row_shape == (-1,) else self.row_shape
        outputs = [e(part.view(-1, *row_shape)).flatten(1) for e, part in zip(self.experts, slices, strict=True)]
        tail = outputs[0].new_zeros(rows.shape[0] - sum(counts), outputs[0].shape[1])
        output: Tensor = self.ops.unpermute(torch.cat([*outputs, tail]), *maps, topk_weights)
        return output


class ProjectedExperts(nn.Module):
    """Experts of another width than the layer: ``ascend(experts(descend(hidden)))``, the sum before the projection.

    Both projections are shared by all experts and run once per token; rows are gathered, sent and summed in the width
    of the experts. By linearity the sum before ``ascend`` equals ``ascend`` after every expert.

    Args:
        descend: from [num_tokens, hidden_size] to the width of the experts.
        experts: any kind of experts.
        ascend: back to hidden_size; linear and without bias, so that the equality holds.
    """

    def __init__(self, descend: nn.Module, experts: nn.Module, ascend: nn.Module) -> None:
        super().__init__()
        self.descend, self.experts, self.ascend = descend, experts, ascend
        self.num_experts = count_experts(experts)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        output: Tensor = self.ascend(self.experts(self.descend(hidden), plan, topk_weights))
        return output


class ExpertGroups(nn.ModuleList):
    """Several kinds of experts behind one router, each with a consecutive range of ids, in the order given.

    To a group the ids of the others are "not here": they take none of its rows. Groups may differ in kind, in width and
    in whether they are trained.

    Args:
        groups: modules with ``num_experts`` that are called with rows, plan and weights.
        capacity_shares: how capacity is divided: an expert of group g may take ``shares[g] / mean share`` times what
            an expert of a uniform layer may (tau : 1 in MoE++); None for equal shares.
    """

    def __init__(self, groups: Iterable[nn.Module], *, capacity_shares: Sequence[float] | None = None) -> None:
        super().__init__(groups)
        self.capacity_shares = [1.0] * len(self) if capacity_shares is None else list(capacity_shares)
        if len(self.capacity_shares) != len(self):
            raise ValueError(f"capacity_shares: expected {len(self)} numbers, got {len(self.capacity_shares)}")

    @property
    def num_experts(self) -> int:
        return sum(map(count_experts, self))


def count_experts(experts: nn.Module) -> int:
    """How many experts a module holds, of whatever kind."""
    found = getattr(experts, "num_experts", None)
    if not isinstance(found, int):
        raise TypeError(f"experts: expected a module with an integer num_experts, got {type(experts).__name__}")
    return found


def _reset_linear(weight: Tensor, bias: Tensor | None, inputs: int) -> None:
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)
