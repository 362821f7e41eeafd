"""Training steps of an expert-parallel layer in static sizes, on one device; tests/gpu captures them as CUDA graphs,
tests/test_capture_steps.py runs them on the CPU. As in tests/capture_steps.py, a step depends on its inputs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capture_steps import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK, Step, leaf
from moe_ext.distributed import DispatchOptions, Exchange, HierarchicalExchange
from moe_ext.nn import ExpertParallelMoE, MoELayer

# How rows travel; a "share" of 0.5 is half of the rows that might be needed.
PARALLEL: dict[str, dict[str, Any]] = {
    "dedup": {},
    "slots": {"form": "slot"},
    "fp8": {"payload": "fp8"},
    "chunks": {"degree": 3},
    "chunks, slots, fp8": {"degree": 4, "form": "slot", "payload": "fp8"},
    "dropping": {"overflow": "drop", "share": 0.5},
    "two levels": {"levels": 2, "degree": 2},
    "nodes": {"levels": 2, "form": "node"},
    "nodes, chunks, fp8": {"levels": 2, "form": "node", "degree": 3, "payload": "fp8"},
}

MakeExchange = Callable[[int], Exchange]
"""From a number of ranks, which it may not be able to give: NCCL on one device has one."""


def make_parallel_layer(name: str, num_tokens: int, make_exchange: MakeExchange, **more: Any) -> ExpertParallelMoE:
    """A layer over four ranks, if it gets them, with room for ``num_tokens`` tokens of each."""
    how = dict(PARALLEL[name])
    degree, share = how.pop("degree", 1), how.pop("share", 1.0)
    if how.pop("levels", 1) == 2:
        exchange: Exchange = HierarchicalExchange(make_exchange(2), make_exchange(2))
    else:
        exchange = make_exchange(4)
    bound = max(1, int(share * -(-num_tokens // degree) * (TOPK if how.get("form") == "slot" else 1)))
    if how.get("form") == "node":
        assert isinstance(exchange, HierarchicalExchange)
        how |= {"rows_per_node": bound}
        bound *= exchange.num_nodes
    return ExpertParallelMoE(
        HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK, exchange, degree=degree,
        dispatch=DispatchOptions(rows_per_rank=bound, **how), **more,
    )  # fmt: skip


def make_parallel_step(
    name: str, num_tokens: int, dtype: torch.dtype, device: str, make_exchange: MakeExchange
) -> Step:
    """Forward and backward, down to the gradients of every parameter."""
    torch.manual_seed(0)
    return step_of(make_parallel_layer(name, num_tokens, make_exchange).to(device, dtype))


def step_of(layer: ExpertParallelMoE | MoELayer) -> Step:
    """From hidden, anything and the gradient of the output to output, statistics and gradients."""
    parameters = list(layer.parameters())

    def step(inputs: list[Tensor]) -> list[Tensor]:
        hidden = leaf(inputs[0])
        output = layer(hidden)
        gradients = torch.autograd.grad((output.hidden * inputs[2]).sum(), [hidden, *parameters])
        assert layer.statistics is not None
        return [output.hidden, *gradients, *layer.statistics]

    return step


def dense_twin(layer: ExpertParallelMoE) -> MoELayer:
    """One process's layer with the weights of a layer whose ranks are all one: expert e is local expert e modulo share."""
    dense = MoELayer(HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK)
    dense.router.load_state_dict(layer.router.state_dict())
    times = NUM_EXPERTS // len(layer.local_experts)
    dense.experts.load_state_dict(
        {name: whole.repeat(times, *[1] * (whole.dim() - 1)) for name, whole in layer.experts.state_dict().items()}
    )
    return dense.to(next(layer.parameters()))
