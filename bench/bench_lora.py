"""Low-rank experts: rank-wise, per linear map and in a whole MLP, against loops over experts, dense products, PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ext
from moe_ext.nn import LoRAExperts, LoRAMLPExperts

from .case import Case, Cases, Context

OPS = ("low_rank_experts", "low_rank_experts_backward", "lora_experts", "lora_mlp_experts")
TABLES = ("A", "C")


class Shape(NamedTuple):
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    rank: int
    topk: int


RANK_WISE = {
    "gpu": Shape(8192, 4096, 0, 64, 1, 8),
    "cpu": Shape(1024, 1024, 0, 64, 1, 8),
    "quick": Shape(24, 16, 0, 6, 1, 2),
}
LINEAR = {
    "gpu": Shape(8192, 4096, 0, 8, 16, 2),
    "cpu": Shape(1024, 1024, 0, 8, 8, 2),
    "quick": Shape(24, 16, 0, 4, 2, 2),
}
MLP = {
    "gpu": Shape(8192, 4096, 14336, 8, 16, 2),
    "cpu": Shape(512, 1024, 3584, 8, 16, 2),
    "quick": Shape(24, 16, 12, 4, 2, 2),
}

Contenders = dict[str, Callable[..., Tensor]]


def cases(context: Context) -> Cases:
    for dtype in context.dtypes:
        if "C" in context.tables:
            yield from context.attempt("rank-wise experts", rank_wise_cases(context, RANK_WISE[context.profile], dtype))
        if "A" in context.tables and context.shapes is None:
            yield from context.attempt("low-rank linear", linear_cases(context, LINEAR[context.profile], dtype))
            yield from context.attempt("low-rank MLP", mlp_cases(context, MLP[context.profile], dtype))


def rank_wise_cases(context: Context, shape: Shape, dtype: torch.dtype) -> Cases:
    ids, arguments = adapters(context, shape, dtype)
    contenders: Contenders = {
        "ours": lambda x, w, a, b: moe_ext.low_rank_experts(x, a, b, ids, w),
        "loop over experts": lambda x, w, a, b: loop_over_experts(x, w, a, b, ids),
        "dense masked": lambda x, w, a, b: dense_masked(x, w, a, b, ids),
    }
    skipped = {"peft": "it routes no ranks"}
    for case in both_directions(contenders, arguments, context, shape.hidden_size, dtype):
        op = "low_rank_experts" if case["direction"] == "forward" else "low_rank_experts_backward"
        name = f"rank-wise T={shape.num_tokens} H={shape.hidden_size} {shape.num_experts} ranks"
        yield Case(op, "C", name, dtype, "uniform", skipped_peers=skipped, **case)


def linear_cases(context: Context, shape: Shape, dtype: torch.dtype) -> Cases:
    """Top-k without the base, which everybody would run alike; then what PEFT can do, with the base, as it does."""
    size, experts = shape.hidden_size, meta_experts(shape)

    def ours(x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        plan = moe_ext.routing_plan(ids, shape.num_experts)
        return torch.func.functional_call(experts, {"lora_a": a, "lora_b": b}, (x, plan, w))

    def make(what: str, contenders: Contenders, arguments: tuple[Tensor, ...], skipped: dict[str, str]) -> Cases:
        name = f"{what} T={shape.num_tokens} H={size} {shape.num_experts}x rank {shape.rank}"
        for case in both_directions(contenders, arguments, context, size, dtype):
            yield Case("lora_experts", "A", name, dtype, "uniform", skipped_peers=skipped, **case)

    ids, arguments = adapters(context, shape, dtype)
    topk: Contenders = {
        "ours": lambda x, w, a, b: ours(x, w, a, b, ids),
        "loop over experts": lambda x, w, a, b: loop_over_experts(x, w, a, b, ids),
        "dense masked": lambda x, w, a, b: dense_masked(x, w, a, b, ids),
    }
    yield from make(f"top-{shape.topk}", topk, arguments, {"peft": "it weights no adapters by token"})

    base = context.rows(size, size, dtype=dtype, scale=size**-0.5, seed=7)
    first, ones = ids[:, :1].contiguous(), torch.ones(shape.num_tokens, 1, device=context.device)
    unweighted = (arguments[0], *arguments[2:])
    hard: Contenders = {
        "ours": lambda x, a, b: F.linear(x, base) + ours(x, None, a, b, first),
        "loop over experts": lambda x, a, b: F.linear(x, base) + loop_over_experts(x, ones, a, b, first),
    }
    gates = torch.ones(shape.num_tokens, shape.num_experts, device=context.device)

    def ours_soft(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        parameters = {"experts.lora_a": a, "experts.lora_b": b}
        return F.linear(x, base) + torch.func.functional_call(Soft(experts), parameters, (x, gates))

    soft: Contenders = {
        "ours": ours_soft,
        "loop over experts": lambda x, a, b: F.linear(x, base) + loop_over_all(x, a, b),
    }
    names = [str(e) for e in first.flatten().tolist()]
    peft, skipped = peft_linear(base, shape)
    if peft is not None:
        # A batch of sequences of one token: PEFT picks one adapter per sequence.
        hard["peft mixed batch"] = lambda x, a, b: peft(x[:, None], a, b, adapter_names=names)[:, 0]
        soft["peft all active"] = peft
    yield from make("top-1 and base", hard, unweighted, skipped)
    yield from make("all and base", soft, unweighted, skipped)


def mlp_cases(context: Context, shape: Shape, dtype: torch.dtype) -> Cases:
    size, width = shape.hidden_size, shape.intermediate_size
    gate_up = context.rows(2 * width, size, dtype=dtype, scale=size**-0.5, seed=8)
    down = context.rows(size, width, dtype=dtype, scale=width**-0.5, seed=9)
    module = LoRAMLPExperts(gate_up, down, shape.num_experts, shape.rank)
    for parameter in (module.gate, module.up, module.down):
        nn.init.normal_(parameter.lora_b, std=0.1)
    names = [f"{part}.{matrix}" for part in ("gate", "up", "down") for matrix in ("lora_a", "lora_b")]
    weights = tuple(module.get_parameter(name).detach() for name in names)
    ids, (hidden, topk_weights, *_) = adapters(context, shape, dtype)

    def ours(x: Tensor, w: Tensor, *parts: Tensor) -> Tensor:
        plan = moe_ext.routing_plan(ids, shape.num_experts)
        return torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (x, plan, w))

    contenders: Contenders = {
        "ours": ours,
        "loop over experts": lambda x, w, *parts: loop_over_mlps(x, w, ids, gate_up, down, *parts),
    }
    name = f"top-{shape.topk} MLP T={shape.num_tokens} H={size} I={width} {shape.num_experts}x rank {shape.rank}"
    skipped = {"peft": "it has no experts of whole MLPs"}
    for case in both_directions(contenders, (hidden, topk_weights, *weights), context, size, dtype):
        yield Case("lora_mlp_experts", "A", name, dtype, "uniform", skipped_peers=skipped, **case)


def adapters(context: Context, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Ids; rows, weights, A and B of every expert."""
    num_tokens, size, _, num_experts, rank, topk = shape
    logits = context.rows(num_tokens, num_experts, dtype=torch.float32, seed=1)
    weights, ids = moe_ext.topk_gating(logits, topk, renormalize=True)
    hidden = context.rows(num_tokens, size, dtype=dtype)
    lora_a = context.rows(num_experts, rank, size, dtype=dtype, scale=size**-0.5, seed=2)
    return ids, (hidden, weights, lora_a, context.rows(num_experts, rank, size, dtype=dtype, seed=3))


def both_directions(
    contenders: Contenders, arguments: tuple[Tensor, ...], context: Context, out_features: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Forward, and forward with backward to every argument, as arguments of a Case."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    grad = context.rows(arguments[0].shape[0], out_features, dtype=dtype, seed=4)

    def forward(run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: run(*arguments))

    def step(run: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(run(*leaves), leaves, grad)

    cases = []
    for direction, wrap in (("forward", forward), ("forward+backward", step)):
        runs: dict[str, Callable[[], Any]] = {name: wrap(run) for name, run in contenders.items()}
        cases.append({"direction": direction, "ours": runs.pop("ours"), "peers": runs})
    return cases


class Soft(nn.Module):
    """The soft form of adapters as a forward of its own, for a functional call."""

    def __init__(self, experts: LoRAExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        return self.experts.soft(hidden, weights)


def meta_experts(shape: Shape) -> LoRAExperts:
    """The module whose parameters a functional call brings along."""
    with torch.device("meta"):
        return LoRAExperts(shape.num_experts, shape.hidden_size, shape.hidden_size, shape.rank)


def loop_over_experts(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """One expert after the other, each on its own tokens."""
    out = torch.zeros(x.shape[0], b.shape[2], dtype=torch.float32, device=x.device)
    for expert, (down, up) in enumerate(zip(a.unbind(), b.unbind(), strict=True)):
        tokens, slots = torch.where(ids == expert)
        out.index_add_(0, tokens, (x[tokens] @ down.T @ up).float() * w[tokens, slots, None])
    return out.to(x.dtype)


def loop_over_all(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], b.shape[2], dtype=torch.float32, device=x.device)
    for down, up in zip(a.unbind(), b.unbind(), strict=True):
        out = out + x @ down.T @ up
    return out.to(x.dtype)


def dense_masked(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """All experts for all tokens in two products, with weights that are mostly zero."""
    num_experts, rank = a.shape[:2]
    gates = w.new_zeros(x.shape[0], num_experts).scatter(1, ids.long(), w)
    low = (x @ a.flatten(0, 1).T).view(-1, num_experts, rank) * gates[..., None]
    return low.to(x.dtype).flatten(1) @ b.flatten(0, 1)


def loop_over_mlps(
    x: Tensor, w: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, gate_a: Tensor, gate_b: Tensor, up_a: Tensor,
    up_b: Tensor, down_a: Tensor, down_b: Tensor,
) -> Tensor:  # fmt: skip
    """MixLoRA's own way: gate and up of the base once per token, then one expert after the other."""
    base_gate, base_up = F.linear(x, gate_up).chunk(2, dim=-1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    parts = zip(*(p.unbind() for p in (gate_a, gate_b, up_a, up_b, down_a, down_b)), strict=True)
    for expert, (ga, gb, ua, ub, da, db) in enumerate(parts):
        tokens, slots = torch.where(ids == expert)
        rows = x[tokens]
        activated = F.silu(base_gate[tokens] + rows @ ga.T @ gb) * (base_up[tokens] + rows @ ua.T @ ub)
        product = F.linear(activated, down) + activated @ da.T @ db
        out.index_add_(0, tokens, product.float() * w[tokens, slots, None])
    return out.to(x.dtype)


def peft_linear(base: Tensor, shape: Shape) -> tuple[Callable[..., Tensor] | None, dict[str, str]]:
    """PEFT's LoRA layer over ``base`` with all experts as its adapters, as a function of rows, A and B."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None, {"peft": "not installed: pip install 'moe_ext[bench]'"}
    linear = nn.Linear(*base.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(base, requires_grad=False)
    model = nn.ModuleDict({"linear": linear})
    names = [str(e) for e in range(shape.num_experts)]
    for name in names:
        config = LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=["linear"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is more than one adapter
            inject_adapter_in_model(config, model, adapter_name=name)
    layer = model["linear"]
    layer.set_adapter(names)

    def run(x: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        parameters = {f"lora_A.{n}.weight": part for n, part in zip(names, a.unbind(), strict=True)}
        parameters |= {f"lora_B.{n}.weight": part.T for n, part in zip(names, b.unbind(), strict=True)}
        return torch.func.functional_call(layer, parameters, (x,), options)

    return run, {}
