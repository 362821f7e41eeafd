"""What the tests of ExpertParallelMoE run on every rank."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from cases import make_rows
from expert_parallel_cases import two_levels
from moe_ext.distributed import ExpertMap, FlatExchange
from moe_ext.nn import ExpertParallelMoE, MoELayer

HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 16, 12, 8, 3
TOKENS = (9, 0, 6, 4)


class CosineLogits(nn.Module):
    """A router of one's own: any module from rows to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(make_rows(EXPERTS, HIDDEN, dtype=torch.float64, seed=4))

    def forward(self, hidden: Tensor) -> Tensor:
        return 10 * F.normalize(hidden, dim=-1) @ F.normalize(self.keys, dim=-1).T


def router_grads(layer: MoELayer | ExpertParallelMoE) -> Tensor:
    return torch.cat([p.grad.flatten() for p in layer.router.parameters()])


def dense_layer(**configuration: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOPK, backend="reference", **configuration).double()


def rows_of(rank: int, num_ranks: int, seed: int) -> Tensor:
    first = [0, *accumulate(TOKENS[:num_ranks])]
    return make_rows(first[-1], HIDDEN, dtype=torch.float64, seed=seed)[first[rank] : first[rank + 1]]


def parallel_layer(group: Any, dense: MoELayer, **arguments: Any) -> ExpertParallelMoE:
    """The dense layer, its experts spread over the group."""
    ranks_per_node = arguments.pop("ranks_per_node", None)
    exchange = FlatExchange(group) if ranks_per_node is None else two_levels(dist.get_world_size(group), ranks_per_node)
    layer = ExpertParallelMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOPK, exchange, **arguments).double()
    layer.load_experts(dict(dense.experts.named_parameters()))
    layer.router.load_state_dict(dense.router.state_dict())
    if dense.shared is not None:
        layer.shared.load_state_dict(dense.shared.state_dict())
    return layer


def run_layer(group: Any, configuration: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of this rank's tokens."""
    layer = parallel_layer(group, dense_layer(**configuration), **configuration, **arguments)
    rank, num_ranks = layer.exchange.rank, layer.exchange.num_ranks
    hidden = rows_of(rank, num_ranks, 2).requires_grad_()
    output = layer(hidden).hidden
    (output * rows_of(rank, num_ranks, 3)).sum().backward()
    layer.synchronize_copies()
    return {
        "output": output.detach(),
        "hidden": hidden.grad,
        "router": router_grads(layer),
        "experts": {name: p.grad for name, p in layer.experts.named_parameters()},
        "local": layer.local_experts,
        "dropped": int(layer.statistics.dropped_rows),
    }


def run_under_autocast(group: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The float32 layer under autocast; which dtypes went out."""
    layer = parallel_layer(group, dense_layer(), **arguments).float()
    rank, num_ranks = layer.exchange.rank, layer.exchange.num_ranks
    hidden = rows_of(rank, num_ranks, 2).float().requires_grad_()
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(hidden).hidden
    (output.float() * rows_of(rank, num_ranks, 3).float()).sum().backward()
    return {
        "output": output.detach(),
        "hidden": hidden.grad,
        "experts": {name: p.grad for name, p in layer.experts.named_parameters()},
        "local": layer.local_experts,
        "seen": seen,
    }


def run_bottleneck(group: Any) -> dict[str, Any]:
    """BigMac: descend, layer at the narrow width, ascend; the single-process form is written out in the test."""
    torch.manual_seed(0)
    layer = ExpertParallelMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOPK, FlatExchange(group), bottleneck_size=4).double()
    for parameter in (*layer.router.parameters(), *layer.descend.parameters(), *layer.ascend.parameters()):
        dist.broadcast(parameter.data, 0, group=group)
    rank, num_ranks = layer.exchange.rank, layer.exchange.num_ranks
    hidden = rows_of(rank, num_ranks, 2).requires_grad_()
    output = layer(hidden).hidden
    (output * rows_of(rank, num_ranks, 3)).sum().backward()
    return {
        "output": output.detach(),
        "hidden": hidden.grad,
        "state": {k: v.clone() for k, v in layer.state_dict().items()},
    }


class Model(nn.Module):
    """Something dense before the layer, for FSDP2 to shard."""

    def __init__(self, layer: ExpertParallelMoE) -> None:
        super().__init__()
        self.inner, self.moe = nn.Linear(HIDDEN, HIDDEN).double(), layer

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.moe(self.inner(hidden)).hidden
        return output


def sharded_model(group: Any, seed: int) -> Model:
    torch.manual_seed(seed)
    dense = MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOPK).double()
    model = Model(parallel_layer(group, dense))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ranks",))
    model.moe.distribute_experts(mesh)
    return fully_shard(model, mesh=mesh, ignored_params=set(model.moe.experts.parameters()))


def train_and_save(group: Any, folder: str) -> Tensor:
    """Two steps of AdamW under FSDP2 with the experts as DTensors, then a checkpoint; what the model says afterwards."""
    model = sharded_model(group, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    rank = dist.get_rank(group)
    for step in range(2):
        loss = (model(rows_of(rank, 4, 5 + step)) * rows_of(rank, 4, 9)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    checkpoint.save(model.state_dict(), checkpoint_id=folder, process_group=group)
    return model(make_rows(7, HIDDEN, dtype=torch.float64, seed=4)).detach()


def load_and_run(group: Any, folder: str) -> Tensor:
    model = sharded_model(group, 1)
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=folder, process_group=group)
    model.load_state_dict(state)
    return model(make_rows(7, HIDDEN, dtype=torch.float64, seed=4)).detach()


def save_experts(group: Any, folder: str) -> None:
    """Expert by expert: an uneven map with a rank without experts."""
    layer = parallel_layer(group, dense_layer(), expert_map=ExpertMap(range(EXPERTS), (1, 0, 5, 2)))
    checkpoint.save(layer.expert_state_dict(), checkpoint_id=folder, process_group=group)


def load_experts(group: Any, folder: str) -> dict[str, Tensor]:
    """Into another map, with copies, on fewer ranks."""
    experts = ExpertMap([7, 0, 1, 2, 3, 3, 4, 5, 6, 7], (4, 6))
    layer = ExpertParallelMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOPK, FlatExchange(group), expert_map=experts).double()
    state = layer.expert_state_dict()
    checkpoint.load(state, checkpoint_id=folder, process_group=group)
    layer.load_expert_state_dict(state)
    return {name: p.detach() for name, p in layer.experts.named_parameters()} | {
        "local": torch.tensor(layer.local_experts)
    }
