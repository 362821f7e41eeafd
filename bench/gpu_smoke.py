"""Every op once, on small odd shapes: what runs first on a new GPU, and under compute-sanitizer.

``python -m bench.gpu_smoke`` runs every piece, ``python -m bench.gpu_smoke PIECE...`` some, one line as each ends: the
piece that hangs or faults is the one after the last line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import moe_ext

from .gpu_names import LAYERS, PRODUCTS
from .tune_tiles import forced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests run the pieces where there is no GPU
# Empty experts, less than a tile, a tile's edge, one row past it, several tiles.
TOKENS_PER_EXPERT = (0, 5, 64, 129, 0, 300, 128)
MAP_TILE = 16  # rows and columns behind one character of a map
MAX_MAP = 24  # characters along either axis
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def run_layer(dtype: torch.dtype, num_tokens: int, hidden_size: int, intermediate_size: int) -> None:
    """Gate, losses, plan, permutation, products, MLP and all-to-all packing."""
    num_experts, topk = 7, 3
    torch.manual_seed(0)

    def rows(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=DEVICE).to(dtype).requires_grad_()

    logits = torch.randn(num_tokens, num_experts, device=DEVICE, requires_grad=True)
    hidden = rows(num_tokens, hidden_size)
    gate_up, down = (
        rows(num_experts, 2 * intermediate_size, hidden_size),
        rows(num_experts, hidden_size, intermediate_size),
    )
    gate_up_bias, down_bias = rows(num_experts, 2 * intermediate_size), rows(num_experts, hidden_size)

    weights, ids = moe_ext.topk_gating(logits, topk, renormalize=True)
    balance, z, _ = moe_ext.router_losses(logits, ids)
    chosen, _ = moe_ext.expert_choice_gating(logits, 2)
    plan = moe_ext.routing_plan(
        ids, num_experts, capacity=max(1, num_tokens // 2), drop_scores=weights, row_alignment=4
    )
    output = moe_ext.moe_mlp(
        hidden, gate_up, down, plan, weights, weight_layout="enk", gate_up_bias=gate_up_bias, down_bias=down_bias
    )
    maps = (plan.permuted_to_slot, plan.slot_to_permuted)
    permuted = moe_ext.permute(hidden, *maps, topk)
    product = moe_ext.grouped_gemm(permuted, gate_up, plan.expert_offsets, weight_layout="enk", bias=gate_up_bias)
    activated = moe_ext.expert_activation(product)
    back = moe_ext.grouped_gemm(activated, down, plan.expert_offsets, weight_layout="enk")
    combined = moe_ext.unpermute(back, *maps, topk, weights)

    a2a = moe_ext.a2a_plan(ids, moe_ext.even_rank_expert_offsets(num_experts, 2, DEVICE))
    sent, sent_ids, sent_weights = moe_ext.a2a_pack(hidden, ids, weights, a2a)
    unpacked, _ = moe_ext.a2a_unpack(sent, sent_ids, 4)
    returned = moe_ext.a2a_combine(sent, a2a)
    for payload in ("native", "fp8"):
        packed = moe_ext.a2a_pack_rows(hidden, ids, weights, a2a, payload=payload)
        moe_ext.a2a_unpack_rows(packed, hidden_size, topk, dtype, payload=payload)
    parts = (output, combined, unpacked, returned, sent_weights, chosen, balance, z)
    sum(part.float().sum() for part in parts).backward()
    synchronize()


def run_gates(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    """Gates, losses and a plan, on rows of every length that the kernels tell apart."""
    topk = min(6, num_experts)
    logits = torch.randn(num_tokens, num_experts, device=DEVICE).to(dtype).requires_grad_()
    weights, ids = moe_ext.topk_gating(logits, topk, renormalize=True)
    chosen, _ = moe_ext.expert_choice_gating(logits, 3)
    balance, z, _ = moe_ext.router_losses(logits, ids)
    moe_ext.routing_plan(ids, num_experts, row_alignment=16)
    (weights.square().sum() + chosen.sum() + balance + z).backward()
    synchronize()


def where_wrong(actual: Tensor, expected: Tensor, tolerance: float) -> str:
    """A map of the rows and columns that differ: . right, n NaN, # wrong; the shape of a bug shows where it is."""
    actual, expected = actual.double().cpu().flatten(0, -2), expected.double().cpu().flatten(0, -2)
    wrong = ~((actual - expected).abs() <= tolerance * (expected.abs() + expected.std()))
    if not wrong.any():
        return f"no element is off by much, the largest difference is {(actual - expected).abs().max():.5g}"
    first = wrong.nonzero()[0].tolist()
    lines = [f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {first}: {actual[tuple(first)]:.5g} instead of "
             f"{expected[tuple(first)]:.5g}; a character is {MAP_TILE}x{MAP_TILE}"]  # fmt: skip
    for rows, values in zip(wrong.split(MAP_TILE)[:MAX_MAP], actual.split(MAP_TILE), strict=False):
        tiles = zip(rows.split(MAP_TILE, 1)[:MAX_MAP], values.split(MAP_TILE, 1), strict=False)
        lines.append("".join("." if not tile.any() else "n" if v.isnan().any() else "#" for tile, v in tiles))
    return "\n".join(lines)


def check(name: str, actual: Tensor, expected: Tensor) -> list[str]:
    tolerance = TOLERANCE[actual.dtype]
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    print(f"  {name}: relative error {error:.2e}", flush=True)
    return [] if error <= tolerance else [f"{name}: {where_wrong(actual, expected, 8 * tolerance)}"]


def run_products(dtype: torch.dtype, tile: str | None) -> None:
    """Products of both layouts and the weight gradient against plain ones, with a map of what differs."""
    wide, deep = 328, 200  # no multiples of a tile
    offsets = torch.tensor((0, *TOKENS_PER_EXPERT), device=DEVICE).cumsum(0).int()
    num_rows, num_experts = int(offsets[-1]), len(TOKENS_PER_EXPERT)
    torch.manual_seed(0)
    rows, gradient = (torch.randn(num_rows, size, device=DEVICE).to(dtype) for size in (deep, wide))
    weight = torch.randn(num_experts, wide, deep, device=DEVICE).to(dtype)
    experts = torch.arange(num_experts, device=DEVICE).repeat_interleave(torch.tensor(TOKENS_PER_EXPERT, device=DEVICE))
    parts = offsets.tolist()
    exact = torch.cat([rows[a:b].float() @ weight[e].float().T for e, (a, b) in enumerate(pairwise(parts))])
    exact_gradient = torch.stack([gradient[a:b].float().T @ rows[a:b].float() for a, b in pairwise(parts)])
    bias = torch.randn(num_experts, wide, device=DEVICE).to(dtype)
    with forced(tile):
        wrong = check("enk", moe_ext.grouped_gemm(rows, weight, offsets, weight_layout="enk"), exact)
        flipped = weight.transpose(1, 2).contiguous()
        wrong += check("ekn", moe_ext.grouped_gemm(rows, flipped, offsets, weight_layout="ekn"), exact)
        biased = moe_ext.grouped_gemm(rows, weight, offsets, weight_layout="enk", bias=bias)
        wrong += check("bias", biased, exact + bias.float()[experts])
        found = moe_ext.grouped_gemm_wgrad(rows, gradient, offsets, weight_layout="enk")
        wrong += check("wgrad", found, exact_gradient)
        if dtype != torch.float32:
            found = moe_ext.grouped_gemm_wgrad(rows, gradient, offsets, weight_layout="enk", out_dtype=torch.float32)
            wrong += check("wgrad fp32", found, exact_gradient)
    if wrong:
        raise AssertionError("\n".join(wrong))


def run_forced_layer(dtype: torch.dtype, tile: str | None) -> None:
    with forced(tile):
        run_layer(dtype, 300, 136, 72)


def run_all_gates() -> None:
    for num_experts in (8, 30, 31, 64, 128, 256, 384, 501, 1024, 1100):
        run_gates(37, num_experts, torch.bfloat16)
    run_gates(3000, 16, torch.float32)  # a plan of several blocks


def run_layers(dtype: torch.dtype) -> None:
    run_layer(dtype, 37, 24, 40)  # aligned: tensor cores for 16 bits
    run_layer(dtype, 5, 17, 13)  # unaligned: the portable kernels
    run_layer(dtype, 9, 136, 72)  # few rows per expert: the decoding kernel, with tails along both axes
    run_layer(dtype, 1, 8, 8)


PIECES: dict[str, Callable[[], None]] = {
    "gates": run_all_gates,
    "products-float32": partial(run_products, torch.float32, None),
    **{piece: partial(run_products, torch.bfloat16, tile) for tile, piece in PRODUCTS.items()},
    **{piece: partial(run_forced_layer, torch.bfloat16, tile) for tile, piece in LAYERS.items()},
    "products-float16": partial(run_products, torch.float16, "128x256"),
    **{f"layers-{str(dtype)[6:]}": partial(run_layers, dtype) for dtype in TOLERANCE},
}


def main(pieces: list[str]) -> int:
    if unknown := set(pieces) - set(PIECES):
        raise SystemExit(f"unknown pieces {', '.join(sorted(unknown))}; known: {', '.join(PIECES)}")
    status = 0
    for piece in pieces or PIECES:
        start = time.perf_counter()
        try:
            PIECES[piece]()
        except Exception as error:  # the next piece tells something too, unless the device is lost
            status = 1
            print(f"WRONG {piece}: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"ok {piece} {time.perf_counter() - start:.1f} s", flush=True)
    if status == 0:
        print("every op ran" if not pieces else "all pieces ran", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
