"""What only a GPU runs, as far as a CPU can run it: the Python of tests/gpu and of the benchmark's CUDA paths."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import cuda_stand_in
import moe_ext
from bench import __main__ as bench
from bench import machine, timing
from bench.case import Case
from bench.timing import Timer, graphed
from fake_cuda import WrongDevice, fake_cuda
from moe_ext import reference

ROOT = Path(__file__).resolve().parent.parent

if torch.cuda.is_available():
    pytest.skip("there is a GPU: run tests/gpu itself", allow_module_level=True)


ON_CPU = "capture or expert_parallel or graph_replay or threads"
# Those whose files make no sense there, and single tests: CUDA's autocast and profiler need a GPU, and only CUDA kernels
# refuse misaligned rows.
NOT_ON_FAKES = f"{ON_CPU} or gpu_large or compile or features or mistakes or sharded or test_autocast or " \
               "frozen_weights_cost or (misaligned and a2a_unpack_rows)"  # fmt: skip


# How many parameters of each test run: those that tests/ has too are only to be collected and to find their fixtures.
@pytest.mark.parametrize("where, selection, number", [
    ("cpu", ON_CPU, 2),
    ("cpu", "gpu_large", 2),
    ("fake-cuda", f"not ({NOT_ON_FAKES})", 1),
])  # fmt: skip
def test_gpu_tests_dry(where, selection, number):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", selection, str(ROOT / "tests/gpu")],
        env={**os.environ, "MOE_EXT_GPU_TESTS_ON": where, "MOE_EXT_PER_FUNCTION": str(number)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_what_earlier_tests_hold_counts_as_free_memory(monkeypatch):
    """The driver counts the allocator's unused blocks, and tensors in cycles, as taken."""
    spec = importlib.util.spec_from_file_location("gpu_large", ROOT / "tests/gpu/test_gpu_large.py")
    large = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(large)

    class Tensor:
        pass

    cycle = Tensor()
    cycle.itself, held = cycle, weakref.ref(cycle)
    del cycle
    free = [0]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(0 if held() else 2**36))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[-1], 2**37))
    assert large.free_bytes() == 2**36 > large.NEEDED_BYTES


def test_benchmark_on_the_cpu(monkeypatch, tmp_path):
    """Every table on the CUDA paths: events, the flush, graphs for decode."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1024)
    for bandwidth in ("copy_bandwidth", "read_bandwidth"):  # gigabytes
        monkeypatch.setattr(machine, bandwidth, lambda _: 1e12)
    with cuda_stand_in.everything_on_cpu(monkeypatch):
        arguments = ["--profile", "quick", "--backend", "cuda", "--rounds", "3", "--seconds", "0.01"]
        tables = ["--tables", "A,B,C,D"]
        path = bench.run(bench.parse([*arguments, *tables, "--out", str(tmp_path)]))
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"] == cuda_stand_in.NAME and not result.get("errors")
    assert {row["op"] for row in result["rows"]} == {op for module in bench.MODULES for op in module.OPS}
    skipped = [text for row in result["rows"] for text in row["skipped_peers"].values()]
    # What is compiled for a GPU needs one.
    assert not [text for text in skipped if "raised" in text and "no NVIDIA driver" not in text]
    decode = next(row for row in result["rows"] if row["table"] == "D")
    assert "waits for the device" in decode["skipped_peers"]["transformers eager (graph)"]


def test_graphs_follow_their_inputs(monkeypatch):
    """The stand-in is worth something: what is computed in Python while it captures goes stale, a sync is an error."""
    cuda_stand_in.install(monkeypatch)
    x = torch.ones(3)
    replay = graphed(lambda: (x * 2).cumsum(0))
    x.fill_(5.0)
    assert replay().tolist() == [10.0, 20.0, 30.0]
    scale = [2.0]
    replay = graphed(lambda: x * scale[0])
    scale[0] = 3.0
    assert replay().tolist() == [10.0] * 3
    for wait in (x.sum().item, lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            graphed_once(wait)


def graphed_once(run) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()


class Recorder:
    """Stands for the device's queue: what was put there, in order."""

    def __init__(self, monkeypatch) -> None:
        self.queued: list[object] = []
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queued.append(int(cycles) > 0))
        record = cuda_stand_in.Event.record
        monkeypatch.setattr(cuda_stand_in.Event, "record", lambda e: (self.queued.append("event"), record(e))[1])


def test_the_device_is_busy_until_the_call_is_queued(monkeypatch):
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1024)
    with cuda_stand_in.everything_on_cpu(monkeypatch):
        recorder = Recorder(monkeypatch)
        timer = Timer("cuda", 1, 1.0)
        measured = timer.compare({"ours": lambda: recorder.queued.append("call")})["ours"]
    assert recorder.queued == ["call"] * 3 + [True, "event", "call", "event"]
    assert measured.rounds == 1 and 0 < measured.median < 1


def test_a_peer_that_raises_is_skipped():
    """Another version of its library, no memory: the others are measured all the same."""
    x = torch.randn(8)

    def raises() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    peers = {"large": raises, "same": x.clone}
    case = Case("moe_mlp", "A", "x", torch.float32, "none", "forward", lambda: x, peers)
    assert case.check_peers() == {"same": 0.0} and list(case.peers) == ["same"]
    assert case.skipped_peers == {"large": "raised OutOfMemoryError: CUDA out of memory"}


def test_a_tensor_left_on_the_cpu_shows():
    hidden, maps = torch.randn(4, 8), torch.arange(4, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as monkeypatch, fake_cuda(monkeypatch):
        device_hidden, device_maps = torch.ones(4, 8, device="cuda"), torch.arange(4, device="cuda", dtype=torch.int32)
        rows = moe_ext.permute(device_hidden, device_maps, device_maps, 1)
        assert rows.device.type == "cuda" and rows.sum().item() == 32.0
        with pytest.raises(WrongDevice, match="tensors on"):
            moe_ext.permute(device_hidden, torch.arange(4, dtype=torch.int32), device_maps, 1)
        with pytest.raises(RuntimeError, match="device"):
            _ = device_hidden + torch.ones(4, 8)
    assert torch.equal(moe_ext.permute(hidden, maps, maps, 1), hidden)


def test_reference_plans_take_ids_on_a_device():
    def plans(device: str) -> list[torch.Tensor]:
        slots = torch.arange(24, device=device)
        ids = (slots * 7 // 3 % 5).view(12, 2)
        owners = torch.arange(3, dtype=torch.int32, device=device) * 2
        dropping = reference.routing_plan(ids, 5, capacity=3, drop_scores=(slots * 11 % 24).float().view(12, 2))
        return [*dropping, *reference.a2a_plan(ids, owners)[:5]]

    with pytest.MonkeyPatch.context() as monkeypatch, fake_cuda(monkeypatch):
        found = plans("cuda")
        assert all(x.device.type == "cuda" for x in found)
        found = [x.cpu().tolist() for x in found]
    assert found == [x.tolist() for x in plans("cpu")]
