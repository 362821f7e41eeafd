"""Low-rank experts over a frozen base that they share: LoRA adapters (arXiv 2106.09685) of a linear map or an MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.activation_names import GATED_ACTIVATIONS
from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.nn.layer import MoE
from moe_ext.nn.router import TopKRouter
from moe_ext.plan_types import RoutingPlan


class LoRAExperts(BackendModule):
    """``num_experts`` LoRA adapters of one linear map: ``E_e(x) = alpha / rank * B_e A_e x``, without the map itself.

    Args:
        num_experts, in_features, out_features, rank: sizes.
        alpha: LoRA's scale; None for ``rank``, a scale of 1.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    The parameters are ``lora_a`` [num_experts, rank, in_features] and ``lora_b`` [num_experts, rank, out_features]:
    the matrices B, transposed. As in LoRA the experts start at zero.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.rank, self.scaling = rank, 1.0 if alpha is None else alpha / rank
        self.lora_a = nn.Parameter(torch.empty(num_experts, rank, in_features))
        self.lora_b = nn.Parameter(torch.empty(num_experts, rank, out_features))
        self.reset_parameters()

    @classmethod
    def from_deltas(cls, deltas: Tensor, rank: int, *, backend: Backend = "kernels") -> LoRAExperts:
        """The best adapters of a rank for given differences of a weight, by singular value decomposition.

        Args:
            deltas: [num_experts, out_features, in_features], experts minus base.
            rank: of the adapters; ``min(out_features, in_features)`` loses nothing.
            backend: ``kernels``, or ``reference`` for the ops in plain torch.
        """
        num_experts, out_features, in_features = deltas.shape
        precision = torch.promote_types(deltas.dtype, torch.float32)
        left, values, right = torch.linalg.svd(deltas.detach().to(precision), full_matrices=False)
        root = values[:, :rank, None].sqrt()
        made = cls(num_experts, in_features, out_features, rank, backend=backend).to(deltas.device, deltas.dtype)
        with torch.no_grad():
            made.lora_a.copy_(right[:, :rank] * root)
            made.lora_b.copy_(left[:, :, :rank].mT * root)
        return made

    def reset_parameters(self) -> None:
        """A as torch.nn.Linear would, B zero."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        """hidden [num_tokens, in_features] -> [num_tokens, out_features], experts summed with the weights.

        Two grouped products; the rows of ``hidden`` are read where they lie. On the CPU, for few ranks,
        :func:`moe_ext.low_rank_experts`, which stores no row per slot.
        """
        if hidden.device.type == "cpu" and self._has_few_ranks(hidden.element_size()):
            return self._token_by_token(hidden, plan, topk_weights)
        maps = (plan.permuted_to_slot, plan.slot_to_permuted, plan.topk_of(hidden.shape[0], topk_weights))
        low = self.ops.grouped_gemm(hidden, self.lora_a, plan.expert_offsets, weight_layout="enk", gather=maps)
        rows = self.ops.grouped_gemm(low * self.scaling, self.lora_b, plan.expert_offsets, weight_layout="ekn")
        output: Tensor = self.ops.unpermute(rows, *maps, topk_weights)
        return output

    def _has_few_ranks(self, element_size: int) -> bool:
        """Measured: beyond that the grouped products, whose units for 16-bit types are twice as fast, win."""
        return self.rank <= 4 * element_size and self.num_experts * self.rank <= 128

    def _token_by_token(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None) -> Tensor:
        ids = plan.topk_ids(hidden.shape[0], topk_weights)
        if topk_weights is None:
            precision = torch.promote_types(hidden.dtype, torch.float32)
            topk_weights = torch.ones(ids.shape, dtype=precision, device=hidden.device)
        output: Tensor = self.ops.low_rank_experts(hidden, self.lora_a, self.lora_b, ids, topk_weights * self.scaling)
        return output

    def soft(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """All experts for every token: two dense products whose inner width is ``num_experts * rank``.

        Args:
            hidden: [num_tokens, in_features].
            weights: [num_tokens, num_experts], any.

        Returns:
            [num_tokens, out_features] in the dtype of ``hidden``.
        """
        low = F.linear(hidden, self.lora_a.flatten(0, 1)).view(hidden.shape[0], self.num_experts, self.rank)
        gated = low * (weights * self.scaling).to(low.dtype)[..., None]
        return gated.flatten(1) @ self.lora_b.flatten(0, 1).to(low.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scaling={self.scaling}"
        )


class RankOneExperts(BackendModule):
    """One LoRA adapter of a linear map, of which every token uses some ranks only: ``B diag(g) A x``, g sparse.

    Args:
        num_experts: rank of the adapter; a rank is an expert.
        in_features, out_features: sizes.
        alpha: LoRA's scale; None for a scale of 1, else ``alpha / num_experts``.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    The parameters are ``lora_a`` [num_experts, in_features] and ``lora_b`` [num_experts, out_features]: B transposed.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        alpha: float | None = None,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.scaling = 1.0 if alpha is None else alpha / num_experts
        self.lora_a = nn.Parameter(torch.empty(num_experts, in_features))
        self.lora_b = nn.Parameter(torch.empty(num_experts, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as torch.nn.Linear would, B zero."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden [num_tokens, in_features], ids and weights [num_tokens, topk] -> [num_tokens, out_features].

        Only the chosen rows of A and B are read; :func:`moe_ext.low_rank_experts`.
        """
        output: Tensor = self.ops.low_rank_experts(
            hidden, self.lora_a[:, None], self.lora_b[:, None], topk_ids, topk_weights * self.scaling
        )
        return output

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class LoRALinear(MoE):
    """A frozen linear map with a router and LoRA experts of its own: ``W x + sum_j g_j E_j(x)``.

    Args:
        base: stays as it is, without gradient.
        experts: :class:`LoRAExperts` of its sizes.
        topk: experts per token.
        logits: as in :class:`moe_ext.nn.TopKRouter`.
        gating: further keyword arguments of :func:`moe_ext.topk_gating`.
        options: as in :class:`moe_ext.nn.MoE`.

    hidden [..., in_features] -> MoEOutput of [..., out_features].
    """

    def __init__(
        self,
        base: nn.Linear,
        experts: LoRAExperts,
        topk: int,
        *,
        logits: nn.Module | None = None,
        gating: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        experts.backend = backend = options.get("backend", "kernels")
        router = TopKRouter(
            base.in_features, experts.num_experts, topk, logits=logits, backend=backend, **(gating or {})
        )
        like = base.weight
        super().__init__(
            router.to(like.device, like.dtype), experts.to(like.device, like.dtype), shared=base.requires_grad_(False),
            **options,
        )  # fmt: skip


class LoRAMLPExperts(BackendModule):
    """``num_experts`` MLPs that share one frozen MLP and differ by LoRA adapters of its projections.

    ``E_e(x) = (Wd + s Bd_e Ad_e) act((Wg + s Bg_e Ag_e) x, (Wu + s Bu_e Au_e) x)`` with ``s = alpha / rank``. What the
    experts share runs once per token and not once per slot: ``Wg x`` and ``Wu x`` before the adapters are added, and
    ``Wd`` after the sum over a token's slots, since it is linear.

    Args:
        gate_up_weight: [2 * intermediate_size, hidden_size], gate rows first; [intermediate_size, hidden_size] without
            a gate. Kept as a parameter that takes no gradient, like ``down_weight``.
        down_weight: [hidden_size, intermediate_size].
        num_experts, rank: sizes.
        alpha: LoRA's scale; None for ``rank``, a scale of 1.
        activation: a name of :func:`moe_ext.expert_activation`.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    The adapters are ``gate`` (None for an activation without gate), ``up`` and ``down``: :class:`LoRAExperts`.

    Raises:
        ValueError: the weights' shapes do not fit the activation or each other.
    """

    def __init__(
        self,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        num_experts: int,
        rank: int,
        *,
        alpha: float | None = None,
        activation: str = "swiglu",
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        hidden_size, width = down_weight.shape
        gated = activation in GATED_ACTIVATIONS
        if gate_up_weight.shape != (width * (2 if gated else 1), hidden_size):
            raise ValueError(
                f"gate_up_weight: expected {[width * (2 if gated else 1), hidden_size]} for {activation} and a "
                f"down_weight of {list(down_weight.shape)}, got {list(gate_up_weight.shape)}"
            )
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, width
        self.activation = activation
        self.gate_up_weight = nn.Parameter(gate_up_weight.detach(), requires_grad=False)
        self.down_weight = nn.Parameter(down_weight.detach(), requires_grad=False)

        def adapters(inputs: int, outputs: int) -> LoRAExperts:
            made = LoRAExperts(num_experts, inputs, outputs, rank, alpha=alpha, backend=backend)
            return made.to(gate_up_weight.device, gate_up_weight.dtype)

        self.gate = adapters(hidden_size, width) if gated else None
        self.up, self.down = adapters(hidden_size, width), adapters(width, hidden_size)

    def forward(self, hidden: Tensor, plan: RoutingPlan, topk_weights: Tensor | None = None) -> Tensor:
        """hidden [num_tokens, hidden_size] -> the same shape, experts (base included) summed with the weights."""
        ops, offsets = self.ops, plan.expert_offsets
        maps = (plan.permuted_to_slot, plan.slot_to_permuted, plan.topk_of(hidden.shape[0], topk_weights))
        low = ops.grouped_gemm(hidden, self._up_lora_a(), offsets, weight_layout="enk", gather=maps)
        delta = ops.grouped_gemm(low * self.up.scaling, self._up_lora_b(), offsets, weight_layout="ekn")
        base = F.linear(hidden, self.gate_up_weight)
        activated = ops.expert_activation(ops.permute(base, *maps) + delta, self.activation)
        low = ops.grouped_gemm(activated, self.down.lora_a, offsets, weight_layout="enk")
        rows = ops.grouped_gemm(low * self.down.scaling, self.down.lora_b, offsets, weight_layout="ekn")
        shared = F.linear(ops.unpermute(activated, *maps, topk_weights), self.down_weight)
        output: Tensor = shared + ops.unpermute(rows, *maps, topk_weights)
        return output

    def _up_lora_a(self) -> Tensor:
        """[num_experts, 2 * rank, hidden_size]: both adapters read the rows in one product."""
        return self.up.lora_a if self.gate is None else torch.cat([self.gate.lora_a, self.up.lora_a], dim=1)

    def _up_lora_b(self) -> Tensor:
        """[num_experts, 2 * rank, 2 * intermediate_size], block-diagonal: a product so narrow costs its output."""
        if self.gate is None:
            return self.up.lora_b
        width = self.intermediate_size
        gate, up = F.pad(self.gate.lora_b, (0, width)), F.pad(self.up.lora_b, (width, 0))
        return torch.cat([gate, up], dim=1)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {self.activation}"
        )
