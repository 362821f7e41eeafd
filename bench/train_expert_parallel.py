"""The byte-level language model with its experts spread over ranks, on NCCL where there are GPUs, else on gloo:

    torchrun --nproc-per-node 4 -m bench.train_expert_parallel --steps 100 --checkpoint ckpt
    torchrun --nproc-per-node 2 -m bench.train_expert_parallel --steps 50 --checkpoint ckpt --resume

Every step takes the same batch whatever the number of ranks, each rank its share of it. A checkpoint holds parameters
and the optimizer's state as whole tensors (torch.distributed.checkpoint), so that another number of ranks goes on.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from moe_ext.distributed import DispatchOptions, FlatExchange
from moe_ext.nn import ExpertParallelMoE

from .language_model import BATCH, NUM_EXPERTS, TOPK, WIDTH, LanguageModel, batches, read_text


class Progress(NamedTuple):
    """What :func:`train` returns on every rank."""

    losses: list[float]
    """Cross entropy of the whole batch in nats per byte, one for each step of this run."""
    next_step: int


def build(mesh: DeviceMesh, options: DispatchOptions, degree: int) -> LanguageModel:
    """The same model on any number of ranks: every layer of experts is cut from that of a whole one."""
    torch.manual_seed(0)
    model = LanguageModel()
    exchange = FlatExchange(mesh.get_group())
    for block in model.blocks:
        whole = block.moe
        spread = ExpertParallelMoE(
            WIDTH, WIDTH, NUM_EXPERTS, TOPK, exchange, dispatch=options, degree=degree, router={"renormalize": True}
        )
        spread.router.load_state_dict(whole.router.state_dict())
        spread.load_experts(dict(whole.experts.named_parameters()))
        block.moe = spread
    return model


def train(
    mesh: DeviceMesh,
    steps: int,
    folder: Path | None = None,
    *,
    resume: bool = False,
    options: DispatchOptions | None = None,
    degree: int = 1,
) -> Progress:
    """Train for ``steps`` steps, from the checkpoint in ``folder`` if asked, and leave one there. By all ranks."""
    rank, num_ranks = mesh.get_local_rank(), mesh.size()
    if BATCH % num_ranks:
        raise ValueError(f"ranks: expected a divisor of the batch of {BATCH}, got {num_ranks}")
    device = torch.device(mesh.device_type, rank) if mesh.device_type == "cuda" else torch.device("cpu")
    model = build(mesh, options or DispatchOptions(), degree).to(device)
    for block in model.blocks:
        block.moe.distribute_experts(mesh)
    expert_parameters = {id(p) for block in model.blocks for p in block.moe.experts.parameters()}
    # One parameter at a time: those of the experts are DTensors, which cannot share a fused step with the others.
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, foreach=False)
    first_step = 0
    if resume:
        state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        state["next_step"] = torch.zeros((), dtype=torch.int64)
        checkpoint.load(state, checkpoint_id=folder, process_group=mesh.get_group())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first_step = int(state["next_step"])

    text = read_text()
    source = batches(text[: text.numel() * 9 // 10], torch.Generator().manual_seed(0))
    for _ in range(first_step):
        next(source)
    losses: list[Tensor] = []
    for _ in range(steps):
        inputs, targets = (x.chunk(num_ranks)[rank].to(device) for x in next(source))
        logits, router_loss = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + router_loss).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            if id(parameter) not in expert_parameters:
                dist.all_reduce(parameter.grad, group=mesh.get_group())
            parameter.grad /= num_ranks  # an expert's gradient is a sum over the tokens of all ranks already
        optimizer.step()
        mean = loss.detach() / num_ranks
        dist.all_reduce(mean, group=mesh.get_group())
        losses.append(mean)
    if folder is not None:
        parameters, moments = get_state_dict(model, optimizer)
        state = {"model": parameters, "optimizer": moments, "next_step": torch.tensor(first_step + steps)}
        with warnings.catch_warnings():
            # On resuming, the checkpoint that was read is the one to replace.
            warnings.filterwarnings("ignore", "Detected an existing checkpoint")
            checkpoint.save(state, checkpoint_id=folder, process_group=mesh.get_group())
    return Progress(torch.stack(losses).tolist() if losses else [], first_step + steps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun -m bench.train_expert_parallel", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, help="folder to write to, and to read from with --resume")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--form", choices=["dedup", "slot"], default="dedup")
    parser.add_argument("--degree", type=int, default=1, help="chunks of the pipeline")
    options = parser.parse_args()
    if options.resume and not options.checkpoint:
        parser.error("--resume: expected --checkpoint FOLDER beside it")
    if "RANK" not in os.environ:
        parser.error("run it under torchrun, e.g. torchrun --nproc-per-node 4 -m bench.train_expert_parallel")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
    progress = train(
        mesh,
        options.steps,
        options.checkpoint,
        resume=options.resume,
        options=DispatchOptions(options.form),
        degree=options.degree,
    )
    if dist.get_rank() == 0 and progress.losses:
        print(
            f"{mesh.size()} ranks, steps {progress.next_step - options.steps} to {progress.next_step}: "
            f"loss {progress.losses[0]:.3f} to {progress.losses[-1]:.3f} nats per byte"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
