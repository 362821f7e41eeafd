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

from bench import gpu_names, gpu_pass, gpu_processes, gpu_smoke, gpu_test_plugin, gpu_tests

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
def test_threads(): assert os.environ["OMP_NUM_THREADS"] == "2"
"""
STUCK = """
import time, pytest
@pytest.fixture
def memory(): pytest.skip("needs 999 GiB")
def test_skipped(memory): pass
def test_skipped_too(memory): pass
def test_stuck_a(): time.sleep(100)
def test_stuck_b(): time.sleep(100)
def test_stuck_c(): time.sleep(100)
def test_stuck_d(): pass
"""
# The device tells of a fault when it is asked, not when the kernel is launched.
LATE = """
import sys, types
pending = []
def synchronize():
    if pending: raise RuntimeError("CUDA error: an illegal memory access was encountered")
sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))
def test_launches_what_faults(): pending.append(1)
def test_innocent(): pass
"""
WRITTEN = {"test_misbehaving.py": MISBEHAVING, "test_broken.py": "import no_such_module", "test_tiled.py": TILED,
           "test_stuck.py": STUCK, "test_late.py": LATE}  # fmt: skip


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
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
    for name, text in WRITTEN.items():
        (folder / name).write_text(text)
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu_tests, "STARTUP_SECONDS", 0.5)
    patch.setattr(gpu_tests, "RERUN_SECONDS", 0.0)
    patch.setattr(gpu_tests, "TILED_FILES", ("test_tiled.py",))
    patch.setattr(gpu_tests, "SUMMARY_SECONDS", 0.0)
    patch.setenv("MOE_EXT_SAMPLE", "1")
    patch.setattr(gpu_tests.signal, "signal", lambda *_: None)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    files = [str(folder / name) for name in WRITTEN]
    options = ["--hang", "2", "--seconds", "300", "--jobs", "1", "--tiles", "64x256"]
    status = gpu_tests.main([str(folder / "out"), *files, *options])
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
    hanging, faulty = names_of(events, "hang"), names_of(events, "fault")
    assert sum("test_faults" in test for test in faulty) == 2 and sum("test_hangs" in test for test in hanging) == 2
    started = [e["test"] for e in events if e["event"] == "start" and "tile" not in e]
    assert len(set(started)) == len(started), "a test ran twice"
    hang = next(e for e in events if e["event"] == "hang")
    assert "in test_hangs" in hang["text"], "the stack of a test that hangs is not told"


def test_a_file_is_given_up_after_some_hangs(misbehaving):
    folder, events = misbehaving
    stuck = names_of([e for e in events if "test_stuck" in e.get("test", "")], "hang")
    assert stuck == ["test_stuck_a", "test_stuck_b", "test_stuck_c"]
    assert "test_stuck.py: 2 skipped, 3 hang, 1 not reached" in (folder / "out/tests.txt").read_text()


def test_a_fault_is_blamed_on_its_own_test(misbehaving):
    _, events = misbehaving
    late = [e for e in events if "test_late" in e.get("test", "")]
    assert names_of(late, "fault") == ["test_launches_what_faults"] and names_of(late, "passed") == ["test_innocent"]


def test_skips_are_listed_with_their_reasons(misbehaving):
    text = (misbehaving[0] / "out/tests.txt").read_text()
    assert "2 skipped: needs 999 GiB; first " in text and "::test_skipped\n" in text


def test_files_without_products_come_first_and_tiles_last():
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    order = gpu_tests.in_order(files, ["128x128", "128x256x2"])
    names = [path.name for path, tile in order if not tile]
    assert sorted(names) == [path.name for path in files]
    assert set(names[: len(gpu_tests.WITHOUT_PRODUCTS)]) == set(gpu_tests.WITHOUT_PRODUCTS)
    assert [(path.name, tile) for path, tile in order[len(names) :]] == [
        (name, tile) for tile in ("128x128", "128x256x2") for name in sorted(gpu_tests.TILED_FILES)
    ]


def test_products_leave_processes_to_other_files():
    def file(name: str) -> gpu_tests.File:
        return gpu_tests.File(Path(name), *[Path("x")] * 3, 1.0)

    products, gating = [file(f"test_{i}.py") for i in range(9)], file("test_gpu_gating.py")
    assert gpu_tests.following([*products[:2], gating], [], 8) is products[0]
    assert gpu_tests.following([*products[:2], gating], products[5:], 8) is gating
    assert gpu_tests.following(products[:2], products[5:], 8) is None
    assert gpu_tests.following([gating], products[:8], 8) is None


def test_time_is_kept_for_running_again(monkeypatch):
    """As soon as something went wrong, and only then."""
    monkeypatch.setattr(gpu_tests, "RERUN_SECONDS", 100.0)
    monkeypatch.setattr(gpu_tests.File, "start", lambda self: None)
    monkeypatch.setattr(gpu_tests.File, "look", lambda self: setattr(self, "done", True))
    files = [gpu_tests.File(Path(f"test_{i}.py"), *[Path("missing")] * 3, 1.0) for i in range(2)]
    gpu_tests.run_files(files[:1], 1, time.time() + 50)
    assert files[0].done
    files[0].events = [{"event": "failed", "test": "x"}]
    gpu_tests.run_files(files, 1, time.time() + 50)
    assert not files[1].done


def test_a_forced_tile_spares_the_file_that_it_would_empty(monkeypatch):
    monkeypatch.setenv(gpu_names.TILE_VARIABLE, "128x128")
    assert gpu_tests.environment("", Path("test_gpu_experts.py"))[gpu_names.TILE_VARIABLE] == "128x128"
    assert gpu_names.TILE_VARIABLE not in gpu_tests.environment("", Path(f"tests/gpu/{gpu_tests.UNTILED}"))
    assert gpu_tests.environment("64x256", Path("x.py"))[gpu_names.TILE_VARIABLE] == "64x256"
    names = {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert names >= {gpu_tests.UNTILED, *gpu_tests.TILED_FILES, *gpu_tests.WITHOUT_PRODUCTS}


def test_summary_names_what_went_wrong(misbehaving):
    folder, events = misbehaving
    text = (folder / "out/tests.txt").read_text()
    assert "2 failed, 2 hang, 2 fault" in text and "not reached" in text
    assert "test_broken.py: BROKEN" in text and "no_such_module" in text
    assert "test_wrong: 2 failed; first" in text and "not one" in text
    assert len(names_of(events, "broken")) == 1
    assert "test_tiled.py: 2 passed" in text and "test_tiled.py on 64x256: 1 passed, 1 failed" in text


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
    verdict = (tmp_path / "report.txt").read_text().split("\n\n")[0]
    assert "FAIL out of time  hangs" in verdict and "FAIL status 3  fails" in verdict and "PASS  passes" in verdict
    assert "why" in verdict and "before" in (tmp_path / "report.txt").read_text()
    assert work.failed == {"hangs", "fails"}


def test_no_step_starts_after_the_deadline(tmp_path):
    work = gpu_pass.Pass(tmp_path, 0.5)
    start = time.monotonic()
    work.run([gpu_pass.Step(f"step-{i}", 30, ["sleep", "30"]) for i in range(3)])
    assert time.monotonic() - start < 10 and work.failed == {"step-0", "step-1", "step-2"}


def test_what_stays_in_the_driver_is_left_behind(monkeypatch):
    """A process that no signal ends does not stop the pass."""
    monkeypatch.setattr(gpu_processes, "KILL_SECONDS", 0.3)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    process, start = subprocess.Popen(["sleep", "60"], start_new_session=True), time.monotonic()
    gpu_processes.kill([process])
    assert time.monotonic() - start < 5 and process.poll() is None
    process.kill()
    process.wait()


def test_sanitizer_is_found_where_it_is_not_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert gpu_processes.find_tool("compute-sanitizer", tmp_path) is None
    program = tmp_path / "cuda-13.0/compute-sanitizer/compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("")
    assert gpu_processes.find_tool("compute-sanitizer", tmp_path) == str(program)
    monkeypatch.setattr(gpu_processes, "find_tool", lambda _: "cs")
    assert gpu_processes.sanitized("memcheck", ["x"]) == [
        "cs", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", "x",
    ]  # fmt: skip
    assert "--report-api-errors" not in gpu_processes.sanitized("racecheck", ["x"])


def test_parents_load_neither_torch_nor_the_library():
    code = "import sys, bench.gpu_pass, bench.gpu_tests; sys.exit(bool({'torch', 'moe_ext'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Stands for every Python process of the pass: writes down what it was asked and on which tile, leaves the same files.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
log, failing, hanging, *asked = sys.argv[1:]
with open(log, "a") as file:
    file.write(json.dumps([*asked, os.environ.get("MOE_EXT_SM90_TILE", "")]) + "\\n")
if "bench.gpu_tests" in asked:
    for name in ("tests.txt", "tests.jsonl"):
        Path(asked[2], name).write_text("tests\\n")
elif "--out" in asked:
    Path(asked[asked.index("--out") + 1], "-".join(asked[2:6]) + ".json").write_text("{}")
if asked[-1] in hanging.split():
    time.sleep(60)
sys.exit(asked[-1] in failing.split() or asked[0] in failing.split())
"""


class PassRun:
    def __init__(self, monkeypatch, tmp_path: Path) -> None:
        self.patch, self.folder, self.out, self.log = monkeypatch, tmp_path, tmp_path / "out", tmp_path / "log"
        (tmp_path / "stand_in.py").write_text(STAND_IN)
        monkeypatch.setattr(gpu_pass, "sanitized", lambda tool, command: command)
        monkeypatch.setattr(gpu_pass, "SMOKE_SECONDS", 5.0)

    def __call__(self, failing: str = "", hanging: str = "", *options: str) -> list[list[str]]:
        """What was asked of each process, and the tile that it was to use."""
        before = [sys.executable, str(self.folder / "stand_in.py"), str(self.log), failing, hanging]
        self.patch.setattr(gpu_pass, "python", lambda *arguments: [*before, *arguments])
        self.status = gpu_pass.main([str(self.out), *options])
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def report(self) -> str:
        return (self.out / "report.txt").read_text()


@pytest.fixture
def run_pass(monkeypatch, tmp_path) -> PassRun:
    return PassRun(monkeypatch, tmp_path)


def after_smoke(asked: list[list[str]]) -> list[str]:
    """What ran, in order, with its tile."""
    words = []
    for command in asked:
        if "bench.gpu_tests" in command:
            words.append("tests")
        elif "tune-tiles" in command:
            words.append("tiles")
        elif "--tables" in command:
            words.append(command[command.index("--tables") + 1])
        else:
            continue
        words[-1] += f" on {command[-1]}" if command[-1] else ""
    return words


def test_a_good_pass_leaves_few_files(run_pass):
    asked = run_pass()
    assert run_pass.status == 0 and after_smoke(asked) == ["tests", "B", "A", "C,D", "tiles"]
    sweep = next(command for command in asked if "tune-tiles" in command)
    assert sweep[sweep.index("--tiles") + 1 : -1] == [*gpu_names.TILES, gpu_names.CUTLASS_TILE]
    found = sorted(path.name for path in run_pass.out.rglob("*"))
    assert len(found) == 7, found  # no more than 8 come back
    assert run_pass.report.startswith("PASS  ") and "==== tests: PASS" in run_pass.report


def test_products_run_on_a_tile_that_works(run_pass):
    """The model's choice hangs: what is measured runs on another tile and says so."""
    asked = run_pass("products-128x256x2", "layer-128x256")
    assert run_pass.status == 1
    assert after_smoke(asked) == ["tests on 128x128", "B on 128x128", "A on 128x128", "C,D", "tiles"]
    tests = next(command for command in asked if "bench.gpu_tests" in command)
    assert tests[tests.index("--tiles") + 1] == "128x128,64x256"
    assert "NOTE  tiles 128x256, 128x256x2 fail: tests, sanitizer and tables A and B run on 128x128" in run_pass.report
    checked = [command for command in asked if command[1] == "bench.gpu_smoke" and len(command) > 4]
    assert checked and not any("layer-128x256" in command for command in checked)
    assert {command[-1] for command in checked} == {"128x128"}


def test_without_a_tile_what_needs_none_comes_first(run_pass):
    asked = run_pass(" ".join(gpu_names.LAYERS.values()))
    assert after_smoke(asked) == ["C,D", "tests"] and "NOTE  no sm_90a tile works" in run_pass.report
    sanitized = [command for command in asked if command[1] == "bench.gpu_smoke" and len(command) > 4]
    assert len(sanitized) == 2 and not set(gpu_names.LAYERS.values()) & {word for c in sanitized for word in c}


def test_a_tile_that_nothing_chooses_forces_none(run_pass):
    asked = run_pass("products-128x256x2")
    assert (
        after_smoke(asked) == ["tests", "B", "A", "C,D", "tiles"] and "left out of tests and sweep" in run_pass.report
    )


def test_a_library_that_does_not_load_has_a_verdict(run_pass):
    asked = run_pass("-c")
    assert run_pass.status == 1 and len(asked) == 1
    assert "FAIL status 1  import" in run_pass.report


def test_a_slow_import_does_not_stop_the_pass(run_pass, monkeypatch):
    monkeypatch.setattr(gpu_pass, "IMPORT_SECONDS", 1.0)
    monkeypatch.setattr(gpu_pass, "IMPORT_CHECK", "slow")
    run_pass("", "slow")
    assert "FAIL out of time  import" in run_pass.report and "PASS  tests" in run_pass.report


def test_a_missing_sanitizer_is_told(run_pass, monkeypatch):
    monkeypatch.setattr(gpu_pass, "sanitized", lambda *_: None)
    run_pass()
    assert run_pass.status == 0
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"SKIP  {tool}  compute-sanitizer is not there" in run_pass.report


def test_time_runs_from_the_start_of_the_script(run_pass):
    start = time.monotonic()
    run_pass("", "", "--start", str(time.time() - gpu_pass.TOTAL_SECONDS))
    assert time.monotonic() - start < 30 and not run_pass.log.exists()
    assert "FAIL not reached  import" in run_pass.report and "PASS" not in run_pass.report
    assert gpu_pass.TOTAL_SECONDS <= 560  # of 600, with what comes before and after


def test_script_hands_on_its_start_and_the_commit(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/bash\n[ "$1" = -c ] && { sleep 2; exit 0; }\necho "$@" commit=$MOE_EXT_COMMIT\n')
    stand_in.chmod(0o755)
    before = int(time.time())
    result = run(str(tmp_path / "out"), PYTHON=str(stand_in), MOE_EXT_COMMIT="abc1234")
    words = result.stdout.split()
    assert words[:2] == ["-m", "bench.gpu_pass"] and words[-1] == "commit=abc1234"
    assert before <= int(words[words.index("--start") + 1]) < before + 2
    assert len(run(str(tmp_path / "out"), PYTHON=str(stand_in)).stdout.split("commit=")[1].strip()) >= 7


@pytest.mark.parametrize("wheels, message", [
    (["dist/*.whl"], "expected a wheel, found none: dist/*.whl"),
    ([""], "expected a wheel, found none: "),
    (["a.whl", "b.whl"], "expected OUT and at most one wheel, got 2: a.whl b.whl"),
])  # fmt: skip
def test_wheels_are_counted_before_anything_else(wheels, message, tmp_path):
    result = run(str(tmp_path / "out"), *wheels, PYTHON="/no/such/python")
    assert result.returncode == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_names_of_the_pieces_are_the_pieces():
    assert set(gpu_smoke.PIECES) == set(gpu_names.SMOKE_PIECES) and len(set(gpu_names.SMOKE_PIECES)) == 15


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
