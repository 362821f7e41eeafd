"""bench/gpu_pass.sh and what it runs, where they can be tested without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_pass, gpu_smoke, gpu_test_plugin, gpu_tests

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench/gpu_pass.sh"
MISBEHAVING = """
import os, time, pytest
@pytest.mark.parametrize("i", range(3))
def test_good(i): pass
@pytest.mark.parametrize("i", range(4))
def test_hangs(i): time.sleep(100) if i != 2 else None
@pytest.mark.parametrize("i", range(3))
def test_faults(i): os.abort()
@pytest.mark.parametrize("i", range(3))
def test_wrong(i): assert i == 1, "not one"
"""


TILED = """
import os
def test_tile(): assert "MOE_EXT_SM90_TILE" not in os.environ
"""


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


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Folder and events of a file whose tests hang, fault and fail, and of one that cannot be imported."""
    folder = tmp_path_factory.mktemp("misbehaving")
    (folder / "test_misbehaving.py").write_text(MISBEHAVING)
    (folder / "test_broken.py").write_text("import no_such_module")
    (folder / "test_tiled.py").write_text(TILED)
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu_tests, "STARTUP_SECONDS", 0.5)
    patch.setattr(gpu_tests, "RERUN_SECONDS", 0.0)
    patch.setattr(gpu_tests, "TILED_FILES", ("test_tiled.py",))
    patch.setattr(gpu_tests, "TILES", ("64x256",))
    patch.setenv("MOE_EXT_SAMPLE", "1")
    patch.setattr(gpu_tests.signal, "signal", lambda *_: None)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    files = [str(folder / name) for name in ("test_misbehaving.py", "test_broken.py", "test_tiled.py")]
    status = gpu_tests.main([str(folder / "out"), *files, "--hang", "2", "--seconds", "300", "--jobs", "1"])
    patch.undo()
    assert status == 1
    return folder, [json.loads(line) for line in (folder / "out/tests.jsonl").read_text().splitlines()]


def names_of(events: list[dict], *kinds: str) -> list[str]:
    return sorted(e["test"].split("::")[-1] for e in events if e["event"] in kinds)


def test_hangs_and_faults_cost_themselves_only(misbehaving):
    _, events = misbehaving
    assert names_of(events, "passed")[:3] == ["test_good[0]", "test_good[1]", "test_good[2]"]
    assert "test_wrong[1]" in names_of(events, "passed")
    assert names_of(events, "failed") == ["test_tile", "test_wrong[0]", "test_wrong[2]"]
    # Twice a function may hang or fault; then its other parameters are given up.
    assert len(names_of(events, "fault")) == 2 and len(names_of(events, "hang")) == 2
    assert all("test_hangs" in test for test in names_of(events, "hang"))
    started = [e["test"] for e in events if e["event"] == "start" and "tile" not in e]
    assert len(set(started)) == len(started), "a test ran twice"
    hang = next(e for e in events if e["event"] == "hang")
    assert "in test_hangs" in hang["text"], "the stack of a test that hangs is not told"


def test_summary_names_what_went_wrong(misbehaving):
    folder, events = misbehaving
    text = (folder / "out/tests.txt").read_text()
    assert "2 failed, 2 hang, 2 fault" in text and "not reached" in text
    assert "test_broken.py: BROKEN" in text and "no_such_module" in text
    assert "test_wrong: 2 failed; first" in text and "not one" in text
    assert len(names_of(events, "broken")) == 1
    assert "test_tiled.py: 1 passed" in text and "test_tiled.py on 64x256: 1 failed" in text


def test_time_that_runs_out_leaves_no_function_untried():
    tests = [f"a.py::test_{f}[{i}]" for f in "xyz" for i in range(5)]
    order = gpu_test_plugin.in_turns(tests)
    assert sorted(order) == sorted(tests)
    assert {gpu_test_plugin.function_of(test) for test in order[:3]} == {f"a.py::test_{f}" for f in "xyz"}


def test_steps_are_limited_and_reported(tmp_path):
    """A step that hangs is killed with its children, one that fails is told; the next ones run."""
    work = gpu_pass.Pass(tmp_path, 60)
    start = time.monotonic()
    work.run(
        [
            gpu_pass.Step("hangs", 1, ["bash", "-c", "echo before; sleep 100"]),
            gpu_pass.Step("fails", 30, ["bash", "-c", "echo why; exit 3"]),
            gpu_pass.Step("passes", 30, ["true"]),
        ],
        jobs=2,
    )
    assert time.monotonic() - start < 20
    verdict = (tmp_path / "verdict.txt").read_text()
    assert "FAIL out of time  hangs" in verdict and "FAIL status 3  fails" in verdict and "PASS  passes" in verdict
    assert "why" in verdict and "before" in (tmp_path / "report.txt").read_text()
    assert work.failed == {"hangs", "fails"}


def test_no_step_starts_after_the_deadline(tmp_path):
    work = gpu_pass.Pass(tmp_path, 0.5)
    start = time.monotonic()
    work.run([gpu_pass.Step(f"step-{i}", 30, ["sleep", "30"]) for i in range(3)])
    assert time.monotonic() - start < 10 and work.failed == {"step-0", "step-1", "step-2"}


def test_limit_stays_under_nine_minutes():
    assert gpu_pass.TOTAL_SECONDS < 9 * 60 - 5


@pytest.mark.parametrize("piece", ["gates", "products-float32", "products-128x256", "layers-bfloat16"])
def test_smoke_pieces_run(piece, capsys):
    assert gpu_smoke.main([piece]) == 0
    assert f"ok {piece}" in capsys.readouterr().out


def test_map_shows_where_a_product_is_wrong():
    exact = torch.randn(40, 48)
    found = exact.clone()
    found[16:32, 16:32] += 5.0
    found[39, 0] = float("nan")
    text = gpu_smoke.where_wrong(found, exact, 1e-2)
    assert "257 of 1920 wrong, first at [16, 16]" in text
    assert text.splitlines()[1:] == ["...", ".#.", "n.."]


def test_map_of_many_small_differences():
    """The norm may be off where no element is off by much."""
    exact = torch.ones(40, 48)
    assert "the largest difference is 0.001" in gpu_smoke.where_wrong(exact + 1e-3, exact, 1e-2)
