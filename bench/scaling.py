"""The scaling table: a layer's time against tokens, experts and threads, ours and the peers that scale."""

from __future__ import annotations

import torch

from .case import Case, Cases, Context
from .layers import Layer
from .shapes import SWEEPS, LayerShape


def points(context: Context) -> list[tuple[LayerShape, int | None]]:
    """Layers and threads (None: all of them), one size varied at a time; neighbours share their weights."""
    sweep = SWEEPS[context.profile]
    layer, all_threads = sweep.layer, torch.get_num_threads()
    listed: list[tuple[LayerShape, int | None]] = [(layer.with_tokens(t), None) for t in sweep.tokens]
    if context.device == "cpu":
        fewer = sorted({1, all_threads // 2} - {0, all_threads})
        listed += [(layer.with_tokens(t), threads) for t in sweep.threads_at_tokens for threads in fewer]
    listed += [(layer._replace(num_experts=e), None) for e in sweep.experts if e != layer.num_experts]
    return listed


def cases(context: Context) -> Cases:
    for dtype in context.dtypes:
        for shape, threads in points(context):
            yield from context.attempt(f"scaling {shape}", point_cases(context, shape, dtype, threads))


def point_cases(context: Context, shape: LayerShape, dtype: torch.dtype, threads: int | None) -> Cases:
    layer = Layer(context, shape, dtype, "uniform")
    shown = f"H={shape.hidden_size} I={shape.intermediate_size} K={shape.topk} E={shape.num_experts} "
    shown += f"T={shape.num_tokens}"
    if context.device == "cpu":
        shown += f" threads={threads or torch.get_num_threads()}"
    runs, steps = {name: layer.forward(name) for name in layer.contenders}, layer.steps()
    yield Case("moe_mlp", "scaling", shown, dtype, "uniform", "forward", runs.pop("ours"), runs,
               skipped_peers=layer.skipped, flops=shape.forward_flops, threads=threads)  # fmt: skip
    yield Case("moe_mlp_backward", "scaling", shown, dtype, "uniform", "forward+backward", steps.pop("ours"), steps,
               skipped_peers={**layer.skipped, **layer.skipped_backward}, flops=3.0 * shape.forward_flops,
               threads=threads)  # fmt: skip
