"""The command from trace to placement, report and picture."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from moe_ext.distributed.placement import ExpertPlacement, balance_experts
from moe_ext.distributed.placement.__main__ import main
from moe_ext.distributed.placement.plot import plot_rank_loads
from synthetic_traces import planted_trace

TIMES = ["--intra", "1e-6", "4e11", "--inter", "5e-6", "5e10", "--seconds-per-row", "1e-6"]


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    planted_trace(2, 1000, 16, 2, exponent=1.0).save(path)
    return str(path)


def figures(output: str) -> dict[str, list[float]]:
    """The rows of the report by name."""
    rows = [
        line.rsplit(maxsplit=2)
        for line in output.splitlines()
        if not line.startswith(("simulated cluster", "on", "exp"))
    ]
    return {name.strip(): [float(old), float(new)] for name, old, new in rows}


def test_eplb(trace_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "placement.json", tmp_path / "loads.png"
    command = [trace_file, "--ranks", "8", "--ranks-per-node", "4", "--redundant", "8"]
    assert main([*command, "--out", str(out), "--plot", str(picture), *TIMES]) == 0
    printed = capsys.readouterr().out
    rows = figures(printed)
    assert "simulated cluster: Cluster(num_ranks=8, ranks_per_node=4" in printed
    assert rows["balancedness"][1] > 0.8 > rows["balancedness"][0] + 0.1
    assert rows["simulated step seconds"][1] < rows["simulated step seconds"][0]
    profile, _ = planted_trace(2, 1000, 16, 2, exponent=1.0).split()
    expected = balance_experts(profile.counts, 24, num_ranks=8, num_nodes=2)
    assert (ExpertPlacement.load(out).phy2log == expected.phy2log).all()
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_moetuner_and_rebalance(trace_file, tmp_path, capsys):
    pytest.importorskip("scipy")
    out = str(tmp_path / "placement.json")
    assert main([trace_file, "--ranks", "4", "--ranks-per-node", "2", "--method", "moetuner", "--out", out, "--time-limit", "2", *TIMES]) == 0  # fmt: skip
    rows = figures(capsys.readouterr().out)
    assert rows["balancedness"][1] > rows["balancedness"][0]
    assert main([trace_file, "--ranks", "4", "--method", "rebalance", "--max-moves", "3", "--old", out]) == 0
    printed = capsys.readouterr().out
    assert "simulated" not in printed and int(printed.rsplit(maxsplit=1)[1]) <= 3
    # Without times the bytes are still counted; 5 ranks do not divide 16 experts.
    assert main([trace_file, "--ranks", "5", "--redundant", "4"]) == 0
    assert figures(capsys.readouterr().out)["intra node bytes"][1] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "8", "--redundant", "3"], "num_ranks: expected a divisor of num_slots 19, got 8"),
        (["--ranks", "8", "--method", "rebalance"], "--method rebalance needs --old"),
        (["--ranks", "8", "--seconds-per-row", "1"], "--intra, --inter and --seconds-per-row go together"),
        (["--ranks", "8", "--ranks-per-node", "3"], "ranks_per_node: expected a divisor"),
        (["--ranks", "8", "--out", "/nowhere/placement.json"], "No such file or directory"),
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
    ],
)
def test_errors(arguments, message, trace_file, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([trace_file, *arguments])
    assert message in capsys.readouterr().err


def test_plot_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected two .* got \[2, 3\] and \[2, 4\]"):
        plot_rank_loads(np.ones((2, 3)), np.ones((2, 4)), tmp_path / "x.png")
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'moe_ext\[placement\]'"):
        plot_rank_loads(np.ones((2, 3)), np.ones((2, 3)), tmp_path / "x.png")
