"""MoLA: a router at every linear map, more experts in higher layers ("Higher Layers Need More LoRA Experts", arXiv
2402.08562).

``W x + sum_j g_j B_j A_j x`` at each of a block's seven linear maps, g the softmax of the picked two, renormalised;
Switch's balance loss. The layers, cut into as many runs as there are numbers, get 2, 4, 6 and 8 experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from moe_ext.nn import InPlaceOfMLP, LoRAExperts, LoRALinear, replace_modules


class MoLA(LoRALinear):
    """One linear map. hidden [..., in_features] -> MoEOutput of [..., out_features]."""

    def __init__(
        self, base: nn.Linear, num_experts: int, topk: int = 2, *, rank: int = 8, alpha: float = 16.0, **options: Any
    ) -> None:
        experts = LoRAExperts(num_experts, base.in_features, base.out_features, rank, alpha=alpha)
        super().__init__(base, experts, topk, gating={"renormalize": True}, **options)


def experts_per_layer(num_layers: int, allocation: Sequence[int] = (2, 4, 6, 8)) -> list[int]:
    """Layers cut into ``len(allocation)`` equal runs, the lowest first (MoLA-2468)."""
    if num_layers < 1 or num_layers % len(allocation):
        raise ValueError(f"num_layers: expected a positive multiple of {len(allocation)}, got {num_layers}")
    return [experts for experts in allocation for _ in range(num_layers // len(allocation))]


def apply_mola(
    model: nn.Module, patterns: Sequence[str], *, allocation: Sequence[int] = (2, 4, 6, 8), **options: Any
) -> list[MoLA]:
    """Give linear maps of a model experts, in place.

    Args:
        model: everything that is not added is frozen.
        patterns: one per linear map of a block, names as in a shell: ``"layers.*.self_attn.q_proj"``; each must match
            once in every layer.
        allocation: experts by run of layers, as in :func:`experts_per_layer`.
        options: as in :class:`MoLA`.

    Returns:
        The layers, by pattern and then by layer; ``InPlaceOfMLP.output`` of the module around each holds its losses.
    """
    model.requires_grad_(False)
    made: list[MoLA] = []
    for pattern in patterns:
        num_layers = sum(fnmatchcase(name, pattern) for name, _ in model.named_modules())
        counts = experts_per_layer(num_layers, allocation)
        make = partial(_in_place, counts, options)
        made += [module.layer for module in replace_modules(model, pattern, make)]  # type: ignore[misc]
    return made


def _in_place(counts: Sequence[int], options: dict[str, Any], number: int, linear: nn.Module) -> nn.Module:
    return InPlaceOfMLP(MoLA(linear, counts[number], **options))  # type: ignore[arg-type]
