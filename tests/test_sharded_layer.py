"""A layer under FSDP2 and DDP, two processes over gloo: the losses and gradients of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cases import make_rows
from compare import relative_error
from moe_ext.nn import MoELayer

WORLD_SIZE = 2


class Block(nn.Module):
    """A norm and a layer, as a model would hold them; returns what a loss is made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        # 7 experts: over two processes the shards are uneven.
        self.moe = MoELayer(16, 12, 7, 2, shared_intermediate_size=20, router={"selection_bias": True})

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.moe(self.norm(hidden))
        return hidden + output.hidden, output.balance_loss, output.z_loss


def loss_of(block: nn.Module, rank: int) -> Tensor:
    hidden = make_rows(20 + rank, 16, dtype=torch.float32, seed=rank)  # not the same number of tokens everywhere
    output, balance_loss, z_loss = block(hidden)
    return output.float().square().mean() + 0.1 * balance_loss + 0.01 * z_loss


def single_process(dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor], Block]:
    """Losses, the mean gradient in fp32 of parameters cast to ``dtype``, and the block after one step of SGD."""
    block = Block()
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in block.named_parameters()}
    buffers = {name: b.to(dtype) for name, b in block.named_buffers()}
    losses = []
    total = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
    for rank in range(WORLD_SIZE):
        hidden = make_rows(20 + rank, 16, dtype=torch.float32, seed=rank).to(dtype)
        output, balance_loss, z_loss = torch.func.functional_call(block, (parameters, buffers), (hidden,))
        loss = output.float().square().mean() + 0.1 * balance_loss + 0.01 * z_loss
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad.float() / WORLD_SIZE
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter -= 0.1 * total[name]
    return losses, total, block


def check(block: nn.Module, rank: int, dtype: torch.dtype, tolerance: float = 1e-6) -> None:
    losses, grads, stepped = single_process(dtype)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    loss = loss_of(block, rank)
    loss.backward()
    assert loss.item() == pytest.approx(losses[rank], rel=tolerance)
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        found = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert found.dtype == torch.float32
        assert relative_error(found, grads[name.removeprefix("module.")]) < tolerance, name
    optimizer.step()
    for (name, after), expected in zip(block.named_parameters(), stepped.parameters(), strict=True):
        found = after.full_tensor() if hasattr(after, "full_tensor") else after
        assert relative_error(found, expected) < tolerance, name


def run_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for dtype in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        # The router's weights are float32 on purpose: where the policy casts inputs too, they lose their low bits.
        for inner, tolerance in ((replace(policy, cast_forward_inputs=False), 1e-6), (policy, 2e-2)):
            block = Block()
            fully_shard(block.moe.experts, mesh=mesh, mp_policy=inner)
            fully_shard(block, mesh=mesh, mp_policy=policy)
            check(block, rank, dtype, tolerance)


def run_ddp(rank: int) -> None:
    check(nn.parallel.DistributedDataParallel(Block()), rank, torch.float32)
    # Without the losses the router still gets its gradient, through the weights: no parameter is unused.
    block = nn.parallel.DistributedDataParallel(Block())
    block(make_rows(20, 16, dtype=torch.float32, seed=rank))[0].square().mean().backward()
    assert all(p.grad is not None for p in block.parameters())


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    try:
        run_ddp(rank)
        run_fsdp(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    torch.multiprocessing.spawn(run, (str(tmp_path / "store"),), nprocs=WORLD_SIZE)
