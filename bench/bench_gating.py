"""Gates and router losses, against the formulas that models write in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import moe_ext

from .case import Case, Cases, Context
from .shapes import ROUTERS

OPS = (
    "topk_gating",
    "topk_gating_backward",
    "topk_gating_general",
    "topk_gating_general_backward",
    "router_losses",
    "router_losses_backward",
    "expert_choice_gating",
    "expert_choice_gating_backward",
)
TABLES = ("C",)

TOKENS = {"gpu": (4096, 8192), "cpu": (2048,), "quick": (64,)}


def eager_softmax_gate(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(topk, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def eager_deepseek_gate(logits: Tensor, bias: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid()
    biased = scores + bias
    group_scores = biased.view(logits.shape[0], 8, -1).topk(2, dim=-1)[0].sum(-1)
    kept = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(4, dim=-1)[1], 1).bool()
    ids = biased.masked_fill(~kept.repeat_interleave(logits.shape[1] // 8, dim=1), float("-inf")).topk(topk, dim=-1)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * 2.5, ids


def eager_losses(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    num_experts, counts = logits.shape[1], torch.bincount(ids.flatten(), minlength=logits.shape[1])
    mean = torch.softmax(logits.float(), dim=-1).mean(0)
    balance = (counts * mean).sum() * num_experts / ids.numel()
    return balance, torch.logsumexp(logits.float(), dim=-1).square().mean()


def eager_dynamic_gate(
    logits: Tensor, forced_ids: Tensor, zero_weight_experts: Tensor, topk: int, top_p: float
) -> Tensor:
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(topk, dim=-1)
    absent = ~(ids == forced_ids[:, None]).any(1)
    ids = torch.cat([ids[:, :-1], torch.where(absent, forced_ids, ids[:, -1])[:, None]], dim=1)
    weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
    kept = (weights.cumsum(1) - weights < top_p) | (ids == forced_ids[:, None])
    weights = torch.where(kept & ~zero_weight_experts[ids], weights, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)


def eager_sequence_loss(logits: Tensor, ids: Tensor, num_sequences: int) -> Tensor:
    num_experts, picks = logits.shape[1], torch.nn.functional.one_hot(ids, logits.shape[1])
    load = picks.view(num_sequences, -1, num_experts).sum(1) * (num_experts * num_sequences / ids.numel())
    mean = torch.softmax(logits.float(), dim=-1).view(num_sequences, -1, num_experts).mean(1)
    return (load * mean).sum(1).mean()


def eager_expert_choice(logits: Tensor, capacity: int) -> Tensor:
    scores = torch.softmax(logits.float(), dim=-1)
    weights, tokens = scores.T.topk(capacity, dim=-1)
    return torch.zeros_like(scores).T.scatter(1, tokens, weights).T


def cases(context: Context) -> Cases:
    routers = ROUTERS[:2] if context.profile != "gpu" else ROUTERS
    for num_tokens in TOKENS[context.profile]:
        for name, num_experts, topk in routers:
            logits = context.rows(num_tokens, num_experts, dtype=torch.float32)
            label = f"{name} T={num_tokens}"
            yield from context.attempt(f"gates of {label}", gate_cases(context, label, logits, topk))


def gate_cases(context: Context, name: str, logits: Tensor, topk: int) -> Cases:
    num_tokens, num_experts = logits.shape
    logit_bytes, slot_bytes = logits.numel() * 4, num_tokens * topk * 8

    def make(op: str, variant: str, direction: str, ours, peers, bytes_moved: float) -> Case:
        return Case(op, "C", f"{name} {variant}", torch.float32, "none", direction, ours, peers, bytes=bytes_moved)

    bias = context.rows(num_experts, dtype=torch.float32, scale=0.1, seed=1)
    leaf = logits.clone().requires_grad_()
    grad = context.rows(num_tokens, topk, dtype=torch.float32, seed=2)

    def softmax_gate(x: Tensor) -> Tensor:
        return moe_ext.topk_gating(x, topk, renormalize=True)[0]

    def deepseek_gate() -> Tensor:
        return moe_ext.topk_gating(
            logits, topk, score_function="sigmoid", selection_bias=bias, num_groups=8, topk_groups=4, renormalize=True,
            scale=2.5,
        )[0].sum(1)  # fmt: skip

    yield make("topk_gating", "softmax", "forward", lambda: softmax_gate(logits),
               {"torch eager": lambda: eager_softmax_gate(logits, topk)[0]}, logit_bytes + slot_bytes)  # fmt: skip
    yield make("topk_gating", "groups+bias", "forward", deepseek_gate,
               {"torch eager": lambda: eager_deepseek_gate(logits, bias, topk)[0].sum(1)},
               logit_bytes + slot_bytes)  # fmt: skip
    forced_ids = torch.arange(num_tokens, device=logits.device) % num_experts
    nothing = torch.arange(num_experts, device=logits.device) % 8 == 7

    def dynamic_gate(x: Tensor) -> Tensor:
        return moe_ext.topk_gating(
            x, topk, forced_ids=forced_ids, top_p=0.5, zero_weight_experts=nothing, renormalize=True
        )[0]

    yield make("topk_gating_general", "forced+top_p+zero", "forward", lambda: dynamic_gate(logits),
               {"torch eager": lambda: eager_dynamic_gate(logits, forced_ids, nothing, topk, 0.5)},
               logit_bytes + slot_bytes)  # fmt: skip
    yield make("topk_gating_general_backward", "forced+top_p+zero", "forward+backward",
               lambda: torch.autograd.grad(dynamic_gate(leaf), leaf, grad),
               {"torch eager": lambda: torch.autograd.grad(
                   eager_dynamic_gate(leaf, forced_ids, nothing, topk, 0.5), leaf, grad)},
               3 * logit_bytes + 2 * slot_bytes)  # fmt: skip
    yield make("topk_gating_backward", "softmax", "forward+backward",
               lambda: torch.autograd.grad(softmax_gate(leaf), leaf, grad),
               {"torch eager": lambda: torch.autograd.grad(eager_softmax_gate(leaf, topk)[0], leaf, grad)},
               3 * logit_bytes + 2 * slot_bytes)  # fmt: skip

    ids = moe_ext.topk_gating(logits, topk)[1]
    wide_ids = ids.long()
    yield make("router_losses", "softmax", "forward", lambda: moe_ext.router_losses(logits, ids)[:2],
               {"torch eager": lambda: eager_losses(logits, wide_ids)}, logit_bytes + slot_bytes / 2)  # fmt: skip
    yield make("router_losses", "sequences", "forward",
               lambda: moe_ext.router_losses(logits, ids, num_sequences=4)[0],
               {"torch eager": lambda: eager_sequence_loss(logits, wide_ids, 4)},
               logit_bytes + slot_bytes / 2)  # fmt: skip
    yield make("router_losses_backward", "softmax", "forward+backward",
               lambda: torch.autograd.grad(sum(moe_ext.router_losses(leaf, ids)[:2]), leaf),
               {"torch eager": lambda: torch.autograd.grad(sum(eager_losses(leaf, wide_ids)), leaf)},
               3 * logit_bytes + slot_bytes / 2)  # fmt: skip

    capacity = num_tokens * topk // num_experts
    dense_grad = context.rows(num_tokens, num_experts, dtype=torch.float32, seed=3)
    yield make("expert_choice_gating", "softmax", "forward",
               lambda: moe_ext.expert_choice_gating(logits, capacity)[0],
               {"torch eager": lambda: eager_expert_choice(logits, capacity)}, 3 * logit_bytes)  # fmt: skip
    yield make("expert_choice_gating_backward", "softmax", "forward+backward",
               lambda: torch.autograd.grad(moe_ext.expert_choice_gating(leaf, capacity)[0], leaf, dense_grad),
               {"torch eager": lambda: torch.autograd.grad(eager_expert_choice(leaf, capacity), leaf, dense_grad)},
               6 * logit_bytes)  # fmt: skip
