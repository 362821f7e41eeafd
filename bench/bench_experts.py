"""Expert layers: plan, experts and weighted sum, forward and forward + backward, against whole layers of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import moe_ext

from .case import Case, Cases, Context, first_line, with_peak
from .layers import Layer
from .shapes import (
    CPU_DECODE,
    CPU_FULL_DECODE,
    CPU_FULL_LAYERS,
    CPU_LAYERS,
    GPU_DECODE,
    GPU_LAYERS,
    TINY_FULL_LAYERS,
    TINY_LAYERS,
    LayerShape,
)
from .timing import graphed

OPS = ("moe_mlp", "moe_mlp_backward", "expert_activation", "expert_activation_backward")
TABLES = ("A", "C", "D")

# A layer of the trained router's own E and K, wide enough to be worth timing.
REAL_LAYERS = {"gpu": (8192, 2048, 1024), "cpu": (1024, 512, 512), "quick": (48, 32, 16)}


def layers_of(context: Context) -> list[LayerShape]:
    if context.full:
        return context.wanted(TINY_FULL_LAYERS if context.profile == "quick" else CPU_FULL_LAYERS)
    return context.wanted({"gpu": GPU_LAYERS, "cpu": CPU_LAYERS, "quick": TINY_LAYERS}[context.profile])


def decode_of(context: Context) -> list[LayerShape]:
    cpu = CPU_FULL_DECODE if context.full else CPU_DECODE
    return context.wanted({"gpu": GPU_DECODE, "cpu": cpu, "quick": TINY_LAYERS}[context.profile])


def cases(context: Context) -> Cases:
    layers = layers_of(context)
    for dtype in context.dtypes:
        if "C" in context.tables and layers:
            yield from context.attempt("expert_activation", activation_cases(context, layers[0], dtype))
        for shape in decode_of(context) if "D" in context.tables else ():
            yield from layer_cases(context, shape, dtype, "uniform", "D", backward=context.full)
        for shape in layers if "A" in context.tables else ():
            yield from layer_cases(context, shape, dtype, "uniform", "A", backward=True)
            for routing in ("zipf", "one_hot") if shape == layers[0] and dtype == context.dtypes[0] else ():
                yield from layer_cases(context, shape, dtype, routing, "A", backward=False)
        if "A" in context.tables and context.traces:
            num_tokens, hidden_size, intermediate_size = REAL_LAYERS[context.profile]
            experts, topk = int(context.traces["num_experts"]), context.traces["ids"].shape[1]
            real = LayerShape("byte-lm router", num_tokens, hidden_size, intermediate_size, experts, topk)
            yield from layer_cases(context, real, dtype, "real", "A", backward=True)


def layer_cases(
    context: Context, shape: LayerShape, dtype: torch.dtype, routing: str, table: str, *, backward: bool
) -> Cases:
    label = f"{table} {shape.name} T={shape.num_tokens} {routing}"
    return context.attempt(label, _layer_cases(context, shape, dtype, routing, table, backward=backward))


def _layer_cases(
    context: Context, shape: LayerShape, dtype: torch.dtype, routing: str, table: str, *, backward: bool
) -> Cases:
    layer = Layer(context, shape, dtype, routing)
    name, weight_bytes = f"{shape.name} T={shape.num_tokens}", float(layer.used_weight_bytes)
    skipped = dict(layer.skipped)
    runs = {peer: layer.forward(peer) for peer in layer.contenders}
    decode, on_cpu = table == "D", context.device == "cpu"
    if decode and not on_cpu:
        # Decode as it is served: replayed. What cannot be captured (a host sync inside) stays eager and says so.
        ours = _graphed_when_called(runs.pop("ours"))
        runs = {"ours": ours, **{n: _graph_or_eager(n, run, skipped) for n, run in runs.items()}}
    if decode and on_cpu:  # its memory is shared with whoever else runs there: reading is timed beside the contenders
        ceilings: dict[str, Callable[[], Any]] = {"reading": layer.reading()}
    else:
        ceilings = with_peak(context, {"dense mm": layer.dense()}, shape.forward_flops, dtype)
    yield Case("moe_mlp", table, name, dtype, routing, "forward", runs.pop("ours"), runs, ceilings, skipped,
               flops=shape.forward_flops, bytes=weight_bytes,
               read_bytes=weight_bytes if decode and not on_cpu else 0.0)  # fmt: skip
    if backward:
        # Few tokens: the weights are read twice and the gradients of all of them written.
        moved = 2.0 * weight_bytes + layer.weight_bytes if decode else 3.0 * weight_bytes
        steps = layer.steps()
        yield Case("moe_mlp_backward", table, name, dtype, routing, "forward+backward", steps.pop("ours"), steps,
                   {} if decode else with_peak(context, {"dense mm": layer.dense(backward=True)},
                                               3.0 * shape.forward_flops, dtype),
                   {**layer.skipped, **layer.skipped_backward}, flops=3.0 * shape.forward_flops,
                   bytes=moved)  # fmt: skip


def activation_cases(context: Context, shape: LayerShape, dtype: torch.dtype) -> Cases:
    rows = min(shape.num_tokens * shape.topk, 65536)
    pre = context.rows(rows, 2 * shape.intermediate_size, dtype=dtype)
    leaf = pre.clone().requires_grad_()
    grad = context.rows(rows, shape.intermediate_size, dtype=dtype, seed=1)
    moved = float(rows * shape.intermediate_size * pre.element_size())

    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    name = f"swiglu {rows}x{2 * shape.intermediate_size}"
    yield Case("expert_activation", "C", name, dtype, "none", "forward", lambda: moe_ext.expert_activation(pre),
               {"torch eager": lambda: eager(pre)}, bytes=3 * moved)  # fmt: skip
    yield Case("expert_activation_backward", "C", name, dtype, "none", "forward+backward",
               lambda: torch.autograd.grad(moe_ext.expert_activation(leaf), leaf, grad),
               {"torch eager": lambda: torch.autograd.grad(eager(leaf), leaf, grad)}, bytes=8 * moved)  # fmt: skip


def _graphed_when_called(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captured by the first call, whose error is that of one case; made at once it would end the table."""
    replays: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not replays:
            replays.append(graphed(run))
        return replays[0]()

    return call


def _graph_or_eager(name: str, run: Callable[[], Tensor], notes: dict[str, str]) -> Callable[[], Tensor]:
    if name == "transformers eager":  # a capture that fails leaves its pool behind in the allocator
        notes[f"{name} (graph)"] = "not capturable: its loop over experts waits for the device"
        return run
    try:
        return graphed(run)
    except Exception as error:  # a RuntimeError, if it is torch that raises
        notes[f"{name} (graph)"] = f"not capturable: {first_line(error)}"
        torch.cuda.synchronize()
        return run
