"""A whole mixture-of-experts layer: router, routed experts, shared expert, losses, statistics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import _register_namedtuple

from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.nn.experts import Experts
from moe_ext.nn.router import TopKRouter


class MoEOutput(NamedTuple):
    """What :class:`MoELayer` returns."""

    hidden: Tensor
    """The shape and dtype of the input."""
    balance_loss: Tensor
    """Scalar, see :func:`moe_ext.router_losses`; multiply with a coefficient and add it to the loss."""
    z_loss: Tensor
    """Scalar, see :func:`moe_ext.router_losses`."""


# torch.export writes the type of a module's result down by this name.
_register_namedtuple(MoEOutput, serialized_type_name="moe_ext.nn.MoEOutput")


class LayerStatistics(NamedTuple):
    """The last call of a :class:`MoELayer`, on its device, without gradient."""

    tokens_per_expert: Tensor
    """[num_experts] int32: what the router asked for."""
    dropped_slots: Tensor
    """Scalar int64: slots that no expert took, because of capacity."""
    topk_ids: Tensor
    """[num_tokens, topk] int32."""


class SharedExpert(nn.Module):
    """A SwiGLU MLP that sees every token (DeepSeekMoE), with a sigmoid gate of its own if asked (Qwen2-MoE)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, gated: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, 1, bias=False) if gated else None

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        output: Tensor = self.down(F.silu(gate) * up)
        return output if self.gate is None else output * torch.sigmoid(self.gate(hidden))


class MoELayer(BackendModule):
    """Router, routed experts and, if asked, a shared expert.

    Args:
        hidden_size, intermediate_size, num_experts, topk: sizes.
        shared_intermediate_size: width of the shared expert, 0 for none; several shared experts are one wide one.
        shared_gate: scale the shared expert with a sigmoid gate.
        capacity_factor: an expert takes at most ``ceil(capacity_factor * num_tokens * topk / num_experts)`` rows, those
            with the highest weights first; None for dropless.
        router: keyword arguments of :class:`TopKRouter`.
        experts: keyword arguments of :class:`Experts`.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    ``statistics`` holds a :class:`LayerStatistics` of the last call, None before the first.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        *,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        capacity_factor: float | None = None,
        router: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        self.capacity_factor = capacity_factor
        self.router = TopKRouter(hidden_size, num_experts, topk, backend=backend, **(router or {}))
        self.experts = Experts(num_experts, hidden_size, intermediate_size, backend=backend, **(experts or {}))
        self.shared = (
            SharedExpert(hidden_size, shared_intermediate_size, gated=shared_gate) if shared_intermediate_size else None
        )
        self.statistics: LayerStatistics | None = None

    def capacity(self, num_tokens: int) -> int | None:
        """Rows an expert takes at most, None for no limit."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * num_tokens * self.router.topk / self.experts.num_experts)

    def forward(self, hidden: Tensor) -> MoEOutput:
        """hidden [..., hidden_size] with any leading dimensions -> :class:`MoEOutput`."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        topk_weights, topk_ids, logits = self.router(rows)
        balance_loss, z_loss, tokens_per_expert = self.ops.router_losses(
            logits, topk_ids, score_function=self.router.score_function
        )
        capacity = self.capacity(rows.shape[0])
        plan = self.ops.routing_plan(
            topk_ids,
            self.experts.num_experts,
            capacity=capacity,
            drop_scores=None if capacity is None else topk_weights.detach(),
        )
        output = self.experts(rows, plan, topk_weights)
        if self.shared is not None:
            output = output + self.shared(rows)
        dropped = (plan.slot_to_permuted < 0).sum()
        self.statistics = LayerStatistics(tokens_per_expert, dropped, topk_ids)
        return MoEOutput(output.view(hidden.shape), balance_loss, z_loss)
