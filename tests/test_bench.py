"""The harness on tiny shapes: every op has a row, every peer was checked, the JSON says what the README says."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import __main__ as bench
from bench import layers, machine, memory, report, shapes
from bench.case import Case, Context
from bench.timing import Timer, Timing
from bench.watchdog import HANG_STATUS


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.use_deterministic_algorithms(False)
    path = bench.run(bench.parse(["--profile", "quick", "--rounds", "3", "--out", str(tmp_path_factory.mktemp("out"))]))
    return json.loads(path.read_text()), path


def test_every_op_has_a_row(result):
    declared = {op for module in bench.MODULES for op in module.OPS}
    assert {row["op"] for row in result[0]["rows"]} == declared


def test_rows_are_complete(result):
    data = result[0]
    assert data["schema_version"] == report.SCHEMA_VERSION
    assert data["machine"]["copy_bytes_per_second"] > 0 and data["machine"]["moe_ext"]["version"]
    assert len(data["training"]["losses"]) == bench.TRAINING_STEPS["quick"]
    for row in data["rows"]:
        assert row["seconds"] > 0 and row["peer_seconds"] and row["best_peer"] in row["peer_seconds"]
        assert set(row["peer_difference"]) == set(row["peer_seconds"])
        ratio = row["peer_seconds"][row["best_peer"]] / row["seconds"]
        assert row["speedup_over_best_peer"] == pytest.approx(ratio)
    whole = [row for row in data["rows"] if row["op"] == "moe_mlp" and row["table"] == "A"]
    assert "torch grouped_mm" in whole[0]["peer_seconds"] and "dense mm" in whole[0]["ceiling_seconds"]
    assert {"uniform", "zipf", "one_hot", "real"} <= {row["routing"] for row in whole}
    if "gpu" not in data["machine"]:
        products = [row for row in data["rows"] if row["table"] == "A" and "moe_mlp" in row["op"]]
        assert products and all(row["ceiling_seconds"]["peak"] > 0 for row in products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_takes_longer_for_more_and_no_product_is_faster(dtype):
    size = 1024
    a = torch.randn(size, size).to(dtype)
    runs = {"peak": lambda: machine.spend_flops(2.0 * size**3, dtype), "product": lambda: a @ a,
            "ten": lambda: machine.spend_flops(20.0 * size**3, dtype)}  # fmt: skip
    timings = Timer("cpu", 9, 5.0).compare(runs)
    assert timings["ten"].best > 5 * timings["peak"].best
    assert timings["product"].best > 0.9 * timings["peak"].best


def test_what_the_peak_allows_nobody():
    def row(peak, direction):
        return {"op": "moe_mlp", "table": "A", "shape": "x T=1", "dtype": "float32", "routing": "uniform",
                "direction": direction, "best_peer": "mm", "peer_seconds": {"mm": 1.0},
                "ceiling_seconds": {"peak": peak}, "percent_of_ceiling": {"peak": 80.0}}  # fmt: skip

    assert not report.out_of_reach([row(0.7, "forward"), row(0.4, "forward+backward")])
    _, _, line, _ = report.out_of_reach([row(0.8, "forward")])
    assert "at most 1.25x" in line and "mm runs at 80% of the peak, moe_ext at 80%" in line
    assert "at most 1.67x" in report.out_of_reach([row(0.6, "forward+backward")])[2]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    arguments = ["--profile", "quick-full", "--tables", "A,D,scaling,memory", "--ops", "moe_mlp", "moe_mlp_backward"]
    path = bench.run(bench.parse([*arguments, "--rounds", "3", "--out", str(tmp_path_factory.mktemp("full"))]))
    return json.loads(path.read_text()), path


def test_full_profile_has_gpt_oss_with_every_peer(full):
    rows = [row for row in full[0]["rows"] if row["table"] == "A" and row["shape"].startswith("tiny-gpt-oss")]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    assert all("torch grouped_mm" in row["peer_seconds"] and "dense mm" in row["ceiling_seconds"] for row in rows)


def test_decode_is_held_against_reading(full):
    data = full[0]
    row = next(row for row in data["rows"] if row["table"] == "D" and row["direction"] == "forward")
    if "gpu" in data["machine"]:
        tiny = shapes.TINY_LAYERS[0]
        read = 4 * 3 * tiny.num_experts * tiny.hidden_size * tiny.intermediate_size  # 48 tokens: every expert is used
        expected = 100 * read / row["seconds"] / data["machine"]["read_bytes_per_second"]
        assert row["percent_of_read_bandwidth"] == pytest.approx(expected)
        assert report.ceiling_text(row).endswith("% of read")
    else:
        expected = 100 * row["ceiling_seconds"]["reading"] / row["seconds"]
        assert report.ceiling_text(row) == f"{expected:.0f}% of reading"


def test_reading_touches_the_used_experts_alone():
    shape = shapes.LayerShape("few", 2, 16, 8, 6, 1)
    layer = layers.Layer(Context("cpu", "quick", [torch.bfloat16]), shape, torch.bfloat16, "uniform")
    layer.ids = torch.tensor([[4], [1]])
    read = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.sum.default:
                read.append(args[0])
            return func(*args, **(kwargs or {}))

    run = layer.reading()
    with Watch():
        run()
    assert sum(x.numel() * x.element_size() for x in read) == layer.used_weight_bytes == 2 * 3 * 16 * 8 * 2


def test_scaling_varies_one_size_at_a_time(full):
    rows = [row for row in full[0]["rows"] if row["table"] == "scaling" and row["direction"] == "forward"]
    sweep, names = shapes.SWEEPS["quick"], {row["shape"] for row in rows}
    assert len(names) == len(rows) >= len(sweep.tokens) + len(sweep.experts) - 1
    assert {f"T={t}" for t in sweep.tokens} <= {word for name in names for word in name.split()}
    if full[0]["machine"]["threads"] > 1 and "gpu" not in full[0]["machine"]:
        assert any("threads=1" in name for name in names)
    assert torch.get_num_threads() == full[0]["machine"]["threads"]


def test_memory_is_measured_in_a_process_of_its_own(full):
    rows = [row for row in full[0]["rows"] if row["table"] == "memory"]
    if not rows and not memory.CLEAR_REFS.exists():
        pytest.skip("the kernel does not reset the high-water mark of resident memory")
    assert len(rows) == len(shapes.TINY_FULL_LAYERS)
    assert all("torch grouped_mm" in row["peer_peak_bytes"] and row["peak_bytes"] >= 0 for row in rows)


def test_zero_computation_experts_stand_against_ffn_experts(tmp_path):
    path = bench.run(bench.parse(["--profile", "quick", "--tables", "zero", "--rounds", "3", "--out", str(tmp_path)]))
    rows = json.loads(path.read_text())["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    assert all(
        row["best_peer"] == "loop over experts" and "FFN experts in their place" in row["ceiling_seconds"]
        for row in rows
    )


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_dense_ceiling_is_products_alone(gpt_oss):
    shape = shapes.LayerShape("dense", 6, 16, 8, 4, 2, gpt_oss=gpt_oss)
    layer = layers.Layer(Context("cpu", "quick", [torch.float32]), shape, torch.float32, "uniform")
    seen, flops = [], 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal flops
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                flops += 2 * args[0].numel() * args[1].shape[1]
            elif not func.is_view:
                seen.append(func)
            return result

    for backward, times in ((False, 1), (True, 3)):
        run, flops = layer.dense(backward=backward), 0
        with Watch():
            run()
        assert not seen and flops == times * shape.forward_flops


def test_gpt_oss_has_its_own_experts():
    listed = [*shapes.GPU_LAYERS, *shapes.CPU_FULL_LAYERS]
    assert {shape.name: shape.gpt_oss for shape in listed if "gpt-oss" in shape.name} == {
        "gpt-oss-20b": True, "gpt-oss-half": True,
    }  # fmt: skip


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux' /proc")
def test_memory_counts_what_was_touched():
    layer = shapes.LayerShape("memory", 64, 256, 512, 8, 2)
    command = "from bench.memory import *; print(peak_of('ours', LayerShape(*{}), torch.float32, 'cpu'))"
    child = subprocess.run([sys.executable, "-c", command.format(tuple(layer))], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    gradients = 4 * 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size
    assert gradients <= int(child.stdout) < 2 * gradients


def test_full_markdown(full):
    text = report.markdown(full[1])
    assert "### One layer against tokens, experts, threads" in text and "% of read" in text and "read " in text
    assert "### Peak memory above inputs and weights" in text and " MB |" in text


def test_transformers_is_a_peer_where_installed(result):
    pytest.importorskip("transformers", reason="transformers is not installed")
    row = next(row for row in result[0]["rows"] if row["op"] == "moe_mlp")
    assert {"transformers eager", "transformers grouped_mm"} <= set(row["peer_seconds"]) | set(row["skipped_peers"])


def test_markdown(result):
    text = report.markdown(result[1])
    assert "### A: Layers" in text and "moe_mlp_backward" in text and "nats per byte" in text


def test_a_peer_that_computes_something_else_is_refused():
    x = torch.randn(8)
    case = Case("op", "A", "x", torch.float32, "none", "forward", lambda: x, {"wrong": lambda: x + 0.1})
    with pytest.raises(AssertionError, match="wrong differs from ours"):
        case.check_peers()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tables", "X"], "--tables"),
        (["--ops", "nope"], "--ops: unknown nope"),
        (["--shapes", "nope"], "--shapes: none of nope"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(SystemExit, match=message):
        bench.run(bench.parse(["--profile", "quick", *arguments]))


def test_a_case_that_raises_costs_itself_only(monkeypatch):
    """The rows around it are measured and saved one by one; the run ends with a list of what is missing."""
    monkeypatch.setattr(bench.report, "make_row", lambda case, *_: {"name": case.name})
    wrong = lambda: torch.ones(3)  # noqa: E731
    cases = [
        Case("op", "A", name, torch.float32, "uniform", "forward", lambda: torch.zeros(3), peers)
        for name, peers in (("first", {}), ("second", {"peer": wrong}), ("third", {}))
    ]
    saved = []
    with bench.Progress() as progress:
        found = bench.measure(iter(cases), Timer("cpu", 1, 0.0), {"threads": 1}, None, progress,
                                 lambda found: saved.append(len(found.rows)))  # fmt: skip
    assert [row["name"] for row in found.rows] == ["first", "third"] and saved == [1, 1, 2]
    with pytest.raises(SystemExit, match=r"op second forward: AssertionError: .*peer differs"):
        bench.exit_if_wrong(found.errors, "cases could not be measured")


def make_case(name: str, peers: dict, ours=lambda: torch.zeros(3)) -> Case:
    return Case("op", "A", name, torch.float32, "uniform", "forward", ours, peers)


def test_a_peer_that_differs_from_the_others_costs_itself_only():
    x = torch.randn(8)
    case = make_case("x", {"same": x.clone, "wrong": lambda: x + 0.1, "short": lambda: x[:4]}, lambda: x)
    assert case.check_peers() == {"same": 0.0} and list(case.peers) == ["same"]
    assert case.skipped_peers["wrong"].startswith("differs from ours by 0.") and "inf" in case.skipped_peers["short"]
    timings = {name: Timing(1.0, 1.0, 1, (1.0,)) for name in ("ours", "same")}
    row = report.make_row(case, timings, {"same": 0.0}, {})
    assert row["differing_peers"] == ["wrong", "short"]
    assert "1 s (same; wrong differs; short differs)" in report.cells(row)
    unequal = make_case("x", {"nan": lambda: (x, x * math.nan), "same": lambda: (x, x)}, lambda: (x, x))
    assert list(unequal.check_peers()) == ["same"] and unequal.differing_peers == ["nan"]
    ours = make_case("x", {"one": x.clone, "other": x.clone}, lambda: x + 0.1)
    with pytest.raises(AssertionError, match=r"one differs from ours by 0.*; other differs .* no peer agrees"):
        ours.check_peers()


def test_a_case_that_cannot_be_made_costs_itself_only(monkeypatch, tmp_path, capsys):
    """One shape of one module, a whole module: the rest is measured, the JSON tells what is missing."""
    torch.use_deterministic_algorithms(False)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        yield

    monkeypatch.setattr(bench.bench_lora, "rank_wise_cases", no_memory)
    monkeypatch.setattr(bench.bench_plan, "cases", no_memory)
    arguments = ["--profile", "quick", "--tables", "C", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="2 cases could not be measured"):
        bench.run(bench.parse(arguments))
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert [line.split(":")[0] for line in result["errors"]] == ["bench.bench_plan", "rank-wise experts"]
    assert all(line.endswith("OutOfMemoryError: CUDA out of memory") for line in result["errors"])
    assert {"topk_gating", "permute", "a2a_pack"} <= {row["op"] for row in result["rows"]}


def test_a_library_that_cannot_be_imported_is_a_skipped_peer(monkeypatch):
    def broken(*_):
        raise ValueError("another version")

    monkeypatch.setattr(layers.peers, "transformers_experts", broken)
    layer = layers.Layer(Context("cpu", "quick", [torch.float32]), shapes.TINY_LAYERS[0], torch.float32, "uniform")
    assert layer.skipped == {"transformers": "raised ValueError: another version"}
    assert set(layer.contenders) == {"ours", "torch grouped_mm"}


HANGING = """
import json, sys, time, torch
from bench import __main__ as bench
from bench.case import Case
from bench.timing import Timer
def case(name, ours):
    return Case("op", "A", name, torch.float32, "uniform", "forward", ours)
def save(found):
    print(json.dumps([len(found.rows), found.errors]), flush=True)
cases = [case("good", lambda: torch.zeros(3)), case("stuck", lambda: time.sleep(60)), case("late", lambda: 1 / 0)]
about = {"threads": 1, "copy_bytes_per_second": 1.0}
with bench.Progress(disable=True) as progress:
    bench.measure(iter(cases), Timer("cpu", 1, 0.0), about, None, progress, save, case_seconds=2.0)
"""


def test_a_case_that_hangs_ends_the_process_and_is_told():
    child = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert child.returncode == HANG_STATUS, child.stderr
    *_, last = map(json.loads, child.stdout.splitlines())
    assert last == [1, ["op stuck forward: hang: not done after 2 s"]]
    assert "time.sleep" not in child.stdout and "Thread" in child.stderr  # where each thread was
