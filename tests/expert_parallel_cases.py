"""What the tests of expert parallelism run on every rank, and the same layer in one process.

Not in the test file: the processes of tests/rank_pool.py import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import moe_ext
from cases import make_rows, make_topk_ids, make_topk_weights, non_contiguous
from moe_ext import reference
from moe_ext.distributed import (
    DispatchOptions,
    Exchange,
    ExpertMap,
    FlatExchange,
    HierarchicalExchange,
    Received,
    expert_parallel,
)

HIDDEN, INTERMEDIATE = 12, 10


@dataclass(frozen=True)
class WorldCase:
    """A layer over ranks: everything from which a rank makes its share."""

    tokens: tuple[int, ...]  # of each rank
    experts_per_rank: tuple[int, ...]
    topk: int
    form: str = "dedup"
    rows_per_rank: int | None = None
    overflow: str = "raise"
    degree: int = 1
    backward_degree: int | None = None
    routing: str = "uniform"
    physical_to_logical: tuple[int, ...] | None = None
    ranks_per_node: int | None = None
    payload: str = "native"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    debug: bool = False
    hidden_size: int = HIDDEN
    rows_per_node: int | None = None
    strided: bool = False  # hidden, ids and weights lie behind strides
    elementwise: bool = False  # experts that scale each column, the same bits however many rows there are

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def map(self) -> ExpertMap:
        return ExpertMap(self.physical_to_logical or range(sum(self.experts_per_rank)), self.experts_per_rank)

    def options(self) -> DispatchOptions:
        return DispatchOptions(
            self.form, self.rows_per_rank, self.overflow, self.payload, self.debug, self.rows_per_node
        )

    def tensors(self) -> dict[str, Tensor]:
        """Of the whole world: hidden, ids, weights, gradient, and the logical experts."""
        num_tokens, num_experts = sum(self.tokens), self.map.num_logical
        router_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return {
            "hidden": make_rows(num_tokens, self.hidden_size, dtype=self.dtype, seed=self.seed),
            "ids": make_topk_ids(num_tokens, num_experts, self.topk, self.routing, seed=self.seed),
            "weights": make_topk_weights(num_tokens, self.topk, seed=self.seed, dtype=router_dtype),
            "grad": make_rows(num_tokens, self.hidden_size, dtype=self.dtype, seed=self.seed + 1),
            "gate_up": make_rows(num_experts, 2 * INTERMEDIATE, self.hidden_size, dtype=self.dtype, seed=7, scale=0.3),
            "down": make_rows(num_experts, self.hidden_size, INTERMEDIATE, dtype=self.dtype, seed=8, scale=0.3),
        }


@dataclass
class Share:
    """What one rank made."""

    output: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)
    dropped_rows: int = 0


_two_levels: dict[tuple[int, int], HierarchicalExchange] = {}


def make_two_levels(_: Any, sizes: list[tuple[int, int]]) -> None:
    """Once in each process, called in all: the exchanges over the first ranks, of (num_ranks, ranks_per_node)."""
    for num_ranks, ranks_per_node in sizes:
        exchange = HierarchicalExchange.over(ranks_per_node, [range(num_ranks)])
        if exchange is not None:
            _two_levels[num_ranks, ranks_per_node] = exchange


def two_levels(num_ranks: int, ranks_per_node: int) -> HierarchicalExchange:
    return _two_levels[num_ranks, ranks_per_node]


def make_exchange(group: Any, case: WorldCase) -> Exchange:
    return FlatExchange(group) if case.ranks_per_node is None else two_levels(case.num_ranks, case.ranks_per_node)


def scale_columns(received: Received, scales: Tensor) -> Tensor:
    here = received.topk_ids >= 0
    factors = scales[received.topk_ids.clamp(min=0)] * here[..., None]
    if received.topk_weights is not None:
        factors = factors * received.topk_weights[..., None].to(factors.dtype)
    return received.hidden * factors.sum(1)


def run_share(exchange: Exchange, case: WorldCase) -> Share:
    """This rank's tokens through its share of the layer, forward and backward."""
    rank, whole, experts = exchange.rank, case.tensors(), case.map
    first = [0, *accumulate(case.tokens)]
    mine = slice(first[rank], first[rank + 1])
    lay = non_contiguous if case.strided else torch.clone
    hidden, weights = (lay(whole[name][mine]).requires_grad_() for name in ("hidden", "weights"))
    local = experts.local_experts(rank)
    gate_up, down = (whole[name][local].clone().requires_grad_() for name in ("gate_up", "down"))

    def compute(received: Received) -> Tensor:
        if not local:
            return received.hidden * 0
        if case.elementwise:
            return scale_columns(received, down[..., 0])
        plan = moe_ext.routing_plan(received.topk_ids, len(local))
        return moe_ext.moe_mlp(
            received.hidden, gate_up, down, plan, received.topk_weights, weight_layout="enk", activation="swiglu"
        )

    ids = lay(experts.physical_ids(whole["ids"][mine], first_token=rank))
    output, dropped = expert_parallel(
        hidden, ids, weights, compute, exchange, experts.rank_expert_offsets, case.options(), degree=case.degree,
        backward_degree=case.backward_degree,
    )  # fmt: skip
    inputs = {"hidden": hidden, "weights": weights, "gate_up": gate_up, "down": down}
    output.backward(whole["grad"][mine])
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
    return Share(output.detach(), grads, int(dropped))


def run_case(group: Any, case: WorldCase) -> Share:
    return run_share(make_exchange(group, case), case)


def run_dense(case: WorldCase, ids: Tensor | None = None) -> Share:
    """The whole layer in one process, on the reference ops."""
    whole = case.tensors()
    inputs = {name: whole[name].requires_grad_() for name in ("hidden", "weights", "gate_up", "down")}
    plan = reference.routing_plan(whole["ids"] if ids is None else ids, case.map.num_logical)
    output = reference.moe_mlp(
        inputs["hidden"], inputs["gate_up"], inputs["down"], plan, inputs["weights"], weight_layout="enk",
        activation="swiglu",
    )  # fmt: skip
    grads = torch.autograd.grad(output, list(inputs.values()), whole["grad"])
    return Share(output.detach(), dict(zip(inputs, grads, strict=True)))


def joined(shares: list[Share], case: WorldCase) -> Share:
    """The shares of all ranks as one; the gradients of an expert's copies are added up."""
    output = torch.cat([share.output for share in shares])
    grads = {name: torch.cat([share.grads[name] for share in shares]) for name in ("hidden", "weights")}
    held = [logical for rank in range(case.num_ranks) for logical in case.map.local_experts(rank)]
    for name in ("gate_up", "down"):
        every = torch.cat([share.grads[name] for share in shares])
        grads[name] = every.new_zeros(case.map.num_logical, *every.shape[1:]).index_add_(0, torch.tensor(held), every)
    return Share(output, grads, sum(share.dropped_rows for share in shares))
