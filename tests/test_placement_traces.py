"""Routing traces against counting by hand, and the recorder against the layers' own ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moe_ext.distributed.traces import RoutingTrace, TraceRecorder
from moe_ext.nn import MoELayer
from synthetic_traces import planted_trace

EXPERTS, TOPK = 6, 2


class Model(nn.Module):
    """Layers in order; one that is not a mixture stands between."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoELayer(8, 4, EXPERTS, TOPK) for _ in range(num_layers))
        self.seen: list[list[torch.Tensor]] = []

    def forward(self, hidden):
        ids = []
        for layer in self.layers:
            hidden = hidden + layer(torch.tanh(hidden)).hidden
            ids.append(layer.statistics.topk_ids)
        self.seen.append(ids)
        return hidden


def by_hand(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros((len(ids), num_experts), np.int64)
    pairs = np.zeros((max(len(ids) - 1, 0), num_experts, num_experts), np.int64)
    for layer, tokens in enumerate(ids):
        for token, row in enumerate(tokens):
            for e in row:
                if 0 <= e < num_experts:
                    counts[layer, e] += 1
                    for f in ids[layer + 1][token] if layer + 1 < len(ids) else []:
                        if 0 <= f < num_experts:
                            pairs[layer, e, f] += 1
    return counts, pairs


@pytest.mark.parametrize("shape", [(3, 20, 2), (1, 5, 1), (2, 0, 3), (4, 7, 5)])
def test_counts_and_transitions(shape):
    ids = np.random.default_rng(0).integers(-2, EXPERTS + 2, shape)
    trace = RoutingTrace.from_topk_ids(ids, EXPERTS)
    counts, pairs = by_hand(ids, EXPERTS)
    assert (trace.counts == counts).all() and (trace.transitions == pairs).all()
    assert trace.topk_ids.dtype == np.int32 and trace.topk_ids.max(initial=-1) < EXPERTS
    assert (trace.topk_ids == np.where((ids >= 0) & (ids < EXPERTS), ids, -1)).all()


@pytest.mark.parametrize("max_tokens", [100, 11, 0])
def test_recorder_against_layers(max_tokens):
    torch.manual_seed(0)
    model = Model(3)
    with TraceRecorder(model.layers, EXPERTS, max_tokens=max_tokens) as recorder:
        for num_tokens in (9, 0, 5):
            model(torch.randn(num_tokens, 8))
    seen = np.array([torch.cat(layer).numpy() for layer in zip(*model.seen, strict=True)])
    model(torch.randn(4, 8))  # the hooks are gone
    trace, whole = recorder.trace(), RoutingTrace.from_topk_ids(seen, EXPERTS)
    assert (trace.topk_ids == seen[:, :max_tokens]).all() and trace.topk_ids.shape == (3, min(14, max_tokens), TOPK)
    assert (trace.counts == whole.counts).all() and (trace.transitions == whole.transitions).all()


def test_recorder_masks_and_pads():
    """Ids outside the experts are none; layers with fewer slots are padded; layers without transitions."""
    ids = [torch.tensor([[5, -1], [6, 0], [1, 2]]), torch.tensor([[0], [1], [9]], dtype=torch.int16)]
    recorder = TraceRecorder([nn.Identity(), nn.Identity()], EXPERTS, max_tokens=8)
    for layer, topk_ids in enumerate(ids):
        recorder.record(layer, topk_ids)
    trace = recorder.trace()
    assert trace.topk_ids.tolist() == [[[5, -1], [-1, 0], [1, 2]], [[0, -1], [1, -1], [-1, -1]]]
    counts, pairs = by_hand(trace.topk_ids, EXPERTS)
    assert (trace.counts == counts).all() and (trace.transitions == pairs).all()
    plain = TraceRecorder([nn.Identity()], EXPERTS, max_tokens=8, transitions=False)
    plain.record(0, ids[0])
    assert plain.trace().transitions is None


def test_recording_never_reads_the_device():
    """Tensors without data raise on whatever would look at a value."""
    recorder = TraceRecorder([nn.Identity(), nn.Identity()], EXPERTS, max_tokens=4)
    for layer in (0, 1, 0, 1):
        recorder.record(layer, torch.empty(3, 2, dtype=torch.int32, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        recorder.trace()


def test_save_load_split(tmp_path):
    trace = planted_trace(3, 50, EXPERTS, TOPK, num_topics=3)
    trace.save(tmp_path / "trace.npz")
    loaded = RoutingTrace.load(tmp_path / "trace.npz")
    for name in ("topk_ids", "counts", "transitions"):
        assert (getattr(loaded, name) == getattr(trace, name)).all()
    first, second = loaded.split(0.3)
    assert first.topk_ids.shape[1] == 15 and second.topk_ids.shape[1] == 35
    assert (np.concatenate([first.topk_ids, second.topk_ids], 1) == trace.topk_ids).all()
    assert (first.counts + second.counts == trace.counts).all()
    assert (first.transitions + second.transitions == trace.transitions).all()
    np.savez(tmp_path / "other.npz", counts=trace.counts)
    with pytest.raises(ValueError, match="lacks topk_ids"):
        RoutingTrace.load(tmp_path / "other.npz")


def test_errors():
    with pytest.raises(ValueError, match=r"topk_ids: expected integers .* got float64"):
        RoutingTrace.from_topk_ids(np.zeros((2, 3, 1)), 4)
    with pytest.raises(ValueError, match="num_experts: expected at least 1"):
        RoutingTrace.from_topk_ids(np.zeros((2, 3, 1), int), 0)
    with pytest.raises(ValueError, match="fraction"):
        planted_trace(1, 4, 4, 1).split(1.0)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        TraceRecorder([], 4, max_tokens=1)
    with pytest.raises(ValueError, match="got 0 and -1"):
        TraceRecorder([nn.Identity()], 0, max_tokens=-1)
    recorder = TraceRecorder([nn.Identity(), nn.Identity()], 4, max_tokens=3)
    with pytest.raises(ValueError, match="topk_ids: expected integers"):
        recorder.record(0, torch.zeros(3, 2))
    recorder.record(0, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="topk 2 as before"):
        recorder.record(0, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"same number of tokens in each, got \[3, 0\]"):
        recorder.trace()
    with TraceRecorder([nn.Identity()], 4, max_tokens=3) as hooked, pytest.raises(TypeError, match=r"statistics\.topk"):
        hooked.layers[0](torch.zeros(2, 2))
