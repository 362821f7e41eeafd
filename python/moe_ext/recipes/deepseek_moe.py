"""DeepSeekMoE: many narrow experts and shared ones ("DeepSeekMoE: Towards Ultimate Expert Specialization in
Mixture-of-Experts Language Models", arXiv 2401.06066; V2 arXiv 2405.04434; V3 arXiv 2412.19437).

``y = sum_shared E_s(x) + scale * sum_topk g_e E_e(x)``. V1: ``g = softmax(x W)``, not renormalised. V2: the same, the
experts from the ``topk_groups`` groups with the highest single scores. V3: ``g = sigmoid(x W)`` renormalised; the
selection adds a bias that balances the load without a loss, groups go by their two best. The balance loss is
``sum_e f_e P_e``, per batch or, with ``sequence_level``, per sequence; V2 adds one over devices and one over what is
sent to them, a device being a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext.nn import MoELayer, MoEOutput, Routing, device_balance_losses, update_selection_bias


class DeepSeekMoE(MoELayer):
    """The first version: softmax, then top-k. hidden [..., hidden_size] -> MoEOutput.

    Options are those of :class:`moe_ext.nn.MoELayer`, among them ``sequence_level``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        *,
        num_shared: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            topk,
            shared_intermediate_size=num_shared * intermediate_size,
            **options,
        )


class DeepSeekV2MoE(DeepSeekMoE):
    """Group-limited: the softmax runs over all experts, the top-k over those of the best groups."""

    def __init__(
        self, *sizes: int, num_groups: int = 8, topk_groups: int = 3, scale: float = 16.0, **options: Any
    ) -> None:
        super().__init__(*sizes, router={"weight_source": "external", "scale": scale}, **options)
        self.num_groups, self.topk_groups = num_groups, topk_groups

    def route(self, rows: Tensor, *context: Any, **gating: Any) -> Routing:
        logits = self.router.compute_logits(rows)
        scores = torch.softmax(logits, dim=-1)
        best = scores.view(rows.shape[0], self.num_groups, -1).amax(-1).topk(self.topk_groups).indices
        kept = torch.zeros(rows.shape[0], self.num_groups, dtype=torch.bool, device=rows.device).scatter(1, best, True)
        mask = kept.repeat_interleave(scores.shape[1] // self.num_groups, dim=1)
        return self.router.gate(logits, expert_mask=mask, external_weights=scores, **gating)

    def device_losses(self, output: MoEOutput) -> tuple[Tensor, Tensor]:
        """Of computation and of communication, with groups as devices; times 0.05 and 0.02 in the paper."""
        return device_balance_losses(
            output.logits, output.topk_ids, self.num_groups, devices_per_token=self.topk_groups
        )


class DeepSeekV3MoE(DeepSeekMoE):
    """Sigmoid scores and loss-free balancing: call :meth:`balance` after every optimizer step."""

    def __init__(
        self,
        *sizes: int,
        num_shared: int = 1,
        num_groups: int = 8,
        topk_groups: int = 4,
        scale: float = 2.5,
        **options: Any,
    ) -> None:
        router = {
            "score_function": "sigmoid",
            "selection_bias": True,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "renormalize": True,
            "renormalize_eps": 1e-20,
            "scale": scale,
        }
        super().__init__(*sizes, num_shared=num_shared, router=router, **options)

    def balance(self, rate: float = 1e-3) -> None:
        """Move the selection bias by the load of the last call."""
        bias = self.router.selection_bias
        assert isinstance(bias, Tensor) and self.statistics is not None
        update_selection_bias(bias, self.statistics.tokens_per_expert, rate=rate)
