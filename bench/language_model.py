"""A byte-level mixture-of-experts language model, trained for a minute on text found on any machine.

It gives the benchmark routing that a trained router chose, and shows that training works: its loss falls, and falls as
it does on the reference ops.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext.nn import MoELayer
from moe_ext.nn.backend import Backend

NUM_LAYERS, WIDTH, HEADS, CONTEXT = 2, 128, 4, 128
NUM_EXPERTS, TOPK = 16, 2
BATCH = 16
BALANCE, Z = 0.01, 0.001  # coefficients of the losses
TEXT_BYTES = 2_000_000


def read_text(num_bytes: int = TEXT_BYTES) -> Tensor:
    """[num_bytes] uint8: the sources of Python's standard library, in order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = b"".join(file.read_bytes() for file in files)[:num_bytes]
    if len(data) < CONTEXT * 100:
        raise RuntimeError("too little text: the sources of Python's standard library are not installed")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Block(nn.Module):
    """Causal attention, then a mixture of experts."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = MoELayer(WIDTH, WIDTH, NUM_EXPERTS, TOPK, router={"renormalize": True}, backend=backend)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        output = self.moe(self.moe_norm(x))
        return x + output.hidden, BALANCE * output.balance_loss + Z * output.z_loss


class LanguageModel(nn.Module):
    """Bytes [batch, length] -> logits [batch, length, 256], and the routers' losses."""

    def __init__(self, backend: Backend = "kernels") -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(backend) for _ in range(NUM_LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        router_loss = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            router_loss = router_loss + loss
        return self.head(self.norm(x)), router_loss


class Training(NamedTuple):
    """What :func:`train` leaves."""

    losses: list[float]
    """Cross entropy in nats per byte, one for each step, without the routers' losses."""
    model: LanguageModel
    held_out: Tensor
    """[n] uint8: text that was not trained on."""


def batches(text: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        starts = torch.randint(0, text.numel() - CONTEXT - 1, (BATCH,), generator=generator)
        window = torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()]).long()
        yield window[:, :-1], window[:, 1:]


def train_steps(steps: int, backend: Backend, device: str, seed: int, training: list[Training]) -> Iterator[int]:
    """Trains, yielding after each step for whoever shows progress; leaves a Training in ``training``."""
    text = read_text()
    split = text.numel() * 9 // 10
    torch.manual_seed(seed)
    model = LanguageModel(backend).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    source = batches(text[:split], torch.Generator().manual_seed(seed))
    losses = []
    for step in range(steps):
        inputs, targets = (x.to(device) for x in next(source))
        logits, router_loss = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + router_loss).backward()
        optimizer.step()
        losses.append(loss.detach())
        yield step
    training.append(Training(torch.stack(losses).tolist(), model, text[split:]))


def train(steps: int, backend: Backend = "kernels", device: str = "cpu", seed: int = 0) -> Training:
    """Train from ``seed`` for ``steps`` steps with Adam."""
    done: list[Training] = []
    for _ in train_steps(steps, backend, device, seed, done):
        pass
    return done[0]


@torch.no_grad()
def record_routing(training: Training, num_tokens: int, device: str = "cpu") -> Tensor:
    """[num_tokens, topk] int32: what the last layer's router chose on held-out text."""
    windows = training.held_out[: training.held_out.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    chosen: list[Tensor] = []
    while sum(ids.shape[0] for ids in chosen) < num_tokens:
        first = len(chosen) * BATCH % max(1, windows.shape[0] - BATCH)
        training.model(windows[first : first + BATCH].to(device))
        statistics = training.model.blocks[-1].moe.statistics
        assert statistics is not None
        chosen.append(statistics.topk_ids.cpu())
    return torch.cat(chosen)[:num_tokens]
