"""CLIP-MoE: fine-tunes of one CLIP become one mixture ("CLIP-MoE: Towards Building Mixture of Experts for CLIP with
Diversified Multiplet Upcycling", arXiv 2409.19291).

The FFNs that several stages of contrastive training give from one model (everything else frozen) are the experts of
the last blocks: top-2 of softmax, renormalised, QuickGELU with biases, Switch's balance loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moe_ext.nn import Experts, InPlaceOfMLP, MoE, TopKRouter, replace_modules
from moe_ext.nn.transforms import dense_mlp, stack


class CLIPMoE(MoE):
    """One layer from the FFNs of several fine-tunes. hidden [..., hidden_size] -> MoEOutput."""

    def __init__(self, ffns: Sequence[Experts], topk: int = 2, **options: Any) -> None:
        experts = stack(ffns)
        experts.backend = backend = options.get("backend", "kernels")
        router = TopKRouter(experts.hidden_size, experts.num_experts, topk, renormalize=True, backend=backend)
        super().__init__(router.to(experts.down_weight), experts, **options)


def upcycle_clip(
    model: nn.Module, fine_tunes: Sequence[nn.Module], *, last: int, topk: int = 2, pattern: str = "*layers.*.mlp"
) -> list[CLIPMoE]:
    """Give the last blocks of a CLIP tower the FFNs of its fine-tunes as experts, in place.

    Args:
        model: of transformers' CLIP, ``fc1``, QuickGELU and ``fc2`` in every MLP; its own FFNs become experts 0.
        fine_tunes: models of the same names.
        last: how many blocks.
        topk: experts per token.
        pattern: names of the MLPs.

    Returns:
        The layers; ``InPlaceOfMLP.output`` of the module around each holds its losses.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def make(_: int, mlp: nn.Module) -> nn.Module:
        mlps = [mlp, *(other.get_submodule(names[id(mlp)]) for other in fine_tunes)]
        return InPlaceOfMLP(CLIPMoE([_dense(m) for m in mlps], topk))

    return [made.layer for made in replace_modules(model, pattern, make, last=last)]  # type: ignore[misc]


def _dense(mlp: nn.Module) -> Experts:
    return dense_mlp(mlp.fc1, mlp.fc2, activation="quick_gelu")  # type: ignore[arg-type]
