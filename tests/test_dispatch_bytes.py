"""The table of what an all-to-all moves: counts against the closed form, the committed table against the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import dispatch_bytes
from bench.__main__ import main
from bench.dispatch_bytes import MODELS, RANKS, WAYS, Link

ROOT = Path(__file__).resolve().parent.parent
LINK = Link(num_tokens=4096, latency_us=10.0, bandwidth=50.0, bottleneck=4)


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_counted_rows_are_those_of_the_formula(num_ranks, shape):
    for way in WAYS:
        _, _, _, expected, counted, *_ = dispatch_bytes.row(shape, num_ranks, way, LINK)
        assert float(counted) == pytest.approx(float(expected), rel=0.01)


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_rows_that_leave_the_node_are_those_of_the_formula(shape):
    for num_ranks in RANKS[1:]:
        found = dispatch_bytes.crossings(shape, num_ranks, LINK)
        for crossing in found.values():
            assert crossing.counted == pytest.approx(crossing.expected, rel=0.01)
        assert found["node"].counted < found["dedup"].counted < found["slot"].counted
    assert dispatch_bytes.crossings(MODELS[0], 16, LINK)["slot"].expected == 4


def test_bytes_of_a_row_by_hand():
    """DeepSeek-V3: 7168 elements; 8 ids and weights of 4 bytes, or one id; 56 scales."""
    slot, dedup, fp8, narrow = (dispatch_bytes.bytes_out(MODELS[0], way, LINK) for way in WAYS)
    assert slot == 2 * 7168 + 16
    assert dedup == 2 * 7168 + 64
    assert fp8 == 7168 + 4 * 56 + 64
    assert narrow == 2 * 7168 // 4 + 64


def test_the_committed_table_is_what_the_command_prints(capsys):
    main(["dispatch-bytes"])
    assert capsys.readouterr().out == (ROOT / "docs/dispatch_bytes.md").read_text()
