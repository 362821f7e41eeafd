"""Routing traces: which experts every token went to, layer by layer, recorded without a host synchronisation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ReadTopkIds = Callable[[nn.Module, Any], Tensor]


def statistics_topk_ids(module: nn.Module, output: Any) -> Tensor:
    """The ids of the last call of a :class:`moe_ext.nn.MoELayer`, or of any module with such ``statistics``."""
    ids = getattr(getattr(module, "statistics", None), "topk_ids", None)
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"layers: expected modules with statistics.topk_ids, got {type(module).__name__}; "
            "give `read` for other modules"
        )
    return ids


@dataclass(frozen=True)
class RoutingTrace:
    """Where the tokens of a profiling run went.

    A profile for one token set, and its evaluation on another, come from :meth:`split`.
    """

    topk_ids: NDArray[np.int32]
    """[num_layers, num_tokens, topk] int32; -1 for a slot without an expert. A token has one row in every layer."""
    counts: NDArray[np.int64]
    """[num_layers, num_experts] int64: slots of every expert, of all tokens seen (``topk_ids`` may hold fewer)."""
    transitions: NDArray[np.int64] | None = None
    """[num_layers - 1, num_experts, num_experts] int64, MoETuner's R: entry [l, e1, e2] counts the tokens that chose
    e1 in layer l and e2 in layer l + 1. None if not recorded."""

    @classmethod
    def from_topk_ids(cls, topk_ids: NDArray[Any], num_experts: int, *, transitions: bool = True) -> RoutingTrace:
        """Counts and transitions from topk_ids [num_layers, num_tokens, topk]; ids outside [0, num_experts) are none.

        Raises ValueError if topk_ids is not three-dimensional and integer, or num_experts not positive.
        """
        ids = np.asarray(topk_ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"topk_ids: expected integers [num_layers, num_tokens, topk], got {ids.dtype} {list(ids.shape)}"
            )
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
        ids = np.where((ids >= 0) & (ids < num_experts), ids, -1).astype(np.int32)
        # Bin 0 takes what has no expert.
        counts = [np.bincount(layer.ravel() + 1, minlength=num_experts + 1)[1:] for layer in ids]
        trace = cls(ids, np.array(counts, dtype=np.int64).reshape(len(ids), num_experts))
        if not transitions:
            return trace
        pairs = [_pair_counts(first, second, num_experts) for first, second in pairwise(ids)]
        return replace(trace, transitions=np.array(pairs, dtype=np.int64).reshape(-1, num_experts, num_experts))

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[1])

    def split(self, fraction: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
        """Two traces of disjoint tokens, the first with ``fraction`` of them: one to plan with, one to judge the plan.

        Counts and transitions are those of the tokens in ``topk_ids``.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
        first = round(self.topk_ids.shape[1] * fraction)
        halves = (self.topk_ids[:, :first], self.topk_ids[:, first:])
        one, two = (
            self.from_topk_ids(half, self.num_experts, transitions=self.transitions is not None) for half in halves
        )
        return one, two

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file."""
        arrays: dict[str, NDArray[Any]] = {"topk_ids": self.topk_ids, "counts": self.counts}
        if self.transitions is not None:
            arrays["transitions"] = self.transitions
        np.savez_compressed(Path(path), allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Reads what :meth:`save` wrote. Raises ValueError if the file holds something else."""
        with np.load(Path(path), allow_pickle=False) as archive:
            missing = {"topk_ids", "counts"} - set(archive.files)
            if missing:
                raise ValueError(f"{path}: not a routing trace, it lacks {', '.join(sorted(missing))}")
            return cls(
                archive["topk_ids"],
                archive["counts"],
                archive["transitions"] if "transitions" in archive.files else None,
            )


def _pair_counts(first: NDArray[np.int32], second: NDArray[np.int32], num_experts: int) -> NDArray[np.int64]:
    pairs = first[:, :, None].astype(np.int64) * num_experts + second[:, None, :]
    pairs = pairs[(first[:, :, None] >= 0) & (second[:, None, :] >= 0)]
    return np.bincount(pairs, minlength=num_experts * num_experts).reshape(num_experts, num_experts)


class TraceRecorder:
    """Records the routing of ``layers`` while it is entered, on their device.

    Nothing is read back until :meth:`trace`, so recording never waits for the device; buffers have their full size from
    the first call on. ``layers`` run in order, once per forward pass, on the same tokens (recomputed activations would
    count twice).

    Args:
        layers: the mixture-of-experts layers of a model, first to last.
        num_experts: of the layer with the most.
        max_tokens: tokens whose ids are kept, [num_layers, max_tokens, topk] in all; counts and transitions go on when
            they are full.
        transitions: count transitions too: num_experts^2 int64 for every pair of layers.
        read: takes a layer and its output, returns topk_ids [num_tokens, topk]; by default ``statistics.topk_ids``.

    Example::

        with TraceRecorder(layers, num_experts=64, max_tokens=100_000) as recorder:
            for batch in batches:
                model(batch)
        recorder.trace().save("trace.npz")
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        num_experts: int,
        *,
        max_tokens: int,
        transitions: bool = True,
        read: ReadTopkIds = statistics_topk_ids,
    ) -> None:
        if not layers:
            raise ValueError("layers: expected at least one module, got none")
        if num_experts < 1 or max_tokens < 0:
            raise ValueError(
                f"num_experts, max_tokens: expected at least 1 and at least 0, got {num_experts} and {max_tokens}"
            )
        self.layers, self.num_experts, self.max_tokens = list(layers), num_experts, max_tokens
        self.count_transitions, self.read = transitions, read
        self._records: list[_LayerRecord | None] = [None] * len(self.layers)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> TraceRecorder:
        for index, layer in enumerate(self.layers):

            def hook(module: nn.Module, _: Any, output: Any, index: int = index) -> None:
                self.record(index, self.read(module, output))

            self._handles.append(layer.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def record(self, layer: int, topk_ids: Tensor) -> None:
        """Takes topk_ids [num_tokens, topk] of ``layer``; ids outside [0, num_experts) are no expert."""
        if topk_ids.dim() != 2 or topk_ids.dtype not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(
                f"topk_ids: expected integers [num_tokens, topk], got {topk_ids.dtype} {list(topk_ids.shape)}"
            )
        record = self._records[layer]
        if record is None:
            record = self._records[layer] = _LayerRecord(self, topk_ids)
        if topk_ids.shape[1] != record.ids.shape[1]:
            raise ValueError(f"topk_ids: expected topk {record.ids.shape[1]} as before, got {list(topk_ids.shape)}")
        before = self._records[layer - 1] if layer and self.count_transitions else None
        record.add(topk_ids, None if before is None else before.last)

    def trace(self) -> RoutingTrace:
        """What was recorded, on the host. Raises ValueError if the layers saw different numbers of tokens."""
        records = [record for record in self._records if record is not None]
        seen = [0 if record is None else record.tokens for record in self._records]
        if len(set(seen)) > 1:
            raise ValueError(f"layers: expected the same number of tokens in each, got {seen}")
        experts, topk = self.num_experts, max((record.ids.shape[1] for record in records), default=0)
        ids = np.full((len(seen), min(seen[0], self.max_tokens), topk), -1, dtype=np.int32)
        for row, record in zip(ids, records, strict=False):
            row[:, : record.ids.shape[1]] = record.ids[: len(row)].cpu().numpy()
        counts = np.zeros((len(seen), experts), dtype=np.int64)
        pairs = np.zeros((len(seen) - 1, experts, experts), dtype=np.int64)
        for index, record in enumerate(records):
            counts[index] = record.counts[:-1].cpu().numpy()
            if index and record.pairs is not None:
                pairs[index - 1] = record.pairs[:-1].view(experts, experts).cpu().numpy()
        return RoutingTrace(ids, counts, pairs if self.count_transitions else None)


class _LayerRecord:
    """The buffers of one layer. The last bin of ``counts`` and ``pairs`` takes what has no expert."""

    def __init__(self, recorder: TraceRecorder, topk_ids: Tensor) -> None:
        self.num_experts, device = recorder.num_experts, topk_ids.device
        dtype = torch.int16 if self.num_experts <= torch.iinfo(torch.int16).max else torch.int32
        self.ids = torch.full((recorder.max_tokens, topk_ids.shape[1]), -1, dtype=dtype, device=device)
        self.counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=device)
        self.pairs = (
            torch.zeros(self.num_experts**2 + 1, dtype=torch.int64, device=device)
            if recorder.count_transitions
            else None
        )
        self.tokens = 0
        self.last: Tensor | None = None

    def add(self, topk_ids: Tensor, previous: Tensor | None) -> None:
        experts = self.num_experts
        ids = torch.where((topk_ids >= 0) & (topk_ids < experts), topk_ids, experts).long()
        kept = self.ids[self.tokens : self.tokens + len(ids)]
        kept.copy_(torch.where(ids < experts, ids, -1)[: len(kept)])
        _count(self.counts, ids)
        if self.pairs is not None and previous is not None and len(previous) == len(ids):
            first, second = previous.to(ids.device)[:, :, None], ids[:, None, :]
            _count(self.pairs, torch.where((first < experts) & (second < experts), first * experts + second, -1))
        self.tokens += len(ids)
        self.last = ids


def _count(bins: Tensor, index: Tensor) -> None:
    """Adds one to ``bins`` at every index; -1 is the last bin. Unlike torch.bincount it never asks for the maximum."""
    index = torch.where(index < 0, len(bins) - 1, index).flatten()
    bins.scatter_add_(0, index, torch.ones_like(index))
