"""Importing moe_ext where it cannot work says what is wrong and what to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_ext

PACKAGE = Path(moe_ext.__file__).resolve().parent


def import_with(before: str) -> str:
    """The last line that a fresh interpreter prints when it imports moe_ext after ``before``."""
    command = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import os, torch; {before}; import moe_ext"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    return run.stderr.strip().splitlines()[-1]


def test_torch_is_too_old():
    message = import_with("torch.__version__ = '2.10.1+cpu'")
    assert message == (
        "ImportError: moe_ext needs torch >= 2.11, found torch 2.10.1+cpu; run: pip install 'torch>=2.11'"
    )


def test_the_library_is_missing(tmp_path):
    message = import_with(f"os.environ['MOE_EXT_LIBRARY'] = {str(tmp_path / 'libmoe_ext.so')!r}")
    assert "libmoe_ext.so is missing: the package was not built. Run `pip install .`" in message


def test_the_library_does_not_load(tmp_path):
    """As after a build for a newer torch, whose symbols this one lacks."""
    source, library = tmp_path / "newer.cpp", tmp_path / "libmoe_ext.so"
    source.write_text('extern "C" int aoti_torch_of_a_newer_torch(); int use = aoti_torch_of_a_newer_torch();')
    build = subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], capture_output=True)
    if build.returncode != 0:
        pytest.skip("no C++ compiler")
    message = import_with(f"os.environ['MOE_EXT_LIBRARY'] = {str(library)!r}")
    assert message.startswith(f"ImportError: {library} does not load under torch") and "pip install" in message
    assert "aoti_torch_of_a_newer_torch" in message


def test_the_module_of_another_cpython_is_missing():
    """The ops work; only what is bound by pybind11 does not, and says so."""
    message = import_with("sys.modules['moe_ext._host'] = None; import moe_ext; moe_ext.permute; moe_ext.build_info()")
    assert message.startswith("ImportError: moe_ext._host is missing for CPython 3.") and "pip install ." in message
