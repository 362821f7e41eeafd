"""Pieces of the CUDA sources that a host compiler takes, as a library for ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

EMULATION = Path(__file__).resolve().parent / "emulation"


def find_compiler() -> str:
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    return compiler


def compile_library(program: str, include: Path, folder: Path, *further: str) -> ctypes.CDLL:
    """`program` with `include` on its path, compiled in `folder` with `further` options."""
    (folder / "program.cpp").write_text(program)
    library = folder / "program.so"
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([find_compiler(), *options, "program.cpp", "-o", str(library), *further], cwd=folder, check=True)
    return ctypes.CDLL(str(library))


def compile_emulated(program: str, include: Path, folder: Path) -> ctypes.CDLL:
    """Likewise, with the emulator of tests/emulation for what it has of CUDA."""
    paths = [f"-I{path}" for path in (EMULATION, *include_paths())]
    emulator = str(EMULATION / "cuda_emulator.cpp")
    return compile_library(program, include, folder, "-std=c++20", "-w", "-DMOE_EXT_EMULATED", *paths, emulator)
