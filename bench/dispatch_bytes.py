"""What an all-to-all moves for published models: counted on the real plan and rows, beside the closed form.

Times are simulated: ``latency * (ranks - 1) + bytes / bandwidth`` out and back, from the stated inputs alone.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import torch

import moe_ext

from .routing import make_topk_ids
from .shapes import DEEPSEEK_V3, QWEN3_30B, LayerShape

RANKS = (8, 16, 32, 64)
RANKS_PER_NODE = 8
MODELS = (DEEPSEEK_V3, QWEN3_30B)


class Link(NamedTuple):
    """What the simulated times are made of."""

    num_tokens: int
    """Of each rank."""
    latency_us: float
    """Of each message."""
    bandwidth: float
    """GB/s in and out of a rank."""
    bottleneck: int
    """BigMac: rows travel in hidden_size / bottleneck."""


class Way(NamedTuple):
    """How rows travel."""

    name: str
    dedup: bool
    payload: str
    narrow: bool = False


WAYS = (
    Way("slot-wise", False, "native"),
    Way("deduplicated", True, "native"),
    Way("deduplicated, fp8 out", True, "fp8"),
    Way("BigMac, deduplicated", True, "native", narrow=True),
)


def expected_ranks(num_experts: int, num_ranks: int, topk: int) -> float:
    """Distinct ranks of a token whose experts are drawn without preference."""
    return num_ranks * (1 - comb(num_experts - num_experts // num_ranks, topk) / comb(num_experts, topk))


def bytes_out(shape: LayerShape, way: Way, link: Link) -> int:
    """Of one row that :func:`moe_ext.a2a_pack_rows` makes."""
    width = shape.hidden_size // (link.bottleneck if way.narrow else 1)
    ids = torch.zeros(1, shape.topk if way.dedup else 1, dtype=torch.int32)
    weights = torch.ones(1, shape.topk) if way.dedup else None
    plan = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(shape.num_experts, 8))
    hidden = torch.zeros(1, width, dtype=torch.bfloat16)
    return moe_ext.a2a_pack_rows(hidden, ids, weights, plan, payload=way.payload).shape[1]


def row(shape: LayerShape, num_ranks: int, way: Way, link: Link) -> list[str]:
    """One line of the table: of uniform routing, counted on the plans of all ranks."""
    ids = make_topk_ids(link.num_tokens, shape.num_experts, shape.topk, "uniform", seed=0)
    owners = moe_ext.even_rank_expert_offsets(shape.num_experts, num_ranks)
    plan = moe_ext.a2a_plan(ids if way.dedup else ids.view(-1, 1), owners)
    counted = plan.send_counts.sum().item() / link.num_tokens
    expected = expected_ranks(shape.num_experts, num_ranks, shape.topk) if way.dedup else float(shape.topk)
    width = shape.hidden_size // (link.bottleneck if way.narrow else 1)
    out, back = bytes_out(shape, way, link), 2 * width  # sums come back in bfloat16, without metadata
    moved = plan.send_counts[1:].sum().item() * (out + back)  # the rows of rank 0 for itself stay
    seconds = 2 * (num_ranks - 1) * link.latency_us * 1e-6 + moved / (link.bandwidth * 1e9)
    return [
        shape.name, str(num_ranks), way.name, f"{expected:.2f}", f"{counted:.2f}", f"{counted * out / 1024:.1f}",
        f"{counted * back / 1024:.1f}", f"{1e3 * seconds:.2f}",
    ]  # fmt: skip


class Crossing(NamedTuple):
    """Rows that leave the node, for each token of a rank in the first one."""

    expected: float
    counted: float
    kib: float
    """Out."""


def crossings(shape: LayerShape, num_ranks: int, link: Link) -> dict[str, Crossing]:
    """By what is deduplicated: nothing, per rank, per node. Uniform routing, counted on the plans."""
    ids = make_topk_ids(link.num_tokens, shape.num_experts, shape.topk, "uniform", seed=0)
    owners = moe_ext.even_rank_expert_offsets(shape.num_experts, num_ranks)
    num_nodes, elsewhere = num_ranks // RANKS_PER_NODE, 1 - RANKS_PER_NODE / num_ranks
    per_rank, per_node = (expected_ranks(shape.num_experts, places, shape.topk) for places in (num_ranks, num_nodes))
    plans = {
        "slot": (moe_ext.a2a_plan(ids.view(-1, 1), owners), RANKS_PER_NODE, float(shape.topk)),
        "dedup": (moe_ext.a2a_plan(ids, owners), RANKS_PER_NODE, per_rank),
        "node": (moe_ext.a2a_plan(ids, owners[::RANKS_PER_NODE].contiguous()), 1, per_node),
    }
    rows = {}
    for form, (plan, own, expected) in plans.items():
        counted = plan.send_counts[own:].sum().item() / link.num_tokens
        row_bytes = bytes_out(shape, Way(form, form != "slot", "native"), link)
        rows[form] = Crossing(expected * elsewhere, counted, counted * row_bytes / 1024)
    return rows


def crossing_lines(link: Link) -> list[str]:
    """The second table: what crosses from node to node."""
    forms = ("slot", "dedup", "node")
    columns = ["model", "ranks", *(f"{what}, {form}" for form in forms for what in ("rows per token", "KiB per token"))]
    lines = [
        "",
        f"What leaves a node of {RANKS_PER_NODE} ranks, by the form of dispatch: `node` sends a token once to each "
        "other node, `D(N) (N - 1) / N` rows for N nodes, and fans it out there. Rows are expected / counted.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for shape in MODELS:
        for num_ranks in RANKS[1:]:
            found = crossings(shape, num_ranks, link)
            cells = [f"{c.expected:.2f} / {c.counted:.2f} | {c.kib:.1f}" for c in (found[form] for form in forms)]
            lines.append(f"| {shape.name} | {num_ranks} | {' | '.join(cells)} |")
    return lines


def markdown(link: Link) -> str:
    """Both tables, for both models at 8 to 64 ranks."""
    columns = [
        "model", "ranks", "rows travel", "rows per token, expected", "counted", "KiB per token out",
        "KiB per token back", "simulated ms",
    ]  # fmt: skip
    lines = [
        f"Uniform routing of {link.num_tokens} bfloat16 tokens per rank. Rows are counted on the plan, bytes on packed "
        "rows with ids, weights and scales; expected is the closed form `R (1 - C(E - E/R, K) / C(E, K))`.",
        f"**Simulated** is both ways at {link.latency_us:g} us per message and {link.bandwidth:g} GB/s per rank, with "
        f"nothing else going on; BigMac's rows are 1/{link.bottleneck} as wide.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]  # fmt: skip
    for shape in MODELS:
        for num_ranks in RANKS:
            lines += [f"| {' | '.join(row(shape, num_ranks, way, link))} |" for way in WAYS]
    return "\n".join(lines + crossing_lines(link)) + "\n"
