"""Tensors that say they are on a GPU, on a machine without one: fake tensors of the device cuda that carry their values.

Every op runs on the values, on the CPU, and once more on the fake tensors, which refuse to mix devices and to differ in
shape or dtype from what was computed. Autograd's engine would ask for a real device: gradients are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map


class BackwardReached(BaseException):
    """``Tensor.backward``: the test cannot go on."""


class WrongDevice(RuntimeError):
    """An op of ours got tensors of several devices, where a kernel would raise, or its fake says something else."""


_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _value(x: Any) -> Any:
    if isinstance(x, FakeTensor):
        return x._value
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


class FakeCuda(FakeTensorMode):
    """The mode under which ``device="cuda"`` makes such tensors."""

    _fakes_alone = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._fakes_alone or func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type != "meta"}
        if func.namespace == "moe_ext" and len(devices) > 1:
            raise WrongDevice(f"{func}: tensors on {sorted(map(str, devices))}")
        # Fake tensors let it pass, a GPU does not.
        indices = args[1] if func.overloadpacket in _INDEXING and args[0].device.type == "cpu" else ()
        if any(i is not None and i.device.type == "cuda" for i in indices):
            raise WrongDevice(f"{func}: a tensor on the CPU with indices on {sorted(map(str, devices))}")
        result = func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if not any(isinstance(x, Tensor) for x in tree_leaves(result)):
            return result
        device = max(devices, key=lambda d: d.type == "cuda", default=torch.device("cpu"))
        self._fakes_alone = True
        try:
            fakes = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            with self:
                fakes = tree_map(lambda x: _like(x, device), result)
        finally:
            self._fakes_alone = False
        for fake, value in zip(tree_leaves(fakes), tree_leaves(result), strict=True):
            if isinstance(fake, FakeTensor):
                if fake.shape != value.shape or fake.dtype != value.dtype:
                    raise WrongDevice(f"{func}: {fake} for {value}")
                fake._value = value
        return fakes


def _like(x: Any, device: torch.device) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which swaps a parameter with its copy on the device: fake tensors cannot be swapped."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        part._buffers.update({name: function(b) for name, b in part._buffers.items() if b is not None})
    return module


def _backward(*_: Any, **__: Any) -> None:
    raise BackwardReached


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends early and silently at a call of ``Tensor.backward``, and where a gradient of zeros is found to be wrong."""
    asked = False

    def zero_gradients(outputs: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        nonlocal asked
        asked = True
        return tuple(torch.zeros_like(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs))

    monkeypatch.setattr(torch.autograd, "grad", zero_gradients)
    monkeypatch.setattr(Tensor, "backward", _backward)
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    try:
        with FakeCuda(allow_non_fake_inputs=False):
            yield
    except BackwardReached:
        pass
    except AssertionError:
        if not asked:
            raise
