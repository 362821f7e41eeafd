"""Expert layers: plan, experts and weighted sum, forward and forward + backward, against whole layers of others.

The gate is outside the timed region of every contender; routing (sorting and permuting by expert) is inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import moe_ext

from . import peers
from .case import Case, Cases, Context
from .shapes import CPU_DECODE, CPU_LAYERS, GPU_DECODE, GPU_LAYERS, TINY_LAYERS, LayerShape
from .timing import graphed

OPS = ("moe_mlp", "moe_mlp_backward", "expert_activation", "expert_activation_backward")

# A layer of the trained router's own E and K, wide enough to be worth timing.
REAL_LAYERS = {"gpu": (8192, 2048, 1024), "cpu": (1024, 512, 512), "quick": (48, 32, 16)}
# Peers that materialise [T * K, 2I, H] weights, or whose backward holds one weight gradient per expert and call.
BATCHED_LIMIT_BYTES = 2e9
SLOW_BACKWARD_EXPERTS = 8


def cases(context: Context) -> Cases:
    layers = {"gpu": GPU_LAYERS, "cpu": CPU_LAYERS, "quick": TINY_LAYERS}[context.profile]
    decode = {"gpu": GPU_DECODE, "cpu": CPU_DECODE, "quick": []}[context.profile]
    for dtype in context.dtypes:
        yield from activation_cases(context, layers[0], dtype)
        for shape in decode:
            yield from layer_cases(context, shape, dtype, "uniform", "D", backward=False)
        for shape in layers:
            yield from layer_cases(context, shape, dtype, "uniform", "A", backward=True)
            for routing in ("zipf", "one_hot") if shape == layers[0] and dtype == context.dtypes[0] else ():
                yield from layer_cases(context, shape, dtype, routing, "A", backward=False)
        if context.traces:
            num_tokens, hidden_size, intermediate_size = REAL_LAYERS[context.profile]
            experts, topk = int(context.traces["num_experts"]), context.traces["ids"].shape[1]
            real = LayerShape("byte-lm router", num_tokens, hidden_size, intermediate_size, experts, topk)
            yield from layer_cases(context, real, dtype, "real", "A", backward=True)


def layer_cases(
    context: Context, shape: LayerShape, dtype: torch.dtype, routing: str, table: str, *, backward: bool
) -> Cases:
    hidden = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype)
    gate_up, down = context.expert_weights(shape, dtype)
    ids = context.topk_ids(shape, routing)
    wide_ids = ids.long()
    weights = torch.softmax(context.rows(shape.num_tokens, shape.topk, dtype=torch.float32, seed=3), dim=-1)
    used = min(shape.num_experts, int(torch.unique(ids).numel()))
    weight_bytes = used * 3 * shape.hidden_size * shape.intermediate_size * hidden.element_size()
    name = f"{shape.name} T={shape.num_tokens}"

    def ours(x: Tensor, w: Tensor, up: Tensor, dn: Tensor) -> Tensor:
        return moe_ext.moe_mlp(x, up, dn, moe_ext.routing_plan(ids, shape.num_experts), w, weight_layout="enk")

    others: dict[str, Callable[..., Tensor]] = {
        "torch grouped_mm": lambda x, w, up, dn: peers.grouped_mm_layer(x, wide_ids, w, up, dn)
    }
    skipped = {}
    for peer, forward in peers.transformers_layers(gate_up, down).items():
        if peer.endswith("batched_mm") and _batched_bytes(shape, hidden) > BATCHED_LIMIT_BYTES:
            skipped[peer] = "gathers a copy of the weights for every slot: more than 2 GB"
            continue
        others[peer] = _with_parameters(forward, wide_ids)
    if context.device == "cuda":
        others.update(
            {n: (lambda x, w, up, dn, f=f: f(x, ids, w)) for n, f in peers.liger_layer(gate_up, down).items()}
        )

    arguments = (hidden, weights, gate_up, down)
    runs = {n: (lambda f=f: f(*arguments)) for n, f in {"ours": ours, **others}.items()}
    if table == "D" and context.device == "cuda":
        # Decode as it is served: replayed. What cannot be captured (a host sync inside) stays eager and says so.
        runs = {n: _graph_or_eager(n, run, skipped) for n, run in runs.items()}
    yield Case("moe_mlp", table, name, dtype, routing, "forward", runs.pop("ours"), runs,
               {"dense mm": lambda: peers.dense_ceiling(hidden, shape.topk, gate_up, down)}, dict(skipped),
               flops=shape.forward_flops, bytes=float(weight_bytes))  # fmt: skip
    if not backward:
        return

    leaves = [x.detach().requires_grad_() for x in arguments]
    grad = context.rows(shape.num_tokens, shape.hidden_size, dtype=dtype, seed=4)

    def step(f: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(f(*leaves), leaves, grad)

    trainable = {}
    for peer, f in others.items():
        if peer == "liger":
            continue
        if peer == "transformers eager" and shape.num_experts >= SLOW_BACKWARD_EXPERTS:
            skipped[peer] = "its backward makes a gradient of all weights for every expert: up to minutes per call"
        else:
            trainable[peer] = step(f)
    yield Case("moe_mlp_backward", table, name, dtype, routing, "forward+backward", step(ours), trainable, {}, skipped,
               flops=3.0 * shape.forward_flops, bytes=3.0 * weight_bytes)  # fmt: skip


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


def _batched_bytes(shape: LayerShape, hidden: Tensor) -> float:
    slots = shape.num_tokens * shape.topk
    return 2.0 * slots * shape.hidden_size * shape.intermediate_size * hidden.element_size()


def _with_parameters(forward: peers.LayerForward, ids: Tensor) -> Callable[..., Tensor]:
    """A transformers layer as a function of its weights, so that autograd can be asked for their gradients."""
    module = forward.module  # type: ignore[attr-defined]

    def run(x: Tensor, w: Tensor, up: Tensor, dn: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"gate_up_proj": up, "down_proj": dn}, (x, ids, w.to(x.dtype)))

    return run


def _graph_or_eager(name: str, run: Callable[[], Tensor], notes: dict[str, str]) -> Callable[[], Tensor]:
    try:
        return graphed(run)
    except RuntimeError as error:
        notes[f"{name} (graph)"] = f"not capturable: {str(error).splitlines()[0]}"
        torch.cuda.synchronize()
        return run
