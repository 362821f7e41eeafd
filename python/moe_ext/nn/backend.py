"""Which implementation of the ops a module calls: the kernels, or their reference twins."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from torch import nn

import moe_ext
import moe_ext.reference

Backend = Literal["kernels", "reference"]
_MODULES: dict[str, ModuleType] = {"kernels": moe_ext, "reference": moe_ext.reference}


class BackendModule(nn.Module):
    """Holds the name, not the Python module: copies and pickles as any nn.Module does."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        if backend not in _MODULES:
            raise ValueError(f"backend: expected kernels or reference, got {backend!r}")
        self.backend = backend

    @property
    def ops(self) -> ModuleType:
        return _MODULES[self.backend]
