"""The CPU GEMM kernels of every instruction set that this machine has, through the tests that use them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# Every how many of a family's tests run: co-prime to the numbers of parameters, so that all values occur.
FAMILIES = {"grouped_gemm": 5, "grouped_gemm_cpu": 3, "experts": 11}
CALL = "import torch, moe_ext; x = torch.ones(1, 2, 2); print(moe_ext.grouped_gemm(x[0], x, torch.tensor([0, 2]).int(), weight_layout='enk').sum().item())"


def run(isa: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOE_EXT_CPU_ISA": isa, **environment}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])  # the best of all is what the other tests run on
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, isa):
    call = run(isa, "-c", CALL)
    if "MOE_EXT_CPU_ISA: expected portable" in call.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert call.stdout == "8.0\n", call.stderr[-2000:]
    tests = run(isa, "-m", "pytest", "-q", "-x", str(TESTS / f"test_{family}.py"), MOE_EXT_SAMPLE=str(FAMILIES[family]))
    assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr[-2000:]
    print(tests.stdout.splitlines()[-1])


def test_unknown_name():
    call = run("sse9", "-c", CALL)
    assert call.returncode != 0 and "MOE_EXT_CPU_ISA: expected portable" in call.stderr
    assert "got sse9" in call.stderr
