"""Which expert every physical slot of every rank holds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moe_ext import _host


@dataclass(frozen=True)
class ExpertPlacement:
    """Experts on ranks, in EPLB's format. Make one with :meth:`from_phy2log` or a planner.

    Physical slots are numbered rank by rank: rank r of R owns slots r * P / R up to (r + 1) * P / R. An expert in
    several slots is replicated; its tokens spread over the replicas.
    """

    phy2log: NDArray[np.int64]
    """[num_layers, num_slots] int64: the expert in a slot."""
    log2phy: NDArray[np.int64]
    """[num_layers, num_experts, most replicas] int64: the slots of an expert in ascending order, then -1."""
    logcnt: NDArray[np.int64]
    """[num_layers, num_experts] int64: replicas of an expert, at least 1."""
    num_ranks: int

    @classmethod
    def from_phy2log(cls, phy2log: ArrayLike, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """From phy2log [num_layers, num_slots].

        Raises ValueError if an expert is out of range or has no slot, or num_ranks does not divide num_slots.
        """
        slots = np.array(phy2log)
        if slots.dtype.kind not in "iu":
            raise ValueError(f"phy2log: expected integers, got {slots.dtype}")
        log2phy, logcnt = _host.placement_maps(slots, num_experts)
        if num_ranks < 1 or slots.shape[1] % num_ranks:
            raise ValueError(f"num_ranks: expected a divisor of num_slots {slots.shape[1]}, got {num_ranks}")
        return cls(slots.astype(np.int64), log2phy, logcnt, num_ranks)

    @classmethod
    def identity(cls, num_layers: int, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Experts in order, the same number on every rank."""
        return cls.from_phy2log(np.tile(np.arange(num_experts), (num_layers, 1)), num_experts, num_ranks)

    @property
    def num_layers(self) -> int:
        return int(self.phy2log.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.phy2log.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.logcnt.shape[1])

    def rank_loads(self, loads: ArrayLike) -> NDArray[np.float64]:
        """[num_layers, num_ranks] from loads [num_layers, num_experts], each split evenly among the replicas."""
        values = np.asarray(loads, dtype=np.float64)
        if values.shape != self.logcnt.shape:
            raise ValueError(f"loads: expected {list(self.logcnt.shape)}, got {list(values.shape)}")
        shares = np.take_along_axis(values / self.logcnt, self.phy2log, axis=1)
        per_rank: NDArray[np.float64] = shares.reshape(self.num_layers, self.num_ranks, -1).sum(2)
        return per_rank

    def balancedness(self, loads: ArrayLike) -> NDArray[np.float64]:
        """[num_layers]: mean over maximum of the ranks' loads, 1 where nothing is loaded."""
        per_rank = self.rank_loads(loads)
        hottest = per_rank.max(1)
        ratio: NDArray[np.float64] = np.divide(per_rank.mean(1), hottest, out=np.ones_like(hottest), where=hottest > 0)
        return ratio

    def moves_from(self, old: ExpertPlacement) -> NDArray[np.int64]:
        """[num_layers]: experts that some rank must fetch because it did not hold them under ``old``.

        Raises ValueError if the two differ in layers, experts, slots or ranks.
        """
        ours, theirs = ((p.num_layers, p.num_experts, p.num_slots, p.num_ranks) for p in (self, old))
        if ours != theirs:
            raise ValueError(f"old: expected (layers, experts, slots, ranks) {ours}, got {theirs}")

        def held(placement: ExpertPlacement) -> NDArray[np.int64]:
            counts = np.zeros((self.num_layers, self.num_ranks, self.num_experts), dtype=np.int64)
            ranks = np.arange(self.num_slots) * self.num_ranks // self.num_slots
            np.add.at(counts, (np.arange(self.num_layers)[:, None], ranks[None, :], placement.phy2log), 1)
            return counts

        moves: NDArray[np.int64] = np.maximum(held(self) - held(old), 0).sum((1, 2))
        return moves

    def tensors(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """phy2log, log2phy, logcnt as int64 tensors."""
        maps = (self.phy2log, self.log2phy, self.logcnt)
        first, second, third = (torch.from_numpy(array.copy()).to(device) for array in maps)
        return first, second, third

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON: num_experts, num_ranks and phy2log; the other maps follow from it."""
        content = {"num_experts": self.num_experts, "num_ranks": self.num_ranks, "phy2log": self.phy2log.tolist()}
        Path(path).write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertPlacement:
        """Reads what :meth:`save` wrote. Raises ValueError if the file holds something else."""
        content: Any = json.loads(Path(path).read_text())
        missing = {"num_experts", "num_ranks", "phy2log"} - set(content if isinstance(content, dict) else ())
        if missing:
            raise ValueError(f"{path}: not a placement, it lacks {', '.join(sorted(missing))}")
        return cls.from_phy2log(content["phy2log"], content["num_experts"], content["num_ranks"])
