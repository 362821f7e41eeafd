"""Routers: any map from rows to logits, then :func:`moe_ext.topk_gating` or :func:`moe_ext.expert_choice_gating`."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ext.nn.backend import Backend, BackendModule
from moe_ext.nn.knobs import Knobs
from moe_ext.ops.autocast import without_autocast
from moe_ext.ops.gating import ScoreFunction, topk_gating


class Routing(NamedTuple):
    """What a router returns, for K slots per token."""

    topk_weights: Tensor
    """[num_tokens, K] float32 (float64 for float64 rows)."""
    topk_ids: Tensor
    """[num_tokens, K] int32."""
    logits: Tensor
    """[num_tokens, num_experts], in the dtype of the weights."""


class Router(BackendModule):
    """What all routers share: the map to logits, which runs in fp32 (float64 for float64 rows), under autocast too.

    ``logits`` is any module that maps rows [num_tokens, hidden_size], and what else a call hands it, to
    [num_tokens, num_experts]. A module in a 16-bit dtype runs on fp32 copies of its parameters.

    Raises:
        ValueError: topk is below 1 or above num_experts.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, topk: int, logits: nn.Module | None, backend: Backend
    ) -> None:
        super().__init__(backend)
        if not 1 <= topk <= num_experts:
            raise ValueError(f"topk: expected 1 to num_experts = {num_experts}, got {topk}")
        self.hidden_size, self.num_experts, self.topk = hidden_size, num_experts, topk
        self.logits = nn.Linear(hidden_size, num_experts, bias=False) if logits is None else logits

    @property
    def score_function(self) -> ScoreFunction:
        """What makes a score of a logit; the balance loss needs it."""
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor, *context: Any) -> Tensor:
        """hidden [num_tokens, hidden_size] -> logits [num_tokens, num_experts]."""
        if not hidden.is_floating_point() or hidden.shape[1:] != (self.hidden_size,):
            raise ValueError(
                f"hidden: expected floating rows [num_tokens, hidden_size = {self.hidden_size}], "
                f"got {str(hidden.dtype).removeprefix('torch.')} {list(hidden.shape)}"
            )
        precision = torch.promote_types(hidden.dtype, torch.float32)
        with without_autocast(hidden):
            inputs = tuple(_widened(x, precision) for x in (hidden, *context))
            held = chain(self.logits.parameters(), self.logits.buffers())
            if all(x.dtype == precision for x in held if x.is_floating_point()):
                logits: Tensor = self.logits(*inputs)
            else:
                state = {**dict(self.logits.named_parameters()), **dict(self.logits.named_buffers())}
                wide = {name: _widened(x, precision) for name, x in state.items()}
                logits = torch.func.functional_call(self.logits, wide, inputs)
        if logits.shape != (hidden.shape[0], self.num_experts):
            raise ValueError(
                f"logits: expected a module that returns [num_tokens, num_experts] = "
                f"{[hidden.shape[0], self.num_experts]}, got {list(logits.shape)}"
            )
        return logits

    def gate(self, logits: Tensor, **gating: Any) -> Routing:
        """logits [num_tokens, num_experts] from :meth:`compute_logits` -> the routing."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, topk={self.topk}"


class TopKRouter(Router):
    """Picks ``topk`` of ``num_experts`` for every token.

    Args:
        hidden_size, num_experts, topk: sizes.
        logits: any module from rows (and what else a call hands over) to logits [num_tokens, num_experts]; None for one
            linear map without bias.
        selection_bias: keep a buffer ``selection_bias`` [num_experts] that is added to the scores for the selection
            only; whoever trains moves it (loss-free balancing, DeepSeek-V3).
        backend: ``kernels``, or ``reference`` for the ops in plain torch.
        gating: further keyword arguments of :func:`moe_ext.topk_gating`.

    Raises:
        ValueError: topk is below 1 or above num_experts.
        TypeError: an option that :func:`moe_ext.topk_gating` does not have.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        topk: int,
        *,
        logits: nn.Module | None = None,
        selection_bias: bool = False,
        backend: Backend = "kernels",
        **gating: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, topk, logits, backend)
        # A third output has no place in a Routing.
        self.gating = Knobs(topk_gating, gating, reserved=("selection_bias", "return_next_logit"))
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)

    def reset_parameters(self) -> None:
        """The bias only; the map to logits has a reset_parameters of its own."""
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    @property
    def score_function(self) -> ScoreFunction:
        found: ScoreFunction = self.gating.options.get("score_function", "softmax")
        return found

    def forward(self, hidden: Tensor, *context: Any, **gating: Any) -> Routing:
        """Route rows.

        Args:
            hidden: [num_tokens, hidden_size].
            context: handed to ``logits`` after ``hidden``, floating tensors in fp32.
            gating: options of the router for this call, in the place of its own.

        Raises:
            ValueError: ``hidden`` is not floating or of another hidden size, or ``logits`` returned another shape than
                [num_tokens, num_experts].
            TypeError: an option that the router does not have.
        """
        return self.gate(self.compute_logits(hidden, *context), **gating)

    def gate(self, logits: Tensor, **gating: Any) -> Routing:
        knobs = self.gating(logits.dtype, gating)
        bias = None if self.selection_bias is None else self.selection_bias.to(logits.dtype)
        weights, ids = self.ops.topk_gating(logits, self.topk, selection_bias=bias, **knobs)
        return Routing(weights, ids, logits)


class ExpertChoiceRouter(Router):
    """Every expert picks its best ``ceil(num_tokens * topk / num_experts)`` tokens (Expert Choice, arXiv 2202.09368).

    Args:
        hidden_size, num_experts: sizes.
        topk: experts per token on average; one token may get any number from 0 to num_experts.
        logits: as in :class:`TopKRouter`.
        score_function: as in :func:`moe_ext.expert_choice_gating`.
        backend: ``kernels``, or ``reference`` for the ops in plain torch.

    The slots of a token are ``K = num_experts``. With ``capacity_factor=1`` a :class:`moe_ext.nn.MoE` drops nothing
    that was picked and keeps the rows of the plan few.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        topk: int,
        *,
        logits: nn.Module | None = None,
        score_function: ScoreFunction = "softmax",
        backend: Backend = "kernels",
    ) -> None:
        super().__init__(hidden_size, num_experts, topk, logits, backend)
        self._score_function: ScoreFunction = score_function

    @property
    def score_function(self) -> ScoreFunction:
        return self._score_function

    def forward(self, hidden: Tensor, *context: Any) -> Routing:
        """As :meth:`TopKRouter.forward`."""
        return self.gate(self.compute_logits(hidden, *context))

    def gate(self, logits: Tensor) -> Routing:  # type: ignore[override]
        capacity = -(-logits.shape[0] * self.topk // self.num_experts)
        weights, ids = self.ops.expert_choice_gating(logits, capacity, score_function=self._score_function)
        return Routing(weights, ids, logits)


def _widened(value: Any, precision: torch.dtype) -> Any:
    return value.to(precision) if isinstance(value, Tensor) and value.is_floating_point() else value
