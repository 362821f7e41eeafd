"""Putting layers into a model that exists: which modules are replaced, and what stands in their place."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from moe_ext.nn.layer import MoE, MoEOutput


class InPlaceOfMLP(nn.Module):
    """A :class:`MoE` where a model expects an MLP: tensor in, tensor out.

    ``output`` holds the :class:`MoEOutput` of the last call, for the losses; None before the first.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer
        self.output: MoEOutput | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.output = self.layer(hidden)
        return self.output.hidden


def replace_modules(
    model: nn.Module, pattern: str, make: Callable[[int, nn.Module], nn.Module], *, last: int | None = None
) -> list[nn.Module]:
    """Replace the modules of a model whose names match, in place.

    Args:
        model: any module.
        pattern: of qualified names, as in a shell: ``"layers.*.mlp"``.
        make: from the number of a match, counted from the first one of the model, and the module to its replacement:
            experts per layer are a list that it looks into.
        last: only the last so many matches; None for all.

    Returns:
        The replacements, in the order of the model.

    Raises:
        ValueError: fewer matches than ``last``, or none.
    """
    names = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]
    if len(names) < (last or 1):
        raise ValueError(f"pattern: expected {last or 'some'} modules that match {pattern!r}, got {len(names)}")
    first = 0 if last is None else len(names) - last
    made = []
    for number, name in list(enumerate(names))[first:]:
        parent, _, child = name.rpartition(".")
        made.append(make(number, model.get_submodule(name)))
        setattr(model.get_submodule(parent), child, made[-1])
    return made
