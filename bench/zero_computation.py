"""The table of zero-computation experts: a MoE++ layer against the same layer with FFN experts in their place.

Gates and ids are given, outside every contender. Ids are drawn as MoE++'s capacities have them, an FFN expert tau times
as often as another. The layer with FFN experts only computes something else: it stands as the ceiling, 100% / (share of
slots at FFN experts) is what leaving out the other rows can give. The peer is a loop over experts, as in the authors'
code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ext.nn import Experts, MoE, Routing, TopKRouter
from moe_ext.recipes import MoEPlusPlus

from .case import Case, Cases, Context
from .shapes import LayerShape

TABLE = "zero"
TAU = 0.75
ALL_FFN = "FFN experts in their place"
# 8 FFN experts and 4 others: MoE++'s 0.6B model.
LAYERS = {
    "gpu": LayerShape("MoE++ 8+4", 8192, 768, 2048, 8, 2),
    "cpu": LayerShape("MoE++ 8+4", 1024, 768, 2048, 8, 2),
    "quick": LayerShape("tiny MoE++ 8+4", 48, 32, 16, 8, 2),
}


def cases(context: Context) -> Cases:
    for dtype in context.dtypes:
        yield from layer_cases(context, LAYERS[context.profile], dtype)


def make_routing(context: Context, shape: LayerShape, num_experts: int) -> Routing:
    generator = torch.Generator().manual_seed(0)
    odds = torch.where(torch.arange(num_experts) < shape.num_experts, TAU, 1.0)
    ids = torch.multinomial(odds.expand(shape.num_tokens, -1), shape.topk, generator=generator)
    weights = torch.softmax(context.rows(shape.num_tokens, shape.topk, dtype=torch.float32, seed=3), dim=-1)
    return Routing(weights, ids.int().to(context.device), weights)


def layer_cases(context: Context, shape: LayerShape, dtype: torch.dtype) -> Cases:
    hidden_size, width = shape.hidden_size, shape.intermediate_size
    torch.manual_seed(0)
    layer = MoEPlusPlus(hidden_size, width, shape.num_experts, shape.topk, tau=TAU).to(context.device, dtype)
    total = layer.router.num_experts
    router = TopKRouter(hidden_size, total, shape.topk)
    all_ffn = MoE(router, Experts(total, hidden_size, width)).to(context.device, dtype)
    routing = make_routing(context, shape, total)
    rows = context.rows(shape.num_tokens, hidden_size, dtype=dtype)
    grad = context.rows(shape.num_tokens, hidden_size, dtype=dtype, seed=4)
    share = (routing.topk_ids < shape.num_experts).double().mean().item()
    name = f"{shape.name} H={hidden_size} I={width} T={shape.num_tokens}, {share:.2f} of slots at FFN experts"
    flops = share * shape.forward_flops

    def run(experts: MoE, x: Tensor, weights: Tensor) -> Tensor:
        return experts.run_experts(x, routing._replace(topk_weights=weights))[0]

    def loop(_: MoE, x: Tensor, weights: Tensor) -> Tensor:
        return loop_over_experts(layer, x, routing.topk_ids, weights)

    def forward(function, experts: MoE):  # type: ignore[no-untyped-def]
        def call() -> Tensor:
            with torch.no_grad():
                return function(experts, rows, routing.topk_weights)

        return call

    def step(function, experts: MoE):  # type: ignore[no-untyped-def]
        leaves = [rows.detach().requires_grad_(), routing.topk_weights.detach().requires_grad_()]
        parameters = list(experts.experts.parameters())
        return lambda: torch.autograd.grad(function(experts, *leaves), [*leaves, *parameters], grad)

    for direction, op, make, factor in (
        ("forward", "moe_mlp", forward, 1.0),
        ("forward+backward", "moe_mlp_backward", step, 3.0),
    ):
        yield Case(op, TABLE, name, dtype, "tau", direction, make(run, layer), {"loop over experts": make(loop, layer)},
                   {ALL_FFN: make(run, all_ffn)}, flops=factor * flops)  # fmt: skip


def loop_over_experts(layer: MoEPlusPlus, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    ffn, rest = layer.experts
    x = x * layer.router.topk
    output = torch.zeros_like(x)
    for expert in range(layer.router.num_experts):
        tokens, slots = torch.where(ids == expert)
        rows = x[tokens]
        constant = expert - ffn.num_experts
        if constant < 0:
            gate, up = F.linear(rows, ffn.gate_up_weight[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, ffn.down_weight[expert])
        elif constant < rest.num_constant:
            mixing = torch.softmax(F.linear(rows, rest.mixing_weight[constant]), dim=-1)
            rows = mixing[:, :1] * rows + mixing[:, 1:] * rest.constants[constant]
        elif constant >= rest.num_constant + rest.num_copy:
            continue
        output = output.index_add(0, tokens, (rows * weights[tokens, slots, None]).to(x.dtype))
    return output
