"""A layer under FSDP2 and DDP, two processes: the losses and gradients of one process.

Over gloo on the CPU; over NCCL on as many GPUs as there are, up to two, so with one on one rank.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cases import make_rows
from compare import relative_error
from moe_ext.nn import MoELayer

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Block(nn.Module):
    """A norm and a layer, as a model would hold them; returns what a loss is made of."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        # 7 experts: over two processes the shards are uneven.
        self.moe = MoELayer(16, 12, 7, 2, shared_intermediate_size=20, router={"selection_bias": True})
        self.to(device)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.moe(self.norm(hidden))
        return hidden + output.hidden, output.balance_loss, output.z_loss


def rows_of(rank: int, device: str) -> Tensor:
    return make_rows(20 + rank, 16, dtype=torch.float32, device=device, seed=rank)  # not the same number everywhere


def loss_of(block: nn.Module, rank: int, device: str) -> Tensor:
    hidden = rows_of(rank, device)
    output, balance_loss, z_loss = block(hidden)
    return output.float().square().mean() + 0.1 * balance_loss + 0.01 * z_loss


def single_process(dtype: torch.dtype, device: str) -> tuple[list[float], dict[str, Tensor], Block]:
    """Losses, the mean gradient in fp32 of parameters cast to ``dtype``, and the block after one step of SGD."""
    block, world_size = Block(device), dist.get_world_size()
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in block.named_parameters()}
    buffers = {name: b.to(dtype) for name, b in block.named_buffers()}
    losses = []
    total = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
    for rank in range(world_size):
        hidden = rows_of(rank, device).to(dtype)
        output, balance_loss, z_loss = torch.func.functional_call(block, (parameters, buffers), (hidden,))
        loss = output.float().square().mean() + 0.1 * balance_loss + 0.01 * z_loss
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad.float() / world_size
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter -= 0.1 * total[name]
    return losses, total, block


def check(block: nn.Module, rank: int, device: str, dtype: torch.dtype, tolerance: float = 1e-6) -> None:
    losses, grads, stepped = single_process(dtype, device)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    loss = loss_of(block, rank, device)
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


def run_fsdp(rank: int, device: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for dtype in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        # The router's weights are float32 on purpose: where the policy casts inputs too, they lose their low bits.
        for inner, tolerance in ((replace(policy, cast_forward_inputs=False), 1e-6), (policy, 2e-2)):
            block = Block(device)
            fully_shard(block.moe.experts, mesh=mesh, mp_policy=inner)
            fully_shard(block, mesh=mesh, mp_policy=policy)
            check(block, rank, device, dtype, tolerance)


def run_ddp(rank: int, device: str) -> None:
    check(nn.parallel.DistributedDataParallel(Block(device)), rank, device, torch.float32)
    # Without the losses the router still gets its gradient, through the weights: no parameter is unused.
    block = nn.parallel.DistributedDataParallel(Block(device))
    block(rows_of(rank, device))[0].square().mean().backward()
    assert all(p.grad is not None for p in block.parameters())


def run(rank: int, store: str, device: str, world_size: int) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(BACKENDS[device], init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        run_ddp(rank, device)
        run_fsdp(rank, device)
    finally:
        dist.destroy_process_group()
    # DDP keeps the group alive, and its threads may still drop tensors: at the interpreter's end that aborts.
    os._exit(0)


def test_two_processes_equal_one(device, tmp_path: Path):
    world_size = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    torch.multiprocessing.spawn(run, (str(tmp_path / "store"), device, world_size), nprocs=world_size)
