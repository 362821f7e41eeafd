"""Hugging Face transformers: the experts implementation ``"moe_ext"``.

    from moe_ext.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ext")
    # or, on a model that is loaded: model.set_experts_implementation("moe_ext")

Every architecture whose experts carry transformers' ``use_experts_implementation`` runs: gated and plain experts,
biases, transposed and interleaved weights, expert-parallel sentinels, any activation. An activation that the kernels
know is found by comparing numbers, never by a name: the module's own function must agree with one of ours on a table
of values. Experts whose activation is not among them, or that normalise an expert's output, run on two grouped
products around the module's own code, and say so once.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ext.activation_names import GATED_ACTIVATIONS, LIMITED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ext.ops.experts import moe_mlp
from moe_ext.ops.grouped_gemm import Gather, grouped_gemm
from moe_ext.ops.permutation import unpermute
from moe_ext.ops.plan import routing_plan
from moe_ext.plan_types import RoutingPlan
from moe_ext.reference.activation import activate

NAME = "moe_ext"
OLDEST_TRANSFORMERS = (5, 7)

# Attributes that hold the numbers of a clamped SwiGLU: gpt-oss's names, also those of DeepSeek-V4, then MiniMax-M3's.
_ALPHAS = ("alpha", "swiglu_alpha")
_LIMITS = ("limit", "swiglu_limit")
_CACHE = "_moe_ext_activation"


class Activation(NamedTuple):
    """What stands between an expert's two products, in the words of :func:`moe_ext.moe_mlp`."""

    name: str
    gate_up_layout: str = "concatenated"
    alpha: float = 1.702
    limit: float = 7.0


def register() -> None:
    """Make ``"moe_ext"`` known to transformers; calling it again changes nothing.

    Raises:
        ImportError: transformers is missing, or older than 5.7 (it takes no experts implementation but its own).
    """
    try:
        from transformers import __version__
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("transformers 5.7 or later is needed: pip install 'transformers>=5.7'") from error
    if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise ImportError(f"transformers 5.7 or later is needed, found {__version__}: pip install 'transformers>=5.7'")
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of transformers, on moe_ext's ops.

    Args:
        experts: the module, as ``use_experts_implementation`` made it.
        hidden_states: [num_tokens, hidden_size], or with further leading axes.
        top_k_index: [num_tokens, topk] integers; an index outside ``[0, num_experts)`` (a sentinel of expert
            parallelism) takes no part.
        top_k_weights: [num_tokens, topk] in any floating dtype.

    Returns:
        The shape and dtype of ``hidden_states``. Under autocast the products are taken in autocast's dtype.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.reshape(-1, top_k_index.shape[-1])
    up, up_bias, down, down_bias = _parameters(experts)
    rows = rows.to(up.dtype)  # a norm before may have left float32
    weights = top_k_weights.reshape(ids.shape).to(torch.promote_types(up.dtype, torch.float32))
    plan = routing_plan(ids, up.shape[0])
    layout = "ekn" if experts.is_transposed else "enk"
    compiling = torch.compiler.is_dynamo_compiling()
    activation = _activation_of_module_at(id(experts)) if compiling else fused_activation(experts)
    if activation is not None:
        output = moe_mlp(
            rows,
            up,
            down,
            plan,
            weights,
            weight_layout=layout,
            activation=activation.name,
            gate_up_layout=activation.gate_up_layout,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            activation_alpha=activation.alpha,
            activation_limit=activation.limit,
        )
    else:
        output = _in_pieces(experts, rows, (up, up_bias, down, down_bias), plan, weights, layout)
    return output.to(hidden_states.dtype).view(hidden_states.shape)


@torch.compiler.assume_constant_result
def _activation_of_module_at(address: int) -> Activation | None:
    """fused_activation, as a constant of the graph.

    Dynamo of torch 2.11 hands no module to such a function, but guards on its id; who compiles holds the module.
    """
    return fused_activation(ctypes.cast(address, ctypes.py_object).value)


def fused_activation(experts: Any) -> Activation | None:
    """The activation of :func:`moe_ext.moe_mlp` that equals the module's own, or None if there is none.

    Found once per module and activation; a module that cannot be fused is told of by a warning.
    """
    function = getattr(experts, "act_fn", None)
    cached: tuple[Any, Activation | None] | None = experts.__dict__.get(_CACHE)
    if cached is not None and cached[0] is function:
        return cached[1]
    found = None if _normalises_output(experts) else _find_activation(experts)
    experts.__dict__[_CACHE] = (function, found)
    if found is None:
        reason = "its activation is not one of moe_ext's"
        if _normalises_output(experts):
            reason = "it normalises each expert's output"
        # Python shows a warning of one text from one place once: one line per class of experts.
        warnings.warn(f"{type(experts).__name__}: {reason}; two grouped products run it, without fusion", stacklevel=2)
    return found


def _parameters(experts: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = _local(getattr(experts, name)), _local(experts.down_proj)
    if not experts.has_bias:
        return up, None, down, None
    return up, _local(getattr(experts, f"{name}_bias")), down, _local(experts.down_proj_bias)


def _normalises_output(experts: Any) -> bool:
    return bool(getattr(experts, "has_post_expert_norm", False))  # not yet known to transformers 5.17


def _local(parameter: Any) -> Tensor:
    """This rank's experts of a parameter that is spread over ranks."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def _in_pieces(
    experts: Any,
    rows: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    plan: RoutingPlan,
    weights: Tensor,
    layout: str,
) -> Tensor:
    up, up_bias, down, down_bias = parameters
    gather: Gather = (plan.permuted_to_slot, plan.slot_to_permuted, plan.topk_of(rows.shape[0], weights))
    product = grouped_gemm(rows, up, plan.expert_offsets, weight_layout=layout, bias=up_bias, gather=gather)
    activated = experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)
    output = grouped_gemm(activated.to(rows.dtype), down, plan.expert_offsets, weight_layout=layout, bias=down_bias)
    if _normalises_output(experts):
        output = experts.post_expert_norm(output).to(output.dtype)
    return unpermute(output, *gather, weights)


def _find_activation(experts: Any) -> Activation | None:
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    learned = getattr(experts, "act_fn", None)
    if isinstance(learned, nn.Module) and next(learned.parameters(), None) is not None:
        return None
    for candidate in _candidates(experts):
        values = _probe(candidate.limit)
        try:
            with torch.no_grad(), torch.device("cpu"):
                theirs = function(values)
        except Exception:  # whatever a foreign function does with our numbers, it is then not one of ours
            return None
        ours = activate(values, candidate.name, candidate.gate_up_layout, candidate.alpha, candidate.limit)
        if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6):
            return candidate
    return None


def _candidates(experts: Any) -> list[Activation]:
    if not experts.has_gate:
        return [Activation(name) for name in PLAIN_ACTIVATIONS]
    layout = "concatenated" if experts.is_concatenated else "interleaved"
    # Those with a limit first: below it the values of the others may be the same.
    found = []
    for limit in _numbers(experts, _LIMITS):
        found.append(Activation("swiglu_limited", layout, limit=limit))
        found += [Activation("swiglu_clamped", layout, alpha, limit) for alpha in _numbers(experts, _ALPHAS)]
    return found + [Activation(name, layout) for name in GATED_ACTIVATIONS if name not in LIMITED_ACTIVATIONS]


def _numbers(experts: Any, attributes: tuple[str, ...]) -> list[float]:
    values = [getattr(experts, name, None) for name in attributes]
    return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]


def _probe(limit: float) -> Tensor:
    """Rows of pre-activations, on both sides of zero and of the limit; no two columns alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 16, generator=generator) * torch.linspace(0.1, 2 * limit, 64)[:, None]
