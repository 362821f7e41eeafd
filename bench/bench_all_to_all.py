"""What stands around the all-to-all, against masks and index_select in plain torch; no network is involved."""

from __future__ import annotations

import torch
from torch import Tensor

import moe_ext
from moe_ext.reference.all_to_all import quantise_blocks

from .case import Case, Cases, Context
from .shapes import DEEPSEEK_V3, OLMOE, TINY_LAYERS, LayerShape

OPS = ("a2a_plan", "a2a_pack", "a2a_pack_backward", "a2a_unpack", "a2a_combine", "a2a_pack_rows",
       "a2a_unpack_rows")  # fmt: skip
TABLES = ("C",)

NUM_RANKS = 8


def eager_plan(ids: Tensor, num_local: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Counts, and the token of every row in rank-major order."""
    goes = torch.zeros(ids.shape[0], num_ranks, dtype=torch.bool, device=ids.device)
    goes.scatter_(1, ids // num_local, True)
    return goes.sum(0), goes.T.nonzero()[:, 1]


def cases(context: Context) -> Cases:
    shapes = {
        "gpu": [DEEPSEEK_V3.with_tokens(4096)],
        "cpu": [OLMOE.with_tokens(1024)],
        "quick": [TINY_LAYERS[0]._replace(num_experts=8)],
    }
    for shape in shapes[context.profile]:
        for dtype in context.dtypes:
            yield from rank_cases(context, shape, dtype)


def rank_cases(context: Context, shape: LayerShape, dtype: torch.dtype) -> Cases:
    ids = context.topk_ids(shape, "uniform")
    wide_ids, num_local = ids.long(), shape.num_experts // NUM_RANKS
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(shape.num_experts, NUM_RANKS, context.device))
    hidden = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype)
    weights = torch.softmax(context.rows(shape.num_tokens, shape.topk, dtype=torch.float32, seed=2), dim=-1)
    packed = moe_ext.a2a_pack(hidden, ids, weights, plan)
    held = plan.send_to_slot >= 0
    tokens = torch.where(held, plan.send_to_slot, 0).long() // plan.slots_per_token
    sent = int(held.sum())
    row_bytes = shape.hidden_size * hidden.element_size()

    def make(op: str, direction: str, ours, peers, amount: float) -> Case:
        return Case(op, "C", f"{shape.name} T={shape.num_tokens} R={NUM_RANKS}", dtype, "uniform", direction, ours,
                    peers, bytes=amount)  # fmt: skip

    def our_plan() -> tuple[Tensor, Tensor]:
        fresh = moe_ext.a2a_plan(ids, plan.rank_expert_offsets)
        return fresh.send_counts, fresh.send_to_slot[:sent] // fresh.slots_per_token

    def eager_pack(rows: Tensor) -> Tensor:
        return rows.index_select(0, tokens) * held[:, None]

    def eager_combine(rows: Tensor) -> Tensor:
        out = torch.zeros(shape.num_tokens, shape.hidden_size, dtype=torch.float32, device=context.device)
        return out.index_add_(0, tokens[:sent], rows[:sent].float()).to(dtype)

    received, received_ids, _ = (x[:sent] for x in packed)

    def eager_unpack() -> Tensor:
        flat = received_ids.flatten()
        order = torch.argsort(torch.where(flat < 0, num_local, flat), stable=True)
        here = (flat >= 0)[order]
        return received.index_select(0, order // shape.topk) * here[:, None]

    yield make("a2a_plan", "forward", our_plan,
               {"torch nonzero": lambda: eager_plan(wide_ids, num_local, NUM_RANKS)}, ids.numel() * 12.0)  # fmt: skip
    yield make("a2a_pack", "forward", lambda: moe_ext.a2a_pack(hidden, ids, weights, plan)[0],
               {"index_select": lambda: eager_pack(hidden)}, float(row_bytes * (sent + shape.num_tokens)))  # fmt: skip
    yield make("a2a_combine", "forward", lambda: moe_ext.a2a_combine(packed[0], plan),
               {"index_add": lambda: eager_combine(packed[0])},
               float(row_bytes * (sent + shape.num_tokens)))  # fmt: skip
    yield make("a2a_unpack", "forward", lambda: moe_ext.a2a_unpack(received, received_ids, num_local)[0],
               {"torch argsort": eager_unpack}, float(row_bytes * (sent + sent * shape.topk)))  # fmt: skip

    def dequantise(rows: Tensor, scales: Tensor) -> Tensor:
        return (rows.float() * scales.repeat_interleave(128, 1)[:, : shape.hidden_size]).to(dtype)

    def eager_fp8_pack() -> Tensor:
        """Quantise, then gather elements and scales; as bytes, for the gather has no fp8."""
        elements, scales = quantise_blocks(hidden)
        gathered = elements.view(torch.uint8).index_select(0, tokens[:sent])
        return dequantise(gathered.view(torch.float8_e4m3fn), scales.index_select(0, tokens[:sent]))

    def unpacked(rows: Tensor) -> Tensor:
        return moe_ext.a2a_unpack_rows(rows, shape.hidden_size, shape.topk, dtype, payload="fp8")[0]

    sent_rows = moe_ext.a2a_pack_rows(hidden, ids, weights, plan, payload="fp8")[:sent]
    elements, scales = quantise_blocks(received)
    fp8_bytes = float(sent_rows.numel())
    # Both sides end with the dequantised rows, so that they can be compared.
    yield make("a2a_pack_rows", "forward",
               lambda: unpacked(moe_ext.a2a_pack_rows(hidden, ids, weights, plan, payload="fp8")[:sent]),
               {"quantise, index_select": eager_fp8_pack},
               row_bytes * (shape.num_tokens + sent) + 2 * fp8_bytes)  # fmt: skip
    yield make("a2a_unpack_rows", "forward", lambda: unpacked(sent_rows),
               {"dequantise": lambda: dequantise(elements, scales)}, fp8_bytes + row_bytes * sent)  # fmt: skip

    leaf = hidden.clone().requires_grad_()
    grad = context.rows(tokens.numel(), shape.hidden_size, dtype=dtype, seed=5)
    yield make("a2a_pack_backward", "forward+backward",
               lambda: torch.autograd.grad(moe_ext.a2a_pack(leaf, ids, weights, plan)[0], leaf, grad),
               {"index_select": lambda: torch.autograd.grad(eager_pack(leaf), leaf, grad)},
               float(2 * row_bytes * (sent + shape.num_tokens)))  # fmt: skip
