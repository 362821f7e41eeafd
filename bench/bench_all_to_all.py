"""What stands around the all-to-all, against masks and index_select in plain torch; no network is involved."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

import moe_ext
from moe_ext.packed_row import PackedRow, Payload
from moe_ext.plan_types import A2APlan
from moe_ext.reference.all_to_all import quantise_blocks

from .case import Case, Cases, Context
from .shapes import DEEPSEEK_V3, OLMOE, QWEN3_30B, TINY_LAYERS, LayerShape

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
        "gpu": [DEEPSEEK_V3.with_tokens(4096), QWEN3_30B.with_tokens(8192)],
        "cpu": [OLMOE.with_tokens(1024)],
        "quick": [TINY_LAYERS[0]._replace(num_experts=8)],
    }
    for shape in shapes[context.profile]:
        for dtype in context.dtypes:
            label = f"all-to-all of {shape.name}"
            yield from context.attempt(label, rank_cases(context, shape, dtype))
            for payload in ("native", "fp8"):
                yield from context.attempt(f"{label} {payload}", row_cases(context, shape, dtype, payload))


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

    leaf = hidden.clone().requires_grad_()
    grad = context.rows(tokens.numel(), shape.hidden_size, dtype=dtype, seed=5)
    yield make("a2a_pack_backward", "forward+backward",
               lambda: torch.autograd.grad(moe_ext.a2a_pack(leaf, ids, weights, plan)[0], leaf, grad),
               {"index_select": lambda: torch.autograd.grad(eager_pack(leaf), leaf, grad)},
               float(2 * row_bytes * (sent + shape.num_tokens)))  # fmt: skip


def parts_of(rows: Tensor, layout: PackedRow, payload_bytes: int, topk: int) -> tuple[Tensor, ...]:
    """Payload, weights, scales and ids of packed rows: views of their bytes."""
    sizes = {0: payload_bytes, layout.weights_at: 4 * topk, layout.scales_at: 4 * layout.num_scales,
             layout.ids_at: 4 * topk}  # fmt: skip
    return tuple(rows[:, at : at + size] for at, size in sizes.items() if size)


def as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def eager_parts(
    hidden: Tensor, ids: Tensor, weights: Tensor, plan: A2APlan, num_local: int, sent: int,
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What a packed row holds, as separate tensors: the rows quantised if asked, then everything gathered."""
    tokens = plan.send_to_slot[:sent].long() // plan.slots_per_token
    rank = torch.searchsorted(plan.send_offsets[1:], torch.arange(sent, device=ids.device), right=True)
    local = ids.index_select(0, tokens) - rank[:, None] * num_local
    here = (local >= 0) & (local < num_local)
    if quantise is None:
        parts = [as_bytes(hidden.index_select(0, tokens))]
    else:
        elements, scales = quantise(hidden)
        # As bytes, for the gather has no fp8.
        parts = [as_bytes(elements).index_select(0, tokens), as_bytes(scales.index_select(0, tokens))]
    parts.insert(1, as_bytes(torch.where(here, weights.index_select(0, tokens), 0.0)))
    return (*parts, as_bytes(torch.where(here, local, -1).int()))


def row_cases(context: Context, shape: LayerShape, dtype: torch.dtype, payload: Payload) -> Cases:
    """Rows of bytes, into one and apart, against the same bytes as separate tensors."""
    ids, num_local = context.topk_ids(shape, "uniform"), shape.num_experts // NUM_RANKS
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(shape.num_experts, NUM_RANKS, context.device))
    hidden = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype)
    weights = torch.softmax(context.rows(shape.num_tokens, shape.topk, dtype=torch.float32, seed=2), dim=-1)
    sent, native_bytes = int(plan.send_counts.sum()), shape.hidden_size * hidden.element_size()
    layout = PackedRow.of(shape.hidden_size, shape.topk, dtype, payload, weighted=True)
    packed = moe_ext.a2a_pack_rows(hidden, ids, weights, plan, payload=payload)[:sent]
    payload_bytes = native_bytes if payload == "native" else shape.hidden_size
    exact = plan._replace(send_to_slot=plan.send_to_slot[:sent])  # without the tail, which a peer does not write

    def make(op: str, ours, peers, amount: float, skipped: dict[str, str] | None = None) -> Case:
        return Case(op, "C", f"{shape.name} {payload} T={shape.num_tokens} R={NUM_RANKS}", dtype, "uniform", "forward",
                    ours, peers, skipped_peers=skipped or {}, bytes=amount)  # fmt: skip

    def pack() -> tuple[Tensor, ...]:
        rows = moe_ext.a2a_pack_rows(hidden, ids, weights, exact, payload=payload)
        return parts_of(rows, layout, payload_bytes, shape.topk)

    def pack_by(quantise: Callable[[Tensor], tuple[Tensor, Tensor]] | None) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: eager_parts(hidden, ids, weights, plan, num_local, sent, quantise)

    peers, skipped = {"index_select": pack_by(None)}, {}
    if payload == "fp8":
        peers = {"quantise, index_select": pack_by(quantise_blocks)}
        compiled = "compiled quantise, index_select"
        if context.device != "cpu" and find_spec("triton"):
            peers[compiled] = pack_by(torch.compile(quantise_blocks))
        else:
            skipped[compiled] = "on a GPU, with triton"
    yield make("a2a_pack_rows", pack, peers, float(shape.num_tokens * native_bytes + packed.numel()), skipped)

    def eager_unpack() -> tuple[Tensor, Tensor, Tensor]:
        parts = [part.contiguous() for part in parts_of(packed, layout, payload_bytes, shape.topk)]
        if payload == "native":
            rows = parts[0].view(dtype)
        else:
            scales = parts[2].view(torch.float32).repeat_interleave(128, 1)[:, : shape.hidden_size]
            rows = (parts[0].view(torch.float8_e4m3fn).float() * scales).to(dtype)
        return rows, parts[-1].view(torch.int32), parts[1].view(torch.float32)

    yield make("a2a_unpack_rows",
               lambda: moe_ext.a2a_unpack_rows(packed, shape.hidden_size, shape.topk, dtype, payload=payload),
               {"slices": eager_unpack}, float(packed.numel() + sent * native_bytes))  # fmt: skip
