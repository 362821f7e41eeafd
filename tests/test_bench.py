"""The harness on tiny shapes: every op has a row, every peer was checked, the JSON says what the README says."""

from __future__ import annotations

import json

import pytest
import torch

from bench import __main__ as bench
from bench import report
from bench.case import Case


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
    layers = [row for row in data["rows"] if row["op"] == "moe_mlp"]
    assert "torch grouped_mm" in layers[0]["peer_seconds"] and "dense mm" in layers[0]["ceiling_seconds"]
    assert {"uniform", "zipf", "one_hot", "real"} <= {row["routing"] for row in layers}


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
    "arguments, message", [(["--tables", "X"], "--tables"), (["--ops", "nope"], "--ops: unknown nope")]
)
def test_bad_options(arguments, message):
    with pytest.raises(SystemExit, match=message):
        bench.run(bench.parse(["--profile", "quick", *arguments]))
