"""A build that cannot work says so before it starts, and says what to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

import build_checks  # noqa: E402

GOOD_TORCH = ("2.14.1+cu130", "13.0", False)
MODULES = {"pybind11": True, "cutlass_library": True}


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """No tool on PATH and none beside this Python."""
    monkeypatch.setattr(build_checks, "tool_path", lambda environment: environment["PATH"])
    return {"PATH": str(tmp_path)}


PROBLEMS = [
    ("compiler", GOOD_TORCH, False, MODULES, "no C++ compiler found. Run: apt-get install g++"),
    ("cmake", GOOD_TORCH, False, MODULES, "cmake not found. Run: pip install cmake"),
    ("ninja", GOOD_TORCH, False, MODULES, "ninja not found. Run: pip install ninja"),
    ("nvcc", GOOD_TORCH, True, MODULES, "nvcc not found. Install the CUDA toolkit"),
    ("no torch", None, False, MODULES, "torch not found. Run: pip install 'torch>=2.11'"),
    ("old torch", ("2.10.0", None, False), False, MODULES, "torch 2.10.0 is too old, 2.11 is needed"),
    ("torch without CUDA", ("2.13.0+cpu", None, False), True, MODULES, "torch 2.13.0+cpu has no CUDA"),
    ("pybind11", GOOD_TORCH, False, {**MODULES, "pybind11": False}, "pybind11 not found. Run: pip install pybind11"),
    ("cutlass", GOOD_TORCH, True, {**MODULES, "cutlass_library": False}, f"Run: pip install {build_checks.CUTLASS}"),
]


@pytest.mark.parametrize(
    "torch, with_cuda, modules, message", [pytest.param(*rest, id=name) for name, *rest in PROBLEMS]
)
def test_problems_name_the_cure(torch, with_cuda, modules, message, nothing_installed):
    assert any(message in p for p in build_checks.find_problems(nothing_installed, torch, with_cuda, modules))


def test_cuda_needs_are_not_asked_of_a_cpu_build(nothing_installed):
    problems = build_checks.find_problems(nothing_installed, ("2.13.0", None, False), False, {"pybind11": True})
    assert not any("nvcc" in p or "CUTLASS" in p or "CUDA" in p for p in problems)


@pytest.mark.parametrize("choice, expected", [("1", True), ("on", True), ("0", False), ("OFF", False), ("auto", False)])
def test_choice_of_cuda(choice, expected):
    assert build_checks.wants_cuda({"PATH": "", "MOE_EXT_CUDA": choice}, GOOD_TORCH) is expected


def test_unknown_choice_of_cuda():
    with pytest.raises(SystemExit, match="MOE_EXT_CUDA: expected auto, 1 or 0, got 'maybe'"):
        build_checks.wants_cuda({"MOE_EXT_CUDA": "maybe"}, GOOD_TORCH)


def test_setup_stops_before_compiling(tmp_path):
    """The real setup.py, with a compiler that does not exist."""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler", "MOE_EXT_CUDA": "0"}
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "moe_ext cannot be built:" in run.stderr and "no C++ compiler found" in run.stderr
    assert "Traceback" not in run.stderr
