"""Under torch.autocast the matrix products run in autocast's dtype, as torch's own do; router weights stay as they are.

In the wrappers rather than by ``torch.library.register_autocast``, which knows one dtype per op and casts every
floating argument, the router weights among them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

# Asked once: Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available.
_WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")))


@overload
def cast_for_product(factor: Tensor) -> Tensor: ...
@overload
def cast_for_product(factor: None) -> None: ...
def cast_for_product(factor: Tensor | None) -> Tensor | None:
    """The tensor in autocast's dtype where autocast is on for its device; float64 stays, as it does in torch."""
    if factor is None or not torch._C._is_any_autocast_enabled() or not _is_on(factor.device.type):
        return factor
    if factor.dtype == torch.float64 or not factor.is_floating_point():
        return factor
    return factor.to(torch.get_autocast_dtype(factor.device.type))


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside, autocast is off for the tensor's device; nothing on a device that has none (meta)."""
    device_type = tensor.device.type
    if device_type not in _WITH_AUTOCAST:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _is_on(device_type: str) -> bool:
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)
