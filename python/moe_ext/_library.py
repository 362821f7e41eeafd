"""Loads the op libraries; imported once, before any op is defined."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


def load() -> None:
    """Load libmoe_ext.so, and libmoe_ext_cuda.so where torch itself has CUDA.

    Raises ImportError naming the mending command if the libraries are missing or do not load, or torch is too old.
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
    _load(library)
    cuda_library = PACKAGE / "libmoe_ext_cuda.so"
    if torch.version.cuda is not None and cuda_library.exists() and library.parent == PACKAGE:
        _load(cuda_library)


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        reason = error.__cause__ or error
        raise ImportError(
            f"{library} does not load under torch {torch.__version__}: {reason}. It was built for another system or a "
            "newer torch; run: pip install --force-reinstall --no-build-isolation . in the source checkout, or install "
            "the torch that it was built with or a later one"
        ) from error


def build_info() -> dict[str, Any]:
    """What this installation holds.

    Returns:
        A dict with ``version``, ``cuda`` (bool: was libmoe_ext_cuda.so built), ``cuda_archs``, ``built_with_torch``,
        ``compiler``, and ``torch``, the version that runs now.

    Raises:
        ImportError: the installation is for another CPython; everything but this works all the same.
    """
    try:
        from moe_ext import _host
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"moe_ext._host is missing for CPython {version}: it is the one part of moe_ext that is built for one "
            "CPython version. Run `pip install .` in the source checkout with this one"
        ) from error
    return {**_host.build_info(), "torch": torch.__version__}


load()
