"""One expert layer and everyone who computes it: the same inputs, weights and routing for all.

The gate is outside every contender; routing (sorting and permuting by expert) is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moe_ext

from . import peers
from .case import Context, first_line
from .shapes import LayerShape

# Peers that materialise [T * K, 2I, H] weights, or whose backward holds one weight gradient per expert and call.
BATCHED_LIMIT_BYTES = 2e9
SLOW_BACKWARD_EXPERTS = 8


class Layer:
    """Inputs of a layer, and its contenders ("ours" first) as functions of them.

    ``arguments`` are hidden, topk_weights, gate_up, down and, with ``shape.gpt_oss``, both biases. ``skipped`` says of
    each peer left out why; ``skipped_backward`` of those left out in training only.
    """

    def __init__(self, context: Context, shape: LayerShape, dtype: torch.dtype, routing: str) -> None:
        self.shape = shape
        hidden = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype)
        weights = torch.softmax(context.rows(shape.num_tokens, shape.topk, dtype=torch.float32, seed=3), dim=-1)
        experts = context.expert_weights(shape, dtype)
        self.ids = context.topk_ids(shape, routing)
        self.arguments: tuple[Tensor, ...] = (hidden, weights, *experts)
        self.grad = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype, seed=4)
        self._dense_rows: Tensor | None = None
        self.skipped: dict[str, str] = {}
        self.skipped_backward: dict[str, str] = {}
        self.contenders = {"ours": self._ours(), **self._peers(context, experts)}

    @property
    def weight_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.arguments[2:])

    @property
    def used_experts(self) -> list[int]:
        """Those that hold a token."""
        return [expert for expert in torch.unique(self.ids).tolist() if 0 <= expert < self.shape.num_experts]

    @property
    def used_weight_bytes(self) -> int:
        return self.weight_bytes * len(self.used_experts) // self.shape.num_experts

    def reading(self) -> Callable[[], None]:
        """Sums the weights of the used experts, as float32 whatever they are: reads each once."""
        parts = [weight[e].view(torch.float32) for weight in self.arguments[2:] for e in self.used_experts]

        def read() -> None:
            for part in parts:
                part.sum()

        return read

    def forward(self, name: str) -> Callable[[], Tensor]:
        run = self.contenders[name]
        return lambda: run(*self.arguments)

    def steps(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Forward and backward to every argument, of those that train in reasonable time."""
        leaves = [x.detach().requires_grad_() for x in self.arguments]

        def step(run: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: torch.autograd.grad(run(*leaves), leaves, self.grad)

        return {name: step(run) for name, run in self.contenders.items() if name not in self.skipped_backward}

    def dense(self, *, backward: bool = False) -> Callable[[], object]:
        hidden, _, gate_up, down = self.arguments[:4]
        # [in, out] whatever the layout of the weights.
        up, back = (gate_up[0], down[0]) if self.shape.gpt_oss else (gate_up[0].T, down[0].T)
        if self._dense_rows is None:  # not inside what is timed
            self._dense_rows = hidden.repeat(self.shape.topk, 1)
        return partial(peers.dense_training if backward else peers.dense_ceiling, self._dense_rows, up, back)

    def _ours(self) -> Callable[..., Tensor]:
        ids, num_experts = self.ids, self.shape.num_experts

        def swiglu(x: Tensor, w: Tensor, up: Tensor, dn: Tensor) -> Tensor:
            return moe_ext.moe_mlp(x, up, dn, moe_ext.routing_plan(ids, num_experts), w, weight_layout="enk")

        def gpt_oss(x: Tensor, w: Tensor, up: Tensor, dn: Tensor, up_bias: Tensor, dn_bias: Tensor) -> Tensor:
            return moe_ext.moe_mlp(
                x, up, dn, moe_ext.routing_plan(ids, num_experts), w, weight_layout="ekn", activation="swiglu_clamped",
                gate_up_layout="interleaved", gate_up_bias=up_bias, down_bias=dn_bias,
            )  # fmt: skip

        return gpt_oss if self.shape.gpt_oss else swiglu

    def _peers(self, context: Context, experts: tuple[Tensor, ...]) -> dict[str, Callable[..., Tensor]]:
        ids, wide_ids, shape = self.ids, self.ids.long(), self.shape
        pipeline = peers.grouped_mm_gpt_oss_layer if shape.gpt_oss else peers.grouped_mm_layer
        found: dict[str, Callable[..., Tensor]] = {"torch grouped_mm": lambda x, w, *e: pipeline(x, wide_ids, w, *e)}
        for name, module in self._made("transformers", lambda: peers.transformers_experts(*experts)).items():
            if name.endswith("batched_mm") and self._batched_bytes() > BATCHED_LIMIT_BYTES:
                self.skipped[name] = "gathers a copy of the weights for every slot: more than 2 GB"
                continue
            found[name] = _with_parameters(module, wide_ids)
        if context.device == "cuda" and not shape.gpt_oss:
            for name, forward in self._made("liger", lambda: peers.liger_layer(*experts)).items():
                found[name] = lambda x, w, *_, f=forward: f(x, ids, w)
                self.skipped_backward[name] = "its weights are no arguments"
        if shape.num_experts >= SLOW_BACKWARD_EXPERTS and "transformers eager" in found:
            self.skipped_backward["transformers eager"] = (
                "its backward makes a gradient of all weights for every expert: up to minutes per call"
            )
        return found

    def _made(self, library: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A library may be of another version, or fail where it is imported: the other peers are worth their time."""
        try:
            return make()
        except Exception as error:
            self.skipped[library] = f"raised {first_line(error)}"
            return {}

    def _batched_bytes(self) -> float:
        slots = self.shape.num_tokens * self.shape.topk
        return 2.0 * slots * self.shape.hidden_size * self.shape.intermediate_size * self.arguments[0].element_size()


def _with_parameters(module: torch.nn.Module, ids: Tensor) -> Callable[..., Tensor]:
    """A transformers layer as a function of its weights, so that autograd can be asked for their gradients."""

    def run(x: Tensor, w: Tensor, *experts: Tensor) -> Tensor:
        parameters = dict(zip(peers.PARAMETERS, experts, strict=False))
        return torch.func.functional_call(module, parameters, (x, ids, w.to(x.dtype)))

    return run
