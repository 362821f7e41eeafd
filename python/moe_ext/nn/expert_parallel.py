"""A mixture-of-experts layer whose experts are spread over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_ext.distributed.exchange import Exchange
from moe_ext.distributed.expert_map import ExpertMap
from moe_ext.distributed.expert_parallel import expert_parallel
from moe_ext.distributed.level import Received
from moe_ext.distributed.node_dispatch import levels_of
from moe_ext.distributed.options import DispatchOptions
from moe_ext.nn.experts import Experts
from moe_ext.nn.layer import MoEOutput, SharedExpert
from moe_ext.nn.router import TopKRouter
from moe_ext.ops.autocast import cast_for_product
from moe_ext.ops.gating import router_losses
from moe_ext.ops.plan import routing_plan


class ExpertParallelStatistics(NamedTuple):
    """The last call of an :class:`ExpertParallelMoE` on this rank, on its device, without gradient."""

    tokens_per_expert: Tensor
    """[num_experts] int32: what this rank's router asked for."""
    dropped_rows: Tensor
    """Scalar int64: rows of this rank beyond ``rows_per_rank``."""
    topk_ids: Tensor
    """[num_tokens, topk] int32, logical."""


class ExpertParallelMoE(nn.Module):
    """Router and shared expert on every rank, routed experts each on theirs.

    Args:
        hidden_size, intermediate_size, num_experts, topk: sizes of the whole layer.
        exchange: between which ranks, e.g. ``FlatExchange(group)``.
        expert_map: which rank holds which expert, with copies or without; default: consecutive, even. With
            ``tensor_parallel`` its ranks are groups of that many.
        dispatch: how rows travel.
        degree, backward_degree: chunks of the pipeline, see :func:`moe_ext.distributed.expert_parallel`.
        bottleneck_size: BigMac: project to this width before the dispatch and back after the combine; the experts work
            at it, and bytes shrink by ``bottleneck_size / hidden_size``.
        tensor_parallel: cut every expert's intermediate size over this many consecutive ranks. A token travels to each
            of them, and combine adds their shares. Without biases.
        shared_intermediate_size, shared_gate, router, experts: as in :class:`moe_ext.nn.MoELayer`.

    The losses are those of this rank's tokens. Parameters of router, shared expert and projections are copies on every
    rank: averaging their gradients is for data parallelism. Gradients of the experts are sums over the tokens of all
    ranks; :meth:`synchronize_copies` adds up those of copied experts.

    Raises:
        ValueError: an argument does not fit the others; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        exchange: Exchange,
        *,
        expert_map: ExpertMap | None = None,
        dispatch: DispatchOptions | None = None,
        degree: int = 1,
        backward_degree: int | None = None,
        bottleneck_size: int | None = None,
        tensor_parallel: int = 1,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        router: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tensor_parallel < 1 or exchange.num_ranks % tensor_parallel:
            raise ValueError(
                f"tensor_parallel: expected a divisor of {exchange.num_ranks} ranks, got {tensor_parallel}"
            )
        if intermediate_size % tensor_parallel:
            raise ValueError(
                f"intermediate_size: expected a multiple of tensor_parallel, {tensor_parallel}, got {intermediate_size}"
            )
        if tensor_parallel > 1 and (experts or {}).get("bias"):
            raise ValueError("experts: expected bias=False with tensor_parallel > 1, since every share would add it")
        groups = exchange.num_ranks // tensor_parallel
        self.map = expert_map or ExpertMap.even(num_experts, groups)
        if self.map.num_ranks != groups or self.map.num_logical != num_experts:
            raise ValueError(
                f"expert_map: expected {num_experts} experts on {groups} ranks, got {self.map.num_logical} on "
                f"{self.map.num_ranks}"
            )
        self.exchange, self.dispatch = exchange, dispatch or DispatchOptions()
        self.degree, self.backward_degree = degree, backward_degree
        if self.dispatch.form == "node":
            levels_of(exchange)
        self.num_experts, self.tensor_parallel = num_experts, tensor_parallel
        self.group, self.share = divmod(exchange.rank, tensor_parallel)
        self.local_experts = self.map.local_experts(self.group)
        width = bottleneck_size or hidden_size
        self.router = TopKRouter(hidden_size, num_experts, topk, **(router or {}))
        self.experts = Experts(len(self.local_experts), width, intermediate_size // tensor_parallel, **(experts or {}))
        self.descend = nn.Linear(hidden_size, width, bias=False) if bottleneck_size else None
        self.ascend = nn.Linear(width, hidden_size, bias=False) if bottleneck_size else None
        self.shared = (
            SharedExpert(hidden_size, shared_intermediate_size, gated=shared_gate) if shared_intermediate_size else None
        )
        offsets, shares = self._share_tables()
        self.rank_expert_offsets: Tensor
        self.register_buffer("rank_expert_offsets", offsets, persistent=False)
        self.share_ids: Tensor
        self.register_buffer("share_ids", shares, persistent=False)
        self.statistics: ExpertParallelStatistics | None = None

    def _share_tables(self) -> tuple[Tensor, Tensor]:
        """Offsets over all ranks, and [physical experts, tensor_parallel]: the ids of every expert's shares."""
        sizes = torch.tensor(self.map.experts_per_rank)
        first = sizes.cumsum(0) - sizes
        ranks = sizes.repeat_interleave(self.tensor_parallel)
        offsets = torch.cat([ranks.new_zeros(1), ranks.cumsum(0)]).int()
        group = torch.arange(len(sizes)).repeat_interleave(sizes)
        within = torch.arange(len(group)) - first[group]
        starts = offsets[:-1].view(-1, self.tensor_parallel)[group]
        return offsets, (starts + within[:, None]).int()

    def forward(self, hidden: Tensor) -> MoEOutput:
        """hidden [..., hidden_size], this rank's tokens -> :class:`moe_ext.nn.MoEOutput`. Called by all ranks."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        topk_weights, topk_ids, logits = self.router(rows)
        balance_loss, z_loss, tokens_per_expert = router_losses(
            logits, topk_ids, score_function=self.router.score_function
        )
        self.map = self.map.to(rows.device)
        ids = self.map.physical_ids(topk_ids, first_token=self.exchange.rank)
        travelling_weights = topk_weights
        if self.tensor_parallel > 1:
            shares = self.share_ids[ids.clamp(min=0).long()]
            ids = torch.where(ids[..., None] >= 0, shares, -1).flatten(1)
            travelling_weights = topk_weights.repeat_interleave(self.tensor_parallel, 1)
        # The experts would cast them there: under autocast half the bytes travel.
        travelling = cast_for_product(rows if self.descend is None else self.descend(rows))
        output, dropped = expert_parallel(
            travelling,
            ids,
            travelling_weights,
            self._compute,
            self.exchange,
            self.rank_expert_offsets,
            self.dispatch,
            degree=self.degree,
            backward_degree=self.backward_degree,
        )
        if self.ascend is not None:
            output = self.ascend(output)
        if self.shared is not None:
            output = output + self.shared(rows)
        self.statistics = ExpertParallelStatistics(tokens_per_expert, dropped, topk_ids)
        return MoEOutput(output.view(hidden.shape), balance_loss, z_loss, topk_weights, topk_ids, logits)

    def _compute(self, received: Received) -> Tensor:
        if not self.local_experts:
            return received.hidden * 0  # zero rows, or rows of zeros; it keeps its place in the graph
        parameters = {
            name: parameter.to_local() if isinstance(parameter, DTensor) else parameter
            for name, parameter in self.experts.named_parameters()
        }
        plan = routing_plan(received.topk_ids, len(self.local_experts))
        rows: Tensor = torch.func.functional_call(
            self.experts, parameters, (received.hidden, plan, received.topk_weights)
        )
        return rows

    def _share_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share of one expert's ``gate_up_weight`` or ``down_weight``, along the intermediate size."""
        if self.tensor_parallel == 1:
            return whole
        up = name.startswith("gate_up")
        axis = 0 if up == (self.experts.weight_layout == "enk") else 1
        halves = [whole]
        if (
            up
            and self.experts.gate_up_weight.shape[1 + axis] != self.experts.intermediate_size
            and (self.experts.gate_up_layout == "concatenated")
        ):
            halves = list(whole.chunk(2, axis))
        return torch.cat([half.chunk(self.tensor_parallel, axis)[self.share] for half in halves], axis)

    @torch.no_grad()
    def load_experts(self, whole: dict[str, Tensor]) -> None:
        """Take this rank's experts from the parameters of :class:`moe_ext.nn.Experts` for all of them, by name."""
        for name, local in self._local_parameters().items():
            for place, logical in enumerate(self.local_experts):
                local[place].copy_(self._share_of(name, whole[name][logical]))

    def expert_state_dict(self, prefix: str = "experts") -> dict[str, Tensor]:
        """One entry for every expert on this rank, by its logical id: ``{prefix}.{id}.gate_up_weight`` and so on.

        The tensors are views of the parameters, of the first copy where this rank holds several. Saved by
        torch.distributed.checkpoint they load on any number of ranks with any expert map: load into this dict, then
        call :meth:`load_expert_state_dict` with it. Not with ``tensor_parallel``.
        """
        if self.tensor_parallel > 1:
            raise ValueError("expert_state_dict: an expert is whole on no rank with tensor_parallel > 1")
        return {
            f"{prefix}.{logical}.{name}": local[self.local_experts.index(logical)]
            for name, local in self._local_parameters().items()
            for logical in self.local_experts
        }

    @torch.no_grad()
    def load_expert_state_dict(self, state: dict[str, Tensor], prefix: str = "experts") -> None:
        """Take what :meth:`expert_state_dict` names into all copies on this rank."""
        for name, local in self._local_parameters().items():
            for place, logical in enumerate(self.local_experts):
                local[place].copy_(state[f"{prefix}.{logical}.{name}"])

    def _local_parameters(self) -> dict[str, Tensor]:
        return {
            name: (p.to_local() if isinstance(p, DTensor) else p).detach()
            for name, p in self.experts.named_parameters()
        }

    def distribute_experts(self, mesh: DeviceMesh) -> None:
        """Make the experts' parameters DTensors, sharded over the one-dimensional ``mesh`` along the experts.

        torch.distributed.checkpoint then saves and loads them as whole tensors, on any number of ranks; FSDP2 takes
        them as ``ignored_params`` or shards them over another mesh. Before the optimizer is made.

        Raises:
            ValueError: the expert map has copies, or sizes that DTensor cannot have: each rank but the last ones holds
                ceil(num_experts / num_ranks). :meth:`expert_state_dict` saves any map.
        """
        if self.tensor_parallel > 1 or mesh.ndim != 1 or mesh.size() != self.exchange.num_ranks:
            raise ValueError(
                f"mesh: expected one dimension of {self.exchange.num_ranks} ranks, without tensor_parallel"
            )
        chunks = [len(c) for c in torch.arange(self.num_experts).chunk(self.map.num_ranks)]
        chunks += [0] * (self.map.num_ranks - len(chunks))
        if self.map.experts_per_rank != chunks or self.map.physical_to_logical != list(range(self.num_experts)):
            raise ValueError(
                f"expert_map: expected consecutive experts, {chunks} of them on each rank, for DTensor; got "
                f"{self.map.experts_per_rank}"
            )
        for name, parameter in list(self.experts.named_parameters()):
            size = torch.Size([self.num_experts, *parameter.shape[1:]])
            whole = DTensor.from_local(
                parameter.detach(), mesh, [Shard(0)], run_check=False, shape=size,
                stride=torch.empty(size, device="meta").stride(),
            )  # fmt: skip
            setattr(self.experts, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))

    @torch.no_grad()
    def synchronize_copies(self) -> None:
        """After the backward: every copy of an expert gets the sum of all copies' gradients, the same bits everywhere.

        Called by all ranks; without copies it does nothing.
        """
        if not self.map.replicated:
            return
        index = {logical: i for i, logical in enumerate(self.map.replicated)}
        held = [(place, index[logical]) for place, logical in enumerate(self.local_experts) if logical in index]
        for parameter in self.experts.parameters():
            sums = parameter.new_zeros(len(index), *parameter.shape[1:])
            for place, i in held:
                if parameter.grad is not None:
                    sums[i] += parameter.grad[place]
            sums = self.exchange.sum(sums)
            if held and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            for place, i in held:
                assert parameter.grad is not None
                parameter.grad[place] = sums[i]

    def extra_repr(self) -> str:
        return (
            f"rank {self.exchange.rank} of {self.exchange.num_ranks}, {len(self.local_experts)} of {self.num_experts} "
            f"experts, {self.dispatch.form}, degree={self.degree}"
        )
