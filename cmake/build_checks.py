"""What must be there before a build starts; each gap is reported with the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping

OLDEST_TORCH = (2, 11)
CUTLASS = "nvidia-cutlass==4.2.0.0"


class BuildError(SystemExit):
    """Ends the build with a list of what is missing, and no traceback."""


def tool_path(environment: Mapping[str, str]) -> str:
    """PATH with the scripts of this Python first: pip may run without its environment being activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", "")])


def read_torch() -> tuple[str, str | None, bool] | None:
    """(version, CUDA version or None, whether a GPU can be used) of the torch to build against; None without one."""
    probe = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if run.returncode != 0:
        return None
    version, cuda, gpu = run.stdout.split()[-3:]
    return version, None if cuda == "None" else cuda, gpu == "True"


def wants_cuda(environment: Mapping[str, str], torch: tuple[str, str | None, bool] | None) -> bool:
    """MOE_EXT_CUDA=1 forces the CUDA build, 0 switches it off, auto follows a usable GPU and nvcc being there."""
    choice = environment.get("MOE_EXT_CUDA", "auto").strip().lower() or "auto"
    if choice in ("1", "on", "true"):
        return True
    if choice in ("0", "off", "false"):
        return False
    if choice != "auto":
        raise BuildError(f"moe_ext: MOE_EXT_CUDA: expected auto, 1 or 0, got {choice!r}")
    return bool(torch and torch[2] and shutil.which("nvcc", path=environment.get("PATH", "")))


def find_problems(
    environment: Mapping[str, str],
    torch: tuple[str, str | None, bool] | None,
    with_cuda: bool,
    has_module: Mapping[str, bool] | None = None,
) -> list[str]:
    """Each string names one missing thing and the command that mends it."""

    def module(name: str) -> bool:
        return has_module[name] if has_module is not None else importlib.util.find_spec(name) is not None

    problems = []
    path = tool_path(environment)
    if not shutil.which(environment.get("CXX") or "c++", path=path) and not shutil.which("g++", path=path):
        problems.append("no C++ compiler found. Run: apt-get install g++   (or set CXX)")
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool, path=path):
            problems.append(f"{tool} not found. Run: pip install {tool}")
    if not module("pybind11"):
        problems.append("pybind11 not found. Run: pip install pybind11")
    if torch is None:
        problems.append("torch not found. Run: pip install 'torch>=2.11'   (and build with --no-build-isolation)")
    elif tuple(int(part) for part in torch[0].split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        problems.append(f"torch {torch[0]} is too old, 2.11 is needed. Run: pip install 'torch>=2.11'")
    if with_cuda:
        if not shutil.which(environment.get("CUDACXX") or "nvcc", path=path):
            problems.append(
                "nvcc not found. Install the CUDA toolkit and put nvcc on PATH, or build with MOE_EXT_CUDA=0"
            )
        if torch is not None and torch[1] is None:
            problems.append(
                f"torch {torch[0]} has no CUDA. Install a CUDA build of torch, or build with MOE_EXT_CUDA=0"
            )
        if not module("cutlass_library"):
            problems.append(f"the CUTLASS headers were not found. Run: pip install {CUTLASS}")
    return problems


def check(environment: Mapping[str, str]) -> bool:
    """Whether to build for CUDA; raises BuildError naming everything that is missing."""
    torch = read_torch()
    with_cuda = wants_cuda(environment, torch)
    problems = find_problems(environment, torch, with_cuda)
    if problems:
        raise BuildError("\n".join(["moe_ext cannot be built:", *(f"  - {problem}" for problem in problems)]))
    return with_cuda
