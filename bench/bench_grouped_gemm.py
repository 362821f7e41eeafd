"""Grouped products and their gradients, against torch's grouped_mm, a loop of mm, and one dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import moe_ext

from .case import Case, Cases, Context, with_peak
from .shapes import CPU_GEMMS, GPU_GEMMS, GPU_LAYERS

OPS = ("grouped_gemm", "grouped_gemm_wgrad", "grouped_bias_grad")
TABLES = ("B",)


def gemm_shapes(profile: str) -> list[tuple[str, int, int, int, int]]:
    """(name, groups, rows in all, N, K)."""
    if profile == "quick":
        return [("tiny", 3, 24, 16, 32)]
    listed = GPU_GEMMS if profile == "gpu" else CPU_GEMMS
    shapes = [(f"{g}x{rows} N={n} K={k}", g, g * rows, n, k) for g, rows, n, k in listed]
    if profile == "gpu":
        for layer in GPU_LAYERS[:5]:
            rows, h, i = layer.num_tokens * layer.topk, layer.hidden_size, layer.intermediate_size
            shapes.append((f"{layer.name} up", layer.num_experts, rows, 2 * i, h))
            shapes.append((f"{layer.name} down", layer.num_experts, rows, h, i))
    return shapes


def cases(context: Context) -> Cases:
    for name, groups, rows, n, k in gemm_shapes(context.profile):
        for dtype in context.dtypes:
            yield from context.attempt(f"B {name}", product_cases(context, name, groups, rows, n, k, dtype))


def product_cases(context: Context, name: str, groups: int, rows: int, n: int, k: int, dtype: torch.dtype) -> Cases:
    counts = torch.full((groups,), rows // groups)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int().to(context.device)
    ends = offsets[1:]
    bounds = list(zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True))
    x = context.rows(rows, k, dtype=dtype)
    weight = context.rows(groups, n, k, dtype=dtype, scale=k**-0.5, seed=1)
    grad = context.rows(rows, n, dtype=dtype, seed=2)
    flops = 2.0 * rows * n * k
    element = x.element_size()
    bytes_moved = float(element * (rows * (n + k) + groups * n * k))

    def make(op: str, direction: str, ours, peers, ceilings, work: float, amount: float) -> Case:
        limits = with_peak(context, ceilings, work, dtype) if work else ceilings
        return Case(op, "B", name, dtype, "equal groups", direction, ours, peers, limits, flops=work, bytes=amount)

    def loop() -> Tensor:
        return torch.cat([x[a:b] @ weight[e].T for e, (a, b) in enumerate(bounds)])

    def loop_wgrad() -> Tensor:
        return torch.stack([grad[a:b].T @ x[a:b] for a, b in bounds])

    yield make(
        "grouped_gemm", "forward", lambda: moe_ext.grouped_gemm(x, weight, offsets, weight_layout="enk"),
        {"torch grouped_mm": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends), "loop of mm": loop},
        {"dense mm": lambda: x @ weight[0].T}, flops, bytes_moved,
    )  # fmt: skip
    yield make(
        "grouped_gemm", "dgrad", lambda: moe_ext.grouped_gemm(grad, weight, offsets, weight_layout="ekn"),
        {"torch grouped_mm": lambda: F.grouped_mm(grad, weight, offs=ends)},
        {"dense mm": lambda: grad @ weight[0]}, flops, bytes_moved,
    )  # fmt: skip
    yield make(
        "grouped_gemm_wgrad", "wgrad",
        lambda: moe_ext.grouped_gemm_wgrad(x, grad, offsets, weight_layout="enk"),
        {"torch grouped_mm": lambda: F.grouped_mm(grad.T, x, offs=ends), "loop of mm": loop_wgrad},
        {"dense mm": lambda: grad.T @ x}, flops, bytes_moved,
    )  # fmt: skip
    yield make(
        "grouped_bias_grad", "bias gradient", lambda: moe_ext.grouped_bias_grad(grad, offsets),
        {"loop of sum": lambda: torch.stack([grad[a:b].float().sum(0) for a, b in bounds]).to(dtype)}, {}, 0.0,
        float(element * rows * n),
    )  # fmt: skip
