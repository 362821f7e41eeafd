"""Keyword arguments of an op, held by a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Knobs(nn.Module):
    """Keyword arguments of ``op``, checked when they are given; tensors are buffers, so that they move with the module.

    Args:
        op: the function that takes them.
        values: names and values, names among the keyword-only arguments of ``op``.
        reserved: names that the caller fills in itself.
    """

    def __init__(self, op: Callable[..., Any], values: dict[str, Any], reserved: tuple[str, ...] = ()) -> None:
        super().__init__()
        keyword_only = (p.name for p in inspect.signature(op).parameters.values() if p.kind is p.KEYWORD_ONLY)
        self.allowed = frozenset(keyword_only) - set(reserved)
        self.op_name = op.__name__
        self._check(values)
        self.options = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        self.constants = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        for name, value in self.constants.items():
            self.register_buffer(name, value.clone())

    def reset_parameters(self) -> None:
        """The buffers as they were given, after a module that was made on the meta device got memory."""
        for name, value in self.constants.items():
            self.get_buffer(name).copy_(value)

    def forward(self, precision: torch.dtype, values: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call: ``values`` stand before what is held; floating tensors in ``precision``."""
        self._check(values)
        found = {**self.options, **dict(self.named_buffers(recurse=False)), **values}
        return {
            name: value.to(precision) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in found.items()
        }

    def _check(self, values: dict[str, Any]) -> None:
        unknown = sorted(set(values) - self.allowed)
        if unknown:
            raise TypeError(f"{unknown[0]}: expected an option of {self.op_name}, one of {sorted(self.allowed)}")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
