"""Experts that are switched off, forced or weighed between calls, without compiling anything again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ext.nn.router import Routing, TopKRouter

# Above every score, and far enough below overflow that two of them can be added (the score of a group).
_ABOVE_ALL = 2.0**100


class SteeredRouter(TopKRouter):
    """A :class:`TopKRouter` with three buffers, one entry per expert, that may be written to between calls.

    ``enabled`` (bool): False takes an expert out of selection and softmax. ``forced`` (bool): True puts it into the
    selection of every token, weighed like any other; of more than ``topk`` forced experts those with the lowest ids
    win, and one that is not enabled is not picked. ``gain`` (float32): multiplies its weight at the very end.

    The buffers are read on the device in every call: a model under ``torch.compile`` is not compiled again and a
    captured graph sees what was written. They are no part of the state dict. Arguments as of :class:`TopKRouter`, whose
    own ``expert_mask``, ``expert_gain`` and selection bias stay in force.
    """

    enabled: Tensor
    forced: Tensor
    gain: Tensor

    def __init__(self, hidden_size: int, num_experts: int, topk: int, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, topk, **options)
        for name, value in (("enabled", True), ("forced", False), ("gain", 1.0)):
            self.register_buffer(name, torch.full((num_experts,), value), persistent=False)

    @classmethod
    def of(cls, router: TopKRouter) -> SteeredRouter:
        """The same router, its parameters and buffers shared, with an expert for every one of its own."""
        steered = cls(router.hidden_size, router.num_experts, router.topk, logits=router.logits, backend=router.backend)
        steered.gating, steered.selection_bias = router.gating, router.selection_bias
        device = next((x.device for x in router.parameters()), None)
        return steered.to(device).train(router.training)

    @torch.no_grad()
    def steer(
        self, *, off: Sequence[int] = (), on: Sequence[int] = (), gain: Mapping[int, float] | None = None
    ) -> None:
        """Switch experts ``off``, force others ``on``, weigh them by ``gain``; others are left alone."""
        for name, ids in (("off", off), ("on", on), ("gain", gain or ())):
            if wrong := [e for e in ids if not 0 <= e < self.num_experts]:
                raise ValueError(f"{name}: expected ids of {self.num_experts} experts, got {wrong[0]}")
        everyone = range(self.num_experts)
        self.enabled.copy_(torch.tensor([e not in off for e in everyone]))
        self.forced.copy_(torch.tensor([e in on for e in everyone]))
        self.gain.copy_(torch.tensor([(gain or {}).get(e, 1.0) for e in everyone]))

    def gate(self, logits: Tensor, **gating: Any) -> Routing:
        knobs = self.gating(logits.dtype, gating)
        mask, gain = knobs.pop("expert_mask", None), knobs.pop("expert_gain", None)
        bias = self.gain.new_zeros(self.num_experts) if self.selection_bias is None else self.selection_bias
        bias = torch.where(self.forced, _ABOVE_ALL, bias)
        weights, ids = self.ops.topk_gating(
            logits,
            self.topk,
            selection_bias=bias.to(logits.dtype),
            expert_mask=self.enabled if mask is None else mask & self.enabled,
            expert_gain=(self.gain if gain is None else gain * self.gain).to(logits.dtype),
            **knobs,
        )
        return Routing(weights, ids, logits)
