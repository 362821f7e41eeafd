"""From one set of expert weights to another: how mixtures are made out of trained models and turned back.

All of it is weight surgery on :class:`Experts` in the layouts ``concatenated`` and ``enk``; a dense MLP is
``Experts`` with one expert (:func:`dense_mlp`). Results are new modules with parameters of their own, unless said
otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe_ext.activation_names import GATED_ACTIVATIONS
from moe_ext.nn.clustering import balanced_kmeans
from moe_ext.nn.experts import ExpertGroups, Experts
from moe_ext.nn.layer import MoE

__all__ = ["dense_mlp", "grow", "select", "share", "split", "stack", "to_dense"]

SplitMethod = Literal["contiguous", "random", "balanced_kmeans"]


def dense_mlp(up: nn.Linear, down: nn.Linear, *, gate: nn.Linear | None = None, activation: str) -> Experts:
    """A dense MLP as :class:`Experts` with one expert: ``down(f(up x))``, or ``down(f(gate x) * up x)``.

    Args:
        up, down: the linear maps of a trained MLP; both have a bias or neither.
        gate: of a gated MLP.
        activation: a name of :func:`moe_ext.expert_activation`, a gated one exactly where there is a gate.

    Raises:
        ValueError: the activation does not go with the maps, or only one of them has a bias.
    """
    if (activation in GATED_ACTIVATIONS) != (gate is not None):
        raise ValueError(f"activation: {activation!r} needs {'a' if gate is None else 'no'} gate")
    if (up.bias is None) != (down.bias is None):
        raise ValueError("bias: expected on both up and down, or on neither")
    mlp = Experts(1, up.in_features, up.out_features, activation=activation, bias=up.bias is not None)
    first = [up] if gate is None else [gate, up]
    mlp = mlp.to(up.weight.device, up.weight.dtype)
    with torch.no_grad():
        mlp.gate_up_weight.copy_(torch.cat([linear.weight for linear in first])[None])
        mlp.down_weight.copy_(down.weight[None])
        if mlp.gate_up_bias is not None and mlp.down_bias is not None:
            mlp.gate_up_bias.copy_(torch.cat([linear.bias for linear in first])[None])
            mlp.down_bias.copy_(down.bias[None])
    return mlp


def select(experts: Experts, ids: Sequence[int]) -> Experts:
    """Experts ``ids`` in this order: fewer (pruning), or one several times (sparse upcycling, arXiv 2212.05055)."""
    index = torch.tensor(list(ids), device=experts.gate_up_weight.device)
    return _rebuilt(experts, {name: weight[index] for name, weight in experts.named_parameters()})


def stack(parts: Sequence[Experts]) -> Experts:
    """The experts of several modules of one shape, one after the other: FFNs of several fine-tunes, say."""
    names = [name for name, _ in parts[0].named_parameters()]
    return _rebuilt(parts[0], {n: torch.cat([part.get_parameter(n) for part in parts]) for n in names})


def split(
    dense: Experts,
    num_experts: int,
    *,
    method: SplitMethod = "contiguous",
    bias_divisor: int | None = None,
    generator: torch.Generator | None = None,
) -> Experts:
    """Divide the neurons of a dense MLP among experts of equal width: the sum of all experts is the dense MLP.

    Args:
        dense: of one expert.
        num_experts: divides the intermediate size.
        method: which neurons go together: neighbours; a random partition; or balanced k-means over the directions of
            their input weights (``up``'s; MoEfication, EMoE), which needs scipy.
        bias_divisor: by how much the output bias is divided: the number of experts that are summed. None is
            ``num_experts``.
        generator: for the random partition and the first centres of the k-means.

    Raises:
        ValueError: more than one expert, or an intermediate size that ``num_experts`` does not divide.
        ImportError: ``balanced_kmeans`` without scipy.
    """
    if dense.num_experts != 1 or dense.intermediate_size % num_experts:
        raise ValueError(
            f"dense: expected one expert with an intermediate size that is a multiple of {num_experts}, got "
            f"{dense.num_experts} of {dense.intermediate_size}"
        )
    width = dense.intermediate_size // num_experts
    if method == "contiguous":
        neurons = torch.arange(dense.intermediate_size)
    elif method == "random":
        neurons = torch.randperm(dense.intermediate_size, generator=generator)
    elif method == "balanced_kmeans":
        keys = dense.gate_up_weight.detach()[0, -dense.intermediate_size :]
        neurons = balanced_kmeans(keys, num_experts, generator=generator).argsort(stable=True)
    else:
        raise ValueError(f"method: expected contiguous, random or balanced_kmeans, got {method!r}")
    neurons = neurons.view(num_experts, width).to(dense.gate_up_weight.device)
    rows = torch.cat([neurons, neurons + dense.intermediate_size], 1) if _gated(dense) else neurons
    weights = {
        "gate_up_weight": dense.gate_up_weight[0][rows],
        "down_weight": dense.down_weight[0].T[neurons].transpose(1, 2),
    }
    if dense.gate_up_bias is not None and dense.down_bias is not None:
        weights["gate_up_bias"] = dense.gate_up_bias[0][rows]
        weights["down_bias"] = (dense.down_bias / (bias_divisor or num_experts)).expand(num_experts, -1)
    return _rebuilt(dense, weights)


def grow(layer: MoE, source: int, *, train_old: bool = False) -> MoE:
    """A layer with one more expert, the last id: a copy of expert ``source`` and of its router row.

    The new expert is a group of its own, the new router row a map of its own beside the old one, so that what was there
    can stay bitwise as it is: without ``train_old`` it takes no gradient, and no weight decay.

    Args:
        layer: with a linear router without bias, or one that was grown; its experts are :class:`Experts`, or groups
            of which the first holds ``source``.
        source: id of the expert to copy.
        train_old: leave everything else trainable.
    """
    grown = copy.deepcopy(layer)
    grown.requires_grad_(train_old)
    old = grown.router.logits
    groups = list(grown.experts) if isinstance(grown.experts, ExpertGroups) else [grown.experts]
    first, maps = groups[0], list(old) if isinstance(old, ConcatenatedLogits) else [old]
    if not (isinstance(first, Experts) and isinstance(maps[0], nn.Linear) and source < first.num_experts):
        raise ValueError(f"layer: expected a linear router and Experts that hold expert {source}")
    row = nn.Linear(maps[0].in_features, 1, bias=False).to(maps[0].weight)
    row.weight.data.copy_(maps[0].weight.data[source : source + 1])
    added = select(first, [source]).requires_grad_()
    shares = grown.experts.capacity_shares if isinstance(grown.experts, ExpertGroups) else [1.0]
    grown.experts = ExpertGroups([*groups, added], capacity_shares=[*shares, shares[0]])
    grown.router.logits = ConcatenatedLogits([*maps, row])
    grown.router.num_experts += 1
    return grown


class ConcatenatedLogits(nn.ModuleList):
    """Several maps to logits, side by side: some frozen and some trained."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([logits(hidden) for logits in self], dim=-1)


@torch.no_grad()
def share(experts: Experts, beta: float) -> None:
    """Draw every expert towards the mean of the others, in place: ``w_i <- (1 - beta) w_i + beta mean_{j != i} w_j``.

    The mean over the experts stays; the distance from it shrinks by ``|1 - beta E / (E - 1)|``.

    Raises:
        ValueError: beta is outside [0, 1], or there is one expert only.
    """
    if not 0 <= beta <= 1 or experts.num_experts < 2:
        raise ValueError(f"beta: expected 0 to 1 and two experts or more, got {beta} and {experts.num_experts}")
    others = beta / (experts.num_experts - 1)
    for weight in experts.parameters():
        total = weight.sum(0, keepdim=True)
        weight.mul_(1 - beta - others).add_(total, alpha=others)


def to_dense(experts: Experts, *, method: Literal["average", "concatenate"]) -> Experts:
    """One dense MLP: the mean of all experts, or all neurons side by side (the inverse of :func:`split`).

    The output biases are averaged, or summed up.
    """
    if method == "average":
        return _rebuilt(experts, {name: w.mean(0, keepdim=True) for name, w in experts.named_parameters()})
    parts = 2 if _gated(experts) else 1
    weights = {
        "gate_up_weight": _neurons_together(experts.gate_up_weight, parts),
        "down_weight": experts.down_weight.transpose(0, 1).flatten(1)[None],
    }
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        weights["gate_up_bias"] = _neurons_together(experts.gate_up_bias, parts)
        weights["down_bias"] = experts.down_bias.sum(0, keepdim=True)
    return _rebuilt(experts, weights)


def _neurons_together(weight: Tensor, parts: int) -> Tensor:
    """[num_experts, parts * width, ...] -> [1, parts * num_experts * width, ...]."""
    split_up = weight.reshape(weight.shape[0], parts, weight.shape[1] // parts, *weight.shape[2:])
    return split_up.transpose(0, 1).flatten(0, 2)[None]


def _gated(experts: Experts) -> bool:
    return experts.activation in GATED_ACTIVATIONS


def _rebuilt(experts: Experts, weights: dict[str, Tensor]) -> Experts:
    """Experts of the same kind around other weights."""
    if experts.weight_layout != "enk" or experts.gate_up_layout != "concatenated":
        raise ValueError(
            f"experts: expected layouts enk and concatenated, got {experts.weight_layout} and {experts.gate_up_layout}"
        )
    num_experts, _, width = weights["down_weight"].shape
    with torch.device("meta"):
        made = Experts(
            num_experts,
            experts.hidden_size,
            width,
            activation=experts.activation,
            bias=experts.gate_up_bias is not None,
            backend=experts.backend,
        )
    for name, weight in weights.items():
        setattr(made, name, nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format)))
    return made
