"""Loads the op libraries; imported once, before any op is defined."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


def load() -> None:
    """Load libmoe_ext.so, and libmoe_ext_cuda.so where torch itself has CUDA.

    Raises ImportError naming the mending command if the libraries are missing or torch is too old.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(
            f"moe_ext needs torch >= 2.11, found torch {torch.__version__}; run: pip install 'torch>=2.11'"
        )
    # Tests load the CUDA kernels compiled for the CPU here (tests/emulation).
    library = Path(os.environ.get("MOE_EXT_LIBRARY", PACKAGE / "libmoe_ext.so"))
    if not library.exists():
        raise ImportError(
            f"{library} is missing: the package was not built. Run `pip install .` or `pip install -e .` "
            "in the source checkout."
        )
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    cuda_library = PACKAGE / "libmoe_ext_cuda.so"
    if torch.version.cuda is not None and cuda_library.exists() and library.parent == PACKAGE:
        torch.ops.load_library(str(cuda_library))  # type: ignore[no-untyped-call]


def build_info() -> dict[str, Any]:
    """What this installation holds.

    Returns:
        A dict with ``version``, ``cuda`` (bool: was libmoe_ext_cuda.so built), ``cuda_archs``, ``built_with_torch``,
        ``compiler``, and ``torch``, the version that runs now.
    """
    from moe_ext import _host

    return {**_host.build_info(), "torch": torch.__version__}


load()
