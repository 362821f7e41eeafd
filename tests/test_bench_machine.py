"""What a result says of its machine and of its folder: commit, clocks, no second file beside it, no wrong words."""

from __future__ import annotations

import json
import os

import pytest
import torch

from bench import html_report, machine, report

# As nvidia-smi -q -d CLOCK,PERFORMANCE,PIDS prints it.
SEEN = f"""
GPU 00000000:00:05.0
    Performance State                                  : P0
    Clocks Event Reasons
        Idle                                           : Not Active
        SW Power Cap                                   : Active
        HW Slowdown                                    : Not Active
    Clocks
        Graphics                                       : 1755 MHz
        SM                                             : 1755 MHz
    Max Clocks
        SM                                             : 1980 MHz
    Processes
        Process ID                                     : {os.getpid()}
            Name                                       : python
        Process ID                                     : 4242
            Name                                       : someone else
"""


def test_clocks_and_neighbours():
    assert machine.gpu_now(SEEN) == {
        "sm_clock": "1755 MHz", "held_down_by": ["SW Power Cap"], "other_processes": ["4242"],
    }  # fmt: skip
    assert machine.gpu_now("") is None
    assert machine.gpu_now("No devices were found : ???")["sm_clock"] is None


def test_commit_is_told_where_there_is_no_history(monkeypatch):
    monkeypatch.setattr(machine, "_output_of", lambda *_: None)
    assert machine._commit() is None
    monkeypatch.setenv("MOE_EXT_COMMIT", "abc1234+")
    assert machine._commit() == "abc1234+"


@pytest.mark.parametrize("other_file_system", [False, True])
def test_a_result_has_no_second_file_beside_it(monkeypatch, tmp_path, other_file_system):
    beside = []
    replace = type(tmp_path).replace

    def watched(self, target):
        beside.extend(tmp_path.iterdir())
        if other_file_system:
            raise OSError("Invalid cross-device link")
        return replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", watched)
    report.write_json(tmp_path / "x.json", {"cpu": "x"}, [], {})
    assert beside == [] and json.loads((tmp_path / "x.json").read_text())["machine"] == {"cpu": "x"}


@pytest.mark.parametrize("gpu", [False, True])
def test_only_what_was_measured_is_said(gpu, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    about = {"torch": torch.__version__, "commit": "c", "threads": 1, "cpu": "x", **({"gpu": "H"} if gpu else {})}
    report.write_json(tmp_path / "x.json", about, [], {"command": "c"})
    for text in (report.page([tmp_path / "x.json"]), html_report.page([tmp_path / "x.json"])):
        assert ("No GPU has been measured yet." in text) is not gpu
