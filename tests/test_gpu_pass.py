"""bench/gpu_pass.sh where it can be tested without a GPU: its use, and its word that there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "bench/gpu_pass.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def test_usage():
    result = run()
    assert result.returncode == 2 and "usage: bench/gpu_pass.sh OUT [WHEEL]" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run bench/gpu_pass.sh itself")
def test_says_at_once_that_there_is_no_gpu(tmp_path):
    result = run(str(tmp_path))
    assert result.returncode == 3 and "no GPU" in result.stdout


def test_limits_stay_under_nine_minutes():
    limits = [int(line.split()[2]) for line in SCRIPT.read_text().splitlines() if line.startswith(("step ", "  step "))]
    assert len(limits) >= 9 and sum(limits) < 9 * 60
