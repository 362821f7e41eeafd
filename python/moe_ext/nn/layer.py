"""A whole mixture-of-experts layer: router, groups of experts, shared expert, losses, statistics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import _register_namedtuple

from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.nn.experts import ExpertGroups, Experts, count_experts
from moe_ext.nn.knobs import Knobs
from moe_ext.nn.router import Router, Routing, TopKRouter
from moe_ext.ops.gating import router_losses


class MoEOutput(NamedTuple):
    """What :class:`MoE` returns."""

    hidden: Tensor
    """The shape and dtype of the input."""
    balance_loss: Tensor
    """Scalar, see :func:`moe_ext.router_losses`; multiply with a coefficient and add it to the loss."""
    z_loss: Tensor
    """Scalar, see :func:`moe_ext.router_losses`."""
    topk_weights: Tensor
    """[num_tokens, topk], as all that follows from the router: with gradients, for losses of one's own."""
    topk_ids: Tensor
    """[num_tokens, topk] int32."""
    logits: Tensor
    """[num_tokens, num_experts]."""

    @property
    def routing(self) -> Routing:
        """What the router said."""
        return Routing(self.topk_weights, self.topk_ids, self.logits)


# torch.export writes the type of a module's result down by this name.
_register_namedtuple(MoEOutput, serialized_type_name="moe_ext.nn.MoEOutput")


class LayerStatistics(NamedTuple):
    """The last call of a :class:`MoE`, on its device, without gradient."""

    tokens_per_expert: Tensor
    """[num_experts] int32: what the router asked for."""
    dropped_slots: Tensor
    """Scalar int64: slots that no expert took, because of capacity or because the router left them empty."""
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


class MoE(BackendModule):
    """A layer of any parts.

    Args:
        router: a :class:`TopKRouter`, an :class:`ExpertChoiceRouter`, or a subclass of :class:`Router`.
        experts: :class:`Experts` or another kind, or :class:`ExpertGroups` of several kinds; as many in all as the
            router knows.
        shared: any module that sees every row; its output is added.
        capacity_factor: gamma. An expert takes at most ``ceil(gamma * num_tokens * topk / num_experts)`` rows, those
            with the highest weights first; with ``capacity_shares`` s of :class:`ExpertGroups`, one of group g at most
            ``ceil(gamma * s_g * num_tokens * topk / sum over experts of s)`` (MoE++). None for dropless.
        losses: keyword arguments of :func:`moe_ext.router_losses`, beside the score function, which is the router's.
        sequence_level: take the balance loss of each sequence on its own (DeepSeek's sequence-wise loss); ``hidden`` is
            [..., sequence_length, hidden_size] then.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    ``statistics`` holds a :class:`LayerStatistics` of the last call, None before the first.

    Raises:
        ValueError: the experts are not as many as the router knows, or the capacity factor is not above 0.
        TypeError: an option that :func:`moe_ext.router_losses` does not have.
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        *,
        shared: nn.Module | None = None,
        capacity_factor: float | None = None,
        losses: dict[str, Any] | None = None,
        sequence_level: bool = False,
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(backend)
        if (found := count_experts(experts)) != router.num_experts:
            raise ValueError(f"experts: expected {router.num_experts}, the router's number, got {found}")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor: expected a number > 0, or None for dropless, got {capacity_factor}")
        self.router, self.experts, self.shared = router, experts, shared
        self.capacity_factor = capacity_factor
        self.sequence_level = sequence_level
        self.losses = Knobs(router_losses, losses or {}, reserved=("score_function",))
        self.statistics: LayerStatistics | None = None

    def capacity(self, num_tokens: int, group: int = 0) -> int | None:
        """Rows an expert of a group takes at most, None for no limit."""
        if self.capacity_factor is None:
            return None
        groups = self._groups()
        total = sum(share * count_experts(experts) for share, experts in groups)
        return math.ceil(self.capacity_factor * groups[group][0] * num_tokens * self.router.topk / total)

    def _groups(self) -> list[tuple[float, nn.Module]]:
        if isinstance(self.experts, ExpertGroups):
            return list(zip(self.experts.capacity_shares, self.experts, strict=True))
        return [(1.0, self.experts)]

    def forward(self, hidden: Tensor, *context: Any, **gating: Any) -> MoEOutput:
        """Run the layer.

        Args:
            hidden: [..., hidden_size] with any leading dimensions.
            context, gating: what the router takes beside the rows; their rows are those of ``hidden`` flattened.
            token_mask: (by name) [...] bool, the leading dimensions of ``hidden``: False for tokens that the losses and
                ``tokens_per_expert`` leave out, padding say.
        """
        token_mask = gating.pop("token_mask", None)
        rows = hidden.reshape(-1, hidden.shape[-1])
        routing = self.route(rows, *context, **gating)
        output, dropped = self.run_experts(rows, routing)
        if self.shared is not None:
            output = output + self.shared(rows)
        of_call: dict[str, Any] = {"num_sequences": math.prod(hidden.shape[:-2])} if self.sequence_level else {}
        if token_mask is not None:
            of_call["token_mask"] = token_mask.reshape(-1)
        knobs = self.losses(routing.logits.dtype, of_call)
        balance_loss, z_loss, tokens_per_expert = self.ops.router_losses(
            routing.logits, routing.topk_ids, score_function=self.router.score_function, **knobs
        )
        self.statistics = LayerStatistics(tokens_per_expert, dropped, routing.topk_ids)
        # A router with a balance loss of its own is balanced by that one (noisy top-k).
        balance_loss = getattr(routing, "balance_loss", balance_loss)
        return MoEOutput(output.view(*hidden.shape[:-1], output.shape[-1]), balance_loss, z_loss, *routing[:3])

    def route(self, rows: Tensor, *context: Any, **gating: Any) -> Routing:
        """What the router says to rows [num_tokens, hidden_size]; where a system adds to its router."""
        routing: Routing = self.router(rows, *context, **gating)
        return routing

    def run_experts(self, rows: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The sum of all groups for rows [num_tokens, hidden_size], and how many slots no group took."""
        output: Tensor | None = None
        dropped: Tensor | None = None
        first = 0
        for group, (_, experts) in enumerate(self._groups()):
            capacity = self.capacity(rows.shape[0], group)
            plan = self.ops.routing_plan(
                routing.topk_ids - first if first else routing.topk_ids,
                count_experts(experts),
                capacity=capacity,
                drop_scores=None if capacity is None else routing.topk_weights.detach(),
            )
            part, absent = experts(rows, plan, routing.topk_weights), (plan.slot_to_permuted < 0).sum()
            output = part if output is None else output + part
            # To a group the slots of the others are absent too.
            dropped = absent if dropped is None else dropped + absent - routing.topk_ids.numel()
            first += count_experts(experts)
        assert output is not None and dropped is not None
        return output, dropped


class MoELayer(MoE):
    """The usual :class:`MoE` from sizes: a linear router, MLP experts and, if asked, a SwiGLU shared expert.

    Args:
        hidden_size, intermediate_size, num_experts, topk: sizes.
        shared_intermediate_size: width of the shared expert, 0 for none; several shared experts are one wide one.
        shared_gate: scale the shared expert with a sigmoid gate.
        capacity_factor, losses, sequence_level: as in :class:`MoE`.
        router: keyword arguments of :class:`TopKRouter`.
        experts: keyword arguments of :class:`Experts`.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.
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
        losses: dict[str, Any] | None = None,
        sequence_level: bool = False,
        backend: Backend = "kernels",
    ) -> None:
        shared = shared_intermediate_size > 0
        super().__init__(
            TopKRouter(hidden_size, num_experts, topk, backend=backend, **(router or {})),
            Experts(num_experts, hidden_size, intermediate_size, backend=backend, **(experts or {})),
            shared=SharedExpert(hidden_size, shared_intermediate_size, gated=shared_gate) if shared else None,
            capacity_factor=capacity_factor,
            losses=losses,
            sequence_level=sequence_level,
            backend=backend,
        )
